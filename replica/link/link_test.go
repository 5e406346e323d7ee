package link

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func writeFile(path string, b []byte) error { return os.WriteFile(path, b, 0o600) }

// host is a daemon's end, listening, with one group in memory.
type host struct {
	*Endpoint
	addr   string
	g      *memory
	dir    string
	cancel context.CancelFunc
	done   chan struct{}
	mu     sync.Mutex
	errs   []error // of streams that were followed
	asked  func(c *Conn, group string) (History, error)
}

func newHost(t testing.TB, name string) *host {
	t.Helper()
	h := &host{dir: t.TempDir(), g: &memory{bell: make(chan struct{})}, done: make(chan struct{})}
	id, err := LoadIdentity(h.dir, name, writeFile)
	require.NoError(t, err)
	peers, err := LoadPeers(filepath.Join(h.dir, "peers.json"), nil, nil, writeFile)
	require.NoError(t, err)
	h.Endpoint = &Endpoint{Identity: id, Peers: peers, Name: name, Build: "test", Log: zap.NewNop(), Offered: func(ctx context.Context, c *Conn, m *wire.Offer) {
		if may, _ := c.Peer.Sends(m.Group); !may {
			_ = c.Refuse(wire.ReasonRights, errors.New("not yours"))
			_ = c.Close()
			return
		}
		err := Follow(ctx, c, m, h.g)
		h.mu.Lock()
		defer h.mu.Unlock()
		h.errs = append(h.errs, err)
	}, Asked: func(c *Conn, group string) (History, error) {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.asked(c, group)
	}}
	h.Init()
	h.listen(t)
	return h
}

func (h *host) listen(t testing.TB) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	h.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	go func() {
		defer close(h.done)
		_ = h.Serve(ctx, l) // it returns nil
	}()
	t.Cleanup(func() {
		cancel()
		h.Shut()
		<-h.done
	})
}

// pairOf are two hosts of which a may send every group to b.
func pairOf(t *testing.T) (a, b *host) {
	a, b = newHost(t, "a"), newHost(t, "b")
	token, err := b.Invite(Peer{MaySend: []string{"*"}}, time.Now().Add(time.Minute))
	require.NoError(t, err)
	again, err := ParseToken(token.String())
	require.NoError(t, err)
	require.Equal(t, token, again)
	p, err := a.Join(t.Context(), b.addr, token, Peer{})
	require.NoError(t, err)
	require.Equal(t, "b", p.Name)
	return a, b
}

// memory is a group: record n sets the first bytes of block n%blocks to n.
type memory struct {
	mu        sync.Mutex
	known     bool
	leads     bool
	horizon   record.LSN
	head      record.LSN
	disk      []byte
	size      int64
	reigns    record.Reigns
	seen      record.Reigns
	bell      chan struct{}
	acked     record.LSN
	progress  Progress
	coming    *record.Beginning
	handover  chan struct{}
	yields    error
	slow      time.Duration
	wrote     int64 // bytes of blocks that were written to begin with
	elsewhere []io.ReaderAt
	rewound   []record.LSN
	bridges   int
}

const memBlocks = 3*sumBlocks + 5

func (m *memory) begin() {
	m.known, m.leads, m.size = true, true, memBlocks*record.BlockSize-100
	m.disk = make([]byte, m.size)
	m.reigns = record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{1}}}
}

func set(disk []byte, lsn record.LSN) {
	binary.LittleEndian.PutUint64(disk[int64(lsn)*7919%memBlocks*record.BlockSize:], uint64(lsn))
}

func (m *memory) write(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for range n {
		m.head++
		set(m.disk, m.head)
	}
	close(m.bell)
	m.bell = make(chan struct{})
}

func (m *memory) disks() []record.Disk { return []record.Disk{{ID: 1, Name: "d", Size: m.size}} }

func (m *memory) Local() (replica.Local, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.known {
		return replica.Local{Seen: m.seen}, nil
	}
	return replica.Local{Known: true, Leads: m.leads, Head: m.head, Horizon: m.horizon, Reigns: m.reigns, Seen: m.seen, Disks: m.disks()}, nil
}

type memFeed struct {
	m    *memory
	next record.LSN
}

func (m *memory) Feed(from record.LSN) (Feed, error) { return &memFeed{m, from}, nil }
func (f *memFeed) Close()                            {}
func (f *memFeed) Next(ctx context.Context, most int) (record.Run, error) {
	for {
		f.m.mu.Lock()
		bell, head, reigns := f.m.bell, f.m.head, f.m.reigns
		f.m.mu.Unlock()
		if head >= f.next {
			run := record.Run{First: f.next, Last: min(head, f.next+99), Disks: f.m.disks(), Reigns: reigns}
			run.Bytes = bytes.Repeat([]byte{byte(f.next)}, 100*int(run.Last-run.First+1))
			f.next = run.Last + 1
			return run, nil
		}
		select {
		case <-bell:
		case <-ctx.Done():
			return record.Run{}, ctx.Err()
		}
	}
}

type memView struct{ b []byte }

func (m *memory) View(_ record.DiskID, at record.LSN) (View, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if at != m.head {
		return nil, errors.New("views are of the head here")
	}
	return memView{bytes.Clone(m.disk)}, nil
}
func (v memView) Size() int64 { return int64(len(v.b)) }
func (v memView) Close()      {}
func (v memView) ReadAt(p []byte, off int64) error {
	copy(p, v.b[off:off+int64(len(p))])
	return nil
}
func (v memView) Extents(off, n int64, fn func(int64, bool)) error {
	half := n / 2 / record.BlockSize * record.BlockSize
	fn(half, bytes.Equal(v.b[off:off+half], make([]byte, half)))
	fn(n-half, false)
	return nil
}

func (m *memory) Beginning(at record.LSN) (record.Beginning, error) {
	return record.Beginning{At: at, Time: 1, Reigns: m.reigns, Disks: m.disks()}, nil
}
func (m *memory) Digest(record.LSN) ([16]byte, error) { return [16]byte{}, nil }
func (m *memory) Durable() record.LSN {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.head
}
func (m *memory) PointWithin(from, to record.LSN) (record.LSN, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.head < from || to < m.head {
		return 0, errors.New("views are of the head here")
	}
	return m.head, nil
}
func (m *memory) Reigns() record.Reigns { return m.reigns }
func (m *memory) Note(r record.Reigns) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen = r
	return nil
}
func (m *memory) Depose(r record.Reigns) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leads, m.seen = false, r
	return nil
}
func (m *memory) Yield(context.Context) (record.LSN, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.yields != nil {
		return 0, m.yields
	}
	m.leads = false
	return m.head, nil
}
func (m *memory) Anew() { m.Acked(0) }
func (m *memory) Acked(lsn record.LSN) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.acked = lsn
}
func (m *memory) Seeding(p Progress) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.progress = p
}
func (m *memory) Receive(run record.Run) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	time.Sleep(m.slow)
	if run.First != m.head+1 || !bytes.Equal(run.Bytes, bytes.Repeat([]byte{byte(run.First)}, 100*int(run.Last-run.First+1))) {
		return errors.New("these are not the next records")
	}
	for m.head < run.Last {
		m.head++
		set(m.disk, m.head)
	}
	m.reigns = run.Reigns
	return nil
}
func (m *memory) Sync() (record.LSN, error) { return m.Durable(), nil }
func (m *memory) Begin(b record.Beginning) error {
	m.coming = &b
	m.size = b.Disks[0].Size
	if int64(len(m.disk)) != m.size {
		m.disk = make([]byte, m.size)
	}
	return nil
}
func (m *memory) Bridge(b record.Beginning) error {
	m.bridges++
	return m.Begin(b)
}
func (m *memory) Adopt(record.Disk) error                { return errors.New("no disk comes here") }
func (m *memory) Backing(record.DiskID) (Backing, error) { return m, nil }
func (m *memory) Elsewhere(record.DiskID) []io.ReaderAt  { return m.elsewhere }
func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	return copy(p, m.disk[off:]), nil
}
func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.wrote += int64(len(p))
	return copy(m.disk[off:], p), nil
}
func (m *memory) Zero(off, n int64) error {
	clear(m.disk[off : off+n])
	return nil
}
func (m *memory) Data(off, n int64, fn func(int64, bool)) error {
	fn(n, true)
	return nil
}
func (m *memory) Finish(record.DiskID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.known, m.head, m.horizon, m.reigns = true, m.coming.At, m.coming.At, m.coming.Reigns
	return nil
}
func (m *memory) Rewind(to record.LSN) error {
	m.rewound = append(m.rewound, to)
	return nil
}
func (m *memory) Take() (record.Reigns, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.leads = true
	m.reigns = m.reigns.With(record.Reign{Epoch: m.reigns.Epoch() + 1, First: m.head + 1, ID: [16]byte{byte(len(m.reigns) + 1)}})
	return m.reigns, nil
}
func (m *memory) Heard(record.LSN, time.Time) {}
func (m *memory) Handover() <-chan struct{}   { return m.handover }

// shipping ships a's group to a peer until stop is called.
func (h *host) shipping(t *testing.T, peer string) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	c, err := h.Open(ctx, peer, wire.RoleOffers)
	require.NoError(t, err)
	ended := make(chan error, 1)
	go func() { ended <- Ship(ctx, c, "web01", h.g, DefaultLevel) }()
	var once sync.Once
	stop = func() (err error) {
		once.Do(func() {
			cancel()
			err = <-ended
		})
		return err
	}
	t.Cleanup(func() { _ = stop() })
	return stop
}

func (m *memory) hasAcked(lsn record.LSN) func() bool {
	return func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.acked >= lsn
	}
}

func (h *host) same(t *testing.T, o *host) {
	t.Helper()
	h.g.mu.Lock()
	defer h.g.mu.Unlock()
	o.g.mu.Lock()
	defer o.g.mu.Unlock()
	require.Equal(t, h.g.head, o.g.head)
	require.True(t, bytes.Equal(h.g.disk, o.g.disk))
	require.True(t, slices.Equal(h.g.reigns, o.g.reigns))
}

func eventually(t *testing.T, what func() bool) {
	t.Helper()
	require.Eventually(t, what, 20*time.Second, 5*time.Millisecond)
}

// TestShip: a group is seeded, shipped, resumed where it was, and nothing that the follower has is sent again.
func TestShip(t *testing.T) {
	a, b := pairOf(t)
	a.g.begin()
	a.g.write(5000)
	stop := a.shipping(t, "b")
	eventually(t, a.g.hasAcked(5000))
	a.same(t, b)
	require.Equal(t, Progress{Disk: "d", Compared: a.g.size, All: a.g.size, Sent: a.g.progress.Sent, Done: true}, a.g.progress)
	a.g.write(20000)
	eventually(t, a.g.hasAcked(25000))
	a.same(t, b)
	require.ErrorIs(t, stop(), context.Canceled)

	a.g.write(1000)
	stop = a.shipping(t, "b")
	eventually(t, a.g.hasAcked(26000))
	a.same(t, b)
	require.ErrorIs(t, stop(), context.Canceled)

	// Another that has a copy of it, of before.
	b.g.mu.Lock()
	b.g.known, b.g.wrote, b.g.seen = false, 0, nil
	b.g.mu.Unlock()
	a.g.write(10)
	stop = a.shipping(t, "b")
	eventually(t, a.g.hasAcked(26010))
	a.same(t, b)
	require.EqualValues(t, 10*record.BlockSize, b.g.wrote, "only what differs was sent")
	require.ErrorIs(t, stop(), context.Canceled)

	// One that has it, and can not be sent the next records.
	require.Zero(t, b.g.bridges)
	a.g.write(20)
	a.g.mu.Lock()
	a.g.horizon, b.g.wrote = a.g.head, 0
	a.g.mu.Unlock()
	stop = a.shipping(t, "b")
	eventually(t, a.g.hasAcked(26030))
	a.same(t, b)
	require.Equal(t, 1, b.g.bridges)
	require.EqualValues(t, 20*record.BlockSize, b.g.wrote)
	require.ErrorIs(t, stop(), context.Canceled)
}

// TestElsewhere: blocks that stand in other places of the follower's are not sent, and those places are not believed.
func TestElsewhere(t *testing.T) {
	a, b := pairOf(t)
	a.g.begin()
	a.g.write(5000)
	differs := bytes.Clone(a.g.disk)
	due := 0
	for i := range 100 {
		block := differs[i*97*record.BlockSize:][:record.BlockSize]
		if i >= 50 && !bytes.Equal(block, zeroes[:]) {
			due += len(block)
		}
		block[100] ^= 1
	}
	short := bytes.NewReader(a.g.disk[:50*97*record.BlockSize+5])
	b.g.elsewhere = []io.ReaderAt{bytes.NewReader(make([]byte, len(differs))), bytes.NewReader(differs), short}
	stop := a.shipping(t, "b")
	eventually(t, a.g.hasAcked(5000))
	a.same(t, b)
	require.EqualValues(t, due, a.g.progress.Sent, "what differs behind the end of the short one")
	require.ErrorIs(t, stop(), context.Canceled)
}

// sixteenKiB is a limit that lets that much go at once.
type sixteenKiB struct{ taken, calls int }

func (l *sixteenKiB) Take(_ context.Context, n int) (int, error) {
	n = min(n, 16<<10)
	l.taken, l.calls = l.taken+n, l.calls+1
	return n, nil
}

// TestALimitedConnection writes what the limit allows at once, however much was gathered, and everything in its order.
func TestALimitedConnection(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	var limit sixteenKiB
	p := newPaced(ours, &limit, t.Context())
	want := bytes.Repeat([]byte("0123456789abcde"), 20000)
	got := make([]byte, len(want))
	read := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(theirs, got)
		read <- err
	}()
	require.NoError(t, p.gather(true))
	for rest := want; len(rest) > 0; {
		n := min(len(rest), 7001)
		_, err := p.Write(rest[:n])
		require.NoError(t, err)
		rest = rest[n:]
	}
	require.NoError(t, p.gather(false))
	require.NoError(t, <-read)
	require.Equal(t, want, got)
	require.Equal(t, len(want), limit.taken)
	require.GreaterOrEqual(t, limit.calls, len(want)/(16<<10))
	require.EqualValues(t, len(want), p.sent.Load())
	require.NoError(t, p.Close())
}

// TestASlowFollower gets everything.
func TestASlowFollower(t *testing.T) {
	a, b := pairOf(t)
	a.g.begin()
	a.g.write(1)
	stop := a.shipping(t, "b")
	eventually(t, a.g.hasAcked(1)) // a view of this source is of its head: nothing may be written while a follower begins
	b.g.mu.Lock()
	b.g.slow = 5 * time.Millisecond
	b.g.mu.Unlock()
	a.g.write(29999)
	eventually(t, a.g.hasAcked(30000))
	a.same(t, b)
	require.ErrorIs(t, stop(), context.Canceled)
}

// TestTheFollowerDials: the writer knows no address, and uses the connections that wait.
func TestTheFollowerDials(t *testing.T) {
	a, b := newHost(t, "a"), newHost(t, "b")
	token, err := a.Invite(Peer{Name: "bee"}, time.Now().Add(time.Minute))
	require.NoError(t, err)
	_, err = b.Join(t.Context(), a.addr, token, Peer{MaySend: []string{"web*"}})
	require.NoError(t, err)
	a.g.begin()
	a.g.write(10)
	ctx, cancel := context.WithCancel(t.Context())
	waits := make(chan error, 1)
	taken := make(chan struct{})
	go func() { waits <- b.Await(ctx, "a", func() { close(taken) }) }()
	stop := a.shipping(t, "bee")
	<-taken
	eventually(t, a.g.hasAcked(10))
	a.same(t, b)
	require.ErrorIs(t, stop(), context.Canceled)
	require.NoError(t, <-waits)
	cancel()
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = a.Open(short, "bee", wire.RoleOffers)
	require.ErrorContains(t, err, "has not dialled")
}

// TestHandingOver: the follower asks, and writes the group then; the writer follows.
func TestHandingOver(t *testing.T) {
	a, b := pairOf(t)
	a.g.begin()
	a.g.write(100)
	b.g.handover = make(chan struct{})
	stop := a.shipping(t, "b")
	eventually(t, a.g.hasAcked(100))
	a.g.mu.Lock()
	a.g.yields = errors.New("the guest runs")
	a.g.mu.Unlock()
	close(b.g.handover)
	eventually(t, func() bool { b.mu.Lock(); defer b.mu.Unlock(); return len(b.errs) == 1 })
	require.ErrorContains(t, b.errs[0], "the guest runs")
	require.ErrorContains(t, stop(), "the guest runs")
	a.g.mu.Lock()
	a.g.yields = nil
	a.g.mu.Unlock()
	a.g.write(50)
	c, err := a.Open(t.Context(), "b", wire.RoleOffers)
	require.NoError(t, err)
	require.NoError(t, Ship(t.Context(), c, "web01", a.g, DefaultLevel), "it ends when the group was taken")
	require.True(t, b.g.leads)
	require.False(t, a.g.leads)
	require.EqualValues(t, 150, b.g.head)
	require.EqualValues(t, 2, a.g.seen.Epoch())
}

// TestWhoIsLetIn: nobody but peers, with what they may do, and nothing is changed by others.
func TestWhoIsLetIn(t *testing.T) {
	a, b := pairOf(t)
	c := newHost(t, "c")
	a.g.begin()
	a.g.write(10)

	_, err := c.Join(t.Context(), b.addr, Token{Fingerprint: b.Identity.Fingerprint}, Peer{})
	require.ErrorContains(t, err, "the token is wrong, was used, or has expired")
	_, err = c.Join(t.Context(), b.addr, Token{Fingerprint: a.Identity.Fingerprint}, Peer{})
	require.ErrorContains(t, err, "is somebody between them?")
	token, err := b.Invite(Peer{}, time.Now().Add(-time.Second))
	require.NoError(t, err)
	_, err = c.Join(t.Context(), b.addr, token, Peer{})
	require.ErrorContains(t, err, "has expired")
	require.Len(t, b.Peers.All(), 1)
	require.Empty(t, c.Peers.All())

	// One that nobody knows, who knows the peer.
	require.NoError(t, c.Peers.Put(Peer{Name: "b", Fingerprint: b.Identity.Fingerprint, Address: b.addr}))
	conn, err := c.Open(t.Context(), "b", wire.RoleOffers)
	require.NoError(t, err, "it finds out with the first message")
	m, err := conn.Receive()
	require.NoError(t, err)
	require.Equal(t, wire.ReasonRights, m.(*wire.Refuse).Reason)
	require.NoError(t, conn.Close())

	// One that passes for another: its key is not that of the certificate's name.
	require.NoError(t, a.Peers.Put(Peer{Name: "z", Fingerprint: c.Identity.Fingerprint, Address: b.addr}))
	_, err = a.Open(t.Context(), "z", wire.RoleOffers)
	require.ErrorContains(t, err, "it is peer b")

	// A group that is not the peer's.
	one := b.Peers.All()[0]
	one.MaySend = []string{"db*"}
	require.NoError(t, b.Peers.Put(one))
	ctx := t.Context()
	conn, err = a.Open(ctx, "b", wire.RoleOffers)
	require.NoError(t, err)
	require.ErrorContains(t, Ship(ctx, conn, "web01", a.g, 1), "not yours")
	require.False(t, b.g.known)

	// A certificate that has expired.
	b.Peers.now = func() time.Time { return time.Now().Add(2 * certLife) }
	conn, err = a.Open(ctx, "b", wire.RoleOffers)
	require.NoError(t, err)
	m, err = conn.Receive()
	require.NoError(t, err)
	require.Contains(t, m.(*wire.Refuse).Text, "its certificate is valid from")
	require.NoError(t, conn.Close())
	require.GreaterOrEqual(t, b.Refused.Load(), int64(4))
}

// TestRevocation ends what is under way, and lets nobody in again.
func TestRevocation(t *testing.T) {
	a, b := pairOf(t)
	a.g.begin()
	a.g.write(10)
	stop := a.shipping(t, "b")
	eventually(t, a.g.hasAcked(10))
	require.NoError(t, b.Peers.Remove("a"))
	eventually(t, func() bool { b.mu.Lock(); defer b.mu.Unlock(); return len(b.errs) == 1 })
	require.Error(t, stop())
	again, err := LoadPeers(filepath.Join(b.dir, "peers.json"), nil, nil, writeFile)
	require.NoError(t, err)
	require.Empty(t, again.All())
	conn, err := a.Open(t.Context(), "b", wire.RoleOffers)
	require.NoError(t, err)
	_, err = conn.Receive()
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	require.ErrorIs(t, b.Peers.Remove("a"), errNoPeer)
	require.Error(t, a.Await(t.Context(), "b", func() { t.Error("whoever is refused must not dial again at once") }))
}

// TestARevokedPeer is not obeyed in what was read of it ahead, and what a stranger sends is not.
func TestARevokedPeer(t *testing.T) {
	a, b := pairOf(t)
	got := make(chan *Conn, 1)
	b.Offered = func(ctx context.Context, c *Conn, _ *wire.Offer) {
		c.net.ahead()
		got <- c
		<-ctx.Done()
	}
	c, err := a.Open(t.Context(), "b", wire.RoleOffers)
	require.NoError(t, err)
	defer c.Close()
	a.g.begin()
	require.NoError(t, c.Send(&wire.Offer{Group: "g", Reigns: a.g.reigns}))
	for range 3000 {
		require.NoError(t, c.Send(&wire.Beat{Head: 1, Time: time.Now()}))
	}
	theirs := <-got
	for range 200 {
		_, err = theirs.Receive()
		require.NoError(t, err)
	}
	require.NoError(t, b.Peers.Remove("a"))
	n := 0
	for ; err == nil; n++ {
		_, err = theirs.Receive()
	}
	require.Less(t, n, 300)

	ours, stranger := net.Pipe()
	go func() { _, _ = stranger.Write(make([]byte, 200<<10)) }() // until it is closed
	p := newPaced(ours, nil, t.Context())
	_, err = p.Read(make([]byte, 5))
	require.NoError(t, err)
	require.EqualValues(t, 5, p.received.Load())
	require.NoError(t, stranger.Close())
}

// slowConn takes a thousand bytes by each deadline.
type slowConn struct {
	net.Conn
	got []byte
}

func (c *slowConn) SetWriteDeadline(time.Time) error { return nil }
func (c *slowConn) Write(b []byte) (int, error) {
	n := min(len(b), 1000)
	if c.got = append(c.got, b[:n]...); n < len(b) {
		return n, os.ErrDeadlineExceeded
	}
	return n, nil
}

// TestASlowLink is not given up while something moves.
func TestASlowLink(t *testing.T) {
	var c slowConn
	p := newPaced(&c, nil, t.Context())
	p.fixed.Store(false)
	require.NoError(t, p.gather(true))
	want := bytes.Repeat([]byte("0123456789"), 5000)
	_, err := p.Write(want)
	require.NoError(t, err)
	require.NoError(t, p.gather(false))
	require.Equal(t, want, c.got)
	c.got = nil
	p.fixed.Store(true)
	n, err := p.Write(want)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded, "a deadline that stays is one")
	require.Equal(t, 1000, n)
}

// TestManyConnections of one peer are bounded, and of those that wait for an offer the oldest goes.
func TestManyConnections(t *testing.T) {
	a, b := pairOf(t)
	b.MaxConns = 20
	ctx := t.Context()
	var waiting []*Conn
	for range maxParked + 3 {
		p, err := a.Peers.Get("b")
		require.NoError(t, err)
		c, err := a.dial(ctx, p, wire.RoleWaits)
		require.NoError(t, err)
		defer c.Close()
		waiting = append(waiting, c)
		n := len(waiting)
		eventually(t, func() bool {
			b.Endpoint.mu.Lock()
			defer b.Endpoint.mu.Unlock()
			return len(b.parked["a"]) == min(n, maxParked)
		})
	}
	for _, c := range waiting[:3] {
		_, err := c.Receive()
		require.Error(t, err)
	}
	refused := b.Refused.Load()
	for range b.MaxConns {
		c, err := a.Open(ctx, "b", wire.RoleOffers)
		require.NoError(t, err)
		defer c.Close()
	}
	eventually(t, func() bool { return b.Refused.Load() > refused })
	b.Endpoint.mu.Lock()
	defer b.Endpoint.mu.Unlock()
	require.LessOrEqual(t, len(b.conns), b.MaxConns)
}
