package journal

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// received is a record of another daemon's, or of a bridge, which is this one's own.
type received struct {
	record.Header
	payload []byte
	d       *disk.Disk // nil: a note
}

// receiveBytes is what records may cost that are appended at once, if it is more than one: bytes of payload, a block for each, and a
// byte for a block of its extent, which the index has versions of.
const receiveBytes = 1 << 20

// Receive appends records of the daemon whose group this one follows, under their LSNs. When it returns without an
// error, all of them are with the kernel, and durable after a Sync. It waits while the backings are too far behind.
//
// What is not the next records of the group's history is refused, nothing changed: ErrDiverged if it is of another.
// A record of a disk that the group does not have is ErrDetached: see Adopt. On another error a prefix may have been appended.
func (g *Group) Receive(run record.Run) error {
	if err := g.receive(run); err != nil {
		return fmt.Errorf("receive LSN %d to %d of group %s: %w", run.First, run.Last, g.name, err)
	}
	return nil
}

func (g *Group) receive(run record.Run) error {
	g.receiving.Lock()
	defer g.receiving.Unlock()
	recs, s, err := g.accept(run)
	if err != nil {
		return err
	}
	for len(recs) > 0 {
		n := 0
		for cost := int64(0); n < len(recs) && cost < receiveBytes; n++ {
			cost += int64(recs[n].Payload) + record.BlockSize + recs[n].Extent.Len/record.BlockSize
		}
		some := recs[:n]
		err := g.admit(func() error { return g.waitRoomLocked(g.endedLocked) }, func() error { return g.receiveLocked(&some, s) })
		if err != nil {
			return err
		}
		recs = recs[n:]
	}
	return nil
}

// checkRun says whether a run is what it says, and may be the group's next records, whoever wrote it.
func (g *Group) checkRun(run record.Run) (recs []received, err error) {
	next, last := run.First, g.recordTime.Load()
	err = record.Each(run.Bytes, func(h record.Header, payload []byte) error {
		rec := received{Header: h, payload: payload}
		if err := g.checkReceived(&rec, next, last); err != nil {
			return err
		}
		next, last = next+1, h.Time
		recs = append(recs, rec)
		return nil
	})
	if err == nil && next != run.Last+1 {
		err = fmt.Errorf("%w: they end at LSN %d", record.ErrCorrupt, next-1)
	}
	return recs, err
}

// accept says whether a run follows the group's history, and makes its reigns and its table the group's. It returns the
// run's records, and the standing under which they may be appended.
func (g *Group) accept(run record.Run) ([]received, *standing, error) {
	g.joining.Lock()
	defer g.joining.Unlock()
	if !g.Follows() {
		return nil, nil, fmt.Errorf("the group is this daemon's, in epoch %d: have it follow first", g.Reigns().Epoch())
	}
	head := g.Head()
	if after, open := g.Bridging(); open {
		return nil, nil, fmt.Errorf("it is being brought over a gap behind LSN %d: have that end, or rewind it", after)
	}
	if run.First != head+1 || run.Last < run.First {
		return nil, nil, fmt.Errorf("%w: LSN %d is the next", record.ErrCorrupt, head+1)
	}
	was := g.standing.Load()
	if err := checkSuccession(was.reigns, head, run); err != nil {
		return nil, nil, err
	}
	table, err := g.tableOf(run)
	if err != nil {
		return nil, nil, err
	}
	recs, err := g.checkRun(run)
	if err != nil {
		return nil, nil, err
	}
	m := g.disks.Load()
	if slices.Equal(table, m.table) && slices.Equal(was.reigns, run.Reigns) {
		return recs, was, nil
	}
	now := &standing{slices.Clone(run.Reigns), true}
	err = g.rollWith(true, func() (undo func(), err error) {
		g.standing.Store(now)
		g.disks.Store(&members{all: m.all, table: table})
		return func() {
			g.standing.Store(was)
			g.disks.Store(m)
		}, nil
	})
	if err != nil {
		return nil, nil, err
	}
	g.log.Info("the writer's reigns or disks are others from here on", zap.Uint64("lsn", uint64(run.First)), zap.Uint64("epoch", run.Reigns.Epoch()))
	return recs, now, nil
}

// checkSuccession says whether records of a run's reigns can follow a journal that ends at head, and whether its writer
// may be obeyed.
func checkSuccession(was record.Reigns, head record.LSN, run record.Run) error {
	if err := run.Reigns.Check(); err != nil {
		return err
	}
	now := run.Reigns[len(run.Reigns)-1]
	if now.First > run.First {
		return fmt.Errorf("%w: the reign of epoch %d begins at LSN %d", record.ErrCorrupt, now.Epoch, now.First)
	}
	present := was[len(was)-1]
	if now.Epoch < present.Epoch {
		return fmt.Errorf("%w: it is of epoch %d, and the group has come to epoch %d", ErrDiverged, now.Epoch, present.Epoch)
	}
	common, err := was.Common(head, run.Reigns, run.Last)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDiverged, err)
	}
	if common < head || now.Epoch == present.Epoch && now != present {
		return fmt.Errorf("%w: they have LSN %d in common, and the group has come to LSN %d in epoch %d", ErrDiverged, common, head, present.Epoch)
	}
	return nil
}

// tableOf is the group's disk table as a run has it. Disks that were adopted ahead of it stay.
func (g *Group) tableOf(run record.Run) ([]record.Disk, error) {
	if err := record.CheckDisks(run.Disks, run.First-1); err != nil {
		return nil, err
	}
	table := slices.Clone(g.disks.Load().table)
	for _, t := range run.Disks {
		i := slices.IndexFunc(table, func(o record.Disk) bool { return o.ID == t.ID })
		switch {
		case i < 0:
			return nil, fmt.Errorf("disk %s of the writer is not here: %w", t.Name, ErrDetached)
		case table[i].Name != t.Name || table[i].Size != t.Size:
			return nil, fmt.Errorf("%w: disk %d is %q of %d bytes, and the group has %q of %d", ErrDiverged, t.ID, t.Name, t.Size, table[i].Name, table[i].Size)
		}
		if t.Removed == 0 && table[i].Removed != 0 {
			return nil, fmt.Errorf("disk %s had left the group, and has come again, and what was done to its backing here meanwhile is not known: %w", t.Name, ErrDetached)
		}
		table[i].Removed = t.Removed
	}
	return table, nil
}

// checkReceived says whether a record may be the next one, after one of a time, and finds its disk.
func (g *Group) checkReceived(rec *received, next record.LSN, last int64) error {
	switch {
	case rec.LSN != next:
		return fmt.Errorf("%w: LSN %d, expected %d", record.ErrCorrupt, rec.LSN, next)
	case rec.Time < last:
		return fmt.Errorf("%w: LSN %d is older than the record before it", record.ErrCorrupt, rec.LSN)
	case rec.Flags&record.FlagDiscontinuity != 0:
		return fmt.Errorf("LSN %d, of disk %d: %w: the group can be brought over it only", rec.LSN, rec.Disk, ErrDiscontinuity)
	case rec.Kind.Note():
		return checkNote(&rec.Header, rec.payload)
	case rec.Kind == record.KindOriginal, rec.Kind == record.KindHole, rec.Kind == record.KindExpired:
		return fmt.Errorf("%w: LSN %d is an %v", record.ErrCorrupt, rec.LSN, rec.Kind)
	}
	if rec.d = g.disk(rec.Disk); rec.d == nil || !rec.d.Attached() {
		return fmt.Errorf("%v of LSN %d: disk %d: %w", rec.Kind, rec.LSN, rec.Disk, ErrDetached)
	}
	if !rec.Extent.In(rec.d.Size) || !rec.Extent.Aligned(rec.d.Size) {
		return fmt.Errorf("%w: %v of LSN %d: %v on disk %s of %d bytes", record.ErrCorrupt, rec.Kind, rec.LSN, rec.Extent, rec.d.Name, rec.d.Size)
	}
	return nil
}

// checkNote says whether learnLocked can take a note up.
func checkNote(h *record.Header, payload []byte) (err error) {
	switch h.Kind {
	case record.KindMarker:
		_, err = record.DecodeMarker(h.LSN, h.Time, payload)
	case record.KindAmend:
		_, err = record.DecodeAmendment(payload)
	case record.KindDefine:
		_, err = record.DecodeDefinition(h.LSN, payload)
	}
	return err
}

// receiveLocked appends records that were accepted under a standing, and takes those off that it has appended.
func (g *Group) receiveLocked(recs *[]received, s *standing) error {
	a := &g.append
	for len(*recs) > 0 {
		if err := g.endedLocked(); err != nil {
			return err
		}
		if lsn := (*recs)[0].LSN; lsn != a.next || g.standing.Load() != s {
			return fmt.Errorf("%w: LSN %d was to come next, and LSN %d is: the group has another writer meanwhile", ErrDiverged, lsn, a.next)
		}
		n, room, bytes, versions := 0, 0, int64(0), 0
		for _, rec := range *recs {
			bytes += rec.Size()
			if !rec.Kind.Note() {
				versions += versionsOf(rec.Extent)
			}
			if !g.fitsLocked(n, bytes, versions) {
				break
			}
			n, room = n+1, room+rec.EncodedSize()
		}
		if n == 0 {
			if err := g.rollLocked((*recs)[0].Size()); err != nil {
				return err
			}
			continue
		}
		if err := g.receiveSomeLocked((*recs)[:n], room); err != nil {
			return err
		}
		*recs = (*recs)[n:]
	}
	return nil
}

// receiveSomeLocked appends records that fit the current segment.
func (g *Group) receiveSomeLocked(recs []received, room int) error {
	a := &g.append
	a.enc.Reset(room)
	durable, salt := g.Durable(), a.log.Current().Salt
	for i := range recs {
		recs[i].Durable, recs[i].Salt = durable, salt
		a.enc.Add(&recs[i].Header, recs[i].payload)
	}
	off := a.log.Tail()
	if err := a.log.Append(a.enc.Vec, a.enc.Bytes); err != nil {
		return g.failLocked(err)
	}
	var owed int64
	for i := range recs {
		rec := &recs[i]
		if rec.Kind.Note() {
			if err := g.learnLocked(&rec.Header, rec.payload); err != nil {
				return g.failLocked(err)
			}
			g.noteTimeLocked(&rec.Header, a.log.Current().Number, off)
		} else {
			var cost int64
			if rec.Kind != record.KindWrite {
				_, cost = rec.d.InBacking(rec.Extent, math.MaxInt64) // the writer cut it by its own holes
			}
			g.noteLocked(&rec.Header, rec.d, off)
			owed += max(rec.Size(), cost)
		}
		off += rec.Size()
	}
	g.advanceLocked(recs[len(recs)-1].LSN, len(recs), a.enc.Bytes, owed)
	return nil
}

// Adopt takes a disk into a group that follows another daemon's, as the writer's table has it. Its backing must hold,
// durably, what the disk holds at the group's head: of a disk that is new to the writer's group, what it came with. It
// has no past before that here. It is durable when Adopt returns.
func (g *Group) Adopt(c DiskConfig, t record.Disk) error {
	g.joining.Lock()
	defer g.joining.Unlock()
	err := g.adopt(c, t)
	if err != nil {
		return fmt.Errorf("adopt disk %s of group %s: %w", t.Name, g.name, err)
	}
	return nil
}

func (g *Group) adopt(c DiskConfig, t record.Disk) error {
	if !g.Follows() {
		return errors.New("the group is this daemon's: add the disk")
	}
	if after, open := g.Bridging(); open {
		return fmt.Errorf("the group is being brought over a gap behind LSN %d", after)
	}
	if c.Name != t.Name {
		return fmt.Errorf("its backing is given under the name %s", c.Name)
	}
	m := g.disks.Load()
	if known := g.disk(t.ID); known == nil {
		if err := record.CheckDisks(append(slices.Clip(m.table), t), g.Head()); err != nil {
			return err
		}
	} else if err := record.CheckDisks([]record.Disk{t}, g.Head()); err != nil || t.Removed != 0 {
		return fmt.Errorf("it is not in the writer's group: %w", errors.Join(err, ErrDetached))
	} else if has := m.entry(known); has.Name != t.Name || has.Size != t.Size {
		return fmt.Errorf("%w: disk %d is %q of %d bytes here", ErrDiverged, t.ID, has.Name, has.Size)
	} else if known.Attached() || has.Removed == 0 || has.Removed > g.expiredTo() {
		return errors.New("it is in the group, or its history is: it can not be given another backing")
	}
	d := disk.New(t.ID, t.Name, t.Size, t.Added, g)
	if _, err := g.open(c, d); err != nil {
		return err
	}
	if err := g.become(d, t, true); err != nil {
		return errors.Join(err, g.letGo(d))
	}
	return nil
}
