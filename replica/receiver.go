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
	// Begin asks for a group to be begun: for backings of its disks, which Compare and Put then fill, and for the group itself at Finish.
	Begin struct{ record.Beginning }
	// Bridge asks for the group to be brought from its head, over a gap, to where the writer's history is what a beginning says: its
	// disks become what they were there by Compare and Put, and so do backings of those that came in the gap; at Finish it goes on from there, with
	// these. What it has stays.
	Bridge struct{ record.Beginning }
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
	// Rewind says to what LSN the group would have to go back, at least, to follow this writer: whether it may is for people, or their policy, to
	// say, and whether its history goes back that far still is to be looked at. An End follows.
	Rewind struct{ To record.LSN }
	// Take asks for a reign to be begun, durably, of a higher epoch than any that is known, and for Taken to be called then: the writer
	// has ended its own.
	Take struct{}
)

func (Append) action()  {}
func (Begin) action()   {}
func (Bridge) action()  {}
func (Compare) action() {}
func (Put) action()     {}
func (Adopt) action()   {}
func (Finish) action()  {}
func (Rewind) action()  {}
func (Take) action()    {}

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
	heard   bool // the writer has taken the position: it has said something else since
	asked   bool // for the group
	// ready is where the writer has ended its reign, and taking that the caller's Taken is due.
	ready  record.LSN
	taking bool
	disks  map[record.DiskID]*content

	// Head and At are what the writer said last of how far it has come, and when.
	Head record.LSN
	At   time.Time
}

const (
	// MaxSums is how many blocks one Sums may be of, and MaxUnanswered how many of them a writer may send that no Want has
	// answered, or whose wanted blocks have not come: what a follower keeps of them is bounded.
	MaxSums       = 1 << 16
	MaxUnanswered = 8
)

// content is what is due of a disk's: sums of all its blocks in their order, answers to them, and those blocks that were wanted.
type content struct {
	size     int64
	covered  int64   // blocks that sums have come of
	answered int64   // blocks that a Want has answered
	asked    []int64 // how many blocks each Sums was of that was not answered
	wanted   []int64 // blocks whose data has not come
}

func (c *content) blocks() int64 { return int64(record.Blocks(c.size)) }

// sums takes up that sums of n blocks from first on have come.
func (c *content) sums(first, n int64) error {
	switch {
	case first != c.covered || n == 0 || n > c.blocks()-first:
		return fmt.Errorf("sums of %d blocks from block %d on, and of %d blocks the next is block %d", n, first, c.blocks(), c.covered)
	case n > MaxSums || len(c.asked) >= MaxUnanswered || len(c.wanted) > MaxUnanswered*MaxSums:
		return fmt.Errorf("sums of %d blocks, while %d are not answered and %d blocks are wanted", n, len(c.asked), len(c.wanted))
	}
	c.covered, c.asked = c.covered+n, append(c.asked, n)
	return nil
}

// want takes up the answer to the oldest sums that have none.
func (c *content) want(m *wire.Want) error {
	if len(c.asked) == 0 || m.First != c.answered || int64(len(m.Bits)) != (c.asked[0]+7)/8 {
		return fmt.Errorf("an answer of %d bits from block %d on is to no sums", 8*len(m.Bits), m.First)
	}
	for i := range c.asked[0] {
		if m.Bits[i/8]&(1<<(i%8)) != 0 {
			c.wanted = append(c.wanted, m.First+i)
		}
	}
	c.answered, c.asked = c.answered+c.asked[0], c.asked[1:]
	return nil
}

// complete reports whether everything has come.
func (c *content) complete() bool { return c.answered == c.blocks() && len(c.wanted) == 0 }

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

// Offer takes the writer's offer of a group of which the daemon has local.
func (r *Receiver) Offer(m *wire.Offer, local Local) []Action {
	if r.state != receiverWaits {
		return r.end(outOfTurn("a second offer"))
	}
	r.offer, r.local, r.state, r.Head = *m, local, receiverAnswers, m.Head
	theirs, newest := last(m.Reigns), local.newest()
	if err := plausible(m.Reigns, newest.Epoch()); local.Known && err != nil {
		return r.end(refuse(wire.ReasonFailed, nil, err))
	}
	var note []Action
	if local.Known && theirs.Epoch > newest.Epoch() {
		note = []Action{Note{m.Reigns}}
	}
	if !local.Known && (newest == nil || theirs.Epoch > newest.Epoch() || theirs == last(newest)) {
		return []Action{Send{&wire.Position{}}}
	}
	if !local.Known {
		return r.end(refuse(wire.ReasonDeposed, newest, fmt.Errorf("%w: epoch %d is known here, and the group was offered in epoch %d", ErrDeposed, newest.Epoch(), theirs.Epoch)))
	}
	ours := last(local.Reigns)
	_, err := local.Reigns.Common(local.Head, m.Reigns, m.Head)
	switch {
	case err != nil: // whatever epoch it claims, it is of another group
		return r.end(refuse(wire.ReasonUnrelated, nil, fmt.Errorf("group %s: %w", m.Group, err)))
	case theirs.Epoch < newest.Epoch() || local.Leads && theirs.Epoch == ours.Epoch:
		err := fmt.Errorf("%w: epoch %d is known here, and the group was offered in epoch %d", ErrDeposed, newest.Epoch(), theirs.Epoch)
		return r.end(refuse(wire.ReasonDeposed, newest, err))
	case theirs.Epoch == newest.Epoch() && theirs != last(newest):
		err := fmt.Errorf("%w: another daemon took epoch %d too", ErrDiverged, theirs.Epoch)
		return r.end(refuse(wire.ReasonDiverged, local.Reigns, err))
	case local.Leads:
		err := fmt.Errorf("%w: epoch %d; this daemon writes in epoch %d", ErrDeposed, theirs.Epoch, ours.Epoch)
		return r.end(append([]Action{Depose{m.Reigns}}, refuse(wire.ReasonBusy, nil, err)...))
	}
	r.next, r.durable = local.Head+1, local.Head
	return append(note, Send{&wire.Position{Known: true, Stuck: local.Stuck, Head: local.Head, Digest: local.Digest, Reigns: local.Reigns, Disks: local.Disks}})
}

// Receive takes a message of the writer's that is not an offer.
func (r *Receiver) Receive(m wire.Message) []Action {
	streams := r.state == receiverAnswers && r.local.Known && !r.taking
	seeds := r.state == receiverSeeds || r.state == receiverAdopts
	if _, refused := m.(*wire.Refuse); !refused && r.state > receiverWaits {
		r.heard = true
	}
	switch m := m.(type) {
	case *wire.Refuse:
		if r.state != receiverEnded {
			return r.refused(m)
		}
	case *wire.Beat:
		if r.state > receiverWaits && r.state != receiverEnded {
			r.Head, r.At = m.Head, m.Time
			return []Action{Send{r.ack()}}
		}
	case *wire.Records:
		if streams {
			return r.end(r.records(m))
		}
	case *wire.Ready:
		if streams && r.asked && m.Head == r.next-1 {
			r.ready, r.taking = m.Head, true
			return r.take()
		}
	case *wire.Begin:
		if r.state == receiverAnswers {
			return r.end(r.begin(m))
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
	if ends(actions) {
		r.state = receiverEnded
	}
	return actions
}

func (r *Receiver) refused(m *wire.Refuse) []Action {
	r.state = receiverEnded
	err := refused(m)
	// Two of one epoch are for people to decide about. A peer that refuses says nothing that its offer has not.
	if m.Reason != wire.ReasonDiverged || !r.local.Known || r.offer.Reigns.Epoch() <= r.local.Reigns.Epoch() {
		return []Action{End{err}}
	}
	to, cerr := r.local.Reigns.Common(r.local.Head, r.offer.Reigns, r.offer.Head)
	switch {
	case cerr != nil || to >= r.local.Head:
		return []Action{End{err}}
	}
	return []Action{Rewind{to}, End{err}}
}

func (r *Receiver) records(m *wire.Records) []Action {
	if n := len(m.Run.Reigns); m.Table && (n > len(r.offer.Reigns) || !slices.Equal(m.Run.Reigns, r.offer.Reigns[:n])) {
		return outOfTurn("records of epoch %d, which is not what was offered", m.Run.Reigns.Epoch())
	}
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
	return append([]Action{Send{r.ack()}}, r.take()...)
}

func (r *Receiver) ack() *wire.Ack {
	return &wire.Ack{Durable: r.durable, Begun: r.local.Known && !r.begins}
}

// Alive says from time to time that the follower is there.
func (r *Receiver) Alive() []Action {
	if r.state <= receiverWaits || r.state == receiverEnded || !r.heard || r.taking {
		return nil
	}
	return []Action{Send{r.ack()}}
}

// Fail ends the stream for a reason of the caller's.
func (r *Receiver) Fail(err error) []Action {
	if r.state == receiverEnded {
		return nil
	}
	return r.end(refuse(wire.ReasonFailed, nil, err))
}

// Handover asks the writer for the group, once, if the stream has come to records. A Take follows when everything that it has
// written is durable here.
func (r *Receiver) Handover() []Action {
	if r.state != receiverAnswers || !r.local.Known || !r.heard || r.asked {
		return nil
	}
	r.asked = true
	return []Action{Send{&wire.Handover{Group: r.offer.Group}}}
}

func (r *Receiver) take() []Action {
	if !r.taking || r.durable < r.ready {
		return nil
	}
	return []Action{Take{}}
}

// Taken is the caller's answer to a Take.
func (r *Receiver) Taken(reigns record.Reigns) []Action {
	if r.state == receiverEnded || !r.taking || r.durable < r.ready {
		return nil
	}
	return r.end([]Action{Send{&wire.Taken{Reigns: reigns}}, End{ErrHandedOver}})
}

func (r *Receiver) begin(m *wire.Begin) []Action {
	// No record has come on this stream, and those behind what is here can not.
	behind := r.next == r.local.Head+1 && r.local.Head < m.At && (r.local.Head < r.offer.Horizon || r.local.Stuck)
	switch {
	case r.local.Known && !behind:
		return outOfTurn("a beginning, of a group that has come to LSN %d here, with records from LSN %d on there", r.next-1, r.offer.Horizon+1)
	case m.At < r.offer.Horizon || m.At > r.offer.Head || len(m.Reigns) > len(r.offer.Reigns) || !slices.Equal(m.Reigns, r.offer.Reigns[:len(m.Reigns)]):
		return outOfTurn("a beginning at LSN %d in epoch %d, which is not what was offered", m.At, m.Reigns.Epoch())
	}
	r.state, r.begins, r.disks = receiverSeeds, true, map[record.DiskID]*content{}
	for _, d := range m.Disks {
		if d.Removed == 0 {
			r.disks[d.ID] = &content{size: d.Size}
		}
	}
	r.next, r.durable = m.At+1, 0
	r.table = &record.Run{Disks: slices.Clone(m.Disks), Reigns: slices.Clone(m.Reigns)}
	here := r.local.Known
	r.local.Disks = slices.DeleteFunc(slices.Clone(m.Disks), func(d record.Disk) bool { return d.Removed != 0 })
	if here {
		return []Action{Bridge{m.Beginning}}
	}
	return []Action{Begin{m.Beginning}}
}

func (r *Receiver) adopt(m *wire.Adopt) []Action {
	if err := record.CheckDisks([]record.Disk{m.Disk}, m.At); err != nil {
		return outOfTurn("a disk comes: %v", err)
	}
	if m.At != r.next-1 || m.Disk.Removed != 0 {
		return outOfTurn("disk %q, removed at LSN %d, comes at LSN %d, and LSN %d is the next", m.Disk.Name, m.Disk.Removed, m.At, r.next)
	}
	if slices.ContainsFunc(r.local.Disks, func(d record.Disk) bool { return d.ID == m.Disk.ID || d.Name == m.Disk.Name }) {
		return outOfTurn("disk %q comes, and is here", m.Disk.Name)
	}
	r.local.Disks = append(slices.Clip(r.local.Disks), m.Disk)
	r.state, r.disks = receiverAdopts, map[record.DiskID]*content{m.Disk.ID: {size: m.Disk.Size}}
	return []Action{Adopt{m.Disk}}
}

// Want is the caller's answer to a Compare, the oldest of the disk's that has none: a bit for each of its blocks.
func (r *Receiver) Want(m *wire.Want) []Action {
	if r.state == receiverEnded {
		return nil
	}
	c := r.disks[m.Disk]
	if c == nil {
		return r.end(refuse(wire.ReasonFailed, nil, fmt.Errorf("an answer about disk %d, of which nothing is due", m.Disk)))
	}
	if err := c.want(m); err != nil {
		return r.end(refuse(wire.ReasonFailed, nil, fmt.Errorf("disk %d: %w", m.Disk, err)))
	}
	return []Action{Send{m}}
}

func (r *Receiver) seeded(m *wire.Seeded) []Action {
	c := r.disks[m.Disk]
	switch {
	case c != nil && !c.complete():
		return outOfTurn("the end of disk %d, of which %d of %d blocks are answered and %d wanted", m.Disk, c.answered, c.blocks(), len(c.wanted))
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
	r.durable = r.next - 1
	return []Action{Send{r.ack()}}
}
