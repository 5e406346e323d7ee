package journal

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// expireDue drops the oldest history that the group's limit, or a file system
// that is nearly full, asks for.
func (g *Group) expireDue() error {
	if g.o.Limit > 0 {
		if excess := g.set.Size() - g.o.Limit; excess > 0 {
			if _, err := g.Expire(excess); err != nil {
				return err
			}
		}
	}
	if u, err := g.fs.GetDiskUsage(g.dir); err == nil {
		// Room for the next files, so that no write has to wait for this.
		floor := g.o.keepLog() + 4*g.o.SegmentSize
		if excess := min(floor-int64(u.AvailBytes), 2*g.o.SegmentSize); excess > 0 {
			_, err := g.expireNeeded(excess)
			return err
		}
	}
	return nil
}

// expireForSpace is called when no file can be begun. It reports whether any space came free.
func (g *Group) expireForSpace() (bool, error) {
	n, err := g.expireNeeded(g.o.SegmentSize)
	if n == 0 && err == nil && g.unapplied.Load() > 0 {
		// What is not applied can not go.
		if err = g.Apply(); err == nil {
			n, err = g.expireNeeded(g.o.SegmentSize)
		}
	}
	if err != nil {
		g.log.Error("the journal is full and its oldest history can not be expired", zap.Error(err))
	}
	return n > 0, err
}

// Expire drops the group's oldest log files, and the originals that nothing
// needs without them, until at least excess bytes are free, as far as open views, holds
// and unapplied records allow. It returns how many bytes came free. The horizon moves to
// the last record dropped.
func (g *Group) Expire(excess int64) (freed int64, err error) {
	return g.expire(excess, g.oldestHold())
}

// expireNeeded is Expire for one that must have the space: no hold keeps anything from it.
func (g *Group) expireNeeded(excess int64) (freed int64, err error) {
	return g.expire(excess, record.MaxLSN)
}

func (g *Group) expire(excess int64, held record.LSN) (freed int64, err error) {
	g.apply.Lock()
	defer g.apply.Unlock()
	files := g.set.Files(segment.Log)
	var closed []retain.File
	for i := range files[:max(len(files)-1, 0)] {
		closed = append(closed, retain.File{Last: files[i+1].First - 1, Size: files[i].Alloc()})
	}
	pin, applied := g.oldestPin(), min(g.Applied(), g.Durable())
	n := min(retain.Expire(closed, excess, min(pin, held), applied), expireFiles)
	if n == 0 {
		if len(closed) == 0 {
			return 0, g.closeLog()
		}
		return 0, nil
	}
	before := g.set.Size()
	// Blocks that fall to the backing must be there durably.
	if err := g.checkpointLocked(); err != nil {
		return 0, err
	}
	err = g.expireUpTo(closed[n-1].Last, files[:n])
	if errors.Is(err, errHeld) {
		return 0, nil // the next look finds the pin
	}
	if errors.Is(err, segment.ErrFull) {
		// There is no room to carry over what views behind a near horizon
		// need. Behind the farthest one, they need next to nothing.
		n = retain.Expire(closed, math.MaxInt64, min(pin, held), applied)
		g.log.Warn("no room to expire the oldest history alone: expiring all that may go", zap.Error(err))
		err = g.expireUpTo(closed[n-1].Last, files[:n])
	}
	if err != nil {
		err = fmt.Errorf("expire history up to LSN %d: %w", closed[n-1].Last, err)
	}
	return before - g.set.Size(), err
}

// closeLog begins a new log file, so that a later expiry can drop the only one. Few
// records can have many originals: those of a trim.
func (g *Group) closeLog() error {
	g.append.Lock()
	defer g.append.Unlock()
	log := g.append.log
	if err := g.endedLocked(); err != nil || log.Current() == nil || log.Tail() == log.Current().Start() {
		return err
	}
	err := g.newLogLocked(0)
	if errors.Is(err, segment.ErrFull) {
		return nil // there is room when something is applied, or never
	}
	if err != nil {
		return g.failLocked(err)
	}
	return nil
}

// oldestPin is the oldest LSN that an open view needs.
func (g *Group) oldestPin() record.LSN {
	g.pins.Lock()
	defer g.pins.Unlock()
	pin := record.MaxLSN
	for lsn := range g.pins.views {
		pin = min(pin, lsn)
	}
	for lsn := range g.pins.markers {
		pin = min(pin, lsn-1) // its record stays too
	}
	return pin
}

// raiseHorizon moves the horizon unless a view below it was opened meanwhile.
func (g *Group) raiseHorizon(to record.LSN) error {
	g.pins.Lock()
	defer g.pins.Unlock()
	for lsn := range g.pins.views {
		if lsn < to {
			return fmt.Errorf("%w: LSN %d", errHeld, lsn)
		}
	}
	for lsn := range g.pins.markers {
		if lsn <= to {
			return fmt.Errorf("%w: marker LSN %d", errHeld, lsn)
		}
	}
	g.horizon.Store(uint64(max(to, g.expiredTo())))
	return nil
}

// expireFiles bounds the files that go in one pass, and with them its memory.
const expireFiles = 8

// expireUpTo makes the last record of the oldest log files the horizon and
// drops the files. g.apply is held, so that no block's original is captured meanwhile.
//
// Of each block that the files have versions of: all but the newest at the
// horizon are forgotten. If there is a newer one behind it, views between need
// that one: it is carried over to the originals. If there is none, the backing has
// it: the block is as one that was never overwritten.
//
// Definitions that are in force at the horizon are carried over too, until the next expiry.
func (g *Group) expireUpTo(horizon record.LSN, files []*segment.File) (err error) {
	if err := g.Index(); err != nil {
		return err
	}
	g.apply.orig.Keep(g.o.keepExpire())
	defer g.apply.orig.Keep(g.o.keepApply())
	old := g.expiredTo()
	if err := g.raiseHorizon(horizon); err != nil {
		return err
	}
	defer func() {
		if err != nil && g.alive() {
			// Nothing was committed: what was carried over counts for nothing. What of
			// it was written will stand before the mark of originals.
			g.apply.gathered, g.apply.pending = g.apply.gathered[:0], nil
			if serr := g.apply.orig.Sync(); serr != nil {
				err = g.fail(serr)
			}
			g.horizon.Store(uint64(old))
		}
	}()
	e := expiry{g: g, horizon: horizon, b: g.ix.NewBatch(), forget: map[*disk.Disk][]int64{}, carried: map[*disk.Disk][]int64{}}
	if e.reader, err = g.ix.FreshReader(); err != nil {
		return err
	}
	defer e.reader.Close()
	err = segment.ScanLog(files, files[0].Start(), func(f *segment.File, off int64, h record.Header) error {
		if h.LSN > horizon {
			return segment.ErrStop
		}
		return e.record(f, off, &h)
	})
	if err != nil {
		// Damaged history is not dropped: what could not be read may be what
		// views behind it need.
		return err
	}
	return e.finish(files)
}

type expiry struct {
	g       *Group
	horizon record.LSN
	reader  *index.Reader
	b       *index.Batch
	forget  map[*disk.Disk][]int64
	moves   []move
	carried map[*disk.Disk][]int64
	defined []index.Definition // carried over
	time    int64              // of the newest record dropped
	buf     [record.BlockSize]byte
	at      [viewStep]index.Pick // versions at the horizon
	after   [viewStep]index.Pick // newest versions
}

func (e *expiry) record(f *segment.File, off int64, h *record.Header) error {
	e.time = h.Time
	if h.Kind.Note() {
		return nil
	}
	d := e.g.disk(h.Disk)
	for _, entry := range appendEntries(nil, h, f.Number, off) {
		if err := e.b.Delete(entry.Disk, entry.Unit, entry.LSN); err != nil {
			return err
		}
	}
	first, n := h.Extent.Off/record.BlockSize, int64(record.Blocks(h.Extent.Len))
	if h.Kind == record.KindWrite {
		return e.run(d, h, first, n)
	}
	// Zeroes that were not captured were written over zeroes, and the backing
	// has them still. A trim may be of a whole disk.
	return d.CapturedIn(first, n, func(first, n int64) error { return e.run(d, h, first, n) })
}

// run decides about the blocks of a run that the record h has versions of.
func (e *expiry) run(d *disk.Disk, h *record.Header, first, n int64) error {
	for ; n > 0; first, n = first+viewStep, n-viewStep {
		at, after := e.at[:min(n, viewStep)], e.after[:min(n, viewStep)]
		if err := e.reader.Find(h.Disk, first, e.horizon, at); err != nil {
			return err
		}
		if err := e.reader.Find(h.Disk, first, record.MaxLSN, after); err != nil {
			return err
		}
		for i := range at {
			if at[i].LSN != h.LSN {
				continue // a newer one at the horizon: that one decides
			}
			block := first + int64(i)
			if err := e.older(h.Disk, block, h.LSN); err != nil {
				return err
			}
			if after[i].LSN == h.LSN {
				e.forget[d] = append(e.forget[d], block)
			} else {
				e.moves = append(e.moves, move{d, block, at[i]})
			}
		}
	}
	return nil
}

// older deletes the originals and carried-over versions of a block below lsn.
// Versions of records below it are the files' that were dropped before, or this one's.
func (e *expiry) older(id record.DiskID, block int64, lsn record.LSN) error {
	return e.reader.Chain(id, block, lsn-1, func(v record.LSN) error {
		return e.b.Delete(id, index.Unit{Index: block}, v)
	})
}

// move is a version of a block that is carried over.
type move struct {
	d     *disk.Disk
	block int64
	pick  index.Pick
}

// carryAll keeps versions of blocks as originals that views from the horizon on
// need, up to the next version of each. Whether there is room is known before the first.
func (e *expiry) carryAll() error {
	if err := e.definitions(); err != nil {
		return err
	}
	need := int64(len(e.moves))*(record.BlockSize+record.HeaderSize+16) + 2*record.BlockSize // and what end notes
	for _, d := range e.defined {
		need += int64(len(d.Content)) + record.BlockSize
	}
	if need > e.g.apply.orig.Room() {
		return fmt.Errorf("%w: %d bytes must be carried over, %d are free", segment.ErrFull, need, e.g.apply.orig.Room())
	}
	for i := range e.moves {
		if err := e.carry(&e.moves[i]); err != nil {
			return err
		}
	}
	for _, d := range e.defined {
		if err := e.g.carryDefinition(d.Definition, e.horizon); err != nil {
			return err
		}
	}
	return nil
}

// definitions finds those that must be carried over.
func (e *expiry) definitions() error {
	e.g.append.Lock()
	carry := e.g.append.definitions.carried(e.horizon)
	e.g.append.Unlock()
	for _, d := range carry {
		def, err := e.g.ix.Definition(d.name, d.since)
		if err != nil {
			return fmt.Errorf("carry over definition %s: %w", d.name, err)
		}
		e.defined = append(e.defined, carried(def, e.horizon))
	}
	return nil
}

func (e *expiry) carry(m *move) error {
	v := View{g: e.g, d: m.d, lsn: e.horizon}
	buf := e.buf[:m.d.BlockLen(m.block)]
	s := viewPool.Get().(*viewScratch)
	defer viewPool.Put(s)
	if err := v.readPicks(s, buf, m.block*record.BlockSize, m.block, []index.Pick{m.pick}, false); err != nil {
		return err
	}
	content := buf
	if m.pick.Zero {
		content = nil
	}
	next, err := e.reader.Next(m.d.ID, m.block, e.horizon)
	if err != nil {
		return err
	}
	ext := record.Extent{Off: m.block * record.BlockSize, Len: int64(len(buf))}
	e.carried[m.d] = append(e.carried[m.d], m.block)
	return e.g.keepBlocks(m.d, ext, content, record.FlagCarried, m.pick.LSN, next)
}

// finish makes the decisions durable, then removes the files.
func (e *expiry) finish(files []*segment.File) error {
	g := e.g
	if err := e.carryAll(); err != nil {
		return err
	}
	kept, err := g.syncKept()
	if err != nil {
		return g.fail(err)
	}
	gone, err := e.originals()
	if err != nil {
		return err
	}
	defined, err := e.rest()
	if err != nil {
		return err
	}
	// Bits first: a reader that still finds a version uses it, one that finds
	// none any more must find the bit clear.
	for d, blocks := range e.forget {
		d.Forget(blocks)
	}
	e.b.Set(kept)
	if err := g.commit(e.b); err != nil {
		return g.fail(err)
	}
	for d, blocks := range e.carried {
		d.Keep(blocks)
	}
	g.append.Lock()
	g.append.markers.expire(e.horizon)
	g.passGaps()
	g.pins.Lock()
	maps.DeleteFunc(g.pins.markers, func(lsn record.LSN, _ bool) bool { return lsn <= e.horizon })
	g.pins.Unlock()
	g.append.definitions = slices.DeleteFunc(g.append.definitions, func(d definition) bool { return slices.Contains(defined, d) })
	for _, d := range e.defined {
		g.append.definitions.set(d.Definition, d.At)
	}
	g.append.Unlock()
	// The files go when nothing durable refers to them any more, and the log
	// first: without it, nobody asks for its originals.
	if err := g.store.ix.Flush(); err != nil {
		return g.fail(err)
	}
	// The file behind them may be new and empty: with its name, the head would be lost.
	if err := g.syncLog(); err != nil {
		return err
	}
	if err := e.end(); errors.Is(err, segment.ErrFull) {
		g.log.Warn("the files of expired history stay until there is room to note that it has expired", zap.Error(err))
		return nil // the next expiry of them does
	} else if err != nil {
		return g.fail(err)
	}
	g.log.Info("expired the oldest history", zap.Uint64("horizon", uint64(e.horizon)), zap.Int("segments", len(files)))
	if err := errors.Join(g.set.Remove(files...), g.set.Remove(gone...)); err != nil {
		return g.fail(err)
	}
	return nil
}

// end notes among the originals that the index has come to the horizon, durably: without an index nothing else says so
// once some of the files are gone, and what was carried over would count for nothing.
func (e *expiry) end() error {
	e.g.apply.orig.Keep(0) // what it takes is little, and the files that go are much
	err := e.g.keep(record.Header{Kind: record.KindExpired, Flags: record.FlagCarried, LSN: e.horizon + 1, Durable: e.horizon}, nil)
	if err == nil {
		_, err = e.g.syncKept()
	}
	if err != nil {
		return fmt.Errorf("note that history has expired up to LSN %d: %w", e.horizon, err)
	}
	return nil
}

// rest adds to the batch what is not of blocks: bitmap pages, times, markers, definitions, the horizon.
// It returns the definitions that go.
func (e *expiry) rest() (defined []definition, err error) {
	for _, d := range e.g.disks.Load().all {
		if err := setPages(e.b, d, d.Pages(e.carried[d], e.forget[d])); err != nil {
			return nil, err
		}
	}
	err = e.g.ix.Markers(0, func(m record.Marker) (bool, error) {
		if m.LSN > e.horizon {
			return false, nil // its record is in a file that stays
		}
		return true, e.b.DeleteMarker(m)
	})
	if err != nil {
		return nil, err
	}
	e.g.append.Lock()
	defined = e.g.append.definitions.superseded(e.horizon)
	e.g.append.Unlock()
	for _, d := range defined {
		if err := e.b.DeleteDefinition(d.name, d.since); err != nil {
			return nil, err
		}
	}
	for _, d := range e.defined {
		if err := e.b.SetDefinition(d); err != nil {
			return nil, err
		}
	}
	if err := e.b.DropTimes(e.time); err != nil {
		return nil, err
	}
	return defined, setStateLSN(e.b, stateHorizon, e.horizon)
}

// originals finds the files of originals that no view at or behind the horizon needs.
func (e *expiry) originals() (gone []*segment.File, err error) {
	g := e.g
	for _, f := range g.set.Files(segment.Originals) {
		if f == g.apply.orig.Current() {
			continue
		}
		needed := false
		_, err := f.Scan(f.Start(), func(_ int64, h record.Header) error {
			if h.LSN > e.horizon {
				needed = true
				return segment.ErrStop
			}
			return nil
		})
		if needed || errors.Is(err, record.ErrCorrupt) {
			continue // behind damage may be what views need
		}
		if err != nil {
			return nil, err
		}
		gone = append(gone, f)
	}
	return gone, nil
}
