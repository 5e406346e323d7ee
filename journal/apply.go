package journal

import (
	"errors"
	"fmt"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Apply writes everything that is journaled when it is called to the backings.
// A lack of room for a new segment of originals leaves the group full, and
// Apply may be called again; any other error fails it.
func (g *Group) Apply() error {
	g.apply.Lock()
	defer g.apply.Unlock()
	return g.applyLocked()
}

func (g *Group) applyLocked() error {
	if g.apply.round == 0 && !g.freeze() {
		return nil
	}
	// P1: the records of the round are durable before any byte of them goes
	// to a backing.
	if err := g.syncTo(g.apply.round); err != nil {
		return err
	}
	defer g.originsDone()
	total, done := 0, 0.0
	for _, d := range g.disks.Load().all {
		total += d.FrozenWeight()
	}
	for _, d := range g.disks.Load().all {
		weight := d.FrozenWeight()
		if weight == 0 {
			continue
		}
		share := float64(weight) / float64(total)
		err := d.Apply(func(part float64) error {
			g.progress(done + part*share)
			if !g.checkpointDueLocked(g.o.Now()) {
				return nil
			}
			return g.checkpointLocked() // a round may be long
		})
		if err != nil {
			return g.applyFailed(err)
		}
		done += share
	}
	g.roundDone()
	return nil
}

// progress notes how much of a round is done, for the writes that wait for it.
func (g *Group) progress(done float64) {
	g.append.Lock()
	defer g.append.Unlock()
	g.append.underWay.done = done
	g.append.room.Broadcast()
}

// freeze begins a round that covers every record so far, be they markers alone.
// It reports whether there is one.
func (g *Group) freeze() bool {
	g.append.Lock()
	defer g.append.Unlock()
	found := false
	for _, d := range g.disks.Load().all {
		found = d.Freeze() || found
	}
	head := record.LSN(g.appended.Load())
	if !found && head == g.Applied() {
		return false
	}
	g.apply.round = head
	g.append.underWay = round{bytes: g.unapplied.Load(), owed: g.owed.Load(), weight: g.append.weight}
	g.append.oldest = g.o.Now()
	return true
}

// roundDone ends a round. Until all of its disks are done, what is saved of the overlays
// must have all that the applied LSN does not cover.
func (g *Group) roundDone() {
	for _, d := range g.disks.Load().all {
		d.Drop()
	}
	g.append.Lock()
	defer g.append.Unlock()
	g.applied.Store(uint64(g.apply.round))
	g.apply.round = 0
	g.append.weight -= g.append.underWay.weight
	g.owed.Add(-g.append.underWay.owed)
	if g.unapplied.Add(-g.append.underWay.bytes) == 0 {
		g.append.oldest = time.Time{}
	}
	g.append.underWay = round{}
	g.append.full = nil
	g.limitOwedLocked()
	g.append.room.Broadcast()
}

func (g *Group) applyFailed(err error) error {
	if !errors.Is(err, segment.ErrFull) {
		return g.fail(err)
	}
	g.append.Lock()
	defer g.append.Unlock()
	g.append.full = fmt.Errorf("the journal of group %s has no room for originals: %w", g.name, err)
	g.append.room.Broadcast()
	return g.append.full
}

// Checkpoint makes what is applied durable and notes its LSN, and saves what is not:
// recovery starts from there. Everything indexed is durable when it returns.
func (g *Group) Checkpoint() error {
	g.apply.Lock()
	defer g.apply.Unlock()
	return g.checkpointLocked()
}

func (g *Group) checkpointLocked() error {
	applied := g.Applied()
	if g.apply.round == 0 && uint64(applied) == g.checkpointed.Load() && g.apply.saved == g.Head() && !g.apply.last.IsZero() {
		return nil
	}
	if uint64(applied) != g.checkpointed.Load() || g.apply.last.IsZero() {
		for _, d := range g.disks.Load().all {
			if err := d.SyncBacking(); err != nil {
				return g.fail(err)
			}
		}
	}
	g.append.Lock()
	bytes := g.append.bytes
	g.append.Unlock()
	if err := g.indexTo(g.Head()); err != nil {
		return err
	}
	last := record.LSN(g.indexed.Load())
	b := g.ix.NewBatch()
	if err := setStateLSN(b, stateApplied, applied); err != nil {
		return g.fail(err)
	}
	if err := g.commit(b); err != nil {
		return g.fail(err)
	}
	if err := g.store.ix.Flush(); err != nil {
		return g.fail(err)
	}
	g.apply.last = g.o.Now()
	g.checkpointed.Store(uint64(applied))
	g.apply.logBytes = bytes
	return g.saveOverlays(last)
}

// checkpointDueLocked reports whether enough was appended, or time has passed, since the
// last checkpoint. g.apply is held.
func (g *Group) checkpointDueLocked(now time.Time) bool {
	g.append.Lock()
	defer g.append.Unlock()
	return g.append.bytes-g.apply.logBytes >= g.o.checkpointBytes || now.Sub(g.apply.last) >= checkpointAge
}

// Original implements disk.Journal: called by Apply, with g.apply held.
func (g *Group) Original(d *disk.Disk, ext record.Extent, content []byte, until record.LSN) error {
	return g.origins(d, ext.Off/record.BlockSize, int64(record.Blocks(ext.Len)), func(first, n int64, since record.LSN) error {
		part := record.Extent{Off: first * record.BlockSize}
		part.Len = min(n*record.BlockSize, ext.End()-part.Off)
		var of []byte
		if content != nil {
			of = content[part.Off-ext.Off:][:part.Len]
		}
		return g.keepBlocks(d, part, of, 0, since, until)
	})
}

// originLSN is the version that an original captured now stands for: the oldest
// LSN that can fall to the backing.
func (g *Group) originLSN(d *disk.Disk) record.LSN {
	return max(g.expiredTo(), d.KnownSince())
}

// gatherBytes is how much of the originals is written together, in bytes.
const gatherBytes = 1 << 20

// keepBlocks adds content that an extent had from one LSN on to the originals, until the record at another overwrote it. g.apply is held.
func (g *Group) keepBlocks(d *disk.Disk, ext record.Extent, content []byte, flags uint8, from, until record.LSN) error {
	// In pieces of which many fit into a file: what is left at its end is lost.
	for most := max(g.o.SegmentSize/16&^(record.BlockSize-1), record.BlockSize); int64(len(content)) > most; {
		if err := g.keepBlocks(d, record.Extent{Off: ext.Off, Len: most}, content[:most], flags, from, until); err != nil {
			return err
		}
		ext.Off, ext.Len, content = ext.Off+most, ext.Len-most, content[most:]
	}
	if from >= until {
		return fmt.Errorf("keep what %v of disk %s held: from LSN %d until LSN %d", ext, d.Name, from, until)
	}
	h := record.Header{LSN: until, Durable: from, Extent: ext, Disk: d.ID, Kind: record.KindOriginal, Flags: flags | record.FlagExact}
	if content == nil {
		h.Kind = record.KindHole
	}
	return g.keep(h, content)
}

// keep adds a record to the originals, with the checksums that it has, or its content's. It is written by the next syncKept, and
// gathered until then, because extents are often single blocks. g.apply is held.
func (g *Group) keep(h record.Header, content []byte) error {
	a := &g.apply
	h.Time, h.Payload = g.o.Now().UnixNano(), len(content)
	size := h.Size()
	if len(a.gathered)+int(size) > gatherBytes || !a.orig.Fits(int64(len(a.gathered))+size) {
		if err := g.writeGathered(); err != nil {
			return err
		}
		if !a.orig.Fits(size) {
			if err := a.orig.Roll(g.header(g.Head()), size); err != nil {
				return fmt.Errorf("begin a segment of originals: %w", err)
			}
		}
	}
	h.Salt = a.orig.Current().Salt
	if h.Sums == nil {
		a.sums = record.AppendSums(a.sums[:0], content)
		h.Sums = a.sums
	}
	off := a.orig.Tail() + int64(len(a.gathered))
	a.pending = appendOriginal(a.pending, &h, a.orig.Current().Number, off)
	g.originals.Add(size)
	a.gathered = h.Append(a.gathered)
	a.gathered = append(a.gathered, content...)
	a.gathered = append(a.gathered, make([]byte, size-int64(h.EncodedSize())-int64(len(content)))...)
	return nil
}

func (g *Group) writeGathered() error {
	a := &g.apply
	if len(a.gathered) == 0 {
		return nil
	}
	err := a.orig.Append([][]byte{a.gathered}, int64(len(a.gathered)))
	a.gathered = a.gathered[:0]
	return err
}

// syncKept makes what was kept durable and returns its index entries.
func (g *Group) syncKept() ([]index.Entry, error) {
	if err := g.writeGathered(); err != nil {
		return nil, err
	}
	if err := g.apply.orig.Sync(); err != nil {
		return nil, err
	}
	entries := g.apply.pending
	g.apply.pending = nil
	return entries, nil
}

// appendOriginal appends the index entries of an original. They are of single
// blocks, so that each can be forgotten when its block's history is.
func appendOriginal(dst []index.Entry, h *record.Header, file uint32, off int64) []index.Entry {
	first := h.Extent.Off / record.BlockSize
	for i := range record.Blocks(h.Extent.Len) {
		e := index.Entry{Disk: h.Disk, Unit: index.Unit{Index: first + int64(i)}, LSN: h.Durable}
		if h.Kind == record.KindHole {
			e.Zero = true
		} else {
			e.File, e.Payload = file, uint32(off+int64(h.EncodedSize())+int64(i)*record.BlockSize)
			e.Aux = h.Sums.At(i)
		}
		if h.Flags&record.FlagExact != 0 {
			e.Until = h.LSN
		}
		dst = append(dst, e)
	}
	return dst
}

// CommitOriginals implements disk.Journal.
func (g *Group) CommitOriginals(d *disk.Disk, pages map[int64][]byte) error {
	entries, err := g.syncKept()
	if err != nil {
		return err
	}
	b := g.ix.NewBatch()
	b.Set(entries)
	if err := setPages(b, d, pages); err != nil {
		return err
	}
	return g.commit(b)
}

func setPages(b *index.Batch, d *disk.Disk, pages map[int64][]byte) error {
	for n, bits := range pages {
		if err := b.SetCaptured(d.ID, n, bits); err != nil {
			return err
		}
	}
	return nil
}
