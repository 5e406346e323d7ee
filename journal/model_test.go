package journal

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/restore"
)

var (
	modelSeeds = flag.Int("model.seeds", 32, "how many seeds the model test runs")
	modelSeed  = flag.Uint64("model.seed", 0, "run this seed alone, and say what it does")
	modelSteps = flag.Int("model.steps", 120, "steps of each seed")
)

// TestModel drives a group on a simulated disk with random operations and
// crashes, and compares it with a list of what was written.
//
// Look at the outcomes of a crash: records up to the last Sync must be there,
// later ones may be, but only as a prefix, and nothing else may. A process that
// is killed (the whole page cache survives) loses nothing at all.
//
// A failing seed is run again with -model.seed=N -v.
func TestModel(t *testing.T) {
	if *modelSeed != 0 {
		runModel(t, *modelSeed)
		return
	}
	var mu sync.Mutex // guards what follows
	reached := map[string]int{}
	t.Run("seeds", func(t *testing.T) {
		for seed := range uint64(*modelSeeds) {
			t.Run(fmt.Sprint(seed+1), func(t *testing.T) {
				t.Parallel()
				here := runModel(t, seed+1)
				mu.Lock()
				defer mu.Unlock()
				for what, n := range here {
					reached[what] += n
				}
			})
		}
	})
	for _, what := range []string{"crossed", "stopped", "gone back", "crashed on the way", "crashed at the end", "came in a gap", "kept", "thinned", "cleaned", "compact", "held"} {
		require.Positive(t, reached[what], "no seed came to: %s", what)
	}
}

// change is a record as the model keeps it.
type change struct {
	disk int
	off  int64
	data []byte // nil for markers
}

type model struct {
	t   *testing.T
	rng *rand.Rand
	log *zap.Logger

	fs    *vfs.MemFS
	store *Store
	g     *Group
	sizes []int64

	clock      clock
	retain     retain.Policy
	checkpoint int64    // bytes between checkpoints within a round
	base       [][]byte // what the backings held before
	views      []heldView

	changes []change // changes[i] is LSN i+1
	events  []event  // what records that change no disk did, by ascending LSN

	out      map[int]bool       // disks that were removed from the group
	addedAt  map[int]record.LSN // of disks that came to it later
	since    map[int]record.LSN // of disks whose backing may have been changed while they were out
	removing int                // the disk that a RemoveDisk may have left half way, or -1

	follower *follower // another daemon's copy of the group, or nil
	reached  map[string]int

	mu      sync.Mutex // the injector runs in Pebble's goroutines too
	flushed record.LSN
	// recorded is the last one that was answered.
	recorded record.LSN
	arm      int // crash at this many file operations from now; 0: disarmed
	percent  int
	tear     uint64 // seed of what survives
	clone    *vfs.MemFS
	atClone  record.LSN // what had to be there when the clone was made
}

// event is what a record does to markers and definitions.
type event struct {
	lsn    record.LSN
	mark   func(map[record.LSN]record.Marker)
	or     func(map[record.LSN]record.Marker) // what it may do instead, if a crash came before it
	define *record.Definition
}

type heldView struct {
	v    *View
	disk int
}

// Kinds of crash: how much of what was not synced survives.
var survivals = []int{0, 30, 70, 100}

func runModel(t *testing.T, seed uint64) (reached map[string]int) {
	m := &model{t: t, rng: rand.New(rand.NewPCG(seed, 1)), out: map[int]bool{}, addedAt: map[int]record.LSN{}, since: map[int]record.LSN{}, removing: -1, log: zap.NewNop(), reached: map[string]int{}}
	if *modelSeed != 0 {
		m.log = zaptest.NewLogger(t)
	}
	m.fs = vfs.NewCrashableMem()
	m.checkpoint = m.rng.Int64N(1 << 20)
	m.clock.at.Store(int64(time.Hour))
	if seed%3 > 0 {
		m.retain = retain.Policy{Tiers: []retain.Tier{{Every: time.Second, For: time.Duration(3+m.rng.IntN(12)) * time.Second}, {Every: 5 * time.Second, For: time.Duration(20+m.rng.IntN(60)) * time.Second}}, Markers: m.rng.IntN(3)}
	}
	m.sizes = []int64{300*record.BlockSize + 512, 20 * record.BlockSize}
	if seed%40 == 0 {
		// One with room for the largest units of index and overlay.
		m.sizes = append(m.sizes, 36<<20)
	}
	for i, size := range m.sizes {
		m.makeBacking(i, size)
	}
	m.open()
	for range *modelSteps {
		m.step()
		if t.Failed() {
			return nil
		}
	}
	m.closeViews()
	m.ship()
	m.reopen()
	m.checkNotes()
	m.checkBackings()
	require.NoError(t, m.store.Close())
	m.dropFollower()
	return m.reached
}

func (m *model) makeBacking(i int, size int64) {
	base := make([]byte, size)
	for off := int64(0); off < size; off += record.BlockSize {
		if m.rng.IntN(3) > 0 {
			m.fill(base[off:min(size, off+record.BlockSize)])
		}
	}
	m.base = append(m.base, base)
	f, err := m.fs.OpenReadWrite(fmt.Sprintf("disk%d", i), vfs.WriteCategoryUnspecified)
	require.NoError(m.t, err)
	_, err = f.WriteAt(base, 0)
	require.NoError(m.t, err)
	require.NoError(m.t, f.Sync())
	require.NoError(m.t, f.Close())
	root, err := m.fs.OpenDir("")
	require.NoError(m.t, err)
	require.NoError(m.t, root.Sync())
	require.NoError(m.t, root.Close())
}

func (m *model) fill(b []byte) {
	for i := range b {
		b[i] = byte(m.rng.Uint32())
	}
}

// MaybeError implements errorfs.Injector: it takes the crash's picture, and lets every operation pass.
func (m *model) MaybeError(op errorfs.Op) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.arm == 0 || !isWrite(op.Kind) {
		return nil
	}
	if m.arm--; m.arm == 0 {
		m.clone = m.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: m.percent, RNG: rand.New(rand.NewPCG(m.tear, 2))})
		if m.atClone = m.flushed; m.percent == 100 {
			m.atClone = max(m.flushed, m.recorded)
		}
	}
	return nil
}

func (m *model) String() string { return "(crash picture)" }

func isWrite(k errorfs.OpKind) bool {
	switch k {
	case errorfs.OpFileWrite, errorfs.OpFileWriteAt, errorfs.OpFileSync, errorfs.OpFileSyncData, errorfs.OpFileSyncTo,
		errorfs.OpCreate, errorfs.OpRename, errorfs.OpRemove, errorfs.OpFileClose, errorfs.OpLink, errorfs.OpMkdirAll:
		return true
	}
	return false
}

func (m *model) open() {
	var err error
	o := m.options(errorfs.Wrap(m.fs, m))
	m.store, err = Open("state", []GroupConfig{m.config()}, o)
	if m.removing >= 0 && err != nil {
		require.ErrorContains(m.t, err, "configure it again")
		delete(m.out, m.removing)
		m.store, err = Open("state", []GroupConfig{m.config()}, o)
	}
	m.removing = -1
	require.NoError(m.t, err)
	m.g = m.store.Groups()[0]
	state, err := m.g.State()
	require.NoError(m.t, err)
	require.Equal(m.t, "active", state)
}

func (m *model) options(fs vfs.FS) Options {
	return Options{FS: fs, Log: m.log, Now: m.clock.time, SegmentSize: 64 << 10, Unapplied: 1 << 30, checkpointBytes: m.checkpoint}
}

// clock is one that hardly moves between two steps. Databases have goroutines of their own.
type clock struct{ at atomic.Int64 }

func (c *clock) time() time.Time { return time.Unix(0, c.at.Add(1)) }

func (m *model) config() GroupConfig {
	gc := GroupConfig{Name: "g", Retain: m.retain}
	for i := range m.sizes {
		if m.out[i] {
			continue
		}
		gc.Disks = append(gc.Disks, DiskConfig{fmt.Sprintf("d%d", i), fmt.Sprintf("disk%d", i)})
	}
	return gc
}

func (m *model) step() {
	m.clock.at.Add(int64(m.rng.ExpFloat64() * float64(time.Second/2)))
	if m.rng.IntN(20) == 0 {
		m.clock.at.Add(int64(m.rng.IntN(60)) * int64(time.Second))
	}
	switch n := m.rng.IntN(100); {
	case n < 45:
		m.write()
	case n < 52:
		m.sync()
	case n < 56:
		m.mark()
	case n < 58:
		m.amend()
	case n < 60:
		m.define()
	case n < 61:
		if m.rng.IntN(2) == 0 {
			m.rollBack()
		} else {
			m.checkNotes()
		}
	case n < 62:
		if m.rng.IntN(2) == 0 {
			m.join()
		} else {
			m.failOver()
		}
	case n < 69:
		m.checkView()
	case n < 70:
		m.checkFeed()
	case n < 75:
		m.checkLive()
	case n < 80:
		require.NoError(m.t, m.g.Index())
	case n < 82:
		m.ship()
	case n < 87:
		require.NoError(m.t, m.g.Apply())
		m.note("apply")
	case n < 89:
		require.NoError(m.t, m.g.Checkpoint())
		m.note("checkpoint")
		m.thin(m.g)
	case n < 92:
		m.expire()
	case n < 93:
		m.holdView()
	case n < 94:
		m.closeViews()
		m.thin(m.g)
	case n < 98:
		m.armCrash()
	case n < 99:
		m.reopen()
	default:
		m.loseIndex()
	}
	if m.mu.Lock(); m.clone != nil {
		m.mu.Unlock()
		m.crash()
		return
	}
	m.mu.Unlock()
}

func (m *model) note(format string, args ...any) {
	if *modelSeed != 0 {
		m.t.Logf("head %d: "+format, append([]any{len(m.changes)}, args...)...)
	}
}

func (m *model) extent(d int) record.Extent {
	size := m.sizes[d]
	var e record.Extent
	if m.rng.IntN(3) == 0 {
		e.Off = m.rng.Int64N(size)
		e.Len = 1 + m.rng.Int64N(min(size-e.Off, 3*record.BlockSize))
	} else {
		blocks := size / record.BlockSize
		n := int64(1)
		switch m.rng.IntN(4) {
		case 0:
			n = 1 + m.rng.Int64N(40)
		case 1:
			n = 1 + m.rng.Int64N(min(blocks, 400))
		}
		first := m.rng.Int64N(blocks)
		if m.rng.IntN(2) == 0 {
			first &^= 15
		}
		e = record.Extent{Off: first * record.BlockSize, Len: min(n, blocks-first) * record.BlockSize}
	}
	return e
}

func (m *model) write() {
	var ops []Op
	for range 1 + m.rng.IntN(3) {
		d := m.anyDisk()
		op := Op{Kind: record.KindWrite, Disk: m.disk(d), Ext: m.extent(d)}
		large := m.sizes[d] > 8<<20 && m.rng.IntN(3) == 0
		if large {
			op.Ext = record.Extent{Off: m.rng.Int64N(8 << 20), Len: 20<<20 + m.rng.Int64N(8<<20)}
		}
		data := make([]byte, op.Ext.Len)
		switch n := m.rng.IntN(6); {
		case n == 0 || large:
			op.Kind = record.KindTrim
		case n == 1:
			op.Kind = record.KindZero
		default:
			m.fill(data[:min(len(data), 64)])
			for i := 64; i < len(data); i += copy(data[i:], data[:i]) {
			}
			op.Data = data
		}
		ops = append(ops, op)
		before := m.g.Head()
		require.NoError(m.t, m.g.Append(ops))
		ops = ops[:0]
		m.note("%v disk %d %v", op.Kind, d, op.Ext)
		// An operation that is not whole blocks may be several records: the
		// first of them all but the last show a part of it.
		m.record(before, d, op, data)
	}
}

// record adds what an operation's records, LSN before+1 to the head, did.
func (m *model) record(before record.LSN, d int, op Op, data []byte) {
	parts := []record.Extent{op.Ext}
	if op.Kind != record.KindWrite && !op.Ext.Aligned(m.sizes[d]) {
		edges, middle := splitEdges(op.Ext, m.sizes[d])
		parts = edges
		if middle.Len > 0 {
			parts = append(parts, middle)
		}
	}
	require.Equal(m.t, int(m.g.Head()-before), len(parts))
	for _, p := range parts {
		m.changes = append(m.changes, change{d, p.Off, data[p.Off-op.Ext.Off:][:p.Len]})
	}
	m.answered()
}

func (m *model) sync() {
	require.NoError(m.t, m.g.Sync())
	m.note("sync")
	m.setFlushed(record.LSN(len(m.changes)))
}

func (m *model) setFlushed(lsn record.LSN) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushed = lsn
}

// answered notes that everything so far is with the kernel.
func (m *model) answered() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.recorded = record.LSN(len(m.changes))
}

// note adds a record that changes no disk.
func (m *model) noted(e event) {
	m.changes = append(m.changes, change{})
	e.lsn = record.LSN(len(m.changes))
	m.events = append(m.events, e)
	require.Equal(m.t, e.lsn, m.g.Head())
	m.setFlushed(e.lsn)
}

// markers are what the group's markers must be now.
func (m *model) markers() map[record.LSN]record.Marker {
	all := markersOf(m.events, record.MaxLSN)
	maps.DeleteFunc(all, func(lsn record.LSN, _ record.Marker) bool { return lsn <= m.g.expiredTo() && !m.g.isKept(lsn) })
	return all
}

// markersOf is what records up to an LSN say of markers.
func markersOf(events []event, lsn record.LSN) map[record.LSN]record.Marker {
	all := map[record.LSN]record.Marker{}
	for _, e := range events {
		if e.mark == nil || e.lsn > lsn {
			continue
		}
		e.mark(all)
		if mk, ok := all[e.lsn]; ok {
			// One that had its label was deleted, if only in a gap.
			maps.DeleteFunc(all, func(lsn record.LSN, old record.Marker) bool { return lsn < e.lsn && old.Label == mk.Label })
		}
	}
	return all
}

func (m *model) labelled(label string) (record.Marker, bool) {
	for _, mk := range m.markers() {
		if mk.Label == label {
			return mk, true
		}
	}
	return record.Marker{}, false
}

func (m *model) mark() {
	mk := record.Marker{Label: fmt.Sprintf("m%d", m.rng.IntN(30)), By: "test", Asked: record.Crash, Pinned: m.rng.IntN(20) == 0}
	take, cut := m.g.Mark, m.rng.IntN(2) == 0
	if cut {
		mk.Asked, mk.OrCrash, take = record.Application, m.rng.IntN(2) == 0, m.g.Cut
	}
	got, err := take(mk)
	if _, taken := m.labelled(mk.Label); taken {
		require.ErrorIs(m.t, err, ErrLabelInUse)
		return
	}
	require.NoError(m.t, err)
	mk = got
	m.noted(event{mark: func(all map[record.LSN]record.Marker) { all[mk.LSN] = mk }})
	m.note("mark %s, cut %v", mk.Label, cut)
	if cut {
		m.conclude(mk)
	}
}

// conclude says what became of a cut. After a crash between, the next start does.
func (m *model) conclude(mk record.Marker) {
	_, err := m.g.Resolve(record.Point{Form: record.FormLabel, Label: mk.Label})
	require.ErrorIs(m.t, err, ErrNoPoint)
	end, left := mk, mk
	end.Pending, left.Pending = false, false
	left.Note = "whether the guests were frozen is not known: the cut was not brought to its end"
	end.Consistency, end.Frozen = record.Consistency(1+m.rng.IntN(3)), 5
	kept, err := m.g.Conclude(end)
	require.NoError(m.t, err)
	require.Equal(m.t, kept, mk.OrCrash || end.Consistency == record.Application)
	becomes := func(end record.Marker) func(map[record.LSN]record.Marker) {
		return func(all map[record.LSN]record.Marker) {
			if all[end.LSN] = end; end.Consistency < end.Asked && !end.OrCrash {
				delete(all, end.LSN)
			}
		}
	}
	m.noted(event{mark: becomes(end), or: becomes(left)})
}

func (m *model) amend() {
	label, text := fmt.Sprintf("m%d", m.rng.IntN(30)), fmt.Sprint("text ", m.rng.Uint32())
	if all := m.markers(); len(all) > 0 && m.rng.IntN(2) == 0 {
		lsns := slices.Sorted(maps.Keys(all))
		label = all[lsns[m.rng.IntN(len(lsns))]].Label
	}
	mk, ok := m.labelled(label)
	remove := false
	var err error
	held := ok && mk.IsHeld(m.g.o.Now())
	switch m.rng.IntN(6) {
	case 0:
		mk.Description = text
		_, err = m.g.Describe(label, text)
	case 1:
		mk.Pinned = true
		_, err = m.g.Pin(label)
	case 2, 3:
		mk.Pinned = false
		_, err = m.g.Unpin(label)
	case 4:
		until := m.g.o.Now().Add(time.Duration(m.rng.IntN(600)+1) * time.Second).UTC()
		if _, err = m.g.HoldUntil(label, until); ok && until.Before(mk.Held) {
			require.ErrorIs(m.t, err, ErrHeld)
			return
		}
		mk.Held = until
		if ok && !mk.Pinned {
			_, derr := m.g.Delete(label)
			require.ErrorIs(m.t, derr, ErrHeld)
			m.reached["held"]++
		}
	default:
		_, err = m.g.Delete(label)
		if ok && mk.Pinned {
			require.ErrorIs(m.t, err, ErrPinned)
			return
		}
		if held {
			require.ErrorIs(m.t, err, ErrHeld)
			return
		}
		remove = true
	}
	if !ok {
		require.ErrorIs(m.t, err, ErrNoPoint)
		return
	}
	require.NoError(m.t, err)
	m.note("amend %s", label)
	m.noted(event{mark: func(all map[record.LSN]record.Marker) {
		if all[mk.LSN] = mk; remove {
			delete(all, mk.LSN)
		}
	}})
}

func (m *model) define() {
	d := record.Definition{Name: fmt.Sprintf("n%d", m.rng.IntN(2)), Gone: m.rng.IntN(4) == 0}
	var changed bool
	var err error
	was, ok := m.defined(record.MaxLSN)[d.Name]
	if d.Gone {
		changed, err = m.g.Undefine(d.Name)
	} else {
		d.Content = []byte(fmt.Sprint("content ", m.rng.IntN(4)))
		changed, err = m.g.Define(d.Name, d.Content)
	}
	require.NoError(m.t, err)
	require.Equal(m.t, d.Gone && ok || !d.Gone && (!ok || !bytes.Equal(was.Content, d.Content)), changed)
	if changed {
		m.note("define %s, gone %v", d.Name, d.Gone)
		m.noted(event{define: &d})
	}
}

// defined is what must be in force at an LSN.
func (m *model) defined(at record.LSN) map[string]record.Definition {
	all := map[string]record.Definition{}
	for _, e := range m.events {
		if e.define == nil || e.lsn > at {
			continue
		}
		d := *e.define
		if d.Since = e.lsn; d.Gone {
			delete(all, d.Name)
		} else {
			all[d.Name] = d
		}
	}
	return all
}

// checkNotes compares markers, and the definitions at some LSN; all disks at a marker are one cut.
func (m *model) checkNotes() {
	want := m.markers()
	got, err := m.g.Markers()
	require.NoError(m.t, err)
	require.Len(m.t, got, len(want))
	if len(got) > 0 {
		m.setFlushed(record.LSN(len(m.changes)))
	}
	for _, mk := range got {
		w := want[mk.LSN]
		w.Time = mk.Time
		require.Equal(m.t, w, mk)
		lsn, err := m.g.Resolve(record.Point{Form: record.FormLabel, Label: mk.Label})
		require.NoError(m.t, err)
		require.Equal(m.t, mk.LSN, lsn)
	}
	at := m.anyLSN()
	if kept := m.g.KeptPoints(); len(kept) > 0 && m.rng.IntN(2) == 0 {
		at = kept[m.rng.IntN(len(kept))].LSN
	}
	defs, err := m.g.Definitions(at)
	require.NoError(m.t, err)
	wantDefs := m.defined(at)
	require.Len(m.t, defs, len(wantDefs), "at %d", at)
	for _, d := range defs {
		w := wantDefs[d.Name]
		require.Equal(m.t, w.Since, d.Since)
		require.Equal(m.t, w.Content, d.Content)
	}
	if len(got) > 0 {
		lsn := got[m.rng.IntN(len(got))].LSN
		for d := range m.sizes {
			m.checkViewOf(d, lsn)
		}
	}
}

// join takes a disk out of the group, one into it again, or a new one into it.
func (m *model) join() {
	d := m.rng.IntN(len(m.sizes) + 1)
	switch {
	case d == len(m.sizes):
		if d > 4 {
			return
		}
		if !m.newBacking(d, 30*record.BlockSize) {
			return
		}
		m.out[d] = true
		fallthrough
	case m.out[d]:
		m.note("add disk %d", d)
		require.NoError(m.t, m.g.AddDisk(m.diskConfig(d)))
		delete(m.out, d)
		m.came(d)
	case len(m.g.Disks()) > 1:
		m.note("remove disk %d", d)
		err := m.g.RemoveDisk(fmt.Sprintf("d%d", d))
		if slices.ContainsFunc(m.views, func(h heldView) bool { return h.disk == d }) {
			require.ErrorIs(m.t, err, ErrInUse)
			return
		}
		require.NoError(m.t, err)
		m.out[d], m.removing = true, d
	default:
		return
	}
	if m.rng.IntN(2) == 0 {
		m.proclaim()
	}
}

// proclaim has followers learn of the disks as they are.
func (m *model) proclaim() {
	require.NoError(m.t, m.g.Proclaim())
	if m.g.Head() > record.LSN(len(m.changes)) {
		m.note("proclaim")
		m.noted(event{})
	}
	require.NoError(m.t, m.g.Proclaim())
	require.EqualValues(m.t, len(m.changes), m.g.Head(), "once is enough")
}

// newBacking makes a backing while no crash can take its picture: what an operator adds is whole. It is false if the
// picture was taken already.
func (m *model) newBacking(d int, size int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.clone != nil {
		return false
	}
	m.sizes = append(m.sizes, size)
	m.makeBacking(d, size)
	return true
}

// came takes up what a disk did that came to the group: it may be a discontinuity.
func (m *model) came(d int) {
	if m.g.Head() > record.LSN(len(m.changes)) {
		got, err := m.g.Markers()
		require.NoError(m.t, err)
		mk := got[len(got)-1]
		require.Contains(m.t, mk.Label, fmt.Sprintf("discontinuity-d%d-", d))
		m.note("disk %d came with a discontinuity", d)
		m.since[d] = mk.LSN
		m.noted(event{mark: func(all map[record.LSN]record.Marker) { all[mk.LSN] = mk }})
	}
	m.addedAt[d] = m.disk(d).Added
	m.setFlushed(max(m.flushed, m.addedAt[d]))
}

func (m *model) diskConfig(d int) DiskConfig {
	return DiskConfig{fmt.Sprintf("d%d", d), fmt.Sprintf("disk%d", d)}
}

func (m *model) disk(d int) *disk.Disk {
	m.t.Helper()
	got, err := m.g.Disk(fmt.Sprintf("d%d", d))
	require.NoError(m.t, err)
	return got
}

// anyDisk is one that is in the group.
func (m *model) anyDisk() int {
	for {
		if d := m.rng.IntN(len(m.sizes)); !m.out[d] {
			return d
		}
	}
}

// image is a disk as of an LSN.
func (m *model) image(d int, lsn record.LSN) []byte {
	img := bytes.Clone(m.base[d])
	for _, c := range m.changes[:lsn] {
		if c.data != nil && c.disk == d {
			copy(img[c.off:], c.data)
		}
	}
	return img
}

// anyLSN is one of the window.
func (m *model) anyLSN() record.LSN {
	h := m.g.Horizon()
	require.LessOrEqual(m.t, int(h), len(m.changes))
	return h + record.LSN(m.rng.Uint64N(uint64(len(m.changes))-uint64(h)+1))
}

func (m *model) checkView() {
	lsn := m.anyLSN()
	if some := m.g.Viewable(); len(some) > 1 && m.rng.IntN(2) == 0 {
		r := some[m.rng.IntN(len(some)-1)]
		lsn = r.First + record.LSN(m.rng.Uint64N(uint64(r.Last-r.First)+1))
	}
	m.checkViewOf(m.anyDisk(), lsn)
}

func (m *model) checkViewOf(d int, lsn record.LSN) {
	if m.out[d] {
		_, err := m.g.Disk(fmt.Sprintf("d%d", d))
		require.ErrorIs(m.t, err, ErrNotFound)
		return
	}
	v, err := m.g.View(m.disk(d), lsn)
	if lsn < m.addedAt[d] {
		require.ErrorIs(m.t, err, ErrNoPoint)
		return
	}
	require.NoError(m.t, err)
	m.setFlushed(max(m.flushed, lsn))
	defer v.Close()
	m.compareView(v, d)
}

func (m *model) compareView(v *View, d int) {
	want := m.image(d, v.LSN())
	whole := record.Extent{Len: m.sizes[d]}
	if m.sizes[d] > 2<<20 {
		whole = record.Extent{Off: m.rng.Int64N(m.sizes[d] - 1<<20), Len: 1 << 20}
	}
	exts := []record.Extent{whole, m.extent(d), m.extent(d), {Off: m.rng.Int64N(m.sizes[d]), Len: 1}}
	for _, e := range exts {
		got := make([]byte, e.Len)
		err := v.ReadAt(got, e.Off, false)
		if err != nil && v.LSN() < m.since[d] {
			require.ErrorContains(m.t, err, "is not known")
			continue
		}
		require.NoError(m.t, err, "view at %d of disk %d: %v", v.LSN(), d, e)
		m.equal(want[e.Off:e.End()], got, e.Off, "view at %d of disk %d", v.LSN(), d)
	}
	m.checkExtents(v, exts[1], want, m.since[d] > v.LSN())
	m.checkChanges(v, d, exts[1])
}

// checkChanges compares what a view says has changed since an older one with what was written between them.
func (m *model) checkChanges(v *View, d int, e record.Extent) {
	first := max(m.g.Horizon(), m.addedAt[d])
	if first > v.LSN() {
		return // its view is what holds the horizon
	}
	old, err := m.g.View(m.disk(d), first+record.LSN(m.rng.Uint64N(uint64(v.LSN()-first)+1)))
	require.NoError(m.t, err)
	defer old.Close()
	touched := make([]bool, m.sizes[d]/record.BlockSize+1)
	for _, c := range m.changes[old.LSN():v.LSN()] {
		if c.data != nil && c.disk == d {
			for b := c.off / record.BlockSize; b <= (c.off+int64(len(c.data))-1)/record.BlockSize; b++ {
				touched[b] = true
			}
		}
	}
	off := e.Off
	require.NoError(m.t, v.Changes(old, e, func(n int64, changed bool) {
		for end := off + n; off < end; off = min(end, (off/record.BlockSize+1)*record.BlockSize) {
			if m.since[d] <= old.LSN() || !changed {
				require.Equal(m.t, touched[off/record.BlockSize], changed, "disk %d, block %d, from %d to %d", d, off/record.BlockSize, old.LSN(), v.LSN())
			}
		}
	}))
	require.Equal(m.t, e.End(), off)
	if old.LSN() < v.LSN() {
		require.ErrorContains(m.t, old.Changes(v, e, nil), "not an older view")
	}
}

// past is a disk as it was, for a rollback.
type past struct {
	old, now *View
}

func (p past) Size() int64                      { return p.old.Size() }
func (p past) ReadAt(b []byte, off int64) error { return p.old.ReadAt(b, off, false) }
func (p past) Extents(off, n int64, fn func(int64, bool)) error {
	return p.old.Extents(record.Extent{Off: off, Len: n}, fn)
}
func (p past) Changed(off, n int64, fn func(int64, bool)) error {
	return p.now.Changes(p.old, record.Extent{Off: off, Len: n}, fn)
}

// rolled is a disk of the model that is rolled back.
type rolled struct {
	m *model
	d int
}

func (r rolled) ReadAt(p []byte, off int64) error { return r.m.disk(r.d).ReadAt(p, off, false) }

func (r rolled) Write(p []byte, off int64) error {
	return r.do(Op{Kind: record.KindWrite, Ext: record.Extent{Off: off, Len: int64(len(p))}, Data: p}, bytes.Clone(p))
}

func (r rolled) Zero(off, n int64) error {
	return r.do(Op{Kind: record.KindTrim, Ext: record.Extent{Off: off, Len: n}}, make([]byte, n))
}

func (r rolled) do(op Op, data []byte) error {
	before := r.m.g.Head()
	op.Disk = r.m.disk(r.d)
	if err := r.m.g.Append([]Op{op}); err != nil {
		return err
	}
	r.m.record(before, r.d, op, data)
	return nil
}

// rollBack takes every disk back to some LSN, and sometimes forth again.
func (m *model) rollBack() {
	present := record.LSN(len(m.changes))
	lsn := m.anyLSN()
	m.note("roll back to %d", lsn)
	if !m.rollBackTo(lsn) || m.rng.IntN(2) == 0 {
		return
	}
	m.note("return to %d", present)
	require.True(m.t, m.rollBackTo(present))
}

// rollBackTo reports whether all disks could be taken there.
func (m *model) rollBackTo(lsn record.LSN) bool {
	all := true
	head := record.LSN(len(m.changes))
	for d := range m.sizes {
		if m.out[d] || m.addedAt[d] > lsn || m.since[d] > lsn {
			all = false
			continue
		}
		old, err := m.g.View(m.disk(d), lsn)
		require.NoError(m.t, err)
		now, err := m.g.View(m.disk(d), head)
		require.NoError(m.t, err)
		want, live := m.image(d, lsn), m.image(d, head)
		n, err := restore.Rollback(m.t.Context(), past{old, now}, rolled{m, d}, nil)
		require.NoError(m.t, err)
		var differ int64
		for off := int64(0); off < m.sizes[d]; off += record.BlockSize {
			end := min(m.sizes[d], off+record.BlockSize)
			if !bytes.Equal(want[off:end], live[off:end]) {
				differ += end - off
			}
		}
		require.Equal(m.t, differ, n, "bytes written")
		m.equal(want, m.image(d, record.LSN(len(m.changes))), 0, "disk %d, rolled back to %d", d, lsn)
		m.compareLive(m.disk(d), d)
		old.Close()
		now.Close()
	}
	return all
}

func (m *model) checkExtents(r interface {
	Extents(record.Extent, func(int64, bool)) error
}, e record.Extent, want []byte, mayLack bool) {
	off := e.Off
	err := r.Extents(e, func(n int64, zero bool) {
		if zero {
			m.equal(make([]byte, n), want[off:off+n], off, "a run told to be zeroes")
		}
		off += n
	})
	if err != nil && mayLack {
		require.ErrorContains(m.t, err, "is not known")
		return
	}
	require.NoError(m.t, err)
	require.Equal(m.t, e.End(), off)
}

func (m *model) equal(want, got []byte, off int64, format string, args ...any) {
	m.t.Helper()
	if bytes.Equal(want, got) {
		return
	}
	for i := range want {
		if want[i] != got[i] {
			at := off + int64(i)
			m.t.Fatalf("%s: differs first at %d (block %d): %x, expected %x", fmt.Sprintf(format, args...), at, at/record.BlockSize,
				got[i:min(i+16, len(got))], want[i:min(i+16, len(want))])
		}
	}
}

func (m *model) checkLive() {
	for d := range m.sizes {
		if !m.out[d] {
			m.compareLive(m.disk(d), d)
		}
	}
}

func (m *model) compareLive(disk *disk.Disk, d int) {
	want := m.image(d, record.LSN(len(m.changes)))
	got := make([]byte, len(want))
	require.NoError(m.t, disk.ReadAt(got, 0, false))
	m.equal(want, got, 0, "live disk %d", d)
	e := m.extent(d)
	require.NoError(m.t, disk.ReadAt(got[:e.Len], e.Off, false))
	m.equal(want[e.Off:e.End()], got[:e.Len], e.Off, "live disk %d", d)
	m.checkExtents(disk, e, want, false)
}

// checkBackings applies everything and compares the raw images.
func (m *model) checkBackings() {
	require.NoError(m.t, m.g.Apply())
	require.NoError(m.t, m.g.Apply())
	for d := range m.sizes {
		if m.out[d] {
			continue
		}
		f, err := m.fs.Open(fmt.Sprintf("disk%d", d))
		require.NoError(m.t, err)
		got := make([]byte, m.sizes[d])
		_, err = f.ReadAt(got, 0)
		require.NoError(m.t, err)
		require.NoError(m.t, f.Close())
		m.equal(m.image(d, record.LSN(len(m.changes))), got, 0, "backing %d", d)
	}
}

// verify expects that nothing is found.
func (m *model) verify() {
	done, err := m.g.Verify(m.t.Context(), VerifyOptions{}, func(f Finding) { m.t.Errorf("verify finds %+v (head %d, horizon %d)", f, m.g.Head(), m.g.Horizon()) })
	require.NoError(m.t, err)
	require.False(m.t, m.t.Failed())
	m.setFlushed(m.g.Durable())
	m.reached["verified"] += int(done.Blocks)
}

func (m *model) expire() {
	m.expireIn(m.g)
	m.verify()
	require.EqualValues(m.t, len(m.changes), m.g.Head(), "an expiry journals nothing")
	m.note("expire: horizon %d, %d points kept", m.g.Horizon(), len(m.g.KeptPoints()))
}

// expireIn expires some of a group's history, lets go of what it keeps no longer, sometimes, and cleans up.
func (m *model) expireIn(g *Group) {
	var pinned []record.LSN
	g.append.Lock()
	for _, mk := range g.append.markers.all {
		if (mk.Pinned || mk.IsHeld(g.o.Now())) && !mk.Pending {
			pinned = append(pinned, mk.LSN)
		}
	}
	g.append.Unlock()
	defer func() {
		for _, lsn := range pinned {
			require.True(m.t, g.viewable(lsn), "the marker at %d is pinned, or held", lsn)
		}
	}()
	_, err := g.Expire(int64(1 + m.rng.IntN(4*64<<10)))
	require.NoError(m.t, err)
	if len(g.KeptPoints()) > 0 {
		m.reached["kept"]++
	}
	m.thin(g)
}

// thin has a group let go of what it keeps no longer, or clean up, sometimes.
func (m *model) thin(g *Group) {
	if m.rng.IntN(3) > 0 {
		did, err := g.Thin()
		require.NoError(m.t, err)
		if did {
			m.reached["thinned"]++
			m.note("thin: %d points kept", len(g.KeptPoints()))
		}
	}
	if m.rng.IntN(2) == 0 {
		n, err := g.Compact()
		require.NoError(m.t, err)
		if n > 0 {
			m.reached["compact"]++
			m.note("compact: %d bytes", n)
		}
	}
	if m.rng.IntN(2) == 0 {
		require.NoError(m.t, g.closeOriginals(0))
		n, err := g.clean(1+int64(m.rng.IntN(4)), func() error { return nil })
		require.NoError(m.t, err)
		if n > 0 {
			m.reached["cleaned"]++
			m.note("clean: %d bytes", n)
		}
	}
}

func (m *model) holdView() {
	d := m.anyDisk()
	view := m.g.View
	if m.rng.IntN(2) == 0 {
		view = m.g.PassingView
	}
	v, err := view(m.disk(d), m.g.Head())
	require.NoError(m.t, err)
	m.setFlushed(m.g.Head())
	m.views = append(m.views, heldView{v, d})
}

func (m *model) closeViews() {
	for _, h := range m.views {
		if h.v.passing && h.v.LSN() < m.g.Horizon() && !m.g.isKept(h.v.LSN()) {
			err := h.v.ReadAt(make([]byte, 1), 0, false)
			require.ErrorIs(m.t, err, ErrNoPoint)
			err = h.v.Extents(record.Extent{Len: 1}, func(int64, bool) {})
			require.ErrorIs(m.t, err, ErrNoPoint)
		} else {
			m.compareView(h.v, h.disk)
		}
		h.v.Close()
	}
	m.views = nil
}

func (m *model) armCrash() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.arm == 0 {
		m.arm, m.percent, m.tear = 1+m.rng.IntN(60), survivals[m.rng.IntN(len(survivals))], m.rng.Uint64()
	}
}

// crash goes on with the picture that was taken.
func (m *model) crash() {
	m.views = nil
	require.NoError(m.t, errors.Join(m.store.Abandon()))
	m.mu.Lock()
	m.fs, m.clone = m.clone, nil
	must := m.atClone
	m.arm = 0
	m.mu.Unlock()
	m.open()
	head := m.g.Head()
	m.note("crash with %d %% surviving: head %d, at least %d", m.percent, head, must)
	require.GreaterOrEqual(m.t, head, must, "records that were flushed are gone")
	m.settleNotes(head)
	m.setFlushed(m.g.Head())
	m.answered()
	m.checkLive()
	m.checkView()
	if m.rng.IntN(4) == 0 {
		m.checkBackings()
	}
	m.verify()
}

// settleNotes forgets what a crash took, and takes up what the start after it journaled: markers of
// discontinuities, and conclusions of cuts in the stead of those that it took.
func (m *model) settleNotes(head record.LSN) {
	got, err := m.g.Markers()
	require.NoError(m.t, err)
	for _, mk := range got {
		d := -1
		_, _ = fmt.Sscanf(mk.Label, "discontinuity-d%d-", &d)
		if d < 0 || m.markers()[mk.LSN].Label == mk.Label {
			continue
		}
		m.note("crash: disk %d came with a discontinuity at %d", d, mk.LSN)
		m.since[d] = mk.LSN
		m.changes = append(m.changes[:mk.LSN-1], change{})
		m.events = slices.DeleteFunc(m.events, func(e event) bool { return e.lsn >= mk.LSN })
		m.events = append(m.events, event{lsn: mk.LSN, mark: func(all map[record.LSN]record.Marker) { all[mk.LSN] = mk }})
	}
	require.LessOrEqual(m.t, int(head), len(m.changes), "records that were never written")
	m.changes = m.changes[:head]
	m.events = slices.DeleteFunc(m.events, func(e event) bool { return e.lsn > head })
	if n := len(m.events); n > 0 && m.events[n-1].or != nil {
		want := m.markers()
		if !sameMarkers(got, want) {
			m.events[n-1].mark = m.events[n-1].or
		}
	}
	for d := range m.sizes {
		if !m.out[d] {
			m.addedAt[d] = m.disk(d).Added
		}
	}
	m.checkNotes()
}

func sameMarkers(got []record.Marker, want map[record.LSN]record.Marker) bool {
	for _, mk := range got {
		w := want[mk.LSN]
		if w.Time = mk.Time; w != mk {
			return false
		}
	}
	return len(got) == len(want)
}

func (m *model) reopen() {
	m.restart("closed", func() {})
}

// restart closes the store, and opens it again after what happens between.
func (m *model) restart(what string, between func()) {
	m.closeViews()
	m.mu.Lock()
	m.arm, m.clone = 0, nil
	m.mu.Unlock()
	require.NoError(m.t, m.store.Close())
	m.note("%s", what)
	between()
	m.open()
	for len(m.changes) < int(m.g.Head()) {
		m.changes = append(m.changes, change{}) // see settleNotes
	}
	m.settleNotes(m.g.Head())
	m.setFlushed(m.g.Head())
	m.checkLive()
	m.checkView()
	m.verify()
}

// loseIndex removes the index: the segments are the truth.
func (m *model) loseIndex() {
	m.restart("index lost", func() { require.NoError(m.t, m.fs.RemoveAll("state/index")) })
	for range 4 {
		m.checkView()
	}
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(m.Run())
}
