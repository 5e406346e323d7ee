// Package guest brings guests to rest for the moment of a cut, and wakes them again.
//
// A [Cut] runs hook programs on the host, freezes the file systems of all its guests, has one record
// taken, thaws, and checks that what was frozen is thawed. What it says of the cut is what it has seen: a
// guest that did not freeze, thawed too early or cannot be asked makes it less than was asked for, never more.
//
// # Promises
//
//   - P5: between the freeze and the thaw of a cut that was at rest, no guest wrote to a file system that
//     was frozen.
//   - Whatever happens, each guest that was asked to freeze is asked to thaw, and then whether it is
//     thawed. What is not known to be thawed stands in the report, and in [Notes], for the next start.
//   - Nothing that a guest says is believed beyond what it says: lengths are bounded, answers are matched with
//     questions, and every wait has an end.
//
// # The caller must
//
//  1. make one cut of a group at a time;
//  2. at its start, and until each is settled, [Wake] what Notes has;
//  3. tell the operator of guests that are not thawed.
//
// # Concurrency
//
// A Guest is used by one goroutine at a time, a Cut once. Notes are safe for concurrent use, those of one group
// by one at a time.
//
// # Limits
//
// Whether a guest's own hooks quiesced its applications is not to be seen from the host: an agent that freezes
// without an error has run those that are installed. A cut with hooks alone is at rest if they say so.
package guest
