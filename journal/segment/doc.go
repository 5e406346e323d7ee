// Package segment is the append-only payload log of a group: its files, their
// reading, and the recovery of a torn tail.
//
// A group's directory holds two kinds of files. The log holds the group's
// records by LSN, each LSN once, without gaps, but for bridges: see Header.Bridge. The originals hold what blocks
// held before their first journaled overwrite, and blocks carried over when a
// log file was dropped; they are local to this host and take no LSN.
//
// # Promises
//
//   - A record that Append returned for is with the kernel: it outlives the
//     process, not the host (P2a).
//   - When Sync returns, every record whose Append returned before is durable,
//     and so is its file's name.
//   - Space for a record is reserved before it is written, where the file system
//     can: a record that was taken does not meet a full one later.
//   - Scan stops at the first record that is not exactly what was written.
//   - A file that is made compact has the same records at the same offsets, before, meanwhile and after, and whatever a crash leaves.
//
// # The caller must
//
//  1. serialise Append and Roll of one Writer, and its Syncs with each other;
//  2. treat an error of Append or Sync, other than no space at a Roll, as final:
//     what reached the file is then unknown until it is opened again;
//  3. hold a reference (Set.Acquire) while it reads a file that may be removed;
//  4. give Compact, Cut and Rewrite only files that no Writer appends to any more, with a reference held.
//
// # Format
//
// The file header is specified above Header.encode; records follow it from the
// next multiple of 4096, as package record specifies, without gaps. A file ends
// where its records do: at zeroes, or at its last byte. A compact file keeps the same in less space, see Compact. Records that lie at or
// beyond the first LSN of a later log file are superseded: they are what a
// crash left of a tail that recovery cut.
//
// # Limits
//
// Every file of a group is kept open. A file is at most 1 GiB. Making one compact takes some 100 bytes of memory for each of its blocks.
package segment
