package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// depose has the group follow, durably: a peer writes it, or knows who does, in a later epoch.
func (one *replicated) depose(g *journal.Group, reigns record.Reigns, peer string) error {
	one.changing.Lock()
	defer one.changing.Unlock()
	p, err := one.r.e.Peers.Get(peer)
	if err != nil {
		return err // it was revoked meanwhile
	}
	if err := one.setNote(func(n *groupNote) {
		n.Seen, n.Yielded, n.From, n.FromKey, n.Acked = reignNotes(reigns), "", peer, p.Fingerprint.String(), nil
	}); err != nil {
		return err
	}
	one.consent(consentNone) // it was of another writer, or of nobody's
	if g == nil || g.Follows() {
		return nil
	}
	one.log.Warn("another daemon writes the group in a later epoch: its disks take no more writes here", zap.Uint64("epoch", reigns.Epoch()), zap.String("peer", peer))
	return g.Follow()
}

// yield has the group follow, durably, for a peer to write it. Nobody may have a disk of it open.
func (one *replicated) yield(g *journal.Group, peer string) (record.LSN, error) {
	one.changing.Lock()
	defer one.changing.Unlock()
	x := one.r.exports
	if err := x.seal(one.name, "it is handed over to "+peer, false); err != nil {
		return 0, err
	}
	defer x.unseal(one.name)
	if err := one.setNote(func(n *groupNote) { n.Yielded = peer }); err != nil {
		return 0, err
	}
	if err := g.Follow(); err != nil {
		return 0, errors.Join(err, one.setNote(func(n *groupNote) { n.Yielded = "" }))
	}
	return g.Head(), nil
}

// lead begins a reign of this daemon in the group, durably.
func (one *replicated) lead(g *journal.Group) (record.Reigns, error) {
	one.changing.Lock()
	defer one.changing.Unlock()
	if one.journal() != g {
		return nil, fmt.Errorf("group %s was closed meanwhile", one.name)
	}
	if _, open := g.Bridging(); open {
		one.r.exports.cutPasts(one.name) // who takes a group over does not wait for who looks at its past
	}
	g, err := one.beforeGap(g)
	if err != nil {
		return nil, err
	}
	r, err := g.Lead(max(g.Reigns().Epoch(), one.seen().Epoch()) + 1)
	if err != nil {
		return nil, err
	}
	one.consent(consentNone)
	// Without the note, what is written from here on is not dropped by itself if another daemon takes the group over: no more than that.
	if err := one.setNote(func(n *groupNote) {
		n.Yielded, n.Acked, n.Own = "", nil, append(slices.Clip(n.Own), hex.EncodeToString(r.ID[:]))
	}); err != nil {
		one.log.Warn("note whose the reign is", zap.Error(err))
	}
	return g.Reigns(), nil
}

func (x *receiving) Take() (record.Reigns, error) {
	reigns, err := x.one.lead(x.g)
	if err == nil {
		x.one.mu.Lock()
		x.one.asks = make(chan struct{})
		x.one.mu.Unlock()
		x.one.r.reconcileSoon()
	}
	return reigns, err
}

func (x *receiving) Handover() <-chan struct{} {
	x.one.mu.Lock()
	defer x.one.mu.Unlock()
	return x.one.asks
}

// failover has this daemon write a group that follows, from what it has, or from an earlier point.
func (c *control) failover(r *http.Request) (any, error) {
	var q api.FailoverRequest
	if err := decode(r, &q); err != nil {
		return nil, err
	}
	g, err := c.store.Group(r.PathValue("group"))
	if err != nil {
		return nil, err
	}
	one := c.replication.group(g.Name())
	if !g.Follows() {
		return nil, fmt.Errorf("%w: group %s is this daemon's already, in epoch %d", errBadRequest, g.Name(), g.Reigns().Epoch())
	}
	if q.Point != "" {
		p, err := record.ParsePoint(q.Point)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errBadRequest, err)
		}
		if _, err := g.Resolve(p); err != nil {
			return nil, err
		}
	}
	began := time.Now()
	reigns, err := one.takeOver(g)
	if err != nil {
		return nil, err
	}
	c.replication.reconcileSoon()
	last := reigns[len(reigns)-1]
	a := api.FailedOver{Group: g.Name(), Epoch: last.Epoch, LSN: uint64(last.First - 1), Seconds: time.Since(began).Seconds()}
	if q.Point == "" {
		return a, nil
	}
	var done api.RolledBack
	if g, err = c.store.Group(g.Name()); err == nil { // it may be another one
		done, err = c.rollbacks.rollback(r.Context(), g, api.RollbackRequest{Point: q.Point}, peer(r))
	}
	if err != nil {
		return nil, fmt.Errorf("this daemon writes group %s from LSN %d on, in epoch %d, and it could not be taken back to %s: tidemark rollback tries again: %w", a.Group, a.LSN, a.Epoch, q.Point, err)
	}
	a.RolledBack = &done
	return a, nil
}

// takeOver ends the stream on which the group comes, and begins a reign of this daemon, with no other stream between.
func (one *replicated) takeOver(g *journal.Group) (record.Reigns, error) {
	bar := func(n int) {
		one.mu.Lock()
		defer one.mu.Unlock()
		one.barred += n
	}
	bar(1)
	defer bar(-1)
	one.end()
	return one.lead(g)
}

// failback has the writer of a group that follows hand it over: nothing of what it has written is lost.
func (c *control) failback(r *http.Request) (any, error) {
	g, err := c.store.Group(r.PathValue("group"))
	if err != nil {
		return nil, err
	}
	one := c.replication.group(g.Name())
	if !g.Follows() {
		return nil, fmt.Errorf("%w: group %s is this daemon's already, in epoch %d", errBadRequest, g.Name(), g.Reigns().Epoch())
	}
	one.mu.Lock()
	x, asks := one.comes, one.asks
	one.mu.Unlock()
	if x == nil {
		return nil, fmt.Errorf("group %s: its writer (%s) is not connected: with tidemark failover, this daemon writes it without being asked, from what it has", g.Name(), one.known().From)
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(r.Context(), handoverWithin)
	defer cancel()
	one.mu.Lock()
	select {
	case <-asks:
	default:
		close(asks)
	}
	one.mu.Unlock()
	select {
	case <-x.done:
	case <-ctx.Done():
	}
	// The group may be another one: it was rewound meanwhile.
	follows := func() bool {
		now := one.journal()
		return now == nil || now.Follows()
	}
	if follows() {
		// What was asked for is not to come later, on whatever stream.
		one.mu.Lock()
		one.asks = make(chan struct{})
		one.mu.Unlock()
		one.end()
	}
	if follows() {
		why := errors.Join(ctx.Err(), x.why())
		if why == nil {
			why = errors.New("the stream ended before it was")
		}
		return nil, fmt.Errorf("group %s was not handed over by %s: %w", g.Name(), x.peer, why)
	}
	reigns := one.highest()
	last := reigns[len(reigns)-1]
	return api.FailedOver{Group: g.Name(), Epoch: last.Epoch, LSN: uint64(last.First - 1), Seconds: time.Since(began).Seconds()}, nil
}

// handoverWithin is how long a writer may take to hand a group over: what is under way must get here.
const handoverWithin = time.Minute

// accept allows the writer of a group that follows, once, to have what is here, and was not written here, dropped.
func (c *control) accept(r *http.Request) (any, error) {
	var q api.AcceptRequest
	if err := decode(r, &q); err != nil {
		return nil, err
	}
	if err := record.CheckName(r.PathValue("group")); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	one := c.replication.group(r.PathValue("group"))
	if err := one.allow(q.Anew); err != nil {
		return nil, err
	}
	if q.Anew {
		one.end() // its writer offers it again
	}
	return api.Accepted{Group: one.name, Anew: q.Anew}, nil
}

// allow gives the consent to what may be dropped of the group. Who writes it does not change meanwhile: the consent would be to
// something else.
func (one *replicated) allow(anew bool) error {
	one.changing.Lock()
	defer one.changing.Unlock()
	g, n, here := one.journal(), one.known(), one.r.store.Has(one.name)
	switch {
	case g != nil && !g.Follows():
		return fmt.Errorf("%w: group %s is this daemon's, in epoch %d", errBadRequest, one.name, g.Reigns().Epoch())
	case !here && len(n.Seen)+len(n.From) == 0:
		return fmt.Errorf("group %s: %w", one.name, journal.ErrNotFound)
	case !here && anew:
		return nil // it begins anew whatever is said
	case !here:
		// What a group of this name was told does not count for the next one.
		return one.setNote(func(n *groupNote) { *n = groupNote{Version: groupNoteVersion} })
	case anew && !one.r.reloader.configured()[one.name].Received:
		return fmt.Errorf("%w: group %s did not come from another daemon to begin with: %s", errBadRequest, one.name, one.byHand())
	case anew:
		one.consent(consentAnew)
	default:
		one.consent(consentDrop)
	}
	return nil
}
