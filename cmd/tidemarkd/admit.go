package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/replica/link"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// offered takes a group that a peer offers, if it may.
func (r *replication) offered(ctx context.Context, c *link.Conn, m *wire.Offer) {
	log := r.log.With(zap.String("group", m.Group), zap.String("peer", c.Peer.Name))
	one, err := r.admit(c.Peer, m)
	if err == nil {
		err = one.receive(ctx, c, m)
		r.forget(one)
	} else {
		r.e.Refused.Add(1)
		err = errors.Join(err, c.Refuse(wire.ReasonRights, err), c.Close())
	}
	if err != nil && ctx.Err() == nil {
		log.Warn("the group does not come any more", zap.Error(err))
	}
	if one != nil {
		one.mu.Lock()
		one.why = err
		one.mu.Unlock()
	}
	r.reconcileSoon()
}

// admit says whether a peer may send a group here: one to which it is shipped from here, which may have taken it over; one that came from that
// peer; one that the peer's rights name; or one that a pattern of its rights fits, and of which nothing is here.
func (r *replication) admit(p link.Peer, m *wire.Offer) (*replicated, error) {
	may, named := p.Sends(m.Group)
	conf := r.reloader.configured()[m.Group]
	r.mu.Lock()
	one := r.groups[m.Group]
	r.mu.Unlock()
	var n groupNote
	if one != nil {
		n = one.known()
	}
	switch {
	case slices.Contains(conf.Replicas, p.Name), n.isFrom(p), named:
	case !may:
		return nil, fmt.Errorf("peer %s may not send group %s to %s", p.Name, m.Group, r.conf.Name)
	case n.From != "":
		return nil, fmt.Errorf("group %s came to %s from peer %s, and peer %s may send it only if that is said of this very group", m.Group, r.conf.Name, n.From, p.Name)
	case r.store.Has(m.Group):
		return nil, fmt.Errorf("group %s is %s's own, and peer %s may send it only if that is said of this very group", m.Group, r.conf.Name, p.Name)
	case r.from(p) >= r.conf.MostGroups:
		return nil, fmt.Errorf("group %s would be one more of %d that peer %s has sent here, and replication.most_groups allows that only if it is said of this very group", m.Group, r.conf.MostGroups, p.Name)
	}
	one = r.group(m.Group)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.groups[m.Group] = one // it may have been forgotten between
	one.users++
	return one, nil
}

// from is how many groups have come from a peer, or are about to.
func (r *replication) from(p link.Peer) (n int) {
	for _, one := range r.all() {
		one.mu.Lock()
		if one.note.isFrom(p) || one.comes != nil && one.comes.peer == p.Name {
			n++
		}
		one.mu.Unlock()
	}
	return n
}

// forget drops what is kept of a name of which nothing has come.
func (r *replication) forget(one *replicated) {
	r.mu.Lock()
	defer r.mu.Unlock()
	one.mu.Lock()
	defer one.mu.Unlock()
	n := one.note
	if one.users--; one.users == 0 && one.comes == nil && len(one.ships) == 0 && len(n.Seen)+len(n.From)+len(n.Own) == 0 && one.journal() == nil {
		delete(r.groups, one.name)
	}
}

// reserved reports whether a name is that of a peer that groups are shipped to, or come from.
func (r *replication) reserved(name string) bool {
	for _, g := range r.reloader.configured() {
		if slices.Contains(g.Replicas, name) {
			return true
		}
	}
	for _, one := range r.all() {
		if n := one.known(); n.From == name || n.Yielded == name {
			return true
		}
	}
	return false
}
