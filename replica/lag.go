package replica

import (
	"slices"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Lag measures how far a follower is behind: how old is the newest state of the group that is durable there, and how many bytes of
// records it lacks. The writer's head is looked at from time to time; what lies between two looks is counted as of the first.
type Lag struct {
	now   sample
	acked record.LSN
	// looks are those whose head is not acknowledged, but for the first, which is: oldest first.
	looks []sample
	step  time.Duration // between two of them, at least
}

// sample is how far the writer had come at a time.
type sample struct {
	head  record.LSN
	bytes int64
	at    time.Time
}

// maxLooks bounds what a Lag remembers. With more, they lie farther apart: then it says more than is true, by as much.
const maxLooks = 1024

// NewLag begins with a follower that has everything up to an LSN, which was the newest record at a time.
func NewLag(acked record.LSN, bytes int64, at time.Time) *Lag {
	s := sample{acked, bytes, at}
	return &Lag{now: s, acked: acked, looks: []sample{s}}
}

// Look takes how far the writer has come: its head, the bytes of records it has appended, counted from anywhere, and the time, none of
// which goes back.
func (l *Lag) Look(head record.LSN, bytes int64, at time.Time) {
	l.now = sample{head, bytes, at}
	last := l.looks[len(l.looks)-1]
	if head > l.acked && last.head < head && at.Sub(last.at) >= l.step {
		l.looks = append(l.looks, l.now)
	}
	if len(l.looks) > maxLooks {
		n := 0
		l.looks = slices.DeleteFunc(l.looks, func(sample) bool {
			n++
			return n%2 == 0
		})
		l.step = 2 * at.Sub(l.looks[0].at) / maxLooks
	}
	l.trim()
}

// Acked takes that the follower has everything up to an LSN.
func (l *Lag) Acked(lsn record.LSN) {
	l.acked = max(l.acked, lsn)
	l.trim()
}

func (l *Lag) trim() {
	if l.acked >= l.now.head {
		l.looks, l.step = append(l.looks[:0], l.now), 0
		return
	}
	n := 0
	for n+1 < len(l.looks) && l.looks[n+1].head <= l.acked {
		n++
	}
	l.looks = slices.Delete(l.looks, 0, n)
}

// Behind is the lag at the last look.
func (l *Lag) Behind() (age time.Duration, bytes int64) {
	if l.acked >= l.now.head {
		return 0, 0
	}
	return l.now.at.Sub(l.looks[0].at), l.now.bytes - l.looks[0].bytes
}
