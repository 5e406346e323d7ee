package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// rig is a store with one group of one disk on a simulated file system whose
// operations can be made to fail.
type rig struct {
	t      *testing.T
	mem    *vfs.MemFS
	fault  atomic.Pointer[fault]
	seen   atomic.Pointer[func(errorfs.Op)] // told of each operation, if set; the database has goroutines of its own
	fs     vfs.FS
	o      Options
	retain retain.Policy
	s      *Store
	g      *Group
}

// fault makes operations of one kind on paths with a given part fail; it
// counts how often it did.
type fault struct {
	kind  errorfs.OpKind
	path  string
	err   error
	spare atomic.Int32 // so many go well first
	fired atomic.Int32
}

const rigBlocks = 512

func newRig(t *testing.T, o Options) *rig {
	t.Helper()
	r := &rig{t: t, mem: vfs.NewCrashableMem(), o: o}
	r.fs = errorfs.Wrap(r.mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if seen := r.seen.Load(); seen != nil {
			(*seen)(op)
		}
		if f := r.fault.Load(); f != nil && f.kind == op.Kind && strings.Contains(op.Path, f.path) && f.spare.Add(-1) < 0 {
			f.fired.Add(1)
			return f.err
		}
		return nil
	}))
	f, err := r.mem.Create("disk.raw", vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	_, err = f.Write(bytes.Repeat([]byte{0xb0}, rigBlocks*record.BlockSize))
	require.NoError(t, err)
	require.NoError(t, errors.Join(f.Sync(), f.Close()))
	r.open()
	t.Cleanup(func() {
		r.fault.Store(nil)
		if r.s != nil {
			require.NoError(t, r.s.Abandon())
		}
	})
	return r
}

func (r *rig) open() {
	r.t.Helper()
	o := r.o
	o.FS = r.fs
	if o.SegmentSize == 0 {
		o.SegmentSize = 64 << 10
	}
	s, err := Open("state", []GroupConfig{{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}}, Retain: r.retain}}, o)
	require.NoError(r.t, err)
	r.s, r.g = s, s.Groups()[0]
}

func (r *rig) inject(kind errorfs.OpKind, path string, err error) *fault {
	f := &fault{kind: kind, path: path, err: err}
	r.fault.Store(f)
	return f
}

func (r *rig) watch(seen func(errorfs.Op)) { r.seen.Store(&seen) }

func (r *rig) write(block int64, fill byte) error {
	return r.g.Append([]Op{{Kind: record.KindWrite, Disk: r.g.Disks()[0],
		Ext: record.Extent{Off: block * record.BlockSize, Len: record.BlockSize}, Data: bytes.Repeat([]byte{fill}, record.BlockSize)}})
}

func (r *rig) live(block int64) byte {
	r.t.Helper()
	b := make([]byte, record.BlockSize)
	require.NoError(r.t, r.g.Disks()[0].ReadAt(b, block*record.BlockSize, false))
	return b[0]
}

func (r *rig) at(lsn record.LSN, block int64) (byte, error) {
	r.t.Helper()
	v, err := r.g.View(r.g.Disks()[0], lsn)
	require.NoError(r.t, err)
	defer v.Close()
	b := make([]byte, record.BlockSize)
	err = v.ReadAt(b, block*record.BlockSize, false)
	return b[0], err
}

func (r *rig) failed() {
	r.t.Helper()
	state, err := r.g.State()
	require.Equal(r.t, "failed", state)
	require.ErrorIs(r.t, err, ErrFailed)
}

// TestAFailedSyncIsFinal: the flush fails, and no later one may succeed as if
// the lost pages had been written.
func TestAFailedSyncIsFinal(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 1))
	f := r.inject(errorfs.OpFileSyncData, "/log", syscall.EIO)
	require.ErrorIs(t, r.g.Sync(), syscall.EIO)
	require.EqualValues(t, 1, f.fired.Load())
	r.fault.Store(nil)
	require.ErrorIs(t, r.g.Sync(), ErrFailed)
	require.ErrorIs(t, r.write(2, 2), ErrFailed)
	r.failed()
	require.Equal(t, byte(1), r.live(1), "reads go on")
	require.NoError(t, r.s.Abandon())
	r.open()
	require.NoError(t, r.write(2, 2), "opened again, the group works")
	require.NoError(t, r.g.Sync())
}

// TestWhatASyncFailedOnIsWrittenAgain: after a failed sync the kernel may hold
// pages that it calls clean and that are not on the disk. A restart that shows
// their records must have written them again.
func TestWhatASyncFailedOnIsWrittenAgain(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 1))
	log := r.g.append.log.Current().Path
	r.inject(errorfs.OpFileSyncData, "/log", syscall.EIO)
	require.ErrorIs(t, r.g.Sync(), syscall.EIO)
	require.NoError(t, r.s.Abandon())

	var ops []errorfs.OpKind // on the log, since the failure
	r.fault.Store(nil)
	r.watch(func(op errorfs.Op) {
		if op.Path == log && (op.Kind == errorfs.OpFileWriteAt || op.Kind == errorfs.OpFileSyncData) {
			ops = append(ops, op.Kind)
		}
	})
	r.open()
	r.seen.Store(nil)
	require.Equal(t, byte(1), r.live(1))
	require.EqualValues(t, 1, r.g.Durable())
	require.Equal(t, []errorfs.OpKind{errorfs.OpFileWriteAt, errorfs.OpFileWriteAt, errorfs.OpFileSyncData}, ops, "header, record, sync")
}

func TestAFailedBackingKeepsTheJournal(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 1))
	f := r.inject(errorfs.OpFileWriteAt, "disk.raw", syscall.EIO)
	require.ErrorIs(t, r.g.Apply(), syscall.EIO)
	require.Positive(t, f.fired.Load())
	r.failed()
	require.Equal(t, byte(1), r.live(1))
	r.fault.Store(nil)
	require.NoError(t, r.s.Abandon())
	r.open()
	require.Equal(t, byte(1), r.live(1))
	require.NoError(t, r.g.Apply())
	got, err := r.at(0, 1)
	require.NoError(t, err)
	require.Equal(t, byte(0xb0), got)
}

// TestNoSpace: writes get ENOSPC, nothing acknowledged is lost, and when there
// is room again they go on.
func TestNoSpace(t *testing.T) {
	r := newRig(t, Options{})
	f := r.inject(errorfs.OpCreate, "", syscall.ENOSPC)
	var err error
	n := int64(0)
	for ; err == nil && n < 100; n++ {
		err = r.write(n, byte(n+1))
	}
	require.ErrorIs(t, err, ErrNoSpace)
	require.Positive(t, f.fired.Load())
	state, why := r.g.State()
	require.Equal(t, "full", state)
	require.ErrorIs(t, why, ErrNoSpace)
	for i := range n - 1 {
		require.Equal(t, byte(i+1), r.live(i))
	}
	r.fault.Store(nil)
	require.NoError(t, r.write(n, 7))
	require.Equal(t, byte(7), r.live(n))
	require.NoError(t, r.g.Apply())
	state, _ = r.g.State()
	require.Equal(t, "active", state)
}

// smallFS is a file system with so many bytes for the state directory.
type smallFS struct {
	vfs.FS
	capacity int64
}

func (s smallFS) GetDiskUsage(string) (vfs.DiskUsage, error) {
	used := s.used("state")
	return vfs.DiskUsage{TotalBytes: uint64(s.capacity), UsedBytes: uint64(used), AvailBytes: uint64(max(0, s.capacity-used))}, nil
}

func (s smallFS) used(path string) (n int64) {
	info, err := s.Stat(path)
	if err != nil {
		return 0 // it was removed meanwhile
	}
	if strings.HasSuffix(path, ".seg") {
		return max(info.Size(), 64<<10) // allocated when they are begun
	}
	if !info.IsDir() {
		return info.Size()
	}
	names, err := s.List(path)
	if err != nil {
		return 0
	}
	for _, name := range names {
		n += s.used(s.PathJoin(path, name))
	}
	return n
}

// running calls write while the store runs, and sees to it that neither fails nor hangs.
func (r *rig) running(write func() error) {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done, written := make(chan error), make(chan error)
	go func() { done <- r.s.Run(ctx) }()
	go func() { written <- write() }()
	var err error
	select {
	case err = <-written:
	case <-time.After(2 * time.Minute):
		panic("writes hang")
	}
	cancel()
	require.NoError(r.t, <-done)
	require.NoError(r.t, err)
}

// TestTheEndOfARoundLetsWritesIn: on a file system that does not tell its room, nothing bounds what may be owed.
func TestTheEndOfARoundLetsWritesIn(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 1))
	r.g.append.Lock()
	defer r.g.append.Unlock()
	for _, done := range []float64{0, 0.5, 1} {
		r.g.append.underWay = round{bytes: 1, owed: 1, weight: 1, done: done}
		require.True(t, r.g.roomLocked(), "%v done", done)
	}
	r.g.append.underWay = round{}
}

// TestASmallJournalGoesOn: the disk is larger than the journal has room for, and each first
// overwrite of a block needs room for its original. The oldest history goes, no write meets ENOSPC, and none waits for ever.
func TestASmallJournalGoesOn(t *testing.T) {
	r := newRig(t, Options{Reserve: 64 << 10})
	require.NoError(t, r.s.Close())
	r.fs = smallFS{r.fs, 2 << 20}
	r.open()
	r.running(func() error {
		for i := range int64(4 * rigBlocks) {
			if err := r.write(i%rigBlocks, byte(i/rigBlocks+1)); err != nil {
				return err
			}
		}
		return nil
	})
	require.Positive(t, r.g.Horizon())
	for b := range int64(rigBlocks) {
		require.Equal(t, byte(4), r.live(b))
	}
	got, err := r.at(r.g.Head()-8, rigBlocks-1)
	require.NoError(t, err)
	require.Equal(t, byte(3), got)
}

// TestADiscontinuityWithLittleRoom: nobody but the start itself can make room while it journals one.
func TestADiscontinuityWithLittleRoom(t *testing.T) {
	r := newRig(t, Options{Reserve: 64 << 10})
	for b := range int64(rigBlocks) {
		require.NoError(t, r.write(b, 1))
		if b%16 == 0 {
			require.NoError(t, r.g.Apply())
		}
	}
	require.NoError(t, r.s.Close())
	f, err := r.mem.OpenReadWrite("disk.raw", vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	for b := int64(0); b < rigBlocks; b += 2 {
		_, err = f.WriteAt(bytes.Repeat([]byte{9}, record.BlockSize), b*record.BlockSize)
		require.NoError(t, err)
	}
	require.NoError(t, errors.Join(f.Sync(), f.Close()))
	r.fs = smallFS{r.fs, smallFS{FS: r.fs}.used("state") + 1400<<10}
	opened := make(chan struct{})
	go func() {
		defer close(opened)
		r.open()
	}()
	select {
	case <-opened:
	case <-time.After(time.Minute):
		panic("the start hangs")
	}
	require.Greater(t, r.g.Head(), record.LSN(rigBlocks))
	require.Equal(t, byte(9), r.live(2))
	require.Equal(t, byte(1), r.live(3))
}

// TestLimitExpiresTheOldest keeps a group within its limit while it is
// written: the window moves, the newest point stays right.
func TestLimitExpiresTheOldest(t *testing.T) {
	r := newRig(t, Options{Limit: 1 << 20})
	for i := range 1500 {
		require.NoError(t, r.write(int64(i%300), byte(i)))
		if i%100 == 99 {
			require.NoError(t, r.g.Apply())
			require.NoError(t, due(r.g))
		}
	}
	require.NoError(t, r.g.Apply())
	require.NoError(t, due(r.g))
	require.Positive(t, r.g.Horizon())
	require.LessOrEqual(t, r.g.JournalBytes(), int64(3<<20))
	for _, lsn := range []record.LSN{r.g.Horizon(), r.g.Horizon() + 1, (r.g.Horizon() + r.g.Head()) / 2, r.g.Head()} {
		for block := range int64(300) {
			want := (int64(lsn) - 1 - block) / 300 * 300
			got, err := r.at(lsn, block)
			require.NoError(t, err)
			require.Equal(t, byte(want+block), got, "block %d at %d", block, lsn)
		}
	}
	_, err := r.g.View(r.g.Disks()[0], r.g.Horizon()-1)
	require.ErrorIs(t, err, ErrNoPoint)
}

// TestAnOpenViewKeepsItsPoint: what is around it expires.
func TestAnOpenViewKeepsItsPoint(t *testing.T) {
	r := newRig(t, Options{})
	for i := range 200 {
		require.NoError(t, r.write(int64(i%50), byte(i)))
	}
	require.NoError(t, r.g.Apply())
	v, err := r.g.View(r.g.Disks()[0], 20)
	require.NoError(t, err)
	_, err = r.g.Expire(1 << 30)
	require.NoError(t, err)
	require.Greater(t, r.g.Horizon(), record.LSN(20))
	_, err = r.g.View(r.g.Disks()[0], 21)
	require.ErrorIs(t, err, ErrNoPoint)
	for i := range 200 {
		require.NoError(t, r.write(int64(i%50), byte(i)))
	}
	require.NoError(t, r.g.Apply())
	_, err = r.g.Expire(1 << 30)
	require.NoError(t, err)
	clean := func() (freed int64) {
		require.NoError(t, r.g.closeOriginals(0))
		freed, err := r.g.clean(1, func() error { return nil })
		require.NoError(t, err)
		return freed
	}
	clean()
	b := make([]byte, 1)
	for block := range int64(50) {
		require.NoError(t, v.ReadAt(b, block*record.BlockSize, false))
		want := byte(0xb0)
		if block < 20 {
			want = byte(block)
		}
		require.Equal(t, want, b[0])
	}
	v.Close()
	// Who had it open may come back after a restart, if nothing was let go of before.
	require.NoError(t, r.s.Close())
	require.NoError(t, r.fs.RemoveAll("state/index"))
	r.open()
	v, err = r.g.View(r.g.Disks()[0], 20)
	require.NoError(t, err)
	for i := range 200 {
		require.NoError(t, r.write(int64(i%50), byte(i)))
	}
	require.NoError(t, r.g.Apply())
	_, err = r.g.Expire(1 << 30)
	require.NoError(t, err)
	require.NoError(t, v.ReadAt(b, 19*record.BlockSize, false))
	require.EqualValues(t, 19, b[0])
	did, err := r.g.Thin()
	require.NoError(t, err)
	require.False(t, did)
	v.Close()
	did, err = r.g.Thin()
	require.NoError(t, err)
	require.True(t, did)
	require.Positive(t, clean())
	r.checkOriginals()
}

// TestAViewOfTheHorizonKeepsIt: its record is gone, and nothing else says when that was.
func TestAViewOfTheHorizonKeepsIt(t *testing.T) {
	r := newRig(t, Options{})
	fill := func() {
		for i := range 100 {
			require.NoError(t, r.write(int64(i%50), byte(i)))
		}
		require.NoError(t, r.g.Apply())
		_, err := r.g.Expire(1 << 30)
		require.NoError(t, err)
	}
	fill()
	at := r.g.Horizon()
	v, err := r.g.View(r.g.Disks()[0], at)
	require.NoError(t, err)
	defer v.Close()
	want := make([]byte, 50*record.BlockSize)
	require.NoError(t, v.ReadAt(want, 0, false))
	for range 3 {
		fill()
		require.Equal(t, []record.LSN{at}, r.g.keptLSNs())
		got := make([]byte, len(want))
		require.NoError(t, v.ReadAt(got, 0, false))
		require.True(t, bytes.Equal(want, got))
	}
}

// flip changes a byte of the first file whose name has a part, at the first
// place where want stands.
func (r *rig) flip(part string, want []byte) {
	r.t.Helper()
	names, err := r.mem.List("state/groups/g")
	require.NoError(r.t, err)
	for _, name := range names {
		if !strings.Contains(name, part) {
			continue
		}
		f, err := r.mem.OpenReadWrite("state/groups/g/"+name, vfs.WriteCategoryUnspecified)
		require.NoError(r.t, err)
		info, err := f.Stat()
		require.NoError(r.t, err)
		b := make([]byte, info.Size())
		if _, err := f.ReadAt(b, 0); err != nil {
			require.ErrorIs(r.t, err, io.EOF)
		}
		if i := bytes.Index(b, want); i >= 0 {
			_, err := f.WriteAt([]byte{want[0] ^ 1}, int64(i))
			require.NoError(r.t, errors.Join(err, f.Sync(), f.Close()))
			return
		}
		require.NoError(r.t, f.Close())
	}
	r.t.Fatalf("no %q holds the bytes", part)
}

// TestDamageIsAnErrorAndIsFound: never other bytes (P7).
func TestDamageIsAnErrorAndIsFound(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 0x51))
	require.NoError(t, r.write(1, 0x52))
	require.NoError(t, r.write(2, 0x53))
	require.NoError(t, r.g.Apply())
	r.flip("log-", bytes.Repeat([]byte{0x51}, 64))
	r.flip("originals-", bytes.Repeat([]byte{0xb0}, 64))
	_, err := r.at(1, 1)
	require.ErrorIs(t, err, record.ErrCorrupt)
	_, err = r.at(0, 1)
	require.ErrorIs(t, err, record.ErrCorrupt)
	got, err := r.at(2, 1)
	require.NoError(t, err)
	require.Equal(t, byte(0x52), got)
	var found []Finding
	done, err := r.g.Verify(context.Background(), VerifyOptions{}, func(f Finding) { found = append(found, f) })
	require.NoError(t, err)
	require.EqualValues(t, len(found), done.Findings)
	require.Contains(t, fmt.Sprint(found), "LSN 1")
	require.Contains(t, fmt.Sprint(found), "originals-")
}

// TestDamageOfADurableRecordStopsTheGroup: what follows it can not be replayed,
// and must not be dropped as if it were a torn tail.
func TestDamageOfADurableRecordStopsTheGroup(t *testing.T) {
	r := newRig(t, Options{})
	for i := range 5 {
		require.NoError(t, r.write(int64(i), byte(0x61+i)))
		require.NoError(t, r.g.Sync())
	}
	require.NoError(t, r.s.Abandon())
	h := record.Header{LSN: 3, Kind: record.KindTrim, Extent: record.Extent{Len: 1}}
	r.flip("log-", h.Append(nil)[8:16])
	r.open()
	r.failed()
	require.ErrorIs(t, r.write(0, 1), ErrFailed)
	require.Equal(t, byte(0x61), r.live(0))
}

// TestAChangedBackingIsADiscontinuity writes the backing while the group is
// closed: what the journal knew is told apart and kept, what it can not know is refused.
func TestAChangedBackingIsADiscontinuity(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 1))
	require.NoError(t, r.write(2, 2))
	require.NoError(t, r.s.Close())
	f, err := r.mem.OpenReadWrite("disk.raw", vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	_, err = f.WriteAt(bytes.Repeat([]byte{0xcc}, 2*record.BlockSize), 2*record.BlockSize)
	require.NoError(t, errors.Join(err, f.Close()))
	r.open()
	require.Equal(t, byte(0xcc), r.live(2))
	markers, err := r.g.Markers()
	require.NoError(t, err)
	require.Len(t, markers, 1)
	require.Contains(t, markers[0].Label, "discontinuity-d-")
	head := r.g.Head()
	for block, want := range map[int64]byte{1: 1, 2: 0xcc, 3: 0xcc, 4: 0xb0} {
		got, err := r.at(head, block)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	got, err := r.at(2, 2)
	require.NoError(t, err)
	require.Equal(t, byte(2), got, "the journal held it")
	_, err = r.at(2, 3)
	require.ErrorContains(t, err, "changed outside of Tidemark")
	require.NoError(t, r.s.Close())
	r.open()
	require.Equal(t, head, r.g.Head(), "nobody changed it again")
}

// TestADiscontinuityIsTakenUpAgain: the journal fails while a discontinuity is
// journaled. The next start journals what is left of it.
func TestADiscontinuityIsTakenUpAgain(t *testing.T) {
	r := newRig(t, Options{})
	for b := range int64(10) {
		require.NoError(t, r.write(b, 1))
	}
	require.NoError(t, r.s.Close())
	f, err := r.mem.OpenReadWrite("disk.raw", vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	for _, b := range []int64{2, 5, 8, 300} {
		_, err = f.WriteAt(bytes.Repeat([]byte{9}, record.BlockSize), b*record.BlockSize)
		require.NoError(t, err)
	}
	require.NoError(t, errors.Join(f.Sync(), f.Close()))

	// The new segment's header and the first of the three go well.
	fl := &fault{kind: errorfs.OpFileWriteAt, path: "/log", err: syscall.EIO}
	fl.spare.Store(2)
	r.fault.Store(fl)
	o := r.o
	o.FS, o.SegmentSize = r.fs, 64<<10
	_, err = Open("state", []GroupConfig{{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}}}}, o)
	require.ErrorIs(t, err, syscall.EIO)
	require.EqualValues(t, 1, fl.fired.Load())
	r.fault.Store(nil)
	r.open()
	for b := range int64(10) {
		want := byte(1)
		if b == 2 || b == 5 || b == 8 {
			want = 9
		}
		require.Equal(t, want, r.live(b))
		got, err := r.at(r.g.Head(), b)
		require.NoError(t, err)
		require.Equal(t, want, got, "block %d", b)
		got, err = r.at(10, b)
		require.NoError(t, err)
		require.Equal(t, byte(1), got, "block %d before the discontinuity", b)
	}
	_, err = r.at(10, 300)
	require.Error(t, err, "what the block was is not known")
	v, err := r.g.View(r.g.Disks()[0], 10)
	require.NoError(t, err)
	defer v.Close()
	require.NoError(t, v.Extents(record.Extent{Off: 300 * record.BlockSize, Len: record.BlockSize}, func(_ int64, zero bool) { require.False(t, zero) }))
	markers, err := r.g.Markers()
	require.NoError(t, err)
	require.Len(t, markers, 1)
}

// TestTwoChangedBackings: each is noticed, though the first moves the head.
func TestTwoChangedBackings(t *testing.T) {
	mem := vfs.NewMem()
	change := func(path string, fill byte) {
		f, err := mem.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
		require.NoError(t, err)
		_, err = f.WriteAt(bytes.Repeat([]byte{fill}, 4*record.BlockSize), 0)
		require.NoError(t, errors.Join(err, f.Sync(), f.Close()))
	}
	change("a.raw", 1)
	change("b.raw", 1)
	open := func() *Store {
		s, err := Open("state", []GroupConfig{{Name: "g", Disks: []DiskConfig{{"a", "a.raw"}, {"b", "b.raw"}}}}, Options{FS: mem, SegmentSize: 64 << 10})
		require.NoError(t, err)
		return s
	}
	s := open()
	_, err := s.Groups()[0].Mark(record.Marker{Label: "before", By: "test"})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	change("a.raw", 2)
	change("b.raw", 3)
	s = open()
	markers, err := s.Groups()[0].Markers()
	require.NoError(t, err)
	require.Len(t, markers, 3)
	require.NoError(t, s.Close())
}

func TestPoints(t *testing.T) {
	clock := time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	r := newRig(t, Options{Now: func() time.Time { return clock }})
	var times []time.Time
	for i := range 300 {
		clock = clock.Add(37 * time.Millisecond)
		if i == 150 {
			clock = clock.Add(-time.Hour) // steps back: record times do not
		}
		require.NoError(t, r.write(int64(i), byte(i)))
		times = append(times, time.Unix(0, r.g.lastTime.Load()))
	}
	m, err := r.g.Mark(record.Marker{Label: "here", By: "test"})
	require.NoError(t, err)
	clock = clock.Add(2 * time.Hour)
	resolve := func(s string) (record.LSN, error) {
		p, err := record.ParsePoint(s)
		require.NoError(t, err)
		return r.g.Resolve(p)
	}
	for i, at := range times {
		if i >= 149 {
			break // the same time from here on
		}
		lsn, err := resolve(at.Format(time.RFC3339Nano))
		require.NoError(t, err)
		require.EqualValues(t, i+1, lsn)
		lsn, err = resolve(at.Add(36 * time.Millisecond).Format(time.RFC3339Nano))
		require.NoError(t, err)
		require.EqualValues(t, i+1, lsn)
	}
	for s, want := range map[string]record.LSN{"latest": m.LSN, "here": m.LSN, "lsn:7": 7, "latest:crash": m.LSN, "-1s": m.LSN} {
		lsn, err := resolve(s)
		require.NoError(t, err)
		require.Equal(t, want, lsn, s)
	}
	for _, s := range []string{"there", "lsn:9999", "latest:application", "-99h", "2036-11-21T10:00:00Z"} {
		_, err := resolve(s)
		require.ErrorIs(t, err, ErrNoPoint, s)
	}
}

// TestNothingIsNotJournaled: a request of no length leaves no record.
func TestNothingIsNotJournaled(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 1))
	for _, k := range []record.Kind{record.KindWrite, record.KindTrim, record.KindZero} {
		for _, off := range []int64{0, 4096, 5} {
			require.NoError(t, r.g.Append([]Op{{Kind: k, Disk: r.g.Disks()[0], Ext: record.Extent{Off: off}}}))
		}
	}
	require.EqualValues(t, 1, r.g.Head())
	require.NoError(t, r.write(2, 2))
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.s.Abandon())
	r.open()
	require.Equal(t, byte(2), r.live(2))
}

// TestSlowReadersHoldUpNoWrite: a read of an old view and an expiry hang in the
// disk (P8). Writes, flushes and live reads go on.
func TestSlowReadersHoldUpNoWrite(t *testing.T) {
	r := newRig(t, Options{})
	for i := range int64(40) { // three segments
		require.NoError(t, r.write(i, byte(i)))
	}
	require.NoError(t, r.s.Close())
	r.open() // so that operations on the segments go by their names
	view, err := r.g.View(r.g.Disks()[0], 20)
	require.NoError(t, err)

	disk := make(chan struct{}) // closed: it answers again
	var hanging atomic.Int32
	old := r.g.set.Files(segment.Log)[0].Path
	r.watch(func(op errorfs.Op) {
		if op.Kind == errorfs.OpFileReadAt && op.Path == old {
			hanging.Add(1)
			<-disk
		}
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		require.NoError(t, view.ReadAt(make([]byte, record.BlockSize), 5*record.BlockSize, false))
		view.Close()
	})
	wg.Go(func() {
		_, err := r.g.Expire(1)
		require.True(t, err == nil || errors.Is(err, errNeeded), err)
	})
	require.Eventually(t, func() bool { return hanging.Load() == 2 }, 10*time.Second, time.Millisecond)

	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range int64(10) {
			require.NoError(t, r.write(100+i, 7))
			require.NoError(t, r.g.Sync())
			require.Equal(t, byte(7), r.live(100+i))
		}
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Error("writes wait for readers of the past")
	}
	close(disk)
	<-done
	wg.Wait()
}

// TestDamagedOriginalsOutliveAnExpiry: what stands behind the damage is still needed.
func TestDamagedOriginalsOutliveAnExpiry(t *testing.T) {
	r := newRig(t, Options{})
	for b := range int64(60) { // originals of 60 blocks in several files
		require.NoError(t, r.write(b, 1))
		require.NoError(t, r.g.Apply())
	}
	originals := r.g.set.Files(segment.Originals)
	require.Greater(t, len(originals), 2)
	require.NoError(t, r.s.Close())
	damaged := originals[1].Path
	f, err := r.mem.OpenReadWrite(damaged, vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte{0xff}, originals[1].Start()+5)
	require.NoError(t, err)
	require.NoError(t, errors.Join(f.Sync(), f.Close()))
	r.open()
	_, err = r.g.Expire(1)
	require.NoError(t, err)
	require.Positive(t, r.g.Horizon())
	require.True(t, slices.ContainsFunc(r.g.set.Files(segment.Originals), func(f *segment.File) bool { return f.Path == damaged }),
		"a damaged file of originals was dropped")
	for b := r.g.Horizon(); b < 60; b++ { // written later: its original is what it was
		if got, err := r.at(r.g.Horizon(), int64(b)); err == nil {
			require.Equal(t, byte(0xb0), got, "block %d", b)
		} else {
			require.ErrorIs(t, err, record.ErrCorrupt)
		}
	}
}

// TestVerifyFindsAnOriginalThatIsZeroes: the first one, with others behind it, and the last one.
func TestVerifyFindsAnOriginalThatIsZeroes(t *testing.T) {
	for _, which := range []int{0, 2} {
		r := newRig(t, Options{})
		for b := range int64(3) {
			require.NoError(t, r.write(2*b, 1))
		}
		require.NoError(t, r.g.Apply())
		f := r.g.set.Files(segment.Originals)[0]
		var at []int64
		_, err := f.Scan(f.Start(), func(off int64, _ record.Header) error {
			at = append(at, off)
			return nil
		})
		require.NoError(t, err)
		require.Len(t, at, 3)
		w, err := r.mem.OpenReadWrite(f.Path, vfs.WriteCategoryUnspecified)
		require.NoError(t, err)
		_, err = w.WriteAt(make([]byte, record.HeaderSize), at[which])
		require.NoError(t, errors.Join(err, w.Close()))
		var found []Finding
		_, err = r.g.Verify(context.Background(), VerifyOptions{}, func(f Finding) { found = append(found, f) })
		require.NoError(t, err)
		require.Len(t, found, 1)
		require.Contains(t, found[0].Where, f.Path)
	}
}

// TestVerifyStopsBeforeWhatIsHalfWritten: an original that no commit covers yet is none of its business.
func TestVerifyStopsBeforeWhatIsHalfWritten(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 1))
	require.NoError(t, r.g.Apply())
	r.g.apply.Lock()
	require.NoError(t, r.g.keepBlocks(r.g.Disks()[0], record.Extent{Off: 5 * record.BlockSize, Len: record.BlockSize}, make([]byte, record.BlockSize), 0, 0, 1))
	require.NoError(t, r.g.writeGathered())
	r.g.apply.Unlock()
	done, err := r.g.Verify(context.Background(), VerifyOptions{}, func(f Finding) { t.Errorf("%+v", f) })
	require.NoError(t, err)
	require.EqualValues(t, 1, done.Originals)
}

// TestAGroupBegunAnewTakesNothingFromTheIndex: the segments of a group are
// removed by hand, the index still has its versions and how far it got.
func TestAGroupBegunAnewTakesNothingFromTheIndex(t *testing.T) {
	r := newRig(t, Options{})
	for b := range int64(30) {
		require.NoError(t, r.write(b, 1))
	}
	require.NoError(t, r.s.Close())
	require.NoError(t, r.mem.RemoveAll("state/groups/g"))
	r.open()
	require.Zero(t, r.g.Head())
	require.NoError(t, r.write(3, 2))
	require.NoError(t, r.write(3, 3))
	got, err := r.at(1, 3)
	require.NoError(t, err)
	require.Equal(t, byte(2), got)
	got, err = r.at(0, 3)
	require.NoError(t, err)
	require.Equal(t, byte(1), got, "what the backing was when the group began anew")
	require.NoError(t, r.s.Close())
	r.open()
	state, _ := r.g.State()
	require.Equal(t, "active", state)
	require.Equal(t, byte(3), r.live(3))
}

// TestAFullJournalStarts: there is no room for a new segment at a start. Reads go on, and so
// do writes when there is room again.
func TestAFullJournalStarts(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 1))
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.s.Abandon())
	r.inject(errorfs.OpCreate, "log.tmp", syscall.ENOSPC)
	r.open()
	state, _ := r.g.State()
	require.Equal(t, "full", state)
	require.Equal(t, byte(1), r.live(1))
	require.ErrorIs(t, r.write(2, 2), ErrNoSpace)
	r.fault.Store(nil)
	require.NoError(t, r.write(2, 2))
	require.NoError(t, r.s.Close())
	r.open()
	require.Equal(t, byte(2), r.live(2))
	require.EqualValues(t, 2, r.g.Head())
}

// TestAMarkerIsAppliedWhenDurable: nothing but a marker is journaled, and it
// can not be synced.
func TestAMarkerIsAppliedWhenDurable(t *testing.T) {
	r := newRig(t, Options{})
	r.inject(errorfs.OpFileSyncData, "/log", syscall.EIO)
	_, err := r.g.Mark(record.Marker{Label: "m", By: "test"})
	require.ErrorIs(t, err, syscall.EIO)
	require.Error(t, r.g.Apply())
	require.Zero(t, r.g.Applied())
}

// damage changes a byte of a file.
func (r *rig) damage(path string, off int64) {
	r.t.Helper()
	f, err := r.mem.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	require.NoError(r.t, err)
	var b [1]byte
	_, err = f.ReadAt(b[:], off)
	require.NoError(r.t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], off)
	require.NoError(r.t, errors.Join(err, f.Sync(), f.Close()))
}

// TestOverlaysAreSaved: what a checkpoint saved is not replayed, and what came
// while it was saving is.
func TestOverlaysAreSaved(t *testing.T) {
	r := newRig(t, Options{SegmentSize: 1 << 20})
	for b := range int64(rigBlocks / 2) {
		require.NoError(t, r.write(b, 1))
	}
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.write(3, 2))
	require.NoError(t, r.g.Append([]Op{{Kind: record.KindTrim, Disk: r.g.Disks()[0], Ext: record.Extent{Off: 5 * record.BlockSize, Len: record.BlockSize}}}))
	require.NoError(t, r.g.Checkpoint())
	done := make(chan error)
	go func() {
		var err error
		for b := int64(rigBlocks / 2); b < rigBlocks && err == nil; b++ {
			err = r.write(b, 3)
		}
		done <- err
	}()
	beside := 0 // checkpoints that the writer overtook
	for running := true; running; {
		select {
		case err := <-done:
			require.NoError(t, err)
			running = false
		default:
			before := r.g.Head()
			require.NoError(t, r.g.Checkpoint())
			if r.g.Head() > before {
				beside++
			}
		}
	}
	require.Positive(t, beside)
	require.NoError(t, r.write(4, 4))
	saved, unapplied := r.g.apply.saved, r.g.unapplied.Load()
	require.Greater(t, saved, record.LSN(rigBlocks/2+2))
	require.NoError(t, r.s.Abandon())

	check := func() {
		t.Helper()
		state, err := r.g.State()
		require.NoError(t, err)
		require.Equal(t, "active", state)
		for b := range int64(rigBlocks) {
			want := byte(1)
			switch {
			case b == 3:
				want = 2
			case b == 4:
				want = 4
			case b == 5:
				want = 0
			case b >= rigBlocks/2:
				want = 3
			}
			require.Equal(t, want, r.live(b), "block %d", b)
		}
	}
	r.open()
	require.Equal(t, saved, r.g.apply.saved)
	require.GreaterOrEqual(t, r.g.unapplied.Load(), unapplied)
	check()
	require.NoError(t, r.s.Abandon())

	r.damage("state/groups/g/"+overlayName, 60)
	r.open()
	require.Equal(t, r.g.Applied(), r.g.apply.saved, "a damaged file is passed over")
	require.Equal(t, unapplied, r.g.unapplied.Load())
	check()
	require.NoError(t, r.g.Checkpoint())
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.s.Abandon())

	r.open()
	require.Greater(t, r.g.apply.saved, r.g.Applied(), "the checkpoint was before the round")
	check()
	require.NoError(t, r.g.Apply())
	require.Zero(t, r.g.unapplied.Load())
	check()
}

// freeFS is a file system with so many bytes free for the state directory.
type freeFS struct {
	vfs.FS
	free *atomic.Int64
}

func (f freeFS) GetDiskUsage(string) (vfs.DiskUsage, error) {
	return vfs.DiskUsage{AvailBytes: uint64(max(0, f.free.Load()-smallFS{FS: f.FS}.used("state")))}, nil
}

// newFreeRig is a rig on such a file system.
func newFreeRig(t *testing.T, o Options, free int64) (*rig, freeFS) {
	t.Helper()
	r := newRig(t, o)
	require.NoError(t, r.s.Close())
	fs := freeFS{r.fs, &atomic.Int64{}}
	fs.free.Store(free)
	r.fs = fs
	r.open()
	return r, fs
}

// TestARoundGoesOnWhereItWasFull: room comes free a little at a time. What a try could keep, the next one need not.
func TestARoundGoesOnWhereItWasFull(t *testing.T) {
	r, fs := newFreeRig(t, Options{Reserve: 64 << 10}, 4<<20)
	const blocks = 200
	for b := range int64(blocks) {
		require.NoError(t, r.write(2*b, 1))
	}
	full := 0
	for tries := 0; ; tries++ {
		require.Less(t, tries, 40, "no progress, though there was room for all originals")
		fs.free.Store(smallFS{FS: r.fs}.used("state") + r.g.o.keepApply() + 80<<10)
		err := r.g.Apply()
		if err == nil {
			break
		}
		full++
		require.ErrorIs(t, err, ErrNoSpace)
	}
	require.Greater(t, full, 3)
	for b := range int64(blocks) {
		got, err := r.at(0, 2*b)
		require.NoError(t, err)
		require.Equal(t, byte(0xb0), got)
		require.Equal(t, byte(1), r.live(2*b))
	}
}

// TestGroupsShareTheirRoom: each may fill its part of the file system, and all can apply what they took.
func TestGroupsShareTheirRoom(t *testing.T) {
	mem := vfs.NewMem()
	const blocks, groups = 4096, 3
	var gcs []GroupConfig
	for i := range groups {
		path := fmt.Sprintf("g%d.raw", i)
		f, err := mem.Create(path, vfs.WriteCategoryUnspecified)
		require.NoError(t, err)
		_, err = f.Write(bytes.Repeat([]byte{0xb0}, blocks*record.BlockSize))
		require.NoError(t, errors.Join(err, f.Close()))
		gcs = append(gcs, GroupConfig{Name: fmt.Sprintf("g%d", i), Disks: []DiskConfig{{"d", path}}})
	}
	s, err := Open("state", gcs, Options{FS: smallFS{mem, 32 << 20}, Reserve: 2 << 20, SegmentSize: 256 << 10})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Abandon()) }()
	data := bytes.Repeat([]byte{1}, record.BlockSize)
	for b, admitted := int64(0), true; admitted && b < blocks; b++ { // as much as each one is let
		admitted = false
		for _, g := range s.Groups() {
			g.append.Lock()
			ok := g.roomLocked()
			g.append.Unlock()
			if !ok {
				continue
			}
			admitted = true
			require.NoError(t, g.Append([]Op{{Kind: record.KindWrite, Disk: g.Disks()[0],
				Ext: record.Extent{Off: b * record.BlockSize, Len: record.BlockSize}, Data: data}}))
		}
	}
	for _, g := range s.Groups() {
		require.NoError(t, g.Apply(), g.Name())
	}
}

// TestATrimTakesTheRoomOfItsOriginals: a record without bytes may cost an original for each block of
// its range. The journal that has not the room for all goes on piece by piece.
func TestATrimTakesTheRoomOfItsOriginals(t *testing.T) {
	r := newRig(t, Options{Reserve: 64 << 10})
	require.NoError(t, r.s.Close())
	r.fs = smallFS{r.fs, 1 << 20} // half of the disk
	r.open()
	r.running(func() error {
		err := r.write(1, 1)
		for n := int64(0); err == nil && n < 20; n++ {
			if err = r.write(n, 3); err == nil && n%10 == 5 {
				err = r.g.Append([]Op{{Kind: record.KindTrim, Disk: r.g.Disks()[0], Ext: record.Extent{Len: rigBlocks * record.BlockSize}}})
			}
		}
		return err
	})
	require.Equal(t, byte(3), r.live(19))
	require.Equal(t, byte(0), r.live(5))
	require.Equal(t, byte(0), r.live(300))
}

// ofSevens is a group whose one disk, on a real file system, has a backing of that byte.
func ofSevens(t *testing.T, size int) (g *Group, backing string) {
	t.Helper()
	dir := t.TempDir()
	backing = filepath.Join(dir, "vda.raw")
	require.NoError(t, os.WriteFile(backing, bytes.Repeat([]byte{7}, size), 0o600))
	s, err := Open(filepath.Join(dir, "state"), []GroupConfig{{Name: "g", Disks: []DiskConfig{{"vda", backing}}}}, Options{SegmentSize: 1 << 20})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Abandon()) })
	return s.Groups()[0], backing
}

// TestABackingThatWasCutShort is not one of zeroes: what it held there is lost, and nothing else is shown in its stead.
func TestABackingThatWasCutShort(t *testing.T) {
	const size = 1 << 20
	g, backing := ofSevens(t, size)
	d := g.Disks()[0]
	write := func(off int64) {
		require.NoError(t, g.Append([]Op{{Kind: record.KindWrite, Disk: d, Ext: record.Extent{Off: off, Len: record.BlockSize}, Data: bytes.Repeat([]byte{9}, record.BlockSize)}}))
		require.NoError(t, g.Sync())
	}
	write(0)
	require.NoError(t, g.Apply())
	write(200 * record.BlockSize)
	require.NoError(t, os.Truncate(backing, 100*record.BlockSize))
	require.Error(t, g.Apply())
	state, _ := g.State()
	require.Equal(t, "failed", state)
}

// checkOriginals: nothing among the originals but what some point is of, and the index has as much of it.
func (r *rig) checkOriginals() {
	r.t.Helper()
	points := r.g.allPoints()
	found := map[string]bool{}
	for _, f := range r.g.set.Files(segment.Originals) {
		all, err := r.g.allEnded(f)
		require.NoError(r.t, err)
		_, err = f.Scan(f.Start(), func(off int64, h record.Header) error {
			if all && f != r.g.apply.orig.Current() && h.Extent.Len > 0 && !lives(points, &h) {
				r.t.Errorf("%s at %d: no point is of what %v was from LSN %d to %d", f.Path, off, h.Extent, h.Durable, h.LSN)
			}
			for _, e := range appendOriginal(nil, &h, f.Number, off) {
				found[fmt.Sprint(e)] = true
			}
			return nil
		})
		require.NoError(r.t, err)
	}
	require.NoError(r.t, r.g.ix.Versions(func(e index.Entry) (bool, error) {
		if e.LSN <= r.g.expiredTo() && !found[fmt.Sprint(e)] {
			r.t.Errorf("the index has %+v, and no file", e)
		}
		return true, nil
	}))
}

// due expires what is due, a pass of it.
func due(g *Group) error {
	_, err := g.expireDue()
	return err
}

// TestCompactTakesRoom: without room for another file beside, or when that runs out on the way, segments stay as they are, and the group goes on; with it, they become compact.
func TestCompactTakesRoom(t *testing.T) {
	r, fs := newFreeRig(t, Options{Reserve: 64 << 10, SegmentSize: 128 << 10}, 64<<20)
	for i := range 100 {
		require.NoError(t, r.write(int64(i%20), byte(i)))
	}
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.g.Checkpoint())
	was := r.g.JournalBytes()
	fs.free.Store(smallFS{FS: r.fs}.used("state") + r.g.o.keepLog() + 64<<10)
	_, err := r.g.Compact()
	require.ErrorIs(t, err, ErrNoSpace)
	fs.free.Store(64 << 20)
	f := r.inject(errorfs.OpFileWriteAt, "compact-", syscall.ENOSPC)
	f.spare.Store(2)
	_, err = r.g.Compact()
	require.ErrorIs(t, err, ErrNoSpace)
	require.Positive(t, f.fired.Load())
	r.fault.Store(nil)
	require.Equal(t, was, r.g.JournalBytes())
	names, err := r.fs.List("state/groups/g")
	require.NoError(t, err)
	require.False(t, slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, "compact") }), "%v", names)
	require.NoError(t, r.write(0, 99))
	saved, err := r.g.Compact()
	require.NoError(t, err)
	require.Positive(t, saved)
	require.Less(t, r.g.JournalBytes(), was)
	b, err := r.g.Bytes()
	require.NoError(t, err)
	require.Positive(t, b.Saved)
	for _, lsn := range []record.LSN{1, 20, 55, 100} {
		got, err := r.at(lsn, int64(lsn-1)%20)
		require.NoError(t, err)
		require.Equal(t, byte(lsn-1), got)
	}
}
