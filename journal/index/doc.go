// Package index is the journal's key space in Pebble: which record holds each
// version of each block, the markers, times, and the watermarks of a group.
//
// # Promises
//
//   - A batch is applied whole or not at all, and batches survive in the order
//     in which they were committed: after a crash the database is the state
//     after some batch, and its [Watermark] says which.
//   - The newest version of a block at or below an LSN is found with one seek
//     a size class ([Classes] of them), however long the history.
//   - The index holds no truth: all of it can be made again from the segments.
//
// # The caller must
//
//  1. give every batch a watermark that covers all earlier ones;
//  2. replay the segments from the watermark after Open: Pebble's own log is
//     off, and what [DB.Flush] has not covered may be gone;
//  3. give Readers back, and call [Group.RetireReaders] now and then: a Reader sees
//     the database as it was when it was made, and pins its files.
//
// A DB and its Groups are safe for concurrent use; a Reader has one user.
//
// # Format
//
// Keys are specified in keys.go, values beside their types. The format is
// versioned by the key "version".
package index
