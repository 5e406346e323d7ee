package link

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// farewell is how long what was said last may take to go out.
const farewell = 3 * time.Second

// stream runs one side of a stream: its loop calls the state machine, and nobody else does. What takes time is done beside it, one
// thing at a time, and in the order that it was asked for.
type stream struct {
	ctx    context.Context // ends with the stream
	cancel context.CancelFunc
	c      *Conn
	q      *queue
	in     chan wire.Message
	events chan func() // called in the loop
	wg     sync.WaitGroup

	follows bool // it is the follower's side

	// Of the loop alone:
	busy bool  // something is done beside it
	over bool  // it is to end
	err  error // why
	// lost is why nothing comes or goes any more: the stream ends when everything was done that had come before.
	lost error
	// do is what an action takes that takes time, nil if it is done already; then is called in the loop behind it.
	do func(replica.Action) (work func() error, then func() []replica.Action)
	// fail ends the state machine.
	fail func(error) []replica.Action
	// waiting are actions behind the one that is being done.
	waiting []replica.Action
}

// open makes the stream ready for its loop.
func (s *stream) open(ctx context.Context, c *Conn, level int) (err error) {
	s.ctx, s.cancel = context.WithCancel(ctx)
	c.net.ahead()
	s.c, s.in, s.events = c, make(chan wire.Message), make(chan func())
	if s.q, err = newQueue(c, level, func(err error) { s.post(func() { s.lose(fmt.Errorf("to peer %s: %w", c.Peer.Name, err)) }) }); err != nil {
		s.cancel()
	}
	return err
}

// lose notes that the connection is lost.
func (s *stream) lose(err error) {
	if s.lost == nil {
		s.lost = err
	}
	s.perform(nil)
}

// read reads messages until the connection ends: the next one while the loop has one. It takes one when it is done with the slices of the one
// before, see wire.Reader.
func (s *stream) read() {
	for {
		m, err := s.c.Receive()
		if err != nil {
			s.post(func() { s.lose(fmt.Errorf("from peer %s: %w", s.c.Peer.Name, err)) })
			return
		}
		select {
		case s.in <- m:
		case <-s.ctx.Done():
			return
		}
	}
}

// post has the loop call a function. It reports whether the loop still goes.
func (s *stream) post(fn func()) bool {
	select {
	case s.events <- fn:
		return true
	case <-s.ctx.Done():
		return false
	}
}

func (s *stream) end(err error) {
	if !s.over {
		s.over, s.err = true, err
	}
}

// perform does what the state machine asks for, in its order.
func (s *stream) perform(actions []replica.Action) {
	s.waiting = append(s.waiting, actions...)
	for !s.busy && !s.over && len(s.waiting) > 0 {
		a := s.waiting[0]
		s.waiting = s.waiting[1:]
		switch a := a.(type) {
		case replica.Send:
			if err := s.q.put(a.Message); err != nil && s.lost == nil {
				s.lost = fmt.Errorf("to peer %s: %w", s.c.Peer.Name, err)
			}
			continue
		case replica.End:
			s.end(a.Err)
			continue
		}
		work, then := s.do(a)
		if work == nil {
			continue
		}
		s.busy = true
		s.wg.Go(func() {
			err := work()
			s.post(func() {
				s.busy = false
				switch {
				case err != nil:
					if s.waiting = s.fail(err); len(s.waiting) == 0 {
						s.end(err) // the state machine had ended
					}
				case then != nil:
					// What it leads to comes before what was asked for behind it.
					s.waiting = append(then(), s.waiting...)
				}
				s.perform(nil)
			})
		})
	}
	if s.lost != nil && !s.busy && len(s.waiting) == 0 {
		s.end(s.lost)
	}
}

// turn waits for what happens next and does it. take gets the messages, unless it is nil, or more than enough waits to be sent; tick is
// called at chatter's pace.
func (s *stream) turn(take func(wire.Message), tick <-chan time.Time, ticked func()) {
	in, room := s.in, s.q.room()
	if take == nil {
		in = nil
	}
	if s.follows && room != nil {
		in = nil // who does not take answers gets none
	}
	select {
	case <-room:
	case m := <-in:
		take(m)
	case fn := <-s.events:
		fn()
	case <-tick:
		ticked()
	case <-s.ctx.Done():
		s.end(context.Cause(s.ctx))
	}
}

// shut ends everything and waits for it. The connection is closed.
func (s *stream) shut() error {
	s.cancel()              // nobody waits for the loop any more
	_ = s.q.close(farewell) // why the stream ends is known
	_ = s.c.Close()
	s.wg.Wait()
	s.c.in.Close()
	if errors.Is(s.err, replica.ErrHandedOver) {
		return nil
	}
	return s.err
}
