package journal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// blockOf is the block that the record with an LSN writes.
func blockOf(lsn record.LSN) int64 { return int64((uint64(lsn) * 0x9e3779b97f4a7c15) >> 58) } // 64 blocks

// newestAt is the LSN of the newest write of a block at or below lsn; 0: none.
func newestAt(lsn record.LSN, block int64) record.LSN {
	for lsn > 0 && blockOf(lsn) != block {
		lsn--
	}
	return lsn
}

// TestReadersBesideEverything lets one writer, live readers, viewers, an
// applier and an expirer run at once: no reader sees anything but what its point says.
func TestReadersBesideEverything(t *testing.T) {
	r := newRig(t, Options{Limit: 3 << 20})
	d := r.g.Disks()[0]
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { require.NoError(t, r.s.Run(ctx)) })
	loop := func(fn func(rng *rand.Rand)) {
		seed := rand.Uint64()
		wg.Go(func() {
			for rng := rand.New(rand.NewPCG(seed, 3)); ctx.Err() == nil && !t.Failed(); {
				fn(rng)
			}
		})
	}
	var views atomic.Int64
	for range 3 {
		loop(func(rng *rand.Rand) {
			horizon, head := r.g.Horizon(), r.g.Head()
			lsn := horizon + record.LSN(rng.Uint64N(uint64(head-horizon)+1))
			v, err := r.g.View(d, lsn)
			if errors.Is(err, ErrNoPoint) {
				return // expired meanwhile
			}
			require.NoError(t, err)
			defer v.Close()
			views.Add(1)
			buf := make([]byte, 64*record.BlockSize)
			require.NoError(t, v.ReadAt(buf, 0, false))
			for block := range int64(64) {
				checkBlock(t, buf[block*record.BlockSize:], newestAt(lsn, block), "view at %d of block %d", lsn, block)
			}
			block := rng.Int64N(64)
			require.NoError(t, v.ReadAt(buf[:record.BlockSize], block*record.BlockSize, false))
			checkBlock(t, buf, newestAt(lsn, block), "view at %d of block %d alone", lsn, block)
			require.NoError(t, v.Extents(record.Extent{Len: d.Size}, func(int64, bool) {}))
		})
	}
	loop(func(rng *rand.Rand) {
		before := r.g.Head()
		block := rng.Int64N(64)
		buf := make([]byte, record.BlockSize)
		require.NoError(t, d.ReadAt(buf, block*record.BlockSize, false))
		got := record.LSN(binary.LittleEndian.Uint64(buf))
		if newest := newestAt(before, block); newest > 0 {
			require.GreaterOrEqual(t, got, newest, "a live read missed a write that was there before it")
			require.Equal(t, block, blockOf(got))
		}
	})
	loop(func(*rand.Rand) { require.NoError(t, r.g.Apply()) })
	var verified atomic.Int64
	loop(func(*rand.Rand) {
		_, err := r.g.Verify(ctx, VerifyOptions{}, func(f Finding) { t.Errorf("%+v", f) })
		if ctx.Err() == nil {
			require.NoError(t, err)
			verified.Add(1)
		}
	})
	var compacted atomic.Int64
	loop(func(*rand.Rand) {
		n, err := r.g.Compact()
		require.NoError(t, err)
		compacted.Add(n)
		time.Sleep(time.Millisecond)
	})
	loop(func(*rand.Rand) {
		if r.g.JournalBytes() > 2<<20 {
			_, err := r.g.Expire(256 << 10)
			if err != nil {
				require.ErrorIs(t, err, errNeeded)
			}
		}
	})
	buf := make([]byte, record.BlockSize)
	enough := func() bool {
		return r.g.Horizon() > 0 && views.Load() > 50 && verified.Load() > 0 && compacted.Load() > 0
	}
	least, most := time.Now().Add(3*time.Second), time.Now().Add(time.Minute) // a slow host takes longer
	for now := time.Now(); (now.Before(least) || !enough() && now.Before(most)) && !t.Failed(); now = time.Now() {
		lsn := r.g.Head() + 1
		binary.LittleEndian.PutUint64(buf, uint64(lsn))
		require.NoError(t, r.g.Append([]Op{{Kind: record.KindWrite, Disk: d,
			Ext: record.Extent{Off: blockOf(lsn) * record.BlockSize, Len: record.BlockSize}, Data: buf}}))
		if lsn%64 == 0 {
			require.NoError(t, r.g.Sync())
		}
	}
	cancel()
	wg.Wait()
	require.Positive(t, r.g.Horizon(), "nothing expired: the test did not test")
	require.Greater(t, views.Load(), int64(50))
	require.Positive(t, verified.Load())
	require.Positive(t, compacted.Load())
}

func checkBlock(t *testing.T, b []byte, want record.LSN, format string, args ...any) {
	t.Helper()
	got := record.LSN(binary.LittleEndian.Uint64(b))
	if want == 0 {
		want = 0xb0b0b0b0b0b0b0b0 // as the rig made the disk
	}
	require.Equal(t, want, got, append([]any{format}, args...)...)
}

// TestAMarkerIsOneCutUnderLoad: on each of three pairs of disks a writer writes a number to the first, waits for the
// answer, and writes it to the second. At every marker the second is what the first is, or one behind.
func TestAMarkerIsOneCutUnderLoad(t *testing.T) {
	r := newRig(t, Options{})
	const pairs = 3
	var disks [][2]*disk.Disk
	for i := range pairs {
		var pair [2]*disk.Disk
		for k := range pair {
			name := fmt.Sprintf("p%d%d", i, k)
			r.scribble(name, 0, make([]byte, 8*record.BlockSize))
			require.NoError(t, r.g.AddDisk(DiskConfig{name, name}))
			d, err := r.g.Disk(name)
			require.NoError(t, err)
			pair[k] = d
		}
		disks = append(disks, pair)
	}
	var marked []record.Marker
	r.running(func() error {
		ctx, cancel := context.WithCancel(context.Background())
		eg, ctx := errgroup.WithContext(ctx)
		var written atomic.Int64
		for _, pair := range disks {
			eg.Go(func() error {
				for n := uint64(1); ctx.Err() == nil; n++ {
					for _, d := range pair {
						data := binary.LittleEndian.AppendUint64(make([]byte, 0, record.BlockSize), n)[:record.BlockSize]
						if err := r.g.Append([]Op{{Kind: record.KindWrite, Disk: d, Ext: record.Extent{Len: record.BlockSize}, Data: data}}); err != nil {
							return err
						}
						written.Add(1)
					}
				}
				return nil
			})
		}
		var err error
		for i := 0; i < 50 && err == nil; i++ {
			for was := written.Load(); written.Load() == was && ctx.Err() == nil; {
				runtime.Gosched() // something is written between two markers, however busy the host
			}
			var m record.Marker
			m, err = r.g.Mark(record.Marker{Label: fmt.Sprint("m", i), By: "test"})
			marked = append(marked, m)
		}
		cancel()
		return errors.Join(err, eg.Wait())
	})
	moved := false
	for _, m := range marked {
		for _, pair := range disks {
			var n [2]uint64
			for k, d := range pair {
				v, err := r.g.View(d, m.LSN)
				require.NoError(t, err)
				b := make([]byte, 8)
				require.NoError(t, v.ReadAt(b, 0, false))
				v.Close()
				n[k] = binary.LittleEndian.Uint64(b)
			}
			require.LessOrEqual(t, n[1], n[0], "marker %s", m.Label)
			require.LessOrEqual(t, n[0]-n[1], uint64(1), "marker %s", m.Label)
			moved = moved || n[1] > 1
		}
	}
	require.True(t, moved, "nothing was written meanwhile")
}
