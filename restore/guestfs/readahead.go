package guestfs

import (
	"container/list"
	"sync"
)

const (
	// chunk is what a short read has read around it, in bytes: what stands together on a disk is read together, and
	// asking for it takes longer than getting it.
	chunk = 128 << 10
	// chunks bounds what is kept of a volume.
	chunks = 128
)

// readAhead reads a disk that does not change in chunks, where reads are short, and keeps the last ones.
type readAhead struct {
	Disk

	mu     sync.Mutex // guards what follows
	chunks map[int64]*list.Element
	order  *list.List // of *readChunk, the last used first
	spare  []byte     // the memory of a chunk that was given up
}

type readChunk struct {
	n    int64         // its place, in chunks
	done chan struct{} // closed when b and err are there; b does not change then
	b    []byte
	err  error
	refs int  // readers that use b; the readAhead's mu guards it
	old  bool // it was given up: the last reader keeps its memory for another
}

func newReadAhead(d Disk) *readAhead {
	return &readAhead{Disk: d, chunks: map[int64]*list.Element{}, order: list.New()}
}

// ReadAt fills p.
func (r *readAhead) ReadAt(p []byte, off int64) error {
	if len(p) > chunk/2 {
		return r.Disk.ReadAt(p, off)
	}
	for len(p) > 0 {
		c := r.get(off / chunk)
		if c.err != nil {
			r.put(c)
			// Somewhere around it may be damage that is not in it.
			return r.Disk.ReadAt(p, off)
		}
		n := copy(p, c.b[off-c.n*chunk:])
		r.put(c)
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// get is a chunk, which the caller puts back.
func (r *readAhead) get(n int64) *readChunk {
	r.mu.Lock()
	if e := r.chunks[n]; e != nil {
		c := e.Value.(*readChunk)
		c.refs++
		r.order.MoveToFront(e)
		r.mu.Unlock()
		<-c.done
		return c
	}
	c := &readChunk{n: n, done: make(chan struct{}), refs: 1, b: r.spare}
	r.spare = nil
	r.chunks[n] = r.order.PushFront(c)
	if r.order.Len() > chunks {
		r.forget(r.order.Back())
	}
	r.mu.Unlock()
	if c.b == nil {
		c.b = make([]byte, chunk)
	}
	c.b = c.b[:min(chunk, r.Size()-n*chunk)]
	c.err = r.Disk.ReadAt(c.b, n*chunk)
	close(c.done)
	if c.err != nil {
		r.mu.Lock()
		if e := r.chunks[n]; e != nil && e.Value == c {
			r.forget(e)
		}
		r.mu.Unlock()
	}
	return c
}

// forget gives up a chunk. mu must be held.
func (r *readAhead) forget(e *list.Element) {
	c := r.order.Remove(e).(*readChunk)
	delete(r.chunks, c.n)
	c.old = true
	if c.refs == 0 {
		r.spare = c.b[:chunk]
	}
}

func (r *readAhead) put(c *readChunk) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.refs--; c.refs == 0 && c.old {
		r.spare = c.b[:chunk]
	}
}
