package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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

// fillUp writes and applies some hot blocks.
func (r *rig) fillUp(n int) {
	r.t.Helper()
	for i := range n {
		require.NoError(r.t, r.write(int64(i%5), byte(i)))
	}
	require.NoError(r.t, r.g.Apply())
}

// expireAll expires all that may go.
func (r *rig) expireAll() {
	r.t.Helper()
	require.NoError(r.t, r.g.closeLog())
	for {
		n, err := r.g.Expire(1 << 40)
		require.NoError(r.t, err)
		if n == 0 {
			return
		}
	}
}

func (r *rig) mark(label string, pinned bool) record.Marker {
	r.t.Helper()
	m, err := r.g.Mark(record.Marker{Label: label, By: "test", Pinned: pinned})
	require.NoError(r.t, err)
	return m
}

// reads has a view show what a block was.
func (r *rig) reads(lsn record.LSN, block int64, want byte) {
	r.t.Helper()
	got, err := r.at(lsn, block)
	require.NoError(r.t, err, "block %d at %d", block, lsn)
	require.Equal(r.t, want, got, "block %d at %d", block, lsn)
}

// loseIndex has the index made again.
func (r *rig) loseIndex() {
	r.t.Helper()
	require.NoError(r.t, r.s.Close())
	require.NoError(r.t, r.mem.RemoveAll("state/index"))
	r.open()
}

// TestAnExpiryThatWasNotNoted: the crash came behind the index's flush. The next start says what is kept before it removes files: else a point that was let go of would
// come back with an index that is made again, and one that was kept be gone.
func TestAnExpiryThatWasNotNoted(t *testing.T) {
	reached := false
	for spare := range int32(8) {
		r := newRig(t, Options{})
		p := r.mark("p", true)
		r.fillUp(100)
		r.expireAll()
		_, err := r.g.Unpin("p")
		require.NoError(t, err)
		r.fillUp(100)
		q := r.mark("q", true)
		r.fillUp(100)
		require.NoError(t, r.g.Checkpoint())
		r.inject(errorfs.OpFileWriteAt, "orig", errorfs.ErrInjected).spare.Store(spare)
		_, err = r.g.Expire(1 << 40)
		r.fault.Store(nil)
		if err == nil || !strings.Contains(err.Error(), "note that history") {
			continue
		}
		reached = true
		require.NoError(t, r.s.Abandon())
		r.open()
		require.NoError(t, r.write(300, 0x99))
		require.NoError(t, r.g.Apply())
		r.loseIndex()
		require.Equal(t, []record.LSN{q.LSN}, r.g.keptLSNs(), "not %d", p.LSN)
		r.reads(q.LSN, 300, 0xb0)
	}
	require.True(t, reached)
}

// TestADamagedVersionOfAKeptPoint: it is an error, also without an index, and so is what can not be found any more.
func TestADamagedVersionOfAKeptPoint(t *testing.T) {
	r := newRig(t, Options{})
	for b := range int64(8) {
		require.NoError(t, r.write(100+2*b, byte(0x40+b)))
	}
	m := r.mark("p", true)
	for b := range int64(8) {
		require.NoError(t, r.write(100+2*b, byte(0x60+b)))
	}
	for range 2 {
		r.fillUp(100)
		r.expireAll()
	}
	for b := range int64(8) {
		r.reads(m.LSN, 100+2*b, byte(0x40+b))
	}
	r.flip("orig", bytes.Repeat([]byte{0x41}, 100))
	check := func() {
		t.Helper()
		failed := 0
		for b := range int64(8) {
			got, err := r.at(m.LSN, 100+2*b)
			if err != nil {
				failed++
				continue
			}
			require.Equal(t, byte(0x40+b), got)
		}
		require.Positive(t, failed)
	}
	check()
	require.NoError(t, r.s.Close())
	require.NoError(t, r.mem.RemoveAll("state/index"))
	r.open()
	r.failed()
	check()
}

// TestTheNewestListIsLost: its header was zeroed. The one before it does not count in its stead: what it names may be gone.
func TestTheNewestListIsLost(t *testing.T) {
	r := newRig(t, Options{})
	p := r.mark("p", true)
	r.fillUp(100)
	r.expireAll()
	_, err := r.g.Unpin("p")
	require.NoError(t, err)
	r.mark("q", true)
	r.fillUp(100)
	r.expireAll()
	require.Len(t, r.g.KeptPoints(), 1)
	var in *segment.File
	var at int64
	for _, f := range r.g.set.Files(segment.Originals) {
		_, err := f.Scan(f.Start(), func(off int64, h record.Header) error {
			if h.Kind == record.KindKept {
				in, at = f, off
			}
			return nil
		})
		require.NoError(t, err)
	}
	vf, err := r.mem.OpenReadWrite(in.Path, vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	_, err = vf.WriteAt(make([]byte, record.HeaderSize), at)
	require.NoError(t, errors.Join(err, vf.Close()))
	r.loseIndex()
	r.failed()
	require.NotContains(t, r.g.keptLSNs(), p.LSN)
	_, err = r.g.View(r.g.Disks()[0], p.LSN)
	require.ErrorIs(t, err, ErrNoPoint)
}

// tenPoints is a rig with a large file of originals that ten pinned points need, of which two stay pinned.
func tenPoints(t *testing.T) *rig {
	r := newRig(t, Options{SegmentSize: 32 << 20})
	for p := range 10 {
		for b := range int64(500) {
			require.NoError(t, r.write(b, byte(10*p+10)))
		}
		r.mark(fmt.Sprint("p", p), true)
	}
	for b := range int64(500) {
		require.NoError(t, r.write(b, 0xff))
	}
	require.NoError(t, r.g.Apply())
	r.expireAll()
	require.NoError(t, r.g.closeOriginals(0))
	for p := range 10 {
		if p != 2 && p != 9 {
			_, err := r.g.Unpin(fmt.Sprint("p", p))
			require.NoError(t, err)
		}
	}
	did, err := r.g.Thin()
	require.NoError(t, err)
	require.True(t, did)
	return r
}

// TestACleanThatIsStopped again and again copies nothing twice.
func TestACleanThatIsStopped(t *testing.T) {
	r := tenPoints(t)
	for range 20 {
		n := 0
		_, err := r.g.clean(cleanShare, func() error {
			if n++; n == 3 {
				return errorfs.ErrInjected
			}
			return nil
		})
		require.ErrorIs(t, err, errorfs.ErrInjected)
	}
	require.NoError(t, r.g.closeOriginals(0))
	freed, err := r.g.Clean()
	require.NoError(t, err)
	require.Positive(t, freed)
	var originals int64
	for _, f := range r.g.set.Files(segment.Originals) {
		if f != r.g.apply.orig.Current() {
			originals += f.Alloc()
		}
	}
	require.Less(t, originals, int64(12<<20), "two points of 2 MiB each")
	for p, label := range []string{2: "p2", 9: "p9"} {
		if label != "" {
			lsn, err := r.g.Resolve(record.Point{Form: record.FormLabel, Label: label})
			require.NoError(t, err)
			r.reads(lsn, 7, byte(10*p+10))
		}
	}
}

// TestACleanMeetsDamage: the file stays, others are cleaned, and nothing is copied again and again.
func TestACleanMeetsDamage(t *testing.T) {
	r := tenPoints(t)
	r.flip("originals", bytes.Repeat([]byte{100}, 100)) // of p9
	size := r.g.set.Size()
	for range 10 {
		require.NoError(t, r.g.closeOriginals(0))
		_, err := r.g.Clean()
		require.NoError(t, err)
	}
	require.LessOrEqual(t, r.g.set.Size(), size+2*r.g.o.SegmentSize)
}

// TestACleanMeetsZeroes: where a header was, and originals stand behind: the file is not taken for one that ends there.
func TestACleanMeetsZeroes(t *testing.T) {
	r := tenPoints(t)
	lsn, err := r.g.Resolve(record.Point{Form: record.FormLabel, Label: "p9"})
	require.NoError(t, err)
	f := r.g.set.Files(segment.Originals)[0]
	vf, err := r.mem.OpenReadWrite(f.Path, vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	_, err = vf.WriteAt(make([]byte, record.HeaderSize), f.Start())
	require.NoError(t, errors.Join(err, vf.Close()))
	_, err = r.g.Clean()
	require.NoError(t, err)
	for b := range int64(500) {
		r.reads(lsn, b, 100)
	}
}

// TestRoomEndsInAnExtent: a part of it was kept, and is not taken for one that has ended when the rest is.
func TestRoomEndsInAnExtent(t *testing.T) {
	for room := int64(200); room < 500; room += 40 {
		r := newRig(t, Options{Reserve: 64 << 10, SegmentSize: 256 << 10})
		require.NoError(t, r.s.Close())
		fs := freeFS{r.fs, &atomic.Int64{}}
		fs.free.Store(64 << 20)
		r.fs = fs
		r.open()
		m := r.mark("p", true)
		r.fillUp(60)
		r.expireAll()
		for b := int64(100); b < 300; b += 100 {
			require.NoError(t, r.g.Append([]Op{{Kind: record.KindWrite, Disk: r.g.Disks()[0],
				Ext: record.Extent{Off: b * record.BlockSize, Len: 50 * record.BlockSize}, Data: bytes.Repeat([]byte{7}, 50*record.BlockSize)}}))
		}
		lsn := r.g.Head()
		require.NoError(t, r.g.Index())
		for full := room; ; full = 4000 {
			fs.free.Store(smallFS{FS: r.fs}.used("state") + r.g.o.keepApply() + full<<10)
			err := r.g.Apply()
			if err == nil {
				break
			}
			require.ErrorIs(t, err, ErrNoSpace)
			fs.free.Store(smallFS{FS: r.fs}.used("state") + 2000<<10)
			_, err = r.g.Expire(1) // what is kept by then is committed
			require.NoError(t, err)
		}
		for b := int64(100); b < 300; b += 100 {
			for i := range int64(50) {
				r.reads(lsn, b+i, 7)
				r.reads(lsn-2, b+i, 0xb0)
				r.reads(m.LSN, b+i, 0xb0)
			}
		}
		fs.free.Store(64 << 20)
		m = r.mark("p2", true)
		for b := int64(200); b < 250; b++ {
			require.NoError(t, r.write(b, 9))
		}
		r.fillUp(60)
		r.expireAll()
		for b := int64(200); b < 250; b++ {
			r.reads(m.LSN, b, 7)
		}
	}
}

// TestARewindOfWhatBecameOfKeptMarkers: what records behind the LSN did to them never happened.
func TestARewindOfWhatBecameOfKeptMarkers(t *testing.T) {
	p := newPair(t)
	m, err := p.g.Mark(record.Marker{Label: "k", By: "test", Pinned: true})
	require.NoError(t, err)
	for i := range 100 {
		require.NoError(t, p.write(int64(i%5), byte(i)))
	}
	p.ship()
	f := p.to
	require.NoError(t, f.g.Apply())
	f.expireAll()
	require.True(t, f.g.isKept(m.LSN))
	to := f.g.Head()
	_, err = f.g.Lead(2)
	require.NoError(t, err)
	_, err = f.g.Unpin("k")
	require.NoError(t, err)
	require.NoError(t, f.g.Follow())
	require.NoError(t, f.s.Rewind("g", to))
	f.g, err = f.s.Group("g")
	require.NoError(t, err)
	_, err = f.g.Thin()
	require.NoError(t, err)
	require.True(t, f.g.isKept(m.LSN), "its writer has it pinned")
}

// fullOfPoints is a rig whose kept points are all that can go.
func fullOfPoints(t *testing.T) *keptRig {
	r := newKeptRig(t, 1, retain.Policy{Tiers: []retain.Tier{{Every: time.Second, For: 10 * time.Hour}}})
	for i := range 100 {
		r.clock.at.Add(int64(300 * time.Millisecond))
		require.NoError(t, r.write(int64(i%40), byte(i)))
	}
	require.NoError(t, r.g.Apply())
	r.expireAll()
	return r
}

// TestPointsAreLetGoOfWithoutRoom to note that: they stay.
func TestPointsAreLetGoOfWithoutRoom(t *testing.T) {
	r := fullOfPoints(t)
	require.NoError(t, r.s.Close())
	r.open() // no file of originals is open
	was := r.g.keptLSNs()
	r.inject(errorfs.OpCreate, "originals", syscall.ENOSPC)
	for range 3 {
		_, err := r.g.giveUp()
		require.ErrorIs(t, err, segment.ErrFull)
	}
	require.Equal(t, was, r.g.keptLSNs())
	r.fault.Store(nil)
	require.NoError(t, r.write(300, 0x99))
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.s.Close())
	r.open()
	r.reads(was[0], 300, 0xb0)
	require.Equal(t, was, r.g.keptLSNs())
}

// TestPointsInUseAreNotGivenUp: a full journal ends, and says so.
func TestPointsInUseAreNotGivenUp(t *testing.T) {
	r := fullOfPoints(t)
	all := r.g.KeptPoints()
	for _, k := range all {
		v, err := r.g.View(r.g.Disks()[0], k.LSN)
		require.NoError(t, err)
		defer v.Close()
	}
	did, err := r.g.giveUp()
	require.NoError(t, err)
	require.False(t, did)
	_, err = r.g.expireForSpace()
	require.NoError(t, err)
	require.Equal(t, all, r.g.KeptPoints())
}

// TestAReaderOfAllHistoryCostsNoPoint: while it holds the window, nothing else goes in its stead.
func TestAReaderOfAllHistoryCostsNoPoint(t *testing.T) {
	r := fullOfPoints(t)
	r.fillUp(100)
	was := r.g.keptLSNs()
	from := r.g.pinAll()
	defer r.g.unpinFrom(from)
	_, err := r.g.expireForSpace()
	require.NoError(t, err)
	require.Equal(t, was, r.g.keptLSNs())
}

// TestAnOriginalWithoutAnEnd: one of an older format, of a block that was overwritten twice, ends with the first.
func TestAnOriginalWithoutAnEnd(t *testing.T) {
	r := newRig(t, Options{})
	m := r.mark("p", true)
	require.NoError(t, r.write(100, 0x12))
	require.NoError(t, r.write(100, 0x15))
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.g.Index())
	b := r.g.ix.NewBatch()
	require.NoError(t, r.g.ix.Versions(func(e index.Entry) (bool, error) {
		if e.Until != 0 {
			e.Until = 0
			b.Set([]index.Entry{e})
		}
		return true, nil
	}))
	r.g.apply.Lock()
	require.NoError(t, r.g.commit(b))
	r.g.apply.Unlock()
	r.fillUp(100)
	r.expireAll()
	r.reads(m.LSN, 100, 0xb0)
	r.reads(r.g.Horizon(), 100, 0x15)
}

// TestTheTotalOfAllGroups: the oldest history of the largest goes.
func TestTheTotalOfAllGroups(t *testing.T) {
	r := newRig(t, Options{Total: 600 << 10})
	r.scribble("other.raw", 0, bytes.Repeat([]byte{1}, 8*record.BlockSize))
	require.NoError(t, r.s.AddGroup(GroupConfig{Name: "small", Disks: []DiskConfig{{"d", "other.raw"}}}))
	small, err := r.s.Group("small")
	require.NoError(t, err)
	require.NoError(t, writeTo(small, small.Disks()[0], 0, 1))
	require.NoError(t, small.Apply())
	for range 20 {
		r.fillUp(50)
		require.NoError(t, due(r.g))
		require.NoError(t, due(small))
	}
	require.Positive(t, r.g.Horizon())
	require.Zero(t, small.Horizon())
	require.LessOrEqual(t, r.g.JournalBytes()+small.JournalBytes(), int64(800<<10))
}

// TestAFileOfOriginalsThatWasBegunForACleanIsDurable: the index names it with the next commit, and a crash after that must not take its head.
func TestAFileOfOriginalsThatWasBegunForACleanIsDurable(t *testing.T) {
	r := aged(t)
	for range 20 {
		_, err := r.g.Expire(1 << 40)
		require.NoError(t, err)
	}
	was := r.g.apply.orig.Current()
	require.NoError(t, r.g.closeOriginals(0))
	require.NotSame(t, was, r.g.apply.orig.Current(), "none was begun")
	require.NoError(t, r.write(0, 7))
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.g.Checkpoint())
	r.mem = r.mem.CrashClone(vfs.CrashCloneCfg{})
	require.NoError(t, r.s.Abandon())
	r.fs = r.mem
	r.open()
	state, why := r.g.State()
	require.Equal(t, "active", state, "%v", why)
}

// TestAPinBesideAnExpiryWithoutRoom may come between what may go and what of it finds room.
func TestAPinBesideAnExpiryWithoutRoom(t *testing.T) {
	r := newRig(t, Options{})
	for i := range int64(60) {
		require.NoError(t, r.write(i%40, byte(i)))
	}
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.g.Checkpoint())
	r.inject(errorfs.OpCreate, "", syscall.ENOSPC)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			r.g.unpinFrom(r.g.pinAll())
		}
	})
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		if _, err := r.g.Expire(1); err != nil {
			require.ErrorIs(t, err, segment.ErrFull)
		}
	}
	cancel()
	wg.Wait()
	require.Zero(t, r.g.Horizon())
}
