package journal

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// keptRig is a rig that remembers all that was written.
type keptRig struct {
	*rig
	clock clock
	rng   *rand.Rand
	past  []moment // past[i] is at LSN i+1
}

type moment struct {
	at    int64
	level record.Consistency // of the marker; 0: none
	fill  [rigBlocks]byte
}

func newKeptRig(t *testing.T, seed uint64, p retain.Policy) *keptRig {
	r := &keptRig{rng: rand.New(rand.NewPCG(seed, 11))}
	r.clock.at.Store(int64(time.Hour))
	r.rig = newRig(t, Options{Now: r.clock.time})
	r.retain = p
	require.NoError(t, r.g.SetPolicy(p, 0))
	return r
}

// record takes up the records that the journal has and the rig does not: after a change of some blocks.
func (r *keptRig) record(level record.Consistency, first, n int64, fill byte) {
	next := moment{at: r.g.recordTime.Load(), level: level}
	for b := range next.fill {
		next.fill[b] = 0xb0
	}
	if len(r.past) > 0 {
		next.fill = r.past[len(r.past)-1].fill
	}
	for b := first; b < first+n; b++ {
		next.fill[b] = fill
	}
	r.past = append(r.past, next)
	require.EqualValues(r.t, len(r.past), r.g.Head())
}

func (r *keptRig) step() {
	r.clock.at.Add(int64(r.rng.ExpFloat64() * float64(time.Second)))
	switch n := r.rng.IntN(40); {
	case n < 25:
		b, fill := r.rng.Int64N(40), byte(1+r.rng.IntN(250))
		require.NoError(r.t, r.write(b, fill))
		r.record(0, b, 1, fill)
	case n < 27:
		ext := record.Extent{Off: r.rng.Int64N(30) * record.BlockSize, Len: (1 + r.rng.Int64N(20)) * record.BlockSize}
		require.NoError(r.t, r.g.Append([]Op{{Kind: record.KindTrim, Disk: r.g.Disks()[0], Ext: ext}}))
		r.record(0, ext.Off/record.BlockSize, ext.Len/record.BlockSize, 0)
	case n < 28:
		_, err := r.g.Mark(record.Marker{Label: fmt.Sprint("m", len(r.past)), By: "test", Pinned: r.rng.IntN(10) == 0})
		require.NoError(r.t, err)
		r.record(record.Crash, 0, 0, 0)
	case n < 29:
		m, err := r.g.Cut(record.Marker{Label: fmt.Sprint("m", len(r.past)), By: "test", Asked: record.Application})
		require.NoError(r.t, err)
		r.record(record.Application, 0, 0, 0)
		m.Consistency = record.Application
		_, err = r.g.Conclude(m)
		require.NoError(r.t, err)
		r.record(0, 0, 0, 0)
	case n < 33:
		require.NoError(r.t, r.g.Apply())
	case n < 35:
		_, err := r.g.Expire(1)
		require.NoError(r.t, err)
		r.check()
	case n < 36:
		_, err := r.g.Thin()
		require.NoError(r.t, err)
	case n < 38:
		r.clean()
		if r.rng.IntN(2) == 0 {
			_, err := r.g.Compact()
			require.NoError(r.t, err)
		}
		r.check()
	case n < 39:
		require.NoError(r.t, r.s.Close())
		if r.rng.IntN(2) == 0 {
			require.NoError(r.t, r.fs.RemoveAll("state/index"))
		}
		r.open()
		r.check()
	}
}

// anHourLater overwrites some blocks, and has all expire that may.
func (r *keptRig) anHourLater() {
	r.clock.at.Add(int64(time.Hour))
	for i := range int64(40) {
		require.NoError(r.t, r.write(i, 2))
	}
	require.NoError(r.t, r.g.Apply())
	r.expireAll()
}

// clean is a full pass.
func (r *keptRig) clean() {
	require.NoError(r.t, r.g.closeOriginals(0))
	_, err := r.g.clean(1, func() error { return nil })
	require.NoError(r.t, err)
	r.checkOriginals()
}

// check compares the views of all kept points, and of some others, and has times lead to them exactly.
func (r *keptRig) check() {
	r.t.Helper()
	_, err := r.g.Verify(r.t.Context(), VerifyOptions{}, func(f Finding) { r.t.Errorf("%+v", f) })
	require.NoError(r.t, err)
	for _, k := range r.g.KeptPoints() {
		require.Equal(r.t, r.past[k.LSN-1].at, k.Time)
		r.checkAt(k.LSN)
	}
	if len(r.past) == 0 {
		return
	}
	h := r.g.Horizon()
	if h > 0 {
		r.checkAt(h)
	}
	r.checkAt(h + 1 + record.LSN(r.rng.Uint64N(uint64(r.g.Head()-h)+1))) // one behind the head is none
	for range 5 {
		at := r.rng.IntN(len(r.past))
		t := r.past[at].at + r.rng.Int64N(int64(time.Second))
		lsn, err := r.g.Resolve(record.Point{Form: record.FormTime, Time: time.Unix(0, t)})
		if err != nil {
			require.ErrorIs(r.t, err, ErrNoPoint)
			continue
		}
		want := at
		for want+1 < len(r.past) && r.past[want+1].at <= t {
			want++
		}
		require.EqualValues(r.t, want+1, lsn, "at %d", t)
	}
}

func (r *keptRig) checkAt(lsn record.LSN) {
	r.t.Helper()
	if lsn > r.g.Head() {
		return
	}
	v, err := r.g.View(r.g.Disks()[0], lsn)
	require.NoError(r.t, err)
	defer v.Close()
	b := make([]byte, rigBlocks*record.BlockSize)
	require.NoError(r.t, v.ReadAt(b, 0, false))
	for block, want := range r.past[lsn-1].fill {
		require.Equal(r.t, want, b[block*record.BlockSize], "block %d at LSN %d", block, lsn)
	}
}

// wanted is what a policy keeps beyond the horizon of all that ever was.
func (r *keptRig) wanted(p retain.Policy) (lsns []record.LSN) {
	h := r.g.Horizon()
	markers, err := r.g.Markers()
	require.NoError(r.t, err)
	var points []retain.Point
	for i, at := range r.past {
		lsn := record.LSN(i + 1)
		point := retain.Point{LSN: lsn, Time: at.at, Consistency: at.level}
		point.Pinned = slices.ContainsFunc(markers, func(m record.Marker) bool { return m.LSN == lsn && m.Pinned })
		if at.level != 0 || lsn <= h && (i+1 == len(r.past) || p.Ends(at.at, r.past[i+1].at)) {
			points = append(points, point)
		}
	}
	for i, why := range p.Keep(r.clock.at.Load(), points) {
		if why.Kept() && points[i].LSN <= h {
			lsns = append(lsns, points[i].LSN)
		}
	}
	return lsns
}

// TestKeptPoints: whatever was expired, thinned and cleaned when, and however often the index was lost: what the policy keeps of all that ever was
// is there, to the last byte, and nothing else.
func TestKeptPoints(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			p := retain.Policy{Tiers: []retain.Tier{{Every: 2 * time.Second, For: 20 * time.Second}, {Every: 30 * time.Second, For: 4 * time.Minute}}, Markers: int(seed % 3)}
			require.NoError(t, p.Validate())
			r := newKeptRig(t, seed, p)
			for range 600 {
				r.step()
			}
			require.NoError(t, r.g.Apply())
			for range 2 {
				for range 20 {
					_, err := r.g.Expire(1 << 40)
					require.NoError(t, err)
				}
				_, err := r.g.Thin()
				require.NoError(t, err)
				r.clean()
				r.check()
				require.Equal(t, r.wanted(p), r.g.keptLSNs())
				require.NotEmpty(t, r.g.KeptPoints())
				r.clock.at.Add(int64(15 * time.Second))
			}
			_, err := r.g.Thin()
			require.NoError(t, err)
			r.clean()
			was, size := r.g.keptLSNs(), r.g.set.Size()
			r.clock.at.Add(-int64(time.Second)) // no point is let go of by the time that a pass takes
			did, err := r.g.Thin()
			require.NoError(t, err)
			require.False(t, did, "a second pass has nothing to do")
			require.Equal(t, was, r.g.keptLSNs())
			n, err := r.g.clean(1, func() error { return nil })
			require.NoError(t, err)
			require.Zero(t, n)
			require.Equal(t, size, r.g.set.Size())
			r.clock.at.Add(int64(10 * time.Minute))
			require.NoError(t, r.g.SetPolicy(retain.Policy{}, 0))
			markers, err := r.g.Markers()
			require.NoError(t, err)
			for _, m := range markers {
				if m.Pinned {
					_, err := r.g.Unpin(m.Label)
					require.NoError(t, err)
				}
			}
			_, err = r.g.Thin()
			require.NoError(t, err)
			r.clean()
			require.Empty(t, r.g.KeptPoints())
			for _, f := range r.g.set.Files(segment.Originals) {
				ended, err := r.g.allEnded(f)
				require.NoError(t, err)
				require.True(t, !ended || f == r.g.apply.orig.Current(), "%s holds nothing that anybody needs", f.Path)
			}
		})
	}
}

// TestTheListOfKeptPoints: what is written is read, in parts too, and nothing else is taken for it.
func TestTheListOfKeptPoints(t *testing.T) {
	var kept []KeptPoint
	for i := range 60000 {
		kept = append(kept, KeptPoint{record.LSN(3 * i), int64(i), int64(i + 1)})
	}
	label := func(lsn record.LSN) (record.Marker, bool) {
		m := record.Marker{LSN: lsn, Label: fmt.Sprint("m", lsn), By: "test", Asked: record.Crash, Consistency: record.Crash}
		return m, lsn%30 == 0
	}
	var r keptReader
	since := map[record.DiskID]record.LSN{1: 5, 7: 9}
	parts := 0
	for rest := kept; len(rest) > 0; parts++ {
		var b []byte
		b, rest = appendKept(nil, parts, since, rest, label)
		r.add(b, nil)
		since = nil
		for _, n := range []int{0, 5, keptHead - 1, keptHead + 3, len(b) / 2, len(b) - 1} {
			_, err := decodeKept(b[:n])
			require.ErrorIs(t, err, record.ErrCorrupt)
		}
		_, err := decodeKept(append(slices.Clone(b), 0))
		require.ErrorIs(t, err, record.ErrCorrupt)
	}
	require.Greater(t, parts, 1)
	r.end()
	require.NoError(t, r.last.err)
	require.Equal(t, kept, r.last.kept)
	require.Len(t, r.last.markers, 6000)
	require.Equal(t, map[record.DiskID]record.LSN{1: 5, 7: 9}, r.last.since)
	_, err := decodeKept([]byte{2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	require.ErrorContains(t, err, "format version 2")
	r.add(nil, record.ErrCorrupt)
	r.end()
	require.ErrorIs(t, r.last.err, record.ErrCorrupt, "a damaged list is not the one before it")
	first, _ := appendKept(nil, 0, nil, kept[:1], label)
	second, _ := appendKept(nil, 1, nil, kept[1:2], label)
	r.add(first, nil)
	r.add(second, nil) // a crash, and then the whole list again
	r.add(first, nil)
	r.end()
	require.NoError(t, r.last.err)
	require.Equal(t, kept[:1], r.last.kept)
}

// TestAWindowThatDoesNotFit is said long before it is full.
func TestAWindowThatDoesNotFit(t *testing.T) {
	r := newKeptRig(t, 1, retain.Policy{EveryWrite: 10 * time.Hour})
	_, _, ok := r.g.Foresee()
	require.False(t, ok, "nothing was written yet")
	for i := range 100 {
		require.NoError(t, r.write(int64(i), 1))
	}
	r.clock.at.Add(int64(time.Hour))
	need, room, ok := r.g.Foresee()
	require.True(t, ok)
	require.InDelta(t, 10*100*(record.BlockSize+record.HeaderSize), need, 10*(64<<10), "what is allocated ahead does not count")
	require.Greater(t, room, need, "there is no limit")
	require.NoError(t, r.g.SetPolicy(r.retain, need-1))
	need, room, ok = r.g.Foresee()
	require.True(t, ok)
	require.Less(t, room, need)
	require.NoError(t, r.g.SetPolicy(retain.Policy{EveryWrite: time.Minute}, need-1))
	_, _, ok = r.g.Foresee()
	require.False(t, ok, "it is all there")
}

// TestASmallLimitEatsTheWindow: less is kept than is promised, and said, after a restart too; points are given up, the finest first, and what is pinned is not.
func TestASmallLimitEatsTheWindow(t *testing.T) {
	p := retain.Policy{EveryWrite: time.Hour, Tiers: []retain.Tier{{Every: 10 * time.Second, For: 2 * time.Hour}, {Every: 5 * time.Minute, For: 4 * time.Hour}}}
	r := newKeptRig(t, 1, p)
	_, err := r.g.Mark(record.Marker{Label: "pinned", By: "test", Pinned: true})
	require.NoError(t, err)
	r.record(record.Crash, 0, 0, 0)
	write := func(n int) {
		for i := range n {
			r.clock.at.Add(int64(5 * time.Second))
			require.NoError(t, r.write(int64(i%40), byte(i)))
			r.record(0, int64(i%40), 1, byte(i))
		}
		require.NoError(t, r.g.Apply())
	}
	write(300)
	_, eaten := r.g.Window()
	require.False(t, eaten)
	_, err = r.g.Expire(1 << 40)
	require.NoError(t, err)
	_, eaten = r.g.Window()
	require.True(t, eaten)
	r.check()
	was := r.wanted(p)
	require.Equal(t, was, r.g.keptLSNs(), "the window goes, and what is kept of it stays")
	require.NoError(t, r.s.Close())
	r.open()
	_, eaten = r.g.Window()
	require.True(t, eaten)
	require.NoError(t, r.g.SetPolicy(p, 300<<10))
	for range 40 {
		write(5)
		require.NoError(t, due(r.g))
		require.NoError(t, r.g.closeOriginals(0))
		_, err := r.g.Clean()
		require.NoError(t, err)
		was := len(r.g.KeptPoints())
		if r.g.excess() > 0 && !r.g.logCanGo() {
			did, err := r.g.giveUp()
			require.NoError(t, err)
			require.True(t, did)
			require.Less(t, was-len(r.g.KeptPoints()), was/4+2, "not all at once")
		}
	}
	r.check()
	kept, why := r.g.Kept()
	require.EqualValues(t, 1, kept[0].LSN)
	require.True(t, why[0].Pinned)
	require.Less(t, len(kept), len(was))
	r.clock.at.Add(int64(2 * time.Hour))
	_, eaten = r.g.Window()
	require.False(t, eaten, "that was long ago")
}

// TestAPlan says what the next expiry does, holds nothing up meanwhile, and ends when nobody waits for it or what it reads must go.
func TestAPlan(t *testing.T) {
	r, fs := newFreeRig(t, Options{SegmentSize: 64 << 10}, 1<<30)
	for i := range 100 {
		require.NoError(t, r.write(int64(i%7), byte(i)))
	}
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.g.Checkpoint())
	at := time.Now().Add(time.Hour)
	r.g.o.Now = func() time.Time { return at }
	policy := retain.Policy{EveryWrite: time.Minute, Markers: 1}
	ended, end := context.WithCancel(t.Context())
	end()
	_, err := r.g.Plan(ended, policy)
	require.ErrorIs(t, err, context.Canceled)
	plan, err := r.g.Plan(t.Context(), policy)
	require.NoError(t, err)
	require.Positive(t, plan.Frees())
	require.Zero(t, r.g.Horizon())

	goOn := r.g.planning(t.Context(), r.g.expiredTo())
	require.NoError(t, r.g.SetPolicy(policy, 0))
	require.NoError(t, due(r.g))
	require.Equal(t, plan.Horizon, r.g.Horizon())
	require.Equal(t, plan.Kept, r.g.KeptPoints())
	require.NoError(t, goOn(), "there is room enough")
	fs.free.Store(0)
	goOn = r.g.planning(t.Context(), 0)
	require.ErrorContains(t, goOn(), "ask again")
	require.NoError(t, r.g.planning(t.Context(), plan.Horizon)())
}

// TestASlowlyWrittenFile is closed after an eighth of the window, so that what is in it can expire at all, and not before.
func TestASlowlyWrittenFile(t *testing.T) {
	r := newKeptRig(t, 1, retain.Policy{EveryWrite: time.Hour})
	logs := func() int { return len(r.g.set.Files(segment.Log)) }
	pass := func(d time.Duration) {
		r.clock.at.Add(int64(d))
		require.NoError(t, r.g.Apply())
		require.NoError(t, r.g.Checkpoint())
		require.NoError(t, due(r.g))
	}
	require.NoError(t, r.write(1, 1))
	pass(time.Hour/8 - time.Second)
	require.Equal(t, 1, logs())
	pass(2 * time.Second)
	require.Equal(t, 2, logs())
	pass(2 * time.Hour)
	require.EqualValues(t, 1, r.g.Horizon())
	require.Equal(t, 1, logs(), "the new one has nothing in it: it stays open")
	pass(2 * time.Hour)
	require.Equal(t, 1, logs())
	require.NoError(t, r.write(1, 2))
	pass(0)
	require.Equal(t, 2, logs(), "it was begun long ago")
}

// TestALimitBelowWhatPinsKeep is refused while nothing has gone for its sake.
func TestALimitBelowWhatPinsKeep(t *testing.T) {
	p := retain.Policy{EveryWrite: time.Minute}
	r := newKeptRig(t, 1, p)
	for i := range int64(40) {
		require.NoError(t, r.write(i, 1))
	}
	_, err := r.g.Mark(record.Marker{Label: "pinned", By: "test", Pinned: true})
	require.NoError(t, err)
	for range 3 {
		r.anHourLater()
		require.NoError(t, r.g.closeOriginals(0))
		_, err = r.g.Clean()
		require.NoError(t, err)
	}
	bound := r.g.Bound()
	require.InDelta(t, 40*(record.BlockSize+record.HeaderSize), bound, 10*record.BlockSize, "each block is kept once")
	require.ErrorContains(t, r.g.SetPolicy(retain.Policy{}, bound-1), "unpin some")
	require.Equal(t, p, r.g.Policy())
	require.Zero(t, r.g.Limit())
	require.NoError(t, r.g.SetPolicy(p, bound))
	r.g.limit.Store(bound - 1) // as when it was set before the point was pinned
	require.NoError(t, r.g.SetPolicy(retain.Policy{}, bound-1), "what is so already is no reason to refuse the rest")

	require.NoError(t, r.g.SetPolicy(p, bound-1))
	require.ErrorContains(t, r.g.SetPolicy(p, bound-2), "unpin some")
	r.g.limit.Store(1)
	require.NoError(t, r.g.SetPolicy(p, 2), "it is more than it was")

	_, err = r.g.Compact()
	require.NoError(t, err)
	_, err = r.g.Clean()
	require.NoError(t, err)
	require.Less(t, r.g.Bound(), bound/2, "of compact files, what they take")
	require.Positive(t, r.g.Bound())

	_, err = r.g.Unpin("pinned")
	require.NoError(t, err)
	require.Zero(t, r.g.Bound())
	require.NoError(t, r.g.SetPolicy(p, 1), "it is not so any more, though all is there still")
}

// TestAHold: nobody lets go of the point before its end, the writer of a replica neither, and then it goes like any other.
func TestAHold(t *testing.T) {
	p := newPair(t)
	var clock clock
	clock.at.Store(time.Now().UnixNano())
	p.to.g.o.Now = clock.time
	m, err := p.g.Mark(record.Marker{Label: "k", By: "test"})
	require.NoError(t, err)
	end := clock.time().Add(time.Hour)
	_, err = p.g.HoldUntil("k", end)
	require.NoError(t, err)
	_, err = p.g.HoldUntil("k", end.Add(-time.Minute))
	require.ErrorIs(t, err, ErrHeld)
	_, err = p.g.Delete("k")
	require.ErrorIs(t, err, ErrHeld)
	_, err = p.g.Describe("k", "described")
	require.NoError(t, err)
	_, err = p.g.Pin("k")
	require.NoError(t, err)
	_, err = p.g.Unpin("k")
	require.NoError(t, err)
	for i := range 100 {
		require.NoError(t, p.write(int64(i%5), byte(i)))
	}
	p.ship()
	// Whoever has the writer's daemon can journal what he likes.
	for _, am := range []record.Amendment{
		{Target: m.LSN, Marker: record.Marker{Label: "k", By: "test", Asked: record.Crash, Consistency: record.Crash, Held: end.Add(-time.Minute)}},
		{Target: m.LSN, Marker: record.Marker{Label: "k", By: "test", Asked: record.Crash, Consistency: record.Crash}},
		{Target: m.LSN, Deleted: true},
	} {
		require.NoError(t, p.g.admittedNote(func() error {
			_, err := p.g.appendNoteLocked(record.KindAmend, 0, 0, func(record.LSN, time.Time) []byte { return am.Append(nil) })
			return err
		}))
	}
	for i := range 100 {
		require.NoError(t, p.write(int64(i%5), byte(i)))
	}
	p.ship()
	f := p.to
	for _, lost := range []bool{false, false, true} {
		f.fillFollower()
		got, err := f.g.Markers()
		require.NoError(t, err)
		require.Len(t, got, 1)
		require.True(t, end.Equal(got[0].Held))
		require.Equal(t, []record.LSN{m.LSN}, f.g.keptLSNs())
		require.NoError(t, f.s.Close())
		if lost {
			require.NoError(t, f.mem.RemoveAll("state/index"))
		}
		f.open()
		f.g.o.Now = clock.time
	}
	clock.at.Add(int64(2 * time.Hour))
	did, err := f.g.Thin()
	require.NoError(t, err)
	require.True(t, did)
	require.Empty(t, f.g.KeptPoints())
	f.fillFollower()
}

// TestAHoldThatCanNotBeNoted is refused: a time that a record can not hold would be another one after a start.
func TestAHoldThatCanNotBeNoted(t *testing.T) {
	r := newKeptRig(t, 1, retain.Policy{EveryWrite: time.Minute})
	never := time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)
	_, err := r.g.Mark(record.Marker{Label: "never", By: "test", Held: never})
	require.ErrorContains(t, err, "too far ahead")
	m, err := r.g.Mark(record.Marker{Label: "a", By: "test"})
	require.NoError(t, err)
	_, err = r.g.HoldUntil("a", never)
	require.ErrorContains(t, err, "2262")
	last := time.Unix(0, math.MaxInt64).UTC()
	_, err = r.g.HoldUntil("a", last)
	require.NoError(t, err)
	for range 2 {
		r.anHourLater()
		require.Greater(t, r.g.Horizon(), m.LSN)
		require.True(t, r.g.isKept(m.LSN))
		require.NoError(t, r.s.Close())
		r.open()
		all, err := r.g.Markers()
		require.NoError(t, err)
		require.True(t, last.Equal(all[0].Held))
	}
}

// TestAPinWhileThinNotes what stays: it is in the note, or it is refused.
func TestAPinWhileThinNotes(t *testing.T) {
	r := newKeptRig(t, 1, retain.Policy{EveryWrite: time.Minute, Markers: 1})
	for i := range int64(40) {
		require.NoError(t, r.write(i, 1))
	}
	m, err := r.g.Mark(record.Marker{Label: "a", By: "test"})
	require.NoError(t, err)
	r.anHourLater()
	require.True(t, r.g.isKept(m.LSN))
	_, err = r.g.Mark(record.Marker{Label: "b", By: "test"})
	require.NoError(t, err)
	pinned, tried := false, false
	r.watch(func(op errorfs.Op) {
		if op.Kind == errorfs.OpFileSyncData && strings.Contains(op.Path, "/orig") && !tried {
			tried = true
			_, err := r.g.Pin("a")
			pinned = err == nil
		}
	})
	_, err = r.g.Thin()
	require.NoError(t, err)
	r.seen.Store(nil)
	require.True(t, tried)
	require.Equal(t, pinned, r.g.isKept(m.LSN))
	require.NoError(t, r.s.Close())
	require.NoError(t, r.fs.RemoveAll("state/index"))
	r.open()
	require.Equal(t, pinned, r.g.isKept(m.LSN))
}

// fillFollower applies and expires all of a group that follows.
func (r *rig) fillFollower() {
	r.t.Helper()
	require.NoError(r.t, r.g.Apply())
	r.expireAll()
}

// TestBytes: what guests wrote, what that took, and what of it is left.
func TestBytes(t *testing.T) {
	r := newRig(t, Options{})
	for i := range 20 {
		require.NoError(t, r.write(int64(i), byte(i+1)))
	}
	_, err := r.g.Mark(record.Marker{Label: "m", By: "test"})
	require.NoError(t, err)
	require.NoError(t, r.g.Apply())
	require.NoError(t, r.s.ix.Flush())
	b, err := r.g.Bytes()
	require.NoError(t, err)
	require.EqualValues(t, 20*record.BlockSize, b.Guest)
	require.Equal(t, r.g.Appended(), b.Log)
	require.Greater(t, b.Log, b.Guest)
	require.GreaterOrEqual(t, b.Originals, int64(20*record.BlockSize), "the disk was not empty")
	require.Equal(t, r.g.JournalBytes(), b.Segments)
	require.Positive(t, b.Index)
}
