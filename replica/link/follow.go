package link

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// Target is a group that follows, or is to. Its methods are called one at a time, but for Sync, which runs beside Receive, and Heard.
type Target interface {
	// Local is what the daemon has of the group. Everything in it is durable, and the group's other streams have ended.
	Local() (replica.Local, error)
	// Receive appends records. Their slices are the caller's again when it returns.
	Receive(record.Run) error
	// Sync makes what was received durable, and returns up to where.
	Sync() (record.LSN, error)
	// Begin and Adopt prepare the backings of disks that come, Backing is one of them. Bridge does those of the disks that are here, as they are:
	// what is written to them is journaled.
	Begin(record.Beginning) error
	Bridge(record.Beginning) error
	Adopt(record.Disk) error
	Backing(record.DiskID) (Backing, error)
	// Elsewhere is what is here beside a disk that comes and may hold the same blocks at the same offsets. It is asked for once a disk,
	// and read while that comes. What is read may change meanwhile.
	Elsewhere(record.DiskID) []io.ReaderAt
	// Finish makes the disk that was adopted one of the group, or, with 0, begins the group, or ends the bridge, durably.
	Finish(record.DiskID) error
	// Note and Depose are durable when they return, see replica.Note.
	Note(record.Reigns) error
	Depose(record.Reigns) error
	// Rewind takes the group back to an LSN.
	Rewind(to record.LSN) error
	// Take begins a reign of this daemon, durably.
	Take() (record.Reigns, error)
	// Heard says how far the writer has come, and when.
	Heard(head record.LSN, at time.Time)
	// Handover is closed when the writer is to be asked for the group.
	Handover() <-chan struct{}
}

// Backing is what a disk that comes, or is brought over a gap, is written to: each block once at most, and not read after that.
type Backing interface {
	// ReadAt and WriteAt are within the disk's size.
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	// Zero makes bytes zeroes.
	Zero(off, n int64) error
	// Data calls fn with runs of bytes from off on, which fill n, and whether there may be something else than zeroes in each.
	Data(off, n int64, fn func(n int64, data bool)) error
}

// follower runs the follower's side of a stream.
type follower struct {
	stream
	t Target
	r *replica.Receiver

	syncing, unsynced bool
	asks              bool                    // for the group, when it can
	sizes             map[record.DiskID]int64 // of disks that come
	comparison
}

// Follow takes a group that was offered on a connection until ctx ends, or the stream does. It closes the connection.
func Follow(ctx context.Context, c *Conn, offer *wire.Offer, t Target) error {
	local, err := t.Local()
	if err != nil {
		_ = c.Refuse(wire.ReasonFailed, err)
		_ = c.Close()
		return err
	}
	x := &follower{t: t, r: replica.NewReceiver(), sizes: map[record.DiskID]int64{}}
	own := *offer
	if err := x.open(ctx, c, 0); err != nil {
		_ = c.Close()
		return err
	}
	x.do, x.fail, x.follows = x.work, x.r.Fail, true
	x.perform(x.r.Offer(&own, local))
	t.Heard(x.r.Head, x.r.At)
	x.wg.Go(x.read)
	tick := time.NewTicker(chatter)
	defer tick.Stop()
	x.wg.Go(func() {
		select {
		case <-t.Handover():
			x.post(func() { x.asks = true })
		case <-x.ctx.Done():
		}
	})
	for !x.over {
		take := func(m wire.Message) {
			x.perform(x.r.Receive(m))
			t.Heard(x.r.Head, x.r.At)
		}
		if x.busy {
			take = nil // what is done may be with the slices of the last one
		}
		if x.asks {
			x.perform(x.r.Handover())
		}
		x.turn(take, tick.C, func() { x.perform(x.r.Alive()) })
	}
	return x.shut()
}

// work is what an action takes.
func (x *follower) work(a replica.Action) (func() error, func() []replica.Action) {
	switch a := a.(type) {
	case replica.Append:
		return func() error { return x.t.Receive(a.Run) }, x.sync
	case replica.Begin:
		return func() error { return x.begin(a.Beginning, x.t.Begin) }, nil
	case replica.Bridge:
		return func() error { return x.begin(a.Beginning, x.t.Bridge) }, nil
	case replica.Adopt:
		return func() error {
			x.sizes[a.Disk.ID] = a.Disk.Size
			return x.t.Adopt(a.Disk)
		}, nil
	case replica.Compare:
		var want *wire.Want
		return func() (err error) {
			want, err = x.compare(a.Sums)
			return err
		}, func() []replica.Action { return x.r.Want(want) }
	case replica.Put:
		return func() error { return x.put(a.Data) }, nil
	case replica.Finish:
		return func() error { return x.t.Finish(a.Disk) }, x.r.Finished
	case replica.Note:
		return func() error { return x.t.Note(a.Reigns) }, nil
	case replica.Depose:
		return func() error { return x.t.Depose(a.Reigns) }, nil
	case replica.Rewind:
		return func() error { return x.t.Rewind(a.To) }, nil
	case replica.Take:
		var reigns record.Reigns
		return func() (err error) {
			reigns, err = x.t.Take()
			return err
		}, func() []replica.Action { return x.r.Taken(reigns) }
	}
	x.end(fmt.Errorf("a receiver asks for %T", a))
	return nil, nil
}

// sync has what was received made durable beside what comes next.
func (x *follower) sync() []replica.Action {
	if x.unsynced = true; x.syncing {
		return nil
	}
	x.syncing, x.unsynced = true, false
	x.wg.Go(func() {
		durable, err := x.t.Sync()
		x.post(func() {
			x.syncing = false
			if err != nil {
				x.perform(x.r.Fail(err))
				return
			}
			x.perform(x.r.Durable(durable))
			if x.unsynced {
				x.sync()
			}
		})
	})
	return nil
}

func (x *follower) begin(b record.Beginning, prepare func(record.Beginning) error) error {
	for _, d := range b.Disks {
		x.sizes[d.ID] = d.Size
	}
	return prepare(b)
}

// put writes blocks that were wanted.
func (x *follower) put(m *wire.Data) error {
	backing, err := x.t.Backing(m.Disk)
	if err != nil {
		return err
	}
	_, err = backing.WriteAt(m.Bytes, m.First*record.BlockSize)
	return err
}
