package journal

import (
	"fmt"
	"math"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Plan is what a policy lets go of, and keeps, beyond the window. Sizes are in bytes.
type Plan struct {
	Horizon   record.LSN      // up to which history expires
	Log       int64           // of the log files that go
	Carried   int64           // of what is copied out of them before, as points or the window need it, at most
	Gone      []KeptPoint     // points that are kept now, and go
	Kept      []KeptPoint     // those that are kept
	Why       []retain.Reason // of each that is kept
	Originals int64           // of what no point is of then, beside those files
}

// Frees is about how many bytes come free: less while files of originals stay that are needed by half.
func (p *Plan) Frees() int64 { return max(p.Log-p.Carried+p.Originals, 0) }

// Plan says what a policy would let go of now. Nothing changes. What happens meanwhile may be in it or not.
func (g *Group) Plan(policy retain.Policy) (plan Plan, err error) {
	if err := policy.Validate(); err != nil {
		return plan, fmt.Errorf("retention of group %s: %w", g.name, err)
	}
	if err := g.Index(); err != nil {
		return plan, err
	}
	held := min(g.oldestPin(), g.oldestHold())
	from := g.pinAll()
	defer g.unpinFrom(from)
	files, release := g.set.Hold(segment.Log)
	defer release()
	for len(files) > 1 && files[1].First-1 <= from {
		files = files[1:] // expired, and not removed yet
	}
	plan.Horizon = from
	var fresh []KeptPoint
	closed := closedFiles(files)
	passed := policy.Passed(g.o.Now().UnixNano(), closed)
	n := retain.Expire(closed, math.MaxInt64, held, min(g.Applied(), g.Durable(), passed))
	if n > 0 {
		plan.Horizon = closed[n-1].Last
		if fresh, err = g.fresh(policy, files[:n], files[n], plan.Horizon); err != nil {
			return plan, err
		}
	}
	points, kept := g.needed(policy, plan.Horizon, fresh, false)
	if err := g.planLog(&plan, files[:n], points); err != nil {
		return plan, err
	}
	_, plan.Why = g.judge(policy, kept, plan.Horizon)
	plan.Kept = kept
	for _, k := range g.KeptPoints() {
		if _, ok := findKept(kept, k.LSN); !ok {
			plan.Gone = append(plan.Gone, k)
		}
	}
	return plan, g.planOriginals(&plan, points)
}

// planLog counts what goes of log files, and what is carried over of them.
func (g *Group) planLog(plan *Plan, files []*segment.File, points []record.LSN) error {
	reader, err := g.ix.FreshReader()
	if err != nil {
		return err
	}
	defer reader.Close()
	for i, f := range files {
		plan.Log += f.Alloc()
		e := expiry{g: g, old: g.expiredTo(), horizon: plan.Horizon, points: points, reader: reader, b: g.ix.NewBatch(), forget: map[*disk.Disk][]int64{}}
		err := e.scan(files[i : i+1])
		e.b.Discard()
		if err != nil {
			return err
		}
		plan.Carried += e.carries()
	}
	return nil
}

// planOriginals counts what none of some points is of among the originals.
func (g *Group) planOriginals(plan *Plan, points []record.LSN) error {
	files, release := g.set.Hold(segment.Originals)
	defer release()
	for _, f := range files {
		_, err := f.Scan(f.Start(), func(_ int64, h record.Header) error {
			if h.Extent.Len > 0 && h.LSN <= plan.Horizon && !lives(points, &h) {
				plan.Originals += h.Size()
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("look at what is kept of expired history: %w", err)
		}
	}
	return nil
}
