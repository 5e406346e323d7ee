package journal

import (
	"fmt"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Mark journals a marker, crash-consistent, and returns when it is durable and
// can be found. Its cut is one LSN of all disks: every write acknowledged before
// the call lies before it. ErrLabelInUse if the group has the label already.
func (g *Group) Mark(label, by string) (record.Marker, error) {
	if err := record.CheckLabel(label); err != nil {
		return record.Marker{}, err
	}
	m := record.Marker{Label: label, Consistency: record.Crash, By: by}
	if err := g.appendMarker(&m, 0, 0); err != nil {
		return record.Marker{}, err
	}
	if err := g.indexTo(m.LSN); err != nil {
		return record.Marker{}, err
	}
	return m, nil
}

// appendMarker journals a marker and fills in its LSN and time.
func (g *Group) appendMarker(m *record.Marker, flags uint8, disk record.DiskID) error {
	payload := m.Append(nil)
	return g.admitted(func() error {
		a := &g.append
		if lsn, ok := a.labels[m.Label]; ok {
			return fmt.Errorf("marker %q of group %s: %w: it names LSN %d", m.Label, g.name, ErrLabelInUse, lsn)
		}
		h := record.Header{
			LSN: a.next, Time: g.nowLocked(), Durable: g.Durable(), Disk: disk, Kind: record.KindMarker,
			Flags: flags, Payload: len(payload), Sums: record.AppendSums(nil, payload),
		}
		if !a.log.Fits(h.Size()) {
			if err := g.rollLocked(h.Size()); err != nil {
				return err
			}
		}
		h.Salt = a.log.Current().Salt
		a.enc.Reset(h.EncodedSize())
		a.enc.Add(&h, payload)
		off := a.log.Tail()
		if err := a.log.Append(a.enc.Vec, a.enc.Bytes); err != nil {
			return g.failLocked(err)
		}
		m.LSN, m.Time = h.LSN, time.Unix(0, h.Time).UTC()
		a.labels[m.Label] = m.LSN
		a.pend.markers = append(a.pend.markers, *m)
		a.pend.times = append(a.pend.times, index.TimeMark{Time: h.Time, LSN: h.LSN, File: a.log.Current().Number, Off: uint32(off)})
		g.lastTime.Store(h.Time)
		g.advanceLocked(1, a.enc.Bytes, 0)
		return nil
	})
}

// Markers lists the group's markers behind the horizon by ascending LSN.
func (g *Group) Markers() ([]record.Marker, error) {
	if err := g.indexTo(g.Head()); err != nil {
		return nil, err
	}
	var all []record.Marker
	err := g.ix.Markers(g.Horizon()+1, func(m record.Marker) (bool, error) {
		all = append(all, m)
		return true, nil
	})
	return all, err
}
