package retain

import (
	"slices"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// File is a log file, closed for writing.
type File struct {
	Last record.LSN // its newest record
	Time int64      // of that record, or later, Unix nanoseconds
	Size int64      // bytes
}

// Expire is how many of the oldest files to drop so that at least excess bytes
// come free. files are in the order of their records. Dropping a file makes its last LSN
// the horizon: that must not pass pin, the oldest LSN from which on all must stay,
// nor upTo.
func Expire(files []File, excess int64, pin, upTo record.LSN) (n int) {
	for _, f := range files {
		if excess <= 0 || f.Last > pin || f.Last > upTo {
			break
		}
		excess -= f.Size
		n++
	}
	return n
}

// Passed is the newest record of the oldest files whose records are all older than the window at a time, Unix nanoseconds; 0: there are none.
func (p Policy) Passed(now int64, files []File) (last record.LSN) {
	if p.EveryWrite == 0 {
		return 0
	}
	for _, f := range files {
		if f.Time >= now-int64(p.EveryWrite) {
			break
		}
		last = f.Last
	}
	return last
}

// Lives reports whether any of the kept points, in the order of their LSNs, falls in a life from one LSN up to, and not with, another.
func Lives(kept []record.LSN, from, until record.LSN) bool {
	at, ok := First(kept, from)
	return ok && at < until
}

// First is the first of the kept points at or above an LSN.
func First(kept []record.LSN, lsn record.LSN) (record.LSN, bool) {
	i, _ := slices.BinarySearch(kept, lsn)
	if i == len(kept) {
		return 0, false
	}
	return kept[i], true
}
