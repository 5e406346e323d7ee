// Package restore puts views to use: it writes a disk, as a [Source] shows it, to an image, and takes
// a disk back to what it was.
//
// # Promises
//
//   - ToFile leaves a complete, synced image under the name asked for, or what was there before: it
//     writes to a file beside it and renames last. What a break leaves there, the next call goes on with, if it
//     is asked for the same disk at the same LSN.
//   - Onto writes a device, an export or an existing copy in place. Until it returns without an error the
//     target is a mix of old and new; a note says so and how far it is.
//   - Zeroes take no space in an image. With a list of changes nothing else is read or written.
//   - What is noted as done is durable in the target.
//   - Verify compares every byte, read from the target again.
//   - Rollback writes the blocks that differ, and no others.
//
// # The caller must
//
//  1. give a Source that does not change meanwhile: a view, not a live disk;
//  2. give a list of changes only with a target that is the disk as of their beginning.
//
// # Concurrency
//
// A source is read, and a target written, from several goroutines, all of which have ended when a function returns.
// Two processes that restore to one target exclude each other by a lock on the note.
//
// # Format
//
// qcow2 images are version 3 without a backing file: docs/interop/qcow2.txt of QEMU. The note is JSON, see
// type note; it is read by the version that wrote it, and of no use to others.
//
// # Limits
//
// A qcow2 image can not be brought up to date by a list of changes.
package restore
