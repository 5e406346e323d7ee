package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
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

// TestAPinnedMarkerIsKept: beyond the window, with its label, until it is unpinned.
func TestAPinnedMarkerIsKept(t *testing.T) {
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
			require.NoError(t, due(r.g))
		}
	}
	fill()
	require.Greater(t, r.g.Horizon(), m.LSN)
	for _, lost := range []bool{false, true} {
		require.NoError(t, r.s.Close())
		if lost {
			require.NoError(t, r.fs.RemoveAll("state/index"))
		}
		r.open()
		fill()
		b, err := r.at(m.LSN, 1)
		require.NoError(t, err)
		require.EqualValues(t, 7, b)
		lsn, err := r.g.Resolve(record.Point{Form: record.FormLabel, Label: "keep"})
		require.NoError(t, err)
		require.Equal(t, m.LSN, lsn)
		_, err = r.g.View(r.g.Disks()[0], m.LSN+1)
		require.ErrorContains(t, err, fmt.Sprintf("the last kept point before it, lsn:%d of", m.LSN))
		_, err = r.g.View(r.g.Disks()[0], m.LSN-1)
		require.ErrorContains(t, err, fmt.Sprintf("the first kept point after it, lsn:%d of", m.LSN))
	}
	_, err = r.g.Describe("keep", "it can be amended")
	require.NoError(t, err)
	_, err = r.g.Delete("keep")
	require.ErrorIs(t, err, ErrPinned)
	_, err = r.g.Unpin("keep")
	require.NoError(t, err)
	did, err := r.g.Thin()
	require.NoError(t, err)
	require.True(t, did)
	_, err = r.g.Describe("keep", "gone")
	require.ErrorIs(t, err, ErrNoPoint)
}

// TestADefinitionOutlivesItsRecord: what is in force at the horizon is carried over, in a journal
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
	_, err = r.g.Verify(context.Background(), VerifyOptions{}, func(f Finding) { t.Errorf("%+v", f) })
	require.NoError(t, err)
}

// writeTo writes one block of any disk.
func writeTo(g *Group, d *disk.Disk, block int64, fill byte) error {
	return g.Append([]Op{{Kind: record.KindWrite, Disk: d, Ext: record.Extent{Off: block * record.BlockSize, Len: record.BlockSize},
		Data: bytes.Repeat([]byte{fill}, record.BlockSize)}})
}

// more adds a disk of so many blocks of zeroes to the rig's group.
func (r *rig) more(blocks int) *disk.Disk {
	r.t.Helper()
	r.scribble("more.raw", 0, make([]byte, blocks*record.BlockSize))
	require.NoError(r.t, r.g.AddDisk(DiskConfig{"more", "more.raw"}))
	d, err := r.g.Disk("more")
	require.NoError(r.t, err)
	return d
}

// TestADiskThatDoesNotGetIn: it returns changed, and the journal has no room for all that differs. The group goes
// on, and so does an attempt when there is room.
func TestADiskThatDoesNotGetIn(t *testing.T) {
	r := newRig(t, Options{})
	more := r.more(64)
	for i := range int64(64) {
		require.NoError(t, writeTo(r.g, more, i, 1))
	}
	require.NoError(t, r.g.RemoveDisk("more"))
	for i := int64(0); i < 64; i += 2 {
		r.scribble("more.raw", i*record.BlockSize, bytes.Repeat([]byte{9}, record.BlockSize))
	}
	full := r.inject(errorfs.OpCreate, "log", syscall.ENOSPC)
	require.ErrorIs(t, r.g.AddDisk(DiskConfig{"more", "more.raw"}), ErrNoSpace)
	require.Positive(t, full.fired.Load())
	r.fault.Store(nil)
	_, err := r.g.Disk("more")
	require.ErrorIs(t, err, ErrNotFound)
	require.NoError(t, r.write(1, 1), "the other disk goes on")
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.g.AddDisk(DiskConfig{"more", "more.raw"}))
	b := make([]byte, 1)
	require.NoError(t, more.ReadAt(b, 0, false))
	require.EqualValues(t, 9, b[0])
	require.NoError(t, more.ReadAt(b, record.BlockSize, false))
	require.EqualValues(t, 1, b[0])
	require.NoError(t, r.s.Close())
	r.open() // without it
}

// TestAGroupThatWasRemovedTakesNothing: not from one who still has it, though it came back meanwhile.
func TestAGroupThatWasRemovedTakesNothing(t *testing.T) {
	r := newRig(t, Options{})
	r.scribble("other.raw", 0, make([]byte, 8*record.BlockSize))
	other := GroupConfig{Name: "other", Disks: []DiskConfig{{"d", "other.raw"}}}
	require.NoError(t, r.s.AddGroup(other))
	old, err := r.s.Group("other")
	require.NoError(t, err)
	require.NoError(t, writeTo(old, old.Disks()[0], 0, 1))
	require.NoError(t, r.s.RemoveGroup("other"))
	require.NoError(t, r.s.AddGroup(other))
	g, err := r.s.Group("other")
	require.NoError(t, err)
	require.NoError(t, writeTo(g, g.Disks()[0], 0, 7))
	require.NoError(t, g.Sync())
	_, err = old.Cut(record.Marker{Label: "x", By: "test", Asked: record.Application})
	require.ErrorIs(t, err, ErrNotFound)
	_, err = old.Define("vm", []byte("x"))
	require.ErrorIs(t, err, ErrNotFound)
	require.NoError(t, r.s.Abandon())
	s, err := Open("state", []GroupConfig{other}, Options{FS: r.fs, SegmentSize: 64 << 10})
	require.NoError(t, err)
	r.s = s
	require.EqualValues(t, 2, s.Groups()[0].Head())
	b := make([]byte, 1)
	require.NoError(t, s.Groups()[0].Disks()[0].ReadAt(b, 0, false))
	require.EqualValues(t, 7, b[0])
}

// TestWhatIsUndefinedStaysUndefined: the definition was carried over before, and its original may outlive the
// record that undefined it. An index that is made again must not find it in force.
func TestWhatIsUndefinedStaysUndefined(t *testing.T) {
	r := newRig(t, Options{})
	fill := func(n int64) {
		for i := range n {
			require.NoError(t, r.write(i%7, byte(i)))
		}
		require.NoError(t, r.g.Apply())
	}
	_, err := r.g.Define("vm", []byte("first"))
	require.NoError(t, err)
	fill(40)
	_, err = r.g.Undefine("vm")
	require.NoError(t, err)
	gone := r.g.Head()
	fill(40)
	n, err := r.g.Expire(1) // the oldest file alone
	require.NoError(t, err)
	require.Positive(t, n)
	require.Less(t, r.g.Horizon(), gone)
	again := r.g.Head()
	for r.g.Horizon() < gone {
		fill(5)
		_, err := r.g.Expire(1)
		require.NoError(t, err)
	}
	require.Less(t, r.g.Horizon(), again)
	for range 2 {
		defs, err := r.g.Definitions(r.g.Head())
		require.NoError(t, err)
		require.Empty(t, defs)
		require.NoError(t, r.s.Close())
		require.NoError(t, r.mem.RemoveAll("state/index"))
		r.open()
	}
}

// TestADiskIsNotOlderThanTheHead: a crash keeps the segment that says when it came, and takes records
// that stood in the one before.
func TestADiskIsNotOlderThanTheHead(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 1))
	require.NoError(t, r.g.Sync())
	for i := range int64(5) {
		require.NoError(t, r.write(i, 2))
	}
	r.more(8)
	files := r.g.set.Files(segment.Log)
	require.Len(t, files, 2)
	var second int64
	_, err := files[0].Scan(files[0].Start(), func(at int64, h record.Header) error {
		if h.LSN == 2 {
			second = at
		}
		return nil
	})
	require.NoError(t, err)
	require.NoError(t, r.s.Abandon())
	r.scribble(files[0].Path, second, make([]byte, 25000))
	o := r.o
	o.FS, o.SegmentSize = r.fs, 64<<10
	r.s, err = Open("state", []GroupConfig{{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}, {"more", "more.raw"}}}}, o)
	require.NoError(t, err)
	r.g = r.s.Groups()[0]
	require.EqualValues(t, 1, r.g.Head())
	more, err := r.g.Disk("more")
	require.NoError(t, err)
	require.NoError(t, writeTo(r.g, more, 0, 3))
	v, err := r.g.View(more, r.g.Head())
	require.NoError(t, err)
	v.Close()
}

// deviceFS has more.raw as a block device, whose time tells nothing.
type deviceFS struct{ vfs.FS }

type deviceInfo struct{ vfs.FileInfo }

func (deviceInfo) ModTime() time.Time { return time.Unix(0, 0) }

func (d deviceFS) Stat(path string) (vfs.FileInfo, error) {
	info, err := d.FS.Stat(path)
	if err == nil && path == "more.raw" {
		info = deviceInfo{info}
	}
	return info, err
}

// TestADeviceReturns: whether it was written meanwhile does not show, and none of its records is left to compare with.
func TestADeviceReturns(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.s.Close())
	r.fs = deviceFS{r.fs}
	r.open()
	more := r.more(8)
	require.NoError(t, writeTo(r.g, more, 0, 1))
	fill := func() {
		for i := range int64(40) {
			require.NoError(t, r.write(i%7, byte(i)))
		}
		require.NoError(t, r.g.Apply())
	}
	fill()
	require.NoError(t, r.g.RemoveDisk("more"))
	left := r.g.Head()
	fill()
	for r.g.Horizon() < 10 {
		_, err := r.g.Expire(1)
		require.NoError(t, err)
	}
	require.Less(t, r.g.Horizon(), left)
	r.scribble("more.raw", 0, bytes.Repeat([]byte{9}, 8*record.BlockSize))
	require.NoError(t, r.g.AddDisk(DiskConfig{"more", "more.raw"}))
	v, err := r.g.View(more, left)
	require.NoError(t, err)
	defer v.Close()
	require.ErrorContains(t, v.ReadAt(make([]byte, 1), 0, false), "is not known")
}

// TestACutIsConcludedLater: there was no room for its end, and its pin must not be why.
func TestACutIsConcludedLater(t *testing.T) {
	r := newRig(t, Options{})
	m, err := r.g.Cut(record.Marker{Label: "c", By: "test", Asked: record.Application, Pinned: true, OrCrash: true})
	require.NoError(t, err)
	require.Empty(t, r.g.pins.markers)
	r.inject(errorfs.OpCreate, "log", syscall.ENOSPC)
	for i := int64(0); err == nil; i++ {
		err = r.write(i%7, 1)
	}
	for n := 0; ; n++ { // small records fill what is left
		if _, err = r.g.Mark(record.Marker{Label: fmt.Sprint("m", n), By: "test"}); err != nil {
			break
		}
	}
	_, err = r.g.Conclude(m)
	require.ErrorIs(t, err, ErrNoSpace)
	r.fault.Store(nil)
	require.NoError(t, r.g.ConcludeLeft())
	_, err = r.g.Resolve(record.Point{Form: record.FormLabel, Label: "c"})
	require.NoError(t, err)
	require.Len(t, r.g.pins.markers, 1)
	r.g.append.Lock()
	require.True(t, r.g.pinMarker(m.LSN))
	r.g.horizon.Store(uint64(m.LSN))
	require.False(t, r.g.pinMarker(m.LSN), "an expiry was faster")
	r.g.append.Unlock()
}

// TestDisksComeAndGoBesideApply is for the race detector.
func TestDisksComeAndGoBesideApply(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, writeTo(r.g, r.more(8), 0, 1))
	r.running(func() error {
		for i := range byte(10) {
			require.NoError(t, r.g.RemoveDisk("more"))
			r.scribble("more.raw", 0, bytes.Repeat([]byte{9 + i}, record.BlockSize))
			for n := range int64(20) {
				require.NoError(t, r.write(n, i))
			}
			if err := r.g.AddDisk(DiskConfig{"more", "more.raw"}); err != nil {
				return err
			}
			require.NoError(t, r.g.Apply())
		}
		return nil
	})
}

// TestDefinitionsExpireBesideSpares is for the race detector: files are allocated ahead on a real file system only.
func TestDefinitionsExpireBesideSpares(t *testing.T) {
	dir := t.TempDir()
	backing := filepath.Join(dir, "d.raw")
	require.NoError(t, os.WriteFile(backing, make([]byte, 1<<20), 0o600))
	s, err := Open(filepath.Join(dir, "state"), []GroupConfig{{Name: "g", Disks: []DiskConfig{{"d", backing}}}}, Options{SegmentSize: 64 << 10, Reserve: 1 << 20})
	require.NoError(t, err)
	g := s.Groups()[0]
	_, err = g.Define("vm", bytes.Repeat([]byte{1}, 62<<10))
	require.NoError(t, err)
	for range 10 {
		for i := range int64(60) {
			require.NoError(t, writeTo(g, g.Disks()[0], i%7, byte(i)))
		}
		require.NoError(t, g.Apply())
		_, err = g.Expire(1)
		require.NoError(t, err)
	}
	defs, err := g.Definitions(g.Head())
	require.NoError(t, err)
	require.Len(t, defs, 1)
	require.NoError(t, s.Close())
}

// TestAnExpiryOfEverythingKeepsTheHead: the file that is left is new and empty, and its name must outlive the host.
func TestAnExpiryOfEverythingKeepsTheHead(t *testing.T) {
	r := newRig(t, Options{})
	for i := range int64(5) {
		require.NoError(t, r.write(i, 1))
	}
	require.NoError(t, r.g.Apply())
	for r.g.Horizon() < 5 {
		_, err := r.g.Expire(1)
		require.NoError(t, err)
	}
	crashed := r.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 0})
	s, err := Open("state", []GroupConfig{{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}}}}, Options{FS: crashed, SegmentSize: 64 << 10})
	require.NoError(t, err)
	require.EqualValues(t, 5, s.Groups()[0].Head())
	require.NoError(t, s.Abandon())
}

// TestManyGroups are opened at once, the ones that there are beside new ones; each has its own part of the index.
func TestManyGroups(t *testing.T) {
	mem := vfs.NewCrashableMem()
	conf := func(n int) (all []GroupConfig) {
		for i := range n {
			name := fmt.Sprintf("g%d", i)
			if _, err := mem.Stat(name); err != nil {
				f, err := mem.Create(name, vfs.WriteCategoryUnspecified)
				require.NoError(t, err)
				_, err = f.Write(make([]byte, 8*record.BlockSize))
				require.NoError(t, errors.Join(err, f.Sync(), f.Close()))
			}
			all = append(all, GroupConfig{Name: name, Disks: []DiskConfig{{"d", name}}})
		}
		return all
	}
	for round, n := range []int{20, 25, 25} {
		s, err := Open("state", conf(n), Options{FS: mem, SegmentSize: 64 << 10})
		require.NoError(t, err)
		require.Len(t, s.Groups(), n)
		ids := map[uint32]bool{}
		for _, g := range s.Groups() {
			ids[g.id] = true
			had := round
			if i, _ := strconv.Atoi(g.name[1:]); i >= 20 {
				had = max(round-1, 0)
			}
			require.EqualValues(t, had, g.Head())
			require.NoError(t, g.Append([]Op{{Kind: record.KindWrite, Disk: g.Disks()[0], Ext: record.Extent{Len: record.BlockSize}, Data: bytes.Repeat([]byte{byte(round + 1)}, record.BlockSize)}}))
			require.NoError(t, g.Sync())
			require.NoError(t, g.Index())
			done, err := g.Verify(t.Context(), VerifyOptions{}, func(f Finding) { t.Errorf("%s: %+v", g.name, f) })
			require.NoError(t, err)
			require.EqualValues(t, had+1, done.Records)
		}
		require.Len(t, ids, n)
		if round == 1 {
			require.NoError(t, s.Abandon())
			mem = mem.CrashClone(vfs.CrashCloneCfg{})
			continue
		}
		require.NoError(t, s.Close())
	}
	bad := conf(25)
	bad[7].Disks[0].Backing = "nowhere"
	_, err := Open("state", bad, Options{FS: mem, SegmentSize: 64 << 10})
	require.ErrorContains(t, err, "g7")
	s, err := Open("state", conf(25), Options{FS: mem, SegmentSize: 64 << 10})
	require.NoError(t, err, "nothing is left open")
	require.NoError(t, s.Close())
}
