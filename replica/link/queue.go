package link

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// queue is what waits to be sent on a connection. Messages are encoded when they are put, so that nobody has to keep what they are
// made of, and who puts one never waits for the peer.
type queue struct {
	c    *Conn
	lost func(error)   // is told why nothing can be sent any more
	done chan struct{} // closed when everything was sent, or can not be

	mu      sync.Mutex // guards what follows
	encode  *wire.Writer
	frames  [][]byte
	free    [][]byte
	bytes   int
	closed  bool
	err     error
	wake    chan struct{} // of one slot: there is something to send, or to end
	drained chan struct{} // closed and made anew when there is room again
}

const (
	// queueRoom is how much may wait before who has more to say does, in bytes.
	queueRoom = 4 << 20
	// maxFree and freeBytes bound the frames that are kept for the next ones: a long record's is not.
	maxFree   = 8
	freeBytes = 2 << 20
)

// newQueue begins to send what is put. lost is called if that fails.
func newQueue(c *Conn, level int, lost func(error)) (*queue, error) {
	q := &queue{c: c, lost: lost, done: make(chan struct{}), wake: make(chan struct{}, 1), drained: make(chan struct{})}
	var err error
	if q.encode, err = wire.NewWriter(nil, level); err != nil {
		return nil, err
	}
	go q.send()
	return q, nil
}

var errEnded = errors.New("the stream has ended")

// put sends a message in its turn.
func (q *queue) put(m wire.Message) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.err != nil {
		return errors.Join(errEnded, q.err)
	}
	var frame []byte
	if n := len(q.free); n > 0 {
		frame, q.free = q.free[n-1][:0], q.free[:n-1]
	}
	frame, err := q.encode.Append(frame, m)
	if err != nil {
		return err
	}
	q.frames, q.bytes = append(q.frames, frame), q.bytes+len(frame)
	poke(q.wake)
	return nil
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// room is closed when there is room for more; nil: there is.
func (q *queue) room() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.bytes < queueRoom || q.err != nil {
		return nil
	}
	return q.drained
}

// wait returns when there is room for more.
func (q *queue) wait(ctx context.Context) error {
	for room := q.room(); room != nil; room = q.room() {
		select {
		case <-room:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return ctx.Err()
}

// level has messages compressed at another level from now on.
func (q *queue) level(change func(now int) int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	_ = q.encode.SetLevel(change(q.encode.Level())) // levels within the bounds are not refused
}

func (q *queue) send() {
	defer close(q.done)
	for {
		frame, last := q.next()
		if frame == nil {
			if last {
				return
			}
			<-q.wake
			continue
		}
		err := q.c.writeFrame(frame)
		q.sent(frame, err)
		if err != nil {
			q.lost(err)
			return
		}
	}
}

func (q *queue) next() (frame []byte, last bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.frames) == 0 {
		return nil, q.closed
	}
	frame, q.frames = q.frames[0], q.frames[1:]
	return frame, false
}

func (q *queue) sent(frame []byte, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	was := q.bytes
	if q.bytes -= len(frame); len(q.free) < maxFree && cap(frame) <= freeBytes {
		q.free = append(q.free, frame)
	}
	if err != nil {
		q.err = err
	}
	if err != nil || was >= queueRoom && q.bytes < queueRoom {
		close(q.drained)
		q.drained = make(chan struct{})
	}
}

// close sends what was put, takes no more, and returns when all of it was sent, or within a time was not.
func (q *queue) close(within time.Duration) error {
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
	poke(q.wake)
	select {
	case <-q.done:
	case <-time.After(within):
		_ = q.c.Close() // send returns
		<-q.done
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}
