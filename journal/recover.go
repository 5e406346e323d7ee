package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// openGroup opens or makes a group and recovers it.
func (s *Store) openGroup(gc GroupConfig, newID uint32) (*Group, error) {
	fs := s.o.FS
	dir := fs.PathJoin(s.dir, groupsName, gc.Name)
	if !s.o.ReadOnly {
		if err := fs.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	set, err := segment.OpenSet(fs, dir, s.o.ReadOnly)
	if err != nil {
		return nil, err
	}
	g := &Group{
		name: gc.Name, id: newID, fs: fs, dir: dir, o: s.o, store: s, set: set,
		log:      s.o.Log.With(zap.String("group", gc.Name)),
		kickSync: make(chan struct{}, 1), kickApply: make(chan struct{}, 1),
	}
	g.append.room.L = &g.append
	g.append.pend = &pending{}
	g.append.labels = map[string]record.LSN{}
	g.pins.views = map[record.LSN]int{}
	g.append.log = segment.NewWriter(set, segment.Log, s.o.SegmentSize, s.o.keepLog())
	g.apply.orig = segment.NewWriter(set, segment.Originals, s.o.SegmentSize, s.o.keepApply())
	if err := g.recover(gc.Disks); err != nil {
		return nil, errors.Join(err, g.closeOnError())
	}
	return g, nil
}

func (g *Group) closeOnError() error {
	if g.ix == nil {
		g.set.Close()
		return nil
	}
	return g.closeFiles()
}

// recovery is what is found in the segments on the way to an open group.
type recovery struct {
	g        *Group
	logs     []*segment.File
	fresh    bool // the index knew nothing of the group
	mark     index.Watermark
	origFile uint32     // originals up to this file were committed before the crash
	applied  record.LSN // the backings hold every record up to here
	last     record.LSN // the last record of the log
	durable  record.LSN // some record or the index says that this much was
	damage   error      // of a record that was durable
}

func (g *Group) recover(disks []DiskConfig) error {
	r := &recovery{g: g, logs: g.set.Files(segment.Log)}
	if len(r.logs) > 0 {
		newest := r.logs[len(r.logs)-1]
		g.id, g.table = newest.Group, newest.Disks
	}
	if !g.o.ReadOnly {
		// What the page cache holds may be newer than the disk: it is about
		// to be believed.
		if err := g.set.Sync(); err != nil {
			return err
		}
	}
	var err error
	if g.ix, err = g.store.ix.Group(g.id); err != nil {
		return err
	}
	if err := g.openDisks(disks); err != nil {
		return err
	}
	if err := r.state(); err != nil {
		return err
	}
	if err := r.originals(); err != nil {
		return err
	}
	if err := r.log(); err != nil {
		return err
	}
	if err := r.broken(); err != nil {
		return err
	}
	if err := g.start(r); err != nil {
		return err
	}
	if r.fresh && !g.o.ReadOnly && r.damage == nil {
		return r.dropStale()
	}
	return g.notice(r)
}

// broken tells files that a crash left unfinished, which held nothing durable,
// from damaged ones.
func (r *recovery) broken() error {
	for _, b := range r.g.set.Broken() {
		if b.Kind == segment.Log && b.First <= r.durable || b.Kind == segment.Originals && b.Number <= r.origFile {
			if r.damage == nil {
				r.damage = fmt.Errorf("segment %s: %w", b.Path, b.Err)
			}
			return nil
		}
	}
	if r.g.o.ReadOnly {
		return nil
	}
	return r.g.set.RemoveBroken()
}

// dropStale is for an index that is made anew behind a horizon: an original may
// be of a block whose history has expired since. It is one to keep only if a record in the
// window, and of the round that the original was kept for, overwrote the block.
func (r *recovery) dropStale() error {
	g := r.g
	if err := g.Index(); err != nil {
		return err
	}
	reader, err := g.ix.FreshReader()
	if err != nil {
		return err
	}
	defer reader.Close()
	disks := map[record.DiskID]*disk.Disk{}
	for _, d := range g.disks {
		disks[d.ID] = d
	}
	b := g.ix.NewBatch()
	type place struct {
		disk  record.DiskID
		block int64
	}
	live := map[place]bool{} // by whether some original of the block is one to keep
	var picks [1]index.Pick
	for _, f := range g.set.Files(segment.Originals) {
		_, err := f.Scan(f.Start(), func(off int64, h record.Header) error {
			for _, e := range appendOriginal(nil, &h, f.Number, off) {
				if err := reader.Find(e.Disk, e.Unit.Index, h.LSN, picks[:]); err != nil {
					return err
				}
				at := place{e.Disk, e.Unit.Index}
				if picks[0].Found && picks[0].LSN > g.Horizon() {
					live[at] = true
					continue
				}
				live[at] = live[at]
				if err := b.Delete(e.Disk, e.Unit, e.LSN); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil && !errors.Is(err, record.ErrCorrupt) {
			return err
		}
	}
	stale := map[*disk.Disk][]int64{}
	for at, ok := range live {
		if d := disks[at.disk]; d != nil && !ok {
			stale[d] = append(stale[d], at.block)
		}
	}
	for d, blocks := range stale {
		if err := setPages(b, d, d.Pages(nil, blocks)); err != nil {
			return err
		}
		d.Forget(blocks)
	}
	if err := b.SetState(stateRebuild, nil); err != nil {
		return err
	}
	return b.Commit(g.index.mark)
}

// state reads what the index and the segments' headers say.
func (r *recovery) state() (err error) {
	g := r.g
	if r.mark, err = g.ix.Watermark(); err != nil {
		return err
	}
	building, err := g.ix.State(stateRebuild)
	if err != nil {
		return err
	}
	if len(building) > 0 && !g.o.ReadOnly {
		g.log.Warn("the index was being made again when the daemon stopped: starting over")
		if err := g.ix.DeleteAll(); err != nil {
			return err
		}
		r.mark = index.Watermark{}
	}
	r.fresh, r.origFile = r.mark == (index.Watermark{}), r.mark.OrigFile
	if r.fresh && len(r.logs) > 0 && !g.o.ReadOnly {
		g.log.Warn("the index knows nothing of this group: making it again from the segments")
		if err := g.setState(stateRebuild, []byte{1}); err != nil {
			return err
		}
	}
	b, err := g.ix.State(stateApplied)
	if err != nil {
		return err
	}
	if len(b) == 8 {
		r.applied = record.LSN(binary.LittleEndian.Uint64(b))
	}
	if len(r.logs) > 0 {
		// The log begins behind the horizon, whatever else was lost.
		g.horizon.Store(uint64(r.logs[0].First - 1))
		r.applied = max(r.applied, r.logs[len(r.logs)-1].Applied, r.logs[0].First-1)
	}
	// A log file that was expired may not have been removed yet: the index
	// forgot what is in it.
	if b, err = g.ix.State(stateHorizon); err != nil {
		return err
	}
	if len(b) == 8 {
		g.horizon.Store(max(g.horizon.Load(), binary.LittleEndian.Uint64(b)))
	}
	r.durable = max(r.mark.LSN, r.applied)
	g.index.mark = r.mark
	for _, d := range g.disks {
		err := g.ix.Captured(d.ID, func(page int64, bits []byte) error {
			d.LoadCaptured(page, bits)
			return nil
		})
		if err != nil {
			return err
		}
		if b, err = g.ix.State(stateKnown(d.ID)); err != nil {
			return err
		}
		if len(b) == 8 {
			d.SetKnownSince(record.LSN(binary.LittleEndian.Uint64(b)))
		}
	}
	return g.ix.Markers(0, func(m record.Marker) (bool, error) {
		g.append.labels[m.Label] = m.LSN
		return true, nil
	})
}

// originals replays the originals that the index does not have. A torn tail
// is of originals whose blocks were not overwritten yet.
func (r *recovery) originals() error {
	g := r.g
	for _, f := range g.set.Files(segment.Originals) {
		if f.Number < r.mark.OrigFile {
			continue
		}
		from := f.Start()
		if f.Number == r.mark.OrigFile {
			from = int64(r.mark.OrigOff)
		}
		var entries []index.Entry
		var buf []byte
		end, err := f.Scan(from, func(off int64, h record.Header) (err error) {
			if buf, err = f.VerifyPayload(off, h, buf); err != nil {
				return err
			}
			entries = append(entries, r.original(f, off, h)...)
			return nil
		})
		if err != nil && !errors.Is(err, record.ErrCorrupt) {
			return fmt.Errorf("replay originals: %w", err)
		}
		if err != nil {
			// A crash tears only what was appended after the last commit. The
			// header of each original says which round it was kept for: one of a round
			// that the backings have durably was synced.
			torn, terr := r.torn(f, end)
			if terr != nil {
				return terr
			}
			if !torn && r.damage == nil {
				r.damage = fmt.Errorf("an original that was durable is damaged: %w", err)
			}
			if torn && !g.o.ReadOnly {
				// Now, while it can be told from damage: later, the rounds of
				// the records behind it will have been applied.
				if err := f.Cut(end); err != nil {
					return err
				}
			}
		}
		r.mark.OrigFile, r.mark.OrigOff = f.Number, uint32(end)
		g.index.mark.OrigFile, g.index.mark.OrigOff = f.Number, uint32(end)
		if err := r.commitOriginals(entries); err != nil {
			return err
		}
	}
	return nil
}

// torn reports whether what stands at off in a file of originals may be what a
// crash left of an append: nothing valid behind it belongs to a round that was applied.
func (r *recovery) torn(f *segment.File, off int64) (bool, error) {
	for {
		at, h, ok, err := f.Resync(off)
		if err != nil || !ok {
			return true, err
		}
		if h.Flags&record.FlagCarried == 0 && h.LSN <= r.applied {
			return false, nil
		}
		off = at + record.Alignment
	}
}

// original makes the index entries of a replayed original and sets its bits.
func (r *recovery) original(f *segment.File, off int64, h record.Header) []index.Entry {
	if h.Flags&record.FlagCarried != 0 && h.Durable > r.g.Horizon() {
		return nil // of an expiry that the crash cut off
	}
	for _, d := range r.g.disks {
		if d.ID == h.Disk {
			d.MarkCaptured(h.Extent)
		}
	}
	return appendOriginal(nil, &h, f.Number, off)
}

func (r *recovery) commitOriginals(entries []index.Entry) error {
	if len(entries) == 0 || r.g.o.ReadOnly {
		return nil
	}
	b := r.g.ix.NewBatch()
	for _, e := range entries {
		for _, d := range r.g.disks {
			if d.ID != e.Disk {
				continue
			}
			ext := record.Extent{Off: e.Unit.Index * record.BlockSize, Len: 1}
			if err := setPages(b, d, d.CapturedPages(ext)); err != nil {
				return err
			}
		}
	}
	b.Set(entries)
	return b.Commit(r.g.index.mark)
}

// log replays the log from where index or backings are behind, whichever is
// more, and finds its end.
func (r *recovery) log() error {
	g := r.g
	if len(r.logs) == 0 {
		return nil
	}
	from := min(r.mark.LSN, r.applied)
	logs := r.logs
	for len(logs) > 1 && logs[1].First <= from+1 {
		logs = logs[1:]
	}
	r.last = logs[0].First - 1
	disks := map[record.DiskID]*disk.Disk{}
	for _, d := range g.disks {
		disks[d.ID] = d
	}
	q := replayQueue{r: r, disks: disks}
	at, atOff := logs[0], logs[0].Start()
	err := scanBeside(logs, func(rec queued) error {
		h := &rec.h
		if h.LSN != r.last+1 {
			return fmt.Errorf("%w: LSN %d follows LSN %d", record.ErrCorrupt, h.LSN, r.last)
		}
		r.last, r.durable = h.LSN, max(r.durable, h.Durable)
		at, atOff = rec.file, rec.off+h.Size()
		return q.add(rec)
	})
	if err != nil && !errors.Is(err, record.ErrCorrupt) {
		return fmt.Errorf("replay the log: %w", err)
	}
	// Whatever lies behind, if it was durable, says so in its own header.
	if derr := r.behind(at, atOff); derr != nil {
		return derr
	}
	if len(q.absent) > 0 && !g.o.ReadOnly {
		return fmt.Errorf("disk %d of the group is not configured, and its backing lacks records up to LSN %d: configure it again", q.absent[0], r.last)
	}
	if r.last < r.durable {
		if err == nil {
			err = fmt.Errorf("%w: the log ends at LSN %d", record.ErrCorrupt, r.last)
		}
		r.damage = fmt.Errorf("LSN %d was durable and is gone: %w", r.last+1, err)
	}
	return q.finish()
}

// scanBeside calls fn with the records of log files from the first one's start
// on, while it reads on ahead of fn: reading headers and replaying them take about as long.
func scanBeside(logs []*segment.File, fn func(queued) error) error {
	const ahead = 1024 // records handed over at once
	batches := make(chan []queued, 4)
	done := make(chan struct{}) // fn wants no more
	scanned := make(chan error, 1)
	go func() {
		var batch []queued
		var sums arena
		send := func() error {
			select {
			case batches <- batch:
				batch = make([]queued, 0, ahead)
				return nil
			case <-done:
				return segment.ErrStop
			}
		}
		err := segment.ScanLog(logs, logs[0].Start(), func(f *segment.File, off int64, h record.Header) error {
			h.Sums = sums.clone(h.Sums)
			if batch = append(batch, queued{f, off, h}); len(batch) < ahead {
				return nil
			}
			return send()
		})
		_ = send() // what was read before an error counts
		close(batches)
		scanned <- err
	}()
	var err error
	for batch := range batches {
		for i := 0; i < len(batch) && err == nil; i++ {
			if err = fn(batch[i]); err != nil {
				close(done)
			}
		}
	}
	if serr := <-scanned; err == nil {
		err = serr
	}
	return err
}

// arena keeps small slices together.
type arena []byte

func (a *arena) clone(b []byte) []byte {
	if len(b) > cap(*a)-len(*a) {
		*a = make([]byte, 0, max(64<<10, len(b)))
	}
	*a = append(*a, b...)
	return (*a)[len(*a)-len(b) : len(*a) : len(*a)]
}

// replayQueue holds records back until they are known to have been durable.
// What never is, the tail, is verified payload and all: the crash may have torn it.
type replayQueue struct {
	r     *recovery
	disks map[record.DiskID]*disk.Disk
	recs  []queued

	absent []record.DiskID // disks that are not configured, with records to apply
}

type queued struct {
	file *segment.File
	off  int64
	h    record.Header
}

func (q *replayQueue) add(rec queued) error {
	if id := rec.h.Disk; q.disks[id] == nil && rec.h.LSN > q.r.applied && rec.h.Kind != record.KindMarker && !slices.Contains(q.absent, id) {
		q.absent = append(q.absent, id)
	}
	q.recs = append(q.recs, rec)
	n := 0
	for n < len(q.recs) && q.recs[n].h.LSN <= q.r.durable {
		if err := q.replay(&q.recs[n]); err != nil {
			return err
		}
		n++
	}
	if n == len(q.recs) {
		q.recs = q.recs[:0]
	} else {
		q.recs = q.recs[n:]
	}
	return nil
}

func (q *replayQueue) replay(rec *queued) error {
	return q.r.replay(q.disks[rec.h.Disk], rec.file, rec.off, &rec.h)
}

// finish replays the tail up to its first torn record.
func (q *replayQueue) finish() (err error) {
	var buf []byte
	for i := range q.recs {
		rec := &q.recs[i]
		if rec.h.LSN > q.r.durable {
			buf, err = rec.file.VerifyPayload(rec.off, rec.h, buf)
			if errors.Is(err, record.ErrCorrupt) {
				q.r.last = rec.h.LSN - 1
				return nil
			}
			if err != nil {
				return err
			}
		}
		if err := q.replay(rec); err != nil {
			return err
		}
	}
	return nil
}

// behind looks for valid records behind a damaged one, and raises durable to
// what they say was.
func (r *recovery) behind(f *segment.File, off int64) error {
	for _, g := range r.logs {
		if g.Number < f.Number {
			continue
		}
		from := g.Start()
		if g == f {
			from = off
		}
		for {
			at, h, ok, err := g.Resync(from)
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			r.durable = max(r.durable, h.Durable)
			from = at + record.Alignment
		}
	}
	return nil
}

// replay takes a record up again: for the index, the overlay and the labels.
func (r *recovery) replay(d *disk.Disk, f *segment.File, off int64, h *record.Header) error {
	g := r.g
	if h.Kind == record.KindMarker {
		m, err := readMarker(f, off, h)
		if errors.Is(err, record.ErrCorrupt) {
			g.log.Error("a marker is damaged and is left out", zap.Uint64("lsn", uint64(h.LSN)), zap.Error(err))
			return nil
		}
		if err != nil {
			return err
		}
		g.append.labels[m.Label] = h.LSN
		if h.Flags&record.FlagDiscontinuity != 0 && d != nil {
			d.SetKnownSince(h.LSN)
		}
		if h.LSN > r.mark.LSN {
			g.append.pend.markers = append(g.append.pend.markers, m)
		}
	} else {
		if h.LSN > r.mark.LSN {
			g.append.pend.entries = appendEntries(g.append.pend.entries, h, f.Number, off)
		}
		if h.LSN > r.applied && d != nil {
			g.append.weight += d.Insert(h, f.Number, off+int64(h.EncodedSize()))
			g.unapplied.Add(max(h.Size(), record.BlockSize))
		}
	}
	if h.LSN > r.mark.LSN {
		if h.Time-g.lastTime.Load() >= timeMarkEvery || h.LSN%4096 == 1 {
			g.append.pend.times = append(g.append.pend.times,
				index.TimeMark{Time: h.Time, LSN: h.LSN, File: f.Number, Off: uint32(off)})
		}
	}
	g.lastTime.Store(max(g.lastTime.Load(), h.Time))
	return nil
}

func readMarker(f *segment.File, off int64, h *record.Header) (record.Marker, error) {
	payload, err := f.VerifyPayload(off, *h, nil)
	if err != nil {
		return record.Marker{}, err
	}
	return record.DecodeMarker(h.LSN, h.Time, payload)
}

// start makes the group ready to be written.
func (g *Group) start(r *recovery) error {
	last := max(r.last, g.Horizon())
	maps.DeleteFunc(g.append.labels, func(_ string, lsn record.LSN) bool { return lsn <= g.Horizon() })
	g.append.next = last + 1
	g.lastTime.Store(max(g.lastTime.Load(), r.mark.LastTime))
	g.appended.Store(uint64(last))
	g.durable.Store(uint64(last))
	g.applied.Store(uint64(min(r.applied, last)))
	g.checkpointed.Store(uint64(min(r.applied, last)))
	g.indexed.Store(uint64(min(r.mark.LSN, last)))
	g.apply.applied = min(r.applied, last)
	g.append.lag = len(g.append.pend.entries)
	g.append.pend.last = last
	g.append.ready, g.append.pend = []*pending{g.append.pend}, &pending{}
	if g.unapplied.Load() > 0 {
		g.append.oldest = g.o.Now()
	}
	if r.damage != nil {
		g.failLocked(r.damage)
		return nil
	}
	if g.o.ReadOnly {
		return nil
	}
	// A new file: what a crash left behind the last record can never follow it.
	if err := g.append.log.Roll(g.header(last+1), 0); err != nil {
		return fmt.Errorf("begin the log: %w", err)
	}
	if err := g.append.log.Sync(); err != nil {
		return err
	}
	return g.dropEmpty(last)
}

// dropEmpty removes log files that hold no record of the history: those whose
// records are superseded by the file that was begun after the last one, and
// those behind the horizon, which an expiry forgot and a crash brought back.
func (g *Group) dropEmpty(last record.LSN) error {
	var empty []*segment.File
	files := g.set.Files(segment.Log)
	for i, f := range files[:len(files)-1] {
		if f.First > last || f.First <= g.Horizon() && files[i+1].First-1 <= g.Horizon() {
			empty = append(empty, f)
		}
	}
	if len(empty) == 0 {
		return nil
	}
	return g.set.Remove(empty...)
}
