package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// await returns when every replica of a group has the record of an LSN, or says which do not by the time that ctx ends, or never will, as it lies in a gap there.
func (r *replication) await(ctx context.Context, group string, lsn record.LSN) (late []string, err error) {
	one := r.group(group)
	conf := r.reloader.configured()[group]
	peers := one.replicas(conf)
	if len(peers) == 0 {
		return nil, fmt.Errorf("%w: group %s has no replica", errBadRequest, group)
	}
	for _, peer := range peers {
		one.mu.Lock()
		s := one.ships[peer]
		one.mu.Unlock()
		if s == nil || !s.await(ctx, lsn) {
			late = append(late, peer)
		}
	}
	return late, nil
}

// status adds what is known of a group's replication.
func (r *replication) status(g *journal.Group, a *api.Group) {
	one := r.group(g.Name())
	a.Epoch, a.Role = g.Reigns().Epoch(), "writes"
	n := one.known()
	if g.Follows() {
		a.Role = "follows"
	}
	if n.Yielded != "" && g.Follows() {
		a.Problems = append(a.Problems, fmt.Sprintf("it was handed over to %s, and whether that has taken it is not known: if it has not, tidemark failover %s here, where everything is", n.Yielded, g.Name()))
	}
	if after, open := g.Bridging(); open {
		a.Problems = append(a.Problems, fmt.Sprintf("the records behind LSN %d can not be had, or taken: it is being brought to where its writer is, and until then that LSN is the newest that can be viewed", after))
	}
	a.Replicas = one.shipped()
	rpo := r.reloader.configured()[g.Name()].RPO
	for _, s := range a.Replicas {
		if lag := time.Duration(s.Lag * float64(time.Second)); rpo > 0 && lag > rpo {
			a.Problems = append(a.Problems, fmt.Sprintf("replica %s is %v behind, and rpo is %v", s.Peer, lag.Round(time.Millisecond), rpo))
		}
	}
	if seen := one.seen(); seen.Epoch() > g.Reigns().Epoch() && !g.Follows() {
		a.Problems = append(a.Problems, fmt.Sprintf("it was said to be another daemon's in epoch %d", seen.Epoch()))
	}
	one.mu.Lock()
	defer one.mu.Unlock()
	if one.consents == consentAnew {
		a.Problems = append(a.Problems, "it begins anew, and its history here ends, when its writer offers it next: that was asked for")
	}
	if one.why != nil && one.comes == nil && g.Follows() {
		a.Problems = append(a.Problems, fmt.Sprintf("it does not come any more: %v", one.why))
	}
	if one.comes != nil {
		a.Source = one.comes.status(g)
	} else if g.Follows() {
		a.Source = &api.Source{Peer: n.From, State: notConnected}
	}
}

// shipped is how far each replica is.
func (one *replicated) shipped() (all []api.Replica) {
	one.mu.Lock()
	defer one.mu.Unlock()
	for _, peer := range slices.Sorted(maps.Keys(one.ships)) {
		all = append(all, one.ships[peer].status())
	}
	return all
}

const notConnected = "not connected"
