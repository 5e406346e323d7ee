package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"slices"
	"strings"
	"unicode"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/build"
	"github.com/tidemark-cdp/tidemark/cmd/internal/dump"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// control serves the API of package api.
type control struct {
	store     *journal.Store
	keepers   *keepers
	reloader  *reloader
	exports   *exports
	rollbacks *rollbacks
	attached  *attachments

	replication *replication
	scrubber    *scrubber

	serving  context.Context // ends when the daemon stops
	stateDir string
	storeID  string
	nbd      []string
	log      *zap.Logger
}

func (c *control) handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, fn func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, 64<<10)
			answer, err := fn(r)
			c.answer(w, r, answer, err)
		})
	}
	handle("GET /v1/status", c.status)
	handle("POST /v1/groups/{group}/markers", c.mark)
	handle("PATCH /v1/groups/{group}/markers/{label}", c.amend)
	handle("DELETE /v1/groups/{group}/markers/{label}", c.remove)
	handle("GET /v1/groups/{group}/points", c.points)
	handle("GET /v1/groups/{group}/retention", c.retention)
	handle("GET /v1/groups/{group}/definitions", c.definitions)
	handle("POST /v1/groups/{group}/thaw", c.thaw)
	handle("POST /v1/reload", c.reload)
	handle("POST /v1/groups/{group}/rollback", c.rollback)
	handle("POST /v1/scratches", c.scratch)
	handle("POST /v1/scratches/{name}/promote", c.promote)
	handle("DELETE /v1/scratches/{name}", c.unexport)
	handle("POST /v1/attachments", c.attach)
	handle("DELETE /v1/attachments", c.detach)
	handle("GET /v1/groups/{group}/resolve", c.resolve)
	handle("POST /v1/groups/{group}/failover", c.failover)
	handle("POST /v1/groups/{group}/failback", c.failback)
	handle("POST /v1/groups/{group}/accept", c.accept)
	handle("POST /v1/groups/{group}/compare", c.compare)
	handle("GET /v1/peers", c.peers)
	handle("POST /v1/peers", c.join)
	handle("POST /v1/peers/invitations", c.invite)
	handle("DELETE /v1/peers/{peer}", c.revoke)
	handle("POST /v1/groups/{group}/verify", c.verify)
	handle("POST /v1/index/verify", func(r *http.Request) (any, error) { return api.VerifyIndex(r.Context(), c.store) })
	mux.HandleFunc("GET /v1/groups/{group}/dump", c.dump)
	mux.Handle("GET /metrics", c.keepers.metrics.handler())
	// Profiles, for whoever may open the socket anyway.
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	return mux
}

var errBadRequest = errors.New("bad request")

// codes are tried in order: an error may wrap several.
var codes = []struct {
	err    error
	code   string
	status int
}{
	{errFrozen, api.CodeFrozen, http.StatusInternalServerError},
	{errNotAtRest, api.CodeNotAtRest, http.StatusConflict},
	{errBadRequest, api.CodeBadRequest, http.StatusBadRequest},
	{journal.ErrLabelInUse, api.CodeLabelInUse, http.StatusConflict},
	{journal.ErrPinned, api.CodePinned, http.StatusConflict},
	{journal.ErrHeld, api.CodePinned, http.StatusConflict},
	{journal.ErrInUse, api.CodeInUse, http.StatusConflict},
	{journal.ErrNoPoint, api.CodeNoPoint, http.StatusNotFound},
	{journal.ErrNotFound, api.CodeNotFound, http.StatusNotFound},
	{journal.ErrFailed, api.CodeFailed, http.StatusServiceUnavailable},
	{journal.ErrNoSpace, api.CodeNoSpace, http.StatusInsufficientStorage},
}

func apiError(err error) (api.Error, int) {
	for _, k := range codes {
		if errors.Is(err, k.err) {
			return api.Error{Code: k.code, Message: err.Error()}, k.status
		}
	}
	return api.Error{Code: api.CodeInternal, Message: err.Error()}, http.StatusInternalServerError
}

func (c *control) answer(w http.ResponseWriter, r *http.Request, answer any, err error) {
	status := http.StatusOK
	if err != nil {
		answer, status = apiError(err)
		c.log.Info("API call refused", zap.String("call", r.Method+" "+r.URL.Path), zap.Error(err))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		c.log.Info("API client is gone", zap.Error(err))
	}
}

func (c *control) status(*http.Request) (any, error) {
	s := api.Status{Version: build.Version(), Store: c.storeID, NBD: c.nbd, StateDir: c.stateDir, IndexBytes: c.store.IndexBytes(), Groups: []api.Group{}, Scratches: c.exports.scratches.status(), Attachments: c.attached.status()}
	for _, g := range c.store.Groups() {
		state, why := g.State()
		a := api.Group{
			Name: g.Name(), State: state, Head: uint64(g.Head()), Durable: uint64(g.Durable()), Applied: uint64(g.Applied()),
			Horizon: uint64(g.Horizon()), JournalBytes: g.JournalBytes(), Unapplied: g.Unapplied(), Disks: []api.Disk{},
			Guests: []api.Guest{}, Problems: []string{},
		}
		if b, err := g.Bytes(); err == nil {
			a.Bytes = api.Bytes(b)
		}
		if why != nil {
			a.Error = why.Error()
		}
		for _, d := range g.Disks() {
			a.Disks = append(a.Disks, api.Disk{Name: d.Name, Size: d.Size, Backing: d.Path(), Added: uint64(d.Added)})
		}
		for d, left := range g.Removed() {
			a.Disks = append(a.Disks, api.Disk{Name: d.Name, Size: d.Size, Added: uint64(d.Added), Removed: uint64(left)})
		}
		slices.SortFunc(a.Disks, func(x, y api.Disk) int { return cmp.Compare(x.Name, y.Name) })
		if k, err := c.keepers.get(g.Name()); err == nil {
			k.status(&a)
		}
		retained(g, &a)
		c.replication.status(g, &a)
		c.scrubber.status(g, &a)
		if err := c.rollbacks.problem(g.Name()); err != nil {
			a.Problems = append(a.Problems, err.Error())
		}
		s.Groups = append(s.Groups, a)
	}
	return s, nil
}

// point finds the group and the LSN that a call is about.
func (c *control) point(r *http.Request) (g *journal.Group, p record.Point, lsn record.LSN, err error) {
	if g, err = c.store.Group(r.PathValue("group")); err != nil {
		return nil, p, 0, err
	}
	if p, err = record.ParsePoint(r.URL.Query().Get("point")); err != nil {
		return nil, p, 0, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	lsn, err = g.Resolve(p)
	return g, p, lsn, err
}

func (c *control) resolve(r *http.Request) (any, error) {
	g, p, lsn, err := c.point(r)
	if err != nil {
		return nil, err
	}
	return api.Resolved{Group: g.Name(), Point: p.String(), LSN: uint64(lsn)}, nil
}

func (c *control) verify(r *http.Request) (any, error) {
	g, err := c.store.Group(r.PathValue("group"))
	if err != nil {
		return nil, err
	}
	if r.URL.Query().Get("repair") == "true" {
		return c.repaired(r.Context(), g)
	}
	return api.VerifyGroup(r.Context(), g, journal.VerifyOptions{}, nil)
}

// repaired verifies a group and has mended what is damaged, round by round: behind a damaged header, a file can not be read before it is mended.
func (c *control) repaired(ctx context.Context, g *journal.Group) (api.Verified, error) {
	d, repaired := newDamage(true), 0
	var why error
	for {
		v, err := api.VerifyGroup(ctx, g, journal.VerifyOptions{}, d.add)
		v.Repaired = int64(repaired)
		if err != nil || v.Damaged == 0 {
			return v, err
		}
		n := 0
		if d.some() {
			n, why = c.replication.repair(ctx, g, d)
		}
		if n == 0 && !d.more {
			if why == nil {
				why = errors.New("what is left is not kept anywhere else, or not certain (no backing is mended while the index and the log do not agree)")
			}
			v.NotRepaired = why.Error()
			return v, ctx.Err()
		}
		repaired += n
		d = d.next()
	}
}

func (c *control) attach(r *http.Request) (any, error) {
	var q api.AttachRequest
	if err := decode(r, &q); err != nil {
		return nil, err
	}
	if len(q.Exports) == 0 {
		return nil, fmt.Errorf("%w: name the exports to attach", errBadRequest)
	}
	if strings.ContainsFunc(q.Asked+strings.Join(q.Exports, ""), unicode.IsControl) {
		return nil, fmt.Errorf("%w: a name has a control character", errBadRequest)
	}
	return c.attached.attach(r.Context(), q)
}

func (c *control) detach(r *http.Request) (any, error) {
	q := r.URL.Query()
	return c.attached.detach(q.Get("name"), q.Get("force") == "true")
}

// dump streams: what goes wrong behind the first line ends the answer, and is
// told behind it.
func (c *control) dump(w http.ResponseWriter, r *http.Request) {
	g, err := c.store.Group(r.PathValue("group"))
	if err != nil {
		c.answer(w, r, nil, err)
		return
	}
	on := func(name string) bool { return r.URL.Query().Get(name) == "true" }
	o := dump.Options{Segments: on("segments"), Records: on("records"), Index: on("index"), JSON: on("json")}
	w.Header().Set("Trailer", api.ErrorTrailer)
	if err := dump.Group(r.Context(), w, g, o); err != nil {
		e, _ := apiError(err)
		if b, merr := json.Marshal(e); merr == nil {
			w.Header().Set(api.ErrorTrailer, string(b))
		}
		c.log.Info("dump ended early", zap.String("group", g.Name()), zap.Error(err))
	}
}
