package replica

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

var networkSeeds = flag.Int("network.seeds", 150, "how many seeds the scripted network runs")

// TestNetwork has three daemons write and follow a group over streams that break, lose their ends, and, though no stream may, repeat and
// swap messages, while daemons crash, fail over and forget their oldest records.
//
// Look at what two daemons have in common at every step: it is what their reigns say, no more and no less. What was
// acknowledged is the same on both sides. When it is quiet, everybody has what the last writer has.
func TestNetwork(t *testing.T) {
	reached := map[string]int{}
	for seed := range uint64(*networkSeeds) {
		t.Run(fmt.Sprint(seed+1), func(t *testing.T) {
			n := newNetwork(t, seed+1, reached)
			for range 600 {
				n.step()
				n.check()
			}
			n.settle()
		})
	}
	for _, what := range []string{"appended", "acked", "begun", "bridged", "adopted", "rewound", "deposed", "gave up", "refused as unrelated", "diverged", "out of turn", "crashed", "handed over", "fenced"} {
		require.Positive(t, reached[what], "no seed came to: %s", what)
	}
}

// daemon is one with a copy of the group: a record is a number that no other record has.
type daemon struct {
	id      int
	known   bool
	leads   bool
	records []uint64 // LSN 1 on; those up to the horizon are what its disks held
	durable record.LSN
	horizon record.LSN
	reigns  record.Reigns
	seen    record.Reigns // durable
	disks   []record.Disk
	life    int // how often it crashed, rewound or began anew
	stuck   bool
}

func (d *daemon) head() record.LSN { return record.LSN(len(d.records)) }

func (d *daemon) local() Local {
	return Local{Known: d.known, Leads: d.leads, Head: d.durable, Horizon: d.horizon, Reigns: d.reigns, Disks: d.disks, Digest: d.digest(d.durable), Seen: d.seen, Stuck: d.stuck}
}

func (d *daemon) digest(lsn record.LSN) (b [16]byte) {
	if lsn > d.horizon {
		binary.LittleEndian.PutUint64(b[:], d.records[lsn-1])
	}
	return b
}

// epoch is what it would lead in.
func (d *daemon) epoch() uint64 { return max(d.reigns.Epoch(), d.seen.Epoch()) + 1 }

// stream is a connection: what is on its way, in each direction.
type stream struct {
	from, to     *daemon
	fromL, toL   int // the lives of its ends
	s            *Sender
	r            *Receiver
	there, back  []wire.Message
	feeding      bool
	next         record.LSN
	seeding      []record.Disk // whose Answer is due
	seedAt       record.LSN
	seed         record.Beginning // what the receiver's end begins with, or goes on with
	content      map[record.DiskID][]uint64
	adopts       record.Disk
	halfOpen     bool // what the receiver says is lost
	appended     record.LSN
	sEnds, rEnds bool
}

type network struct {
	t       *testing.T
	rng     *rand.Rand
	daemons []*daemon
	streams []*stream
	last    uint64 // record
	quiet   bool
	reached map[string]int
}

func newNetwork(t *testing.T, seed uint64, reached map[string]int) *network {
	n := &network{t: t, rng: rand.New(rand.NewPCG(seed, 5)), reached: reached}
	for i := range 3 {
		n.daemons = append(n.daemons, &daemon{id: i})
	}
	d := n.daemons[0]
	d.known, d.leads, d.reigns = true, true, record.Reigns{n.reign(1, 1)}
	d.disks = []record.Disk{{ID: 1, Name: "d1", Size: record.BlockSize}}
	if seed%50 == 0 { // a group of the same name that has nothing to do with it
		e := n.daemons[2]
		e.known, e.leads, e.reigns, e.disks = true, true, record.Reigns{n.reign(1, 1)}, d.disks
	}
	return n
}

func (n *network) reign(epoch uint64, first record.LSN) record.Reign {
	n.last++
	r := record.Reign{Epoch: epoch, First: first}
	binary.LittleEndian.PutUint64(r.ID[:], n.last)
	return r
}

func (n *network) any() *daemon { return n.daemons[n.rng.IntN(len(n.daemons))] }

func (n *network) step() {
	switch k := n.rng.IntN(100); {
	case k < 25:
		n.write(n.any())
	case k < 35:
		n.sync(n.any())
	case k < 80:
		if len(n.streams) > 0 {
			n.move(n.streams[n.rng.IntN(len(n.streams))])
		}
	case k < 90:
		n.connect(n.any(), n.any())
	case k < 93:
		if len(n.streams) > 0 {
			st := n.streams[n.rng.IntN(len(n.streams))]
			if st.halfOpen = n.rng.IntN(2) == 0; !st.halfOpen {
				n.drop(st)
			}
		}
	case k < 94:
		n.crash(n.any())
	case k < 95:
		if d := n.any(); d.known && d.durable > d.horizon {
			d.stuck = !d.leads && n.rng.IntN(4) == 0
			d.horizon += record.LSN(1 + n.rng.IntN(int(d.durable-d.horizon)))
		}
	case k < 96:
		n.failOver(n.any())
	case k < 97:
		if len(n.streams) > 0 && n.rng.IntN(4) == 0 {
			st := n.streams[n.rng.IntN(len(n.streams))]
			if st.toL == st.to.life && !st.rEnds {
				n.receiver(st, st.r.Handover())
			}
		}
		if d := n.any(); d.leads && len(d.disks) < 4 {
			n.write(d)
			d.disks = append(slices.Clone(d.disks), record.Disk{ID: record.DiskID(len(d.disks) + 1), Name: fmt.Sprint("d", len(d.disks)+1), Size: record.BlockSize, Added: d.head()})
			n.sync(d)
		}
	default:
		if len(n.streams) > 0 {
			n.garble(n.streams[n.rng.IntN(len(n.streams))])
		}
	}
}

func (n *network) write(d *daemon) {
	if d.leads {
		n.last++
		d.records = append(d.records, n.last)
	}
}

func (n *network) sync(d *daemon) {
	d.durable = d.head()
	for _, st := range n.streams {
		if st.to == d && st.toL == d.life && !st.rEnds {
			n.receiver(st, st.r.Durable(min(st.appended, d.durable)))
		}
	}
}

func (n *network) failOver(d *daemon) {
	if !d.known {
		return
	}
	n.sync(d)
	d.reigns, d.leads = d.reigns.With(n.reign(d.epoch(), d.head()+1)), true
	d.life++ // its streams are of before
}

// crash takes what is not durable, or some of it, and every stream.
func (n *network) crash(d *daemon) {
	lost := n.rng.IntN(int(d.head()-d.durable) + 1)
	d.records = d.records[:int(d.head())-lost]
	d.durable = d.head()
	d.life++
	n.reached["crashed"]++
	n.streams = slices.DeleteFunc(n.streams, func(st *stream) bool { return (st.from == d || st.to == d) && n.rng.IntN(3) > 0 })
}

func (n *network) drop(st *stream) {
	n.streams = slices.DeleteFunc(n.streams, func(o *stream) bool { return o == st })
}

// garble repeats a message or swaps two, as no stream does.
func (n *network) garble(st *stream) {
	q := &st.there
	if n.rng.IntN(2) == 0 {
		q = &st.back
	}
	if len(*q) < 2 {
		return
	}
	i := n.rng.IntN(len(*q) - 1)
	if n.rng.IntN(2) == 0 {
		(*q)[i], (*q)[i+1] = (*q)[i+1], (*q)[i]
	} else {
		*q = slices.Insert(*q, i, (*q)[i])
	}
}

func (n *network) connect(from, to *daemon) {
	if from == to || !from.leads || slices.ContainsFunc(n.streams, func(o *stream) bool { return o.to == to && o.from == from && o.toL == to.life && o.fromL == from.life }) {
		return
	}
	// A daemon has one stream of a group that it follows: the newest.
	n.streams = slices.DeleteFunc(n.streams, func(o *stream) bool { return o.to == to })
	n.sync(from)
	n.sync(to)
	st := &stream{from: from, to: to, fromL: from.life, toL: to.life, s: NewSender("g", from.local()), r: NewReceiver(), content: map[record.DiskID][]uint64{}}
	n.streams = append(n.streams, st)
	n.sender(st, st.s.Start())
}

// move delivers a message, or has the writer's end read on. An end that has died or gone on without the stream does nothing.
func (n *network) move(st *stream) {
	fromAlive, toAlive := st.fromL == st.from.life && !st.sEnds, st.toL == st.to.life && !st.rEnds
	switch k := n.rng.IntN(3); {
	case !fromAlive && !toAlive, (st.sEnds || st.rEnds) && len(st.there)+len(st.back) == 0:
		n.drop(st)
	case k == 0 && fromAlive && st.feeding && st.next <= st.from.durable:
		n.feed(st)
	case k == 1 && len(st.back) > 0:
		m := st.back[0]
		st.back = st.back[1:]
		if fromAlive && !st.halfOpen {
			n.sender(st, st.s.Receive(m))
		}
	case len(st.there) > 0:
		m := st.there[0]
		st.there = st.there[1:]
		if !toAlive {
			return
		}
		if o, ok := m.(*wire.Offer); ok {
			n.receiver(st, st.r.Offer(o, st.to.local()))
		} else {
			n.receiver(st, st.r.Receive(m))
		}
	case fromAlive && n.rng.IntN(4) == 0:
		n.sender(st, st.s.Beat(st.from.durable, time.Unix(1, 0)))
	}
}

func (n *network) feed(st *stream) {
	d := st.from
	if st.next <= d.horizon {
		n.drop(st) // it has expired under the feed
		return
	}
	last := min(d.durable, st.next+record.LSN(n.rng.IntN(4)))
	run := record.Run{First: st.next, Last: last}
	for _, id := range d.records[st.next-1 : last] {
		run.Bytes = binary.LittleEndian.AppendUint64(run.Bytes, id)
	}
	// A run is of one reign and one table.
	for i, r := range d.reigns {
		if r.First <= run.First {
			run.Reigns = d.reigns[:i+1]
		} else if r.First <= run.Last {
			run.Last = r.First - 1
		}
	}
	for _, k := range d.disks {
		if k.Added < run.First {
			run.Disks = append(run.Disks, k)
		} else {
			run.Last = min(run.Last, k.Added)
		}
	}
	run.Bytes = run.Bytes[:8*(run.Last-run.First+1)]
	st.feeding = false
	n.sender(st, st.s.Run(run))
}

// copied is a message as it comes out of a stream.
func (n *network) copied(m wire.Message) wire.Message {
	var b bytes.Buffer
	w, err := wire.NewWriter(&b, 0)
	require.NoError(n.t, err)
	require.NoError(n.t, w.Write(m))
	r, err := wire.NewReader(&b)
	require.NoError(n.t, err)
	defer r.Close()
	r.Trust()
	got, err := r.Next()
	require.NoError(n.t, err)
	return got
}

func (n *network) ended(err error) {
	for cause, what := range map[error]string{ErrUnrelated: "refused as unrelated", ErrDiverged: "diverged", ErrProtocol: "out of turn"} {
		if err != nil && bytes.Contains([]byte(err.Error()), []byte(cause.Error())) {
			n.reached[what]++
		}
	}
	if errors.Is(err, ErrDeposed) {
		n.reached["fenced"]++
	}
	if n.quiet {
		require.NotErrorIs(n.t, err, ErrProtocol)
	}
}

func (n *network) sender(st *stream, actions []Action) {
	for _, a := range actions {
		switch a := a.(type) {
		case Send:
			st.there = append(st.there, n.copied(a.Message))
		case Feed:
			st.feeding, st.next = true, a.From
		case Anew:
		case Acked:
			n.reached["acked"]++
		case Answer:
			d := a.Disk
			if i := slices.IndexFunc(st.seeding, func(k record.Disk) bool { return k.ID == d }); i >= 0 {
				st.seeding = slices.Delete(st.seeding, i, i+1)
				n.content(st, d)
			}
			if len(st.seeding) == 0 {
				n.sender(st, st.s.Seeded())
			}
		case Seed:
			n.seed(st, a)
		case Verify:
			n.sender(st, st.s.Verified(st.from.digest(a.LSN)))
		case Yield:
			n.sync(st.from)
			st.from.leads = false
			n.sender(st, st.s.Yielded(st.from.head()))
		case Depose:
			n.depose(st.from, a.Reigns)
		case End:
			st.sEnds = true
			n.ended(a.Err)
		default:
			n.t.Fatalf("a sender asks for %T", a)
		}
	}
}

// seed begins to send disks, which have one block: its sum first.
func (n *network) seed(st *stream, a Seed) {
	if a.Begin {
		d := st.from
		b := record.Beginning{At: a.At, Time: 1}
		for _, r := range d.reigns {
			if r.First <= a.At+1 {
				b.Reigns = b.Reigns.With(r)
			}
		}
		for _, k := range d.disks {
			if k.Added <= a.At {
				b.Disks = append(b.Disks, k)
			}
		}
		n.sender(st, st.s.Begin(b))
		return
	}
	st.seeding, st.seedAt = slices.Clone(a.Disks), a.At
	for _, k := range a.Disks {
		st.there = append(st.there, n.copied(&wire.Sums{Disk: k.ID, Sums: make([]byte, wire.SumSize)}))
	}
	if len(a.Disks) == 0 {
		n.sender(st, st.s.Seeded())
	}
}

// content sends what a disk holds as of an LSN: what all records up to there have made of it.
func (n *network) content(st *stream, disk record.DiskID) {
	m := &wire.Data{Disk: disk, Bytes: make([]byte, record.BlockSize)}
	for i, id := range st.from.records[:st.seedAt] {
		binary.LittleEndian.PutUint64(m.Bytes[8*i:], id)
	}
	st.there = append(st.there, n.copied(m), n.copied(&wire.Seeded{Disk: disk}))
}

func (n *network) depose(d *daemon, by record.Reigns) {
	require.Greater(n.t, by.Epoch(), d.reigns.Epoch())
	d.leads, d.seen = false, by
	n.reached["deposed"]++
}

func (n *network) receiver(st *stream, actions []Action) {
	d := st.to
	for _, a := range actions {
		switch a := a.(type) {
		case Send:
			if ack, ok := a.Message.(*wire.Ack); ok && st.fromL == st.from.life {
				require.LessOrEqual(n.t, ack.Durable, d.durable)
				require.True(n.t, slices.Equal(st.from.records[:ack.Durable], d.records[:ack.Durable]), "what was acknowledged is the same")
			}
			st.back = append(st.back, n.copied(a.Message))
		case Append:
			n.append(d, a.Run)
			st.appended = d.head()
		case Begin:
			require.False(n.t, d.known)
			st.seed = a.Beginning
		case Bridge:
			require.True(n.t, d.known)
			require.Greater(n.t, a.At, d.head())
			require.True(n.t, d.stuck || d.head() < st.from.horizon || st.fromL != st.from.life)
			st.seed = a.Beginning
		case Adopt:
			st.adopts = a.Disk
		case Compare:
			n.receiver(st, st.r.Want(&wire.Want{Disk: a.Disk, First: a.First, Bits: []byte{1}}))
		case Put:
			ids := []uint64{}
			for b := a.Bytes; len(b) > 0 && binary.LittleEndian.Uint64(b) != 0; b = b[8:] {
				ids = append(ids, binary.LittleEndian.Uint64(b))
			}
			st.content[a.Disk] = ids
		case Finish:
			n.finish(st, a)
		case Depose:
			n.depose(d, a.Reigns)
		case Note:
			require.Greater(n.t, a.Reigns.Epoch(), max(d.seen.Epoch(), d.reigns.Epoch()))
			d.seen = a.Reigns
		case Take:
			if st.fromL == st.from.life { // else it was told to lead again
				require.Equal(n.t, st.from.head(), d.durable, "nothing is lost")
				require.False(n.t, st.from.leads)
			}
			n.failOver(d)
			d.life-- // this stream goes on to its end
			n.receiver(st, st.r.Taken(d.reigns))
			n.reached["handed over"]++
		case Rewind:
			if a.To < d.horizon {
				*d = daemon{id: d.id, life: d.life + 1, seen: d.seen} // its operator gives up what it has
				n.reached["gave up"]++
				continue
			}
			d.records, d.leads = d.records[:a.To], false
			d.durable = a.To
			d.reigns = slices.DeleteFunc(slices.Clone(d.reigns), func(r record.Reign) bool { return r.First > a.To+1 })
			d.disks = slices.DeleteFunc(slices.Clone(d.disks), func(k record.Disk) bool { return k.Added > a.To })
			d.life++
			n.reached["rewound"]++
		case End:
			st.rEnds = true
			n.ended(a.Err)
		default:
			n.t.Fatalf("a receiver asks for %T", a)
		}
	}
}

func (n *network) append(d *daemon, run record.Run) {
	require.False(n.t, d.leads)
	require.Equal(n.t, d.head()+1, run.First)
	require.Len(n.t, run.Bytes, int(8*(run.Last-run.First+1)))
	if !slices.Equal(d.reigns, run.Reigns) {
		d.durable = d.head() // as a journal does before it notes a reign
	}
	for b := run.Bytes; len(b) > 0; b = b[8:] {
		d.records = append(slices.Clip(d.records), binary.LittleEndian.Uint64(b))
	}
	d.reigns = run.Reigns
	for _, k := range run.Disks {
		require.True(n.t, slices.ContainsFunc(d.disks, func(o record.Disk) bool { return o.ID == k.ID }), "records of a disk that it has not")
	}
	n.reached["appended"]++
}

func (n *network) finish(st *stream, a Finish) {
	d := st.to
	if a.Disk != 0 {
		require.Equal(n.t, st.adopts.ID, a.Disk)
		require.Equal(n.t, d.records, st.content[a.Disk])
		d.disks = append(slices.Clone(d.disks), st.adopts)
		n.reached["adopted"]++
		n.sync(d)
		n.receiver(st, st.r.Finished())
		return
	}
	b := st.seed
	require.False(n.t, d.leads)
	if d.known {
		n.reached["bridged"]++
	} else {
		n.reached["begun"]++
	}
	d.known, d.reigns, d.disks, d.horizon, d.stuck = true, b.Reigns, b.Disks, b.At, false
	for _, k := range b.Disks {
		require.Len(n.t, st.content[k.ID], int(b.At))
		d.records = st.content[k.ID]
	}
	d.durable, st.appended = b.At, b.At
	n.receiver(st, st.r.Finished())
}

// check compares what two daemons have in common with what their reigns say.
func (n *network) check() {
	a, b := n.any(), n.any()
	if !a.known || !b.known {
		return
	}
	got, err := a.reigns.Common(a.head(), b.reigns, b.head())
	same := 0
	for same < len(a.records) && same < len(b.records) && a.records[same] == b.records[same] {
		same++
	}
	if err != nil {
		require.ErrorIs(n.t, err, record.ErrUnrelated)
		require.Zero(n.t, same)
		return
	}
	require.EqualValues(n.t, same, got, "%v of %d, %v of %d", a.reigns, a.head(), b.reigns, b.head())
}

// settle lets everybody follow the writer of the last epoch.
func (n *network) settle() {
	n.streams, n.quiet = nil, true
	writer := n.daemons[0]
	for _, d := range n.daemons {
		n.sync(d)
		if d.known && d.reigns.Epoch() > writer.reigns.Epoch() {
			writer = d
		}
	}
	n.failOver(writer) // two may have taken the last epoch
	n.write(writer)
	for range 3000 {
		for _, d := range n.daemons {
			n.connect(writer, d)
			n.sync(d)
		}
		for _, st := range slices.Clone(n.streams) {
			n.move(st)
		}
	}
	for _, d := range n.daemons {
		if _, err := writer.reigns.Common(writer.head(), d.reigns, d.head()); err != nil && d.known {
			continue // the one that has nothing to do with it
		}
		require.Equal(n.t, writer.records, d.records, "daemon %d follows daemon %d", d.id, writer.id)
		require.Equal(n.t, writer.reigns, d.reigns)
		require.Equal(n.t, d == writer, d.leads)
	}
}
