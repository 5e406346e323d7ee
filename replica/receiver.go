package replica

import (
	"fmt"
	"slices"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

type (
	// Append asks for a run to be appended to the group. When it is durable, Durable is to be called.
	Append struct{ record.Run }
	// Begin asks for a group to be begun, in the stead of what there is of it: for backings of its disks, which Compare and Put then
	// fill, and for the group itself at Finish.
	Begin struct{ record.Beginning }
	// Compare asks for the sums of blocks to be compared with what the disk's backing has, for those of zeroes to be
	// made so, and for Want to be called with the others that differ.
	Compare struct{ *wire.Sums }
	// Put asks for blocks of a disk's backing to be written.
	Put struct{ *wire.Data }
	// Adopt asks for a backing of a disk that comes to the group. It is the group's at its Finish.
	Adopt struct{ record.Disk }
	// Finish says that a disk's backing was sent, or, of no disk, all of them: they are to be made durable, and the disk
	// or the group begun with them, durably. Finished is to be called then.
	Finish struct{ Disk record.DiskID }
	// Rewind says to what LSN the group would have to go back to follow this writer. An End follows.
	Rewind struct{ To record.LSN }
)

func (Append) action()  {}
func (Begin) action()   {}
func (Compare) action() {}
func (Put) action()     {}
func (Adopt) action()   {}
func (Finish) action()  {}
func (Rewind) action()  {}

type receiverState int

const (
	receiverWaits    receiverState = iota + 1 // for the Offer
	receiverAnswers                           // with its Position: records, or a Begin, are due
	receiverSeeds                             // disks of a group
	receiverAdopts                            // a disk
	receiverFinishes                          // the caller's Finished is due
	receiverEnded
)

// Receiver is the follower's side of a stream.
type Receiver struct {
	local Local
	state receiverState
	offer wire.Offer

	next    record.LSN // of the next record
	durable record.LSN // that was acknowledged last
	table   *record.Run
	begins  bool // what is seeded is the group
	disks   map[record.DiskID]*content

	// Head and At are what the writer said last of how far it has come, and when.
	Head record.LSN
	At   time.Time
}

// content is what is due of a disk's: sums of all its blocks in their order, and those of them that were wanted.
type content struct {
	size    int64
	covered int64   // blocks that sums have come of
	wanted  []int64 // blocks whose data has not come
}

func (c *content) blocks() int64 { return (c.size + record.BlockSize - 1) / record.BlockSize }

// sums takes up that sums of n blocks from first on have come.
func (c *content) sums(first, n int64) error {
	if first != c.covered || n == 0 || n > c.blocks()-first {
		return fmt.Errorf("sums of %d blocks from block %d on, and of %d blocks the next is block %d", n, first, c.blocks(), c.covered)
	}
	c.covered += n
	return nil
}

// data takes up that blocks from first on have come.
func (c *content) data(first int64, b []byte) error {
	for len(b) > 0 {
		n := min(record.BlockSize, c.size-first*record.BlockSize)
		if len(c.wanted) == 0 || c.wanted[0] != first || int64(len(b)) < n {
			return fmt.Errorf("%d bytes of block %d, which is not the next that is wanted", len(b), first)
		}
		b, first, c.wanted = b[n:], first+1, c.wanted[1:]
	}
	return nil
}

// NewReceiver makes the follower's side of a stream.
func NewReceiver() *Receiver { return &Receiver{state: receiverWaits} }

// Offered is the offer that the stream began with, once there is one.
func (r *Receiver) Offered() wire.Offer { return r.offer }

// Offer takes the writer's offer of a group of which the daemon has local.
func (r *Receiver) Offer(m *wire.Offer, local Local) []Action {
	if r.state != receiverWaits {
		return r.end(outOfTurn("a second offer"))
	}
	r.offer, r.local, r.state, r.Head = *m, local, receiverAnswers, m.Head
	if !local.Known {
		return []Action{Send{&wire.Position{}}}
	}
	theirs, ours := m.Reigns[len(m.Reigns)-1], local.present()
	switch {
	case theirs.Epoch < ours.Epoch || local.Leads && theirs.Epoch == ours.Epoch:
		err := fmt.Errorf("%w: epoch %d is known here, and the group was offered in epoch %d", ErrDeposed, ours.Epoch, theirs.Epoch)
		return r.end(refuse(wire.ReasonDeposed, local.Reigns, err))
	case local.Leads:
		err := fmt.Errorf("%w: epoch %d; this daemon writes in epoch %d", ErrDeposed, theirs.Epoch, ours.Epoch)
		return r.end(append([]Action{Depose{m.Reigns}}, refuse(wire.ReasonBusy, nil, err)...))
	}
	r.next, r.durable = local.Head+1, local.Head
	return []Action{Send{&wire.Position{Known: true, Head: local.Head, Reigns: local.Reigns, Disks: local.Disks}}}
}

// Receive takes a message of the writer's that is not an offer.
func (r *Receiver) Receive(m wire.Message) []Action {
	streams := r.state == receiverAnswers && r.local.Known
	seeds := r.state == receiverSeeds || r.state == receiverAdopts
	switch m := m.(type) {
	case *wire.Refuse:
		return r.refused(m)
	case *wire.Beat:
		if r.state > receiverWaits {
			r.Head, r.At = m.Head, m.Time
			return []Action{Send{&wire.Ack{Durable: r.durable}}}
		}
	case *wire.Records:
		if streams {
			return r.end(r.records(m))
		}
	case *wire.Begin:
		if r.state == receiverAnswers {
			return r.begin(m)
		}
	case *wire.Adopt:
		if streams {
			return r.end(r.adopt(m))
		}
	case *wire.Sums:
		if c := r.disks[m.Disk]; seeds && c != nil {
			if err := c.sums(m.First, int64(len(m.Sums)/wire.SumSize)); err != nil {
				return r.end(outOfTurn("disk %d: %v", m.Disk, err))
			}
			return []Action{Compare{m}}
		}
	case *wire.Data:
		if c := r.disks[m.Disk]; seeds && c != nil {
			if err := c.data(m.First, m.Bytes); err != nil {
				return r.end(outOfTurn("disk %d: %v", m.Disk, err))
			}
			return []Action{Put{m}}
		}
	case *wire.Seeded:
		if seeds {
			return r.end(r.seeded(m))
		}
	}
	return r.end(outOfTurn("%v, which the follower does not wait for", m.Type()))
}

func (r *Receiver) end(actions []Action) []Action {
	if slices.ContainsFunc(actions, func(a Action) bool { _, ok := a.(End); return ok }) {
		r.state = receiverEnded
	}
	return actions
}

func (r *Receiver) refused(m *wire.Refuse) []Action {
	r.state = receiverEnded
	err := refused(m)
	if m.Reason != wire.ReasonDiverged || !r.local.Known || m.Reigns.Epoch() < r.local.Reigns.Epoch() {
		return []Action{End{err}}
	}
	to, cerr := r.local.Reigns.Common(r.local.Head, m.Reigns, r.offer.Head)
	if cerr != nil || to >= r.local.Head {
		return []Action{End{err}}
	}
	return []Action{Rewind{to}, End{err}}
}

func (r *Receiver) records(m *wire.Records) []Action {
	if m.Table {
		r.table = &record.Run{Disks: slices.Clone(m.Run.Disks), Reigns: slices.Clone(m.Run.Reigns)}
	}
	switch {
	case r.table == nil:
		return outOfTurn("records without a table, and none was sent before")
	case m.Run.First != r.next || m.Run.Last < m.Run.First:
		return outOfTurn("records of LSN %d to %d, and LSN %d is the next", m.Run.First, m.Run.Last, r.next)
	}
	run := m.Run
	run.Disks, run.Reigns = r.table.Disks, r.table.Reigns
	r.next, r.Head = run.Last+1, max(r.Head, run.Last)
	return []Action{Append{run}}
}

// Durable is the caller's: everything up to an LSN, that was appended, is durable.
func (r *Receiver) Durable(lsn record.LSN) []Action {
	if r.state == receiverEnded || lsn <= r.durable || lsn >= r.next {
		return nil
	}
	r.durable = lsn
	return []Action{Send{&wire.Ack{Durable: lsn}}}
}

func (r *Receiver) begin(m *wire.Begin) []Action {
	r.state, r.begins, r.disks = receiverSeeds, true, map[record.DiskID]*content{}
	for _, d := range m.Disks {
		if d.Removed == 0 {
			r.disks[d.ID] = &content{size: d.Size}
		}
	}
	r.next, r.durable = m.At+1, 0
	r.table = &record.Run{Disks: slices.Clone(m.Disks), Reigns: slices.Clone(m.Reigns)}
	return []Action{Begin{m.Beginning}}
}

func (r *Receiver) adopt(m *wire.Adopt) []Action {
	if err := record.CheckDisks([]record.Disk{m.Disk}, m.At); err != nil || m.At != r.next-1 || m.Disk.Removed != 0 {
		return outOfTurn("disk %q comes at LSN %d, and LSN %d is the next: %v", m.Disk.Name, m.At, r.next, err)
	}
	r.state, r.disks = receiverAdopts, map[record.DiskID]*content{m.Disk.ID: {size: m.Disk.Size}}
	return []Action{Adopt{m.Disk}}
}

// Want is the caller's answer to a Compare, which is not changed after it.
func (r *Receiver) Want(m *wire.Want) []Action {
	c := r.disks[m.Disk]
	if c == nil || r.state == receiverEnded {
		return nil
	}
	for i := range min(int64(len(m.Bits))*8, c.covered-m.First) {
		if m.Bits[i/8]&(1<<(i%8)) != 0 {
			c.wanted = append(c.wanted, m.First+i)
		}
	}
	return []Action{Send{m}}
}

func (r *Receiver) seeded(m *wire.Seeded) []Action {
	c := r.disks[m.Disk]
	switch {
	case c != nil && (c.covered < c.blocks() || len(c.wanted) > 0):
		return outOfTurn("the end of disk %d, of which %d of %d blocks have been told and %d are wanted", m.Disk, c.covered, c.blocks(), len(c.wanted))
	case c != nil:
		delete(r.disks, m.Disk)
		if r.begins {
			return nil
		}
	case m.Disk != 0 || !r.begins || len(r.disks) > 0:
		return outOfTurn("the end of disk %d, and %d are due", m.Disk, len(r.disks))
	}
	r.state = receiverFinishes
	return []Action{Finish{m.Disk}}
}

// Finished is the caller's answer to a Finish.
func (r *Receiver) Finished() []Action {
	if r.state != receiverFinishes {
		return nil
	}
	r.state, r.local.Known = receiverAnswers, true
	if !r.begins {
		return nil
	}
	r.begins = false
	return r.Durable(r.next - 1)
}
