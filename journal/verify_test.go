package journal

import (
	"errors"
	"flag"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// verified are the findings of a verification.
func (r *rig) verified(o VerifyOptions) (found []Finding, done Verified) {
	r.t.Helper()
	done, err := r.g.Verify(r.t.Context(), o, func(f Finding) { found = append(found, f) })
	require.NoError(r.t, err)
	require.EqualValues(r.t, len(found), done.Findings)
	return found, done
}

// aged is a rig with a history: kept points, originals, a window, records of every kind and length.
func aged(t *testing.T) *keptRig {
	r := newKeptRig(t, 77, retain.Policy{EveryWrite: time.Minute, Tiers: []retain.Tier{{Every: 5 * time.Second, For: time.Hour}}})
	for range 150 {
		r.step()
	}
	// Large enough for units of more than a block.
	for _, first := range []int64{0, 64, 256} {
		n := int64(48)
		data := make([]byte, n*record.BlockSize)
		for i := range data {
			data[i] = byte(first + 3)
		}
		require.NoError(t, r.g.Append([]Op{{Kind: record.KindWrite, Disk: r.g.Disks()[0], Ext: record.Extent{Off: first * record.BlockSize, Len: n * record.BlockSize}, Data: data}}))
		r.record(0, first, n, byte(first+3))
	}
	require.NoError(t, r.g.Apply())
	_, err := r.g.Expire(256 << 10)
	require.NoError(t, err)
	for range 40 {
		r.step()
	}
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.g.Apply())
	require.NotEmpty(t, r.g.KeptPoints())
	require.NotEmpty(t, r.g.set.Files(segment.Originals))
	return r
}

// flipBit flips a bit of a file.
func (r *rig) flipBit(path string, bit int64) {
	r.t.Helper()
	f, err := r.mem.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	require.NoError(r.t, err)
	var b [1]byte
	_, err = f.ReadAt(b[:], bit/8)
	require.NoError(r.t, err)
	b[0] ^= 1 << (bit % 8)
	_, err = f.WriteAt(b[:], bit/8)
	require.NoError(r.t, errors.Join(err, f.Close()))
}

var flipsFlag = flag.Int("verify.flips", 5, "bits to flip in each file")

// TestVerifyFindsEveryFlippedBit: thousands of bits of segments, each alone: it is found, its file is named, and views are errors there and right elsewhere.
func TestVerifyFindsEveryFlippedBit(t *testing.T) {
	r := aged(t)
	found, done := r.verified(VerifyOptions{})
	require.Empty(t, found)
	require.Positive(t, done.Blocks)
	refused := 0
	check := func() {
		lsn := r.g.KeptPoints()[r.rng.IntN(len(r.g.KeptPoints()))].LSN
		if r.rng.IntN(3) > 0 {
			lsn = r.g.expiredTo() + record.LSN(r.rng.Uint64N(uint64(r.g.Head()-r.g.expiredTo())+1))
		}
		v, err := r.g.View(r.g.Disks()[0], lsn)
		require.NoError(t, err)
		defer v.Close()
		b := make([]byte, record.BlockSize)
		for block := range int64(rigBlocks) {
			if err := v.ReadAt(b, block*record.BlockSize, false); err != nil {
				require.ErrorIs(t, err, record.ErrCorrupt)
				refused++
				continue
			}
			want := r.past[lsn-1].fill[block]
			require.True(t, b[0] == want && b[len(b)-1] == want, "block %d at LSN %d", block, lsn)
		}
	}
	flipped, compact := 0, 0
	flips := func(f *segment.File) {
		end, err := f.Scan(f.Start(), func(int64, record.Header) error { return nil })
		require.NoError(t, err)
		var heads []int64 // of records
		_, err = f.Scan(f.Start(), func(off int64, h record.Header) error {
			heads = append(heads, off)
			return nil
		})
		require.NoError(t, err)
		switch mark := r.g.index.mark; {
		case f.IsCompact():
			end, heads, compact = f.Alloc(), nil, compact+1
		case f.Kind == segment.Originals && f.Number == mark.OrigFile:
			end = int64(mark.OrigOff) // behind it, they may be half written
			heads = slices.DeleteFunc(heads, func(off int64) bool { return off >= end })
		}
		for i := range *flipsFlag {
			bit := r.rng.Int64N(end * 8)
			if i%3 == 0 && len(heads) > 0 {
				bit = heads[r.rng.IntN(len(heads))]*8 + r.rng.Int64N(record.HeaderSize*8)
			}
			r.flipBit(f.Path, bit)
			found, _ := r.verified(VerifyOptions{})
			require.True(t, slices.ContainsFunc(found, func(x Finding) bool { return strings.HasPrefix(x.Where, f.Path) }), "byte %d of %s, which ends at %d: found %v", bit/8, f.Path, end, found)
			check()
			r.flipBit(f.Path, bit)
			flipped++
		}
	}
	all := func() {
		for _, f := range slices.Concat(r.g.set.Files(segment.Log), r.g.set.Files(segment.Originals)) {
			if f.Kind == segment.Originals || f.First > r.g.expiredTo() {
				flips(f)
			}
		}
	}
	all()
	require.NoError(t, r.g.Checkpoint())
	_, err := r.g.Compact()
	require.NoError(t, err)
	all()
	require.Positive(t, compact)
	found, _ = r.verified(VerifyOptions{})
	require.Empty(t, found)
	require.Greater(t, flipped, 20**flipsFlag)
	require.Positive(t, refused)
}

// TestVerifyComparesIndexAndRecords: what the index has too little, too much, or wrong is found, and it alone.
func TestVerifyComparesIndexAndRecords(t *testing.T) {
	r := aged(t)
	var all []index.Entry
	require.NoError(t, r.g.ix.Versions(func(e index.Entry) (bool, error) {
		all = append(all, e)
		return true, nil
	}))
	put := func(remove []index.Entry, set ...index.Entry) {
		b := r.g.ix.NewBatch()
		for _, e := range remove {
			b.Delete(e.Disk, e.Unit, e.LSN)
		}
		b.Set(set)
		r.g.index.Lock()
		defer r.g.index.Unlock()
		require.NoError(t, b.Commit(r.g.index.mark))
	}
	tried := map[string]int{}
	for _, i := range r.rng.Perm(len(all))[:200] {
		e := all[i]
		what := "log"
		if e.Until != 0 {
			what = "original"
		}
		if e.Zero {
			what += " of zeroes"
		}
		try := func(how string, remove []index.Entry, set ...index.Entry) {
			put(remove, set...)
			found, _ := r.verified(VerifyOptions{})
			require.NotEmpty(t, found, "%s of %s: %+v", how, what, e)
			tried[what+", "+how]++
			put(set, remove...)
			put(nil, e)
		}
		if what == "original of zeroes" {
			continue // whether one is needed, its file does not say
		}
		needless := e.Until != 0 && e.Until <= r.g.expiredTo() && !retain.Lives(r.g.allPoints(), e.LSN, e.Until)
		if !needless {
			try("lost", []index.Entry{e})
		}
		if !e.Zero {
			other := e
			other.Payload += 8
			try("elsewhere", nil, other)
		}
		if e.Until == 0 {
			other := e
			other.Unit.Index += 600
			try("too many", nil, other)
			other = e
			other.Until = e.LSN + 1
			try("ended", nil, other)
		}
	}
	for _, must := range []string{"log, lost", "log, elsewhere", "log, too many", "original, lost", "original, elsewhere", "log of zeroes, lost", "log, ended"} {
		require.Positive(t, tried[must], "%s: %v", must, tried)
	}
	found, _ := r.verified(VerifyOptions{})
	require.Empty(t, found)
}

// TestVerifyFindsABacking: a block of the backing is other than what the journal left there.
func TestVerifyFindsABacking(t *testing.T) {
	r := aged(t)
	d := r.g.Disks()[0]
	want := make([]byte, d.Size)
	require.NoError(t, d.ReadAt(want, 0, false))
	f, err := r.mem.OpenReadWrite("disk.raw", vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	// Where the journal has no version in the window, it knows no checksum.
	var known []int64
	reader, err := r.g.ix.FreshReader()
	require.NoError(t, err)
	for block := range int64(rigBlocks) {
		var p [1]index.Pick
		require.NoError(t, reader.Find(d.ID, block, record.MaxLSN, p[:]))
		if p[0].Found {
			known = append(known, block)
		}
	}
	reader.Close()
	require.Greater(t, len(known), 20)
	for _, i := range []int{0, 7, len(known) - 1} {
		_, err = f.WriteAt([]byte{want[known[i]*record.BlockSize] ^ 9}, known[i]*record.BlockSize)
		require.NoError(t, err)
	}
	found, _ := r.verified(VerifyOptions{})
	require.Len(t, found, 3)
	require.Contains(t, found[0].Where, "disk.raw of disk g/d")
	for _, i := range []int{0, 7, len(known) - 1} {
		_, err = f.WriteAt(want[known[i]*record.BlockSize:][:1], known[i]*record.BlockSize)
		require.NoError(t, err)
	}
	require.NoError(t, f.Close())
	found, _ = r.verified(VerifyOptions{})
	require.Empty(t, found)
}

// TestVerifyEndsWithItsGroup: what a group that is closed, or taken back, has is no damage.
func TestVerifyEndsWithItsGroup(t *testing.T) {
	r := aged(t)
	closed := false
	_, err := r.g.Verify(t.Context(), VerifyOptions{Pause: func(int64) error {
		if !closed {
			closed = true
			require.NoError(t, r.s.RemoveGroup("g"))
		}
		return nil
	}}, func(f Finding) { t.Errorf("%+v", f) })
	require.ErrorIs(t, err, os.ErrClosed)
	require.True(t, closed)
}

// TestVerifyLetsFilesGo: a file that expires in a pause is not held, and what is gone of it is no damage.
func TestVerifyLetsFilesGo(t *testing.T) {
	r := aged(t)
	oldest := r.g.set.Files(segment.Log)[0]
	for _, f := range r.g.set.Files(segment.Log) {
		if f.First > r.g.expiredTo() {
			oldest = f
			break
		}
	}
	_, err := r.g.Verify(t.Context(), VerifyOptions{Pause: func(int64) error {
		_, err := r.g.Expire(1 << 20)
		require.NoError(t, err)
		if _, err := r.g.set.Acquire(oldest.Number); err != nil {
			require.ErrorIs(t, err, segment.ErrGone)
			require.Panics(t, func() { _ = oldest.ReadAt(make([]byte, 1), 0, false) }, "it is closed: nobody holds it")
		}
		return nil
	}}, func(f Finding) { t.Errorf("%+v", f) })
	require.NoError(t, err)
	_, err = r.g.set.Acquire(oldest.Number)
	require.ErrorIs(t, err, segment.ErrGone)
}

// TestVerifyPauses: behind so much, and no more; what its pause returns ends it.
func TestVerifyPauses(t *testing.T) {
	r := aged(t)
	var bytes int64
	_, done := r.verified(VerifyOptions{Pause: func(n int64) error {
		require.Less(t, n, int64(2*verifyStep))
		bytes += n
		return nil
	}})
	require.Positive(t, bytes)
	require.Greater(t, bytes+verifyStep, done.Bytes, "the rest came behind the last pause")
	_, err := r.g.Verify(t.Context(), VerifyOptions{Pause: func(int64) error { return io.ErrNoProgress }}, func(Finding) {})
	require.ErrorIs(t, err, io.ErrNoProgress)
}
