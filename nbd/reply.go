package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"syscall"

	"github.com/pojntfx/go-nbd/pkg/protocol"
	"golang.org/x/sync/semaphore"

	"github.com/tidemark-cdp/tidemark/nbd/internal/proto"
)

func appendSimple(out []byte, cookie uint64, errno uint32) []byte {
	out = binary.BigEndian.AppendUint32(out, protocol.TRANSMISSION_MAGIC_REPLY)
	out = binary.BigEndian.AppendUint32(out, errno)
	return binary.BigEndian.AppendUint64(out, cookie)
}

func appendChunk(out []byte, flags, typ uint16, cookie uint64, n uint32) []byte {
	out = binary.BigEndian.AppendUint32(out, proto.MagicStructuredReply)
	out = binary.BigEndian.AppendUint16(out, flags)
	out = binary.BigEndian.AppendUint16(out, typ)
	out = binary.BigEndian.AppendUint64(out, cookie)
	return binary.BigEndian.AppendUint32(out, n)
}

// appendError appends the reply that ends a request with an error.
func (c *conn) appendError(out []byte, cookie uint64, errno uint32, text string) []byte {
	if !c.sess.structured {
		return appendSimple(out, cookie, errno)
	}
	text = text[:min(len(text), maxString)]
	out = appendChunk(out, proto.ReplyFlagDone, proto.ReplyError, cookie, uint32(6+len(text)))
	out = binary.BigEndian.AppendUint32(out, errno)
	out = binary.BigEndian.AppendUint16(out, uint16(len(text)))
	return append(out, text...)
}

// appendDone appends the reply to a command without data.
func (c *conn) appendDone(out []byte, cookie uint64, err error) []byte {
	if err != nil {
		return c.appendError(out, cookie, errnoOf(err), err.Error())
	}
	return appendSimple(out, cookie, 0)
}

// zeroGrain is how finely zeroes in a long READ are sent as holes, in bytes.
const zeroGrain = 64 << 10

// appendRead appends the whole reply to a READ. On an error nothing is
// appended. Zeroes go as holes where the client takes structured replies.
func (c *conn) appendRead(out []byte, req request, nowait bool) ([]byte, error) {
	n := int(req.n)
	head := proto.SimpleSize
	if c.sess.structured {
		head = proto.StructuredSize + 8
	}
	at := len(out)
	out = slices.Grow(out, head+n)
	data := out[at+head : at+head+n]
	if err := c.sess.dev.ReadAt(data, int64(req.off), nowait); err != nil {
		return nil, err
	}
	if !c.sess.structured {
		return appendSimple(out, req.cookie, 0)[:at+head+n], nil
	}
	if n == 0 {
		return appendChunk(out, req.done(), proto.ReplyNone, req.cookie, 0), nil
	}
	if req.flags&proto.CmdFlagDF == 0 && hasZeroes(data) {
		return c.appendSparse(out[:at], req, data), nil
	}
	out = appendChunk(out, req.done(), proto.ReplyOffsetData, req.cookie, uint32(8+n))
	return binary.BigEndian.AppendUint64(out, req.off)[:at+head+n], nil
}

// hasZeroes reports whether any grain of data, or a short read as a whole, is zeroes.
func hasZeroes(data []byte) bool {
	for len(data) > 0 {
		n := min(len(data), zeroGrain)
		if isZero(data[:n]) {
			return true
		}
		data = data[n:]
	}
	return false
}

// appendSparse appends data as chunks of data and holes in turn. data may stand in out's own
// array, from the first chunk's header on: a chunk of data moves down by what the holes before
// it saved, and a hole's header, which is longer, stands where its zeroes were.
func (c *conn) appendSparse(out []byte, req request, data []byte) []byte {
	for i := 0; i < len(data); {
		zero := isZero(data[i:min(len(data), i+zeroGrain)])
		j := min(len(data), i+zeroGrain)
		for j < len(data) && isZero(data[j:min(len(data), j+zeroGrain)]) == zero {
			j = min(len(data), j+zeroGrain)
		}
		var flags uint16
		if j == len(data) {
			flags = req.done()
		}
		if zero {
			out = appendChunk(out, flags, proto.ReplyOffsetHole, req.cookie, 12)
			out = binary.BigEndian.AppendUint64(out, req.off+uint64(i))
			out = binary.BigEndian.AppendUint32(out, uint32(j-i))
		} else {
			out = appendChunk(out, flags, proto.ReplyOffsetData, req.cookie, uint32(8+j-i))
			out = binary.BigEndian.AppendUint64(out, req.off+uint64(i))
			out = append(out, data[i:j]...)
		}
		i = j
	}
	return out
}

var zeroes [4096]byte

// isZero stops at the first 4 KiB that are not zeroes.
func isZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeroes))
		if !bytes.Equal(b[:n], zeroes[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

const (
	// statusRange is how much of a BLOCK_STATUS request is looked at, in
	// bytes: the protocol lets the answer be shorter than the question.
	statusRange = 256 << 20
	// maxExtents bounds the descriptors of one answer.
	maxExtents = 16384
)

// blockStatus replies with a chunk for each metadata context that was chosen.
func (c *conn) blockStatus(req request) []byte {
	var out []byte
	for i, m := range c.sess.maps {
		exts, err := statusOf(m, req)
		if err != nil {
			return c.appendDone(nil, req.cookie, err)
		}
		var flags uint16
		if i == len(c.sess.maps)-1 {
			flags = proto.ReplyFlagDone
		}
		out = appendChunk(out, flags, proto.ReplyBlockStatus, req.cookie, uint32(4+8*len(exts)))
		out = binary.BigEndian.AppendUint32(out, m.id)
		for _, e := range exts {
			out = binary.BigEndian.AppendUint32(out, uint32(e.n))
			out = binary.BigEndian.AppendUint32(out, e.flags)
		}
	}
	return out
}

// statusExtent is a descriptor of a BLOCK_STATUS reply.
type statusExtent struct {
	n     int64
	flags uint32
}

// statusOf is what a metadata context tells of a range, from its start on.
func statusOf(m Map, req request) ([]statusExtent, error) {
	var exts []statusExtent
	full := false
	note := func(n int64, flags uint32) {
		k := len(exts)
		switch {
		case full:
		case k > 0 && exts[k-1].flags == flags:
			exts[k-1].n += n
		case k == maxExtents:
			full = true
		default:
			exts = append(exts, statusExtent{n, flags})
		}
	}
	// Step by step: who asks for one extent is not made to wait for the rest.
	off, left := int64(req.off), min(int64(req.n), statusRange)
	for step := int64(1 << 20); left > 0 && !full && (len(exts) < 2 || req.flags&proto.CmdFlagReqOne == 0); step = min(2*step, 64<<20) {
		n := min(step, left)
		if err := m.Extents(off, n, note); err != nil {
			return nil, err
		}
		off, left = off+n, left-n
	}
	if req.flags&proto.CmdFlagReqOne != 0 {
		exts = exts[:1]
	}
	return exts, nil
}

// Buffers of long READs come in three sizes, out of one of the server's budgets.
var (
	bufferSizes = [...]int{1<<20 + 4096, 4<<20 + 4096, MaxRequest + 4096}
	bufferPools [len(bufferSizes)]sync.Pool
)

// budget is what the buffers of an export's long READs come out of.
func (s *Server) budget(dev Device) *semaphore.Weighted {
	if dev.ReadOnly() {
		return s.past
	}
	return s.live
}

// takeBuffer waits until n bytes fit the budget. n is at most MaxRequest and a header.
func takeBuffer(budget *semaphore.Weighted, n int) ([]byte, error) {
	for i, size := range bufferSizes {
		if n > size {
			continue
		}
		if err := budget.Acquire(context.Background(), int64(size)); err != nil {
			return nil, err
		}
		if b, ok := bufferPools[i].Get().(*[]byte); ok {
			return (*b)[:n], nil
		}
		return make([]byte, n, size), nil
	}
	return nil, fmt.Errorf("a buffer of %d bytes: %w", n, syscall.EINVAL)
}

func releaseBuffer(budget *semaphore.Weighted, b []byte) {
	b = b[:0]
	for i, size := range bufferSizes {
		if cap(b) == size {
			bufferPools[i].Put(&b)
			budget.Release(int64(size))
		}
	}
}
