package journal

import (
	"fmt"
	"slices"
	"sort"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Resolve finds the LSN that a point names. What cannot be viewed is a
// *PointError, which is an ErrNoPoint: never a near enough LSN in its stead.
func (g *Group) Resolve(p record.Point) (record.LSN, error) {
	refuse := func(why string) (record.LSN, error) { return 0, g.noPoint(p.String(), why) }
	switch p.Form {
	case record.FormLSN:
		if !g.viewable(p.LSN) {
			return 0, g.notViewable(p.LSN)
		}
		return p.LSN, nil
	case record.FormLatest:
		if p.Consistency == 0 {
			return g.Newest(), nil
		}
		return g.latestMarker(p, refuse)
	case record.FormLabel:
		g.append.Lock()
		lsn, ok := g.append.markers.labels[p.Label]
		i, _ := g.append.markers.find(lsn)
		pending := ok && g.append.markers.all[i].Pending
		g.append.Unlock()
		if !ok {
			return refuse("no marker has this label")
		}
		if pending {
			return refuse("it is being taken")
		}
		if lsn <= g.expiredTo() && !g.isKept(lsn) {
			return 0, g.notViewable(lsn)
		}
		return lsn, nil
	case record.FormTime, record.FormAgo:
		now := g.o.Now()
		t := p.Time
		if p.Form == record.FormAgo {
			t = now.Add(-p.Ago)
		}
		if t.After(now) {
			return refuse("it lies in the future")
		}
		return g.resolveTime(t.UnixNano(), p.String(), refuse)
	}
	return 0, fmt.Errorf("point %v has no form", p)
}

func (g *Group) latestMarker(p record.Point, refuse func(string) (record.LSN, error)) (record.LSN, error) {
	markers, err := g.Markers()
	if err != nil {
		return 0, err
	}
	for i := len(markers) - 1; i >= 0; i-- {
		if markers[i].Consistency >= p.Consistency {
			return markers[i].LSN, nil
		}
	}
	return refuse("no marker is of that consistency")
}

// resolveTime finds the last record at or before a time: the time table leads
// near it, the log has the rest of the way.
func (g *Group) resolveTime(t int64, point string, refuse func(string) (record.LSN, error)) (record.LSN, error) {
	horizon := g.pinAll()
	defer g.unpinFrom(horizon)
	head := g.Newest()
	last := g.lastTime.Load()
	held, release := g.set.Hold(segment.Log)
	defer release()
	files := slices.Clone(held)
	for len(files) > 1 && files[1].First-1 <= horizon {
		files = files[1:] // expired, and not removed yet
	}
	if len(files) == 0 || t < files[0].Created {
		return g.keptAt(t, point)
	}
	if _, open := g.Bridging(); open && t > last {
		return refuse("the records of that time have not come here")
	}
	if t >= last {
		return head, nil
	}
	if err := g.indexTo(head); err != nil {
		return 0, err
	}
	m, ok, err := g.ix.TimeBefore(t)
	if err != nil {
		return 0, err
	}
	from, lsn := files[0].Start(), horizon
	if ok && m.LSN > lsn {
		from, lsn = int64(m.Off), m.LSN
		files = slices.DeleteFunc(files, func(f *segment.File) bool { return f.Number < m.File })
	}
	err = segment.ScanLog(files, from, func(_ *segment.File, _ int64, h record.Header) error {
		if h.Time > t {
			return segment.ErrStop
		}
		if lsn = max(lsn, h.LSN); lsn >= head {
			return segment.ErrStop
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("find the record of a time: %w", err)
	}
	if !g.viewable(lsn) {
		return refuse("the records of that time never came here")
	}
	return lsn, nil
}

// keptAt is the kept point that is exactly what the disks were at a time beyond the window.
func (g *Group) keptAt(t int64, point string) (record.LSN, error) {
	kept := g.KeptPoints()
	before := sort.Search(len(kept), func(i int) bool { return kept[i].Time > t })
	if before > 0 && t < kept[before-1].Until {
		return kept[before-1].LSN, nil
	}
	return 0, g.noneThere(point, "it is older than the horizon, and not kept", kept, before)
}
