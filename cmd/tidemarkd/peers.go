package main

import (
	"fmt"
	"net/http"
	"time"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/replica/link"
)

// Calls of the control API that are about the daemons that this one trusts.

func apiPeer(p link.Peer) api.Peer {
	a := api.Peer{Name: p.Name, Address: p.Address, MaySend: p.MaySend, Since: p.Since}
	if p.Fingerprint != (link.Fingerprint{}) {
		a.Fingerprint = p.Fingerprint.String()
	}
	if a.MaySend == nil {
		a.MaySend = []string{}
	}
	return a
}

func (c *control) peers(*http.Request) (any, error) {
	e := c.replication.e
	a := api.Peers{Name: e.Name, Fingerprint: e.Identity.Fingerprint.String(), Peers: []api.Peer{}}
	for _, p := range e.Peers.All() {
		a.Peers = append(a.Peers, apiPeer(p))
	}
	return a, nil
}

// maxValid is how long a token may be valid, at most.
const maxValid = 7 * 24 * time.Hour

func (c *control) invite(r *http.Request) (any, error) {
	var q api.InviteRequest
	if err := decode(r, &q); err != nil {
		return nil, err
	}
	valid := time.Duration(q.Valid * float64(time.Second))
	if valid <= 0 || valid > maxValid {
		return nil, fmt.Errorf("%w: a token can be valid for up to %v", errBadRequest, maxValid)
	}
	listen := c.replication.conf.Listen
	if listen == "" {
		return nil, fmt.Errorf("%w: this daemon does not listen for peers: set replication.listen, or invite from the other one", errBadRequest)
	}
	expires := time.Now().Add(valid).UTC().Truncate(time.Second)
	t, err := c.replication.e.Invite(link.Peer{Name: q.Name, MaySend: q.MaySend}, expires)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	return api.Invitation{Token: t.String(), Expires: expires, Listen: listen}, nil
}

func (c *control) join(r *http.Request) (any, error) {
	var q api.JoinRequest
	if err := decode(r, &q); err != nil {
		return nil, err
	}
	t, err := link.ParseToken(q.Token)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	p := link.Peer{Name: q.Name, MaySend: q.MaySend}
	if q.Name != "" {
		if err := p.Check(); err != nil {
			return nil, fmt.Errorf("%w: %w", errBadRequest, err)
		}
	}
	if p, err = c.replication.e.Join(r.Context(), q.Address, t, p); err != nil {
		return nil, err
	}
	c.replication.reconcileSoon()
	return apiPeer(p), nil
}

func (c *control) revoke(r *http.Request) (any, error) {
	p, err := c.replication.e.Peers.Get(r.PathValue("peer"))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	if err := c.replication.e.Peers.Remove(p.Name); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	c.replication.reconcileSoon()
	return apiPeer(p), nil
}
