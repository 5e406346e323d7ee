// Package replica ships a group's journal from the daemon that writes it to those that follow it: what they say to each
// other, and when. It is pure: a [Sender] and a [Receiver] of one stream are given messages and what became of what
// they asked for, and return what is to be done. No sockets, no clock, no journal.
//
// # Promises
//
//   - P6: a Receiver acknowledges what it was told is durable, of records that follow each other from what both sides
//     have in common. Nothing that has diverged is appended, or taken for the same.
//   - A writer whose records of a reign are others than its follower's is not followed: it lost what was durable, or was restored from a copy.
//   - Of two writers of one history the one of the higher epoch is obeyed. One of a lower epoch is told so by whomever it offers the group to, and
//     has to follow ([Depose]). A daemon that was told of an epoch obeys no earlier one, whatever it forgets ([Note]). Two that took one epoch are told apart by their reigns' ids, and neither follows the other.
//   - A peer that speaks out of turn, or of LSNs that do not follow, ends the stream.
//
// # The caller must
//
//  1. do what is asked for in its order, and say so where a type says that it must be said, before it gives the next message: all but
//     Durable;
//  2. begin a new Sender or Receiver for every stream, with what is true of the group when its other streams have ended and
//     everything in it is durable; end them all when it leads, follows, rewinds or begins anew;
//  3. have one Receiver for a group, the newest;
//  4. bound the time that it waits for a message, and what a peer may do: a Receiver knows no rights. Whether a Rewind may be done is the
//     caller's to say;
//  5. ask for nothing after an [End].
//
// # A stream
//
//	writer                        follower
//	Offer                     →
//	                          ←   Position, or Refuse: it knows a writer of a later epoch
//	Records, Beat, …          →
//	                          ←   Ack, …
//	Adopt, Sums, Data, Seeded →   a disk has come to the group
//	                          ←   Want
//	                          ←   Handover: it wants to write the group
//	Ready                     →   the last record was sent, and no more are taken
//	                          ←   Taken
//
// A follower that has nothing, is behind the writer's horizon, or can not take the next records, is first given a Begin, the content of each disk
// as an Adopt's is, and a last Seeded. One that has a history keeps it, with a gap behind it: nothing is dropped, and nobody need be asked. One that has records that the writer has not is refused: it has
// to rewind.
//
// Everything here is for one goroutine at a time.
//
// # Limits
//
//   - Reigns and disks travel with records alone: a disk that came is not at the follower before there is one (journal.Group.Proclaim).
//   - A disk that left and came again, or a damaged record at the writer, keep a follower where it is until it begins anew.
//   - While a disk that came is seeded, records wait.
package replica
