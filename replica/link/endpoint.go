package link

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// Endpoint is a daemon's end of all its connections to peers. Its fields are set before it is used.
type Endpoint struct {
	Identity *Identity
	Peers    *Peers
	Node     [16]byte
	Name     string // of this daemon, for peers
	Build    string
	Log      *zap.Logger
	Limit    Limiter // of what is sent, to all peers; nil: none
	// Offered is called with each connection on which a peer offers a group, in a goroutine of its own, which may take as long as
	// it likes. It closes the connection.
	Offered func(ctx context.Context, c *Conn, m *wire.Offer)
	// Asked is called like Offered, with the group that a peer has a question about. It returns what the group is, or why the peer gets no answer.
	Asked func(c *Conn, group string) (History, error)
	// MaxConns bounds the connections of a peer; 0: 256. Each group that is shipped takes one.
	MaxConns int
	// Reserved reports whether a name that a daemon with a token gives itself is spoken for; nil: none is.
	Reserved func(name string) bool
	// Refused counts connections that were not let in.
	Refused atomic.Int64

	invited invitations
	// strangers bounds the connections that are not known yet.
	strangers chan struct{}

	mu     sync.Mutex         // guards what follows
	conns  map[*Conn]string   // by name of its peer, as it was known when it connected
	parked map[string][]*Conn // by peer: who wait for an offer, the newest last
	shut   bool               // nothing is kept any more

	arrivals bell // rung when one is parked
	network  bell // rung when the host's network changes
}

const (
	maxStrangers = 32
	// maxParked bounds how many connections of a peer wait for an offer.
	maxParked       = 8
	defaultMaxConns = 256
)

// Init makes the endpoint ready for use.
func (e *Endpoint) Init() {
	e.strangers = make(chan struct{}, maxStrangers)
	e.MaxConns = cmp.Or(e.MaxConns, defaultMaxConns)
	e.conns, e.parked = map[*Conn]string{}, map[string][]*Conn{}
	e.Peers.mu.Lock()
	defer e.Peers.mu.Unlock()
	e.Peers.dropped = e.drop
}

// drop ends the connections to a peer.
func (e *Endpoint) drop(peer string) {
	e.mu.Lock()
	var gone []*Conn
	for c, name := range e.conns {
		if name == peer {
			gone = append(gone, c)
		}
	}
	e.mu.Unlock()
	for _, c := range gone {
		_ = c.Close() // whoever uses it is told
	}
}

// keep notes a connection until it is closed.
func (e *Endpoint) keep(c *Conn) error {
	c.onClose = func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.conns, c)
	}
	e.mu.Lock()
	n := 0
	for _, name := range e.conns {
		if name == c.Peer.Name {
			n++
		}
	}
	e.conns[c] = c.Peer.Name
	shut := e.shut
	e.mu.Unlock()
	var err error
	if shut {
		err = net.ErrClosed
	}
	if n >= e.MaxConns {
		err = fmt.Errorf("peer %s has %d connections here, and no more are allowed: one for each group, and some (replication.most_groups)", c.Peer.Name, n)
		err = errors.Join(err, c.Refuse(wire.ReasonBusy, err))
	}
	// It may have been revoked before it was noted.
	if err = cmp.Or(err, e.Current(c)); err != nil {
		return errors.Join(err, c.Close())
	}
	return nil
}

// Current is an error if a connection's peer is not what it was when it connected.
func (e *Endpoint) Current(c *Conn) error {
	now, err := e.Peers.Get(c.Peer.Name)
	if err == nil && now.Fingerprint != c.Peer.Fingerprint {
		err = fmt.Errorf("peer %s has another key: %w", c.Peer.Name, ErrUnknownPeer)
	}
	if err == nil {
		c.Peer = now
	}
	return err
}

// Serve lets peers in until ctx ends. When it returns, whoever served one has returned; those that wait are Shut's to close.
func (e *Endpoint) Serve(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() }) // Accept tells
	defer stop()
	for {
		raw, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			e.Log.Warn("accept a peer's connection", zap.Error(err))
			select {
			case <-time.After(100 * time.Millisecond): // descriptors may have run out
			case <-ctx.Done():
				return nil
			}
			continue
		}
		select {
		case e.strangers <- struct{}{}:
		default:
			e.Refused.Add(1)
			_ = raw.Close() // too many whom nobody knows
			continue
		}
		wg.Go(func() { e.admit(ctx, raw) })
	}
}

// admit finds out who has dialled, and what for.
func (e *Endpoint) admit(ctx context.Context, raw net.Conn) {
	tune(raw)
	stranger := sync.OnceFunc(func() { <-e.strangers })
	defer stranger()
	var unknown error
	c, err := e.introduce(ctx, raw, 0, func(s tls.ConnectionState) (Peer, error) {
		var p Peer
		p, unknown = e.Peers.identify(s)
		return p, nil // one who is not known may have a token
	})
	log := e.Log.With(zap.Stringer("from", raw.RemoteAddr()))
	if err != nil {
		e.Refused.Add(1)
		log.Warn("a connection was refused", zap.Error(err))
		return
	}
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	switch {
	case c.Role == wire.RolePairs:
		err = e.pair(c)
	case unknown != nil:
		err = errors.Join(unknown, c.Refuse(wire.ReasonRights, unknown))
	default:
		stranger()
		if err = e.keep(c); err == nil {
			log.Debug("a peer has connected", zap.String("peer", c.Peer.Name), zap.Uint8("role", uint8(c.Role)))
			err = e.attend(ctx, c)
		}
	}
	if err != nil {
		e.Refused.Add(1)
		log.Warn("a connection was refused", zap.String("peer", c.Peer.Name), zap.Error(err))
		_ = c.Close() // it was told why
	}
}

// attend does what a peer has dialled for.
func (e *Endpoint) attend(ctx context.Context, c *Conn) error {
	switch c.Role {
	case wire.RoleOffers, wire.RoleAsks:
		m, err := c.Receive()
		if err != nil {
			return err
		}
		return e.offered(ctx, c, m)
	case wire.RoleWaits:
		return e.park(c)
	}
	err := fmt.Errorf("role %d is not known", c.Role)
	return errors.Join(err, c.Refuse(wire.ReasonVersion, err))
}

// offered passes an offer or a question on, if that is what it is.
func (e *Endpoint) offered(ctx context.Context, c *Conn, m wire.Message) error {
	if err := e.Current(c); err != nil {
		return errors.Join(err, c.Refuse(wire.ReasonRights, err))
	}
	switch m := m.(type) {
	case *wire.Offer:
		e.Offered(ctx, c, m)
		return nil
	case *wire.Ask:
		return e.asked(ctx, c, m.Group, func(src History) error {
			if m.Disk != 0 {
				return answerSums(c, m, src)
			}
			return answerRecords(ctx, c, m, src)
		})
	case *wire.AskLost:
		return e.asked(ctx, c, m.Group, func(src History) error { return answerLost(c, m, src) })
	case *wire.Refuse:
		return &RefusedError{m.Reason, m.Text}
	}
	err := fmt.Errorf("got %v, expected an offer", m.Type())
	return errors.Join(err, c.Refuse(wire.ReasonFailed, err))
}

// park keeps a connection for when there is something to offer.
func (e *Endpoint) park(c *Conn) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := e.parked[c.Peer.Name]
	if len(all) >= maxParked {
		go func(old *Conn) { _ = old.Close() }(all[0]) // it may be dead; its owner dials again
		all = all[1:]
	}
	e.parked[c.Peer.Name] = append(all, c)
	e.arrivals.ring()
	return nil
}

// Open makes a connection to a peer on which a group is to be offered, or a question asked: it dials if it knows where the peer is, and else waits for
// the peer to dial.
func (e *Endpoint) Open(ctx context.Context, peer string, role wire.Role) (*Conn, error) {
	for {
		p, err := e.Peers.Get(peer)
		if err != nil {
			return nil, err
		}
		if p.Address != "" {
			return e.dial(ctx, p, role)
		}
		arrived := e.arrivals.wait()
		e.mu.Lock()
		all := e.parked[peer]
		if n := len(all); n > 0 {
			c := all[n-1]
			e.parked[peer] = all[:n-1]
			e.mu.Unlock()
			return c, nil
		}
		e.mu.Unlock()
		select {
		case <-arrived:
		case <-ctx.Done():
			return nil, fmt.Errorf("peer %s has not dialled, and its address is not known here: %w", peer, ctx.Err())
		}
	}
}

func (e *Endpoint) dial(ctx context.Context, p Peer, role wire.Role) (*Conn, error) {
	within, cancel := context.WithTimeout(ctx, introduceWithin)
	defer cancel()
	raw, err := (&net.Dialer{}).DialContext(within, "tcp", p.Address)
	if err != nil {
		return nil, fmt.Errorf("peer %s: %w", p.Name, err)
	}
	tune(raw)
	c, err := e.introduce(ctx, raw, role, func(s tls.ConnectionState) (Peer, error) {
		got, err := e.Peers.identify(s)
		if err == nil && got.Name != p.Name {
			err = fmt.Errorf("it is peer %s", got.Name)
		}
		return got, err
	})
	if err != nil {
		return nil, fmt.Errorf("peer %s at %s: %w", p.Name, p.Address, err)
	}
	return c, e.keep(c)
}

// Await dials a peer and waits for it to offer a group, or to ask for something, until ctx ends or the connection does. taken is called
// when it has; not if it refuses the connection.
func (e *Endpoint) Await(ctx context.Context, peer string, taken func()) error {
	p, err := e.Peers.Get(peer)
	if err != nil {
		return err
	}
	c, err := e.dial(ctx, p, wire.RoleWaits)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if err := c.patient(); err != nil {
		return err
	}
	m, err := c.Receive()
	if err != nil {
		return fmt.Errorf("peer %s: %w", peer, err)
	}
	c.impatient()
	switch m.(type) {
	case *wire.Offer, *wire.Ask, *wire.AskLost:
		taken()
	}
	return e.offered(ctx, c, m)
}

// patient has the next message come as late as it likes: that the peer is there is TCP's to find out until then.
func (c *Conn) patient() error {
	c.net.fixed.Store(true)
	return c.net.SetReadDeadline(time.Time{})
}

// impatient takes patient back.
func (c *Conn) impatient() { c.net.fixed.Store(false) }

// Shut ends all connections.
func (e *Endpoint) Shut() {
	e.mu.Lock()
	var all []*Conn
	for c := range e.conns {
		all = append(all, c)
	}
	e.parked, e.shut = map[string][]*Conn{}, true
	e.mu.Unlock()
	for _, c := range all {
		_ = c.Close() // whoever uses it is told
	}
}
