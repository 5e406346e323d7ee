package retain

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Policy says which points of a group are kept. The zero Policy promises nothing: history goes when its space is needed.
type Policy struct {
	// EveryWrite is how long every LSN is kept: the continuous window. 0: as long as there is room.
	EveryWrite time.Duration
	// Tiers are thinner the longer they last, finest first.
	Tiers []Tier
	// Markers is how many of the newest markers are kept, however old they are.
	Markers int
}

// Tier keeps a point for each slot of time.
type Tier struct {
	Every time.Duration // the length of a slot
	For   time.Duration // how long its point is kept, from the slot's end on
}

// MaxPoints bounds how many points a policy may keep.
const MaxPoints = 1 << 16

// Validate reports every fault of the policy at once: what can not be, and what contradicts itself.
func (p Policy) Validate() error {
	var errs []error
	fault := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if p.EveryWrite < 0 {
		fault("every write for %v: it must not be negative", Span(p.EveryWrite))
	}
	if p.Markers < 0 || p.Markers > MaxPoints {
		fault("the last %d markers: 0 to %d can be kept", p.Markers, MaxPoints)
	}
	points := int64(max(p.Markers, 0))
	for i, t := range p.Tiers {
		switch {
		case t.Every < time.Second || t.For <= 0:
			fault("a point each %v for %v: a tier takes a second at least, and a time for which it lasts", Span(t.Every), Span(t.For))
			continue
		case t.For < t.Every:
			fault("a point each %v for %v: it would be gone before the next one", Span(t.Every), Span(t.For))
		case p.EveryWrite > 0 && t.For <= p.EveryWrite:
			fault("a point each %v for %v: every write is kept for %v, so that the tier keeps nothing", Span(t.Every), Span(t.For), Span(p.EveryWrite))
		}
		if i > 0 && t.Every <= p.Tiers[i-1].Every {
			fault("a point each %v behind one each %v: tiers are given finest first, each once", Span(t.Every), Span(p.Tiers[i-1].Every))
		} else if i > 0 && t.For <= p.Tiers[i-1].For {
			fault("a point each %v for %v, and one each %v for %v: the thinner tier keeps nothing that the other does not", Span(t.Every), Span(t.For), Span(p.Tiers[i-1].Every), Span(p.Tiers[i-1].For))
		}
		points += int64(t.For/t.Every) + 2
	}
	if points > MaxPoints {
		fault("the policy keeps up to %d points: %d are allowed; make tiers thinner or shorter", points, MaxPoints)
	}
	return errors.Join(errs...)
}

// Point is one that may be kept.
type Point struct {
	LSN         record.LSN
	Time        int64              // of its record, Unix nanoseconds
	Consistency record.Consistency // of its marker; 0: it has none
	Pinned      bool
	Held        int64 // until then nobody may let go of it, Unix nanoseconds; 0: they may
}

// Reason says why a point is kept; the zero Reason, that it is not.
type Reason struct {
	Pinned bool
	Held   bool
	Marker bool          // it is one of the newest markers
	Tier   time.Duration // the slot's length, of the thinnest tier that keeps it; 0: none does
}

// Kept reports whether there is any.
func (r Reason) Kept() bool { return r != Reason{} }

// Keep says of each point whether, and why, it is kept at a time (Unix nanoseconds) though it lies beyond the window. Points are in the order of
// their LSNs. Of those in one slot of a tier, that of the highest consistency is kept, and of several the newest.
func (p Policy) Keep(now int64, points []Point) []Reason {
	why := make([]Reason, len(points))
	left := p.Markers
	for i := len(points) - 1; i >= 0; i-- {
		at := &points[i]
		why[i].Pinned, why[i].Held = at.Pinned, at.Held > now
		if at.Consistency != 0 && left > 0 {
			why[i].Marker = true
			left--
		}
	}
	for _, t := range p.Tiers {
		t.keep(now, points, why)
	}
	return why
}

// keep names the tier's points. The thinnest tier has the last word.
func (t Tier) keep(now int64, points []Point, why []Reason) {
	for i := 0; i < len(points); {
		slot, best := t.slot(points[i].Time), i
		j := i
		for ; j < len(points) && t.slot(points[j].Time) == slot; j++ {
			if points[j].Consistency >= points[best].Consistency {
				best = j
			}
		}
		if int64(t.For) > now-t.end(slot) {
			why[best].Tier = t.Every
		}
		i = j
	}
}

func (t Tier) slot(at int64) int64 {
	slot := at / int64(t.Every)
	if at%int64(t.Every) < 0 {
		slot--
	}
	return slot
}

// end is where a slot ends, Unix nanoseconds.
func (t Tier) end(slot int64) int64 { return (slot + 1) * int64(t.Every) }

// Ends reports whether, of two records that follow each other, the first is the last one of a slot of any tier: a point that may be kept. Times are Unix
// nanoseconds.
func (p Policy) Ends(first, next int64) bool {
	return slices.ContainsFunc(p.Tiers, func(t Tier) bool { return t.slot(first) != t.slot(next) })
}

// Sacrifice lists the points that are kept, by index, in the order in which they are given up when there is no room for all: of the finest tier
// first, the oldest first, then markers that are kept for their number. What is pinned or held is not among them.
func Sacrifice(points []Point, why []Reason) (order []int) {
	for i, r := range why {
		if r.Kept() && !r.Pinned && !r.Held {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int {
		x, y := why[a], why[b]
		if x.Marker != y.Marker {
			if x.Marker {
				return 1
			}
			return -1
		}
		return cmp.Or(cmp.Compare(x.Tier, y.Tier), cmp.Compare(points[a].LSN, points[b].LSN))
	})
	return order
}
