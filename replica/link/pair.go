package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// Invite makes a token that one daemon may join with, once, until it expires. It becomes the peer as given; without a name, by the
// name it gives itself.
func (e *Endpoint) Invite(p Peer, expires time.Time) (Token, error) {
	if p.Name != "" || len(p.MaySend) > 0 {
		named := p
		if named.Name == "" {
			named.Name = "x"
		}
		if err := named.Check(); err != nil {
			return Token{}, err
		}
	}
	secret, err := e.invited.add(p, expires)
	return Token{Fingerprint: e.Identity.Fingerprint, Secret: secret}, err
}

// pair takes a daemon with a token for a peer.
func (e *Endpoint) pair(c *Conn) error {
	err := e.takeToken(c)
	if err != nil {
		err = errors.Join(err, c.Refuse(wire.ReasonRights, err))
	}
	return err
}

func (e *Endpoint) takeToken(c *Conn) error {
	m, err := c.Receive()
	if err != nil {
		return err
	}
	asks, ok := m.(*wire.Pair)
	if !ok {
		return fmt.Errorf("a %v where a token was expected", m.Type())
	}
	p, err := e.invited.take(asks.Secret)
	if err != nil {
		return err
	}
	if p.Name == "" {
		if p.Name = asks.Name; e.Reserved != nil && e.Reserved(p.Name) {
			return fmt.Errorf("it calls itself %s, a name that groups are shipped to or come from: invite it by a name (--name)", p.Name)
		}
	}
	if p.Name == e.Name {
		return fmt.Errorf("the daemon that invites is called %s too: give one of them another name", p.Name)
	}
	p.Fingerprint, p.Since = fingerprint(c.tls.ConnectionState().PeerCertificates[0]), time.Now().UTC().Truncate(time.Second)
	if err := e.Peers.Put(p); err != nil {
		return err
	}
	e.Log.Info("a daemon has joined with a token", zap.String("peer", p.Name), zap.Stringer("key", p.Fingerprint), zap.Strings("may_send", p.MaySend))
	if err := c.Send(&wire.Paired{Name: e.Name}); err != nil {
		return fmt.Errorf("peer %s has joined, and may not know: %w", p.Name, err)
	}
	return c.Close()
}

// Join makes a daemon that has given out a token a peer, and this one a peer of it. p says what it may do here; without a name it has
// the one that it gives itself.
func (e *Endpoint) Join(ctx context.Context, address string, t Token, p Peer) (Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, introduceWithin)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return p, err
	}
	c, err := e.introduce(ctx, raw, wire.RolePairs, func(s tls.ConnectionState) (Peer, error) {
		if got := fingerprint(s.PeerCertificates[0]); got != t.Fingerprint {
			return Peer{}, fmt.Errorf("the token is of a daemon with another key (%v) than who answers at %s (%v): is somebody between them?", t.Fingerprint, address, got)
		}
		return Peer{}, nil
	})
	if err != nil {
		return p, fmt.Errorf("join %s: %w", address, err)
	}
	defer c.Close()
	if err := c.Send(&wire.Pair{Secret: t.Secret, Name: e.Name}); err != nil {
		return p, err
	}
	m, err := c.Receive()
	if err != nil {
		return p, fmt.Errorf("join %s: %w", address, err)
	}
	switch m := m.(type) {
	case *wire.Paired:
		if p.Name == "" {
			p.Name = m.Name
		}
	case *wire.Refuse:
		return p, fmt.Errorf("join %s: %w", address, &RefusedError{m.Reason, m.Text})
	default:
		return p, fmt.Errorf("join %s: %w: it answers with a %v", address, record.ErrCorrupt, m.Type())
	}
	p.Fingerprint, p.Address, p.Since = t.Fingerprint, address, time.Now().UTC().Truncate(time.Second)
	if err := e.Peers.Put(p); err != nil {
		return p, fmt.Errorf("%s has this daemon for a peer now, and is none here: %w", address, err)
	}
	return p, nil
}
