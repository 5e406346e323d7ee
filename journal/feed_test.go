package journal

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// next reads a run that is there already, or comes soon.
func next(t *testing.T, f *Feed, most int) (record.Run, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return f.Next(ctx, most)
}

// checkFeed reads what is durable from some LSN on, and compares it with what was written.
func (m *model) checkFeed() {
	lsn := max(m.anyLSN(), m.g.Horizon()+1)
	if lsn > m.g.Durable() {
		return
	}
	f, err := m.g.Feed(lsn)
	require.NoError(m.t, err)
	defer f.Close()
	for until := m.g.Durable(); lsn <= until; {
		run, err := next(m.t, f, m.rng.IntN(128<<10))
		require.NoError(m.t, err)
		require.Equal(m.t, lsn, run.First)
		require.LessOrEqual(m.t, run.Last, m.g.Durable())
		require.NoError(m.t, record.Each(run.Bytes, func(h record.Header, payload []byte) error {
			require.Equal(m.t, lsn, h.LSN)
			c := m.changes[lsn-1]
			lsn++
			if h.Kind.Note() {
				require.Nil(m.t, c.data)
				return nil
			}
			d := m.g.disks.Load().named(fmt.Sprintf("d%d", c.disk))
			require.True(m.t, slices.ContainsFunc(run.Disks, func(t record.Disk) bool { return t.ID == d.ID && t.Name == d.Name && t.Size == d.Size }))
			require.Equal(m.t, record.Extent{Off: c.off, Len: int64(len(c.data))}.Align(d.Size), h.Extent)
			if h.Kind == record.KindWrite {
				require.Equal(m.t, c.data, payload[c.off-h.Extent.Off:][:len(c.data)])
			}
			return nil
		}))
		require.Equal(m.t, lsn, run.Last+1)
	}
}

// TestAFeedWaits: for what is not there yet, and for what is not durable, which it sees to.
func TestAFeedWaits(t *testing.T) {
	r := newRig(t, Options{})
	f, err := r.g.Feed(1)
	require.NoError(t, err)
	defer f.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = f.Next(ctx, 1)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	wrote := make(chan error, 1)
	go func() { wrote <- r.write(3, 7) }()
	run, err := next(t, f, 1)
	require.NoError(t, err)
	require.NoError(t, <-wrote)
	require.EqualValues(t, 1, run.First)
	require.EqualValues(t, 1, run.Last)
	require.EqualValues(t, 1, r.g.Durable())
	_, err = r.g.Feed(3)
	require.ErrorIs(t, err, ErrNoPoint, "there may be another writer before it comes to that")
}

// TestAFeedOfLongRecords: of one that is longer than what was asked for, and between others.
func TestAFeedOfLongRecords(t *testing.T) {
	r := newRig(t, Options{SegmentSize: 1 << 20})
	rng := rand.New(rand.NewPCG(1, 1))
	var want [][]byte
	for range 60 {
		n := 1 + rng.Int64N(30)
		if rng.IntN(4) == 0 {
			n = 1 + rng.Int64N(rigBlocks-30)
		}
		data := make([]byte, n*record.BlockSize)
		data[rng.IntN(len(data))], want = byte(rng.Uint32()), append(want, data)
		require.NoError(t, r.g.Append([]Op{{Kind: record.KindWrite, Disk: r.g.Disks()[0], Ext: record.Extent{Len: int64(len(data))}, Data: data}}))
	}
	for from := range want {
		f, err := r.g.Feed(record.LSN(from + 1))
		require.NoError(t, err)
		for i := from; i < len(want); {
			run, err := next(t, f, 100<<10)
			require.NoError(t, err)
			require.NoError(t, record.Each(run.Bytes, func(h record.Header, payload []byte) error {
				require.True(t, bytes.Equal(want[i], payload), "LSN %d", h.LSN)
				i++
				return nil
			}))
		}
		f.Close()
	}
}

// TestAHoldKeepsRecords: for a limit, and not for a guest that writes a full journal.
func TestAHoldKeepsRecords(t *testing.T) {
	r := newRig(t, Options{Limit: 1})
	for i := range 200 {
		require.NoError(t, r.write(int64(i%50), byte(i)))
	}
	require.NoError(t, r.g.Apply())
	f, err := r.g.Feed(20)
	require.NoError(t, err)
	defer f.Close()
	h := r.g.Hold(20)
	require.NoError(t, due(r.g))
	require.Positive(t, r.g.Horizon())
	require.Less(t, r.g.Horizon(), record.LSN(20))
	run, err := next(t, f, 1)
	require.NoError(t, err)
	require.EqualValues(t, 20, run.First)
	h.Move(run.Last + 1)
	_, err = r.g.expireNeeded(1 << 30)
	require.NoError(t, err)
	require.Greater(t, r.g.Horizon(), run.Last)
	for err == nil {
		run, err = next(t, f, 1) // of the file that it has open still
	}
	var gone *PointError
	require.ErrorAs(t, err, &gone)
	require.Contains(t, err.Error(), fmt.Sprintf("lsn:%d", run.Last+1))
	h = r.g.Hold(r.g.Head())
	h.Release()
	require.NoError(t, due(r.g))
	require.EqualValues(t, 200, r.g.Head())
}

// TestAFeedOfDamage: never other bytes (P7), and what stands before it is read.
func TestAFeedOfDamage(t *testing.T) {
	r := newRig(t, Options{})
	for i := range 3 {
		require.NoError(t, r.write(1, byte(0x51+i)))
	}
	require.NoError(t, r.g.Sync())
	r.flip("log-", bytes.Repeat([]byte{0x52}, 64))
	f, err := r.g.Feed(1)
	require.NoError(t, err)
	defer f.Close()
	run, err := next(t, f, 1<<20)
	require.NoError(t, err)
	require.EqualValues(t, 1, run.Last)
	_, err = next(t, f, 1<<20)
	require.ErrorIs(t, err, record.ErrCorrupt)
	require.ErrorContains(t, err, "log-")
}

// TestAFeedOfAGroupThatFails ends with it.
func TestAFeedOfAGroupThatFails(t *testing.T) {
	r := newRig(t, Options{})
	f, err := r.g.Feed(1)
	require.NoError(t, err)
	defer f.Close()
	r.inject(errorfs.OpFileSyncData, "/log", errorfs.ErrInjected)
	ended := make(chan error, 1)
	go func() {
		_, err := next(t, f, 1)
		ended <- err
	}()
	require.NoError(t, r.write(1, 1))
	require.ErrorIs(t, <-ended, ErrFailed)
}

// TestSyncDelay: what a Feed asks for takes no more than a part of the time, and no record waits long.
func TestSyncDelay(t *testing.T) {
	for took, want := range map[time.Duration]time.Duration{
		0: feedSyncLeast, time.Millisecond: feedSyncLeast, 6 * time.Millisecond: 18 * time.Millisecond, time.Second: feedSyncMost,
	} {
		require.Equal(t, want, syncDelay(took), took)
	}
}
