package replica

import (
	"fmt"
	"slices"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

type (
	// Feed asks for one run of the group's durable records from an LSN on, by Run, when there are any.
	Feed struct{ From record.LSN }
	// Seed asks for the content of disks as of an LSN to be sent, each from its sums to its Seeded, and for Seeded to be
	// called then. Before the first one, Begin asks for what a group begins with at an LSN of the window, by Begin; then no
	// disk is named yet.
	Seed struct {
		At    record.LSN
		Begin bool
		Disks []record.Disk
	}
	// Answer is the follower's to the sums of a Seed.
	Answer struct{ *wire.Want }
	// Verify asks for the digest of the record of an LSN, by Verified.
	Verify struct{ LSN record.LSN }
	// Yield asks for the group to follow, durably, with no guest at its disks, and for Yielded to be called then; or, if that can not be,
	// for Fail.
	Yield struct{}
	// Anew says that the follower has nothing, or nothing from which on it can be sent records: it is given what the group begins with.
	Anew struct{}
	// Acked says that the follower has everything up to an LSN durably. The records behind it are what it has yet to get.
	Acked struct{ Durable record.LSN }
)

func (Feed) action()   {}
func (Seed) action()   {}
func (Answer) action() {}
func (Verify) action() {}
func (Yield) action()  {}
func (Anew) action()   {}
func (Acked) action()  {}

type senderState int

const (
	senderOffers   senderState = iota + 1 // the Position is due
	senderVerifies                        // the caller's Verified is
	senderBegins                          // its Begin is
	senderSeeds                           // its Seeded is
	senderStreams                         // its runs are
	senderEnded
)

// Sender is the writer's side of a stream.
type Sender struct {
	local Local
	group string
	state senderState

	sent  record.LSN // of the last record that the follower was sent, or had
	acked record.LSN
	// theirs are the disks whose content the follower has, and coming what it lacks of them: it is seeded before the run that
	// waits for it.
	theirs  map[record.DiskID]bool
	coming  []record.Disk
	waiting *record.Run
	table   *record.Run // whose table the follower was sent last
	begin   bool        // what is seeded is a group, not a disk
	// unconfirmed says that the follower has not said that it has begun with the group.
	unconfirmed bool
	digest      [16]byte // that the follower has at sent

	yields bool // the follower asked for the group
	// ends is the LSN at which the reign has ended, if ended is true; said, that the follower was told so.
	ends        record.LSN
	ended, said bool
}

// NewSender makes the writer's side of a stream of a group that it leads.
func NewSender(group string, local Local) *Sender {
	return &Sender{group: group, local: local, theirs: map[record.DiskID]bool{}}
}

// Start begins the stream.
func (s *Sender) Start() []Action {
	s.state = senderOffers
	return []Action{Send{&wire.Offer{Group: s.group, Head: s.local.Head, Horizon: s.local.Horizon, Reigns: s.local.Reigns}}}
}

// Receive takes a message of the follower's.
func (s *Sender) Receive(m wire.Message) []Action {
	switch m := m.(type) {
	case *wire.Refuse:
		if s.state != senderEnded {
			return s.refused(m)
		}
	case *wire.Position:
		if s.state == senderOffers {
			return s.end(s.position(m))
		}
	case *wire.Want:
		if s.state == senderSeeds {
			return []Action{Answer{m}}
		}
	case *wire.Handover:
		if (s.state == senderStreams || s.state == senderSeeds && !s.begin) && !s.yields {
			s.yields = true
			return []Action{Yield{}}
		}
	case *wire.Taken:
		if s.said {
			return s.end(s.taken(m))
		}
	case *wire.Ack:
		if s.state == senderStreams || s.state == senderSeeds {
			return s.end(s.ack(m))
		}
	}
	return s.end(outOfTurn("%v, which the writer does not wait for", m.Type()))
}

// end notes that the stream has ended if that is among the actions.
func (s *Sender) end(actions []Action) []Action {
	if ends(actions) {
		s.state = senderEnded
	}
	return actions
}

func (s *Sender) refused(m *wire.Refuse) []Action {
	s.state = senderEnded
	err := refused(m)
	_, unrelated := s.local.Reigns.Common(s.local.Head, m.Reigns, record.MaxLSN)
	if m.Reason == wire.ReasonDeposed && unrelated == nil && m.Reigns.Epoch() > s.local.Reigns.Epoch() && plausible(m.Reigns, s.local.Reigns.Epoch()) == nil {
		return []Action{Depose{m.Reigns}, End{err}}
	}
	return []Action{End{err}}
}

// Fail ends the stream for a reason of the caller's.
func (s *Sender) Fail(err error) []Action {
	if s.state == senderEnded {
		return nil
	}
	return s.end(refuse(wire.ReasonFailed, nil, err))
}

// Yielded is the caller's answer to a Yield: the group follows, and the record of an LSN was its last.
func (s *Sender) Yielded(head record.LSN) []Action {
	if s.state == senderEnded || !s.yields || s.ended {
		return nil
	}
	s.ends, s.ended = head, true
	return s.ready()
}

// ready tells the follower that it has been sent everything, when it has.
func (s *Sender) ready() []Action {
	if !s.ended || s.said || s.state != senderStreams || s.sent < s.ends {
		return nil
	}
	s.said = true
	return []Action{Send{&wire.Ready{Head: s.ends}}}
}

func (s *Sender) taken(m *wire.Taken) []Action {
	common, err := s.local.Reigns.Common(s.ends, m.Reigns, record.MaxLSN)
	if err != nil || common != s.ends || m.Reigns.Epoch() <= s.local.Reigns.Epoch() || plausible(m.Reigns, s.local.Reigns.Epoch()) != nil {
		return outOfTurn("a reign of epoch %d behind LSN %d: it was handed over in epoch %d at LSN %d", m.Reigns.Epoch(), common, s.local.Reigns.Epoch(), s.ends)
	}
	return []Action{Depose{m.Reigns}, End{ErrHandedOver}}
}

// position decides how to go on with a follower that has come so far.
func (s *Sender) position(m *wire.Position) []Action {
	if !m.Known {
		return s.beginAnew()
	}
	ours, theirs := last(s.local.Reigns), last(m.Reigns)
	common, err := s.local.Reigns.Common(s.local.Head, m.Reigns, m.Head)
	if err != nil { // whatever epoch it claims, it is of another group
		return refuse(wire.ReasonUnrelated, nil, fmt.Errorf("group %s: %w", s.group, err))
	}
	if err := plausible(m.Reigns, ours.Epoch); err != nil {
		return refuse(wire.ReasonFailed, nil, err)
	}
	if theirs.Epoch > ours.Epoch {
		err := fmt.Errorf("%w: the follower knows of epoch %d, and this daemon writes in epoch %d", ErrDeposed, theirs.Epoch, ours.Epoch)
		return append([]Action{Depose{m.Reigns}}, refuse(wire.ReasonDeposed, s.local.Reigns, err)...)
	}
	switch {
	case theirs.Epoch == ours.Epoch && theirs != ours:
		err = fmt.Errorf("%w: another daemon took epoch %d too", ErrDiverged, ours.Epoch)
		return refuse(wire.ReasonDiverged, s.local.Reigns, err)
	case common < m.Head:
		err = fmt.Errorf("%w: the follower has LSN %d, and both have LSN %d in common", ErrDiverged, m.Head, common)
		return refuse(wire.ReasonDiverged, s.local.Reigns, err)
	}
	for _, d := range m.Disks {
		s.theirs[d.ID] = true
	}
	if common < s.local.Horizon || m.Stuck && common < s.local.Head {
		return s.beginAnew()
	}
	s.sent, s.acked = common, common
	if s.digest = m.Digest; s.digest != [16]byte{} {
		s.state = senderVerifies
		return []Action{Verify{common}}
	}
	return s.stream()
}

func (s *Sender) stream() []Action {
	s.state = senderStreams
	return []Action{Acked{s.acked}, Feed{s.sent + 1}}
}

// Verified is the caller's answer to a Verify; zeroes: it has no such record any more.
func (s *Sender) Verified(digest [16]byte) []Action {
	if s.state != senderVerifies {
		return nil
	}
	if digest != s.digest && digest != [16]byte{} {
		return s.end(refuse(wire.ReasonForked, nil, fmt.Errorf("%w: that of LSN %d differs: if the follower is wrong, tidemark replica accept --anew there, and else fail over to it", ErrForked, s.sent)))
	}
	return s.stream()
}

func (s *Sender) beginAnew() []Action {
	s.state = senderBegins
	return []Action{Anew{}, Seed{At: s.local.Head, Begin: true}}
}

// Begin is the caller's answer to a Seed that asks for what the group begins with.
func (s *Sender) Begin(b record.Beginning) []Action {
	if s.state != senderBegins {
		return nil
	}
	s.state, s.begin, s.unconfirmed, s.sent, s.acked = senderSeeds, true, true, b.At, 0
	s.table = &record.Run{Disks: b.Disks, Reigns: b.Reigns}
	for _, d := range b.Disks {
		if d.Removed == 0 {
			s.coming = append(s.coming, d)
		}
	}
	return []Action{Send{&wire.Begin{Beginning: b}}, Seed{At: b.At, Disks: s.coming}}
}

// Seeded is the caller's answer to a Seed: everything of its disks was sent.
func (s *Sender) Seeded() []Action {
	if s.state != senderSeeds {
		return nil
	}
	for _, d := range s.coming {
		s.theirs[d.ID] = true
	}
	s.state, s.coming = senderStreams, nil
	if s.begin {
		s.begin = false
		return append([]Action{Send{&wire.Seeded{}}, Feed{s.sent + 1}}, s.ready()...)
	}
	run := *s.waiting
	s.waiting = nil
	return s.Run(run)
}

// Run is the caller's answer to a Feed. Its slices must not be changed before the next Feed.
func (s *Sender) Run(run record.Run) []Action {
	if s.state == senderEnded {
		return nil
	}
	if s.state != senderStreams || run.First != s.sent+1 {
		return s.end(refuse(wire.ReasonFailed, nil, fmt.Errorf("group %s: records from LSN %d on were read, and those behind LSN %d are due", s.group, run.First, s.sent)))
	}
	for _, d := range run.Disks {
		if d.Removed == 0 && !s.theirs[d.ID] {
			// One at a time: the next is found when this one is there.
			s.state, s.waiting, s.coming = senderSeeds, &run, []record.Disk{d}
			return []Action{Send{&wire.Adopt{At: s.sent, Disk: d}}, Seed{At: s.sent, Disks: s.coming}}
		}
	}
	m := &wire.Records{Run: run}
	if s.table == nil || !slices.Equal(s.table.Disks, run.Disks) || !slices.Equal(s.table.Reigns, run.Reigns) {
		m.Table, s.table = true, &record.Run{Disks: run.Disks, Reigns: run.Reigns}
	}
	s.sent = run.Last
	return append([]Action{Send{m}, Feed{run.Last + 1}}, s.ready()...)
}

// Beat says from time to time how far the group has come, and keeps the stream alive.
func (s *Sender) Beat(head record.LSN, at time.Time) []Action {
	if s.state != senderStreams && s.state != senderSeeds {
		return nil
	}
	return []Action{Send{&wire.Beat{Head: head, Time: at}}}
}

func (s *Sender) ack(m *wire.Ack) []Action {
	switch {
	case m.Durable > s.sent:
		return outOfTurn("an acknowledgement of LSN %d, and LSN %d was sent last", m.Durable, s.sent)
	case m.Durable < s.acked:
		return outOfTurn("an acknowledgement of LSN %d after one of LSN %d", m.Durable, s.acked)
	case !m.Begun && !s.unconfirmed:
		return outOfTurn("an acknowledgement of one who has nothing, of LSN %d", m.Durable)
	case !m.Begun, m.Durable == s.acked && !s.unconfirmed:
		return nil // the answer to a beat
	}
	s.acked, s.unconfirmed = m.Durable, false
	return []Action{Acked{m.Durable}}
}
