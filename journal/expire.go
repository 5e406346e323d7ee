package journal

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// raiseHorizon moves the horizon, beyond which some points are kept, unless somebody came to need another one meanwhile.
func (g *Group) raiseHorizon(to record.LSN, kept []KeptPoint) error {
	g.pins.Lock()
	defer g.pins.Unlock()
	for lsn := range g.pins.from {
		if lsn < to {
			return fmt.Errorf("%w: from LSN %d on", errNeeded, lsn)
		}
	}
	for lsn := range g.pins.points {
		if _, ok := findKept(kept, lsn); !ok && lsn < to {
			return fmt.Errorf("%w: LSN %d", errNeeded, lsn)
		}
	}
	for lsn := range g.pins.markers {
		if _, ok := findKept(kept, lsn); !ok && lsn <= to {
			return fmt.Errorf("%w: marker LSN %d", errNeeded, lsn)
		}
	}
	g.kept.Store(&kept) // first: what can be viewed can be viewed at any instant
	g.horizon.Store(uint64(max(to, g.expiredTo())))
	return nil
}

// always goes on: nobody ends an expiry.
func always() error { return nil }

// fresh are the points in log files that expire which a policy may keep: the last ones of its slots of time, and markers; and those that open views are of, the
// horizon among them. next is the file behind them: while nothing stands in it, the last record may be the last one of its slot.
func (g *Group) fresh(policy retain.Policy, files []*segment.File, next *segment.File, horizon record.LSN, goOn func() error) (points []KeptPoint, err error) {
	viewed := g.viewed()
	// Of the horizon's record, which is gone: no later than the file behind it.
	at := KeptPoint{LSN: files[0].First - 1, Time: files[0].Created}
	begun := false
	marker, last := false, false
	end := func(until int64) {
		if viewed[at.LSN] || begun && g.viewable(at.LSN) && (marker || last || policy.Ends(at.Time, until)) {
			at.Until = until
			points = append(points, at)
		}
		marker = false
	}
	err = segment.ScanLog(files, files[0].Start(), func(_ *segment.File, _ int64, h record.Header) error {
		if h.LSN > horizon {
			return segment.ErrStop
		}
		if err := goOn(); err != nil {
			return err
		}
		if !g.viewable(h.LSN) {
			return nil // of a bridge, with the time of the last record before it
		}
		if h.LSN != at.LSN { // of a bridge, several have one
			end(h.Time)
			at, begun = KeptPoint{LSN: h.LSN, Time: h.Time}, true
		}
		marker = marker || h.Kind == record.KindMarker
		return nil
	})
	if err != nil {
		return nil, err
	}
	until := next.Created // no record in it is older
	last = true
	_, err = next.Scan(next.Start(), func(_ int64, h record.Header) error {
		until, last = h.Time, false
		return segment.ErrStop
	})
	if err != nil && !errors.Is(err, segment.ErrStop) && !errors.Is(err, record.ErrCorrupt) {
		return nil, err
	}
	end(until)
	return points, nil
}

// expireUpTo makes the last record of the oldest log files the horizon and
// drops the files. g.apply is held, so that no block's original is captured meanwhile.
//
// Of each block that the files have versions of: all but the newest at each point that is needed, and at the
// horizon, are forgotten. If there is a newer one behind it, views between need
// that one: it is carried over to the originals. If there is none, the backing has
// it: the block is as one that was never overwritten, whatever originals of it are left: they have ended.
//
// Definitions that are in force at any of these points are carried over too, until the next expiry. next is the file behind the last.
func (g *Group) expireUpTo(horizon record.LSN, files []*segment.File, next *segment.File) (err error) {
	if err := g.Index(); err != nil {
		return err
	}
	g.apply.orig.Keep(g.o.keepExpire())
	defer g.apply.orig.Keep(g.o.keepApply())
	policy := g.Policy()
	fresh, err := g.fresh(policy, files, next, horizon, always)
	if err != nil {
		// Damaged history is not dropped: what could not be read may be what
		// views behind it need.
		return err
	}
	points, kept := g.needed(policy, horizon, fresh, g.early())
	if len(points) > 1 {
		g.hadKept.Store(true)
	}
	old, was := g.expiredTo(), g.KeptPoints()
	if err := g.raiseHorizon(horizon, kept); err != nil {
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
			g.pins.Lock()
			g.horizon.Store(uint64(old))
			g.kept.Store(&was)
			g.pins.Unlock()
		}
	}()
	e := expiry{g: g, goOn: always, old: old, horizon: horizon, points: points, b: g.ix.NewBatch(), forget: map[*disk.Disk][]int64{}, carried: map[*disk.Disk][]int64{}}
	if e.reader, err = g.ix.FreshReader(); err != nil {
		return err
	}
	defer e.reader.Close()
	err = e.scan(files)
	if err == nil {
		err = e.finish(files)
	}
	if err != nil && !e.committed {
		e.b.Discard()
	}
	return err
}

type expiry struct {
	g         *Group
	goOn      func() error // asked for each record; its error ends the scan
	old       record.LSN   // the horizon before
	horizon   record.LSN
	points    []record.LSN // whose views stay as they are; the last one is the horizon
	reader    *index.Reader
	b         *index.Batch
	committed bool // or tried to: b is used up
	forget    map[*disk.Disk][]int64
	moves     []move
	carried   map[*disk.Disk][]int64
	defined   []index.Definition // carried over
	time      int64              // of the newest record dropped
	eats      bool               // the window becomes shorter than was promised
	written   []written          // that scan has yet to decide about
	entries   []index.Entry
	buf       []byte
	at        [viewStep]index.Pick // versions at the next point that is needed
	after     [viewStep]index.Pick // newest versions
}

// written is a run of blocks that a record has versions of.
type written struct {
	d        *disk.Disk
	first, n int64
	lsn      record.LSN
}

// maxWritten bounds the runs that are decided about together.
const maxWritten = 1 << 17

// scan decides about every record of the files up to the horizon.
func (e *expiry) scan(files []*segment.File) error {
	err := segment.ScanLog(files, files[0].Start(), func(f *segment.File, off int64, h record.Header) error {
		if h.LSN > e.horizon {
			return segment.ErrStop
		}
		if err := e.goOn(); err != nil {
			return err
		}
		return e.record(f, off, &h)
	})
	if err != nil {
		return err
	}
	return e.decide()
}

func (e *expiry) record(f *segment.File, off int64, h *record.Header) error {
	e.time = h.Time
	if h.Kind.Note() {
		return nil
	}
	d := e.g.disk(h.Disk)
	e.entries = appendEntries(e.entries[:0], h, f.Number, off)
	for _, entry := range e.entries {
		e.b.Delete(entry.Disk, entry.Unit, entry.LSN)
	}
	add := func(first, n int64) error {
		e.written = append(e.written, written{d, first, n, h.LSN})
		if len(e.written) < maxWritten {
			return nil
		}
		return e.decide()
	}
	first, n := h.Extent.Off/record.BlockSize, int64(record.Blocks(h.Extent.Len))
	if h.Kind == record.KindWrite {
		return add(first, n)
	}
	// Zeroes that were not captured were written over zeroes, and the backing
	// has them still. A trim may be of a whole disk.
	return d.CapturedIn(first, n, add)
}

// decide goes through the runs in the order of the index, in which a look-up finds next to it what the last one read.
func (e *expiry) decide() error {
	slices.SortFunc(e.written, func(a, b written) int {
		return cmp.Or(cmp.Compare(a.d.ID, b.d.ID), cmp.Compare(a.first, b.first), cmp.Compare(b.lsn, a.lsn))
	})
	for i := range e.written {
		if err := e.run(&e.written[i]); err != nil {
			return err
		}
	}
	e.written = e.written[:0]
	return nil
}

// run decides about a run's blocks: their versions are needed if they are the newest at the next point.
func (e *expiry) run(w *written) error {
	point, _ := retain.First(e.points, w.lsn)
	for first, n := w.first, w.n; n > 0; first, n = first+viewStep, n-viewStep {
		at, after := e.at[:min(n, viewStep)], e.after[:min(n, viewStep)]
		if err := e.reader.Find(w.d.ID, first, record.MaxLSN, after); err != nil {
			return err
		}
		if err := e.reader.Find(w.d.ID, first, point, at); err != nil {
			return err
		}
		for i := range at {
			if !at[i].Found || at[i].LSN != w.lsn {
				continue // a newer one there: that one decides
			}
			block := first + int64(i)
			if err := e.older(w.d, block, w.lsn); err != nil {
				return err
			}
			if after[i].LSN == w.lsn {
				e.forget[w.d] = append(e.forget[w.d], block)
			} else {
				e.moves = append(e.moves, move{w.d, block, at[i], 0})
				if len(e.points) > 1 && !w.d.Captured(block) {
					if err := e.zeroesBefore(w.d, block, w.lsn); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// zeroesBefore keeps what a block was before a version that is carried over, and that was never captured, as it was zeroes again before anything was
// applied. Of records that made it zeroes, nothing is kept: so far, the backing said that it was. It goes back to the last version that is needed.
func (e *expiry) zeroesBefore(d *disk.Disk, block int64, lsn record.LSN) error {
	from, until := lsn, lsn
	keep := func() {
		if retain.Lives(e.points, from, until) {
			zeroes := index.Pick{Found: true, LSN: from, Version: index.Version{Zero: true}}
			e.moves = append(e.moves, move{d, block, zeroes, until})
		}
	}
	for {
		var p [1]index.Pick
		if err := e.reader.Find(d.ID, block, from-1, p[:]); err != nil {
			return err
		}
		switch v := &p[0]; {
		case !v.Found && v.Until == 0: // nothing was ever written to it
			from = min(from, max(e.points[0], d.KnownSince()))
			keep()
			return nil
		case v.LSN <= e.old: // an original
			from = min(from, max(v.Until, e.points[0]))
			keep()
			return nil
		case v.Zero:
			from = v.LSN
		default:
			keep()
			if retain.Lives(e.points, v.LSN, from) {
				return nil // it is carried over itself
			}
			from, until = v.LSN, v.LSN
		}
	}
}

// older deletes the originals and carried-over versions of a block below lsn that no point is of.
// Versions of records below it are the files' that were dropped before, or this one's.
func (e *expiry) older(d *disk.Disk, block int64, lsn record.LSN) error {
	end := lsn
	var inexact *index.Pick // the newest
	err := e.reader.Chain(d.ID, block, lsn-1, func(v index.Pick) error {
		live := retain.Lives(e.points, v.LSN, end)
		if v.Until != 0 {
			live = retain.Lives(e.points, v.LSN, min(end, v.Until))
		}
		end = v.LSN
		if !live {
			e.b.Delete(d.ID, index.Unit{Index: block}, v.LSN)
			return nil
		}
		if v.Until == 0 && v.LSN <= e.old && inexact == nil { // of no record in these files
			inexact = &v
		}
		return nil
	})
	if err != nil || inexact == nil {
		return err
	}
	// Where it ends, only the records that expire say.
	until, err := e.reader.Next(d.ID, block, e.old)
	if err != nil {
		return err
	}
	e.moves = append(e.moves, move{d, block, *inexact, until})
	return nil
}

// move is a version of a block that is carried over.
type move struct {
	d     *disk.Disk
	block int64
	pick  index.Pick
	until record.LSN // 0: the next version is yet to be found
}

// carriedBytes is what a block takes that is carried over, at most: with its checksum, and padding.
const carriedBytes = record.BlockSize + record.HeaderSize + 16

// carries is how many bytes are carried over of the blocks, at most.
func (e *expiry) carries() int64 { return int64(len(e.moves)) * carriedBytes }

// carryAll keeps versions of blocks as originals that views from the horizon on
// need, up to the next version of each. Whether there is room is known before the first.
func (e *expiry) carryAll() error {
	if err := e.definitions(); err != nil {
		return err
	}
	need := e.carries() + 2*record.BlockSize // and what end notes
	for _, d := range e.defined {
		need += int64(len(d.Content)) + record.BlockSize
	}
	if need > e.g.apply.orig.Room() {
		return fmt.Errorf("%w: %d bytes must be carried over, %d are free", segment.ErrFull, need, e.g.apply.orig.Room())
	}
	for i := range e.moves {
		m := &e.moves[i]
		if m.until != 0 {
			continue
		}
		var err error
		if m.until, err = e.reader.Next(m.d.ID, m.block, m.pick.LSN); err != nil {
			return err
		}
	}
	for i := 0; i < len(e.moves); {
		j := i + 1
		for j < len(e.moves) && j-i < carryBlocks && follows(&e.moves[j-1], &e.moves[j]) {
			j++
		}
		if err := e.carry(e.moves[i:j]); err != nil {
			return err
		}
		i = j
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
	carry, _ := e.g.append.definitions.expire(e.points)
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

// carryBlocks is how many blocks are carried over at once.
const carryBlocks = 256

// follows reports whether n can be carried over in one record with m.
func follows(m, n *move) bool {
	return m.d == n.d && n.block == m.block+1 && m.pick.LSN == n.pick.LSN && m.until == n.until && together(&m.pick, &n.pick)
}

// carry keeps versions of blocks that follow each other.
func (e *expiry) carry(moves []move) error {
	m := &moves[0]
	ext := record.Extent{Off: m.block * record.BlockSize}
	ext.Len = min(int64(len(moves))*record.BlockSize, m.d.Size-ext.Off)
	if e.buf == nil {
		e.buf = make([]byte, carryBlocks*record.BlockSize)
	}
	var picks []index.Pick
	for i := range moves {
		picks = append(picks, moves[i].pick)
	}
	content := e.buf[:ext.Len]
	v := View{g: e.g, d: m.d, lsn: e.horizon}
	s := viewPool.Get().(*viewScratch)
	defer viewPool.Put(s)
	if err := v.readPicks(s, content, ext.Off, m.block, picks, false); err != nil {
		return err
	}
	if m.pick.Zero {
		content = nil
	}
	if m.until > e.horizon {
		for i := range moves {
			e.carried[m.d] = append(e.carried[m.d], moves[i].block)
		}
	}
	return e.g.keepBlocks(m.d, ext, content, record.FlagCarried, m.pick.LSN, m.until)
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
	g.rearranged.Add(1)
	defer g.rearranged.Add(1) // the files are gone then
	if err := e.commit(kept, defined); err != nil {
		return err
	}
	// The files go when nothing durable refers to them any more, and the log
	// first: without it, nobody asks for its originals.
	if err := g.store.ix.Flush(); err != nil {
		return g.fail(err)
	}
	// The file behind them may be new and empty: with its name, the head would be lost.
	if err := g.syncLog(); err != nil {
		return err
	}
	if err := g.noteExpired(e.horizon, g.KeptPoints(), g.currentMarker); errors.Is(err, segment.ErrFull) {
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

// commit has the index and what is in memory be as was decided: with the versions that are carried over, without the definitions that go.
func (e *expiry) commit(carried []index.Entry, gone []definition) error {
	g := e.g
	g.ix.Forgetting()
	// Bits first: a reader that still finds a version uses it, one that finds
	// none any more must find the bit clear.
	for d, blocks := range e.forget {
		d.Forget(blocks)
	}
	e.b.Set(carried)
	e.committed = true
	if err := g.commit(e.b); err != nil {
		return g.fail(err)
	}
	if e.eats {
		g.eaten.Store(e.time)
	}
	for d, blocks := range e.carried {
		d.Keep(blocks)
	}
	g.append.Lock()
	defer g.append.Unlock()
	g.append.markers.expire(e.horizon, g.KeptPoints())
	g.passGaps()
	g.append.definitions = slices.DeleteFunc(g.append.definitions, func(d definition) bool { return slices.Contains(gone, d) })
	for _, d := range e.defined {
		g.append.definitions.set(d.Definition, d.At)
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
		if e.g.isKept(m.LSN) {
			return true, nil
		}
		return true, e.b.DeleteMarker(m)
	})
	if err != nil {
		return nil, err
	}
	e.g.append.Lock()
	_, defined = e.g.append.definitions.expire(e.points)
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
	if err := e.g.setKept(e.b); err != nil {
		return nil, err
	}
	if window := e.g.Policy().EveryWrite; window > 0 && e.time > e.g.o.Now().UnixNano()-int64(window) {
		e.eats = true
		if err := setStateLSN(e.b, stateEaten, record.LSN(e.time)); err != nil {
			return nil, err
		}
	}
	return defined, setStateLSN(e.b, stateHorizon, e.horizon)
}

// originals finds the files of originals that no view at or behind the horizon needs.
func (e *expiry) originals() (gone []*segment.File, err error) {
	g := e.g
	if g.everKept() {
		return nil, nil // a Clean knows what else they have
	}
	for _, f := range g.set.Files(segment.Originals) {
		if f == g.apply.orig.Current() {
			continue
		}
		ended, err := endedAt(f, e.horizon, true)
		if errors.Is(err, record.ErrCorrupt) {
			continue // behind damage may be what views need
		}
		if err != nil {
			return nil, err
		}
		if !ended {
			continue
		}
		gone = append(gone, f)
	}
	return gone, nil
}
