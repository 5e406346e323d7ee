// Package mount shows disks and files through FUSE.
//
// # Promises
//
//   - Devices shows block devices as files, for the kernel's loop driver. What is written goes to the device, nowhere else.
//
// # The caller must
//
//  1. give devices whose calls end: what waits for one waits in the kernel, where it can not be interrupted;
//  2. close what stands on a file before it closes Devices.
//
// # Concurrency
//
// Everything is safe for concurrent use.
//
// # Limits
//
// Linux, with /dev/fuse, and fusermount3 or root.
package mount
