// Package disk keeps a disk's backing equal to the journal's head.
//
// What the journal holds and the backing does not yet is found through the
// overlay: a map from block to the place of its newest bytes in the segments,
// where the page cache still has them. The overlay is two layers. Writes go
// to the active one. Freeze makes it the frozen one. Apply captures the originals of the blocks
// that are about to be overwritten for the first time, writes the newest
// bytes of each block to the backing. Drop lets go of the frozen layer.
//
// # Promises
//
//   - A read sees every write that Insert returned for before it began.
//   - No byte reaches the backing before the original it destroys is durable (P1):
//     Apply asks the Journal for that. That its record is, is the caller's.
//   - Bytes read from a segment are verified; damaged ones are an error (P7),
//     to the reader and to Apply alike.
//
// # The caller must
//
//  1. serialise Insert, and call it in the order of LSNs;
//  2. make every inserted record durable between Freeze and Apply;
//  3. serialise Freeze, Apply, Drop, Save, Load, Keep and Forget of one disk (Save may be
//     called from Apply's progress). After an error of Apply the frozen layer stays and reads go on being
//     right: Apply must be called again, after a lack of space, or the disk given up.
//
// # Concurrency
//
// ReadAt, Extents and Captured may run beside everything else.
//
// # Format
//
// The backing is a plain raw image. The captured bitmap is kept in pages of
// 1024 blocks, bit i%8 of byte i/8 for block i of the page.
package disk
