package journal

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// markers are what the records of a group say of its markers, all of them taken together.
type markers struct {
	all    []record.Marker // by ascending LSN
	labels map[string]record.LSN
}

func (t *markers) find(lsn record.LSN) (int, bool) {
	return slices.BinarySearchFunc(t.all, lsn, func(m record.Marker, lsn record.LSN) int { return cmp.Compare(m.LSN, lsn) })
}

// held reports whether the marker of a record is held at a time.
func (t *markers) held(lsn record.LSN, now time.Time) bool {
	i, ok := t.find(lsn)
	return ok && t.all[i].IsHeld(now)
}

// set adds a marker, or puts it in the place of the one that its record took.
func (t *markers) set(m record.Marker) {
	i, ok := t.find(m.LSN)
	if ok {
		t.all[i] = m
	} else {
		t.all = slices.Insert(t.all, i, m)
	}
	t.labels[m.Label] = m.LSN
}

// remove forgets the marker of a record, and returns what it was.
func (t *markers) remove(lsn record.LSN) (m record.Marker, ok bool) {
	i, ok := t.find(lsn)
	if !ok {
		return m, false
	}
	m = t.all[i]
	t.all = slices.Delete(t.all, i, i+1)
	if t.labels[m.Label] == lsn {
		delete(t.labels, m.Label)
	}
	return m, true
}

// expire forgets the markers whose records are at or below the horizon, and not kept, and returns them.
func (t *markers) expire(horizon record.LSN, kept []KeptPoint) (gone []record.Marker) {
	t.all = slices.DeleteFunc(t.all, func(m record.Marker) bool {
		if _, ok := findKept(kept, m.LSN); ok || m.LSN > horizon {
			return false
		}
		gone = append(gone, m)
		return true
	})
	for _, m := range gone {
		if t.labels[m.Label] == m.LSN {
			delete(t.labels, m.Label)
		}
	}
	return gone
}

// amend does what an amendment says at a time, and returns what the index must learn of it. The marker may
// have expired: then it is nothing. One that is held is not deleted, and stays held for as long, whoever says what else.
func (t *markers) amend(a record.Amendment, now time.Time) (c index.MarkerChange, ok bool) {
	i, ok := t.find(a.Target)
	switch {
	case !ok:
		return c, false
	case a.Deleted && t.all[i].IsHeld(now):
		c.Marker = t.all[i]
	case a.Deleted:
		c.Marker, c.Deleted = t.all[i], true
		t.remove(a.Target)
	default:
		c.Marker = a.Marker
		c.LSN, c.Time, c.Label = a.Target, t.all[i].Time, t.all[i].Label
		if t.all[i].Held.After(c.Held) {
			c.Held = t.all[i].Held
		}
		t.set(c.Marker)
	}
	return c, true
}

// Mark journals a crash-consistent marker, and returns when it is durable. Of m, Label,
// Description, By, Pinned and Held count, and Asked, Note and Frozen if more was asked for and was not to be had.
// Its cut is one LSN of all disks: every write acknowledged before the call lies before it.
// ErrLabelInUse if the group has the label already.
func (g *Group) Mark(m record.Marker) (record.Marker, error) {
	m.Consistency, m.Pending = record.Crash, false
	m.Asked = max(m.Asked, record.Crash)
	return m, g.take(&m)
}

// Cut journals a marker whose consistency is not known yet, and returns when it is durable: while
// guests are frozen. It names no point until Conclude says what became of it. If that does not come before the
// group is closed, it turns out crash-consistent.
func (g *Group) Cut(m record.Marker) (record.Marker, error) {
	m.Consistency, m.Pending = record.Crash, true
	return m, g.take(&m)
}

func (g *Group) take(m *record.Marker) error {
	if err := errors.Join(record.CheckLabel(m.Label), record.CheckDescription(m.Description), record.CheckHeld(m.Held)); err != nil {
		return err
	}
	m.Trim()
	if err := g.appendMarker(m, 0, 0); err != nil {
		return err
	}
	return g.syncTo(m.LSN)
}

// CheckFree is an error, and ErrLabelInUse, if a label names a marker of the group.
func (g *Group) CheckFree(label string) error {
	g.append.Lock()
	defer g.append.Unlock()
	return g.checkFreeLocked(label)
}

func (g *Group) checkFreeLocked(label string) error {
	if lsn, ok := g.append.markers.labels[label]; ok {
		return fmt.Errorf("marker %q of group %s: %w: it names LSN %d", label, g.name, ErrLabelInUse, lsn)
	}
	return nil
}

// appendMarker journals a marker and fills in its LSN and time.
func (g *Group) appendMarker(m *record.Marker, flags uint8, disk record.DiskID) error {
	return g.admittedNote(func() error {
		a := &g.append
		if err := g.checkFreeLocked(m.Label); err != nil {
			return err
		}
		h, err := g.appendNoteLocked(record.KindMarker, flags, disk, func(record.LSN, time.Time) []byte { return m.Append(nil) })
		if err != nil {
			return err
		}
		m.LSN, m.Time = h.LSN, time.Unix(0, h.Time).UTC()
		a.markers.set(*m)
		a.pend.markers = append(a.pend.markers, index.MarkerChange{Marker: *m})
		g.pinAs(m) // it is the head: the horizon is below
		return nil
	})
}

// Conclude says what became of a marker that Cut took: m has its consistency, how long guests were
// frozen, and a note. One that is less than was asked for is deleted unless m.OrCrash is set; kept
// reports which. What it says is durable when it returns.
func (g *Group) Conclude(m record.Marker) (kept bool, err error) {
	m.Pending = false
	m.Trim()
	kept = m.Consistency >= m.Asked || m.OrCrash
	_, err = g.amend(m.Label, func(now *record.Marker) (bool, error) {
		if now.LSN != m.LSN || !now.Pending {
			return false, fmt.Errorf("marker %q of group %s is not of a cut that is under way", m.Label, g.name)
		}
		*now = m
		return !kept, nil
	})
	return kept, err
}

// Describe sets a marker's description.
func (g *Group) Describe(label, text string) (record.Marker, error) {
	if err := record.CheckDescription(text); err != nil {
		return record.Marker{}, err
	}
	return g.amendKnown(label, func(m *record.Marker) (bool, error) {
		m.Description = text
		return false, nil
	})
}

// Pin keeps what the disks were at a marker until it is unpinned, whatever else is forgotten: a journal that is full of such
// takes no more writes. Pinning twice is pinning once.
func (g *Group) Pin(label string) (record.Marker, error) {
	return g.amendKnown(label, func(m *record.Marker) (bool, error) {
		m.Pinned = true
		return false, nil
	})
}

// HoldUntil keeps what the disks were at a marker until a time, and from any other one's, or this one's, change of mind: a hold can be made longer, and not
// shorter; a replica does not have it shortened by its writer. ErrHeld if it is held for longer.
func (g *Group) HoldUntil(label string, until time.Time) (record.Marker, error) {
	return g.amendKnown(label, func(m *record.Marker) (bool, error) {
		if until.Before(m.Held) {
			return false, fmt.Errorf("marker %q of group %s: %w until %s: it can be held for longer only", label, g.name, ErrHeld, m.Held.Format(time.RFC3339))
		}
		if err := record.CheckHeld(until); err != nil {
			return false, fmt.Errorf("hold marker %q of group %s: %w", label, g.name, err)
		}
		if !until.After(g.o.Now()) {
			return false, fmt.Errorf("hold marker %q of group %s until %s: that is past", label, g.name, until.Format(time.RFC3339))
		}
		m.Held = until.UTC()
		return false, nil
	})
}

// Unpin lets a marker expire.
func (g *Group) Unpin(label string) (record.Marker, error) {
	return g.amendKnown(label, func(m *record.Marker) (bool, error) {
		m.Pinned = false
		return false, nil
	})
}

// Delete makes a label name nothing. The LSN stays one of the window. What it was is returned.
// ErrPinned if the marker is pinned, ErrHeld if it is held.
func (g *Group) Delete(label string) (record.Marker, error) {
	return g.amendKnown(label, func(m *record.Marker) (bool, error) {
		if m.Pinned {
			return false, fmt.Errorf("marker %q of group %s: %w: unpin it first", label, g.name, ErrPinned)
		}
		if m.IsHeld(g.o.Now()) {
			return false, fmt.Errorf("marker %q of group %s: %w until %s", label, g.name, ErrHeld, m.Held.Format(time.RFC3339))
		}
		return true, nil
	})
}

func (g *Group) amendKnown(label string, change func(*record.Marker) (remove bool, err error)) (record.Marker, error) {
	return g.amend(label, func(m *record.Marker) (bool, error) {
		if m.Pending {
			return false, fmt.Errorf("marker %q of group %s is being taken: try again", label, g.name)
		}
		return change(m)
	})
}

// amend journals what change makes of a marker, or that it is deleted, and returns when that is durable.
func (g *Group) amend(label string, change func(*record.Marker) (remove bool, err error)) (m record.Marker, err error) {
	var done record.LSN
	err = g.admittedNote(func() error {
		a := &g.append
		lsn, ok := a.markers.labels[label]
		if !ok || lsn <= g.expiredTo() && !g.isKept(lsn) {
			return g.noPoint(label, "no marker has this label")
		}
		i, _ := a.markers.find(lsn)
		was := a.markers.all[i]
		m = was
		am := record.Amendment{Target: lsn}
		var err error
		if am.Deleted, err = change(&m); err != nil {
			return err
		}
		am.Marker = m
		now := g.o.Now()
		pinned := (was.Pinned || was.IsHeld(now)) && !was.Pending
		if (m.Pinned || m.IsHeld(now)) && !pinned && !g.pinMarker(lsn) {
			return g.noPoint(label, "its history has expired")
		}
		h, err := g.appendNoteLocked(record.KindAmend, 0, 0, func(record.LSN, time.Time) []byte { return am.Append(nil) })
		if err != nil {
			if !pinned {
				g.unpinMarker(lsn)
			}
			return err
		}
		done = h.LSN
		if c, ok := a.markers.amend(am, now); ok {
			a.pend.markers = append(a.pend.markers, c)
		}
		if am.Deleted || !m.Pinned && !m.IsHeld(now) {
			g.unpinMarker(lsn)
		}
		return nil
	})
	if err != nil {
		return m, err
	}
	return m, g.syncTo(done)
}

// Markers lists the group's markers that have not expired by ascending LSN, but for those
// of a cut that is under way. All are durable.
func (g *Group) Markers() ([]record.Marker, error) {
	g.append.Lock()
	all := slices.DeleteFunc(slices.Clone(g.append.markers.all), func(m record.Marker) bool { return m.Pending || m.LSN <= g.expiredTo() && !g.isKept(m.LSN) })
	head := g.Head() // an amendment may be the last record
	g.append.Unlock()
	if len(all) == 0 {
		return nil, nil
	}
	return all, g.syncTo(head)
}

// LastMarker is the newest marker that has not expired, which may not be durable yet; ok is false if there is none.
func (g *Group) LastMarker() (m record.Marker, ok bool) {
	g.append.Lock()
	defer g.append.Unlock()
	all := g.append.markers.all
	for i := len(all) - 1; i >= 0; i-- {
		if !all[i].Pending && (all[i].LSN > g.expiredTo() || g.isKept(all[i].LSN)) {
			return all[i], true
		}
	}
	return m, false
}

// pinMarker and unpinMarker keep a marker's point, or no more. They are called
// with the append lock held. pinMarker reports whether it can be viewed still: an expiry
// raises the horizon under the pins' lock.
func (g *Group) pinMarker(lsn record.LSN) bool {
	g.pins.Lock()
	defer g.pins.Unlock()
	if lsn <= g.expiredTo() && !g.isKept(lsn) {
		return false
	}
	g.pins.markers[lsn] = true
	return true
}

// pinAs keeps a marker's point if it is pinned or held, and not if it is neither. The append lock is held.
func (g *Group) pinAs(m *record.Marker) {
	if (m.Pinned || m.IsHeld(g.o.Now())) && !m.Pending {
		g.pinMarker(m.LSN)
	} else {
		g.unpinMarker(m.LSN)
	}
}

func (g *Group) unpinMarker(lsn record.LSN) {
	g.pins.Lock()
	defer g.pins.Unlock()
	delete(g.pins.markers, lsn)
}

// ConcludeLeft concludes the markers of cuts that were not: a stop came between, or there was no room.
// Whether guests were frozen is not known. No cut may be under way.
func (g *Group) ConcludeLeft() error {
	g.append.Lock()
	left := slices.DeleteFunc(slices.Clone(g.append.markers.all), func(m record.Marker) bool { return !m.Pending })
	g.append.Unlock()
	for _, m := range left {
		m.Consistency, m.Note = record.Crash, "whether the guests were frozen is not known: the cut was not brought to its end"
		kept, err := g.Conclude(m)
		if err != nil {
			return fmt.Errorf("conclude marker %q: %w", m.Label, err)
		}
		g.log.Warn("a marker was not brought to its end", zap.String("label", m.Label), zap.Bool("kept_as_crash_consistent", kept))
	}
	return nil
}
