// Package client is an NBD client: an export as something to read, write and
// ask for its extents.
//
// It promises that requests of many goroutines go out on one connection
// without waiting for each other, and that an error of the stream is told to all who
// wait and to all who come after. It holds one reader goroutine, which ends with
// Close. Lengths from the wire are checked against what was asked before
// anything is read. The caller must Close the client. Clients are safe for concurrent use.
//
// The protocol is doc/proto.md of github.com/NetworkBlockDevice/nbd.
// With SetTimeout no call waits longer than that for its answer.
// Limits: fixed newstyle servers with GO and structured replies; no reconnection.
package client

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"

	"github.com/tidemark-cdp/tidemark/nbd/internal/proto"
)

const (
	maxReply  = 64 << 10 // of an option's reply, or of a chunk that is no data, in bytes
	maxStatus = 1 << 20  // of a BLOCK_STATUS chunk, in bytes
)

// MaxRequest is the longest ReadAt or WriteAt that goes out as one request, in bytes.
const MaxRequest = 32 << 20

// Client is a connection to an export.
type Client struct {
	c        net.Conn
	r        *bufio.Reader
	size     int64
	flags    uint16
	contexts map[string]uint32 // the number of each metadata context that was agreed on
	readerWG sync.WaitGroup

	timeout atomic.Int64  // nanoseconds; 0: none
	ended   chan struct{} // closed when the reader has ended

	wmu sync.Mutex // held while a request is sent

	mu struct {
		sync.Mutex
		next    uint64
		waiting map[uint64]*call
		err     error // of the stream; final
	}
}

type call struct {
	off  uint64
	buf  []byte    // of a read
	got  int       // bytes of buf that have been filled
	exts *[]Extent // of a BLOCK_STATUS
	meta uint32    // the metadata context whose extents they are
	err  error
	done chan struct{}
}

// Extent is a run of an export, and what a metadata context says of it.
type Extent struct {
	Len   int64
	Flags uint32
}

// Dial connects to an export. With a TLS configuration the connection is upgraded first. The
// metadata contexts named can be asked for by Status; the server must have them.
func Dial(ctx context.Context, network, addr, export string, tlsConf *tls.Config, contexts ...string) (*Client, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, fmt.Errorf("connect to the NBD server: %w", err)
	}
	c := &Client{c: nc, contexts: map[string]uint32{}, ended: make(chan struct{})}
	c.mu.waiting = map[uint64]*call{}
	stop := context.AfterFunc(ctx, func() { _ = nc.Close() })
	defer stop()
	if err := c.negotiate(ctx, export, tlsConf, true, contexts); err != nil {
		return nil, errors.Join(fmt.Errorf("export %q: %w", export, err), nc.Close())
	}
	c.readerWG.Go(c.receive)
	return c, nil
}

// Info is what a server says of an export.
type Info struct {
	Size  int64  // bytes
	Flags uint16 // the transmission flags of the protocol
}

// Handshake opens an export on a connection and leaves the connection at its first request, for simple replies: whoever takes it over
// from here, the kernel for one, goes on. Nothing of the server's is read that is not the handshake's.
func Handshake(ctx context.Context, nc net.Conn, export string) (Info, error) {
	c := &Client{c: nc, contexts: map[string]uint32{}}
	stop := context.AfterFunc(ctx, func() { _ = nc.Close() })
	defer stop()
	if err := c.negotiate(ctx, export, nil, false, nil); err != nil {
		return Info{}, fmt.Errorf("export %q: %w", export, err)
	}
	if n := c.r.Buffered(); n > 0 {
		return Info{}, fmt.Errorf("export %q: the server sent %d bytes that nobody asked for", export, n)
	}
	return Info{c.size, c.flags}, nil
}

// Size is the export's size in bytes.
func (c *Client) Size() int64 { return c.size }

// ReadOnly reports whether the export refuses writes.
func (c *Client) ReadOnly() bool { return c.flags&proto.FlagReadOnly != 0 }

// CanZero reports whether the export takes Zero.
func (c *Client) CanZero() bool { return c.flags&proto.FlagSendZeroes != 0 }

// CanFlush reports whether the export takes Flush; if not, what is written is as durable as it gets.
func (c *Client) CanFlush() bool { return c.flags&proto.FlagSendFlush != 0 }

func (c *Client) negotiate(ctx context.Context, export string, tlsConf *tls.Config, structured bool, contexts []string) error {
	c.r = bufio.NewReaderSize(c.c, 256<<10)
	var b [18]byte
	if _, err := io.ReadFull(c.r, b[:]); err != nil {
		return err
	}
	be := binary.BigEndian
	if be.Uint64(b[:]) != protocol.NEGOTIATION_MAGIC_OLDSTYLE || be.Uint64(b[8:]) != protocol.NEGOTIATION_MAGIC_OPTION {
		return errors.New("the server is no newstyle NBD server")
	}
	flags := uint32(be.Uint16(b[16:])) & 3
	if flags&1 == 0 {
		return errors.New("the server does not know fixed newstyle negotiation")
	}
	if _, err := c.c.Write(be.AppendUint32(nil, flags)); err != nil {
		return err
	}
	if tlsConf != nil {
		if _, err := c.option(proto.OptStartTLS, nil, nil); err != nil {
			return fmt.Errorf("STARTTLS: %w", err)
		}
		tc := tls.Client(c.c, tlsConf)
		if err := tc.HandshakeContext(ctx); err != nil {
			return fmt.Errorf("TLS: %w", err)
		}
		c.c, c.r = tc, bufio.NewReaderSize(tc, 256<<10)
	}
	name := append(be.AppendUint32(nil, uint32(len(export))), export...)
	if structured {
		if err := c.agreeOn(name, contexts); err != nil {
			return err
		}
	}
	found, err := c.option(protocol.NEGOTIATION_ID_OPTION_GO, append(name, 0, 0), func(typ uint32, data []byte) {
		if typ == protocol.NEGOTIATION_TYPE_REPLY_INFO && len(data) == 12 && be.Uint16(data) == protocol.NEGOTIATION_TYPE_INFO_EXPORT {
			c.size, c.flags = int64(be.Uint64(data[2:])), be.Uint16(data[10:])
		}
	})
	if err == nil && (!found || c.size < 0) {
		err = errors.New("the server told no size")
	}
	return err
}

// agreeOn asks for structured replies and the metadata contexts. A server without base:allocation is one without extents, no more.
func (c *Client) agreeOn(name []byte, contexts []string) error {
	be := binary.BigEndian
	if _, err := c.option(proto.OptStructuredReply, nil, nil); err != nil {
		return fmt.Errorf("structured replies: %w", err)
	}
	q := be.AppendUint32(append([]byte(nil), name...), uint32(1+len(contexts)))
	for _, context := range append([]string{proto.MetaAllocation}, contexts...) {
		q = append(be.AppendUint32(q, uint32(len(context))), context...)
	}
	_, metaErr := c.option(proto.OptSetMeta, q, func(typ uint32, data []byte) {
		if typ == proto.RepMetaContext && len(data) >= 4 {
			c.contexts[string(data[4:])] = be.Uint32(data)
		}
	})
	for _, context := range contexts {
		if _, ok := c.contexts[context]; !ok {
			return errors.Join(fmt.Errorf("the server has no metadata context %q for it", context), metaErr)
		}
	}
	return nil
}

// option sends an option and calls fn with each reply before the last. It
// reports whether there were any.
func (c *Client) option(opt uint32, data []byte, fn func(typ uint32, data []byte)) (any bool, err error) {
	be := binary.BigEndian
	b := be.AppendUint64(nil, protocol.NEGOTIATION_MAGIC_OPTION)
	b = be.AppendUint32(be.AppendUint32(b, opt), uint32(len(data)))
	if _, err := c.c.Write(append(b, data...)); err != nil {
		return false, err
	}
	for {
		var h [20]byte
		if _, err := io.ReadFull(c.r, h[:]); err != nil {
			return any, err
		}
		typ, n := be.Uint32(h[12:]), be.Uint32(h[16:])
		if be.Uint64(h[:]) != protocol.NEGOTIATION_MAGIC_REPLY || be.Uint32(h[8:]) != opt || n > maxReply {
			return any, fmt.Errorf("malformed reply to option %d: type %d, %d bytes", opt, typ, n)
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(c.r, data); err != nil {
			return any, err
		}
		switch {
		case typ == protocol.NEGOTIATION_TYPE_REPLY_ACK:
			return any, nil
		case typ&proto.RepErrBase != 0:
			return any, fmt.Errorf("the server refused: %s (error %d)", data, typ&^proto.RepErrBase)
		case fn != nil:
			fn(typ, data)
			any = true
		}
	}
}

// send starts a request; its call is finished by the reader.
func (c *Client) send(flags, typ uint16, off uint64, n uint32, payload []byte, cl *call) error {
	cl.done, cl.off = make(chan struct{}), off
	c.mu.Lock()
	if err := c.mu.err; err != nil {
		c.mu.Unlock()
		return err
	}
	c.mu.next++
	cookie := c.mu.next
	c.mu.waiting[cookie] = cl
	c.mu.Unlock()
	be := binary.BigEndian
	b := be.AppendUint32(make([]byte, 0, 28), protocol.TRANSMISSION_MAGIC_REQUEST)
	b = be.AppendUint16(be.AppendUint16(b, flags), typ)
	b = be.AppendUint64(be.AppendUint64(b, cookie), off)
	b = be.AppendUint32(b, n)
	bufs := net.Buffers{b}
	if len(payload) > 0 {
		bufs = append(bufs, payload)
	}
	stop := c.watch(cl)
	c.wmu.Lock()
	_, err := bufs.WriteTo(c.c)
	c.wmu.Unlock()
	if err != nil {
		c.breakOff(err)
	}
	<-cl.done
	stop()
	return cl.err
}

// SetTimeout bounds how long calls from now on wait for their answer: one that does not come in that time
// ends the connection, for all calls. 0: for ever.
func (c *Client) SetTimeout(d time.Duration) { c.timeout.Store(int64(d)) }

// watch ends the connection if a call takes too long.
func (c *Client) watch(cl *call) (stop func()) {
	d := time.Duration(c.timeout.Load())
	if d == 0 {
		return func() {}
	}
	t := time.AfterFunc(d, func() { c.breakOff(fmt.Errorf("no answer for %v: %w", d, syscall.ETIMEDOUT)) })
	return func() { t.Stop() }
}

// Err is why the connection is of no use any more; nil if it is.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.err
}

// Done is closed when the connection has ended, for whatever reason.
func (c *Client) Done() <-chan struct{} { return c.ended }

// Break ends the connection for a reason: calls that wait get errors, as all that follow do. Close is still to be called.
func (c *Client) Break(err error) { c.breakOff(err) }

// breakOff ends the connection for a reason. The calls are ended by the reader, when it writes to none of their buffers any more.
func (c *Client) breakOff(err error) {
	c.mu.Lock()
	if c.mu.err == nil {
		c.mu.err = fmt.Errorf("NBD connection lost: %w", err)
	}
	c.mu.Unlock()
	_ = c.c.Close()
	<-c.ended
}

// fail ends every call that waits and all that follow.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.err == nil {
		c.mu.err = fmt.Errorf("NBD connection lost: %w", err)
	}
	for cookie, cl := range c.mu.waiting {
		delete(c.mu.waiting, cookie)
		cl.err = c.mu.err
		close(cl.done)
	}
}

// receive reads replies until the stream ends.
func (c *Client) receive() {
	defer close(c.ended)
	for {
		if err := c.chunk(); err != nil {
			c.fail(err)
			_ = c.c.Close()
			return
		}
	}
}

func (c *Client) chunk() error {
	var b [20]byte
	be := binary.BigEndian
	if _, err := io.ReadFull(c.r, b[:16]); err != nil {
		return err
	}
	if be.Uint32(b[:]) == protocol.TRANSMISSION_MAGIC_REPLY {
		return c.finish(be.Uint64(b[8:]), errnoError(be.Uint32(b[4:]), ""))
	}
	if m := be.Uint32(b[:]); m != proto.MagicStructuredReply {
		return fmt.Errorf("reply magic %#x", m)
	}
	if _, err := io.ReadFull(c.r, b[16:]); err != nil {
		return err
	}
	flags, typ, cookie, n := be.Uint16(b[4:]), be.Uint16(b[6:]), be.Uint64(b[8:]), be.Uint32(b[16:])
	c.mu.Lock()
	cl := c.mu.waiting[cookie]
	c.mu.Unlock()
	if cl == nil {
		return fmt.Errorf("reply to request %d, which is not under way", cookie)
	}
	if err := c.content(cl, typ, n); err != nil {
		return err
	}
	if flags&proto.ReplyFlagDone != 0 {
		return c.finish(cookie, cl.err)
	}
	return nil
}

// content reads a chunk's content into its call.
func (c *Client) content(cl *call, typ uint16, n uint32) error {
	be := binary.BigEndian
	bad := func() error { return fmt.Errorf("malformed reply chunk: type %d, %d bytes", typ, n) }
	if typ == proto.ReplyOffsetData {
		var b [8]byte
		if n < 8 {
			return bad()
		}
		if _, err := io.ReadFull(c.r, b[:]); err != nil {
			return err
		}
		at := be.Uint64(b[:]) - cl.off
		if at > uint64(len(cl.buf)) || uint64(n-8) > uint64(len(cl.buf))-at {
			return bad()
		}
		cl.got += int(n - 8)
		_, err := io.ReadFull(c.r, cl.buf[at:at+uint64(n-8)])
		return err
	}
	limit := uint32(maxReply)
	if typ == proto.ReplyBlockStatus {
		limit = maxStatus
	}
	if n > limit {
		return bad()
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(c.r, data); err != nil {
		return err
	}
	switch {
	case typ == proto.ReplyOffsetHole:
		if n != 12 {
			return bad()
		}
		at, k := be.Uint64(data)-cl.off, uint64(be.Uint32(data[8:]))
		if at > uint64(len(cl.buf)) || k > uint64(len(cl.buf))-at {
			return bad()
		}
		cl.got += int(k)
		clear(cl.buf[at : at+k])
	case typ == proto.ReplyBlockStatus:
		if n < 12 || n%8 != 4 || cl.exts == nil {
			return bad()
		}
		if be.Uint32(data) != cl.meta {
			return nil // another's: all that were agreed on are told
		}
		for d := data[4:]; len(d) > 0; d = d[8:] {
			*cl.exts = append(*cl.exts, Extent{int64(be.Uint32(d)), be.Uint32(d[4:])})
		}
	case typ&proto.ReplyErrorBit != 0:
		if n < 6 || int(be.Uint16(data[4:])) > len(data)-6 {
			return bad()
		}
		cl.err = errnoError(be.Uint32(data), string(data[6:6+be.Uint16(data[4:])]))
	}
	return nil
}

func errnoError(errno uint32, text string) error {
	switch {
	case errno == 0:
		return nil
	case text == "":
		return fmt.Errorf("the server answered: %w", syscall.Errno(errno))
	}
	return fmt.Errorf("the server answered: %s: %w", text, syscall.Errno(errno))
}

func (c *Client) finish(cookie uint64, err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	cl := c.mu.waiting[cookie]
	if cl == nil {
		return fmt.Errorf("reply to request %d, which is not under way", cookie)
	}
	delete(c.mu.waiting, cookie)
	if cl.err = err; err == nil && cl.got != len(cl.buf) {
		cl.err = fmt.Errorf("the server sent %d of %d bytes", cl.got, len(cl.buf))
	}
	close(cl.done)
	return nil
}

// ReadAt fills p from off; at most MaxRequest bytes.
func (c *Client) ReadAt(p []byte, off int64) error {
	return c.send(0, protocol.TRANSMISSION_TYPE_REQUEST_READ, uint64(off), uint32(len(p)), nil, &call{buf: p})
}

// WriteAt writes p at off; at most MaxRequest bytes. fua makes it durable.
func (c *Client) WriteAt(p []byte, off int64, fua bool) error {
	var flags uint16
	if fua {
		flags = 1
	}
	return c.send(flags, protocol.TRANSMISSION_TYPE_REQUEST_WRITE, uint64(off), uint32(len(p)), p, &call{})
}

// Flush makes every write durable that returned before.
func (c *Client) Flush() error { return c.send(0, proto.CmdFlush, 0, 0, nil, &call{}) }

// Trim discards a range.
func (c *Client) Trim(off int64, n uint32) error {
	return c.send(0, proto.CmdTrim, uint64(off), n, nil, &call{})
}

// Zero makes a range read as zeroes; keep asks the server to keep its space.
func (c *Client) Zero(off int64, n uint32, keep bool) error {
	var flags uint16
	if keep {
		flags = 2
	}
	return c.send(flags, proto.CmdWriteZeroes, uint64(off), n, nil, &call{})
}

// Extents calls fn with runs that together fill the range, and whether each is known to be a hole that
// reads as zeroes. Without the server's knowledge, all of it is data.
func (c *Client) Extents(off, n int64, fn func(n int64, zero bool)) error {
	if _, ok := c.contexts[proto.MetaAllocation]; !ok {
		fn(n, false)
		return nil
	}
	return c.Status(proto.MetaAllocation, off, n, func(n int64, flags uint32) { fn(n, flags&proto.StateZero != 0) })
}

// Status calls fn with runs that together fill the range, and what a metadata context that was named to
// Dial says of each.
func (c *Client) Status(context string, off, n int64, fn func(n int64, flags uint32)) error {
	id, ok := c.contexts[context]
	if !ok {
		return fmt.Errorf("metadata context %q was not asked for", context)
	}
	for n > 0 {
		var exts []Extent
		ask := min(n, 1<<30)
		if err := c.send(0, proto.CmdBlockStatus, uint64(off), uint32(ask), nil, &call{exts: &exts, meta: id}); err != nil {
			return err
		}
		before := n
		for _, e := range exts {
			k := min(e.Len, n)
			if k > 0 {
				fn(k, e.Flags)
			}
			off, n = off+k, n-k
		}
		if n == before {
			return errors.New("the server told no extents")
		}
	}
	return nil
}

// Close says goodbye and ends the connection.
func (c *Client) Close() error {
	be := binary.BigEndian
	b := be.AppendUint32(make([]byte, 0, 28), protocol.TRANSMISSION_MAGIC_REQUEST)
	b = be.AppendUint16(be.AppendUint16(b, 0), protocol.TRANSMISSION_TYPE_REQUEST_DISC)
	c.wmu.Lock()
	_, _ = c.c.Write(append(b, make([]byte, 20)...)) // the server may be gone already
	c.wmu.Unlock()
	err := c.c.Close()
	c.readerWG.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
