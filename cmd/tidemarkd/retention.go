package main

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/retain"
)

// kept are points for people.
func kept(points []journal.KeptPoint, why []retain.Reason) []api.Kept {
	all := make([]api.Kept, len(points))
	for i, k := range points {
		all[i] = api.Kept{LSN: uint64(k.LSN), Time: time.Unix(0, k.Time).UTC(), Until: time.Unix(0, k.Until).UTC(), Why: []string{}}
		if why != nil {
			all[i].Why = reasons(why[i])
		}
	}
	return all
}

func reasons(r retain.Reason) []string {
	all := []string{}
	add := func(is bool, what string) {
		if is {
			all = append(all, what)
		}
	}
	add(r.Pinned, "pinned")
	add(r.Held, "held")
	add(r.Marker, "newest markers")
	add(r.Tier > 0, "each "+config.Span(r.Tier).String())
	return all
}

// retention answers what a group keeps, and what would go now.
func (c *control) retention(r *http.Request) (any, error) {
	g, err := c.store.Group(r.PathValue("group"))
	if err != nil {
		return nil, err
	}
	q := r.URL.Query()
	policy, err := asked(g.Policy(), q)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	a := api.Retention{
		Group: g.Name(), EveryWrite: policy.EveryWrite.Seconds(), Tiers: []api.RetentionTier{}, Markers: policy.Markers, Limit: g.Limit(), Used: g.JournalBytes(), Kept: kept(g.Kept()),
	}
	a.Since, a.Short = g.Window()
	for _, t := range policy.Tiers {
		a.Tiers = append(a.Tiers, api.RetentionTier{Every: t.Every.Seconds(), For: t.For.Seconds()})
	}
	if plan := q.Get("plan"); plan != "true" {
		if q.Has("every_write") || q.Has("tier") || q.Has("markers") {
			return nil, fmt.Errorf("%w: plan=%s: another policy is looked at with plan=true only", errBadRequest, plan)
		}
		return a, nil
	}
	plan, err := g.Plan(r.Context(), policy)
	if err != nil {
		return nil, err
	}
	a.Would = &api.RetentionPlan{Horizon: uint64(plan.Horizon), Kept: kept(plan.Kept, plan.Why), Gone: kept(plan.Gone, nil), Frees: plan.Frees()}
	return a, nil
}

// asked is a policy with what a query says otherwise.
func asked(p retain.Policy, q url.Values) (retain.Policy, error) {
	if s := q.Get("every_write"); s != "" {
		every, err := config.ParseSpan(s)
		if err != nil {
			return p, fmt.Errorf("every_write: %w", err)
		}
		p.EveryWrite = time.Duration(every)
	}
	if s := q.Get("markers"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			return p, fmt.Errorf("markers: %w", err)
		}
		p.Markers = n
	}
	if q.Has("tier") {
		var err error
		if p.Tiers, err = askedTiers(q["tier"]); err != nil {
			return p, fmt.Errorf("tier: %w", err)
		}
	}
	return p, p.Validate()
}

func askedTiers(all []string) ([]retain.Tier, error) {
	want := config.Retain{Tiers: map[string]config.Span{}}
	for _, s := range all {
		every, span, ok := strings.Cut(s, "=")
		if s == "none" && len(all) == 1 {
			return nil, nil
		}
		if !ok {
			return nil, fmt.Errorf("%q: expected EVERY=FOR, as 1h=30d, or none", s)
		}
		if _, ok := want.Tiers[every]; ok {
			return nil, fmt.Errorf("each %s is given twice", every)
		}
		var err error
		if want.Tiers[every], err = config.ParseSpan(span); err != nil {
			return nil, err
		}
	}
	p, err := want.Policy()
	return p.Tiers, err
}

// retained fills in what a group keeps, and what it does not though it should.
func retained(g *journal.Group, a *api.Group) {
	var short bool
	a.Since, short = g.Window()
	a.Promised, a.KeptPoints = g.Policy().EveryWrite.Seconds(), len(g.KeptPoints())
	if need, room, ok := g.Foresee(); ok && !short && need > room {
		a.Problems = append(a.Problems, fmt.Sprintf("every write is to be kept for %s: as guests write at present, that takes %d bytes, and there is room for %d: raise the limit, or promise less", config.Span(g.Policy().EveryWrite), need, room))
	}
	if limit, bound := g.Limit(), g.Bound(); limit > 0 && bound > limit {
		a.Problems = append(a.Problems, fmt.Sprintf("pinned and held points alone keep %d bytes, and the limit is %d: everything else is let go of, and the journal is still too large; unpin some, or raise the limit", bound, limit))
	} else if limit > 0 && g.JournalBytes() > limit && g.PinnedAlone() {
		a.Problems = append(a.Problems, fmt.Sprintf("the journal takes %d bytes, and its limit is %d: what is left is pinned, or open; unpin, close, or raise the limit", g.JournalBytes(), limit))
	}
	if short {
		a.Problems = append(a.Problems, fmt.Sprintf("space has run short: every write is kept since %s, and is to be for %s: raise the limit, or promise less", a.Since.Format(time.RFC3339), config.Span(g.Policy().EveryWrite)))
	}
}
