package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// notice finds out whether somebody wrote a backing while the group was closed,
// and journals what differs.
func (g *Group) notice(r *recovery) error {
	head := g.Head() // before a discontinuity moves it
	for _, d := range g.Disks() {
		if slices.Contains(r.returning, d) {
			continue // see welcome
		}
		changed, err := g.changed(d, head)
		if err != nil {
			return err
		}
		if changed {
			if err := g.discontinuity(d); err != nil {
				return fmt.Errorf("backing %s of disk %s was changed while the group was closed: journal the difference: %w", d.Path(), d.Name, err)
			}
		}
	}
	return nil
}

// changed reports whether somebody wrote a disk's backing since the group was
// closed in order at a head. If it was not, the backing is what recovery makes it.
func (g *Group) changed(d *disk.Disk, head record.LSN) (bool, error) {
	unfinished, err := g.ix.State(stateChanged(d.ID))
	if err != nil || len(unfinished) > 0 {
		return len(unfinished) > 0, err
	}
	was, err := g.ix.State(stateBacking(d.ID))
	if err != nil {
		return false, err
	}
	now, err := g.fingerprint(d, head)
	if err != nil {
		return false, err
	}
	if len(was) != len(now) || !signedAt(was, head) {
		return false, nil
	}
	if !slices.Equal(was, now) {
		return true, nil
	}
	if binary.LittleEndian.Uint64(now[8:]) != 0 {
		return false, nil
	}
	return g.spotCheck(d)
}

// signedAt reports whether a fingerprint was taken at a head.
func signedAt(fp []byte, head record.LSN) bool {
	return len(fp) == 16 && binary.LittleEndian.Uint64(fp) == uint64(head)
}

// spotCheck compares the blocks that the journal wrote last with the backing:
// a guest that ran without Tidemark will have changed some of them.
func (g *Group) spotCheck(d *disk.Disk) (differs bool, err error) {
	const most = 1024
	logs := g.set.Files(segment.Log)
	var exts []record.Extent
	for i := len(logs) - 1; i >= 0 && len(exts) == 0; i-- {
		err := segment.ScanLog(logs[i:i+1], logs[i].Start(), func(_ *segment.File, _ int64, h record.Header) error {
			if h.Disk == d.ID && h.Extent.Len > 0 && h.LSN <= g.Head() {
				exts = append(exts, h.Extent)
			}
			return nil
		})
		if err != nil && !errors.Is(err, record.ErrCorrupt) {
			return false, err
		}
	}
	if len(exts) > most {
		exts = exts[len(exts)-most:]
	}
	for _, ext := range exts {
		ext.Len = min(ext.Len, viewStep*record.BlockSize)
		err := g.compareBacking(d, ext, func(record.Extent, []byte) error {
			differs = true
			return segment.ErrStop
		})
		if differs || err != nil {
			return differs, err
		}
	}
	return false, nil
}

// discontinuity journals what the backing holds in the stead of what it should,
// as far as the journal knows, and a marker behind it.
// From the marker on, views are true of every block; views before it are refused the
// blocks that the journal never held: they may be among the changed ones.
func (g *Group) discontinuity(d *disk.Disk) error {
	g.log.Warn("the backing was changed outside of Tidemark: journaling the difference as a discontinuity",
		zap.String("disk", d.Name), zap.String("backing", d.Path()))
	if err := g.Index(); err != nil {
		return err
	}
	// From the first record on, the head tells no more that this is not done.
	b := g.ix.NewBatch()
	if err := b.SetState(stateChanged(d.ID), []byte{1}); err != nil {
		return err
	}
	if err := g.commitApart(b); err != nil {
		return err
	}
	// Whatever is kept as an original from now on is what the outsider left.
	d.SetKnownSince(g.Head() + 1)
	var bytes int64
	for off := int64(0); off < d.Size; off += viewStep * record.BlockSize {
		ext := record.Extent{Off: off, Len: min(d.Size-off, viewStep*record.BlockSize)}
		err := g.compareBacking(d, ext, func(ext record.Extent, content []byte) error {
			bytes += ext.Len
			if err := g.relieve(); err != nil {
				return err
			}
			return g.appendAligned([]Op{{Kind: record.KindWrite, Disk: d, Ext: ext, Data: content, flags: record.FlagDiscontinuity}})
		})
		if err != nil {
			return err
		}
	}
	m := record.Marker{
		Label: fmt.Sprintf("discontinuity-%s-%s", d.Name, g.o.Now().UTC().Format("20060102T150405.000000000Z")),
		Asked: record.Crash, Consistency: record.Crash, By: "tidemark",
	}
	if err := g.appendMarker(&m, record.FlagDiscontinuity, d.ID); err != nil {
		return err
	}
	d.SetKnownSince(m.LSN)
	if err := g.indexTo(m.LSN); err != nil {
		return err
	}
	b = g.ix.NewBatch()
	err := errors.Join(setStateLSN(b, stateKnown(d.ID), m.LSN), b.SetState(stateChanged(d.ID), nil))
	if err == nil {
		// Before anybody writes the disk: found unfinished, what the backing lacks then would be taken for
		// what an outsider did.
		err = g.commitApart(b)
	}
	g.log.Warn("discontinuity journaled", zap.String("disk", d.Name), zap.Int64("bytes", bytes),
		zap.Uint64("lsn", uint64(m.LSN)), zap.String("label", m.Label), zap.Time("time", m.Time.Truncate(time.Second)))
	return err
}

// commitApart commits a batch durably beside rounds of Apply.
func (g *Group) commitApart(b *index.Batch) error {
	g.apply.Lock()
	err := g.commit(b)
	g.apply.Unlock()
	if err != nil {
		return err
	}
	return g.store.ix.Flush()
}

// relieve does what Run does while Run has not begun: without it, admission
// would wait for ever.
func (g *Group) relieve() error {
	g.append.Lock()
	full := g.muchUnappliedLocked() || !g.roomLocked()
	behind := g.append.lag > indexLag/2
	g.append.Unlock()
	if behind {
		if err := errors.Join(g.Sync(), g.Index()); err != nil {
			return err
		}
	}
	if full {
		return g.Apply()
	}
	return nil
}

// compareBacking calls fn with each run of blocks that the journal holds in a
// version that is not what the backing has, and with what that is. ext is at most viewStep
// blocks, whole ones.
func (g *Group) compareBacking(d *disk.Disk, ext record.Extent, fn func(record.Extent, []byte) error) error {
	first, n := ext.Off/record.BlockSize, record.Blocks(ext.Len)
	picks := make([]index.Pick, n)
	r, err := g.ix.FreshReader()
	if err != nil {
		return err
	}
	defer r.Release()
	if err := r.Find(d.ID, first, g.Head(), picks); err != nil {
		return err
	}
	if !slices.ContainsFunc(picks, func(p index.Pick) bool { return p.Found }) {
		return nil
	}
	buf := make([]byte, ext.Len)
	if err := d.ReadBacking(buf, ext.Off, false); err != nil {
		return err
	}
	block := func(i int) []byte { return buf[i*record.BlockSize : min(len(buf), (i+1)*record.BlockSize)] }
	for i := 0; i < n; {
		j := i
		for ; j < n && picks[j].Found; j++ {
			sum, err := g.pickSum(&picks[j], len(block(j)))
			if err != nil {
				return err
			}
			if sum == record.Checksum(block(j)) {
				break
			}
		}
		if j > i {
			off := int64(i) * record.BlockSize
			part := buf[off:min(len(buf), j*record.BlockSize)]
			if err := fn(record.Extent{Off: ext.Off + off, Len: int64(len(part))}, part); err != nil {
				if errors.Is(err, segment.ErrStop) {
					return nil
				}
				return err
			}
		}
		i = j + 1
	}
	return nil
}

var zeroBlock [record.BlockSize]byte

// pickSum is the checksum of a version's block of n bytes.
func (g *Group) pickSum(p *index.Pick, n int) (uint32, error) {
	switch {
	case p.Zero:
		return record.Checksum(zeroBlock[:n]), nil
	case p.Class == 0:
		return p.Aux, nil
	}
	f, err := g.set.Acquire(p.File)
	if err != nil {
		return 0, err
	}
	defer f.Release()
	var b [4]byte
	if err := f.ReadAt(b[:], p.SumOff(), false); err != nil {
		return 0, err
	}
	return record.Sums(b[:]).At(0), nil
}
