// Package retain is the policy of forgetting: which of a group's history may
// go, and which goes first. It is pure: no I/O, no clock, no state.
//
// A version of a block lives from its LSN to its successor's, and may be forgotten when no kept point falls in that life. Kept are every LSN
// of the continuous window, and beyond it the points that [Policy.Keep] names: of each tier one for each slot of time, the newest markers, what
// is pinned or held. Whoever else needs a point (an open view) adds it.
//
// # Promises
//
//   - What Keep names does not depend on how often, or in which order, history was forgotten before: of points that were kept, and those
//     that came since, it names what it would have named of all that ever were.
//   - [Expire] never names a file that holds a record above a pinned LSN, or one that a backing still waits for.
//
// # The caller must
//
//  1. give Keep every marker, those of the window too, and of each slot of time that [Policy.Ends] tells apart the last record;
//  2. drop the files that Expire names in order, oldest first.
//
// Everything is safe for concurrent use. There is no format. Slots of time begin at multiples of their length since 1970, UTC: those of a day
// at midnight.
package retain
