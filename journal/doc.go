// Package journal is the durable, ordered history of a group of disks: append,
// sync, mark, view, trim.
//
// A [Store] is a daemon's state directory: one index for all groups, and a
// directory of segments for each. A [Group] orders the writes of its disks,
// keeps their backings equal to its head, and opens views of any of them at
// any LSN of the continuous window.
//
// # Promises
//
//   - P1, write-ahead: see package disk.
//   - P2, flush: when Group.Sync returns, every record whose Append returned
//     before is durable.
//   - P2a: when Append returns, the record is with the kernel.
//   - P3, prefix: after a crash the history is a prefix of what was appended,
//     not shorter than the last Sync. If a damaged record lies before what is known
//     to have been durable, the group does not open for writing, and says where.
//   - P4, any point: for every LSN from Horizon to Newest, and every kept point, a view equals the disks
//     as of that record. Older ones may be viewed, too, if there are gaps: see Group.Viewable.
//   - P7: damage is an error where it is read.
//   - A [Feed] reads the records that are durable, each once and in their order: what it has read is never more than
//     what the next Open finds.
//   - A group has one writer: this daemon, or, if it follows, another, whose records it takes under their LSNs
//     ([Group.Receive]). A reign is one writer's: whoever leads begins one of a higher epoch. What two journals have in
//     common follows from their reigns and heads ([record.Reigns.Common]).
//   - P10: without an index, Open makes it again from the segments.
//
// # The caller must
//
//  1. be the only process that writes the state directory and the backings (the
//     directory is locked, the backings are not);
//  2. call Run, which syncs, indexes, applies, expires, cleans and makes compact in the background, or
//     each of those itself (the tests do);
//  3. close views, or their points are kept, and feeds before the group.
//
// # Crash argument
//
// Assumed of the system: after a sync of a file returns, its bytes survive; after
// a sync of a directory, its names do; unsynced bytes survive or not, in any
// combination of 4 KiB blocks; a rename is seen whole or not at all.
//
//	step                               a crash right after it leaves
//	1 append to the log                a torn or whole record at the tail: cut or kept
//	2 sync the log                     the record: replayed
//	3 index it (no earlier than 2)     an index that is behind the log, never ahead: replayed from its watermark
//	4 originals appended and synced    originals of blocks not yet overwritten: true, and used
//	5 originals and bitmap indexed     the same, without a replay
//	6 write the backing                a mix of old and new: covered by replay, from the applied LSN on
//	7 sync the backing                 as 6
//	8 applied LSN in the index, flush  replay starts behind it
//	  overlays saved, synced, log      an unfinished file, removed; or one of an older applied LSN, passed over; or one of this
//	  synced, renamed, directory       LSN and an older head: more is replayed. What it names is durable, and is not applied.
//	9 expire: carry over, index, flush the expiry, or none of it; what is carried over names its horizon
//	10 note its end among the originals, sync   segments that nothing refers to: log files are removed by the next open, originals by the next expiry
//	11 remove the segments             some of them: without an index, the note says to which horizon, and what is kept beyond
//	let go of kept points: note, index, flush   as before, or as after: an original of then may not do for a point that comes back
//	clean a file of originals: copy a part, index it   both: the index finds one, and either is true
//	flush the index, note, remove the files    files that nothing refers to: cleaned again
//	make a file compact, or plain again to cut or repair it: write another one, sync, rename, sync the directory
//	                                           the file as it was, or the other one, which has the same records at the same offsets
//	write a damaged record again in its place, sync   it, what was there, or a mix: damaged still, and found again
//	write a damaged block of a backing again, sync    the same: no record expires before the sync
//
// A note (marker, amendment, definition) is a record like any other. Of those that belong together:
//
//	cut, then what became of it        the cut alone: the next open concludes it as crash-consistent, or deletes it
//
// The disks of a group are in the table at the head of the log's newest segment:
//
//	a disk comes: new segment with it, sync    the disk is not in the table, and nobody has written it
//	a disk leaves: apply, sync its backing, sign it, new segment without it, sync
//	                                           it is in the table still: the next open has it, or notes that it left
//	a disk returns: journal what differs, new segment with it, sync   compared again
//
// So is who writes, and under which reigns:
//
//	lead, follow, or receive of another reign: sync, new segment, sync    as before, or as after: what is older was durable first
//	begin a bridge: sync, new segment that is one, sync                   as before, or a bridge of nothing, which is gone on with or rewound
//	end it: last records, sync, new segment behind it, sync               a bridge that is to be ended still, or one that has
//	begin in the middle: backings seeded (the caller's), definitions carried, sync, first segment, sync   no group: it is begun again
//
// A backing that was changed by others is journaled while the group opens:
//
//	1 note in the index that it goes on, flush  taken up again by the next open
//	2 write what differs, then a marker         compared again: blocks that are equal by then add nothing
//	3 known-since in the index, note removed, flush  a second marker at worst: nobody has written the disk
//
// # Concurrency
//
// A Store and a Group are safe for concurrent use. Locks are taken in this order: the Store's joining, the Group's
// receiving, joining, cleaning, apply, syncing, index, append, and pins, compacting, claims, the Store's open and those of segments under any of them (the fields
// say what each guards).
//
// # Limits
//
// A group that follows another daemon's takes no discontinuity: which blocks the journal never held, and others changed, it
// can not know. It has to be brought over it, see Group.BeginBridge. Its own backings changed by others keep it from opening: it must be begun again. Of a
// gap, it has no markers; and what became in it of older ones it does not know, but that those are not pinned which the writer had to let go of.
//
// Of what is damaged, heads of files and of originals, lists of what is kept, records of bridges and the index can not be repaired.
//
// Disks keep their size. A disk that left its group can be viewed when it is in it again only.
package journal
