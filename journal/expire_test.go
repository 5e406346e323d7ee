package journal

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// TestAnExpiryThatRemovedSomeFiles was cut off between them, and then the index was lost: what it carried over counts.
func TestAnExpiryThatRemovedSomeFiles(t *testing.T) {
	for spare := range int32(5) {
		t.Run(fmt.Sprint(spare), func(t *testing.T) {
			r := newRig(t, Options{})
			_, err := r.g.Define("vm", []byte("<domain/>"))
			require.NoError(t, err)
			require.NoError(t, r.write(100, 0x77)) // LSN 2
			for i := int64(3); i <= 100; i++ {
				require.NoError(t, r.write(i%5, byte(i)))
			}
			require.NoError(t, r.write(100, 0x78)) // LSN 101
			for i := int64(102); i <= 200; i++ {
				require.NoError(t, r.write(i%5, byte(i)))
			}
			require.NoError(t, r.g.Apply())
			r.inject(errorfs.OpRemove, "/log", errorfs.ErrInjected).spare.Store(spare)
			_, err = r.g.Expire(5 * 64 << 10)
			require.ErrorIs(t, err, errorfs.ErrInjected)
			horizon := r.g.Horizon()
			r.fault.Store(nil)
			require.NoError(t, r.s.Abandon())
			require.NoError(t, r.mem.RemoveAll("state/index"))
			for range 2 {
				r.open()
				require.Equal(t, horizon, r.g.Horizon())
				require.GreaterOrEqual(t, r.g.Applied(), horizon)
				defs, err := r.g.Definitions(r.g.Horizon())
				require.NoError(t, err)
				require.Len(t, defs, 1)
				for lsn := r.g.Horizon(); lsn <= 200; lsn++ {
					want := byte(0x77)
					if lsn >= 101 {
						want = 0x78
					}
					got, err := r.at(lsn, 100)
					require.NoError(t, err)
					require.Equal(t, want, got, "at %d", lsn)
				}
				require.NoError(t, r.s.Close())
			}
			r.open()
		})
	}
}

// TestAFailedBeginning leaves nothing to the group that comes after it.
func TestAFailedBeginning(t *testing.T) {
	r := newRig(t, Options{})
	for _, name := range []string{"f.raw", "o.raw"} {
		r.scribble(name, 0, bytes.Repeat([]byte{1}, 8*record.BlockSize))
	}
	begin := &record.Beginning{
		At: 9, Time: 1, Reigns: record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{1}}}, Disks: []record.Disk{{ID: 1, Name: "d", Size: 8 * record.BlockSize}},
		Definitions: []record.Definition{{Name: "vm", Since: 3, Content: []byte("another host's")}},
	}
	r.inject(errorfs.OpRename, "f/log", errorfs.ErrInjected)
	require.ErrorIs(t, r.s.AddGroup(GroupConfig{Name: "f", Disks: []DiskConfig{{"d", "f.raw"}}, Begin: begin}), errorfs.ErrInjected)
	r.fault.Store(nil)
	require.NoError(t, r.s.AddGroup(GroupConfig{Name: "o", Disks: []DiskConfig{{"d", "o.raw"}}}))
	o, err := r.s.Group("o")
	require.NoError(t, err)
	require.Zero(t, o.Head())
	defs, err := o.Definitions(0)
	require.NoError(t, err)
	require.Empty(t, defs)
	begin.At = 20
	require.NoError(t, r.s.AddGroup(GroupConfig{Name: "f", Disks: []DiskConfig{{"d", "f.raw"}}, Begin: begin}))
	f, err := r.s.Group("f")
	require.NoError(t, err)
	require.EqualValues(t, 20, f.Head())
	defs, err = f.Definitions(20)
	require.NoError(t, err)
	require.Len(t, defs, 1)
}

// TestAnExpiryOfAllThatMayGoIsOfWhatIsInTheBackingsDurably: without room to copy what views need of the oldest files, newer ones go too, and those may have been applied since the last checkpoint.
func TestAnExpiryOfAllThatMayGoIsOfWhatIsInTheBackingsDurably(t *testing.T) {
	r, fs := newFreeRig(t, Options{Reserve: 64 << 10, SegmentSize: 128 << 10}, 64<<20)
	for round := range 2 {
		for b := range int64(20) {
			require.NoError(t, r.write(b, byte(10+round)))
		}
		require.NoError(t, r.g.closeLog())
		require.NoError(t, r.g.Apply())
		if round == 0 {
			require.NoError(t, r.g.Checkpoint())
		}
	}
	require.Less(t, r.g.checkpointed.Load(), uint64(r.g.Applied()))
	fs.free.Store(smallFS{FS: r.fs}.used("state") + r.g.o.keepExpire() + 40<<10) // a note fits, and 20 blocks do not
	_, err := r.g.Expire(1)
	require.NoError(t, err)
	require.Equal(t, r.g.Head(), r.g.Horizon(), "all went")
	r.mem = r.mem.CrashClone(vfs.CrashCloneCfg{})
	require.NoError(t, r.s.Abandon())
	fs.FS, fs.free = r.mem, &atomic.Int64{}
	fs.free.Store(64 << 20)
	r.fs = fs
	r.open()
	for b := range int64(20) {
		require.Equal(t, byte(11), r.live(b), "block %d", b)
	}
}

// TestTheNumberOfARemovedFileOfOriginals is not given to another one, though it was the highest: the index knows what of it was indexed.
func TestTheNumberOfARemovedFileOfOriginals(t *testing.T) {
	r := newRig(t, Options{SegmentSize: 1 << 20})
	for i := range int64(100) {
		require.NoError(t, r.write(i, 1))
	}
	require.NoError(t, r.g.closeLog())
	require.NoError(t, r.g.Apply()) // the originals' file comes after the log's
	require.NoError(t, r.g.Checkpoint())
	require.NoError(t, r.s.Close())
	r.open()
	last := r.g.set.Files(segment.Originals)[0]
	_, err := r.g.Expire(1 << 40)
	require.NoError(t, err)
	require.NotContains(t, r.g.set.Files(segment.Originals), last, "nothing in it is needed")
	require.NoError(t, r.s.Close())
	r.open()

	require.NoError(t, r.write(200, 2)) // LSN 101
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.g.Apply())
	for _, f := range r.g.set.Files(segment.Originals) {
		require.Greater(t, f.Number, last.Number)
	}
	require.NoError(t, r.s.Abandon())
	r.mem = r.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 2))})
	r.fs = r.mem
	r.open()
	got, err := r.at(100, 200)
	require.NoError(t, err)
	require.EqualValues(t, 0xb0, got, "what was there before LSN 101")
}

// TestALogFileHasSoManyVersions, however few bytes its records take: trims have hundreds each, of which an expiry decides at once. A replica's, too.
func TestALogFileHasSoManyVersions(t *testing.T) {
	p := newPair(t)
	for _, r := range []*rig{p.rig, p.to} {
		require.NoError(t, r.s.Close())
		r.o.SegmentSize = 1 << 20
		r.open()
	}
	long := record.Extent{Off: record.BlockSize, Len: (rigBlocks - 2) * record.BlockSize}
	each := versionsOf(long)
	trims := make([]Op, 1000)
	for i := range trims {
		trims[i] = Op{Kind: record.KindTrim, Disk: p.g.Disks()[0], Ext: long}
	}
	most := p.g.o.fileVersions()
	for n := 0; n < 3*most; n += len(trims) * each {
		require.NoError(t, p.g.Append(trims))
		require.NoError(t, p.g.Index())
		p.ship()
	}
	for _, r := range []*rig{p.rig, p.to} {
		files := r.g.set.Files(segment.Log)
		require.GreaterOrEqual(t, len(files), 3)
		require.Less(t, len(files), 8)
		for _, f := range files {
			versions := 0
			_, err := f.Scan(f.Start(), func(_ int64, h record.Header) error {
				versions += versionsOf(h.Extent)
				return nil
			})
			require.NoError(t, err)
			require.LessOrEqual(t, versions, most)
		}
	}
}

// TestARecordOfTooManyVersions is taken all the same.
func TestARecordOfTooManyVersions(t *testing.T) {
	r := newRig(t, Options{})
	most := r.g.o.fileVersions()
	require.True(t, r.g.fitsLocked(0, 64, most+1))
	require.False(t, r.g.fitsLocked(1, 128, most+1))
	require.NoError(t, r.write(0, 1))
	require.False(t, r.g.fitsLocked(0, 64, most))
	require.True(t, r.g.fitsLocked(0, 64, most-1))
}
