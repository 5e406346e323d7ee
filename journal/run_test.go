package journal

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// TestABurstHasTheDisk: while a guest writes much, and a moment after, what it wrote is not applied, but for what is old.
func TestABurstHasTheDisk(t *testing.T) {
	now := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	r := newRig(t, Options{Now: func() time.Time { return now }})
	require.NoError(t, r.write(0, 1))
	look := func(times time.Duration, bytes int64) (due bool) {
		for range times {
			r.g.append.Lock()
			r.g.append.bytes += bytes // as if it had been written
			r.g.append.Unlock()
			now = now.Add(tick)
			due = r.g.applyDue(now)
		}
		return due
	}
	require.False(t, look(1, 0))
	require.True(t, look(applyAge/tick, 0), "it is quiet")
	require.False(t, look(1, busyBytes), "a burst")
	require.False(t, look(busyHold/tick-1, busyBytes/2), "a stall")
	require.False(t, look(1, busyBytes))
	require.True(t, look(busyHold/tick, busyBytes/2), "it has ended")
	require.False(t, look(1, busyBytes))
	require.True(t, look(busyAge/tick, busyBytes), "what is old")

	require.NoError(t, r.g.Follow())
	r.g.append.Lock()
	r.g.append.oldest = now
	r.g.append.Unlock()
	require.False(t, look(2*applyAge/tick, busyFollower), "what comes from a writer")
}

// TestNoRecordIsOlderThanItsFile: neither one that takes a new file, nor a note that does: what begins there, and how long a kept point stays what the disks were, goes by it.
func TestNoRecordIsOlderThanItsFile(t *testing.T) {
	var clock atomic.Int64
	r := newRig(t, Options{SegmentSize: segment.MinSize, Now: func() time.Time { return time.Unix(0, clock.Add(1)) }})
	notes := 0
	for i := range 200 {
		if i%7 == 0 {
			require.NoError(t, r.write(int64(i%8), byte(i)))
		}
		_, err := r.g.Mark(record.Marker{Label: fmt.Sprint("m", i), By: "test", Description: strings.Repeat("y", 800+i)})
		require.NoError(t, err)
	}
	for _, f := range r.g.set.Files(segment.Log) {
		_, err := f.Scan(f.Start(), func(off int64, h record.Header) error {
			require.GreaterOrEqual(t, h.Time, f.Created, "LSN %d", h.LSN)
			if off == f.Start() && h.Kind == record.KindMarker {
				notes++
			}
			return nil
		})
		require.NoError(t, err)
	}
	require.Positive(t, notes, "no note took a new file: %d files", len(r.g.set.Files(segment.Log)))
}
