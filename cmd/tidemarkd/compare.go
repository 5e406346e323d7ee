package main

import (
	"fmt"
	"net/http"
	"slices"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/replica/link"
)

// others are the peers that have the group too: those that it is shipped to, and the one that it came from.
func (one *replicated) others() (all []string) {
	conf := one.r.reloader.configured()[one.name]
	for _, p := range one.r.e.Peers.All() {
		if slices.Contains(conf.Replicas, p.Name) || one.isFrom(p) {
			all = append(all, p.Name)
		}
	}
	return all
}

// asked says whether a peer may ask about a group: it must have it anyway.
func (r *replication) asked(c *link.Conn, group string) (link.History, error) {
	r.mu.Lock()
	one := r.groups[group]
	r.mu.Unlock()
	if one == nil || !slices.Contains(one.others(), c.Peer.Name) {
		return nil, fmt.Errorf("group %s is none that %s and peer %s have in common", group, r.conf.Name, c.Peer.Name)
	}
	g := one.journal()
	if g == nil {
		return nil, fmt.Errorf("group %s: %w", group, journal.ErrNotFound)
	}
	return history{g}, nil
}

// compare compares a group's disks at a point with what a peer has of them.
func (c *control) compare(r *http.Request) (any, error) {
	g, p, lsn, err := c.point(r)
	if err != nil {
		return nil, err
	}
	one := c.replication.group(g.Name())
	peers := one.others()
	if peer := r.URL.Query().Get("peer"); peer != "" {
		if !slices.Contains(peers, peer) {
			return nil, fmt.Errorf("%w: peer %s has no group %s", errBadRequest, peer, g.Name())
		}
		peers = []string{peer}
	}
	if len(peers) == 0 {
		return nil, fmt.Errorf("%w: no other daemon has group %s", errBadRequest, g.Name())
	}
	a := api.Comparison{Group: g.Name(), Point: p.String(), LSN: uint64(lsn), Disks: []api.ComparedDisk{}}
	for _, peer := range peers {
		for _, d := range g.Disks() {
			if d.Added > lsn {
				continue
			}
			v, err := g.View(d, lsn)
			if err != nil {
				return nil, err
			}
			got, err := c.replication.e.Compare(r.Context(), peer, g.Name(), d.ID, lsn, view{v})
			v.Close()
			one := api.ComparedDisk{Peer: peer, Name: d.Name, Blocks: got.Blocks, Differ: got.Differ}
			for _, e := range got.Differing {
				one.Differing = append(one.Differing, api.Extent{Offset: e.Off, Length: e.Len})
			}
			if err != nil {
				one.Error = err.Error()
			}
			a.Disks = append(a.Disks, one)
		}
	}
	if len(a.Disks) == 0 {
		return nil, fmt.Errorf("%w: no disk that is in group %s now was in it at LSN %d", errBadRequest, g.Name(), lsn)
	}
	return a, nil
}
