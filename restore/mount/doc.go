// Package mount shows disks and files through FUSE.
//
// # Promises
//
//   - Devices shows block devices as files, for the kernel's loop driver. What is written goes to the device, nowhere else.
//   - Mount shows the moments of a group, read-only: every file and attribute that its Source finds, and each disk as a file. Names are
//     shown as those of one file where the file system's numbers tell that they are, and never else. Nothing of one moment is shown in another.
//   - A moment is open while something of it is, and for a while after. One that is broken is opened anew by its next use;
//     files that are open meanwhile give errors, never other bytes.
//   - A use that takes longer than its limit is ended, by breaking its moment; but what the kernel reads by itself is bound by what it reads
//     from. The end of a mount breaks what is in use.
//
// # The caller must
//
//  1. give devices and disks whose calls end: what waits for one waits in the kernel, where it can not be interrupted;
//  2. close what stands on a file before it closes Devices;
//  3. give a Source whose moments do not change: the kernel is told to remember them.
//
// # Concurrency
//
// Everything is safe for concurrent use.
//
// # Limits
//
// Linux, with /dev/fuse, and fusermount3 or root. Links are shown as they are, and lead where the host takes them. A file whose
// number has more than 44 bits has one of its own for each of its names, and so has every file of the volumes after the first half
// million of a mount. At most 8 moments are open at once; if all are in use there is EBUSY.
package mount
