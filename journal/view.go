package journal

import (
	"cmp"
	"errors"
	"fmt"
	"sync"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// View is a disk as of an LSN: immutable, and pinned until it is closed. It is
// safe for concurrent use; Close must come last.
type View struct {
	g   *Group
	d   *disk.Disk
	lsn record.LSN

	passing bool   // nothing is pinned for it
	release func() // of the disk
	closed  sync.Once
}

// View opens a disk as of an LSN that is Viewable. It reads nothing of
// the disk.
func (g *Group) View(d *disk.Disk, lsn record.LSN) (*View, error) { return g.view(d, lsn, false) }

// PassingView is a View that keeps nothing from expiring, beyond what a [Hold] of the records behind its LSN does: from then
// on its reads are *PointErrors, and no other bytes.
func (g *Group) PassingView(d *disk.Disk, lsn record.LSN) (*View, error) { return g.view(d, lsn, true) }

func (g *Group) view(d *disk.Disk, lsn record.LSN, passing bool) (*View, error) {
	if lsn < d.Added {
		return nil, g.noPoint(fmt.Sprintf("lsn:%d", lsn), fmt.Sprintf("disk %s came to the group at LSN %d", d.Name, d.Added))
	}
	release, err := g.Use(d)
	if err != nil {
		return nil, err
	}
	if err := g.pin(lsn); err != nil {
		release()
		return nil, err
	}
	err = g.indexTo(lsn)
	if err != nil || passing {
		g.unpin(lsn)
	}
	if err != nil {
		release()
		return nil, fmt.Errorf("open disk %s/%s as of LSN %d: %w", g.name, d.Name, lsn, err)
	}
	return &View{g: g, d: d, lsn: lsn, passing: passing, release: release}, nil
}

// passed is an error if what a read has found may be what an expiry left. An expiry raises the horizon before it forgets
// anything, so that it is asked after the read.
func (v *View) passed() error {
	if v.passing && v.lsn < v.g.expiredTo() && !v.g.isKept(v.lsn) {
		return v.g.expired(v.lsn)
	}
	return nil
}

// Older opens the view's disk as of a point that is not newer.
func (v *View) Older(p record.Point) (*View, error) {
	lsn, err := v.g.Resolve(p)
	if err != nil {
		return nil, err
	}
	if lsn > v.lsn {
		return nil, v.g.noPoint(p.String(), fmt.Sprintf("it is LSN %d, newer than the LSN %d that is compared with it", lsn, v.lsn))
	}
	return v.g.View(v.d, lsn)
}

// pin keeps what the disks were at an LSN.
func (g *Group) pin(lsn record.LSN) error {
	g.pins.Lock()
	defer g.pins.Unlock()
	if !g.viewable(lsn) {
		return g.notViewable(lsn)
	}
	g.pins.points[lsn]++
	return nil
}

// pinFrom keeps the history from an LSN on.
func (g *Group) pinFrom(lsn record.LSN) error {
	g.pins.Lock()
	defer g.pins.Unlock()
	if lsn < g.expiredTo() || !g.viewable(lsn) {
		return g.notViewable(lsn)
	}
	g.pins.from[lsn]++
	return nil
}

// pinAll keeps all of the history that the group has. It returns up to where that had expired.
func (g *Group) pinAll() (expired record.LSN) {
	g.pins.Lock()
	defer g.pins.Unlock()
	expired = g.expiredTo()
	g.pins.from[expired]++
	return expired
}

func (g *Group) unpin(lsn record.LSN)     { g.unpinOf(g.pins.points, lsn) }
func (g *Group) unpinFrom(lsn record.LSN) { g.unpinOf(g.pins.from, lsn) }

func (g *Group) unpinOf(pins map[record.LSN]int, lsn record.LSN) {
	g.pins.Lock()
	defer g.pins.Unlock()
	if pins[lsn]--; pins[lsn] == 0 {
		delete(pins, lsn)
	}
}

// LSN is the point of the view.
func (v *View) LSN() record.LSN { return v.lsn }

// Size is the disk's size in bytes.
func (v *View) Size() int64 { return v.d.Size }

// Close lets go of the view's history.
func (v *View) Close() {
	v.closed.Do(func() {
		if !v.passing {
			v.g.unpin(v.lsn)
		}
		v.release()
	})
}

// viewStep is how many blocks are looked up at once.
const viewStep = 1024

type viewScratch struct {
	picks []index.Pick
	sums  []byte
	block [record.BlockSize]byte
}

var viewPool = sync.Pool{New: func() any { return &viewScratch{picks: make([]index.Pick, viewStep)} }}

// ReadAt fills p with the view's bytes from off, any alignment. With nowait it
// returns ErrWouldBlock rather than wait for the disk under the
// segments; the index it may wait for.
func (v *View) ReadAt(p []byte, off int64, nowait bool) error {
	if !(record.Extent{Off: off, Len: int64(len(p))}).In(v.d.Size) {
		return fmt.Errorf("read %d bytes at %d of %s: its size is %d", len(p), off, v.d.Name, v.d.Size)
	}
	s := viewPool.Get().(*viewScratch)
	defer viewPool.Put(s)
	for len(p) > 0 {
		first := off / record.BlockSize
		n := min(viewStep, int((off+int64(len(p))-1)/record.BlockSize-first+1))
		part := p[:min(int64(len(p)), (first+int64(n))*record.BlockSize-off)]
		if err := v.readStep(s, part, off, first, n, nowait); err != nil {
			return cmp.Or(v.passed(), err)
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return v.passed()
}

// readStep reads what n blocks from first on have between off and off+len(p).
//
// A block without a version at or below the view's LSN still stands in the
// backing, unless Apply overtakes: it commits the block's original to the index, sets the
// captured bit, and writes the backing, in that order. So the bit is asked
// after the backing was read; where it is set, the index knows better by now. An expiry clears it
// again, behind the view's LSN if that is kept, and says before that it does: then, too.
//
// A version's segment may have expired between look-up and reading: the block
// then stands elsewhere, and the index says where.
func (v *View) readStep(s *viewScratch, p []byte, off, first int64, n int, nowait bool) error {
	picks := s.picks[:n]
	for try := 0; ; try++ {
		forgotten, err := v.find(picks, first, try > 0)
		if err != nil {
			return err
		}
		err = v.readPicks(s, p, off, first, picks, nowait)
		if errors.Is(err, segment.ErrGone) && try < maxRetries {
			continue
		}
		if err != nil {
			return err
		}
		if !v.overtaken(forgotten, picks, first) {
			return v.checkKnown(picks, first)
		}
		if try == maxRetries {
			return v.lost(picks, first)
		}
	}
}

// maxRetries bounds how often a read follows blocks that move.
const maxRetries = 16

// find looks blocks up, and returns what was forgotten before, see overtaken.
func (v *View) find(picks []index.Pick, first int64, fresh bool) (forgotten uint64, err error) {
	reader := func() (*index.Reader, error) { return v.g.ix.Reader(v.lsn) }
	if fresh {
		reader = v.g.ix.FreshReader
	}
	r, err := reader()
	if err != nil {
		return 0, err
	}
	forgotten = r.Forgotten()
	if err := r.Find(v.d.ID, first, v.lsn, picks); err != nil {
		r.Close()
		return 0, err
	}
	r.Release()
	return forgotten, nil
}

// overtaken reports whether a block that was read from the backing has an original now that was not found: it is captured, or something was forgotten since the
// look-up.
func (v *View) overtaken(forgotten uint64, picks []index.Pick, first int64) bool {
	missing := false
	for i := range picks {
		if picks[i].Found {
			continue
		}
		if missing = true; v.d.Captured(first + int64(i)) {
			return true
		}
	}
	return missing && forgotten != v.g.ix.Forgotten()
}

// checkKnown refuses blocks whose content at the view's LSN is lost: the
// backing was changed by someone else after it, and the journal never held them.
func (v *View) checkKnown(picks []index.Pick, first int64) error {
	since := v.d.KnownSince()
	if v.lsn >= since {
		return nil
	}
	for i := range picks {
		if !picks[i].Found {
			return fmt.Errorf("block %d of disk %s/%s as of LSN %d is not known: the journal has no version of it, and before LSN %d the backing was changed outside of Tidemark, or originals were damaged (see status)",
				first+int64(i), v.g.name, v.d.Name, v.lsn, since)
		}
	}
	return nil
}

// lost says why blocks whose originals were captured are not found.
func (v *View) lost(picks []index.Pick, first int64) error {
	if err := v.checkKnown(picks, first); err != nil {
		return err
	}
	return fmt.Errorf("%w: disk %s/%s as of LSN %d: the index lacks an original between blocks %d and %d",
		record.ErrCorrupt, v.g.name, v.d.Name, v.lsn, first, first+int64(len(picks))-1)
}

// readPicks reads run by run: blocks that stand together are read together.
func (v *View) readPicks(s *viewScratch, p []byte, off, first int64, picks []index.Pick, nowait bool) error {
	end := off + int64(len(p))
	var file *segment.File
	defer func() {
		if file != nil {
			file.Release()
		}
	}()
	for i := 0; i < len(picks); {
		j := i + 1
		for j < len(picks) && together(&picks[j-1], &picks[j]) {
			j++
		}
		from := max(off, (first+int64(i))*record.BlockSize)
		to := min(end, (first+int64(j))*record.BlockSize)
		dst := p[from-off : to-off]
		var err error
		switch pick := &picks[i]; {
		case !pick.Found:
			err = v.d.ReadBacking(dst, from, nowait)
		case pick.Zero:
			clear(dst)
		default:
			if file == nil || file.Number != pick.File {
				if file != nil {
					file.Release()
				}
				if file, err = v.g.set.Acquire(pick.File); err != nil {
					file = nil
					return err
				}
			}
			err = v.readRun(s, file, dst, from, first+int64(i), picks[i:j], nowait)
		}
		if err != nil {
			return err
		}
		i = j
	}
	return nil
}

// together reports whether b's bytes follow a's where they stand.
func together(a, b *index.Pick) bool {
	switch {
	case a.Found != b.Found:
		return false
	case !a.Found:
		return true
	case a.Zero || b.Zero:
		return a.Zero && b.Zero
	}
	return a.File == b.File && (a.Class == 0) == (b.Class == 0) && b.PayloadOff() == a.PayloadOff()+record.BlockSize &&
		(a.Class == 0 || b.SumOff() == a.SumOff()+4)
}

// readRun reads blocks that stand together in a segment and verifies each.
func (v *View) readRun(s *viewScratch, f *segment.File, dst []byte, off, block int64, picks []index.Pick, nowait bool) error {
	whole := dst
	last := block + int64(len(picks)) - 1
	full := int64(len(picks)-1)*record.BlockSize + int64(v.d.BlockLen(last))
	if int64(len(dst)) != full {
		// The ends of an unaligned read: whole blocks are needed to verify them.
		if whole = s.block[:]; full > int64(len(whole)) {
			whole = make([]byte, full)
		}
		whole = whole[:full]
	}
	sums := s.sums[:0]
	if picks[0].Class == 0 {
		for i := range picks {
			a := picks[i].Aux
			sums = append(sums, byte(a), byte(a>>8), byte(a>>16), byte(a>>24))
		}
	} else {
		sums = append(sums, make([]byte, 4*len(picks))...)
		if err := f.ReadAt(sums, picks[0].SumOff(), nowait); err != nil {
			return err
		}
	}
	s.sums = sums
	if err := f.ReadAt(whole, picks[0].PayloadOff(), nowait); err != nil {
		return err
	}
	if err := record.Sums(sums).Verify(whole); err != nil {
		return fmt.Errorf("disk %s/%s from block %d as of LSN %d: %s at %d: %w",
			v.g.name, v.d.Name, block, v.lsn, f.Path, picks[0].PayloadOff(), err)
	}
	if int64(len(dst)) != full {
		copy(dst, whole[off-block*record.BlockSize:])
	}
	return nil
}

// Extents calls fn with runs of the extent that together fill it, and whether
// each is known to read as zeroes without being read.
func (v *View) Extents(ext record.Extent, fn func(n int64, zero bool)) error {
	if !ext.In(v.d.Size) {
		return fmt.Errorf("extents of %v of %s: its size is %d", ext, v.d.Name, v.d.Size)
	}
	picks := make([]index.Pick, viewStep)
	for ext.Len > 0 {
		first := ext.Off / record.BlockSize
		n := min(viewStep, int((ext.End()-1)/record.BlockSize-first+1))
		part := record.Extent{Off: ext.Off, Len: min(ext.End(), (first+int64(n))*record.BlockSize) - ext.Off}
		if err := v.extentsStep(picks[:n], first, part, fn); err != nil {
			return cmp.Or(v.passed(), err)
		}
		ext.Off, ext.Len = part.End(), ext.Len-part.Len
	}
	return v.passed()
}

// Changes calls fn with runs of the extent that together fill it, and whether each may differ from what
// an older view of the disk shows. Where it says no, both read the same.
func (v *View) Changes(old *View, ext record.Extent, fn func(n int64, changed bool)) error {
	if old.d != v.d || old.lsn > v.lsn {
		return fmt.Errorf("changes of disk %s/%s from LSN %d to %s/%s at LSN %d: not an older view of the same disk", v.g.name, old.d.Name, old.lsn, v.g.name, v.d.Name, v.lsn)
	}
	if !ext.In(v.d.Size) {
		return fmt.Errorf("changes of %v of %s: its size is %d", ext, v.d.Name, v.d.Size)
	}
	// What the older view reads from the backing, the newer one may too, but what it was before is not known.
	unknown := old.lsn < v.d.KnownSince()
	picks := make([]index.Pick, viewStep)
	for ext.Len > 0 {
		first := ext.Off / record.BlockSize
		n := min(viewStep, int((ext.End()-1)/record.BlockSize-first+1))
		if _, err := v.find(picks[:n], first, false); err != nil {
			return err
		}
		for i := 0; i < n; {
			changed := changedSince(&picks[i], old.lsn, unknown)
			j := i + 1
			for j < n && changedSince(&picks[j], old.lsn, unknown) == changed {
				j++
			}
			end := min(ext.End(), (first+int64(j))*record.BlockSize)
			fn(end-ext.Off, changed)
			ext.Off, ext.Len = end, ext.End()-end
			i = j
		}
	}
	return nil
}

func changedSince(p *index.Pick, lsn record.LSN, unknown bool) bool {
	if !p.Found {
		return unknown || p.Until > lsn // the backing has what came after
	}
	return p.LSN > lsn
}

type zeroRun struct {
	n    int64
	zero bool
}

// appendRuns appends the runs of an extent whose blocks the backing has as data or as a hole.
func (v *View) appendRuns(runs []zeroRun, picks []index.Pick, first int64, ext record.Extent, hole bool) []zeroRun {
	for ext.Len > 0 {
		block := ext.Off / record.BlockSize
		n := min(ext.End(), (block+1)*record.BlockSize) - ext.Off
		zero := hole && v.lsn >= v.d.KnownSince() // what is not known must be asked for, and refused
		if p := &picks[block-first]; p.Found {
			zero = p.Zero
		}
		if k := len(runs); k > 0 && runs[k-1].zero == zero {
			runs[k-1].n += n
		} else {
			runs = append(runs, zeroRun{n, zero})
		}
		ext.Off, ext.Len = ext.Off+n, ext.Len-n
	}
	return runs
}

// extentsStep asks the backing first and tells only when no block was overtaken meanwhile.
func (v *View) extentsStep(picks []index.Pick, first int64, ext record.Extent, fn func(int64, bool)) error {
	var runs []zeroRun
	for try := 0; ; try++ {
		forgotten, err := v.find(picks, first, try > 0)
		if err != nil {
			return err
		}
		runs = runs[:0]
		done := ext.Off
		v.d.BackingExtents(ext, func(n int64, zero bool) {
			runs = v.appendRuns(runs, picks, first, record.Extent{Off: done, Len: n}, zero)
			done += n
		})
		if !v.overtaken(forgotten, picks, first) {
			break
		}
		if try == maxRetries {
			return v.lost(picks, first)
		}
	}
	for _, r := range runs {
		fn(r.n, r.zero)
	}
	return nil
}
