package journal

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Thin lets go of kept points that policy, pins and holds keep no longer, and reports whether there were any. What they alone needed is dropped by Clean.
func (g *Group) Thin() (bool, error) {
	g.apply.Lock()
	defer g.apply.Unlock()
	was := g.KeptPoints()
	kept := g.chosen(g.Policy(), was, g.expiredTo(), g.early())
	return g.letGoLocked(kept)
}

// giveUp lets go of some of the points that are kept for the policy's sake alone, those that go first, as space is short. It reports whether there were any.
func (g *Group) giveUp() (bool, error) {
	g.apply.Lock()
	defer g.apply.Unlock()
	was := g.KeptPoints()
	points, why := g.judge(g.Policy(), was, g.expiredTo())
	g.pins.Lock()
	for i := range was {
		if g.pins.points[was[i].LSN] > 0 {
			why[i] = retain.Reason{} // open views need it: it stays
		}
	}
	g.pins.Unlock()
	order := retain.Sacrifice(points, why)
	if len(order) == 0 {
		return false, nil
	}
	order = order[:(len(order)+7)/8]
	goes := make([]bool, len(was))
	for _, i := range order {
		goes[i] = true
	}
	g.log.Warn("space is short: points go that the policy would keep", zap.Int("points", len(order)))
	var kept []KeptPoint
	for i := range was {
		if !goes[i] {
			kept = append(kept, was[i])
		}
	}
	return g.letGoLocked(kept)
}

// letGoLocked keeps no other points than those given, and those that somebody needs. It is durable when it returns: what Apply keeps from
// then on may not do for the others. It reports whether any went; without room to note that, none do. g.apply is held.
func (g *Group) letGoLocked(kept []KeptPoint) (bool, error) {
	was := g.KeptPoints()
	g.pins.Lock()
	kept = g.withPinned(kept)
	g.kept.Store(&kept) // first: nobody comes to need what is not in the note
	g.pins.Unlock()
	if len(kept) == len(was) {
		return false, nil
	}
	if err := g.noteExpired(g.expiredTo(), kept, g.currentMarker); errors.Is(err, segment.ErrFull) {
		g.pins.Lock()
		g.kept.Store(&was)
		g.pins.Unlock()
		return false, err
	} else if err != nil {
		return false, g.fail(err)
	}
	g.append.Lock()
	gone := g.append.markers.expire(g.expiredTo(), kept)
	g.append.Unlock()
	b := g.ix.NewBatch()
	for _, m := range gone {
		if err := b.DeleteMarker(m); err != nil {
			return true, g.fail(err)
		}
	}
	if err := g.setKept(b); err != nil {
		return true, g.fail(err)
	}
	if err := errors.Join(g.commit(b), g.store.ix.Flush()); err != nil {
		return true, g.fail(err)
	}
	g.log.Info("let go of points beyond the window", zap.Int("points", len(was)-len(kept)), zap.Int("kept", len(kept)))
	return true, nil
}

// withPinned are some kept points with those others that are kept at present and pinned, or viewed. g.pins is held.
func (g *Group) withPinned(kept []KeptPoint) []KeptPoint {
	var all []KeptPoint
	for _, k := range g.KeptPoints() {
		_, stays := findKept(kept, k.LSN)
		if stays || g.pins.markers[k.LSN] || g.pins.points[k.LSN] > 0 {
			all = append(all, k)
		}
	}
	return all
}

// allPoints are the LSNs beyond the window that can be viewed, in their order, and the horizon.
func (g *Group) allPoints() []record.LSN {
	points, horizon := g.keptLSNs(), g.expiredTo()
	if n := len(points); n == 0 || points[n-1] < horizon {
		points = append(points, horizon)
	}
	return points
}

// cleanBytes is how many bytes of a file a step looks at with g.apply held. Of a file less than one part in cleanShare of which is needed, that is copied, and the file goes.
const (
	cleanBytes = 4 << 20
	cleanShare = 2
)

// Clean drops originals that no point is of any more: of files that mostly hold such it copies the rest, and returns how many bytes came free. It goes
// on where it, or a crash, left off. Views and what else reads them find them all the while, and what is applied waits for a step at most.
func (g *Group) Clean() (freed int64, err error) {
	return g.clean(cleanShare, func() error { return nil })
}

// clean is Clean with a pause behind each step, whose error ends it. A file stays as it is if points are of no less than the given part of it.
func (g *Group) clean(share int64, pause func() error) (freed int64, err error) {
	g.cleaning.Lock()
	defer g.cleaning.Unlock()
	if !g.everKept() {
		return 0, nil // expiries have dropped them
	}
	defer g.noteKeptLocked()
	before := g.set.Size()
	var gone []*segment.File
	files := g.set.Files(segment.Originals)
	g.cleaning.mended.Range(func(number, _ any) bool {
		delete(g.cleaning.needs, number.(uint32))
		g.cleaning.mended.Delete(number)
		return true
	})
	g.cleaning.needs.forget(files)
all:
	for _, f := range files[:max(len(files)-1, 0)] {
		most, err := g.mostlyNeeded(f, share)
		if errors.Is(err, record.ErrCorrupt) {
			g.log.Error("a file of originals is damaged, and stays", zap.Error(err)) // what can not be read may be what points need
			g.cleaning.needs[f.Number] = allNeeded
			continue
		}
		if err != nil {
			return 0, err
		}
		if most {
			continue
		}
		delete(g.cleaning.needs, f.Number) // what is copied is needed here no more
		switch err := g.cleanFile(f, pause); {
		case errors.Is(err, record.ErrCorrupt):
			g.log.Error("a file of originals is damaged, and stays", zap.Error(err))
			g.cleaning.needs[f.Number] = allNeeded
			continue
		case errors.Is(err, segment.ErrFull):
			break all // what comes free now makes room for it
		case err != nil:
			return 0, fmt.Errorf("clean %s: %w", f.Path, err)
		}
		gone = append(gone, f)
	}
	if len(gone) == 0 {
		return 0, nil
	}
	if dropped, err := g.dropCleaned(gone); err != nil || !dropped {
		return 0, err
	}
	freed = before - g.set.Size()
	g.log.Info("dropped originals that no point is of any more", zap.Int("segments", len(gone)), zap.Int64("bytes", freed))
	return freed, nil
}

// noteKeptLocked has Bound know what the files that were looked at have for which points, by what they take up, compact or not. g.cleaning is held.
func (g *Group) noteKeptLocked() {
	all := fileNeeds{of: map[Range]int64{}}
	for _, f := range g.set.Files(segment.Originals) {
		n := g.cleaning.needs[f.Number]
		for r, bytes := range n.of {
			all.of[r] += int64(float64(bytes) / float64(n.total) * float64(f.Alloc()))
		}
	}
	g.keptBytes.Store(&all)
}

// mostlyNeeded reports whether a file of originals is to stay as it is.
func (g *Group) mostlyNeeded(f *segment.File, share int64) (bool, error) {
	points := g.allPoints()
	n, ok := g.cleaning.needs[f.Number]
	if !ok {
		if all, err := g.allEnded(f); err != nil || !all {
			return true, err
		}
		var err error
		if n, err = g.readNeeds(f, points); err != nil {
			return true, err
		}
		g.cleaning.needs[f.Number] = n
	}
	return n.total > 0 && n.needed(points)*share >= n.total, nil
}

// needs is what is known of files of originals that have all ended, by their numbers.
type needs map[uint32]fileNeeds

// forget forgets what is known of files that are gone.
func (n needs) forget(files []*segment.File) {
	maps.DeleteFunc(n, func(number uint32, _ fileNeeds) bool {
		return !slices.ContainsFunc(files, func(f *segment.File) bool { return f.Number == number })
	})
}

// fileNeeds says how many bytes of a file there are for each run of points that they are of. No point comes between these any more.
type fileNeeds struct {
	total int64
	of    map[Range]int64
}

// allNeeded is of a file that can not be cleaned.
var allNeeded = fileNeeds{total: 1, of: map[Range]int64{{0, record.MaxLSN - 1}: 1}}

// readNeeds counts what the index finds in a file, and some point is of: the rest may have been copied already.
func (g *Group) readNeeds(f *segment.File, points []record.LSN) (n fileNeeds, err error) {
	reader, err := g.ix.FreshReader()
	if err != nil {
		return n, err
	}
	defer reader.Close()
	n.of = map[Range]int64{}
	_, err = f.Scan(f.Start(), func(off int64, h record.Header) error {
		if h.Extent.Len == 0 {
			return nil
		}
		n.total += h.Size()
		if !lives(points, &h) {
			return nil
		}
		first, _ := retain.First(points, h.Durable)
		i, _ := slices.BinarySearch(points, h.LSN)
		return eachFound(reader, f, off, &h, func(_, blocks int) error {
			n.of[Range{first, points[i-1]}] += h.Size() * int64(blocks) / int64(record.Blocks(h.Extent.Len))
			return nil
		})
	})
	return n, err
}

// eachFound calls fn with the runs of an original's blocks that the index finds where it stands: others were copied elsewhere, or forgotten, and another one is of the same
// LSN.
func eachFound(reader *index.Reader, f *segment.File, off int64, h *record.Header, fn func(first, n int) error) error {
	entries := appendOriginal(nil, h, f.Number, off)
	for i := 0; i < len(entries); {
		n := 0
		for ; i+n < len(entries); n++ {
			e := &entries[i+n]
			now, ok, err := reader.At(e.Disk, e.Unit, e.LSN)
			if err != nil {
				return err
			}
			if !ok || now != e.Version {
				break
			}
		}
		if n > 0 {
			if err := fn(i, n); err != nil {
				return err
			}
		}
		i += n + 1
	}
	return nil
}

// needed is how many bytes any of some points is of.
func (n fileNeeds) needed(points []record.LSN) (bytes int64) {
	for r, size := range n.of {
		if retain.Lives(points, r.First, r.Last+1) {
			bytes += size
		}
	}
	return bytes
}

// lives reports whether an original whose end lies beyond the window is of any of some points.
func lives(points []record.LSN, h *record.Header) bool {
	return h.Flags&record.FlagExact != 0 && retain.Lives(points, h.Durable, h.LSN)
}

// cleanFile has the index find what is needed of a file elsewhere, and what is not, nowhere.
func (g *Group) cleanFile(f *segment.File, pause func() error) error {
	for off := f.Start(); ; {
		end, err := g.cleanStep(f, off)
		if err != nil || end == off {
			return err
		}
		if err := pause(); err != nil {
			return err
		}
		off = end
	}
}

// cleanStep does so with what begins in the next cleanBytes of it, and returns where it ended.
func (g *Group) cleanStep(f *segment.File, from int64) (end int64, err error) {
	g.apply.Lock()
	defer g.apply.Unlock()
	if err := g.ended(); err != nil {
		return from, err
	}
	g.apply.orig.Keep(g.o.keepExpire())
	defer g.apply.orig.Keep(g.o.keepApply())
	reader, err := g.ix.FreshReader()
	if err != nil {
		return from, err
	}
	defer reader.Close()
	b := g.ix.NewBatch()
	c := cleaner{g: g, f: f, reader: reader, points: g.allPoints(), b: b}
	end, err = f.Scan(from, func(off int64, h record.Header) error {
		if off >= from+cleanBytes {
			return segment.ErrStop
		}
		return c.record(off, &h)
	})
	if err != nil && !errors.Is(err, segment.ErrStop) {
		b.Discard()
		g.apply.gathered, g.apply.pending = g.apply.gathered[:0], nil // what of it was written counts, and is true
		if serr := g.apply.orig.Sync(); serr != nil {
			err = g.fail(serr)
		}
		return from, err
	}
	entries, err := g.syncKept()
	if err != nil {
		return from, g.fail(err)
	}
	b.Set(entries)
	g.rearranged.Add(1)
	defer g.rearranged.Add(1)
	if err := g.commit(b); err != nil {
		return from, g.fail(err)
	}
	return end, nil
}

// cleaner goes through a file of originals with the apply lock held.
type cleaner struct {
	g      *Group
	f      *segment.File
	reader *index.Reader
	points []record.LSN
	b      *index.Batch
	buf    []byte
}

// record has the index find an original at off elsewhere, or not at all if no point is of it.
func (c *cleaner) record(off int64, h *record.Header) (err error) {
	if h.Extent.Len == 0 {
		return nil
	}
	if !lives(c.points, h) {
		return eachFound(c.reader, c.f, off, h, func(first, n int) error {
			for _, e := range appendOriginal(nil, h, c.f.Number, off)[first : first+n] {
				c.b.Delete(e.Disk, e.Unit, e.LSN)
			}
			return nil
		})
	}
	if c.buf, err = c.f.VerifyPayload(off, *h, c.buf); err != nil {
		return err
	}
	return eachFound(c.reader, c.f, off, h, func(first, n int) error { return c.g.keep(partOf(h, first, n), partBytes(h, c.buf, first, n)) })
}

// partOf is what carries over some blocks of an original.
func partOf(h *record.Header, first, n int) record.Header {
	part := *h
	part.Flags |= record.FlagCarried
	part.Extent.Off += int64(first) * record.BlockSize
	part.Extent.Len = min(int64(n)*record.BlockSize, h.Extent.End()-part.Extent.Off)
	if h.Kind == record.KindOriginal {
		part.Sums = h.Sums[4*first : 4*(first+n)]
	}
	return part
}

// partBytes is their content.
func partBytes(h *record.Header, content []byte, first, n int) []byte {
	if h.Kind != record.KindOriginal {
		return nil
	}
	return content[first*record.BlockSize : min((first+n)*record.BlockSize, h.Payload)]
}

// dropCleaned removes files that nothing durable refers to any more, if there is room to note it: what they said of the horizon and of definitions is said again first.
func (g *Group) dropCleaned(gone []*segment.File) (dropped bool, err error) {
	g.apply.Lock()
	defer g.apply.Unlock()
	if err := g.ended(); err != nil {
		return false, err
	}
	if err := g.store.ix.Flush(); err != nil {
		return false, g.fail(err)
	}
	horizon := g.expiredTo()
	if err := g.carryDefinitions(horizon); err != nil {
		return false, err
	}
	if err := g.noteExpired(horizon, g.KeptPoints(), g.currentMarker); errors.Is(err, segment.ErrFull) {
		g.log.Warn("files of cleaned originals stay until there is room to note that they go", zap.Error(err))
		return false, nil // the next Clean finds them
	} else if err != nil {
		return false, g.fail(err)
	}
	if err := g.set.Remove(gone...); err != nil {
		return false, g.fail(err)
	}
	return true, nil
}

// carryDefinitions says again which definitions were carried over by the expiry to a horizon.
func (g *Group) carryDefinitions(horizon record.LSN) error {
	g.append.Lock()
	all := slices.Clone(g.append.definitions)
	g.append.Unlock()
	for _, d := range all {
		if d.at != carried(record.Definition{}, horizon).At {
			continue
		}
		def, err := g.ix.Definition(d.name, d.since)
		if err != nil {
			return fmt.Errorf("carry over definition %s: %w", d.name, err)
		}
		if err := g.carryDefinition(def, horizon); err != nil {
			return err
		}
	}
	return nil
}

// origins says since when each of some adjacent blocks without a version in the window is what its backing holds: where the last one that is kept has
// ended, or before anything that can be viewed. It calls fn with runs that have it in common. g.apply is held.
func (g *Group) origins(d *disk.Disk, first, n int64, fn func(first, n int64, since record.LSN) error) error {
	if !g.everKept() {
		return fn(first, n, g.originLSN(d))
	}
	if g.apply.kept == nil {
		reader, err := g.ix.FreshReader()
		if err != nil {
			return err
		}
		g.apply.kept = reader
	}
	picks := make([]index.Pick, n)
	if err := g.apply.kept.Find(d.ID, first, g.expiredTo(), picks); err != nil {
		return err
	}
	oldest := g.allPoints()[0]
	since := func(p *index.Pick) record.LSN {
		switch {
		case p.Found: // a part of the same, kept when there was no room for the rest
			return p.LSN
		case p.Until != 0:
			return max(p.Until, d.KnownSince())
		}
		return max(oldest, d.KnownSince())
	}
	for i := 0; i < len(picks); {
		j := i + 1
		for j < len(picks) && since(&picks[j]) == since(&picks[i]) {
			j++
		}
		if err := fn(first+int64(i), int64(j-i), since(&picks[i])); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// originsDone ends a use of origins: others may change what is kept.
func (g *Group) originsDone() {
	if g.apply.kept != nil {
		g.apply.kept.Close()
		g.apply.kept = nil
	}
}

// closeOriginals begins a new file of originals if all in the present one has ended, and it has some bytes, so that a Clean can look at it.
func (g *Group) closeOriginals(least int64) error {
	g.apply.Lock()
	defer g.apply.Unlock()
	f := g.apply.orig.Current()
	if f == nil || !g.everKept() || g.apply.orig.Tail()-f.Start() < max(least, 1) {
		return nil
	}
	all, err := g.allEnded(f)
	if errors.Is(err, record.ErrCorrupt) {
		return nil // it is said when the file is cleaned
	}
	if err != nil || !all {
		return err
	}
	if err := g.apply.orig.Roll(g.header(g.Head()), 0); errors.Is(err, segment.ErrFull) {
		return nil
	} else if err != nil {
		return g.fail(err)
	}
	// The index is told of the file with the next commit, and that may be durable before anything stands in the file.
	if err := g.apply.orig.Sync(); err != nil {
		return g.fail(err)
	}
	return nil
}

// allEnded reports whether every original of a file ends beyond the window.
func (g *Group) allEnded(f *segment.File) (bool, error) { return endedAt(f, g.expiredTo(), false) }

// endedAt reports whether every original of a file ends at a horizon or before, and, if they count, whatever else it says.
func endedAt(f *segment.File, horizon record.LSN, notes bool) (bool, error) {
	end, err := f.Scan(f.Start(), func(_ int64, h record.Header) error {
		if (notes || h.Extent.Len > 0) && h.LSN > horizon {
			return segment.ErrStop
		}
		return nil
	})
	if errors.Is(err, segment.ErrStop) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	// Zeroes may be the file's end, or what damage left of a header.
	err = f.Resync(end, func(at int64, _ record.Header) error {
		return fmt.Errorf("%w: %s: nothing at %d, and originals behind it, at %d", record.ErrCorrupt, f.Path, end, at)
	})
	return err == nil, err
}
