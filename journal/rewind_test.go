package journal

import (
	"bytes"
	"errors"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// strayed is a follower that wrote the group itself from LSN 3 on, and follows again.
func strayed(t *testing.T) pair {
	p := newPair(t)
	for i := range 3 {
		require.NoError(t, p.write(int64(i), byte(i+1)))
	}
	p.ship()
	_, err := p.to.g.Lead(2)
	require.NoError(t, err)
	for i := range 5 {
		require.NoError(t, p.to.write(int64(i), 0xee))
	}
	_, err = p.to.g.Mark(record.Marker{Label: "stray", Asked: record.Crash, Consistency: record.Crash, Pinned: true})
	require.NoError(t, err)
	require.NoError(t, p.to.g.Follow())
	return p
}

// TestRewind: nothing of what was recorded behind the LSN is left, and the group goes on with its writer.
func TestRewind(t *testing.T) {
	p := strayed(t)
	require.ErrorContains(t, p.s.Rewind("g", 1), "have it follow first")
	for _, to := range []record.LSN{100, record.MaxLSN} {
		require.ErrorIs(t, p.to.s.Rewind("g", to), ErrNoPoint)
	}
	v, err := p.to.g.View(p.to.g.Disks()[0], 3)
	require.NoError(t, err)
	require.ErrorIs(t, p.to.s.Rewind("g", 3), ErrInUse)
	v.Close()
	require.EqualValues(t, 9, p.to.g.Head(), "a refusal changes nothing")

	require.NoError(t, p.to.s.Rewind("g", 3))
	p.to.g, err = p.to.s.Group("g")
	require.NoError(t, err)
	require.EqualValues(t, 3, p.to.g.Head())
	require.Equal(t, p.g.Reigns(), p.to.g.Reigns())
	markers, err := p.to.g.Markers()
	require.NoError(t, err)
	require.Empty(t, markers)
	require.NoError(t, p.write(1, 7))
	p.ship()
	for i, want := range []byte{1, 7, 3, 0xb0, 0xb0} {
		require.Equal(t, want, p.to.live(int64(i)))
	}
	b, err := p.to.at(3, 1)
	require.NoError(t, err)
	require.EqualValues(t, 2, b)
}

// TestARewindThatFails fails the group, and the next opening goes on with it.
func TestARewindThatFails(t *testing.T) {
	for _, spare := range []int32{0, 3, 6, 9, 12, 15, 20} {
		p := strayed(t)
		f := p.to.inject(errorfs.OpFileSync, "state/groups/g", errors.New("no"))
		f.spare.Store(spare)
		err := p.to.s.Rewind("g", 3)
		p.to.fault.Store(nil)
		if f.fired.Load() == 0 {
			require.NoError(t, err)
		}
		require.NoError(t, p.to.s.Abandon())
		s, err := Open("state", []GroupConfig{{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}}}}, Options{FS: p.to.fs, SegmentSize: 64 << 10})
		require.NoError(t, err)
		p.to.s = s
		if g := s.Groups()[0]; g.Head() != 3 {
			require.EqualValues(t, 9, g.Head(), "it failed before its note")
			require.NoError(t, s.Rewind("g", 3))
		}
		p.to.g = s.Groups()[0]
		require.EqualValues(t, 3, p.to.g.Head())
		p.ship()
		for i, want := range []byte{1, 2, 3, 0xb0, 0xb0} {
			require.Equal(t, want, p.to.live(int64(i)))
		}
	}
}

// TestNoRewindOverDisks: one that came, or was changed by others, behind the LSN has no content of before.
func TestNoRewindOverDisks(t *testing.T) {
	p := newPair(t)
	require.NoError(t, p.write(1, 1))
	p.ship()
	_, err := p.to.g.Lead(2)
	require.NoError(t, err)
	p.to.scribble("more.raw", 0, make([]byte, 8*record.BlockSize))
	require.NoError(t, p.to.write(1, 2))
	require.NoError(t, p.to.g.AddDisk(DiskConfig{"more", "more.raw"}))
	require.NoError(t, p.to.g.Follow())
	require.ErrorContains(t, p.to.s.Rewind("g", 1), "disk more came to the group")
}

func TestRewindNotes(t *testing.T) {
	n := rewindNote{to: 7, last: 4, file: 9}
	b := n.append(nil)
	require.Len(t, b, rewindSize)
	got, err := decodeRewindNote(b)
	require.NoError(t, err)
	require.Equal(t, n, got)
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		_, err := decodeRewindNote(bad)
		require.Error(t, err)
	}
	_, err = decodeRewindNote(b[:20])
	require.ErrorIs(t, err, record.ErrCorrupt)
}

func TestBlockSets(t *testing.T) {
	s := make(blockSet, 4)
	for _, b := range []int64{0, 1, 62, 63, 64, 65, 130, 255} {
		s.add(b, 1)
	}
	var runs [][2]int64
	require.NoError(t, s.runs(3, func(first, n int64) error {
		runs = append(runs, [2]int64{first, n})
		return nil
	}))
	require.Equal(t, [][2]int64{{0, 2}, {62, 3}, {65, 1}, {130, 1}, {255, 1}}, runs)
}
