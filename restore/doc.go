// Package restore puts views to use: it writes a disk, as a [Source] shows it,
// to an image.
//
// # Promises
//
//   - Raw leaves a complete, synced image under the name asked for, or nothing: it
//     writes to a temporary name beside it and renames last.
//   - Zeroes take no space in the image.
//   - An existing file is not touched unless Options.Force is set.
//
// # The caller must
//
//  1. give a Source that does not change meanwhile: a view, not a live disk.
//
// # Concurrency
//
// Raw reads the source from several goroutines, all of which have ended when it returns.
//
// # Limits
//
// Targets are files. qcow2 is made by qemu-img, which reads the view over NBD itself.
package restore
