package journal

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// scribble writes a file past everything, as somebody else would.
func (r *rig) scribble(path string, off int64, b []byte) {
	r.t.Helper()
	f, err := r.mem.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	require.NoError(r.t, err)
	_, err = f.WriteAt(b, off)
	require.NoError(r.t, err)
	require.NoError(r.t, f.Sync())
	require.NoError(r.t, f.Close())
}

// TestADiskLeavesAndReturns: while the store runs, with a disk beside it that stays. What others do to
// the backing meanwhile is a discontinuity; if they do nothing, history goes on.
func TestADiskLeavesAndReturns(t *testing.T) {
	for _, changed := range []bool{false, true} {
		t.Run(fmt.Sprintf("changed %v", changed), func(t *testing.T) {
			r := newRig(t, Options{})
			r.scribble("more.raw", 0, make([]byte, 8*record.BlockSize))
			r.running(func() error { return leaveAndReturn(r, changed) })
		})
	}
}

func leaveAndReturn(r *rig, changed bool) error {
	t, g := r.t, r.g
	require.NoError(t, r.write(1, 1))
	require.NoError(t, g.AddDisk(DiskConfig{"more", "more.raw"}))
	require.ErrorContains(t, g.AddDisk(DiskConfig{"more", "more.raw"}), "already")
	more, err := g.Disk("more")
	require.NoError(t, err)
	require.EqualValues(t, 1, more.Added)
	_, err = g.View(more, 0)
	require.ErrorIs(t, err, ErrNoPoint, "it has no past before it came")
	write := func(fill byte) error {
		return g.Append([]Op{{Kind: record.KindWrite, Disk: more, Ext: record.Extent{Len: record.BlockSize}, Data: bytes.Repeat([]byte{fill}, record.BlockSize)}})
	}
	require.NoError(t, write(2))
	before := g.Head()
	require.NoError(t, write(3))

	release, err := g.Use(more)
	require.NoError(t, err)
	require.ErrorIs(t, g.RemoveDisk("more"), ErrInUse)
	require.NoError(t, write(3))
	release()
	require.NoError(t, g.RemoveDisk("more"))
	require.ErrorIs(t, write(4), ErrDetached)
	_, err = g.View(more, before)
	require.ErrorIs(t, err, ErrDetached)
	_, err = g.Use(more)
	require.ErrorIs(t, err, ErrDetached)
	require.Len(t, g.Disks(), 1)
	require.Contains(t, g.Removed(), more)
	require.NoError(t, r.write(1, 5), "the others go on")
	f, err := r.mem.Open("more.raw")
	require.NoError(t, err)
	b := make([]byte, 1)
	_, err = f.ReadAt(b, 0)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.EqualValues(t, 3, b[0], "its backing is what was journaled")

	if changed {
		r.scribble("more.raw", 0, bytes.Repeat([]byte{9}, record.BlockSize))
	}
	require.NoError(t, g.AddDisk(DiskConfig{"more", "more.raw"}))
	markers, err := g.Markers()
	require.NoError(t, err)
	read := func(at record.LSN) byte {
		v, err := g.View(more, at)
		require.NoError(t, err)
		defer v.Close()
		require.NoError(t, v.ReadAt(b, 0, false))
		return b[0]
	}
	require.EqualValues(t, 2, read(before), "the past is what it was")
	if changed {
		require.Len(t, markers, 1)
		require.EqualValues(t, 9, read(g.Head()))
	} else {
		require.Empty(t, markers)
		require.EqualValues(t, 3, read(g.Head()))
	}
	return write(6)
}

func TestADiskComesOnlyAsItWas(t *testing.T) {
	r := newRig(t, Options{})
	require.ErrorContains(t, r.g.AddDisk(DiskConfig{"none", "none.raw"}), "does not exist")
	require.ErrorContains(t, r.g.AddDisk(DiskConfig{"no/name", "disk.raw"}), "not allowed")
	require.NoError(t, r.write(1, 1))
	require.NoError(t, r.g.RemoveDisk("d"))
	require.ErrorIs(t, r.g.RemoveDisk("d"), ErrNotFound)
	r.scribble("other.raw", 0, make([]byte, record.BlockSize))
	require.ErrorContains(t, r.g.AddDisk(DiskConfig{"d", "other.raw"}), "restore its size")
	require.NoError(t, r.g.AddDisk(DiskConfig{"d", "disk.raw"}), "what failed left nothing behind")
	require.EqualValues(t, 1, r.live(1))
}

func TestGroupsComeAndGo(t *testing.T) {
	r := newRig(t, Options{})
	r.scribble("other.raw", 0, make([]byte, 8*record.BlockSize))
	other := GroupConfig{Name: "other", Disks: []DiskConfig{{"d", "other.raw"}}}
	r.running(func() error {
		for fill := byte(1); fill < 4; fill++ {
			require.NoError(t, r.s.AddGroup(other))
			require.ErrorContains(t, r.s.AddGroup(other), "open already")
			g, err := r.s.Group("other")
			require.NoError(t, err)
			require.NotEqual(t, r.g.id, g.id)
			require.EqualValues(t, fill-1, g.Head())
			d := g.Disks()[0]
			require.NoError(t, g.Append([]Op{{Kind: record.KindWrite, Disk: d, Ext: record.Extent{Len: 1}, Data: []byte{fill}}}))
			require.Eventually(t, func() bool { return g.Applied() == g.Head() }, time.Minute, time.Millisecond, "its loops run")
			release, err := g.Use(d)
			require.NoError(t, err)
			require.ErrorIs(t, r.s.RemoveGroup("other"), ErrInUse)
			release()
			require.NoError(t, r.s.RemoveGroup("other"))
			_, err = r.s.Group("other")
			require.ErrorIs(t, err, ErrNotFound)
		}
		return r.write(1, 1)
	})
}

// TestAPinnedMarkerKeepsItsHistory: past the limit, until it is unpinned.
func TestAPinnedMarkerKeepsItsHistory(t *testing.T) {
	r := newRig(t, Options{Limit: 256 << 10})
	require.NoError(t, r.write(1, 7))
	m, err := r.g.Mark(record.Marker{Label: "keep", By: "test"})
	require.NoError(t, err)
	_, err = r.g.Pin("keep")
	require.NoError(t, err)
	fill := func() {
		for i := range int64(200) {
			require.NoError(t, r.write(1+i%7, byte(i)))
		}
		require.NoError(t, r.g.Apply())
		for range 10 {
			require.NoError(t, r.g.expireDue())
		}
	}
	fill()
	require.Less(t, r.g.Horizon(), m.LSN)
	require.NoError(t, r.s.Close())
	r.open()
	fill()
	require.Less(t, r.g.Horizon(), m.LSN, "it is pinned after a restart")
	b, err := r.at(m.LSN, 1)
	require.NoError(t, err)
	require.EqualValues(t, 7, b)
	_, err = r.g.Delete("keep")
	require.ErrorIs(t, err, ErrPinned)
	_, err = r.g.Unpin("keep")
	require.NoError(t, err)
	fill()
	require.Greater(t, r.g.Horizon(), m.LSN)
	_, err = r.g.Describe("keep", "gone")
	require.ErrorIs(t, err, ErrNoPoint)
}

// TestADefinitionOutlivesItsRecord: what is in force at the horizon is journaled again, in a journal
// that has no room for writes.
func TestADefinitionOutlivesItsRecord(t *testing.T) {
	r := newRig(t, Options{Reserve: 64 << 10})
	changed, err := r.g.Define("vm", []byte("first"))
	require.NoError(t, err)
	require.True(t, changed)
	changed, err = r.g.Define("vm", []byte("first"))
	require.NoError(t, err)
	require.False(t, changed)
	_, err = r.g.Define("no/name", nil)
	require.ErrorContains(t, err, "not allowed")
	_, err = r.g.Define("vm", make([]byte, record.MaxDefinition+1))
	require.ErrorContains(t, err, "at most")
	for i := range int64(40) {
		require.NoError(t, r.write(i, 1))
	}
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.s.Close())
	r.fs = smallFS{r.fs, 1 << 20}
	r.open()
	r.running(func() error {
		for i := range int64(600) {
			if err := r.write(i%5, 2); err != nil {
				return err
			}
		}
		return nil
	})
	require.Greater(t, r.g.Horizon(), record.LSN(1))
	for _, lose := range []bool{false, true} {
		for _, at := range []record.LSN{r.g.Horizon(), r.g.Head()} {
			defs, err := r.g.Definitions(at)
			require.NoError(t, err)
			require.Len(t, defs, 1)
			require.Equal(t, "first", string(defs[0].Content))
			require.EqualValues(t, 1, defs[0].Since)
		}
		require.NoError(t, r.s.Close())
		if lose {
			require.NoError(t, r.mem.RemoveAll("state/index"))
		}
		r.open()
	}
}

// TestAMarkerWaitsForNoRoom: a guest may be frozen for it.
func TestAMarkerWaitsForNoRoom(t *testing.T) {
	r := newRig(t, Options{Unapplied: 8 * record.BlockSize})
	for i := range int64(8) {
		require.NoError(t, r.write(i, 1))
	}
	r.g.append.Lock()
	require.False(t, r.g.roomLocked())
	r.g.append.Unlock()
	m, err := r.g.Cut(record.Marker{Label: "cut", By: "test", Asked: record.Application})
	require.NoError(t, err)
	require.Equal(t, m.LSN, r.g.Durable())
	_, err = r.g.Describe("cut", "text")
	require.ErrorContains(t, err, "being taken")
	m.Consistency = record.Filesystem
	kept, err := r.g.Conclude(m)
	require.NoError(t, err)
	require.False(t, kept, "less than was asked for")
	_, err = r.g.Conclude(m)
	require.ErrorIs(t, err, ErrNoPoint)
	_, err = r.g.Mark(record.Marker{Label: "cut", By: "test"})
	require.NoError(t, err, "its label is free")
	_, err = r.g.Verify(context.Background(), func(f Finding) { t.Errorf("%+v", f) })
	require.NoError(t, err)
}
