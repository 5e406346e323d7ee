// Package export makes a disk that can not be changed one that can: an [Overlay] keeps what is written in a sparse file
// of the disk's size, and reads everything else from its base.
//
// # Promises
//
//   - The base is never written. A read sees the last write to each block, or the base.
//   - Flush: what was written before it is durable when it returns. After a crash of the host a block is what it was at
//     the last flush or what was written later, never a mix with the base, never zeroes that nobody wrote.
//   - What was acknowledged outlives the process: a killed daemon loses nothing that the kernel has.
//   - Files that are missing, or are of another disk, are errors, and never made anew.
//   - Fill copies the base into the file, beside reads and writes; when it has returned, the file is the disk, whole
//     and by itself.
//   - A failed sync is never retried as if it had worked: the overlay takes no writes from then on, and is as of the last
//     flush that succeeded when it is opened again.
//
// # The caller must
//
//  1. give a Base that does not change, and keep it open as long as the overlay is;
//  2. open an overlay once at a time.
//
// # Concurrency
//
// An Overlay is safe for concurrent use; Close comes last. Writes to one part of 1 MiB exclude each other, and Fill's.
//
// # Format
//
// DISK.raw is the data. DISK.map has a bit for each block of 4 KiB that stands in the data: bit block%8 of byte block/8,
// behind a header of 4096 bytes (magic "TMOVLMAP", version 1 and block size as 32-bit, size of the disk as 64-bit,
// little-endian, then the boot's identity as text). It is true as long as the host has not started anew. DISK.flushed is the
// same as of the last flush, and what counts then.
//
// # Limits
//
// Sizes stay. A block that was written never falls back to the base.
package export
