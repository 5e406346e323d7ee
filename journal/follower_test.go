package journal

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// follower is another daemon that has the model's group, on a disk of its own.
type follower struct {
	fs     *vfs.MemFS
	store  *Store
	g      *Group
	disks  []DiskConfig
	synced record.LSN // what it has said is durable
	over   []overGap  // the gaps in what it has
}

// overGap is a gap that a follower was brought over, and the markers that its writer had pinned then.
type overGap struct {
	Gap
	pinned []record.LSN
}

func (m *model) openFollower(b *record.Beginning) {
	f := m.follower
	var err error
	f.store, err = Open("state", []GroupConfig{{Name: "g", Disks: f.disks, Begin: b, Retain: m.retain}}, m.options(f.fs))
	require.NoError(m.t, err)
	f.g = f.store.Groups()[0]
	state, err := f.g.State()
	require.NoError(m.t, err)
	require.Equal(m.t, "active", state)
	require.True(m.t, f.g.Follows())
	_, err = f.g.Verify(m.t.Context(), VerifyOptions{}, func(x Finding) { m.t.Fatalf("verify finds %+v", x) })
	require.NoError(m.t, err)
}

func (m *model) dropFollower() {
	if m.follower != nil {
		require.NoError(m.t, m.follower.store.Abandon())
		m.follower = nil
	}
}

// seed writes what a disk of the model holds as of an LSN to a backing of the follower's.
func (m *model) seed(d int, lsn record.LSN) DiskConfig {
	c := m.diskConfig(d)
	v, err := m.g.View(m.disk(d), lsn)
	require.NoError(m.t, err)
	defer v.Close()
	b := make([]byte, v.Size())
	require.NoError(m.t, v.ReadAt(b, 0, false))
	m.setFlushed(max(m.flushed, lsn))
	m.putBacking(m.follower.fs, d, b)
	return c
}

// beginFollower has another daemon follow the group from some LSN on, at which every disk's content is known.
func (m *model) beginFollower() {
	lsn := m.anyLSN()
	for d := range m.sizes {
		if !m.out[d] {
			lsn = max(lsn, m.addedAt[d], m.since[d])
		}
	}
	for _, left := range m.g.Removed() {
		lsn = max(lsn, left) // what it held before can not be read any more
	}
	lsn = min(lsn, m.g.Head()) // see membersAt
	m.follower = &follower{fs: vfs.NewCrashableMem()}
	b, err := m.g.Beginning(lsn)
	require.NoError(m.t, err)
	m.setFlushed(max(m.flushed, lsn))
	for d := range m.sizes {
		if !m.out[d] {
			m.follower.disks = append(m.follower.disks, m.seed(d, lsn))
		}
	}
	m.note("a follower begins at %d", lsn)
	m.openFollower(&b)
	require.Equal(m.t, lsn, m.follower.g.Head())
	require.Equal(m.t, lsn, m.follower.g.Horizon())
	m.follower.synced = lsn
}

// ship has the follower receive some of what it lacks, and look at what it has.
func (m *model) ship() {
	m.sync()
	if m.mu.Lock(); m.clone != nil {
		m.mu.Unlock()
		return // the crash came before
	}
	m.mu.Unlock()
	if m.follower != nil && !m.cross() {
		m.dropFollower()
	}
	if m.follower == nil {
		m.beginFollower()
	}
	f := m.follower
	if _, open := f.g.Bridging(); open {
		return
	}
	require.LessOrEqual(m.t, f.g.Head(), m.g.Durable(), "it has what its writer may lose")
	feed, err := m.g.Feed(f.g.Head() + 1)
	require.NoError(m.t, err)
	defer feed.Close()
	for runs := m.rng.IntN(4); runs >= 0 && f.g.Head() < m.g.Durable(); runs-- {
		run, err := next(m.t, feed, m.rng.IntN(128<<10))
		require.NoError(m.t, err)
		if !m.receive(run) {
			m.dropFollower()
			return
		}
		require.Equal(m.t, run.Last, f.g.Head())
	}
	m.note("the follower has %d", f.g.Head())
	if m.work(f); m.follower != nil {
		m.checkFollower()
	}
}

// receive reports whether the follower can go on.
func (m *model) receive(run record.Run) bool {
	f := m.follower
	for {
		err := f.g.Receive(run)
		if !errors.Is(err, ErrDetached) {
			if err != nil {
				require.ErrorIs(m.t, err, ErrDiscontinuity)
			}
			return err == nil
		}
		i := slices.IndexFunc(run.Disks, func(t record.Disk) bool {
			return !slices.ContainsFunc(f.disks, func(c DiskConfig) bool { return c.Name == t.Name })
		})
		if i < 0 {
			return false // it was removed, and has come again
		}
		t, d := run.Disks[i], 0
		_, err = fmt.Sscanf(t.Name, "d%d", &d)
		require.NoError(m.t, err)
		if m.out[d] || m.since[d] > f.g.Head() || m.addedAt[d] > f.g.Head() {
			return false // what it was is not known any more
		}
		m.note("the follower adopts disk %d at %d", d, f.g.Head())
		c := m.seed(d, f.g.Head())
		require.NoError(m.t, f.g.Adopt(c, t))
		f.disks = append(f.disks, c)
	}
}

// work is what a follower does beside: it syncs, indexes, applies and expires, is closed, or crashes.
func (m *model) work(f *follower) {
	g := f.g
	sync := func() {
		require.NoError(m.t, g.Sync())
		f.synced = g.Head()
	}
	switch m.rng.IntN(10) {
	case 8, 9:
		m.stray(f)
	case 0:
		sync()
	case 1:
		sync()
		require.NoError(m.t, g.Index())
	case 2:
		require.NoError(m.t, g.Apply())
		f.synced = max(f.synced, g.Durable())
	case 3:
		m.expireIn(g)
		f.synced = max(f.synced, g.Durable())
	case 4, 5:
		percent, head := survivals[m.rng.IntN(len(survivals))], g.Head()
		clone := f.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rand.New(rand.NewPCG(m.rng.Uint64(), 3))})
		require.NoError(m.t, f.store.Abandon())
		f.fs = clone
		m.openFollower(nil)
		m.note("the follower crashes: head %d of %d, at least %d", f.g.Head(), head, f.synced)
		require.GreaterOrEqual(m.t, f.g.Head(), f.synced)
		require.LessOrEqual(m.t, f.g.Head(), head)
		if percent == 100 {
			require.Equal(m.t, head, f.g.Head(), "a daemon that is killed loses nothing")
		}
	case 6:
		require.NoError(m.t, f.store.Close())
		m.openFollower(nil)
	case 7:
		require.NoError(m.t, f.store.Close())
		require.NoError(m.t, f.fs.RemoveAll("state/index"))
		m.openFollower(nil)
	}
}

// stray has the follower write the group itself for a while, as if it had been failed over to, and come back to its writer: by a rewind,
// which a crash may cut off.
func (m *model) stray(f *follower) {
	require.NoError(m.t, f.g.Sync())
	common := f.g.Head()
	f.synced = common
	reigns := f.g.Reigns()
	_, err := f.g.Lead(reigns.Epoch() + 1)
	require.NoError(m.t, err)
	disks := f.g.Disks()
	for n := m.rng.IntN(80); n > 0 && len(disks) > 0; n-- {
		d := disks[m.rng.IntN(len(disks))]
		op := Op{Kind: record.KindWrite, Disk: d, Ext: record.Extent{Off: m.rng.Int64N(d.Size/record.BlockSize+1) * record.BlockSize}}
		if op.Ext.Len = min(int64(1+m.rng.IntN(8))*record.BlockSize, d.Size-op.Ext.Off); op.Ext.Len <= 0 {
			continue
		}
		switch m.rng.IntN(6) {
		case 0:
			op.Kind = record.KindTrim
		case 1:
			op.Kind = record.KindZero
		default:
			op.Data = make([]byte, op.Ext.Len)
			m.fill(op.Data)
		}
		require.NoError(m.t, f.g.Append([]Op{op}))
		switch m.rng.IntN(20) {
		case 0:
			require.NoError(m.t, f.g.Apply())
		case 1:
			_, err := f.g.Mark(record.Marker{Label: fmt.Sprintf("stray-%d", m.rng.Uint64()), Asked: record.Crash, Consistency: record.Crash, Pinned: m.rng.IntN(2) == 0})
			require.NoError(m.t, err)
		case 2:
			_, err := f.g.Define("stray", []byte(fmt.Sprint(m.rng.Uint64())))
			require.NoError(m.t, err)
		case 3:
			_, err := f.g.Expire(1)
			require.NoError(m.t, err)
		case 4:
			require.NoError(m.t, f.g.Checkpoint())
		}
	}
	require.NoError(m.t, f.g.Follow())
	m.note("the follower has strayed from %d to %d, horizon %d", common, f.g.Head(), f.g.Horizon())
	if f.g.expiredTo() > common {
		require.ErrorIs(m.t, f.store.Rewind("g", common), ErrNoPoint)
		m.dropFollower()
		return
	}
	m.rewind(f, common)
	require.Equal(m.t, common, f.g.Head())
	begun := func(all record.Reigns) record.Reigns { // those that have a record
		return slices.DeleteFunc(slices.Clone(all), func(r record.Reign) bool { return r.First > max(common, 1) })
	}
	require.Equal(m.t, begun(reigns), begun(f.g.Reigns()))
	require.True(m.t, f.g.Follows())
}

// crashPoint takes a picture of a disk as a crash would leave it, before one of the writes to groups and backings.
type crashPoint struct {
	mem     *vfs.MemFS
	percent int
	seed    uint64

	mu    sync.Mutex // guards what follows: databases and spares have goroutines of their own
	steps int        // until then; 0: there is no crash
	clone *vfs.MemFS
}

func (m *model) crashPoint(mem *vfs.MemFS) *crashPoint {
	return &crashPoint{mem: mem, percent: survivals[m.rng.IntN(len(survivals))], seed: m.rng.Uint64()}
}

func (c *crashPoint) MaybeError(op errorfs.Op) error {
	if !isWrite(op.Kind) || strings.Contains(op.Path, "index") { // the database's own crashes are tested elsewhere
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.steps > 0 {
		if c.steps--; c.steps == 0 {
			c.clone = c.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: c.percent, RNG: rand.New(rand.NewPCG(c.seed, 3))})
		}
	}
	return nil
}

func (c *crashPoint) String() string { return "(crash picture)" }

// in sets how many writes are left.
func (c *crashPoint) in(steps int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.steps = steps
}

// taken is the picture; nil: it did not come to that. None is taken any more.
func (c *crashPoint) taken() *vfs.MemFS {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.steps = 0
	return c.clone
}

func (m *model) openOn(f *follower, c *crashPoint) *Store {
	s, err := Open("state", []GroupConfig{{Name: "g", Disks: f.disks, Retain: m.retain}}, m.options(errorfs.Wrap(c.mem, c)))
	require.NoError(m.t, err)
	return s
}

// rewind takes the follower back, with a crash at some step or without.
func (m *model) rewind(f *follower, to record.LSN) {
	require.NoError(m.t, f.store.Close())
	c := m.crashPoint(f.fs)
	f.store = m.openOn(f, c)
	c.in(m.rng.IntN(120))
	require.NoError(m.t, f.store.Rewind("g", to))
	clone := c.taken()
	if clone == nil {
		m.note("it goes back to %d", to)
		f.g = f.store.Groups()[0]
		require.NoError(m.t, f.store.Close())
		m.openFollower(nil)
		return
	}
	require.NoError(m.t, f.store.Abandon())
	f.fs = clone
	m.note("it crashes on its way back to %d", to)
	for range m.rng.IntN(4) {
		if !m.resume(f) {
			break
		}
	}
	if m.rng.IntN(8) == 0 {
		require.NoError(m.t, f.fs.RemoveAll("state/index"))
	}
	m.openFollower(nil)
	if r := f.g.Reigns(); f.g.Head() != to || len(r) > 1 && r[len(r)-1].First > to { // the crash came before the note
		require.NoError(m.t, f.store.Rewind("g", to))
		f.g = f.store.Groups()[0]
	}
}

// resume opens the follower, as its daemon does that goes on with a rewind. It reports whether that crashed again.
func (m *model) resume(f *follower) bool {
	if m.rng.IntN(8) == 0 {
		require.NoError(m.t, f.fs.RemoveAll("state/index"))
	}
	c := m.crashPoint(f.fs)
	c.in(1 + m.rng.IntN(60))
	s := m.openOn(f, c)
	clone := c.taken()
	require.NoError(m.t, s.Abandon())
	if clone == nil {
		return false
	}
	f.fs = clone
	m.note("and again")
	return true
}

// checkFollower compares a view of each disk, and the notes.
func (m *model) checkFollower() {
	g := m.follower.g
	some := g.Viewable()
	r := some[m.rng.IntN(len(some))]
	lsn := r.First + record.LSN(m.rng.Uint64N(uint64(r.Last-r.First)+1))
	for _, d := range g.Disks() {
		n := 0
		_, err := fmt.Sscanf(d.Name, "d%d", &n)
		require.NoError(m.t, err)
		v, err := g.View(d, lsn)
		if lsn < d.Added {
			require.ErrorIs(m.t, err, ErrNoPoint)
			continue
		}
		require.NoError(m.t, err)
		got := make([]byte, d.Size)
		require.NoError(m.t, v.ReadAt(got, 0, false))
		m.equal(m.image(n, lsn), got, 0, "follower's view at %d of disk %d", lsn, n)
		v.Close()
		if _, open := g.Bridging(); !open {
			require.NoError(m.t, d.ReadAt(got, 0, false))
			m.equal(m.image(n, g.Head()), got, 0, "follower's disk %d", n)
		}
		require.ErrorIs(m.t, g.Append([]Op{{Kind: record.KindTrim, Disk: d, Ext: record.Extent{Len: record.BlockSize}}}), ErrFollows)
	}
	defs, err := g.Definitions(lsn)
	require.NoError(m.t, err)
	want := m.defined(lsn)
	require.Len(m.t, defs, len(want), "follower's definitions at %d", lsn)
	for _, d := range defs {
		require.Equal(m.t, want[d.Name].Content, d.Content)
		require.Equal(m.t, want[d.Name].Since, d.Since)
	}
	markers, err := g.Markers()
	require.NoError(m.t, err)
	m.follower.synced = max(m.follower.synced, g.Durable())
	wantMarkers := markersOf(m.eventsOf(m.follower), g.Newest())
	n := 0
	for lsn, mk := range wantMarkers {
		if (lsn > g.expiredTo() || g.isKept(lsn)) && !mk.Pending {
			n++
		}
	}
	require.Len(m.t, markers, n)
	for _, mk := range markers {
		w := wantMarkers[mk.LSN]
		w.Time = mk.Time
		require.Equal(m.t, w, mk)
	}
}

// failOver has the follower lead, and the model go on with it. What it has not received is lost.
func (m *model) failOver() {
	f := m.follower
	if f == nil {
		return
	}
	m.closeViews()
	m.mu.Lock()
	m.arm, m.clone = 0, nil
	m.mu.Unlock()
	if after, open := f.g.Bridging(); open {
		_, err := f.g.Lead(f.g.Reigns().Epoch() + 1)
		require.ErrorContains(m.t, err, "rewind it to there first")
		require.NoError(m.t, f.g.Sync())
		m.rewind(f, after)
	}
	head := f.g.Head()
	was := f.g.Reigns()
	_, err := f.g.Lead(was.Epoch())
	require.ErrorContains(m.t, err, "has had epoch")
	known := f.g.disks.Load()
	in := f.g.Disks()
	require.NoError(m.t, f.store.Close())
	m.note("fail over at %d to the follower, which has %d", len(m.changes), head)
	require.NoError(m.t, m.store.Abandon())
	m.fs, m.follower = f.fs, nil
	m.changes = m.changes[:head]
	m.events = slices.DeleteFunc(m.eventsOf(f), func(e event) bool { return e.lsn > head })
	m.events = append(m.events, left(markersOf(m.events, head), head)...)
	for d := range m.sizes {
		name := fmt.Sprintf("d%d", d)
		delete(m.since, d)
		delete(m.out, d)
		if !slices.ContainsFunc(in, func(o *disk.Disk) bool { return o.Name == name }) {
			m.out[d] = true
		}
		never := known.named(name) == nil // or in a gap that it went back before: its backing is of another disk
		if never {
			m.forget(d)
		}
		_, err := m.fs.Stat(m.diskConfig(d).Backing)
		inGap := m.out[d] && slices.ContainsFunc(f.g.Gaps(), func(gap Gap) bool {
			i := slices.IndexFunc(known.table, func(t record.Disk) bool { return t.Name == name })
			return i >= 0 && gap.After < known.table[i].Removed && known.table[i].Removed <= gap.Until // its backing is of before
		})
		if err != nil || inGap || never {
			m.putBacking(m.fs, d, m.image(d, head))
		}
	}
	m.lead(was)
}

// forget has a disk be one that the group never had.
func (m *model) forget(d int) {
	m.fill(m.base[d])
	for i := range m.changes {
		if m.changes[i].disk == d {
			m.changes[i].data = nil
		}
	}
}

func (m *model) putBacking(fs vfs.FS, d int, content []byte) {
	f, err := fs.OpenReadWrite(m.diskConfig(d).Backing, vfs.WriteCategoryUnspecified)
	require.NoError(m.t, err)
	_, err = f.WriteAt(content, 0)
	require.NoError(m.t, errors.Join(err, f.Sync(), f.Close(), syncDirs(fs, "")))
}

// lead opens the model's store, whose group is another daemon's, and has it lead.
func (m *model) lead(was record.Reigns) {
	m.open()
	r, err := m.g.Lead(was.Epoch() + 1)
	require.NoError(m.t, err)
	require.EqualValues(m.t, len(m.changes)+1, r.First)
	require.False(m.t, m.g.Follows())
	common, err := was.Common(r.First+100, m.g.Reigns(), m.g.Head())
	require.NoError(m.t, err)
	require.Equal(m.t, r.First-1, common)
	for d := range m.sizes {
		if m.out[d] {
			continue
		}
		m.addedAt[d] = m.disk(d).Added
	}
	for record.LSN(len(m.changes)) < m.g.Head() {
		m.changes = append(m.changes, change{}) // it concludes a cut
	}
	m.setFlushed(m.g.Head())
	m.answered()
	m.checkNotes()
	m.checkLive()
}
