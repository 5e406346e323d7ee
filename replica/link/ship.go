package link

import (
	"context"
	"fmt"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// History is what a group holds, for those who ask.
type History interface {
	Feed(from record.LSN) (Feed, error)
	// View is of a disk as of an LSN. Its reads may fail once the LSN has expired.
	View(disk record.DiskID, at record.LSN) (View, error)
	// Durable is the newest durable LSN.
	Durable() record.LSN
	// PointWithin is the newest LSN, from one to another, of which there is a View.
	PointWithin(from, to record.LSN) (record.LSN, error)
	// Reigns are those of the group's writers.
	Reigns() record.Reigns
}

// Source is a group that is shipped. Its methods are called one at a time, but for those of the Views and of a Feed.
type Source interface {
	History
	// Local is what the daemon has of the group. Everything in it is durable.
	Local() (replica.Local, error)
	Beginning(at record.LSN) (record.Beginning, error)
	Digest(lsn record.LSN) ([16]byte, error)
	// Depose has the group follow, durably: there is a writer of a later epoch.
	Depose(record.Reigns) error
	// Yield has the group follow, durably, with nobody at its disks, and returns its head.
	Yield(ctx context.Context) (record.LSN, error)
	// Anew says that the follower has nothing that counts.
	Anew()
	// Acked says what the follower has durably.
	Acked(record.LSN)
	// Seeding says how far the follower is on its way to the group's content.
	Seeding(Progress)
}

// Feed reads a group's records in their order, see journal.Feed.
type Feed interface {
	Next(ctx context.Context, most int) (record.Run, error)
	Close()
}

// View is a disk as of an LSN.
type View interface {
	Size() int64
	ReadAt(p []byte, off int64) error
	// Extents calls fn with runs of bytes from off on, which fill n, and whether each is known to read as zeroes.
	Extents(off, n int64, fn func(n int64, zero bool)) error
	Close()
}

// Progress is how far a seeding is, in bytes.
type Progress struct {
	Disk          string
	Compared, All int64 // of all disks
	Sent          int64 // that differed
	Done          bool
}

const (
	// runBytes is how many bytes of records are sent at once, about.
	runBytes = 1 << 20
	// DefaultLevel of compression is the library's second: a third more time than the first, a tenth less bytes.
	DefaultLevel = 2
	// swing is for how many runs in a row, on balance, compression or the link must be the bottleneck before the level is changed.
	swing = 8
)

// shipper runs the writer's side of a stream.
type shipper struct {
	stream
	src   Source
	s     *replica.Sender
	level int // that is configured

	asks    chan record.LSN // of one slot: for the feeder
	feed    Feed
	from    record.LSN
	streams bool // a Feed was asked for: beats are due
	swung   int  // see adapt; the seeder's while there is one

	answers chan *wire.Want // to the seeder, which is one at a time
}

// Ship offers a group on a connection and ships it until ctx ends, or the stream does. It closes the connection. Level is of
// compression, 0 to wire.MaxLevel: as long as the link waits for it, a lower one is used.
func Ship(ctx context.Context, c *Conn, group string, src Source, level int) error {
	local, err := src.Local()
	if err != nil {
		_ = c.Refuse(wire.ReasonFailed, err)
		_ = c.Close()
		return err
	}
	x := &shipper{src: src, s: replica.NewSender(group, local), level: level, asks: make(chan record.LSN, 1)}
	if err := x.open(ctx, c, level); err != nil {
		_ = c.Close()
		return err
	}
	x.do, x.fail = x.work, x.s.Fail
	x.wg.Go(x.read)
	x.wg.Go(x.feeder)
	x.perform(x.s.Start())
	tick := time.NewTicker(chatter)
	defer tick.Stop()
	for !x.over {
		x.turn(func(m wire.Message) { x.perform(x.s.Receive(m)) }, tick.C, x.beat)
	}
	return x.shut()
}

func (x *shipper) beat() { x.perform(x.s.Beat(x.src.Durable(), time.Now())) }

// work is what an action takes.
func (x *shipper) work(a replica.Action) (func() error, func() []replica.Action) {
	switch a := a.(type) {
	case replica.Feed:
		x.asks <- a.From // there is one at a time
		if !x.streams {
			x.streams = true
			x.beat()
		}
	case replica.Anew:
		x.src.Anew()
	case replica.Acked:
		x.src.Acked(a.Durable)
	case replica.Answer:
		return nil, x.answer(a.Want)
	case replica.Seed:
		if !a.Begin {
			x.seed(a)
			return nil, nil
		}
		var b record.Beginning
		return func() (err error) {
			b, err = x.src.Beginning(a.At)
			return err
		}, func() []replica.Action { return x.s.Begin(b) }
	case replica.Verify:
		var digest [16]byte
		return func() (err error) {
			digest, err = x.src.Digest(a.LSN)
			return err
		}, func() []replica.Action { return x.s.Verified(digest) }
	case replica.Yield:
		var head record.LSN
		return func() (err error) {
			head, err = x.src.Yield(x.ctx)
			return err
		}, func() []replica.Action { return x.s.Yielded(head) }
	case replica.Depose:
		return func() error { return x.src.Depose(a.Reigns) }, nil
	default:
		x.end(fmt.Errorf("a sender asks for %T", a))
	}
	return nil, nil
}

// feeder reads the records that are asked for, each when there is room for them.
func (x *shipper) feeder() {
	defer func() {
		if x.feed != nil {
			x.feed.Close()
		}
	}()
	for {
		var from record.LSN
		select {
		case from = <-x.asks:
		case <-x.ctx.Done():
			return
		}
		waited := x.q.room() != nil
		if x.q.wait(x.ctx) != nil {
			return
		}
		run, err := x.readRun(from)
		if !x.post(func() {
			if err != nil {
				x.perform(x.s.Fail(fmt.Errorf("read what is to be shipped (a replica that needs what is damaged here can begin anew: tidemark replica accept --anew there): %w", err)))
				return
			}
			x.adapt(len(run.Bytes) >= runBytes/2, waited)
			x.perform(x.s.Run(run))
		}) {
			return
		}
	}
}

// readRun reads the records from an LSN on, with the feed that is there if they are its next ones.
func (x *shipper) readRun(from record.LSN) (run record.Run, err error) {
	if x.feed == nil || from != x.from {
		if x.feed != nil {
			x.feed.Close()
		}
		if x.feed, err = x.src.Feed(from); err != nil {
			x.feed = nil
			return run, err
		}
	}
	run, err = x.feed.Next(x.ctx, runBytes)
	x.from = run.Last + 1
	return run, err
}

// adapt changes the level of compression: with much to send, it rises while the link is the bottleneck, and falls while compression is.
func (x *shipper) adapt(behind, waited bool) {
	switch {
	case behind && waited, !behind:
		x.swung++
	default:
		x.swung--
	}
	if x.swung > -swing && x.swung < swing {
		return
	}
	step := 1
	if x.swung < 0 {
		step = -1
	}
	x.swung = 0
	x.q.level(func(now int) int { return min(max(now+step, 0), x.level) })
}
