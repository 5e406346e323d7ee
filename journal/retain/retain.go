// Package retain is the policy of forgetting: which of a group's history may
// go, and which goes first. It is pure: no I/O, no clock, no state.
//
// It promises never to name a file that holds a record above a pinned LSN, or
// one that a backing still waits for. The caller must drop what it names in order, oldest
// first. It is safe for concurrent use. There is no format; the one limit is
// that history is forgotten from its oldest end only.
package retain

import "github.com/tidemark-cdp/tidemark/journal/record"

// File is a log file, closed for writing.
type File struct {
	Last record.LSN // its newest record
	Size int64      // bytes
}

// Expire is how many of the oldest files to drop so that at least excess bytes
// come free. files are in the order of their records. Dropping a file makes its last LSN
// the horizon: that must not pass pin, the oldest LSN that must stay viewable,
// nor applied, up to which the backings hold every record.
func Expire(files []File, excess int64, pin, applied record.LSN) (n int) {
	for _, f := range files {
		if excess <= 0 || f.Last > pin || f.Last > applied {
			break
		}
		excess -= f.Size
		n++
	}
	return n
}
