package journal

import (
	"bytes"
	"context"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// TestRepair: a damaged record, be it its payload or its header, is again what it was, with what the other daemon has of it; nothing else
// is taken.
func TestRepair(t *testing.T) {
	p := newPair(t)
	for i := range 6 {
		require.NoError(t, p.write(int64(i), byte(i+1)))
	}
	whole := p.run()
	require.EqualValues(t, 6, whole.Last)
	p.ship()
	require.NoError(t, p.to.g.Sync())
	require.NoError(t, p.to.g.Index())
	mended, err := p.to.g.Repair(whole)
	require.NoError(t, err)
	require.Zero(t, mended, "nothing is damaged")

	f := p.to.g.set.Files(segment.Log)[0]
	var at []int64
	_, err = f.Scan(f.Start(), func(off int64, _ record.Header) error {
		at = append(at, off)
		return nil
	})
	require.NoError(t, err)
	path := f.Path
	for name, damage := range map[string][]int64{
		"a payload": {at[2] + 80}, "a header": {at[3] + 10}, "both of one": {at[3] + 10, at[3] + 200}, "two in a row": {at[1] + 9, at[2] + 9}, "the last": {at[5] + 12},
		"bytes behind a payload": {at[3] - 1},
	} {
		t.Run(name, func(t *testing.T) {
			for _, off := range damage {
				p.to.damage(path, off)
			}
			findings := 0
			_, err := p.to.g.Verify(t.Context(), VerifyOptions{}, func(Finding) { findings++ })
			require.NoError(t, err)
			require.Positive(t, findings)
			mended, err := p.to.g.Repair(whole)
			require.NoError(t, err)
			require.Positive(t, mended)
			_, err = p.to.g.Verify(t.Context(), VerifyOptions{}, func(f Finding) { t.Errorf("%+v", f) })
			require.NoError(t, err)
			for i := range 6 {
				b, err := p.to.at(6, int64(i))
				require.NoError(t, err)
				require.EqualValues(t, i+1, b)
			}
		})
	}
	other := whole
	other.Reigns = record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{9}}}
	_, err = p.to.g.Repair(other)
	require.ErrorIs(t, err, ErrDiverged)
	p.to.damage(path, at[2]+80)
	other = whole
	h := record.Header{}
	n := 0
	require.NoError(t, record.Each(whole.Bytes, func(x record.Header, _ []byte) error {
		if n++; n == 3 {
			h = x
		}
		return nil
	}))
	h.Time++
	payload := bytes.Repeat([]byte{7}, h.Payload)
	h.Sums = record.AppendSums(nil, payload)
	other.First, other.Last, other.Bytes = 3, 3, append(h.Append(nil), payload...)
	other.Bytes = append(other.Bytes, make([]byte, int(h.Size())-len(other.Bytes))...)
	_, err = p.to.g.Repair(other)
	require.ErrorIs(t, err, ErrDiverged, "another record is not written over a header that is whole")
}

// has is what another daemon has of what was lost here, as of the last LSN that it may be of.
func (r *keptRig) has(l record.Lost) (record.LostContent, error) {
	c := record.LostContent{At: l.To, Reigns: r.g.Reigns()}
	for block := l.First; block < l.First+int64(l.Blocks); block++ {
		fill := byte(0xb0)
		if l.To > 0 {
			fill = r.past[l.To-1].fill[block]
		}
		c.Bytes = append(c.Bytes, bytes.Repeat([]byte{fill}, record.BlockSize)...)
	}
	return c, nil
}

// spoilOriginals flips a bit in the content of some originals of a file, one after the other, and has what is found mended. It returns how many findings that were.
func (r *keptRig) spoilOriginals(f *segment.File, mend func(Finding)) (mended int) {
	r.t.Helper()
	compact := f.IsCompact()
	var contents []int64
	_, err := f.Scan(f.Start(), func(off int64, h record.Header) error {
		if h.Payload > 0 && before(&r.g.index.mark, f.Number, off) {
			contents = append(contents, off+int64(h.EncodedSize()))
		}
		return nil
	})
	require.NoError(r.t, err)
	for i := 0; i < len(contents) && f.IsCompact() == compact; i += 1 + len(contents)/3 {
		bit := (contents[i] + r.rng.Int64N(record.BlockSize)) * 8
		if compact {
			bit = (f.Alloc() - 1 - r.rng.Int64N(40)) * 8 // they are small, and stand at the end
		}
		r.flipBit(f.Path, bit)
		found, _ := r.verified(VerifyOptions{})
		require.NotEmpty(r.t, found)
		found = slices.DeleteFunc(found, func(x Finding) bool { return !x.IsOriginal() })
		if mended += len(found); len(found) == 0 {
			r.flipBit(f.Path, bit) // it was none of the content
		}
		for _, x := range found {
			mend(x)
		}
		found, _ = r.verified(VerifyOptions{})
		require.Empty(r.t, found)
	}
	return mended
}

// TestRepairOriginals: the content of a damaged original is again what it was, in plain files and compact ones, with what another daemon has.
func TestRepairOriginals(t *testing.T) {
	r := aged(t)
	mend := func(x Finding) {
		done, err := r.g.RepairOriginal(x, r.has)
		require.NoError(t, err)
		require.True(t, done)
		done, err = r.g.RepairOriginal(x, r.has)
		require.NoError(t, err)
		require.False(t, done, "it is not damaged any more")
	}
	mended := 0
	for _, f := range r.g.set.Files(segment.Originals) {
		mended += r.spoilOriginals(f, mend)
	}
	require.Greater(t, mended, 10)
	require.NoError(t, r.g.Checkpoint())
	_, err := r.g.Compact()
	require.NoError(t, err)
	mended = 0
	for _, f := range r.g.set.Files(segment.Originals) {
		if f.IsCompact() {
			n := r.spoilOriginals(f, mend)
			require.Equal(t, n > 0, !f.IsCompact())
			mended += n
		}
	}
	require.Greater(t, mended, 2)
	for lsn := r.g.expiredTo(); lsn <= r.g.Head(); lsn++ {
		for block := range int64(rigBlocks) {
			r.reads(lsn, block, r.past[lsn-1].fill[block])
		}
	}
}

// TestRepairOriginalsRefuses: nothing but what was there is written over an original, and of one that has expired nothing is.
func TestRepairOriginalsRefuses(t *testing.T) {
	r := aged(t)
	var first Finding
	for _, f := range r.g.set.Files(segment.Originals) {
		r.spoilOriginals(f, func(x Finding) {
			for name, spoil := range map[string]func(c *record.LostContent, l record.Lost){
				"others' content": func(c *record.LostContent, _ record.Lost) { c.Bytes[len(c.Bytes)-1]++ },
				"too little":      func(c *record.LostContent, _ record.Lost) { c.Bytes = c.Bytes[1:] },
				"nothing":         func(c *record.LostContent, _ record.Lost) { *c = record.LostContent{} },
				"of before":       func(c *record.LostContent, l record.Lost) { c.At = l.From - 1 },
				"of behind":       func(c *record.LostContent, l record.Lost) { c.At = l.To + 1 },
				"another journal's": func(c *record.LostContent, _ record.Lost) {
					c.Reigns = record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{9}}}
				},
			} {
				done, err := r.g.RepairOriginal(x, func(l record.Lost) (record.LostContent, error) {
					c, err := r.has(l)
					spoil(&c, l)
					return c, err
				})
				require.False(t, done, name)
				require.Error(t, err, name)
			}
			_, err := r.g.RepairOriginal(x, func(record.Lost) (record.LostContent, error) { return record.LostContent{}, io.ErrNoProgress })
			require.ErrorIs(t, err, io.ErrNoProgress)
			_, err = r.g.RepairOriginal(x, r.has)
			require.NoError(t, err)
			if !first.IsOriginal() {
				first = x
			}
		})
	}
	require.True(t, first.IsOriginal())
	require.NoError(t, r.g.SetPolicy(retain.Policy{EveryWrite: time.Minute}, 0))
	r.expireAll()
	_, err := r.g.Thin()
	require.NoError(t, err)
	_, err = r.g.Clean()
	require.NoError(t, err)
	_, err = r.g.set.Acquire(first.original.file)
	require.ErrorIs(t, err, segment.ErrGone)
	done, err := r.g.RepairOriginal(first, r.has)
	require.NoError(t, err)
	require.False(t, done)
	done, err = r.g.RepairOriginal(Finding{LSN: 5, Last: 5}, r.has)
	require.NoError(t, err)
	require.False(t, done)
}

// TestWhatIsAskedFor: content is asked for in pieces, as of points at which the disk is known to have held it, of a journal that is the same there.
func TestWhatIsAskedFor(t *testing.T) {
	r := newRig(t, Options{})
	r.fillUp(60)
	require.NoError(t, r.g.Sync())
	gaps := []Gap{{10, 20}}
	r.g.gaps.Store(&gaps)
	defer r.g.gaps.Store(nil)
	const blocks = 2*record.MaxLostBlocks + 5
	content := bytes.Repeat([]byte("content."), (blocks*record.BlockSize-512)/8)
	header := func(from, until record.LSN, flags uint8) *record.Header {
		return &record.Header{LSN: until, Durable: from, Disk: 1, Kind: record.KindOriginal, Flags: flags, Payload: len(content),
			Extent: record.Extent{Off: 3 * record.BlockSize, Len: int64(len(content))}}
	}
	var asked []record.Lost
	reigns := r.g.Reigns()
	ask := func(l record.Lost) (record.LostContent, error) {
		asked = append(asked, l)
		off := (l.First - 3) * record.BlockSize
		return record.LostContent{At: l.To, Reigns: reigns, Bytes: content[off:min(off+int64(l.Blocks)*record.BlockSize, int64(len(content)))]}, nil
	}
	got := make([]byte, len(content))
	all := []record.Extent{{Len: int64(len(content))}}
	require.NoError(t, r.g.askAll(header(30, 40, record.FlagExact), got, all, ask))
	require.True(t, bytes.Equal(content, got))
	require.Equal(t, []record.Lost{
		{Disk: 1, First: 3, Blocks: record.MaxLostBlocks, From: 30, To: 39},
		{Disk: 1, First: 3 + record.MaxLostBlocks, Blocks: record.MaxLostBlocks, From: 30, To: 39},
		{Disk: 1, First: 3 + 2*record.MaxLostBlocks, Blocks: 5, From: 30, To: 39},
	}, asked)
	clear(got)
	asked = nil
	require.NoError(t, r.g.askAll(header(30, 40, record.FlagExact), got, []record.Extent{{Off: 2 * record.BlockSize, Len: record.BlockSize}, {Off: 9 * record.BlockSize, Len: 2 * record.BlockSize}}, ask))
	require.Equal(t, []record.Lost{{Disk: 1, First: 5, Blocks: 1, From: 30, To: 39}, {Disk: 1, First: 12, Blocks: 2, From: 30, To: 39}}, asked)
	require.Zero(t, got[0])
	require.True(t, bytes.Equal(content[9*record.BlockSize:11*record.BlockSize], got[9*record.BlockSize:11*record.BlockSize]))
	for _, x := range []struct {
		h        *record.Header
		from, to record.LSN
	}{
		{header(30, 40, 0), 30, 30},
		{header(5, 15, record.FlagExact), 5, 10},
		{header(5, 25, record.FlagExact), 20, 24},
		{header(0, 1, record.FlagExact), 0, 0},
	} {
		asked = nil
		require.NoError(t, r.g.askAll(x.h, got, all, ask))
		require.Equal(t, []record.LSN{x.from, x.to}, []record.LSN{asked[0].From, asked[0].To})
	}
	require.ErrorIs(t, r.g.askAll(header(12, 15, record.FlagExact), got, all, ask), ErrDiverged, "all of a gap")
	require.NoError(t, r.g.askAll(header(12, 15, record.FlagExact), got, nil, ask), "nothing is lost")
	require.ErrorIs(t, r.g.askAll(header(30, 30, record.FlagExact), got, all, ask), record.ErrCorrupt)
	reigns = reigns.With(record.Reign{Epoch: reigns.Epoch() + 1, First: 35, ID: [16]byte{7}})
	require.NoError(t, r.g.askAll(header(30, 35, record.FlagExact), got, all, ask), "they part behind it")
	require.ErrorIs(t, r.g.askAll(header(30, 36, record.FlagExact), got, all, ask), ErrDiverged)
}

// TestPointWithin: of every run of LSNs, the newest that can be viewed is found.
func TestPointWithin(t *testing.T) {
	r := aged(t)
	for to := range r.g.Head() + 3 {
		newest, some := record.LSN(0), false
		for lsn := range min(to, r.g.Head()) + 1 {
			if r.g.viewable(lsn) {
				newest, some = lsn, true
			}
		}
		for from := range to + 1 {
			at, err := r.g.PointWithin(from, to)
			if !some || newest < from {
				require.ErrorIs(t, err, ErrNoPoint, "%d to %d", from, to)
				continue
			}
			require.NoError(t, err)
			require.Equal(t, newest, at, "%d to %d", from, to)
		}
	}
}

// TestOutsideGaps: what the disks were in a gap is asked for of nobody.
func TestOutsideGaps(t *testing.T) {
	r := newRig(t, Options{})
	gaps := []Gap{{10, 20}, {20, 30}, {40, record.MaxLSN}}
	r.g.gaps.Store(&gaps)
	defer r.g.gaps.Store(nil)
	for _, x := range []struct{ from, to, first, last record.LSN }{
		{3, 9, 3, 9}, {3, 10, 3, 10}, {3, 15, 3, 10}, {11, 19, 11, 10}, {11, 20, 20, 20}, {3, 20, 20, 20}, {5, 25, 20, 20}, {21, 29, 21, 20}, {25, 35, 30, 35}, {32, 35, 32, 35},
		{3, 35, 30, 35}, {35, 50, 35, 40}, {41, 50, 41, 40},
	} {
		first, last := r.g.outsideGaps(x.from, x.to)
		require.Equal(t, []record.LSN{x.first, x.last}, []record.LSN{first, last}, "%d to %d", x.from, x.to)
	}
}

// TestRepairBacking: a damaged block of a backing is again what the journal has of it; if the journal can not read it, it stays as it is.
func TestRepairBacking(t *testing.T) {
	r := aged(t)
	d := r.g.Disks()[0]
	want := make([]byte, d.Size)
	require.NoError(t, d.ReadAt(want, 0, false))
	for block := range int64(rigBlocks) {
		r.flipBit("disk.raw", block*record.BlockSize*8+17)
	}
	found, _ := r.verified(VerifyOptions{})
	require.Greater(t, len(found), 20)
	// Blocks that the journal has no version of stay damaged, and nobody knows.
	known := map[int64]bool{}
	for _, x := range found {
		require.True(t, x.IsBacking())
		known[x.block] = true
	}
	for block := range int64(rigBlocks) {
		if !known[block] {
			r.flipBit("disk.raw", block*record.BlockSize*8+17)
		}
	}
	log := r.g.set.Files(segment.Log)
	at, lost := log[len(log)-1], int64(-1)
	_, err := at.Scan(at.Start(), func(off int64, h record.Header) error {
		if h.Payload > 0 && h.LSN == r.g.Head() {
			r.flipBit(at.Path, (off+int64(h.EncodedSize()))*8)
			lost = h.Extent.Off / record.BlockSize
		}
		return nil
	})
	require.NoError(t, err)
	require.NotEqual(t, int64(-1), lost)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	n, err := r.g.RepairBackings(ended, found)
	require.ErrorIs(t, err, context.Canceled)
	require.Zero(t, n)
	n, err = r.g.RepairBackings(t.Context(), append(found, Finding{LSN: 5, Last: 5}))
	require.NoError(t, err)
	require.Equal(t, len(found)-1, n)
	n, err = r.g.RepairBackings(t.Context(), found)
	require.NoError(t, err)
	require.Zero(t, n)
	has := make([]byte, d.Size)
	require.NoError(t, d.ReadBacking(has, 0, false))
	for block := range int64(rigBlocks) {
		if block != lost {
			require.True(t, bytes.Equal(want[block*record.BlockSize:][:record.BlockSize], has[block*record.BlockSize:][:record.BlockSize]), "block %d", block)
		}
	}
	f := r.inject(errorfs.OpFileSyncData, "disk.raw", syscall.EIO)
	r.flipBit("disk.raw", found[0].block*record.BlockSize*8)
	n, err = r.g.RepairBackings(t.Context(), found[:1])
	require.ErrorIs(t, err, syscall.EIO)
	require.Zero(t, n, "it is not durable")
	require.Positive(t, f.fired.Load())
	r.failed()
	n, err = r.g.RepairBackings(t.Context(), found[:1])
	require.NoError(t, err)
	require.Zero(t, n, "of a group that has failed, nobody knows what the backing is to have")
}

// TestRepairBackingThatFails: a block that can not be written keeps none of the others from being mended.
func TestRepairBackingThatFails(t *testing.T) {
	r := aged(t)
	for block := range int64(rigBlocks) {
		r.flipBit("disk.raw", block*record.BlockSize*8+17)
	}
	found, _ := r.verified(VerifyOptions{})
	f := r.inject(errorfs.OpFileWriteAt, "disk.raw", syscall.EIO)
	f.spare.Store(3)
	n, err := r.g.RepairBackings(t.Context(), found)
	require.ErrorIs(t, err, syscall.EIO)
	require.Equal(t, 3, n)
	r.fault.Store(nil)
	n, err = r.g.RepairBackings(t.Context(), found)
	require.NoError(t, err)
	require.Equal(t, len(found)-3, n)
	found, _ = r.verified(VerifyOptions{})
	require.Empty(t, found)
}

// forge changes the last four bytes so that the CRC-32C is want.
func forge(b []byte, want uint32) {
	tab := crc32.MakeTable(crc32.Castagnoli)
	n := len(b)
	s := ^crc32.Checksum(b[:n-4], tab)
	w := ^want
	var idx [4]byte
	for i := 3; i >= 0; i-- {
		for k := range tab {
			if tab[k]>>24 == w>>24 {
				idx[i] = byte(k)
			}
		}
		w = (w ^ tab[idx[i]]) << 8
	}
	for i := range idx {
		b[n-4+i] = idx[i] ^ byte(s)
		s = tab[idx[i]] ^ (s >> 8)
	}
}

// oneOriginal is a rig with one original of four blocks of 0xb0, of which the first is damaged.
func oneOriginal(t *testing.T) (r *rig, f Finding) {
	r = newRig(t, Options{SegmentSize: 4 << 20})
	require.NoError(t, r.g.Append([]Op{{Kind: record.KindWrite, Disk: r.g.Disks()[0], Ext: record.Extent{Len: 4 * record.BlockSize}, Data: bytes.Repeat([]byte{1}, 4*record.BlockSize)}}))
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.g.Apply())
	files := r.g.set.Files(segment.Originals)
	require.Len(t, files, 1)
	_, err := files[0].Scan(files[0].Start(), func(off int64, h record.Header) error {
		require.EqualValues(t, 4*record.BlockSize, h.Payload)
		r.flipBit(files[0].Path, (off+int64(h.EncodedSize())+5)*8)
		return nil
	})
	require.NoError(t, err)
	found, _ := r.verified(VerifyOptions{})
	require.Len(t, found, 1)
	require.True(t, found[0].IsOriginal())
	return r, found[0]
}

func (r *rig) b0(l record.Lost) record.LostContent {
	return record.LostContent{At: l.To, Reigns: r.g.Reigns(), Bytes: bytes.Repeat([]byte{0xb0}, l.Blocks*record.BlockSize)}
}

// TestRepairKeepsWhatIsWhole: of an original of which a block is damaged, no other one is asked for.
func TestRepairKeepsWhatIsWhole(t *testing.T) {
	r, f := oneOriginal(t)
	done, err := r.g.RepairOriginal(f, func(l record.Lost) (record.LostContent, error) {
		require.EqualValues(t, 0, l.First)
		require.Equal(t, 1, l.Blocks)
		return r.b0(l), nil
	})
	require.NoError(t, err)
	require.True(t, done)
	r.reads(0, 0, 0xb0)
	r.reads(0, 2, 0xb0)
}

// TestRepairOfARecordKeepsWhatIsWhole: nor is a block of a record of the log changed that is whole, be it to one of the same checksum.
func TestRepairOfARecordKeepsWhatIsWhole(t *testing.T) {
	p := newPair(t)
	data := bytes.Repeat([]byte{5}, 3*record.BlockSize)
	require.NoError(t, p.g.Append([]Op{{Kind: record.KindWrite, Disk: p.g.Disks()[0], Ext: record.Extent{Len: int64(len(data))}, Data: data}}))
	require.NoError(t, p.g.Sync())
	run := p.run()
	p.ship()
	require.NoError(t, p.to.g.Sync())
	require.NoError(t, p.to.g.Index())
	f := p.to.g.set.Files(segment.Log)[0]
	h, err := headerAt(f, f.Start())
	require.NoError(t, err)
	p.to.flipBit(f.Path, (f.Start()+int64(h.EncodedSize())+7)*8)
	b := run.Bytes[h.EncodedSize()+2*record.BlockSize:][:record.BlockSize]
	want := record.Checksum(b)
	copy(b, "evil")
	forge(b, want)
	n, err := p.to.g.Repair(run)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	for block := range int64(3) {
		got, err := p.to.at(1, block)
		require.NoError(t, err)
		require.EqualValues(t, 5, got)
	}
}

// TestAFailedSyncOfARepair: the kernel tells of it once, and what else was to be durable in the file may not be.
func TestAFailedSyncOfARepair(t *testing.T) {
	r, f := oneOriginal(t)
	require.Equal(t, f.original.file, r.g.apply.orig.Current().Number)
	x := r.inject(errorfs.OpFileSyncData, "originals", syscall.EIO)
	_, err := r.g.RepairOriginal(f, func(l record.Lost) (record.LostContent, error) { return r.b0(l), nil })
	require.ErrorIs(t, err, syscall.EIO)
	require.Positive(t, x.fired.Load())
	r.fault.Store(nil) // the kernel tells of it once
	r.failed()
}

// TestAMendedFileIsCleaned, as others are.
func TestAMendedFileIsCleaned(t *testing.T) {
	r := tenPoints(t)
	first := r.g.set.Files(segment.Originals)[0].Number
	r.flip("originals", bytes.Repeat([]byte{100}, 100)) // of p9
	_, err := r.g.Clean()
	require.NoError(t, err)
	found, _ := r.verified(VerifyOptions{})
	for _, f := range found {
		done, err := r.g.RepairOriginal(f, func(l record.Lost) (record.LostContent, error) {
			return record.LostContent{At: l.To, Reigns: r.g.Reigns(), Bytes: bytes.Repeat([]byte{100}, l.Blocks*record.BlockSize)}, nil
		})
		require.NoError(t, err)
		require.True(t, done)
	}
	found, _ = r.verified(VerifyOptions{})
	require.Empty(t, found)
	require.NoError(t, r.g.closeOriginals(0))
	_, err = r.g.Clean()
	require.NoError(t, err)
	_, err = r.g.set.Acquire(first)
	require.ErrorIs(t, err, segment.ErrGone, "two points of ten need anything of it")
}

// TestABackingBesideADamagedIndex: a backing that is right is not made what an index says that lacks the newest version.
func TestABackingBesideADamagedIndex(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(3, 1))
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.write(3, 2))
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.g.Index())
	var e index.Entry
	require.NoError(t, r.g.ix.Versions(func(x index.Entry) (bool, error) {
		if x.LSN == 2 {
			e = x
		}
		return true, nil
	}))
	b := r.g.ix.NewBatch()
	b.Delete(e.Disk, e.Unit, e.LSN)
	r.g.index.Lock()
	require.NoError(t, b.Commit(r.g.index.mark))
	r.g.index.Unlock()
	found, _ := r.verified(VerifyOptions{})
	require.Len(t, found, 2)
	for _, f := range found {
		require.False(t, f.IsBacking(), f.What)
	}
	n, err := r.g.RepairBackings(t.Context(), found)
	require.NoError(t, err)
	require.Zero(t, n)
	require.EqualValues(t, 2, r.live(3))
}

// TestABackingThatCanNotBeRead is not written: nobody could say what came of it.
func TestABackingThatCanNotBeRead(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(3, 1))
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.g.Apply())
	r.inject(errorfs.OpFileReadAt, "disk.raw", syscall.EIO)
	found, _ := r.verified(VerifyOptions{})
	require.Len(t, found, 1)
	n, err := r.g.RepairBackings(t.Context(), found)
	require.ErrorIs(t, err, syscall.EIO)
	require.Zero(t, n)
}

// TestARepairBesideTheRemovalOfADisk: what the backing is like was noted.
func TestARepairBesideTheRemovalOfADisk(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(3, 1))
	require.NoError(t, r.g.Sync())
	require.NoError(t, r.g.Apply())
	d := r.g.Disks()[0]
	r.flipBit("disk.raw", 3*record.BlockSize*8)
	found, _ := r.verified(VerifyOptions{})
	require.Len(t, found, 1)
	require.NoError(t, r.g.leave(d))
	left := r.g.Head()
	r.g.apply.Lock()
	require.NoError(t, r.g.signLeaving(d, left))
	r.g.apply.Unlock()
	n, err := r.g.RepairBackings(t.Context(), found)
	require.NoError(t, err)
	require.Zero(t, n, "nobody may write it any more")
}

// payloads are those of a file's records, by where the records stand.
func payloads(t *testing.T, f *segment.File) map[int64][]byte {
	t.Helper()
	all := map[int64][]byte{}
	_, err := f.Scan(f.Start(), func(off int64, h record.Header) error {
		if h.Payload > 0 {
			all[off] = make([]byte, h.Payload)
			require.NoError(t, f.ReadAt(all[off], off+int64(h.EncodedSize()), false))
		}
		return nil
	})
	require.NoError(t, err)
	return all
}

// TestAMendedBase: what was kept as differences from a damaged block can be read again as that was mended.
func TestAMendedBase(t *testing.T) {
	r := newRig(t, Options{SegmentSize: 4 << 20})
	rnd := rand.New(rand.NewPCG(1, 1))
	b := make([]byte, record.BlockSize)
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
	for i := range 12 {
		for blk := range int64(20) {
			c := bytes.Clone(b)
			c[0], c[100*i] = byte(blk), byte(i)
			require.NoError(t, r.g.Append([]Op{{Kind: record.KindWrite, Disk: r.g.Disks()[0], Ext: record.Extent{Off: blk * record.BlockSize, Len: record.BlockSize}, Data: c}}))
		}
		r.mark(string(rune('a'+i)), true)
	}
	require.NoError(t, r.g.Apply())
	r.expireAll()
	require.NoError(t, r.g.closeOriginals(0))
	require.NoError(t, r.g.Checkpoint())
	_, err := r.g.Compact()
	require.NoError(t, err)
	var f *segment.File
	for _, x := range r.g.set.Files(segment.Originals) {
		if x.IsCompact() {
			f = x
		}
	}
	require.NotNil(t, f)
	whole := payloads(t, f)
	read := func() (bad int) {
		for off, c := range whole {
			got := make([]byte, len(c))
			var h record.Header
			_, _ = f.Scan(off, func(_ int64, x record.Header) error { h = x; return segment.ErrStop })
			if err := f.ReadAt(got, off+int64(h.EncodedSize()), false); err != nil || !bytes.Equal(got, c) {
				bad++
			}
		}
		return bad
	}
	var bases []Finding
	var bit int64
	for range 200 {
		bit = (f.Alloc()/8 + rnd.Int64N(f.Alloc()*7/8)) * 8
		r.flipBit(f.Path, bit)
		found, _ := r.verified(VerifyOptions{})
		bases = slices.DeleteFunc(found, func(x Finding) bool { return !x.IsOriginal() })
		if len(bases) >= 4 {
			break
		}
		r.flipBit(f.Path, bit)
	}
	require.GreaterOrEqual(t, len(bases), 4)
	require.Greater(t, read(), 3)
	slices.SortFunc(bases, func(a, b Finding) int { return int(a.original.off - b.original.off) })
	done, err := r.g.RepairOriginal(bases[0], func(l record.Lost) (record.LostContent, error) {
		return record.LostContent{At: l.To, Reigns: r.g.Reigns(), Bytes: whole[bases[0].original.off]}, nil
	})
	require.NoError(t, err)
	require.True(t, done)
	require.Zero(t, read(), "what the base is, is known again, and so is what differs from it")
}

// TestARepairOfABackingThatWasCutShort does not make it longer: what was lost would be zeroes.
func TestARepairOfABackingThatWasCutShort(t *testing.T) {
	const size = 1 << 20
	g, backing := ofSevens(t, size)
	d := g.Disks()[0]
	require.NoError(t, g.Append([]Op{{Kind: record.KindWrite, Disk: d, Ext: record.Extent{Off: size - record.BlockSize, Len: record.BlockSize}, Data: bytes.Repeat([]byte{9}, record.BlockSize)}}))
	require.NoError(t, g.Sync())
	require.NoError(t, g.Apply())
	require.NoError(t, os.Truncate(backing, 100*record.BlockSize))
	b := make([]byte, record.BlockSize)
	require.Error(t, d.ReadAt(b, 200*record.BlockSize, false), "what it held there is lost")
	var found []Finding
	_, err := g.Verify(t.Context(), VerifyOptions{}, func(f Finding) { found = append(found, f) })
	require.NoError(t, err)
	require.Len(t, found, 1)
	n, err := g.RepairBackings(t.Context(), found)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.Zero(t, n)
	require.Error(t, d.ReadAt(b, 200*record.BlockSize, false))
	info, err := os.Stat(backing)
	require.NoError(t, err)
	require.EqualValues(t, 100*record.BlockSize, info.Size())
}

// TestARepairLeavesTheReserve: a compact file does not become plain in what is kept free for guests.
func TestARepairLeavesTheReserve(t *testing.T) {
	r, fs := newFreeRig(t, Options{Reserve: 64 << 10, SegmentSize: 512 << 10}, 256<<20)
	b := make([]byte, record.BlockSize)
	for i := range b {
		b[i] = byte(i * i >> 3)
	}
	for i := range 12 {
		for blk := range int64(100) {
			c := bytes.Clone(b)
			c[0], c[100*i] = byte(blk), byte(i)
			require.NoError(t, r.g.Append([]Op{{Kind: record.KindWrite, Disk: r.g.Disks()[0], Ext: record.Extent{Off: blk * record.BlockSize, Len: record.BlockSize}, Data: c}}))
		}
		require.NoError(t, r.g.Apply())
		r.mark(string(rune('a'+i)), true)
	}
	r.expireAll()
	require.NoError(t, r.g.closeOriginals(0))
	require.NoError(t, r.g.Checkpoint())
	_, err := r.g.Compact()
	require.NoError(t, err)
	var f *segment.File
	for _, x := range r.g.set.Files(segment.Originals) {
		if x.IsCompact() && x.Saved() > 300<<10 {
			f = x
		}
	}
	require.NotNil(t, f)
	var found []Finding
	whole := payloads(t, f)
	for len(found) == 0 {
		bit := (f.Alloc()/2 + rand.Int64N(f.Alloc()/2)) * 8
		r.flipBit(f.Path, bit)
		found, _ = r.verified(VerifyOptions{})
		if found = slices.DeleteFunc(found, func(x Finding) bool { return !x.IsOriginal() }); len(found) == 0 {
			r.flipBit(f.Path, bit)
		}
	}
	fs.free.Store(smallFS{FS: fs.FS}.used("state") + r.g.o.keepLog() + 1100<<10) // room for another file of the log
	done, err := r.g.RepairOriginal(found[0], func(l record.Lost) (record.LostContent, error) {
		return record.LostContent{At: l.To, Reigns: r.g.Reigns(), Bytes: whole[found[0].original.off]}, nil
	})
	require.ErrorIs(t, err, segment.ErrFull)
	require.False(t, done)
	for i := range 130 {
		require.NoError(t, r.write(int64(i%100), 3), "write %d", i)
		if i%20 == 19 {
			require.NoError(t, r.g.Apply())
		}
	}
	fs.free.Store(256 << 20)
	done, err = r.g.RepairOriginal(found[0], func(l record.Lost) (record.LostContent, error) {
		return record.LostContent{At: l.To, Reigns: r.g.Reigns(), Bytes: whole[found[0].original.off]}, nil
	})
	require.NoError(t, err)
	require.True(t, done)
}
