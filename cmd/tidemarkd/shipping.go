package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/link"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// shipping is a group on its way to a replica.
type shipping struct {
	one    *replicated
	g      *journal.Group
	peer   string
	log    *zap.Logger
	cancel context.CancelFunc
	done   chan struct{}
	hold   *journal.Hold

	mu        sync.Mutex // guards what follows
	connected bool
	streams   bool // beyond seeding
	acked     record.LSN
	beginning bool       // it is given what it begins with, or goes on with behind a gap
	skipped   record.LSN // where that was, last, since the daemon started: markers up to there may not be at the replica
	lag       *replica.Lag
	progress  link.Progress
	seeding   time.Time // since when it is being seeded
	err       error     // why the last stream ended
	conn      *link.Conn
	bell      chan struct{} // closed and made anew when acked rises
	since     time.Time     // it has been shipped, by this daemon
}

// ship begins to ship a group to a peer until ctx ends, or stop is called. one.mu is held.
func (one *replicated) ship(ctx context.Context, g *journal.Group, peer string) *shipping {
	ctx, cancel := context.WithCancel(ctx)
	acked := min(one.note.Acked[peer], g.Head())
	s := &shipping{one: one, g: g, peer: peer, log: one.log.With(zap.String("replica", peer)), cancel: cancel, done: make(chan struct{}),
		hold: g.Hold(max(acked, g.Horizon()) + 1), acked: acked, bell: make(chan struct{}), since: time.Now()}
	s.lag = replica.NewLag(acked, g.Appended(), s.since)
	go func() {
		defer close(s.done)
		defer s.hold.Release()
		s.run(ctx)
	}()
	return s
}

// ended reports whether it has given up.
func (s *shipping) ended() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

func (s *shipping) stop() {
	s.cancel()
	<-s.done
}

func (s *shipping) run(ctx context.Context) {
	b := s.one.r.e.Backoff()
	for ctx.Err() == nil && !s.g.Follows() {
		err := s.once(ctx)
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		streamed := s.streams
		s.connected, s.streams, s.conn, s.err = false, false, nil, err
		s.mu.Unlock()
		if s.g.Follows() {
			s.log.Warn("another daemon writes the group", zap.Error(err))
			s.one.r.reconcileSoon()
			return
		}
		s.log.Warn("the group does not get to its replica", zap.Error(err))
		if streamed {
			b.Reset()
		}
		b.Wait(ctx)
	}
}

func (s *shipping) once(ctx context.Context) error {
	c, err := s.one.r.e.Open(ctx, s.peer, wire.RoleOffers)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.connected, s.err, s.conn = true, nil, c
	s.mu.Unlock()
	return link.Ship(ctx, c, s.one.name, source{history{s.g}, s}, s.one.r.conf.Level())
}

// look measures how far the replica is behind. It returns what it has.
func (s *shipping) look() record.LSN {
	head, bytes := s.g.Head(), s.g.Appended()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lag.Look(head, bytes, time.Now())
	return s.acked
}

// await returns when the replica has the record of an LSN, or ctx ends; or when it is sent no more: what the replica began with, or was brought
// over a gap to, is behind it.
func (s *shipping) await(ctx context.Context, lsn record.LSN) bool {
	for {
		s.mu.Lock()
		acked, skipped, bell := s.acked, s.skipped, s.bell
		s.mu.Unlock()
		if acked >= lsn {
			return lsn > skipped
		}
		select {
		case <-bell:
		case <-ctx.Done():
			return false
		case <-s.done:
			return false
		}
	}
}

func (s *shipping) status() api.Replica {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := api.Replica{Peer: s.peer, State: notConnected, Acked: uint64(s.acked)}
	age, bytes := s.lag.Behind()
	a.Lag, a.LagBytes = age.Seconds(), bytes
	switch {
	case s.connected && s.streams:
		a.State = "streaming"
	case s.connected && s.progress.All > 0 && !s.progress.Done:
		a.State = "seeding"
		a.Seeding = seeding(s.progress, s.seeding)
	case s.connected:
		a.State = "connected"
	}
	if s.conn != nil {
		_, a.SentBytes = s.conn.Bytes()
		a.Build = s.conn.Build
	}
	if s.err != nil {
		a.Error = s.err.Error()
	}
	return a
}

// seeding is how far a seeding is, and how long it will take at the present pace.
func seeding(p link.Progress, began time.Time) *api.Seeding {
	a := &api.Seeding{Disk: p.Disk, Compared: p.Compared, All: p.All, Sent: p.Sent}
	if took := time.Since(began); p.Compared > 0 && took > 0 {
		a.Left = took.Seconds() * float64(p.All-p.Compared) / float64(p.Compared)
	}
	return a
}

// history is what a group holds, as links read it.
type history struct{ g *journal.Group }

// source is the group as a link ships it.
type source struct {
	history
	s *shipping
}

// errNotWriter is why a group is not shipped that is not this daemon's.
var errNotWriter = errors.New("this daemon does not write the group any more")

func (o source) Local() (replica.Local, error) {
	_, l, err := o.s.one.local()
	if err == nil && !l.Leads {
		err = errNotWriter
	}
	return l, err
}

type feed struct{ *journal.Feed }

func (h history) Feed(from record.LSN) (link.Feed, error) {
	f, err := h.g.Feed(from)
	if err != nil {
		return nil, err
	}
	return feed{f}, nil
}

type view struct{ *journal.View }

func (v view) ReadAt(p []byte, off int64) error { return v.View.ReadAt(p, off, false) }

func (v view) Extents(off, n int64, fn func(int64, bool)) error {
	return v.View.Extents(record.Extent{Off: off, Len: n}, fn)
}

func (h history) View(id record.DiskID, at record.LSN) (link.View, error) {
	for _, d := range h.g.Disks() {
		if d.ID == id {
			v, err := h.g.PassingView(d, at)
			if err != nil {
				return nil, err
			}
			return view{v}, nil
		}
	}
	return nil, fmt.Errorf("disk %d: %w", id, journal.ErrDetached)
}

func (h history) Durable() record.LSN   { return h.g.Durable() }
func (h history) Reigns() record.Reigns { return h.g.Reigns() }

func (h history) PointWithin(from, to record.LSN) (record.LSN, error) {
	return h.g.PointWithin(from, to)
}

func (o source) Beginning(at record.LSN) (record.Beginning, error) { return o.g.Beginning(at) }
func (o source) Digest(lsn record.LSN) ([16]byte, error)           { return o.g.Digest(lsn) }

func (o source) Depose(reigns record.Reigns) error { return o.s.one.depose(o.g, reigns, o.s.peer) }

func (o source) Yield(context.Context) (record.LSN, error) { return o.s.one.yield(o.g, o.s.peer) }

func (o source) Anew() {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	horizon := o.g.Horizon()
	o.s.acked, o.s.streams, o.s.beginning, o.s.lag = 0, false, true, replica.NewLag(0, 0, o.s.since)
	o.s.hold.Move(horizon + 1)
}

func (o source) Acked(lsn record.LSN) {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	if o.s.beginning {
		o.s.skipped, o.s.beginning = lsn, false
	}
	o.s.acked, o.s.streams = lsn, true
	o.s.lag.Acked(lsn)
	close(o.s.bell)
	o.s.bell = make(chan struct{})
	o.s.hold.Move(lsn + 1)
}

func (o source) Seeding(p link.Progress) {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	if o.s.progress.All == 0 || o.s.progress.Done || p.Compared < o.s.progress.Compared {
		o.s.seeding = time.Now()
	}
	o.s.progress = p
}
