package journal

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// eventsOf are the model's events as a follower has them: without those in its gaps, but for definitions, which it was given.
func (m *model) eventsOf(f *follower) []event {
	all := slices.Clone(m.events)
	for _, gap := range f.over {
		for i, e := range all {
			switch {
			case e.mark == nil:
			case gap.After < e.lsn && e.lsn <= gap.Until:
				all[i].mark, all[i].or = nil, nil
			default:
				mark := e.mark
				all[i].mark = func(have map[record.LSN]record.Marker) {
					mark(have)
					for lsn := range have {
						if gap.After < lsn && lsn <= gap.Until {
							delete(have, lsn) // of an amendment of one that it never had
						}
					}
				}
			}
		}
		all = append(all, event{lsn: gap.Until, mark: func(have map[record.LSN]record.Marker) {
			for lsn, mk := range have {
				if mk.Pinned = mk.Pinned && (slices.Contains(gap.pinned, lsn) || mk.Pending); lsn <= gap.After {
					have[lsn] = mk
				}
			}
		}})
	}
	slices.SortStableFunc(all, func(a, b event) int { return int(a.lsn) - int(b.lsn) })
	return all
}

// left is what becomes of cuts that were not concluded, by records behind a head.
func left(markers map[record.LSN]record.Marker, head record.LSN) (all []event) {
	var pending []record.Marker
	for _, mk := range markers {
		if mk.Pending {
			pending = append(pending, mk)
		}
	}
	slices.SortFunc(pending, func(a, b record.Marker) int { return int(a.LSN) - int(b.LSN) })
	for i, mk := range pending {
		mk.Pending, mk.Consistency, mk.Note = false, record.Crash, "whether the guests were frozen is not known: the cut was not brought to its end"
		all = append(all, event{lsn: head + record.LSN(i) + 1, mark: func(have map[record.LSN]record.Marker) {
			if have[mk.LSN] = mk; mk.Consistency < mk.Asked && !mk.OrCrash {
				delete(have, mk.LSN)
			}
		}})
	}
	return all
}

// cross brings the follower over a gap if it is behind the horizon, and sometimes if it is not, or some of the way. It reports whether the
// follower can go on.
func (m *model) cross() bool {
	f := m.follower
	after, open := f.g.Bridging()
	at := m.g.Durable()
	behind := f.g.Newest() < m.g.Horizon()
	switch {
	case open && (m.rng.IntN(3) == 0 || at <= f.g.Head()):
		m.note("the follower goes back to before the gap")
		m.reached["gone back"]++
		require.NoError(m.t, f.g.Sync())
		m.rewind(f, after)
		require.Equal(m.t, after, f.g.Head())
		f.synced = after
		return f.g.Head() >= m.g.Horizon()
	case !open && !behind && m.rng.IntN(6) > 0:
		return true
	case !open && at < f.g.Head()+2, at < f.g.Head():
		return !behind
	}
	if !open {
		after = f.g.Head()
	}
	m.mu.Lock()
	crashed := m.clone != nil
	m.arm = 0 // what the follower has, the writer does not lose
	m.mu.Unlock()
	if !crashed && m.rng.IntN(2) == 0 {
		m.join()
		m.sync()
		at = m.g.Durable()
	}
	b, err := m.g.Beginning(at)
	require.NoError(m.t, err)
	if err := f.g.BeginBridge(b); err != nil {
		require.ErrorIs(m.t, err, ErrDetached)
		return false
	}
	f.synced = max(f.synced, after)
	m.note("the follower is to get from %d to %d", after, at)
	last, whole := m.bridge(f, b)
	whole = whole && m.endBridge(f, b, last, m.newcomers(f, b))
	g := f.g
	if whole {
		m.reached["crossed"]++
		require.Equal(m.t, []record.LSN{at, at, at, at}, []record.LSN{g.Head(), g.Durable(), g.Newest(), g.Horizon()})
		require.Equal(m.t, b.Reigns, g.Reigns())
		f.synced = at
		f.over = append(f.over, overGap{Gap{after, at}, b.Pinned})
		require.Equal(m.t, f.over[len(f.over)-1].Gap, g.Gaps()[len(g.Gaps())-1])
		m.note("the follower has got there")
	} else {
		m.reached["stopped"]++
		m.note("the follower stops on its way at %d", g.Head())
		require.Equal(m.t, after, g.Newest())
	}
	for _, d := range g.Disks() {
		_, err := g.View(d, after+1)
		require.ErrorIs(m.t, err, ErrNoPoint)
	}
	m.checkFollower()
	return true
}

// newcomers are some of the disks that came to the group in a gap.
func (m *model) newcomers(f *follower, b record.Beginning) (came []DiskConfig) {
	for _, t := range b.Disks {
		d := int(t.Name[1] - '0')
		if t.Removed == 0 && f.g.disk(t.ID) == nil && !m.out[d] && m.rng.IntN(3) > 0 {
			m.reached["came in a gap"]++
			came = append(came, m.seed(d, b.At))
		}
	}
	return came
}

// endBridge ends it, with a crash at some step or without. It reports whether the follower is behind the gap.
func (m *model) endBridge(f *follower, b record.Beginning, last []Op, came []DiskConfig) bool {
	if m.rng.IntN(2) == 0 {
		require.NoError(m.t, f.g.EndBridge(last, came))
		f.disks = append(f.disks, came...)
		return true
	}
	require.NoError(m.t, f.store.Close())
	c := m.crashPoint(f.fs)
	f.store = m.openOn(f, c)
	f.g = f.store.Groups()[0]
	require.NoError(m.t, f.g.BeginBridge(b))
	f.synced = f.g.Durable()
	for i := range last {
		last[i].Disk = f.g.disk(last[i].Disk.ID)
	}
	c.in(1 + m.rng.IntN(8))
	require.NoError(m.t, f.g.EndBridge(last, came))
	before := f.disks
	f.disks = append(slices.Clip(f.disks), came...)
	clone := c.taken()
	if clone == nil {
		require.NoError(m.t, f.store.Close())
	} else {
		m.reached["crashed at the end"]++
		m.note("the follower crashes at the end of the gap")
		require.NoError(m.t, f.store.Abandon())
		f.fs = clone
		if s, err := Open("state", []GroupConfig{{Name: "g", Disks: f.disks}}, Options{FS: f.fs, SegmentSize: 64 << 10, ReadOnly: true}); err == nil {
			require.NoError(m.t, s.Close())
		} else {
			require.ErrorContains(m.t, err, "is not in group")
			f.disks = before // the end came before
		}
		if m.rng.IntN(4) == 0 {
			require.NoError(m.t, f.fs.RemoveAll("state/index"))
		}
	}
	m.openFollower(nil)
	require.GreaterOrEqual(m.t, f.g.Head(), f.synced)
	_, open := f.g.Bridging()
	require.True(m.t, clone != nil || !open)
	return !open
}

// bridge makes the follower's disks what they are at a beginning, but for what comes last, with whatever may happen on the way. It reports whether they are.
func (m *model) bridge(f *follower, b record.Beginning) (last []Op, whole bool) {
	for {
		g := f.g
		last, whole := m.bridgeOnce(f, b)
		if !whole || f.g == g { // else a crash may have taken something of any disk
			return last, whole
		}
	}
}

func (m *model) bridgeOnce(f *follower, b record.Beginning) (ops []Op, whole bool) {
	flush := func() bool {
		require.NoError(m.t, f.g.Bridge(ops))
		ops = nil
		return m.onTheWay(f, b)
	}
	for _, d := range f.g.Disks() {
		n := slices.IndexFunc(b.Disks, func(t record.Disk) bool { return t.ID == d.ID })
		if n < 0 || b.Disks[n].Removed != 0 {
			continue
		}
		model := int(d.Name[1] - '0')
		want, have := m.image(model, b.At), make([]byte, d.Size)
		require.NoError(m.t, d.ReadAt(have, 0, false))
		for off := int64(0); off < d.Size; {
			end := min(off+int64(1+m.rng.IntN(6))*record.BlockSize, d.Size)
			ext := record.Extent{Off: off, Len: end - off}
			if off = end; bytes.Equal(want[ext.Off:end], have[ext.Off:end]) {
				continue
			}
			op := Op{Kind: record.KindWrite, Disk: d, Ext: ext, Data: want[ext.Off:end]}
			if !slices.ContainsFunc(op.Data, func(c byte) bool { return c != 0 }) {
				op.Kind, op.Data = record.KindTrim, nil
			}
			// Few LSNs may be left: many under one then.
			if ops = append(ops, op); f.g.Head()+4 >= b.At || m.rng.IntN(8) > 0 {
				continue
			}
			if g := f.g; !flush() {
				return nil, false
			} else if f.g != g {
				return nil, true
			}
		}
	}
	if room := f.g.BridgeRoom(); room == 0 || m.rng.IntN(3) == 0 {
		return ops, true
	}
	return nil, len(ops) == 0 || flush()
}

// onTheWay is what a follower may do, or suffer, while it is brought over a gap. It reports whether it goes on.
func (m *model) onTheWay(f *follower, b record.Beginning) bool {
	g := f.g
	resume := func() {
		m.openFollower(nil)
		require.NoError(m.t, f.g.BeginBridge(b))
	}
	switch m.rng.IntN(24) {
	case 0:
		require.NoError(m.t, g.Sync())
		f.synced = g.Head()
	case 1:
		require.NoError(m.t, g.Apply())
	case 2:
		require.NoError(m.t, g.Checkpoint())
	case 3:
		_, err := g.Expire(int64(1 + m.rng.IntN(4*64<<10)))
		require.NoError(m.t, err)
	case 4, 5, 6:
		percent, head := survivals[m.rng.IntN(len(survivals))], g.Head()
		clone := f.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rand.New(rand.NewPCG(m.rng.Uint64(), 3))})
		require.NoError(m.t, f.store.Abandon())
		f.fs = clone
		resume()
		m.reached["crashed on the way"]++
		m.note("the follower crashes on its way: head %d of %d, at least %d", f.g.Head(), head, f.synced)
		require.GreaterOrEqual(m.t, f.g.Head(), f.synced)
		require.LessOrEqual(m.t, f.g.Head(), head)
	case 7:
		require.NoError(m.t, f.store.Close())
		if m.rng.IntN(2) == 0 {
			require.NoError(m.t, f.fs.RemoveAll("state/index"))
		}
		resume()
	case 8:
		return false
	}
	return true
}

// TestAGap: what a group refuses while it is brought over a gap, and behind it, changes nothing.
func TestAGap(t *testing.T) {
	p := newPair(t)
	for i := range 3 {
		require.NoError(t, p.write(int64(i), byte(i+1)))
	}
	p.ship()
	to, d := p.to.g, p.to.g.Disks()[0]
	last := time.Now()
	require.NoError(t, p.write(1, 11))
	between := time.Now()
	require.NoError(t, p.write(2, 12))
	require.NoError(t, p.write(9, 13))
	next := p.run()
	b, err := p.g.Beginning(6)
	require.NoError(t, err)
	op := func(block int64, n int, fill byte) Op {
		return Op{Kind: record.KindWrite, Disk: d, Ext: record.Extent{Off: block * record.BlockSize, Len: int64(n) * record.BlockSize}, Data: bytes.Repeat([]byte{fill}, n*record.BlockSize)}
	}
	require.ErrorContains(t, to.Bridge([]Op{op(1, 1, 11)}), "none was begun")
	require.ErrorContains(t, to.EndBridge(nil, nil), "none was begun")
	require.ErrorContains(t, p.g.BeginBridge(b), "is this daemon's")
	here := b
	here.At = 3
	require.ErrorIs(t, to.BeginBridge(here), ErrDiverged)
	other := b
	other.Reigns = record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{7}}}
	require.ErrorIs(t, to.BeginBridge(other), ErrDiverged)
	require.NoError(t, to.Receive(record.Run{First: next.First, Last: 4, Bytes: next.Bytes[:len(next.Bytes)/3], Disks: next.Disks, Reigns: next.Reigns}), "a bridge that was not begun is in nobody's way")

	require.NoError(t, to.BeginBridge(b))
	require.ErrorContains(t, to.Receive(p.run0(t, 5)), "brought over a gap")
	_, err = to.Lead(2)
	require.ErrorContains(t, err, "rewind it to there first")
	require.ErrorContains(t, to.Bridge([]Op{op(1, 2, 1), op(2, 1, 1)}), "overlap")
	require.ErrorContains(t, to.Bridge([]Op{op(rigBlocks, 1, 1)}), "its size is")
	require.ErrorContains(t, to.Bridge([]Op{{Kind: record.KindTrim, Disk: d, Ext: record.Extent{Off: 1, Len: record.BlockSize}}}), "not whole blocks")
	require.ErrorContains(t, to.Adopt(DiskConfig{"e", "e.raw"}, record.Disk{ID: 9, Name: "e", Size: record.BlockSize}), "brought over a gap")
	_, err = to.Repair(p.run0(t, 5))
	require.ErrorContains(t, err, "of a gap")
	require.Equal(t, record.LSN(4), to.Head())
	require.NoError(t, to.Bridge([]Op{op(9, 1, 13), op(2, 1, 12)}))
	require.ErrorContains(t, to.Bridge([]Op{op(3, 1, 3)}), "takes more records")
	_, err = to.Resolve(record.Point{Form: record.FormTime, Time: time.Now()})
	require.ErrorContains(t, err, "have not come here")
	lsn, err := to.Resolve(record.Point{Form: record.FormLatest})
	require.NoError(t, err)
	require.Equal(t, record.LSN(4), lsn)
	_, err = to.Feed(5)
	require.ErrorIs(t, err, ErrNoPoint, "what stands there is not the writer's")
	require.NoError(t, to.EndBridge([]Op{op(3, 1, 0xb0)}, nil), "there is room for what comes last")

	require.Equal(t, []Range{{0, 4}, {6, 6}}, to.Viewable())
	for _, from := range []record.LSN{5, 6} {
		_, err = to.Repair(p.run0(t, from))
		require.ErrorContains(t, err, "of a gap")
	}
	for _, from := range []record.LSN{5, 6} {
		_, err = to.Feed(from)
		require.ErrorIs(t, err, ErrNoPoint)
		digest, err := to.Digest(from)
		require.NoError(t, err)
		require.Zero(t, digest)
	}
	digest, err := to.Digest(4)
	require.NoError(t, err)
	want, err := p.g.Digest(4)
	require.NoError(t, err)
	require.Equal(t, want, digest)
	for at, want := range map[time.Time]record.LSN{last: 3, time.Now(): 6} {
		lsn, err := to.Resolve(record.Point{Form: record.FormTime, Time: at})
		require.NoError(t, err)
		require.Equal(t, want, lsn)
	}
	_, err = to.Resolve(record.Point{Form: record.FormTime, Time: between})
	require.ErrorIs(t, err, ErrNoPoint, "whether there were records in the gap by then is not known")
	require.ErrorContains(t, p.to.s.Rewind("g", 5), "never came here")
	for at, fill := range map[record.LSN]byte{3: 2, 4: 11, 6: 11} {
		got, err := p.to.at(at, 1)
		require.NoError(t, err)
		require.Equal(t, fill, got)
	}
}

// write of a block, for a bridge.
func bridgeWrite(g *Group, block int64, fill byte) Op {
	return Op{Kind: record.KindWrite, Disk: g.Disks()[0], Ext: record.Extent{Off: block * record.BlockSize, Len: record.BlockSize}, Data: bytes.Repeat([]byte{fill}, record.BlockSize)}
}

// behindAGap is a pair whose follower has LSN 1, and is to be brought to where its writer has written n blocks.
func behindAGap(t *testing.T, n int) (p pair, b record.Beginning) {
	p = newPair(t)
	require.NoError(t, p.write(1, 1))
	p.ship()
	require.NoError(t, p.to.g.Sync())
	for i := range n {
		require.NoError(t, p.write(int64(i), 9))
	}
	_, err := p.g.Define("vm", bytes.Repeat([]byte("<domain/>"), 2000))
	require.NoError(t, err)
	b, err = p.g.Beginning(p.g.Head())
	require.NoError(t, err)
	return p, b
}

// TestATornEnd: a power cut tears a payload of the records that a bridge ends with, which are far from those before. They count for nothing, and the
// bridge is gone on with.
func TestATornEnd(t *testing.T) {
	for name, lose := range map[string]bool{"with the index": false, "without": true} {
		t.Run(name, func(t *testing.T) {
			p, b := behindAGap(t, 20)
			to := p.to
			require.NoError(t, to.g.BeginBridge(b))
			for i := range int64(6) {
				require.NoError(t, to.g.Bridge([]Op{bridgeWrite(to.g, i, 9)}))
			}
			require.NoError(t, to.g.Sync())
			log := to.g.append.log.Current()
			at := to.g.append.log.Tail() + 3*4096 // in the definition
			require.NoError(t, to.g.admit(to.g.endedLocked, func() error { return to.g.bridgeLocked(to.g.bridgeNotesLocked(b), b.At) }))
			require.Equal(t, b.At, to.g.Head())
			clone := to.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: rand.New(rand.NewPCG(1, 2))})
			require.NoError(t, to.s.Abandon())
			to.mem, to.fs = clone, clone
			to.scribble(log.Path, at, make([]byte, 4096))
			to.open()
			require.Equal(t, record.LSN(7), to.g.Head(), "not the one before where it ends")
			for i := int64(6); i < 20; i++ {
				require.NoError(t, p.write(i, 8))
			}
			next, err := p.g.Beginning(p.g.Head())
			require.NoError(t, err)
			require.NoError(t, to.g.BeginBridge(next))
			require.NoError(t, to.g.Bridge([]Op{bridgeWrite(to.g, 6, 8)}))
			require.NoError(t, to.g.Sync())
			clone = to.mem.CrashClone(vfs.CrashCloneCfg{RNG: rand.New(rand.NewPCG(1, 2))})
			require.NoError(t, to.s.Abandon())
			to.mem, to.fs = clone, clone
			if lose {
				require.NoError(t, to.mem.RemoveAll("state/index"))
			}
			to.open()
			state, why := to.g.State()
			require.Equal(t, "active", state, why)
			require.NoError(t, to.g.BeginBridge(next))
			require.NoError(t, to.g.EndBridge(nil, nil))
			got, err := to.at(next.At, 6)
			require.NoError(t, err)
			require.Equal(t, byte(8), got)
		})
	}
}

// TestALostBridgeFile is damage like that of any other file of the log, though a bridge leaps over LSNs.
func TestALostBridgeFile(t *testing.T) {
	p, b := behindAGap(t, 100)
	to := p.to
	b.Definitions[0].Content = bytes.Repeat([]byte("z"), 100<<10) // so that the last records have a file of their own
	require.NoError(t, to.g.BeginBridge(b))
	for i := range int64(40) {
		require.NoError(t, to.g.Bridge([]Op{bridgeWrite(to.g, i, 9)}))
	}
	lost := to.g.append.log.Current().Path
	require.NoError(t, to.g.EndBridge(nil, nil))
	require.NoError(t, to.s.Abandon())
	require.NoError(t, to.fs.Remove(lost))
	require.NoError(t, to.fs.RemoveAll("state/index"))
	to.open()
	to.failed()
}

// TestABridgeLeavesRoom: a file system that has none for all of it still has what it takes to go back to before the gap.
func TestABridgeLeavesRoom(t *testing.T) {
	for name, op := range map[string]func(g *Group, i int64) Op{
		"writes": func(g *Group, i int64) Op { return bridgeWrite(g, i, 9) },
		"zeroes": func(g *Group, i int64) Op {
			return Op{Kind: record.KindTrim, Disk: g.Disks()[0], Ext: record.Extent{Off: i * record.BlockSize, Len: (rigBlocks - i) * record.BlockSize}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p, b := behindAGap(t, rigBlocks-2)
			to := p.to
			require.NoError(t, to.s.Close())
			to.o.Reserve = 64 << 10
			fs := freeFS{to.fs, &atomic.Int64{}}
			fs.free.Store(1200 << 10)
			to.fs = fs
			to.open()
			require.NoError(t, to.g.BeginBridge(b))
			to.running(func() error {
				var err error
				for i := int64(0); i < rigBlocks-2 && err == nil; i++ {
					err = to.g.Bridge([]Op{op(to.g, i)})
				}
				if !errors.Is(err, ErrNoSpace) {
					return fmt.Errorf("there was room for all of it, or: %w", err)
				}
				return nil
			})
			require.NoError(t, to.g.Apply())
			require.NoError(t, to.s.Rewind("g", 1))
			to.g = to.s.Groups()[0]
			for i, fill := range []byte{0xb0, 1, 0xb0} {
				require.Equal(t, fill, to.live(int64(i)))
			}
			_, err := to.g.Lead(2)
			require.NoError(t, err)
		})
	}
}
