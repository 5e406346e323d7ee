package journal

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
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
