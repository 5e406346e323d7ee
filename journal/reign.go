package journal

import (
	"crypto/rand"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// standing is who writes a group's records. It is not changed once others may see it.
type standing struct {
	reigns  record.Reigns
	follows bool // another daemon
}

// Reigns are those of the group's records; the last is the present one. Not to be changed.
func (g *Group) Reigns() record.Reigns { return g.standing.Load().reigns }

// Follows reports whether the group's records are another daemon's: it takes them by Receive alone, and no write.
func (g *Group) Follows() bool { return g.standing.Load().follows }

// reignsOf are the reigns in a file's head. A file of a version that knew no ids has the group's first.
func (g *Group) reignsOf(f *segment.File) record.Reigns {
	if f.Reigns[0].ID == [16]byte{} {
		return g.Reigns()[:1]
	}
	return f.Reigns
}

// newReign draws a reign that begins at an LSN.
func newReign(epoch uint64, first record.LSN) (r record.Reign, err error) {
	r = record.Reign{Epoch: epoch, First: first}
	if _, err := rand.Read(r.ID[:]); err != nil {
		return r, fmt.Errorf("draw a reign's id: %w", err)
	}
	return r, nil
}

// Lead begins a reign of this daemon in a group that follows, of a higher epoch than any before it: from now on it takes writes. It is
// durable when Lead returns, with every record before it. Cuts of the writer before that were not concluded are.
func (g *Group) Lead(epoch uint64) (record.Reign, error) {
	g.joining.Lock()
	defer g.joining.Unlock()
	was := g.standing.Load()
	switch {
	case !was.follows:
		return record.Reign{}, fmt.Errorf("group %s is this daemon's already, in epoch %d", g.name, was.reigns.Epoch())
	case epoch <= was.reigns.Epoch():
		return record.Reign{}, fmt.Errorf("group %s can not be led in epoch %d: it has had epoch %d", g.name, epoch, was.reigns.Epoch())
	case len(was.reigns) >= record.MaxReigns:
		return record.Reign{}, fmt.Errorf("group %s has had %d reigns, and can have no more: begin another group", g.name, len(was.reigns))
	}
	if after, open := g.Bridging(); open {
		return record.Reign{}, fmt.Errorf("group %s is being brought over a gap behind LSN %d, and its disks are a mix: rewind it to there first", g.name, after)
	}
	var r record.Reign
	err := g.stand(func() (*standing, error) {
		var err error
		r, err = newReign(epoch, g.append.next)
		return &standing{reigns: was.reigns.With(r)}, err
	})
	if err != nil {
		return r, fmt.Errorf("lead group %s in epoch %d: %w", g.name, epoch, err)
	}
	g.log.Info("this daemon writes the group", zap.Uint64("epoch", epoch), zap.Uint64("from_lsn", uint64(r.First)))
	if err := g.ConcludeLeft(); err != nil {
		g.log.Warn("markers that were being taken by the writer before name no point until the next start", zap.Error(err))
	}
	return r, nil
}

// Follow has the group take no more writes: they are ErrFollows from now on. It is durable when Follow returns, with
// every record before it.
func (g *Group) Follow() error {
	g.joining.Lock()
	defer g.joining.Unlock()
	was := g.standing.Load()
	if was.follows {
		return nil
	}
	now := &standing{was.reigns, true}
	g.append.Lock()
	g.standing.Store(now)                 // from here on nothing moves the head
	g.lastTime.Store(g.recordTime.Load()) // the clock of what comes is another's
	g.append.room.Broadcast()
	g.append.Unlock()
	if err := g.stand(func() (*standing, error) { return now, nil }); err != nil {
		g.standing.Store(was)
		return fmt.Errorf("follow another daemon's group %s: %w", g.name, err)
	}
	g.log.Info("this daemon does not write the group any more", zap.Uint64("epoch", was.reigns.Epoch()), zap.Uint64("lsn", uint64(g.Head())))
	return nil
}

// Proclaim journals a record that changes nothing, if no record has the group's present reigns and disks at the head of its file: who
// follows learns of them with it. It is durable when Proclaim returns.
func (g *Group) Proclaim() error {
	if g.Follows() {
		return nil
	}
	var at record.LSN
	err := g.admittedNote(func() error {
		if g.proclaimedLocked() {
			return nil
		}
		h, err := g.appendNoteLocked(record.KindStanding, 0, 0, func(record.LSN, time.Time) []byte { return nil })
		at = h.LSN
		return err
	})
	if err != nil {
		return fmt.Errorf("journal who writes group %s, and its disks: %w", g.name, err)
	}
	return g.syncTo(at)
}

// proclaimedLocked reports whether the newest record stands under the group's present reigns and disks.
func (g *Group) proclaimedLocked() bool {
	now := g.append.log.Current()
	if now == nil || now.First < g.append.next {
		return now != nil
	}
	files := g.set.Files(segment.Log)
	for i := len(files) - 1; i >= 0; i-- {
		if f := files[i]; f.First < g.append.next {
			return slices.Equal(f.Disks, now.Disks) && slices.Equal(g.reignsOf(f), now.Reigns)
		}
	}
	return g.Head() == 0 // nobody has anything of it
}

// stand makes what next returns the group's standing, durably: recovery reads it at the head of the newest segment of
// the log. next is called with the append lock held.
func (g *Group) stand(next func() (*standing, error)) error {
	return g.rollWith(true, func() (undo func(), err error) {
		was := g.standing.Load()
		now, err := next()
		if err != nil {
			return nil, err
		}
		g.standing.Store(now)
		return func() { g.standing.Store(was) }, nil
	})
}

// rollWith begins a segment of the log whose head has what change makes of the group, durably. If it is settled, every
// record before it is durable first: a head that a crash leaves says so, and no other record can come in the stead of one
// that the reign before had written. change is called with the append lock held.
func (g *Group) rollWith(settled bool, change func() (undo func(), err error)) error {
	for again := true; again; {
		again = false
		if settled {
			if err := g.Sync(); err != nil {
				return err
			}
		}
		err := g.admit(g.endedLocked, func() error {
			if again = settled && g.Durable() < g.Head(); again {
				return nil
			}
			undo, err := change()
			if err != nil {
				return err
			}
			if err := g.rollLocked(0); err != nil {
				undo()
				return err
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return g.syncLog()
}
