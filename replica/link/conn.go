package link

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

const (
	// introduceWithin is how long the two sides of a new connection may take to know each other.
	introduceWithin = 15 * time.Second
	// silence is how long nothing may come, or go, before a connection is given up. Both sides speak more often.
	silence = 20 * time.Second
	// chatter is how often they do.
	chatter = 2 * time.Second
)

// Conn is a connection to a peer who is known: what is said on it is secret and whole.
type Conn struct {
	Peer  Peer
	Role  wire.Role
	Build string // of the peer, for people

	tls *tls.Conn
	net *paced // beneath it
	in  *wire.Reader
	out *wire.Writer

	sending sync.Mutex // held for what is written
	once    sync.Once
	onClose func()
	cancel  context.CancelFunc
}

// paced is a connection whose deadlines move on with every byte that does. A record of TLS is shorter than what a system call had better
// move: reads are ahead, and writes are gathered where the writer says when they end.
type paced struct {
	net.Conn
	in             *bufio.Reader // of socket, the reader's; nil: nothing is read ahead
	fixed          atomic.Bool   // the deadline is set, and stays
	received, sent atomic.Int64
	limit          Limiter // nil: none
	ctx            context.Context

	mu       sync.Mutex // guards what follows
	gathers  bool
	gathered []byte
}

// gatherBytes is how much goes in one call, about.
const gatherBytes = 128 << 10

func newPaced(c net.Conn, limit Limiter, ctx context.Context) *paced {
	p := &paced{Conn: c, limit: limit, ctx: ctx}
	p.fixed.Store(true)
	return p
}

// ahead has reads be ahead from now on: much is to come.
func (p *paced) ahead() {
	if p.in == nil {
		p.in = bufio.NewReaderSize(socket{p}, 2*gatherBytes)
	}
}

// Limiter bounds a rate: Take returns how many bytes may be sent now, when that is one or more of n. The less at once, the less long
// does a peer hear nothing where many streams share a limit.
type Limiter interface {
	Take(ctx context.Context, n int) (int, error)
}

func (p *paced) Read(b []byte) (int, error) {
	if p.ctx.Err() != nil {
		return 0, net.ErrClosed // what was read before it was is nobody's any more
	}
	if p.in == nil {
		return socket{p}.Read(b)
	}
	return p.in.Read(b)
}

// socket is a paced connection's.
type socket struct{ p *paced }

func (s socket) Read(b []byte) (int, error) {
	if !s.p.fixed.Load() {
		if err := s.p.SetReadDeadline(time.Now().Add(silence)); err != nil {
			return 0, err
		}
	}
	n, err := s.p.Conn.Read(b)
	s.p.received.Add(int64(n))
	return n, err
}

func (p *paced) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.gathers {
		return p.writeLocked(b)
	}
	if len(p.gathered)+len(b) > gatherBytes {
		if err := p.flushLocked(); err != nil {
			return 0, err
		}
	}
	p.gathered = append(p.gathered, b...)
	return len(b), nil
}

func (p *paced) flushLocked() error {
	b := p.gathered
	p.gathered = p.gathered[:0]
	if len(b) == 0 {
		return nil
	}
	_, err := p.writeLocked(b)
	return err
}

func (p *paced) writeLocked(b []byte) (sent int, err error) {
	for err == nil && sent < len(b) {
		part := b[sent:]
		if p.limit != nil {
			n, err := p.limit.Take(p.ctx, len(part))
			if err != nil {
				return sent, err
			}
			part = part[:n]
		}
		if !p.fixed.Load() {
			if err := p.SetWriteDeadline(time.Now().Add(silence)); err != nil {
				return sent, err
			}
		}
		var n int
		n, err = p.Conn.Write(part)
		sent += n
		p.sent.Add(int64(n))
		if n > 0 && errors.Is(err, os.ErrDeadlineExceeded) && !p.fixed.Load() {
			err = nil // some of it moved
		}
	}
	return sent, err
}

// gather has writes wait for each other, or no longer: then what waits is written.
func (p *paced) gather(on bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gathers = on
	return p.flushLocked()
}

// writeFrame writes a frame, in as few system calls as it takes.
func (c *Conn) writeFrame(frame []byte) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	if err := c.net.gather(true); err != nil {
		return err
	}
	_, err := c.tls.Write(frame)
	return errors.Join(err, c.net.gather(false))
}

// Send sends a message now.
func (c *Conn) Send(m wire.Message) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	return c.out.Write(m)
}

// Receive waits for a message, whose slices are the connection's again from the call after the next one on. One goroutine uses it at a
// time.
func (c *Conn) Receive() (wire.Message, error) { return c.in.Next() }

// Close ends the connection.
func (c *Conn) Close() error {
	var err error
	c.once.Do(func() {
		c.cancel() // who waits for the limit is told
		err = c.net.Close()
		if c.onClose != nil {
			c.onClose()
		}
	})
	return err
}

// Address is where the peer is, or dialled from.
func (c *Conn) Address() string { return c.tls.RemoteAddr().String() }

// Bytes are how many came and went, encrypted.
func (c *Conn) Bytes() (received, sent int64) { return c.net.received.Load(), c.net.sent.Load() }

// RefusedError is what the peer says who ends a connection.
type RefusedError struct {
	Reason wire.Reason
	Text   string
}

func (e *RefusedError) Error() string { return fmt.Sprintf("the peer refused: %q", e.Text) }

// introduce makes a connection of a socket: who it is, and which version both speak. The side that dialled gives its role and what it expects of the
// other's certificate; known says who a certificate is, and may have it pass without a peer.
func (e *Endpoint) introduce(ctx context.Context, raw net.Conn, role wire.Role, known func(tls.ConnectionState) (Peer, error)) (_ *Conn, err error) {
	sending, cancel := context.WithCancel(context.Background())
	p := newPaced(raw, e.Limit, sending)
	c := &Conn{Role: role, net: p, cancel: cancel}
	defer func() {
		if err != nil {
			cancel()
			err = errors.Join(err, ignoreClosed(raw.Close()))
		}
	}()
	if err := p.SetDeadline(time.Now().Add(introduceWithin)); err != nil {
		return nil, err
	}
	conf := &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{e.Identity.Cert}, ClientAuth: tls.RequireAnyClientCert,
		InsecureSkipVerify: true, // VerifyConnection does: peers are known by their keys
		VerifyConnection: func(s tls.ConnectionState) (err error) {
			c.Peer, err = known(s)
			return err
		},
		SessionTicketsDisabled: true,
	}
	dialled := role != 0
	if dialled {
		c.tls = tls.Client(p, conf)
	} else {
		c.tls = tls.Server(p, conf)
	}
	if err := c.tls.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	if c.in, err = wire.NewReader(c.tls); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.in.Close()
		}
	}()
	if c.out, err = wire.NewWriter(c.tls, 0); err != nil {
		return nil, err
	}
	if err := c.hello(e, dialled); err != nil {
		return nil, err
	}
	if c.Peer.Name == "" {
		return c, nil // nobody who is not known gets more time
	}
	p.fixed.Store(false)
	return c, p.SetDeadline(time.Time{})
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// hello exchanges what each side is and speaks.
func (c *Conn) hello(e *Endpoint, dialled bool) error {
	mine := &wire.Hello{Lowest: wire.Version, Highest: wire.Version, Role: c.Role, Node: e.Node, Name: e.Name, Build: e.Build}
	if dialled {
		if err := c.Send(mine); err != nil {
			return err
		}
	}
	m, err := c.Receive()
	if err != nil {
		return fmt.Errorf("the peer's first message: %w", err)
	}
	if r, ok := m.(*wire.Refuse); ok {
		return &RefusedError{r.Reason, r.Text}
	}
	theirs, ok := m.(*wire.Hello)
	if !ok {
		return fmt.Errorf("%w: a stream begins with a %v", record.ErrCorrupt, m.Type())
	}
	if theirs.Highest < mine.Lowest || theirs.Lowest > mine.Highest {
		err := fmt.Errorf("%s (%s) speaks versions %d to %d of the replication protocol, and %s (%s) %d to %d: bring both to versions of Tidemark that have one in common",
			theirs.Name, theirs.Build, theirs.Lowest, theirs.Highest, mine.Name, mine.Build, mine.Lowest, mine.Highest)
		return errors.Join(err, c.Refuse(wire.ReasonVersion, err))
	}
	if !dialled {
		c.Role = theirs.Role
		mine.Role = theirs.Role
		if err := c.Send(mine); err != nil {
			return err
		}
	}
	c.Build = theirs.Build
	if c.Peer.Name != "" {
		c.in.Trust()
	}
	return nil
}

// Refuse tells the peer why it gets no farther.
func (c *Conn) Refuse(reason wire.Reason, why error) error {
	return c.Send(&wire.Refuse{Reason: reason, Text: why.Error()})
}
