package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Repair writes records of another daemon's, which has the same journal, over those of the log that are damaged here, durably. What is not
// damaged stays as it is. It returns how many records were mended.
//
// ErrDiverged says that the two journals are not the same that far. A *PointError, that the group has no such records.
func (g *Group) Repair(run record.Run) (mended int, err error) {
	if g.bridged(run.First, run.Last) {
		return 0, fmt.Errorf("LSN %d to %d of group %s are, or have some, of a gap: what stands there was made here, and no other daemon has it; to have the disks as they are from the other one, tidemark replica accept --anew", run.First, run.Last, g.name)
	}
	if err := g.shares(run.Reigns, run.Last); err != nil {
		return 0, err
	}
	if run.First <= g.expiredTo() {
		return 0, g.expired(run.First)
	}
	files, release := g.set.Hold(segment.Log)
	defer release()
	err = record.Each(run.Bytes, func(h record.Header, payload []byte) error {
		done, err := g.repairOne(files, h, payload)
		if err != nil {
			return fmt.Errorf("repair LSN %d of group %s: %w", h.LSN, g.name, err)
		}
		if done {
			mended++
			g.log.Warn("a damaged record was written again, as another daemon has it", zap.Uint64("lsn", uint64(h.LSN)))
		}
		return nil
	})
	return mended, err
}

// place is where a record stands, or should.
type place struct {
	f       *segment.File
	off     int64
	have    *record.Header // nil: its header is damaged
	durable record.LSN     // as the record before it says
}

// findPlace finds where a record stands in the log.
func findPlace(files []*segment.File, lsn record.LSN) (p place, err error) {
	for _, f := range files {
		if f.First <= lsn {
			p.f = f // of two, the newer counts
		}
	}
	if p.f == nil {
		return p, fmt.Errorf("%w: no file has it", record.ErrCorrupt)
	}
	next := p.f.First
	p.off, err = p.f.Scan(p.f.Start(), func(off int64, h record.Header) error {
		if h.LSN >= lsn {
			own := h
			own.Sums = append(record.Sums(nil), h.Sums...)
			p.have, p.off = &own, off
			return segment.ErrStop
		}
		next, p.durable = h.LSN+1, h.Durable
		return nil
	})
	switch {
	case p.have != nil && p.have.LSN == lsn:
		return p, nil
	case p.have == nil && next == lsn && (err == nil || errors.Is(err, record.ErrCorrupt)):
		return p, nil
	case err == nil || errors.Is(err, record.ErrCorrupt):
		return p, fmt.Errorf("%w: %s can be read up to LSN %d only: repair what stands before it", record.ErrCorrupt, p.f.Path, next-1)
	}
	return p, err
}

func (g *Group) repairOne(files []*segment.File, h record.Header, payload []byte) (mended bool, err error) {
	p, err := findPlace(files, h.LSN)
	if err != nil {
		return false, err
	}
	if p.have != nil {
		if p.have.Digest() != h.Digest() {
			return false, fmt.Errorf("%w: another record stands in %s", ErrDiverged, p.f.Path)
		}
		if damaged, err := isDamaged(p.f, p.off, p.have); !damaged {
			return false, err
		}
		own, lost, err := readWhole(p.f, p.off, p.have)
		if err != nil {
			return false, err
		}
		for _, r := range lost {
			copy(own[r.Off:r.End()], payload[r.Off:])
		}
		payload = own
		h.Durable, h.Salt = p.have.Durable, p.have.Salt
	} else {
		h.Durable, h.Salt = min(p.durable, h.LSN-1), p.f.Salt
		// It must fit what is damaged.
		err := p.f.Resync(p.off, func(at int64, next record.Header) error {
			if at < p.off+h.Size() {
				return fmt.Errorf("%w: it takes %d bytes at %d of %s, and LSN %d stands at %d", record.ErrCorrupt, h.Size(), p.off, p.f.Path, next.LSN, at)
			}
			return segment.ErrStop
		})
		if err != nil {
			return false, err
		}
	}
	if err := g.rewrite(p.f, p.off, &h, payload); err != nil {
		return false, err
	}
	return true, nil
}

// isDamaged reports whether a record is other than it was written, or can not be read.
func isDamaged(f *segment.File, off int64, h *record.Header) (bool, error) {
	_, err := f.VerifyRecord(off, *h, nil)
	if errors.Is(err, segment.ErrGone) || errors.Is(err, os.ErrClosed) {
		return false, err
	}
	return err != nil, nil
}

// readWhole reads a record's payload but for blocks that are damaged, and says which runs of bytes of it those are: what is whole is nobody else's to change.
func readWhole(f *segment.File, off int64, h *record.Header) (payload []byte, lost []record.Extent, err error) {
	payload = make([]byte, h.Payload)
	for i := range h.Sums.Len() {
		at := int64(i) * record.BlockSize
		n := min(int64(h.Payload)-at, record.BlockSize)
		err := f.Block(payload[at:at+n], off+int64(h.EncodedSize())+at, h.Sums.At(i), false)
		switch k := len(lost); {
		case err == nil:
		case errors.Is(err, segment.ErrGone) || errors.Is(err, os.ErrClosed):
			return nil, nil, err
		case k > 0 && lost[k-1].End() == at:
			lost[k-1].Len += n
		default:
			lost = append(lost, record.Extent{Off: at, Len: n})
		}
	}
	return payload, lost, nil
}

// rewrite writes a record over what stands at a place, durably.
func (g *Group) rewrite(f *segment.File, off int64, h *record.Header, payload []byte) error {
	b := append(h.Append(make([]byte, 0, h.Size())), payload...)
	err := g.set.Rewrite(f, off, append(b, make([]byte, h.Size()-int64(len(b)))...), g.o.keepCompact())
	if errors.Is(err, segment.ErrUnsynced) {
		err = g.fail(err)
	}
	// It may have been damaged when it was looked at.
	g.keepPlain(f, false)
	g.cleaning.mended.Store(f.Number, true)
	return err
}

// IsOriginal reports whether a finding is of an original's content: RepairOriginal may mend it.
func (f Finding) IsOriginal() bool { return f.original.file != 0 }

// RepairOriginal writes the content of a damaged original again, durably, with what ask gets of it from another daemon: each block must have the checksum that it had.
// It reports whether it was mended. What is not damaged, or has expired since it was found, stays as it is. ErrDiverged says that the two journals are
// not the same where it was looked.
func (g *Group) RepairOriginal(f Finding, ask func(record.Lost) (record.LostContent, error)) (mended bool, err error) {
	if !f.IsOriginal() {
		return false, nil
	}
	mended, err = g.repairOriginal(f.original, ask)
	if errors.Is(err, segment.ErrGone) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("repair an original of group %s: %w", g.name, err)
	}
	return mended, nil
}

func (g *Group) repairOriginal(at origAt, ask func(record.Lost) (record.LostContent, error)) (mended bool, err error) {
	f, err := g.set.Acquire(at.file)
	if err != nil {
		return false, err
	}
	defer f.Release()
	h, err := headerAt(f, at.off)
	if err != nil {
		return false, err
	}
	if damaged, err := isDamaged(f, at.off, h); !damaged {
		return false, err
	}
	content, lost, err := readWhole(f, at.off, h)
	if err != nil {
		return false, err
	}
	if err := g.askAll(h, content, lost, ask); err != nil {
		return false, err
	}
	if err := h.Sums.Verify(content); err != nil {
		return false, fmt.Errorf("the other daemon has something else: %w", err)
	}
	if err := g.rewrite(f, at.off, h, content); err != nil {
		return false, err
	}
	g.log.Warn("a damaged original was written again, as another daemon has it", zap.String("segment", f.Path), zap.Int64("offset", at.off))
	return true, nil
}

// headerAt is the header of the record that stands at an offset.
func headerAt(f *segment.File, off int64) (found *record.Header, err error) {
	_, err = f.Scan(off, func(_ int64, h record.Header) error {
		h.Sums = bytes.Clone(h.Sums)
		found = &h
		return segment.ErrStop
	})
	if found == nil {
		return nil, errors.Join(fmt.Errorf("%w: the header at %d of %s can not be read", record.ErrCorrupt, off, f.Path), err)
	}
	return found, nil
}

// askAll asks for what is lost of an original's content, piece by piece.
func (g *Group) askAll(h *record.Header, content []byte, lost []record.Extent, ask func(record.Lost) (record.LostContent, error)) error {
	if len(lost) == 0 {
		return nil // it is the bytes behind the payload
	}
	if int64(h.Payload) != h.Extent.Len || h.Extent.Off%record.BlockSize != 0 || h.Durable >= h.LSN {
		return fmt.Errorf("%w: %d bytes of LSN %d to %d for %v", record.ErrCorrupt, h.Payload, h.Durable, h.LSN, h.Extent)
	}
	from, to := h.Durable, h.LSN-1
	if h.Flags&record.FlagExact == 0 {
		to = from // until when the disk held it is not known
	}
	from, to = g.outsideGaps(from, to)
	if from > to {
		return fmt.Errorf("%w: it is of a gap, which no other daemon has alike", ErrDiverged)
	}
	for _, run := range lost {
		for off := run.Off; off < run.End(); {
			n := min(run.End()-off, record.MaxLostBlocks*record.BlockSize)
			got, err := ask(record.Lost{Disk: h.Disk, First: (h.Extent.Off + off) / record.BlockSize, Blocks: record.Blocks(n), From: from, To: to})
			if err != nil {
				return err
			}
			if got.At < from || got.At > to || int64(len(got.Bytes)) < n {
				return fmt.Errorf("%w: %d bytes of LSN %d came, and %d of LSN %d to %d are due", record.ErrCorrupt, len(got.Bytes), got.At, n, from, to)
			}
			if err := g.shares(got.Reigns, got.At); err != nil {
				return err
			}
			off += int64(copy(content[off:off+n], got.Bytes))
		}
	}
	return nil
}

// shares is an ErrDiverged unless the group has its history up to an LSN in common with a journal of some reigns.
func (g *Group) shares(reigns record.Reigns, upTo record.LSN) error {
	common, err := g.Reigns().Common(g.Durable(), reigns, upTo)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDiverged, err)
	}
	if common < upTo {
		return fmt.Errorf("%w: they have LSN %d in common, and LSN %d is to be repaired", ErrDiverged, common, upTo)
	}
	return nil
}

// outsideGaps is the newest run of LSNs, of those from one to another, at which the disks were what they were at the writer's; there is none if it ends before it begins.
func (g *Group) outsideGaps(from, to record.LSN) (first, last record.LSN) {
	for _, gap := range slices.Backward(g.gapsNow()) {
		if to >= gap.Until {
			return max(from, gap.Until), to
		}
		to = min(to, gap.After)
	}
	return from, to
}

// PointWithin is the newest point from one LSN to another that can be viewed. It may expire before it is. A *PointError says that there is none.
func (g *Group) PointWithin(from, to record.LSN) (record.LSN, error) {
	to = min(to, g.Durable())
	at, ok := g.NewestUpTo(to)
	if !ok {
		kept := g.KeptPoints()
		if i, _ := findKept(kept, to+1); i > 0 {
			at, ok = kept[i-1].LSN, true
		}
	}
	if !ok || at < from {
		return 0, g.noPoint(fmt.Sprintf("lsn:%d to lsn:%d", from, to), "none of them is kept")
	}
	return at, nil
}

// IsBacking reports whether a finding is of a backing: RepairBackings may mend it.
func (f Finding) IsBacking() bool { return f.backing != nil }

// repairStep is how many blocks of backings are written with g.apply held.
const repairStep = 64

// RepairBackings writes blocks of backings again, durably, as the journal has them, and returns how many it wrote. What was there is lost, be it damage or what
// somebody wrote past the daemon. What is as it should be, or the journal can not read, stays as it is; so does what can not be read, for it could be that the backing ends
// before it.
func (g *Group) RepairBackings(ctx context.Context, found []Finding) (mended int, err error) {
	for some := range slices.Chunk(found, repairStep) {
		if ctx.Err() != nil {
			return mended, errors.Join(err, ctx.Err())
		}
		n, serr := g.repairBlocks(some)
		mended, err = mended+n, errors.Join(err, serr)
	}
	return mended, err
}

// repairBlocks is RepairBackings for a few. They are durable before anything else happens to the group: a record expires without another sync of a backing that was synced
// behind it.
func (g *Group) repairBlocks(found []Finding) (mended int, err error) {
	g.apply.Lock()
	defer g.apply.Unlock()
	written := map[*disk.Disk]bool{}
	for _, f := range found {
		if !f.IsBacking() {
			continue
		}
		wrote, werr := g.repairBlock(f.backing, f.block)
		if wrote {
			mended++
			written[f.backing] = true
		}
		err = errors.Join(err, werr)
	}
	for d := range written {
		if err := d.SyncBacking(); err != nil {
			return 0, g.fail(err)
		}
	}
	return mended, err
}

// repairBlock writes a block of a backing, if that is damaged. g.apply is held.
func (g *Group) repairBlock(d *disk.Disk, block int64) (wrote bool, err error) {
	release, err := g.Use(d) // what a backing was like as its disk left is noted, and stays so
	if err != nil {
		return false, nil
	}
	defer release()
	want, lsn, why, err := g.checkBlock(d, block)
	if err != nil || why == nil {
		return false, err
	}
	if !errors.Is(why, record.ErrCorrupt) {
		return false, fmt.Errorf("%w; it is not written: look at the disk under it", why)
	}
	if err := d.Restore(want, block*record.BlockSize); err != nil {
		return false, err // it is no worse than it was
	}
	g.log.Warn("a damaged block of a backing was written again, as the journal has it",
		zap.String("disk", d.Name), zap.String("backing", d.Path()), zap.Int64("block", block), zap.Uint64("lsn", uint64(lsn)))
	return true, nil
}
