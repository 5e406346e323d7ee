// Package guestfs finds the file systems on a guest's disks, and has them shown as files.
//
// # Promises
//
//   - Read finds partitions (GPT, MBR with logical ones) and linear LVM2 volumes, also such that stand on several disks. What it
//     finds lies within the disks. What is malformed is told, and hides nothing else.
//   - Both ways show every file as the guest would see it after its own recovery: the journal is replayed into an overlay that
//     is thrown away. A file system of which that can not be said is refused. The disks are not written.
//   - Nothing of a volume is opened before it is asked for. Break ends what shows files, and Err tells that it has ended; the programs
//     that do end with this process.
//   - Isolated keeps what is hostile in an image from the host's kernel and from this process.
//
// # The caller must
//
//  1. give disks that do not change meanwhile, views, whose reads end;
//  2. use Kernel for guests that are trusted alone, as root;
//  3. have Kernel.Attach serve its files from another process, and break them when it breaks what is opened;
//  4. follow no link of what Dir returns: it leads to the host;
//  5. close what Open returned before the devices.
//
// # Concurrency
//
// Read has no state. What Open returns is safe for concurrent use; its Close comes last.
//
// # Format
//
// GPT: UEFI Specification 2.10, chapter 5. LVM2: its sources, lib/format_text.
//
// # Limits
//
// NTFS whose journal is not empty is refused: nothing but Windows replays it. The kernel's way shows what the host's kernel has
// drivers for. LVM volumes that are striped, mirrored, thin or cached are not put together. One VM has at
// most 200 volumes. Sectors of MBR tables have 512 bytes.
package guestfs
