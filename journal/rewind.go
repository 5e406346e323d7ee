package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"slices"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Rewind takes a group that follows back to an LSN: what was recorded behind it is not of the history that the writer goes on
// with, and is gone when Rewind returns, from the journal and from the backings. Whoever wants it keeps it before.
//
// The group is closed meanwhile, and another when it returns: ErrInUse while anybody has a disk of it open. A crash, or an error, in the midst of it is
// gone on with when the group is opened next. A disk must not have come, gone, or been changed outside of Tidemark behind the LSN.
func (s *Store) Rewind(name string, to record.LSN) error {
	s.joining.Lock()
	defer s.joining.Unlock()
	g, err := s.Group(name)
	if err != nil {
		return err
	}
	if err := s.rewind(g, to); err != nil {
		return fmt.Errorf("rewind group %s to LSN %d: %w", name, to, err)
	}
	return nil
}

func (s *Store) rewind(g *Group, to record.LSN) (err error) {
	g.joining.Lock()
	defer g.joining.Unlock()
	// Nothing expires behind the LSN from here on.
	if err := g.pinFrom(to); err != nil {
		return err
	}
	gc := GroupConfig{Name: g.name, Received: true, Retain: g.Policy(), Limit: g.limit.Load()}
	var left []*disk.Disk
	back := func() {
		g.unpinFrom(to)
		g.setClosed(nil)
		g.stay(left)
		s.runGroup(g)
	}
	for _, d := range g.Disks() {
		if err := g.leave(d); err != nil {
			back()
			return err
		}
		left, gc.Disks = append(left, d), append(gc.Disks, DiskConfig{d.Name, d.Path()})
	}
	g.stopLoops()
	g.setClosed(errors.New("the group is being rewound"))
	if err := g.readyToRewind(to); err != nil {
		back()
		return err
	}
	if err := g.rewindTo(to); err != nil {
		return g.fail(err) // the next opening goes on; until then nobody has its disks, which may be a mix
	}
	s.open.Lock()
	s.setGroupsLocked(without(s.open.groups, g))
	s.open.Unlock()
	for _, d := range left {
		s.release(g.name + "/" + d.Name)
	}
	if err := errors.Join(g.append.log.Close(), g.apply.orig.Close(), g.closeFiles()); err != nil {
		return err
	}
	next, err := s.addGroup(gc)
	if err != nil {
		return err
	}
	s.runGroup(next)
	return nil
}

func without(groups []*Group, g *Group) []*Group {
	var others []*Group
	for _, o := range groups {
		if o != g {
			others = append(others, o)
		}
	}
	return others
}

// canRewind says whether what the disks were at an LSN is known.
func (g *Group) canRewind(to record.LSN) error {
	if state, why := g.State(); state == "failed" {
		return why
	}
	switch {
	case !g.Follows():
		return fmt.Errorf("the group is this daemon's, in epoch %d: have it follow first", g.Reigns().Epoch())
	case !g.viewable(to):
		return g.noPoint(fmt.Sprintf("lsn:%d", to), "it can not be rewound to")
	}
	m := g.disks.Load()
	for i, t := range m.table {
		switch {
		case t.Added > to || t.Removed > to:
			return fmt.Errorf("disk %s came to the group, or left it, behind LSN %d: remove the group's journal here and have it seeded again", t.Name, to)
		case t.Removed == 0 && !m.all[i].Attached():
			return fmt.Errorf("disk %s: %w", t.Name, ErrDetached)
		case m.all[i].KnownSince() > to:
			return fmt.Errorf("disk %s was changed outside of Tidemark behind LSN %d: what it was is not known", t.Name, to)
		}
	}
	return nil
}

// readyToRewind applies what is journaled, and looks for all that would be in the way of a rewind that has begun: damaged headers, and a lack
// of room.
func (g *Group) readyToRewind(to record.LSN) error {
	if err := g.canRewind(to); err != nil {
		return err
	}
	if err := g.applyTo(g.Head()); err != nil {
		return err
	}
	if err := errors.Join(g.Sync(), g.Checkpoint()); err != nil {
		return err
	}
	need := int64(0)
	err := g.eachStaying(to, func(_ *segment.File, _ int64, h record.Header) error {
		need += h.Size()
		return nil
	})
	if err != nil {
		return fmt.Errorf("originals: %w", err)
	}
	if _, _, err := g.changedBehind(to); err != nil {
		return err
	}
	if u, err := g.fs.GetDiskUsage(g.dir); err == nil && int64(u.AvailBytes) < need+g.o.keepLog()+2*g.o.SegmentSize {
		return fmt.Errorf("%w: %d bytes are free, and it may take %d", ErrNoSpace, u.AvailBytes, need+g.o.keepLog()+2*g.o.SegmentSize)
	}
	return nil
}

// rewindTo does what Rewind has to with the group open, which a note holds:
//
//  1. Originals are kept again for the records that stay, see keepOriginals.
//  2. Backings become what they were. Every block that is written then has a version or an original
//     in the index, as everything is applied, so that views of before never look at the backing for it, whatever stands there.
//  3. A new file of the log, whose head says who is followed, and from which LSN on, is begun; then the records can go.
//
// The rest, finishRewind, is done with the group closed.
func (g *Group) rewindTo(to record.LSN) error {
	n := rewindNote{to: to}
	for _, k := range []segment.Kind{segment.Log, segment.Originals} {
		for _, f := range g.set.Files(k) {
			n.last = max(n.last, f.Number)
		}
	}
	if err := g.writeRewindNote(n); err != nil {
		return err
	}
	if err := g.keepOriginals(to); err != nil {
		return fmt.Errorf("keep the originals of what stays: %w", err)
	}
	changed, holes, err := g.changedBehind(to)
	if err != nil {
		return err
	}
	if err := g.keepHoles(holes, to); err != nil {
		return fmt.Errorf("keep the originals of what stays: %w", err)
	}
	if err := g.restoreBackings(changed, to); err != nil {
		return err
	}
	if n.file, err = g.beginAt(to); err != nil {
		return err
	}
	return g.writeRewindNote(n)
}

// beginAt begins a file of the log behind an LSN, durably, in the stead of what stands there.
func (g *Group) beginAt(to record.LSN) (file uint32, err error) {
	b, err := g.Beginning(to)
	if err != nil {
		return 0, err
	}
	for len(b.Reigns) > 1 && b.Reigns[len(b.Reigns)-1].First > to {
		b.Reigns = b.Reigns[:len(b.Reigns)-1]
	}
	g.append.Lock()
	g.append.next = to + 1
	g.checkpointed.Store(uint64(to))
	g.standing.Store(&standing{b.Reigns, true})
	before := slices.DeleteFunc(g.Gaps(), func(gap Gap) bool { return gap.Until > to })
	g.gaps.Store(&before)
	g.lastTime.Store(b.Time)
	err = g.newLogLocked(0)
	g.append.Unlock()
	if err != nil {
		return 0, fmt.Errorf("begin the log behind LSN %d: %w", to, err)
	}
	return g.append.log.Current().Number, g.append.log.Sync()
}

// restoreBackings makes the backings durably what the disks were at an LSN.
func (g *Group) restoreBackings(changed map[*disk.Disk]blockSet, to record.LSN) error {
	buf := make([]byte, 1<<20)
	for d, blocks := range changed {
		v := View{g: g, d: d, lsn: to}
		err := blocks.runs(int64(len(buf)/record.BlockSize), func(first, n int64) error {
			off := first * record.BlockSize
			part := buf[:min(n*record.BlockSize, d.Size-off)]
			if err := v.ReadAt(part, off, false); err != nil {
				return err
			}
			return d.Restore(part, off)
		})
		if err == nil {
			err = d.SyncBacking()
		}
		if err != nil {
			return fmt.Errorf("make disk %s what it was: %w", d.Name, err)
		}
	}
	return nil
}

// ofTail reports whether a record among the originals is of what stands behind an LSN: kept in a round that went behind it, or of an expiry
// that a crash cut off there.
func ofTail(h *record.Header, to record.LSN) bool {
	if h.Kind == record.KindExpired || h.Kind == record.KindKept || h.Kind == record.KindDefine {
		return h.Durable > to
	}
	return h.LSN > to
}

// hasTail reports whether a file of originals has any of what stands behind an LSN.
func hasTail(f *segment.File, to record.LSN) (has bool, err error) {
	_, err = f.Scan(f.Start(), func(_ int64, h record.Header) error {
		if has = ofTail(&h, to); has {
			return segment.ErrStop
		}
		return nil
	})
	if errors.Is(err, segment.ErrStop) {
		err = nil
	}
	return has, err
}

// keepOriginals copies what stays of those files of originals that have any of what stands behind an LSN, which then can go. What
// stays ends with the newest record up to the LSN; an
// original of a block that no such record has overwritten is what the backing holds, and goes. Damage is copied as it is.
func (g *Group) keepOriginals(to record.LSN) error {
	g.apply.Lock()
	defer g.apply.Unlock()
	if err := g.apply.orig.Roll(g.header(to), 0); err != nil {
		return err
	}
	// The index is made again, and with it the horizon and what is kept beyond it, which nothing else may say.
	// What records behind the LSN did to markers of before the horizon never happened: they are as the newest note has them, and the log goes on from there.
	if h := g.expiredTo(); h > 0 {
		noted, _, _, err := g.readKept()
		if err != nil {
			return err
		}
		marker := func(lsn record.LSN) (record.Marker, bool) {
			i := slices.IndexFunc(noted.markers, func(m record.Marker) bool { return m.LSN == lsn })
			if i < 0 {
				return g.currentMarker(lsn)
			}
			return noted.markers[i], true
		}
		if err := g.noteExpired(h, g.KeptPoints(), marker); err != nil {
			return err
		}
	}
	var buf []byte
	err := g.eachStaying(to, func(f *segment.File, at int64, h record.Header) error {
		if len(buf) < h.Payload {
			buf = make([]byte, h.Payload)
		}
		content := buf[:h.Payload]
		if err := f.ReadDamaged(content, at); err != nil {
			return err
		}
		return g.keep(h, content)
	})
	if err != nil {
		return err
	}
	_, err = g.syncKept()
	return err
}

// eachStaying calls fn with what stays of those files of originals that have any of what stands behind an LSN: how each is to be kept, and
// where its content stands. The file to which they are kept has none.
func (g *Group) eachStaying(to record.LSN, fn func(f *segment.File, at int64, h record.Header) error) error {
	reader, err := g.ix.FreshReader()
	if err != nil {
		return err
	}
	defer reader.Close()
	for _, f := range g.set.Files(segment.Originals) {
		tail, err := hasTail(f, to)
		if err != nil {
			return err
		}
		if !tail {
			continue
		}
		_, err = f.Scan(f.Start(), func(off int64, h record.Header) error {
			at := off + int64(h.EncodedSize())
			switch {
			case h.Kind == record.KindExpired, h.Kind == record.KindKept:
				return nil // it is said again
			case !ofTail(&h, to):
				return fn(f, at, h)
			case h.Kind == record.KindDefine, h.Flags&record.FlagCarried != 0 && h.Durable > to:
				return nil
			}
			return g.blocksStaying(reader, h, to, func(i int, h record.Header) error {
				return fn(f, at+int64(i)*record.BlockSize, h)
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// blocksStaying calls fn with those blocks of an original that a record up to an LSN has overwritten: one of the window, or there is a kept point between.
func (g *Group) blocksStaying(reader *index.Reader, h record.Header, to record.LSN, fn func(i int, h record.Header) error) error {
	var pick [1]index.Pick
	d, kept := g.disk(h.Disk), g.keptLSNs()
	first := h.Extent.Off / record.BlockSize
	for i := range record.Blocks(h.Extent.Len) {
		block := first + int64(i)
		if err := reader.Find(h.Disk, block, to, pick[:]); err != nil {
			return err
		}
		if !overwrote(&pick[0], &h, g.expiredTo()) && (pick[0].LSN <= h.Durable || !retain.Lives(kept, h.Durable, pick[0].LSN)) {
			continue
		}
		one := h
		one.LSN = pick[0].LSN
		one.Flags |= record.FlagExact
		one.Extent = record.Extent{Off: block * record.BlockSize, Len: int64(d.BlockLen(block))}
		if h.Kind == record.KindOriginal {
			one.Payload, one.Sums = int(one.Extent.Len), h.Sums[4*i:4*i+4]
		}
		if err := fn(i, one); err != nil {
			return err
		}
	}
	return nil
}

// blockSet is a set of a disk's blocks.
type blockSet []uint64

func (s blockSet) add(first, n int64) {
	for ; n > 0; first, n = first+1, n-1 {
		s[first/64] |= 1 << (first % 64)
	}
}

// runs calls fn with the set's blocks, up to most that follow each other at once.
func (s blockSet) runs(most int64, fn func(first, n int64) error) error {
	has := func(b int64) bool { return b < int64(len(s))*64 && s[b/64]&(1<<(b%64)) != 0 }
	for b := int64(0); b < int64(len(s))*64; {
		if rest := s[b/64] >> (b % 64); rest == 0 {
			b = (b/64 + 1) * 64
			continue
		} else if skip := int64(bits.TrailingZeros64(rest)); skip > 0 {
			b += skip
			continue
		}
		n := int64(1)
		for n < most && has(b+n) {
			n++
		}
		if err := fn(b, n); err != nil {
			return err
		}
		b += n
	}
	return nil
}

// changedBehind are the blocks that the backings have, or may have, as records behind an LSN left them.
//
// Zeroes over zeroes are not captured, and not written. But what was written up to the LSN may never have come to the backing, as it
// was zeroes again before it was applied: such blocks are among holes too. They are zeroes in the backing, of which there is no original.
func (g *Group) changedBehind(to record.LSN) (changed, holes map[*disk.Disk]blockSet, err error) {
	before, behind := map[*disk.Disk]blockSet{}, map[*disk.Disk]blockSet{}
	files := g.set.Files(segment.Log)
	err = segment.ScanLog(files, files[0].Start(), func(_ *segment.File, _ int64, h record.Header) error {
		if h.Kind.Note() || h.LSN <= to && h.Kind != record.KindWrite {
			return nil
		}
		d, in := g.disk(h.Disk), before
		if h.LSN > to {
			in = behind
		}
		if in[d] == nil {
			in[d] = make(blockSet, (d.Size/record.BlockSize+64)/64)
		}
		in[d].add(h.Extent.Off/record.BlockSize, int64(record.Blocks(h.Extent.Len)))
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("find what was changed behind LSN %d: %w", to, err)
	}
	changed, holes = behind, map[*disk.Disk]blockSet{}
	for d, blocks := range changed {
		captured := make(blockSet, len(blocks))
		if err := d.CapturedIn(0, int64(record.Blocks(d.Size)), func(first, n int64) error {
			captured.add(first, n)
			return nil
		}); err != nil {
			return nil, nil, err
		}
		holes[d] = make(blockSet, len(blocks))
		for i := range blocks {
			if w := before[d]; w != nil {
				holes[d][i] = blocks[i] & w[i] &^ captured[i]
			}
			blocks[i] &= captured[i] | holes[d][i]
		}
	}
	return changed, holes, nil
}

// keepHoles keeps the originals of blocks that are zeroes in the backing, and will not be.
func (g *Group) keepHoles(holes map[*disk.Disk]blockSet, to record.LSN) error {
	g.apply.Lock()
	defer g.apply.Unlock()
	reader, err := g.ix.FreshReader()
	if err != nil {
		return err
	}
	defer reader.Close()
	defer g.originsDone()
	var pick [1]index.Pick
	for d, blocks := range holes {
		var kept []int64
		err := blocks.runs(1, func(block, _ int64) error {
			if err := reader.Find(d.ID, block, to, pick[:]); err != nil {
				return err
			}
			kept = append(kept, block)
			ext := record.Extent{Off: block * record.BlockSize, Len: int64(d.BlockLen(block))}
			return g.origins(d, block, 1, func(_, _ int64, since record.LSN) error {
				return g.keepBlocks(d, ext, nil, 0, since, pick[0].LSN)
			})
		})
		if err != nil {
			return err
		}
		if len(kept) == 0 {
			continue
		}
		if err := g.CommitOriginals(d, d.Pages(kept, nil)); err != nil {
			return err
		}
		d.Keep(kept)
	}
	return nil
}

// rewindNote says how far a rewind has come. It is the file "rewind" of the group's directory, which comes with the first step and
// goes with the last:
//
//	offset size field
//	  0     4   magic, "TMRW"
//	  4     4   format version: 1
//	  8     8   LSN to rewind to
//	 16     4   number of the newest file before
//	 20     4   number of the file that was begun behind the LSN; 0: the backings are not restored yet
//	 24     4   CRC-32C of bytes 0 to 23
type rewindNote struct {
	to   record.LSN
	last uint32
	file uint32
}

const (
	rewindName    = "rewind"
	rewindTmp     = "rewind.new"
	rewindMagic   = "TMRW"
	rewindVersion = 1
	rewindSize    = 28
)

func (n *rewindNote) append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(append(b, rewindMagic...), rewindVersion)
	b = le.AppendUint32(le.AppendUint32(le.AppendUint64(b, uint64(n.to)), n.last), n.file)
	return le.AppendUint32(b, record.Checksum(b))
}

func decodeRewindNote(b []byte) (n rewindNote, err error) {
	le := binary.LittleEndian
	if len(b) != rewindSize || string(b[:4]) != rewindMagic || record.Checksum(b[:24]) != le.Uint32(b[24:]) {
		return n, fmt.Errorf("%w: a note of %d bytes about a rewind", record.ErrCorrupt, len(b))
	}
	if v := le.Uint32(b[4:]); v != rewindVersion {
		return n, fmt.Errorf("a note about a rewind has format version %d, this Tidemark knows %d: use the one that wrote it", v, rewindVersion)
	}
	return rewindNote{record.LSN(le.Uint64(b[8:])), le.Uint32(b[16:]), le.Uint32(b[20:])}, nil
}

func (g *Group) writeRewindNote(n rewindNote) (err error) {
	tmp := g.fs.PathJoin(g.dir, rewindTmp)
	f, err := g.fs.Create(tmp, vfs.WriteCategoryUnspecified)
	if err == nil {
		_, err = f.Write(n.append(nil))
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err == nil {
		err = g.fs.Rename(tmp, g.fs.PathJoin(g.dir, rewindName))
	}
	if err == nil {
		err = syncDirs(g.fs, g.dir)
	}
	if err != nil {
		return fmt.Errorf("note the rewind: %w", err)
	}
	return nil
}

// readRewindNote reads what a rewind that is not finished has left; nil if there is none.
func (g *Group) readRewindNote() (*rewindNote, error) {
	f, err := g.fs.Open(g.fs.PathJoin(g.dir, rewindName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, rewindSize+1))
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	n, err := decodeRewindNote(b)
	if err == nil && g.o.ReadOnly {
		err = fmt.Errorf("the group is being rewound to LSN %d: start the daemon, which finishes that", n.to)
	}
	return &n, err
}

// resumeRewind does what is left of a rewind before the group is recovered. It reports whether the backings are still to be restored:
// then the log is as it was before.
func (g *Group) resumeRewind(n *rewindNote) (restore bool, err error) {
	if n.file != 0 || len(g.set.Files(segment.Log)) == 0 {
		return false, g.finishRewind(n)
	}
	var begun []*segment.File
	for _, f := range g.set.Files(segment.Log) {
		if f.Number > n.last {
			begun = append(begun, f) // by the rewind, or a recovery after it: nothing stands in it
		}
	}
	return true, g.set.Remove(begun...)
}

// finishRewind drops the records behind the LSN that is rewound to. Nothing has the group open, and its index is made again then.
func (g *Group) finishRewind(n *rewindNote) error {
	g.log.Info("dropping what was recorded behind the LSN that the group is rewound to", zap.Uint64("lsn", uint64(n.to)))
	logs := g.set.Files(segment.Log)
	if len(logs) == 0 {
		return g.dropRewindNote() // the journal was removed
	}
	var gone []*segment.File
	var last *segment.File
	for _, f := range g.set.Files(segment.Originals) {
		if f.Number > n.last {
			continue
		}
		tail, err := hasTail(f, n.to)
		if err != nil {
			return err
		}
		if tail {
			gone = append(gone, f) // what stays of it was copied
		}
	}
	for _, f := range logs {
		switch {
		case f.Number >= n.file:
		case f.First > n.to:
			gone = append(gone, f)
		default:
			last = f
		}
	}
	// The newest of the log go first: what a crash leaves is a log that ends where it should, or later.
	for i := len(gone) - 1; i >= 0; i-- {
		if err := g.set.Remove(gone[i]); err != nil {
			return err
		}
	}
	if last != nil {
		if err := cutBehind(g.set, last, n.to); err != nil {
			return err
		}
	}
	g.dropOverlays()
	ix, err := g.store.ix.Group(logs[0].Group)
	if err != nil {
		return err
	}
	if err := errors.Join(ix.DeleteAll(), g.store.ix.Flush()); err != nil {
		return err
	}
	return g.dropRewindNote()
}

func (g *Group) dropRewindNote() error {
	if err := g.fs.Remove(g.fs.PathJoin(g.dir, rewindName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDirs(g.fs, g.dir)
}

// cutBehind cuts a file of the log behind the record of an LSN. What a crash tore behind it, and another file went on after, goes too;
// what is damaged before it stays, for the recovery to find.
func cutBehind(set *segment.Set, f *segment.File, to record.LSN) error {
	seen := f.First - 1
	end, err := f.Scan(f.Start(), func(_ int64, h record.Header) error {
		if h.LSN > to {
			return segment.ErrStop
		}
		seen = h.LSN
		return nil
	})
	switch {
	case err == nil, errors.Is(err, segment.ErrStop), errors.Is(err, record.ErrCorrupt) && seen == to:
		return set.Cut(f, end)
	case errors.Is(err, record.ErrCorrupt):
		return nil
	}
	return fmt.Errorf("find the end of LSN %d: %w", to, err)
}
