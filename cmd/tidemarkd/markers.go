package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os/user"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Calls of the control API that are about markers and what goes with them.

type peerKey struct{}

// withPeer notes who is at the other end of a control connection.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return ctx
	}
	who := "user"
	_ = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return
		}
		uid := strconv.FormatUint(uint64(cred.Uid), 10)
		if u, err := user.LookupId(uid); err == nil {
			uid = u.Username
		}
		who = "user:" + uid
	})
	return context.WithValue(ctx, peerKey{}, who)
}

// peer is who asked, as a marker says it.
func peer(r *http.Request) string {
	if who, ok := r.Context().Value(peerKey{}).(string); ok {
		return who
	}
	return "user"
}

func marker(g *journal.Group, m record.Marker) api.Marker {
	return api.Marker{
		Group: g.Name(), LSN: uint64(m.LSN), Label: m.Label, Time: m.Time, Consistency: m.Consistency.String(), By: m.By,
		Asked: m.Asked.String(), Description: m.Description, Frozen: m.Frozen.Seconds(), Note: m.Note, Pinned: m.Pinned, Held: m.Held,
	}
}

func decode(r *http.Request, v any) error {
	if err := json.NewDecoder(r.Body).Decode(v); err != nil {
		return fmt.Errorf("%w: %w", errBadRequest, err)
	}
	return nil
}

func (c *control) mark(r *http.Request) (any, error) {
	k, err := c.keepers.get(r.PathValue("group"))
	if err != nil {
		return nil, err
	}
	var req api.MarkRequest
	if err := decode(r, &req); err != nil {
		return nil, err
	}
	want := record.Marker{Label: req.Label, Description: req.Description, By: peer(r), Asked: record.Crash, OrCrash: req.OrCrash, Pinned: req.Pin, Held: req.Held.UTC()}
	if req.Consistency != "" {
		if want.Asked, err = record.ParseConsistency(req.Consistency); err != nil {
			return nil, fmt.Errorf("%w: %w", errBadRequest, err)
		}
	}
	if err := record.CheckHeld(want.Held); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	m, err := k.mark(r.Context(), want)
	if err != nil {
		return nil, err
	}
	a := marker(k.g, m.Marker)
	if req.WaitReplica > 0 {
		ctx, cancel := context.WithTimeout(r.Context(), time.Duration(min(req.WaitReplica, 86400)*float64(time.Second)))
		defer cancel()
		if a.Late, err = c.replication.await(ctx, k.g.Name(), m.LSN); err != nil {
			return nil, err
		}
	}
	if m.problem != nil {
		a.Problems = strings.Split(m.problem.Error(), "\n")
	}
	return a, nil
}

// amend and remove change a marker.
func (c *control) amend(r *http.Request) (any, error) {
	g, err := c.store.Group(r.PathValue("group"))
	if err != nil {
		return nil, err
	}
	var req api.Amendment
	if err := decode(r, &req); err != nil {
		return nil, err
	}
	if req.Description == nil && req.Pinned == nil && req.Held == nil {
		return nil, fmt.Errorf("%w: nothing to change", errBadRequest)
	}
	label := r.PathValue("label")
	var m record.Marker
	if req.Description != nil {
		if err := record.CheckDescription(*req.Description); err != nil {
			return nil, fmt.Errorf("%w: %w", errBadRequest, err)
		}
		if m, err = g.Describe(label, *req.Description); err != nil {
			return nil, err
		}
	}
	if req.Held != nil {
		if err := record.CheckHeld(*req.Held); err != nil {
			return nil, fmt.Errorf("%w: %w", errBadRequest, err)
		}
		if m, err = g.HoldUntil(label, *req.Held); err != nil {
			return nil, err
		}
	}
	if req.Pinned != nil {
		change := g.Unpin
		if *req.Pinned {
			change = g.Pin
		}
		if m, err = change(label); err != nil {
			return nil, err
		}
	}
	return marker(g, m), nil
}

func (c *control) remove(r *http.Request) (any, error) {
	g, err := c.store.Group(r.PathValue("group"))
	if err != nil {
		return nil, err
	}
	m, err := g.Delete(r.PathValue("label"))
	return marker(g, m), err
}

func (c *control) points(r *http.Request) (any, error) {
	g, err := c.store.Group(r.PathValue("group"))
	if err != nil {
		return nil, err
	}
	match, err := filter(r.URL.Query(), time.Now())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	p := api.Points{
		Group: g.Name(), Horizon: uint64(g.Horizon()), Durable: uint64(min(g.Durable(), g.Newest())), Head: uint64(g.Newest()), Kept: []api.Kept{}, Markers: []api.Marker{},
	}
	p.Since, _ = g.Window()
	for _, r := range g.Windows() {
		if r.First < g.Horizon() {
			p.Earlier = append(p.Earlier, api.Range{First: uint64(r.First), Last: uint64(r.Last)})
		}
	}
	markers, err := g.Markers()
	for _, k := range kept(g.Kept()) {
		// One without a marker is as good as a crash-consistent one without a label, in the eyes of a filter.
		m := record.Marker{Time: k.Time, Consistency: record.Crash}
		if i := slices.IndexFunc(markers, func(m record.Marker) bool { return uint64(m.LSN) == k.LSN }); i >= 0 {
			m = markers[i]
		}
		if match(m) {
			p.Kept = append(p.Kept, k)
		}
	}
	for _, m := range markers {
		if match(m) {
			p.Markers = append(p.Markers, marker(g, m))
		}
	}
	return p, err
}

// filter makes an api.Filter of a query.
func filter(q url.Values, now time.Time) (func(record.Marker) bool, error) {
	since, err := filterTime(q.Get("since"), now)
	if err != nil {
		return nil, fmt.Errorf("since: %w", err)
	}
	until, err := filterTime(q.Get("until"), now)
	if err != nil {
		return nil, fmt.Errorf("until: %w", err)
	}
	var least record.Consistency
	if s := q.Get("consistency"); s != "" {
		if least, err = record.ParseConsistency(s); err != nil {
			return nil, err
		}
	}
	label, by, pinned := q.Get("label"), q.Get("by"), q.Get("pinned") == "true"
	if _, err := path.Match(label, ""); err != nil {
		return nil, fmt.Errorf("label pattern %q: %w", label, err)
	}
	return func(m record.Marker) bool {
		if ok, _ := path.Match(label, m.Label); label != "" && !ok {
			return false
		}
		return (since.IsZero() || !m.Time.Before(since)) && (until.IsZero() || !m.Time.After(until)) &&
			m.Consistency >= least && (by == "" || m.By == by || strings.HasPrefix(m.By, by+":")) && (!pinned || m.Pinned)
	}, nil
}

func filterTime(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	p, err := record.ParsePoint(s)
	switch {
	case err != nil:
		return time.Time{}, err
	case p.Form == record.FormTime:
		return p.Time, nil
	case p.Form == record.FormAgo:
		return now.Add(-p.Ago), nil
	}
	return time.Time{}, fmt.Errorf("%q is no time: give one as 2026-11-21T10:00:00Z, or -15m", s)
}

// definitions answers what the guests of a group were defined as at a point.
func (c *control) definitions(r *http.Request) (any, error) {
	g, point, lsn, err := c.point(r)
	if err != nil {
		return nil, err
	}
	a := api.Definitions{Group: g.Name(), Point: point.String(), LSN: uint64(lsn), Definitions: []api.Definition{}}
	defs, err := g.Definitions(lsn)
	for _, d := range defs {
		a.Definitions = append(a.Definitions, api.Definition{Name: d.Name, Since: uint64(d.Since), Time: d.Time, Content: d.Content})
	}
	return a, err
}

func (c *control) thaw(r *http.Request) (any, error) {
	group := r.PathValue("group")
	guests, err := c.keepers.thaw(r.Context(), group)
	return api.Thawed{Group: group, Guests: guests}, err
}

func (c *control) reload(*http.Request) (any, error) { return c.reloader.reload() }
