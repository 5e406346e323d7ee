package replica

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

var (
	first  = record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{1}}}
	second = first.With(record.Reign{Epoch: 2, First: 9, ID: [16]byte{2}})
	third  = second.With(record.Reign{Epoch: 3, First: 9, ID: [16]byte{3}})
)

func ended(t *testing.T, actions []Action) error {
	t.Helper()
	require.NotEmpty(t, actions)
	end, ok := actions[len(actions)-1].(End)
	require.True(t, ok, "%T", actions[len(actions)-1])
	return end.Err
}

// TestOneReignOtherRecords: a writer that was restored from a copy goes on under its old reign. What it writes is not taken for
// what the follower has.
func TestOneReignOtherRecords(t *testing.T) {
	position := &wire.Position{Known: true, Head: 5, Digest: [16]byte{5}, Reigns: first}
	for name, c := range map[string]struct {
		digest [16]byte
		forked bool
	}{"the same": {[16]byte{5}, false}, "expired there": {[16]byte{}, false}, "another": {[16]byte{6}, true}} {
		t.Run(name, func(t *testing.T) {
			s := NewSender("g", Local{Known: true, Leads: true, Head: 8, Reigns: first})
			s.Start()
			require.Equal(t, []Action{Verify{5}}, s.Receive(position))
			got := s.Verified(c.digest)
			if c.forked {
				require.ErrorIs(t, ended(t, got), ErrForked)
				require.Nil(t, s.Run(record.Run{First: 6, Last: 6}))
				return
			}
			require.Equal(t, []Action{Acked{5}, Feed{6}}, got)
		})
	}
}

// TestTheFence: who was told of a later epoch obeys no earlier one from then on, though no record of it has come, and whatever
// becomes of the stream.
func TestTheFence(t *testing.T) {
	local := Local{Known: true, Head: 8, Reigns: first}
	got := NewReceiver().Offer(&wire.Offer{Group: "g", Head: 9, Reigns: second}, local)
	require.Equal(t, Note{second}, got[0])
	require.IsType(t, Send{}, got[1], "its position, behind the note")

	local.Seen = second
	got = NewReceiver().Offer(&wire.Offer{Group: "g", Head: 20, Reigns: first}, local)
	require.ErrorIs(t, ended(t, got), ErrDeposed)
	m := got[0].(Send).Message.(*wire.Refuse)
	require.Equal(t, second, m.Reigns)
	s := NewSender("g", Local{Known: true, Leads: true, Head: 20, Reigns: first})
	s.Start()
	require.Equal(t, Depose{second}, s.Receive(m)[0], "the older writer is deposed by it")

	other := first.With(record.Reign{Epoch: 2, First: 9, ID: [16]byte{7}})
	require.ErrorIs(t, ended(t, NewReceiver().Offer(&wire.Offer{Group: "g", Head: 20, Reigns: other}, local)), ErrDiverged)
	require.Len(t, NewReceiver().Offer(&wire.Offer{Group: "g", Head: 9, Reigns: second}, local), 1, "no second note")

	nothing := Local{Seen: second}
	require.ErrorIs(t, ended(t, NewReceiver().Offer(&wire.Offer{Group: "g", Head: 20, Reigns: first}, nothing)), ErrDeposed)
	require.Len(t, NewReceiver().Offer(&wire.Offer{Group: "g", Head: 20, Reigns: third}, nothing), 1, "what a name was used for says nothing before there is a group")
}

// TestHandover: the follower takes the group when it has everything, and not before.
func TestHandover(t *testing.T) {
	s := NewSender("g", Local{Known: true, Leads: true, Head: 8, Reigns: first})
	r := NewReceiver()
	require.Nil(t, r.Handover(), "before there is a stream")
	offer := s.Start()[0].(Send).Message.(*wire.Offer)
	position := r.Offer(offer, Local{Known: true, Head: 6, Reigns: first})[0].(Send).Message
	require.Equal(t, []Action{Acked{6}, Feed{7}}, s.Receive(position))
	require.Empty(t, s.Yielded(6), "nobody has asked")
	require.Nil(t, r.Handover(), "the writer may not have taken the position yet")
	beat := s.Beat(8, time.Unix(1, 0))[0].(Send).Message
	r.Receive(beat)
	asked := r.Handover()[0].(Send).Message
	require.Equal(t, []Action{Yield{}}, s.Receive(asked))
	require.Empty(t, s.Yielded(8), "the last records are not sent")
	sent := s.Run(record.Run{First: 7, Last: 8, Reigns: first})
	require.Len(t, sent, 3)
	require.IsType(t, Append{}, r.Receive(sent[0].(Send).Message)[0])
	require.Empty(t, r.Receive(sent[2].(Send).Message), "the last records are not durable")
	require.Empty(t, r.Taken(second))
	require.Len(t, r.Durable(8), 2, "an acknowledgement, and now it can be taken")
	require.ErrorIs(t, ended(t, s.Receive(&wire.Taken{Reigns: third})), ErrHandedOver, "however many reigns behind it")

	r = NewReceiver()
	r.Offer(offer, Local{Known: true, Head: 8, Reigns: first})
	r.Receive(beat)
	r.Handover()
	require.ErrorIs(t, ended(t, r.Receive(&wire.Ready{Head: 7})), ErrProtocol, "it is behind what came")

	r = NewReceiver()
	r.Offer(offer, Local{Known: true, Head: 8, Reigns: first})
	require.ErrorIs(t, ended(t, r.Receive(&wire.Ready{Head: 8})), ErrProtocol, "nobody has asked")

	r = NewReceiver()
	r.Offer(offer, Local{Known: true, Head: 8, Reigns: first})
	r.Receive(beat)
	r.Handover()
	require.Equal(t, []Action{Take{}}, r.Receive(&wire.Ready{Head: 8}))
	done := r.Taken(second)
	require.ErrorIs(t, ended(t, done), ErrHandedOver)

	for name, reigns := range map[string]record.Reigns{"no new reign": first, "from the middle": first.With(record.Reign{Epoch: 2, First: 5, ID: [16]byte{2}}), "unrelated": {{Epoch: 4, First: 1, ID: [16]byte{4}}}} {
		s := NewSender("g", Local{Known: true, Leads: true, Head: 8, Reigns: first})
		s.Start()
		s.Receive(&wire.Position{Known: true, Head: 8, Reigns: first})
		s.Receive(asked)
		require.Len(t, s.Yielded(8), 1)
		require.ErrorIs(t, ended(t, s.Receive(&wire.Taken{Reigns: reigns})), ErrProtocol, name)
	}
}

// TestNoEpochBehindAll: a peer can claim no epoch, and no number of reigns, that would leave none to fail over with.
func TestNoEpochBehindAll(t *testing.T) {
	far := first.With(record.Reign{Epoch: 1 << 40, First: 9, ID: [16]byte{2}})
	many := first
	for i := range record.MaxReigns - 1 {
		many = append(many, record.Reign{Epoch: uint64(i + 2), First: 9, ID: [16]byte{1, byte(i), byte(i >> 8)}})
	}
	require.Error(t, first.With(record.Reign{Epoch: 1 << 50, First: 9, ID: [16]byte{2}}).Check())
	local := Local{Known: true, Leads: true, Head: 8, Reigns: first}
	for _, reigns := range []record.Reigns{far, many} {
		got := NewReceiver().Offer(&wire.Offer{Group: "g", Head: 20, Reigns: reigns}, local)
		require.ErrorIs(t, ended(t, got), ErrProtocol)
		require.Len(t, got, 2, "nothing is noted")
		s := NewSender("g", local)
		s.Start()
		require.ErrorIs(t, ended(t, s.Receive(&wire.Position{Known: true, Head: 8, Reigns: reigns})), ErrProtocol)
		s = NewSender("g", local)
		s.Start()
		require.Len(t, s.Receive(&wire.Refuse{Reason: wire.ReasonDeposed, Reigns: reigns}), 1, "it is not deposed by that")
	}
	r := NewReceiver()
	r.Offer(&wire.Offer{Group: "g", Head: 20, Reigns: first}, Local{Known: true, Head: 8, Reigns: first})
	require.ErrorIs(t, ended(t, r.Receive(&wire.Records{Run: record.Run{First: 9, Last: 9, Reigns: second}, Table: true})), ErrProtocol, "of another reign than was offered")
}

// TestStrangersLearnNothing: who offers what is of another history is not told what this one's reigns are.
func TestStrangersLearnNothing(t *testing.T) {
	other := record.Reigns{{Epoch: 9, First: 1, ID: [16]byte{9}}}
	got := NewReceiver().Offer(&wire.Offer{Group: "g", Head: 5, Reigns: other}, Local{Known: true, Leads: true, Head: 8, Reigns: first})
	require.Empty(t, got[0].(Send).Message.(*wire.Refuse).Reigns)
	s := NewSender("g", Local{Known: true, Leads: true, Head: 8, Reigns: first})
	s.Start()
	require.Empty(t, s.Receive(&wire.Position{Known: true, Head: 5, Reigns: other})[0].(Send).Message.(*wire.Refuse).Reigns)
}

// TestBridge: a follower is brought over a gap if records can not do it, and else not.
func TestBridge(t *testing.T) {
	disks := []record.Disk{{ID: 1, Name: "a", Size: record.BlockSize}, {ID: 2, Name: "b", Size: record.BlockSize}}
	for name, c := range map[string]struct {
		head    record.LSN
		stuck   bool
		bridges bool
	}{"behind the horizon": {3, false, true}, "at the horizon": {4, false, false}, "it can not take the next one": {5, true, true}, "there is no next one": {8, true, false}} {
		t.Run(name, func(t *testing.T) {
			s := NewSender("g", Local{Known: true, Leads: true, Head: 8, Horizon: 4, Reigns: first})
			s.Start()
			got := s.Receive(&wire.Position{Known: true, Stuck: c.stuck, Head: c.head, Reigns: first, Disks: disks[:1]})
			if !c.bridges {
				require.Equal(t, []Action{Acked{c.head}, Feed{c.head + 1}}, got)
				return
			}
			require.Equal(t, []Action{Anew{}, Seed{At: 8, Begin: true}}, got)
			b := record.Beginning{At: 8, Reigns: first, Disks: disks}
			require.Equal(t, []Action{Send{&wire.Begin{Beginning: b}}, Seed{At: 8, Disks: disks}}, s.Begin(b), "with the one that came in the gap")
			require.Equal(t, []Action{Send{&wire.Seeded{}}, Feed{9}}, s.Seeded())
			got = s.Run(record.Run{First: 9, Last: 9, Disks: disks, Reigns: first})
			require.IsType(t, &wire.Records{}, got[0].(Send).Message)
		})
	}
	offer := &wire.Offer{Group: "g", Head: 8, Horizon: 4, Reigns: first}
	for name, c := range map[string]struct {
		local Local
		at    record.LSN
		run   bool
		taken bool
	}{
		"behind the horizon":   {Local{Head: 3}, 8, false, true},
		"stuck":                {Local{Head: 5, Stuck: true}, 8, false, true},
		"not behind it":        {Local{Head: 4}, 8, false, false},
		"to where it is":       {Local{Head: 5, Stuck: true}, 5, false, false},
		"behind a record":      {Local{Head: 5, Stuck: true}, 8, true, false},
		"before the horizon":   {Local{Head: 2}, 3, false, false},
		"beyond what there is": {Local{Head: 3}, 9, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			c.local.Known, c.local.Reigns, c.local.Disks = true, first, disks[:1]
			r := NewReceiver()
			position := r.Offer(offer, c.local)[0].(Send).Message.(*wire.Position)
			require.Equal(t, c.local.Stuck, position.Stuck)
			if c.run {
				r.Receive(&wire.Records{Table: true, Run: record.Run{First: c.local.Head + 1, Last: c.local.Head + 1, Disks: disks[:1], Reigns: first}})
			}
			b := record.Beginning{At: c.at, Reigns: first, Disks: disks}
			got := r.Receive(&wire.Begin{Beginning: b})
			if !c.taken {
				require.ErrorIs(t, ended(t, got), ErrProtocol)
				return
			}
			require.Equal(t, []Action{Bridge{b}}, got)
			require.ErrorIs(t, ended(t, r.Receive(&wire.Sums{Disk: 3, Sums: make([]byte, wire.SumSize)})), ErrProtocol)
		})
	}
}
