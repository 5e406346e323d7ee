// Package replica ships a group's journal from the daemon that writes it to those that follow it: what they say to each
// other, and when. It is pure: a [Sender] and a [Receiver] of one stream are given messages and what became of what
// they asked for, and return what is to be done. No sockets, no clock, no journal.
//
// # Promises
//
//   - P6: a Receiver acknowledges what it was told is durable, of records that follow each other from what both sides
//     have in common. Nothing that has diverged is appended, or taken for the same.
//   - The daemon of the highest epoch is obeyed. One of a lower epoch that writes is told so by whomever it offers the group to, and
//     has to follow ([Depose]). Two that took one epoch are told apart by their reigns' ids, and neither follows the other.
//   - A peer that speaks out of turn, or of LSNs that do not follow, ends the stream.
//
// # The caller must
//
//  1. do what is asked for in its order, and say so where a type says that it must be said;
//  2. begin a new Sender or Receiver for every stream, with what is true of the group then;
//  3. ask for nothing after an [End].
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
//
// A follower that has nothing, or is behind the writer's horizon, is first given a Begin, the content of each disk as an Adopt's is, and a
// last Seeded. One that has records that the writer has not is refused: it has to rewind.
//
// Everything here is for one goroutine at a time.
//
// # Limits
//
// A follower that is behind the horizon loses what history it has: it begins anew.
package replica
