package journal

import (
	"cmp"
	"errors"
	"fmt"

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
	g.append.markers.labels = map[string]record.LSN{}
	g.pins.points, g.pins.from = map[record.LSN]int{}, map[record.LSN]int{}
	g.policy.Store(&gc.Retain)
	g.limit.Store(cmp.Or(gc.Limit, s.o.Limit))
	g.cleaning.needs = needs{}
	g.compacting.plain = map[uint32]bool{}
	g.pins.holds = map[*Hold]record.LSN{}
	g.pins.markers = map[record.LSN]bool{}
	g.pins.users = map[*disk.Disk]int{}
	g.disks.Store(&members{})
	g.append.log = segment.NewWriter(set, segment.Log, s.o.SegmentSize, s.o.keepLog())
	g.apply.orig = segment.NewWriter(set, segment.Originals, s.o.SegmentSize, s.o.keepApply())
	if err := g.recover(gc); err != nil {
		err = errors.Join(err, g.closeOnError())
		if errors.Is(err, errRewound) {
			for _, d := range gc.Disks {
				s.release(gc.Name + "/" + d.Name)
			}
			return s.openGroup(gc, newID)
		}
		return nil, err
	}
	return g, nil
}

// errRewound says that a group is to be opened anew, as the first step of its rewind is done.
var errRewound = errors.New("the group is to be opened anew")

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
	fresh    bool                         // the index knew nothing of the group
	since    map[record.DiskID]record.LSN // of disks that had a discontinuity which the log may have forgotten
	mark     index.Watermark
	origFile uint32          // originals up to this file were committed before the crash
	applied  record.LSN      // the backings hold every record up to here
	overlaid record.LSN      // backings and overlays do, before the log is replayed
	absent   []record.DiskID // disks that are not configured, with records to apply
	last     record.LSN      // the last record of the log
	durable  record.LSN      // some record or the index says that this much was
	damage   error           // of a record that was durable
	renewed  *segment.File   // whose header was written again last

	rewind *rewindNote // of a rewind whose backings are to be restored; nil: there is none

	added     []*disk.Disk // that the group did not have before
	returning []*disk.Disk // that were removed from it
}

func (g *Group) recover(gc GroupConfig) error {
	rewind, err := g.readRewindNote()
	if err != nil {
		return err
	}
	restore := false
	if rewind != nil {
		if restore, err = g.resumeRewind(rewind); err != nil {
			return fmt.Errorf("go on rewinding to LSN %d: %w", rewind.to, err)
		}
	}
	r := &recovery{g: g, logs: g.set.Files(segment.Log)}
	if restore {
		r.rewind = rewind
	}
	if len(r.logs) == 0 && gc.Received && gc.Begin == nil {
		return ErrNotBegun
	}
	table, err := r.head(gc.Begin)
	if err != nil {
		return err
	}
	if len(r.logs) == 0 && gc.Begin != nil {
		if err := g.clearBegun(); err != nil {
			return err
		}
	}
	if !g.o.ReadOnly {
		// What the page cache holds may be newer than the disk: it is about
		// to be believed.
		if err := g.set.Sync(); err != nil {
			return err
		}
	}
	if g.ix, err = g.store.ix.Group(g.id); err != nil {
		return err
	}
	if len(r.logs) == 0 && !g.o.ReadOnly {
		if err := g.ix.DeleteAll(); err != nil { // of one with this number that did not come to a log
			return err
		}
	}
	if err := r.openDisks(table, gc.Disks); err != nil {
		return err
	}
	if err := r.state(); err != nil {
		return err
	}
	if err := r.originals(); err != nil {
		return err
	}
	if len(r.logs) == 0 && gc.Begin != nil {
		if err := r.begin(gc.Begin); err != nil {
			return fmt.Errorf("begin a group that follows another daemon's: %w", err)
		}
	}
	r.overlays()
	if err := r.log(); err != nil {
		return err
	}
	if err := r.broken(); err != nil {
		return err
	}
	if err := g.start(r); err != nil {
		return err
	}
	if g.o.ReadOnly || r.damage != nil {
		return nil
	}
	if restore {
		return r.restoreRewind()
	}
	if g.Follows() {
		return g.awaitWriter(r)
	}
	if r.fresh {
		err = r.dropStale()
	} else {
		err = g.notice(r)
	}
	if err != nil {
		return err
	}
	if err := g.welcome(r.returning, r.fresh); err != nil {
		return err
	}
	if err := g.ConcludeLeft(); err != nil {
		g.log.Warn("markers that were being taken when the daemon stopped name no point until the next start", zap.Error(err))
	}
	return nil
}

// awaitWriter ends the recovery of a group whose records are another daemon's: nothing is journaled here. What others did
// to a backing while the group was closed fails it.
func (g *Group) awaitWriter(r *recovery) error {
	if r.fresh {
		return r.dropStale()
	}
	for _, d := range g.Disks() {
		changed, err := g.changed(d, g.Head())
		if err != nil {
			return err
		}
		if changed {
			_ = g.fail(fmt.Errorf("backing %s of disk %s was changed outside of Tidemark, and the group follows another daemon's: remove the group's journal here and have it seeded again", d.Path(), d.Name))
			return nil
		}
	}
	return nil
}

// clearBegun removes what a beginning left that did not come to a log.
func (g *Group) clearBegun() error {
	if g.o.ReadOnly {
		return errors.New("a store at rest begins no group")
	}
	if err := g.dropRewindNote(); err != nil {
		return err
	}
	if err := g.set.RemoveBroken(false); err != nil {
		return err
	}
	return g.set.Remove(g.set.Files(segment.Originals)...)
}

// head reads who writes the group and which disks it has from the newest segment of the log.
func (r *recovery) head(begin *record.Beginning) (table []record.Disk, err error) {
	g := r.g
	switch {
	case len(r.logs) > 0 && begin != nil:
		return nil, fmt.Errorf("begin it at LSN %d: there is a journal of it already, in %s", begin.At, g.dir)
	case len(r.logs) > 0:
		newest := r.logs[len(r.logs)-1]
		g.id = newest.Group
		s := &standing{newest.Reigns, newest.Follows}
		if first := s.reigns[0]; first.ID == [16]byte{} {
			// Of a version that knew none. The next segment has it.
			if s.reigns, err = firstReign(first.Epoch); err != nil {
				return nil, err
			}
		}
		g.standing.Store(s)
		return newest.Disks, nil
	case begin != nil:
		g.standing.Store(&standing{begin.Reigns, true})
		return begin.Disks, nil
	}
	reigns, err := firstReign(1)
	g.standing.Store(&standing{reigns: reigns})
	return nil, err
}

func firstReign(epoch uint64) (record.Reigns, error) {
	r, err := newReign(epoch, 1)
	return record.Reigns{r}, err
}

// broken tells files that a crash left unfinished, which held nothing durable,
// from damaged ones.
func (r *recovery) broken() error {
	for _, b := range r.g.set.Broken() {
		if r.rewind != nil && b.Number > r.rewind.last {
			continue // begun by the rewind, or a recovery after it: nothing stood in it
		}
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
	// Without the index, nothing tells whether a file of originals was ever whole.
	return r.g.set.RemoveBroken(r.fresh && len(r.logs) > 0)
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
	if r.applied, err = g.stateLSN(stateApplied); err != nil {
		return err
	}
	if len(r.logs) > 0 {
		// The log begins behind the horizon, whatever else was lost.
		g.horizon.Store(uint64(r.logs[0].First - 1))
		r.applied = max(r.applied, r.logs[len(r.logs)-1].Applied, r.logs[0].First-1)
	}
	// A log file that was expired may not have been removed yet: the index
	// forgot what is in it.
	horizon, err := g.stateLSN(stateHorizon)
	if err == nil && r.fresh {
		horizon, err = r.expired()
	} else if err == nil {
		err = r.keptState()
	}
	if err != nil {
		return err
	}
	g.horizon.Store(max(g.horizon.Load(), uint64(horizon)))
	eaten, err := g.stateLSN(stateEaten)
	if err != nil {
		return err
	}
	g.eaten.Store(int64(eaten))
	if err := g.loadVerified(); err != nil {
		return err
	}
	for len(r.logs) > 1 && r.logs[1].First-1 <= g.expiredTo() {
		r.logs = r.logs[1:]
	}
	r.applied = max(r.applied, g.expiredTo()) // nothing else expires
	reigns := g.Reigns()
	r.durable = max(r.mark.LSN, r.applied, reigns[len(reigns)-1].First-1) // see rollWith
	r.findGaps()
	g.index.mark = r.mark
	for _, d := range g.disks.Load().all {
		err := g.ix.Captured(d.ID, func(page int64, bits []byte) error {
			d.LoadCaptured(page, bits)
			return nil
		})
		if err != nil {
			return err
		}
		known, err := g.stateLSN(stateKnown(d.ID))
		if err != nil {
			return err
		}
		d.SetKnownSince(max(known, r.since[d.ID]))
	}
	err = g.ix.Definitions(func(d index.Definition) error {
		g.append.definitions.set(d.Definition, d.At)
		return nil
	})
	if err != nil {
		return err
	}
	return g.ix.Markers(0, func(m record.Marker) (bool, error) {
		g.append.markers.set(m)
		return true, nil
	})
}

// keptState takes up the points that are kept, as the index has them.
func (r *recovery) keptState() error {
	b, err := r.g.ix.State(stateKept)
	if err != nil || b == nil {
		return err
	}
	list, err := decodeKept(b)
	r.g.kept.Store(&list.kept)
	r.g.hadKept.Store(true)
	return err
}

// expired is the horizon that the last expiry came to, as far as the originals say. What is kept beyond it is taken up.
func (r *recovery) expired() (horizon record.LSN, err error) {
	list, horizon, ever, err := r.g.readKept()
	if err != nil || !ever {
		return horizon, err
	}
	r.g.hadKept.Store(true)
	if err := list.err; err != nil {
		r.g.log.Error("which points were kept beyond the horizon is not known any more: those before it can not be viewed, pinned ones neither", zap.Error(err))
		return horizon, nil
	}
	r.g.kept.Store(&list.kept)
	r.since = list.since
	for _, m := range list.markers {
		r.g.append.markers.set(m)
		r.g.append.pend.markers = append(r.g.append.pend.markers, index.MarkerChange{Marker: m})
	}
	return horizon, nil
}

// restoreRewind goes on with a rewind whose backings are to be restored. What can not be restored fails the group, and nobody has its
// disks, which may be a mix.
func (r *recovery) restoreRewind() (err error) {
	g := r.g
	if r.fresh {
		err = r.dropStale()
	}
	if err == nil {
		err = g.readyToRewind(r.rewind.to)
	}
	if err == nil {
		err = g.rewindTo(r.rewind.to)
	}
	if err == nil {
		return errRewound
	}
	_ = g.fail(fmt.Errorf("go on rewinding to LSN %d: %w", r.rewind.to, err))
	for _, d := range g.Disks() {
		if err := g.leave(d); err != nil {
			return err
		}
	}
	return nil
}

// believe verifies a record that nothing says was durable. It may have been read from
// memory only, so that it is written again; the caller syncs its file.
func (r *recovery) believe(f *segment.File, off int64, h record.Header, buf []byte) ([]byte, error) {
	if r.g.o.ReadOnly {
		return f.VerifyPayload(off, h, buf)
	}
	if r.renewed != f {
		if err := f.RenewHeader(); err != nil {
			return buf, err
		}
		r.renewed = f
	}
	return f.Renew(off, h, buf)
}

// log replays the log from where index or overlays are behind, whichever is
// more, and finds its end.
func (r *recovery) log() error {
	g := r.g
	if len(r.logs) == 0 {
		return nil
	}
	from := min(r.mark.LSN, r.overlaid)
	logs := r.logs
	for len(logs) > 1 && logs[1].First <= from+1 {
		logs = logs[1:]
	}
	r.last = logs[0].First - 1
	q := replayQueue{r: r, prev: r.last}
	at, atOff := logs[0], logs[0].Start()
	err := scanBeside(logs, func(rec queued) error {
		h := &rec.h
		if !rec.file.Succeeds(r.last, h) {
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
	if len(r.absent) > 0 && !g.o.ReadOnly {
		return fmt.Errorf("disk %d of the group is not configured, and its backing lacks records up to LSN %d: configure it again", r.absent[0], r.last)
	}
	if r.last < r.durable {
		if err == nil {
			err = fmt.Errorf("%w: the log ends at LSN %d", record.ErrCorrupt, r.last)
		}
		r.damage = fmt.Errorf("LSN %d was durable and is gone: %w", r.last+1, err)
	}
	return q.finish()
}

// start makes the group ready to be written.
func (g *Group) start(r *recovery) error {
	last := max(r.last, g.expiredTo())
	if len(r.logs) > 0 {
		g.membersAt(last, r.added)
	}
	g.append.markers.expire(g.expiredTo(), g.KeptPoints())
	for _, m := range g.append.markers.all {
		if (m.Pinned || m.IsHeld(g.o.Now())) && !m.Pending {
			g.pins.markers[m.LSN] = true // of those that the index had
		}
	}
	g.append.next = last + 1
	g.newestLocked(max(g.recordTime.Load(), r.mark.LastTime))
	for _, f := range r.logs {
		// One behind records that are lost says nothing of those that come in their stead; one that this daemon began, and wrote
		// nothing to, says nothing of another's.
		if f.First <= last || f.First == last+1 && (f.Follows || !g.Follows()) {
			g.lastTime.Store(max(g.lastTime.Load(), f.Created))
		}
	}
	g.appended.Store(uint64(last))
	g.durable.Store(uint64(last))
	g.applied.Store(uint64(min(r.applied, last)))
	g.checkpointed.Store(uint64(min(r.applied, last)))
	g.indexed.Store(uint64(min(r.mark.LSN, last)))
	g.append.lag = len(g.append.pend.entries)
	g.append.pend.last = last
	g.append.ready, g.append.pend = []*pending{g.append.pend}, &pending{}
	if g.unapplied.Load() > 0 {
		g.append.oldest = g.o.Now()
	}
	g.limitOwedLocked()
	g.apply.saved = r.overlaid
	if r.damage != nil {
		// Originals may be missing from the index: views must not fall to backings.
		for _, d := range g.disks.Load().all {
			d.SetKnownSince(max(d.KnownSince(), last+1))
		}
		_ = g.failLocked(r.damage)
		return nil
	}
	if g.o.ReadOnly {
		return nil
	}
	// A new file: what a crash left behind the last record can never follow it.
	if err := g.newLogLocked(0); errors.Is(err, segment.ErrFull) {
		// Reads go on, and an expiry may help: the first write begins the file.
		g.append.noRoom = fmt.Errorf("the journal of group %s is full: %w", g.name, err)
		if len(r.logs) == 0 && g.Follows() {
			return g.append.noRoom // nothing would say whom it follows
		}
		return nil
	} else if err != nil {
		return fmt.Errorf("begin the log: %w", err)
	}
	if err := g.append.log.Sync(); err != nil {
		return err
	}
	if r.rewind != nil {
		return nil // its file may be the only one that says who the group is
	}
	return g.dropEmpty(last)
}

// dropEmpty removes log files that hold no record of the history: those whose
// records are superseded by the file that was begun after the last one, and
// those behind the horizon, which an expiry forgot and a crash brought back.
func (g *Group) dropEmpty(last record.LSN) error {
	var empty []*segment.File
	expired := false
	files := g.set.Files(segment.Log)
	for i, f := range files[:len(files)-1] {
		gone := f.First <= g.expiredTo() && files[i+1].First-1 <= g.expiredTo()
		if f.First > last || gone {
			empty, expired = append(empty, f), expired || gone
		}
	}
	if len(empty) == 0 {
		return nil
	}
	if expired {
		// The crash came before the note that they may go.
		if err := g.noteExpired(g.expiredTo(), g.KeptPoints(), g.currentMarker); errors.Is(err, segment.ErrFull) {
			return nil // the next expiry does
		} else if err != nil {
			return err
		}
	}
	return g.set.Remove(empty...)
}
