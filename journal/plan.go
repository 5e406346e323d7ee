package journal

import (
	"context"
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

// Plan says what a policy would let go of now. Nothing changes, and nothing is kept from expiring for it: what happens meanwhile may be in it or not. It reads all headers of what
// would go, until ctx ends, or space is short and files that it reads have expired.
func (g *Group) Plan(ctx context.Context, policy retain.Policy) (plan Plan, err error) {
	if err := policy.Validate(); err != nil {
		return plan, fmt.Errorf("retention of group %s: %w", g.name, err)
	}
	if err := g.Index(); err != nil {
		return plan, err
	}
	reader, err := g.ix.FreshReader()
	if err != nil {
		return plan, err
	}
	defer reader.Close()
	held, from := min(g.oldestPin(), g.oldestHold()), g.expiredTo()
	goOn := g.planning(ctx, from)
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
		if fresh, err = g.fresh(policy, files[:n], files[n], plan.Horizon, goOn); err != nil {
			return plan, err
		}
	}
	points, kept := g.needed(policy, plan.Horizon, fresh, false)
	e := expiry{g: g, old: from, horizon: plan.Horizon, points: points, reader: reader, goOn: goOn}
	if err := e.planLog(&plan, files[:n]); err != nil {
		return plan, err
	}
	_, plan.Why = g.judge(policy, kept, plan.Horizon)
	plan.Kept = kept
	for _, k := range g.KeptPoints() {
		if _, ok := findKept(kept, k.LSN); !ok {
			plan.Gone = append(plan.Gone, k)
		}
	}
	return plan, g.planOriginals(&plan, points, goOn)
}

// planning is called for each record that a plan looks at, from where history had expired to when it began. Its error ends the plan.
func (g *Group) planning(ctx context.Context, from record.LSN) func() error {
	n := 0
	return func() error {
		if n++; n%4096 != 1 {
			return nil
		}
		if ctx.Err() == nil && g.expiredTo() > from && g.lacking() > 0 {
			return fmt.Errorf("look at what would expire of group %s: history expires meanwhile, as space is short: ask again", g.name)
		}
		return ctx.Err()
	}
}

// planLog counts what goes of log files, and what is carried over of them.
func (e *expiry) planLog(plan *Plan, files []*segment.File) error {
	for i, f := range files {
		plan.Log += f.Alloc()
		e.b, e.forget, e.moves = e.g.ix.NewBatch(), map[*disk.Disk][]int64{}, nil
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
func (g *Group) planOriginals(plan *Plan, points []record.LSN, goOn func() error) error {
	files, release := g.set.Hold(segment.Originals)
	defer release()
	for _, f := range files {
		_, err := f.Scan(f.Start(), func(_ int64, h record.Header) error {
			if h.Extent.Len > 0 && h.LSN <= plan.Horizon && !lives(points, &h) {
				plan.Originals += h.Size()
			}
			return goOn()
		})
		if err != nil {
			return fmt.Errorf("look at what is kept of expired history: %w", err)
		}
	}
	return nil
}
