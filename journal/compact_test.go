package journal

import (
	"context"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// textual writes blocks that get smaller, but not to nothing.
func (r *rig) textual(n int) {
	rnd := rand.New(rand.NewPCG(1, 1))
	for i := range n {
		b := make([]byte, record.BlockSize)
		for at := 0; at < len(b); at += 4 {
			b[at] = byte(rnd.Uint32())
		}
		require.NoError(r.t, r.g.Append([]Op{{Kind: record.KindWrite, Disk: r.g.Disks()[0], Ext: record.Extent{Off: int64(i) % rigBlocks * record.BlockSize, Len: record.BlockSize}, Data: b}}))
	}
}

// closedAndCompact has the log's first file full of records and compact, or not.
func closedAndCompact(t *testing.T, compact bool) (r *rig, f *segment.File) {
	r = newRig(t, Options{SegmentSize: 512 << 10})
	r.textual(100)
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.g.closeLog())
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.g.Checkpoint())
	for _, f = range r.g.set.Files(segment.Log) {
		if f.First == 1 {
			break
		}
	}
	if compact {
		_, err := r.g.Compact()
		require.NoError(t, err)
		require.True(t, f.IsCompact())
	}
	return r, f
}

// both runs a test with a plain and with a compact file.
func both(t *testing.T, fn func(t *testing.T, compact bool)) {
	t.Run("plain", func(t *testing.T) { fn(t, false) })
	t.Run("compact", func(t *testing.T) { fn(t, true) })
}

// TestVerifyGoesOnBehindWhatCanNotBeRead: that is a finding.
func TestVerifyGoesOnBehindWhatCanNotBeRead(t *testing.T) {
	both(t, func(t *testing.T, compact bool) {
		r, f := closedAndCompact(t, compact)
		require.NoError(t, r.s.Close())
		r.open()
		f = r.g.set.Files(segment.Log)[0]
		require.Equal(t, compact, f.IsCompact())
		fault := r.inject(errorfs.OpFileReadAt, f.Path, syscall.EIO)
		fault.spare.Store(20)
		found := 0
		done, err := r.g.Verify(t.Context(), VerifyOptions{}, func(Finding) { found++ })
		require.NoError(t, err)
		require.Positive(t, found)
		require.Positive(t, done.Versions, "the index is verified, too")
	})
}

// TestADigestBesideDamage: it is that of its record, and what stands before damage is fed.
func TestADigestBesideDamage(t *testing.T) {
	both(t, func(t *testing.T, compact bool) {
		r, f := closedAndCompact(t, compact)
		want, err := r.g.Digest(5)
		require.NoError(t, err)
		require.NotZero(t, want)
		at := int64(4096 + 8*(64+4+4096) + 500)
		if compact { // where the frame of LSN 7 or 8 begins: its kind
			b := make([]byte, 64<<10)
			file, err := r.mem.Open(f.Path)
			require.NoError(t, err)
			_, _ = file.ReadAt(b, 0)
			require.NoError(t, file.Close())
			at = 12288 + 32 + 8*68 + 8*2
			for i := range int64(6) {
				at += int64(b[12288+32+8*68+2*i]) + int64(b[12288+32+8*68+2*i+1])<<8
			}
		}
		r.damage(f.Path, at)
		var bad []record.LSN
		_, err = f.Scan(f.Start(), func(off int64, h record.Header) error {
			if _, err := f.VerifyPayload(off, h, nil); err != nil {
				bad = append(bad, h.LSN)
			}
			return nil
		})
		require.NoError(t, err)
		require.NotContains(t, bad, record.LSN(5))
		got, err := r.g.Digest(5)
		require.NoError(t, err)
		require.Equal(t, want, got, "LSN 5 is whole")
		feed, err := r.g.Feed(1)
		require.NoError(t, err)
		defer feed.Close()
		run, err := feed.Next(t.Context(), 1<<20)
		require.NoError(t, err, "LSN 1 to %d are whole", bad[0]-1)
		require.Equal(t, bad[0]-1, run.Last)
	})
}

// TestCompactionCostsNoHistory: what it takes of space meanwhile is no reason for history to expire.
func TestCompactionCostsNoHistory(t *testing.T) {
	r, fs := newFreeRig(t, Options{SegmentSize: 1 << 20, Reserve: 64 << 10}, 64<<20)
	for range 4 {
		r.textual(235)
	}
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.g.Checkpoint())
	// What is free is a little more than what an expiry keeps free.
	floor := r.g.o.keepLog() + 4*r.g.o.SegmentSize
	fs.free.Store(smallFS{FS: r.fs}.used("state") + floor + 64<<10)
	freed, err := r.g.expireDue()
	require.NoError(t, err)
	require.Zero(t, freed, "there is room enough")
	was := r.g.expiredTo()
	f := r.g.toCompact(0)
	require.NotNil(t, f)
	lost := int64(0)
	_, err = r.g.compact(f, func(int64) error {
		n, err := r.g.expireDue() // as runApplies does meanwhile
		lost += n
		return err
	})
	require.NoError(t, err)
	require.Equal(t, was, r.g.expiredTo(), "%d bytes of history expired as a compact file was being written", lost)
}

// TestDamageOfACompactFileIsNoTornTail: its records were in the backings, so that it is told when the index is lost, too.
func TestDamageOfACompactFileIsNoTornTail(t *testing.T) {
	r, f := closedAndCompact(t, true)
	path, size := f.Path, f.Alloc()
	require.NoError(t, r.s.Abandon())
	require.NoError(t, r.mem.RemoveAll("state/index"))
	b := []byte{0}
	file, err := r.mem.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	_, err = file.ReadAt(b, size-100)
	require.NoError(t, err)
	b[0] ^= 1
	_, err = file.WriteAt(b, size-100) // of the last record
	require.NoError(t, errors.Join(err, file.Close()))
	o := r.o
	o.FS = r.fs
	r.s, err = Open("state", []GroupConfig{{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}}}}, o)
	require.NoError(t, err)
	r.g = r.s.Groups()[0]
	state, _ := r.g.State()
	require.True(t, state == "failed" || r.g.Head() == 100, "durable records are gone, and nobody says so: %s, head %d", state, r.g.Head())
}

// TestOneFileStaysPlain: one that can not be read keeps no other one from becoming compact, and is not tried again and again.
func TestOneFileStaysPlain(t *testing.T) {
	r := newRig(t, Options{SegmentSize: 512 << 10})
	for range 3 {
		r.textual(100)
		require.NoError(t, r.g.closeLog())
	}
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.g.Checkpoint())
	require.NoError(t, r.s.Close())
	r.open()
	newest := r.g.toCompact(0)
	fault := r.inject(errorfs.OpFileReadAt, newest.Path, syscall.EIO)
	fault.spare.Store(6)
	_, err := r.g.Compact()
	require.ErrorIs(t, err, syscall.EIO)
	fired := fault.fired.Load()
	_, err = r.g.Compact()
	require.NoError(t, err)
	require.Equal(t, fired, fault.fired.Load())
	for _, f := range r.g.set.Files(segment.Log) {
		require.Equal(t, f.First < newest.First, f.IsCompact(), f.Path)
	}
}

// TestWhenCompactionIsDue: a time behind the file's end, unless somebody waits for space; then it is begun with again.
func TestWhenCompactionIsDue(t *testing.T) {
	var clock clock
	clock.at.Store(int64(time.Hour))
	paced := 0
	r := newRig(t, Options{SegmentSize: 4 << 20, Now: clock.time, CompactAfter: time.Minute, CompactPace: func(context.Context, int64) error {
		paced++
		return nil
	}})
	r.textual(900)
	require.NoError(t, r.g.closeLog())
	require.NoError(t, r.g.Apply())
	require.False(t, r.g.compactDue(t.Context()), "it is not in the backing durably")
	require.NoError(t, r.g.Checkpoint())
	clock.at.Add(int64(time.Minute - time.Second))
	require.False(t, r.g.compactDue(t.Context()), "it was closed a moment ago")
	clock.at.Add(int64(time.Second))
	f := r.g.set.Files(segment.Log)[0]
	r.g.hurry.Add(1)
	require.False(t, r.g.compactDue(t.Context()))
	require.Positive(t, paced)
	require.False(t, f.IsCompact())
	r.g.hurry.Add(-1)
	ended, end := context.WithCancel(t.Context())
	end()
	require.False(t, r.g.compactDue(ended))
	require.True(t, r.g.compactDue(t.Context()))
	require.True(t, f.IsCompact())
	require.False(t, r.g.compactDue(t.Context()), "there is no other")
}
