package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
	"go.uber.org/zap"
	"golang.org/x/sync/semaphore"

	"github.com/tidemark-cdp/tidemark/nbd/internal/proto"
)

const (
	// pieceSize is how much of a WRITE reaches the device at once, and of a READ the client
	// where the protocol lets it be told in pieces, in bytes. So a long WRITE takes no memory
	// but its connection's, whatever its client does.
	pieceSize = 1 << 20
	// streamSize is what a connection reads of its socket at once, in bytes.
	// Writes are served from there.
	streamSize = pieceSize + 64<<10
	// outSize is how many bytes of replies are gathered before they are sent.
	outSize = 512 << 10
	// inlineRead is the longest READ that the reader tries itself.
	inlineRead = 128 << 10
	// maxWorkers bounds the requests of a connection that wait at one time.
	maxWorkers = 64
	// stopTime is what clients have to take their last replies when the server stops.
	stopTime = 10 * time.Second
	// maxLarge is what the long READs of a connection may take of the server's
	// memory at one time, in bytes; a single one that is larger waits for the others.
	maxLarge = 8 << 20
	// maxBatch bounds the writes that reach the device together: with more,
	// client and server take turns.
	maxBatch = 16
)

// conn is a connection in the transmission phase.
type conn struct {
	s    *Server
	c    net.Conn
	sess *session
	log  *zap.Logger

	// The reader's alone:
	in      []byte // in[r:w] was received and is not served
	r, w    int
	batch   []Change // writes that wait for commit; their buffers are views of in
	cookies []uint64 // of batch
	fua     bool     // some write of batch wants to be durable
	out     []byte   // replies that wait to be sent

	raw   syscall.RawConn // of c, nil if it has none
	quick bool            // the client's last request came within spinTime

	workers sync.WaitGroup
	slots   chan struct{}
	large   *semaphore.Weighted // of maxLarge

	wmu sync.Mutex // held for a write to c; replies stay whole
}

// request is a parsed request header.
type request struct {
	flags, typ uint16
	cookie     uint64
	off        uint64
	n          uint32
	more       bool // of a piece of a READ: others follow
}

// done is the flag of the chunk that ends a request's reply, if req is its last piece.
func (req request) done() uint16 {
	if req.more {
		return 0
	}
	return proto.ReplyFlagDone
}

func newConn(s *Server, c net.Conn, sess *session, log *zap.Logger) *conn {
	var raw syscall.RawConn
	if sc, ok := c.(syscall.Conn); ok {
		raw, _ = sc.SyscallConn() // without it the connection is only slower
	}
	return &conn{
		s: s, c: c, sess: sess, log: log, raw: raw,
		in: make([]byte, streamSize), out: make([]byte, 0, outSize+inlineRead+proto.StructuredSize+8),
		slots: make(chan struct{}, maxWorkers), large: semaphore.NewWeighted(maxLarge),
	}
}

var (
	// errDisc says that the client ended the connection in order.
	errDisc = errors.New("client disconnected")
	// errNoDisc says that it did so between two requests, without saying so:
	// some clients do.
	errNoDisc = errors.New("connection ended without DISC")
)

// serve runs until the client disconnects or ctx ends, which are no errors but
// for errNoDisc, or the stream can not go on.
func (c *conn) serve(ctx context.Context) error {
	// A client that does not read its replies must not hold up a stop.
	stop := context.AfterFunc(ctx, func() {
		_ = c.c.SetReadDeadline(time.Unix(1, 0))
		_ = c.c.SetWriteDeadline(time.Now().Add(stopTime))
	})
	defer stop()
	err := c.loop()
	// What was received is finished and answered, whatever ended the loop.
	ferr := c.settle()
	c.workers.Wait()
	switch {
	case errors.Is(err, errDisc), ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded):
		return nil
	case errors.Is(err, io.EOF):
		return errors.New("connection ended within a request")
	}
	return errors.Join(err, ferr)
}

func (c *conn) loop() error {
	for {
		if err := c.need(proto.RequestSize); err != nil {
			if err == io.EOF && c.r == c.w {
				return errNoDisc
			}
			return err
		}
		be := binary.BigEndian
		b := c.in[c.r:]
		if m := be.Uint32(b); m != protocol.TRANSMISSION_MAGIC_REQUEST {
			return fmt.Errorf("client sent request magic %#x: the stream is out of step", m)
		}
		req := request{
			flags: be.Uint16(b[4:]), typ: be.Uint16(b[6:]), cookie: be.Uint64(b[8:]), off: be.Uint64(b[16:]), n: be.Uint32(b[24:]),
		}
		c.r += proto.RequestSize
		if err := c.request(req); err != nil {
			return err
		}
	}
}

// need makes in[r:w] hold n bytes at least. Before it waits for the socket,
// all that was gathered is done and answered.
func (c *conn) need(n int) error {
	for c.w-c.r < n {
		if err := c.settle(); err != nil {
			return err
		}
		if c.r > 0 {
			c.w = copy(c.in, c.in[c.r:c.w])
			c.r = 0
		}
		k, err := c.receive(c.in[c.w:])
		if k == 0 && err != nil {
			return err
		}
		c.w += k
	}
	return nil
}

// spinTime is how long a reader asks for the next request again and again
// before it sleeps. A client that has one request under way at a time sends the next
// within some microseconds of a reply, and waking up takes as long. A client
// that took longer than spinTime last time is not waited for like that.
const spinTime = 50 * time.Microsecond

// receive reads from the socket.
func (c *conn) receive(p []byte) (n int, err error) {
	if c.raw == nil {
		return c.c.Read(p)
	}
	began := time.Now()
	if c.quick {
		rerr := c.raw.Read(func(fd uintptr) bool {
			for {
				n, err = syscall.Read(int(fd), p)
				if err == nil || err != syscall.EAGAIN && err != syscall.EINTR || time.Since(began) > spinTime {
					return true
				}
			}
		})
		if rerr == nil && n > 0 {
			return n, nil
		}
	}
	n, err = c.c.Read(p) // and it tells what went wrong
	c.quick = time.Since(began) <= spinTime
	return n, err
}

// settle commits the gathered writes and sends the gathered replies.
func (c *conn) settle() error {
	c.commit()
	return c.send()
}

func (c *conn) send() error {
	if len(c.out) == 0 {
		return nil
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	_, err := c.c.Write(c.out)
	c.out = c.out[:0]
	return err
}

// commit hands the gathered writes to the device, and answers them.
func (c *conn) commit() {
	if len(c.batch) == 0 {
		return
	}
	err := c.change(c.batch, c.fua || c.s.Durable)
	for _, cookie := range c.cookies {
		c.out = c.appendDone(c.out, cookie, err)
	}
	clear(c.batch)
	c.batch, c.cookies, c.fua = c.batch[:0], c.cookies[:0], false
}

// change hands changes to the device and makes them durable if they are to be.
func (c *conn) change(changes []Change, durable bool) error {
	err := c.sess.dev.Change(changes)
	if err == nil && durable {
		err = c.sess.dev.Flush()
	}
	if err != nil {
		c.log.Warn("write failed", zap.Int("requests", len(changes)), zap.Int64("offset", changes[0].Off), zap.Error(err))
	}
	return err
}

// validFlags are the command flags that each command takes.
var validFlags = map[uint16]uint16{
	proto.CmdRead:        proto.CmdFlagFUA | proto.CmdFlagDF,
	proto.CmdWrite:       proto.CmdFlagFUA,
	proto.CmdFlush:       proto.CmdFlagFUA,
	proto.CmdTrim:        proto.CmdFlagFUA,
	proto.CmdCache:       proto.CmdFlagFUA,
	proto.CmdWriteZeroes: proto.CmdFlagFUA | proto.CmdFlagNoHole | proto.CmdFlagFastZero,
	proto.CmdBlockStatus: proto.CmdFlagFUA | proto.CmdFlagReqOne,
}

// check finds what is wrong with a request; 0: nothing.
func (c *conn) check(req request) uint32 {
	valid, known := validFlags[req.typ]
	if !known || req.flags&^valid != 0 || req.flags&proto.CmdFlagDF != 0 && !c.sess.structured {
		return proto.ErrEINVAL
	}
	if req.typ == proto.CmdFlush {
		return 0
	}
	changes := req.typ == proto.CmdWrite || req.typ == proto.CmdTrim || req.typ == proto.CmdWriteZeroes
	if changes && c.sess.dev.ReadOnly() {
		return proto.ErrEPERM
	}
	size := uint64(c.sess.dev.Size())
	if req.off > size || uint64(req.n) > size-req.off {
		if req.typ == proto.CmdWrite || req.typ == proto.CmdWriteZeroes {
			return proto.ErrENOSPC
		}
		return proto.ErrEINVAL
	}
	switch {
	case (req.typ == proto.CmdRead || req.typ == proto.CmdWrite) && req.n > MaxRequest:
		return proto.ErrEINVAL
	case req.typ == proto.CmdBlockStatus && (len(c.sess.maps) == 0 || req.n == 0):
		return proto.ErrEINVAL
	}
	return 0
}

// request serves a request whose header has been taken off the stream. Its
// error ends the connection.
func (c *conn) request(req request) error {
	if req.typ == proto.CmdDisc {
		return errDisc
	}
	if errno := c.check(req); errno != 0 {
		if req.typ == proto.CmdWrite {
			if err := c.drain(int64(req.n)); err != nil {
				return err
			}
		}
		text := fmt.Sprintf("command %d with flags %#x at %d, %d bytes, is not served on an export of %d bytes", req.typ, req.flags, req.off, req.n, c.sess.dev.Size())
		c.out = c.appendError(c.out, req.cookie, errno, text)
		return nil
	}
	switch req.typ {
	case proto.CmdWrite:
		return c.write(req)
	case proto.CmdTrim, proto.CmdWriteZeroes:
		op := OpTrim
		if req.flags&proto.CmdFlagNoHole != 0 {
			op = OpZero
		}
		return c.gather(req, Change{Op: op, Off: int64(req.off), Len: int64(req.n)})
	case proto.CmdRead:
		return c.read(req)
	case proto.CmdFlush:
		return c.flush(req)
	}
	c.commit()
	return c.work(func() []byte {
		if req.typ == proto.CmdCache {
			return c.cache(req)
		}
		return c.blockStatus(req)
	})
}

// drain passes over the payload of a refused write.
func (c *conn) drain(n int64) error {
	for n > 0 {
		if err := c.need(1); err != nil {
			return err
		}
		k := min(n, int64(c.w-c.r))
		c.r, n = c.r+int(k), n-k
	}
	return nil
}

func (c *conn) gather(req request, ch Change) error {
	c.batch, c.cookies = append(c.batch, ch), append(c.cookies, req.cookie)
	c.fua = c.fua || req.flags&proto.CmdFlagFUA != 0
	if len(c.batch) >= maxBatch {
		return c.settle()
	}
	return nil
}

func (c *conn) write(req request) error {
	if n := int(req.n); n <= pieceSize {
		if err := c.need(n); err != nil {
			return err
		}
		c.r += n
		return c.gather(req, Change{Op: OpWrite, Off: int64(req.off), Len: int64(n), Buf: c.in[c.r-n : c.r : c.r]})
	}
	c.commit()
	durable := c.s.Durable || req.flags&proto.CmdFlagFUA != 0
	var failed error
	for off, left := int64(req.off), int(req.n); left > 0; {
		n := min(left, pieceSize)
		if err := c.need(n); err != nil {
			return err
		}
		c.r += n
		if failed == nil {
			failed = c.change([]Change{{Op: OpWrite, Off: off, Len: int64(n), Buf: c.in[c.r-n : c.r : c.r]}}, durable && n == left)
		}
		off, left = off+int64(n), left-n
	}
	c.out = c.appendDone(c.out, req.cookie, failed)
	return nil
}

// read answers from memory at once; what must wait for the disk goes to a worker.
func (c *conn) read(req request) error {
	n := int(req.n)
	if n <= inlineRead {
		if len(c.out)+n > outSize {
			if err := c.send(); err != nil {
				return err
			}
		}
		out, err := c.appendRead(c.out, req, true)
		if err == nil {
			c.out = out
			return nil
		}
	}
	return c.work(func() []byte {
		if err := c.readPieces(req); err != nil {
			c.log.Warn("read failed", zap.Uint64("offset", req.off), zap.Uint32("length", req.n), zap.Error(err))
			return c.appendDone(nil, req.cookie, err)
		}
		return nil
	})
}

// readPieces replies to a READ, in pieces if its client takes chunks. Its error is
// what is left to reply.
func (c *conn) readPieces(req request) error {
	for {
		piece := req
		if c.sess.structured && req.flags&proto.CmdFlagDF == 0 && req.n > pieceSize {
			piece.n, piece.more = pieceSize, true
		}
		if err := c.readPiece(piece); err != nil {
			return err
		}
		if !piece.more {
			return nil
		}
		req.off, req.n = req.off+uint64(piece.n), req.n-piece.n
	}
}

func (c *conn) readPiece(req request) error {
	n := int(req.n)
	var buf []byte // of a short one: bounded by the slots
	if n > inlineRead {
		weight := int64(min(n, maxLarge))
		if err := c.large.Acquire(context.Background(), weight); err != nil {
			return err
		}
		defer c.large.Release(weight)
		budget := c.s.budget(c.sess.dev)
		var err error
		if buf, err = takeBuffer(budget, proto.StructuredSize+8+n); err != nil {
			return err
		}
		defer releaseBuffer(budget, buf)
	}
	out, err := c.appendRead(buf[:0], req, false)
	if err == nil {
		c.reply(out)
	}
	return err
}

// flush runs on the spot if the client waits for nothing else, which spares two switches.
func (c *conn) flush(req request) error {
	c.commit()
	if c.r == c.w && len(c.slots) == 0 {
		c.out = c.appendDone(c.out, req.cookie, c.flushDevice())
		return nil
	}
	return c.work(func() []byte { return c.appendDone(nil, req.cookie, c.flushDevice()) })
}

func (c *conn) flushDevice() error {
	err := c.sess.dev.Flush()
	if err != nil {
		c.log.Error("flush failed", zap.Error(err))
	}
	return err
}

// work runs fn beside the reader and sends what it returns. It waits for a free slot.
func (c *conn) work(fn func() []byte) error {
	select {
	case c.slots <- struct{}{}:
	default:
		// All slots wait: the client must get the replies it may be waiting for.
		if err := c.settle(); err != nil {
			return err
		}
		c.slots <- struct{}{}
	}
	c.workers.Go(func() {
		defer func() { <-c.slots }()
		if out := fn(); out != nil {
			c.reply(out)
		}
	})
	return nil
}

// reply sends a whole reply from a worker. If the connection is broken the
// reader finds out too.
func (c *conn) reply(out []byte) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	_, _ = c.c.Write(out)
}

func (c *conn) cache(req request) []byte {
	buf := make([]byte, min(int(req.n), 256<<10))
	var err error
	for off, left := int64(req.off), int64(req.n); left > 0 && err == nil; {
		k := min(left, int64(len(buf)))
		err = c.sess.dev.ReadAt(buf[:k], off, false)
		off, left = off+k, left-k
	}
	return c.appendDone(nil, req.cookie, err)
}
