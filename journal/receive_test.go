package journal

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// pair is a writer and a daemon that follows it from its beginning on.
type pair struct {
	*rig
	to *rig
}

func newPair(t *testing.T) pair {
	p := pair{newRig(t, Options{}), newRig(t, Options{})}
	require.NoError(t, p.to.s.RemoveGroup("g"))
	require.NoError(t, p.to.mem.RemoveAll("state/groups/g"))
	p.to.scribble("disk.raw", 0, bytes.Repeat([]byte{0xb0}, rigBlocks*record.BlockSize))
	b, err := p.g.Beginning(0)
	require.NoError(t, err)
	require.NoError(t, p.to.s.AddGroup(GroupConfig{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}}, Begin: &b}))
	p.to.g, err = p.to.s.Group("g")
	require.NoError(t, err)
	return p
}

// run reads what the follower lacks, in memory of its own.
func (p pair) run() record.Run {
	p.t.Helper()
	f, err := p.g.Feed(p.to.g.Head() + 1)
	require.NoError(p.t, err)
	defer f.Close()
	run, err := next(p.t, f, 1<<20)
	require.NoError(p.t, err)
	run.Bytes = bytes.Clone(run.Bytes)
	return run
}

func (p pair) ship() {
	p.t.Helper()
	for p.to.g.Head() < p.g.Head() {
		require.NoError(p.t, p.to.g.Receive(p.run()))
	}
}

// encoded is records as a run has them.
func encoded(recs ...record.Header) (b []byte) {
	for _, h := range recs {
		payload := bytes.Repeat([]byte{byte(h.LSN)}, h.Payload)
		h.Sums = record.AppendSums(nil, payload)
		b = append(h.Append(b), payload...)
		b = append(b, make([]byte, (record.Alignment-len(b)%record.Alignment)%record.Alignment)...)
	}
	return b
}

// TestWhatAFollowerRefuses: nothing of it changes anything, and what is right is taken after it.
func TestWhatAFollowerRefuses(t *testing.T) {
	p := newPair(t)
	for i := range 3 {
		require.NoError(t, p.write(int64(i), byte(i+1)))
	}
	p.ship()
	require.NoError(t, p.write(7, 7))
	good := p.run()
	h, mark := record.Header{}, record.Marker{Label: "m", Asked: record.Crash, Consistency: record.Crash}
	require.NoError(t, record.Each(good.Bytes, func(got record.Header, _ []byte) error {
		h = got
		return nil
	}))
	bad := func(change func(h *record.Header)) func(*record.Run) {
		return func(r *record.Run) {
			h := h
			change(&h)
			r.Bytes = encoded(h)
		}
	}
	note := func(kind record.Kind, payload []byte) func(*record.Run) {
		return func(r *record.Run) {
			h := record.Header{LSN: h.LSN, Time: h.Time, Kind: kind, Payload: len(payload), Sums: record.AppendSums(nil, payload)}
			r.Bytes = append(h.Append(nil), payload...)
			r.Bytes = append(r.Bytes, make([]byte, (record.Alignment-len(r.Bytes)%record.Alignment)%record.Alignment)...)
		}
	}
	other := func(epoch uint64, first record.LSN) record.Reigns {
		return record.Reigns{{Epoch: epoch, First: first, ID: [16]byte{9}}}
	}
	for name, c := range map[string]struct {
		run  func(r *record.Run)
		want error
	}{
		"one that it has":           {func(r *record.Run) { r.First-- }, record.ErrCorrupt},
		"one after the next":        {func(r *record.Run) { r.First, r.Last = r.First+1, r.Last+1 }, record.ErrCorrupt},
		"backwards":                 {func(r *record.Run) { r.Last = r.First - 1 }, record.ErrCorrupt},
		"fewer than it says":        {func(r *record.Run) { r.Last++ }, record.ErrCorrupt},
		"cut short":                 {func(r *record.Run) { r.Bytes = r.Bytes[:len(r.Bytes)-8] }, record.ErrCorrupt},
		"a flipped bit":             {func(r *record.Run) { r.Bytes[len(r.Bytes)-9] ^= 1 }, record.ErrCorrupt},
		"another LSN":               {bad(func(h *record.Header) { h.LSN++ }), record.ErrCorrupt},
		"time goes backwards":       {bad(func(h *record.Header) { h.Time = 1 }), record.ErrCorrupt},
		"a disk it has not":         {bad(func(h *record.Header) { h.Disk = 5 }), ErrDetached},
		"beyond the disk":           {bad(func(h *record.Header) { h.Extent.Off = rigBlocks * record.BlockSize }), record.ErrCorrupt},
		"a part of a block":         {bad(func(h *record.Header) { h.Extent.Len, h.Payload = 100, 100 }), record.ErrCorrupt},
		"an original":               {bad(func(h *record.Header) { h.Kind = record.KindOriginal }), record.ErrCorrupt},
		"a discontinuity":           {bad(func(h *record.Header) { h.Flags = record.FlagDiscontinuity }), nil},
		"no marker":                 {note(record.KindMarker, []byte{2, 99}), record.ErrCorrupt},
		"no amendment":              {note(record.KindAmend, []byte{1}), record.ErrCorrupt},
		"no definition":             {note(record.KindDefine, []byte{1}), record.ErrCorrupt},
		"a marker cut short":        {note(record.KindMarker, mark.Append(nil)[:14]), record.ErrCorrupt},
		"another history":           {func(r *record.Run) { r.Reigns = other(1, 1) }, ErrDiverged},
		"another, of later":         {func(r *record.Run) { r.Reigns = other(7, 1) }, ErrDiverged},
		"a writer of the future":    {func(r *record.Run) { r.Reigns = r.Reigns.With(record.Reign{Epoch: 2, First: 9, ID: [16]byte{2}}) }, record.ErrCorrupt},
		"a reign that begins ago":   {func(r *record.Run) { r.Reigns = r.Reigns.With(record.Reign{Epoch: 2, First: 2, ID: [16]byte{2}}) }, ErrDiverged},
		"no reign":                  {func(r *record.Run) { r.Reigns = nil }, record.ErrCorrupt},
		"a disk of another size":    {func(r *record.Run) { r.Disks[0].Size++ }, ErrDiverged},
		"a disk of another name":    {func(r *record.Run) { r.Disks[0].Name = "x" }, ErrDiverged},
		"a table that has it twice": {func(r *record.Run) { r.Disks = append(r.Disks, r.Disks[0]) }, record.ErrCorrupt},
		"a disk that it has not":    {func(r *record.Run) { r.Disks = append(r.Disks, record.Disk{ID: 2, Name: "y"}) }, ErrDetached},
		"a disk of the future":      {func(r *record.Run) { r.Disks = append(r.Disks, record.Disk{ID: 2, Name: "y", Added: 4}) }, record.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			run := good
			run.Bytes, run.Disks, run.Reigns = bytes.Clone(good.Bytes), slices.Clone(good.Disks), slices.Clone(good.Reigns)
			c.run(&run)
			was := p.to.g.standing.Load()
			err := p.to.g.Receive(run)
			require.Error(t, err)
			if c.want != nil {
				require.ErrorIs(t, err, c.want)
			}
			require.EqualValues(t, 3, p.to.g.Head())
			require.Same(t, was, p.to.g.standing.Load())
			state, err := p.to.g.State()
			require.NoError(t, err)
			require.Equal(t, "active", state)
		})
	}
	require.NoError(t, p.to.g.Receive(good))
	require.Equal(t, byte(7), p.to.live(7))
	require.ErrorContains(t, p.g.Receive(good), "this daemon's")
}

// TestAFollowerLeads: and who led before is not obeyed, follows from what both have, or is told that they have diverged.
func TestAFollowerLeads(t *testing.T) {
	p := newPair(t)
	_, err := p.g.Define("vm", []byte("<domain/>"))
	require.NoError(t, err)
	for i := range 20 {
		require.NoError(t, p.write(int64(i%5), byte(i)))
	}
	p.ship()
	require.ErrorIs(t, p.to.write(1, 1), ErrFollows)
	_, err = p.to.g.Mark(record.Marker{Label: "m"})
	require.ErrorIs(t, err, ErrFollows)
	require.ErrorIs(t, p.to.g.RemoveDisk("d"), ErrFollows)
	require.ErrorIs(t, p.to.g.AddDisk(DiskConfig{"e", "e.raw"}), ErrFollows)
	_, err = p.to.g.Lead(1)
	require.ErrorContains(t, err, "has had epoch 1")
	old := p.run0(t, 5)
	r, err := p.to.g.Lead(4)
	require.NoError(t, err)
	require.Equal(t, p.g.Head()+1, r.First)
	require.NoError(t, p.to.write(9, 0x99))
	require.NoError(t, p.to.g.Sync())

	// As it is, its own records are all that it has, and the other's follow them.
	require.NoError(t, p.g.Follow())
	require.NoError(t, p.g.Follow())
	require.ErrorIs(t, p.write(1, 1), ErrFollows)
	back := pair{p.to, p.rig}
	for range 2 {
		require.NoError(t, p.s.Close())
		require.NoError(t, p.mem.RemoveAll("state/index"))
		p.open()
		require.True(t, p.g.Follows(), "the segments say so")
	}
	back.ship()
	require.Equal(t, byte(0x99), p.live(9))
	require.Equal(t, p.to.g.Reigns(), p.g.Reigns())
	defs, err := p.g.Definitions(p.g.Head())
	require.NoError(t, err)
	require.Len(t, defs, 1)
	require.ErrorIs(t, p.g.Receive(record.Run{First: p.g.Head() + 1, Last: p.g.Head() + 1, Bytes: old.Bytes, Disks: old.Disks, Reigns: old.Reigns}), ErrDiverged, "an epoch that has passed")

	// It leads again, and the other one went on.
	_, err = p.g.Lead(5)
	require.NoError(t, err)
	require.NoError(t, p.write(2, 2))
	require.NoError(t, p.to.write(3, 3))
	require.NoError(t, p.to.g.Follow())
	f, err := p.g.Feed(p.g.Head())
	require.NoError(t, err)
	defer f.Close()
	run, err := next(t, f, 1)
	require.NoError(t, err)
	run.First, run.Last = p.to.g.Head()+1, p.to.g.Head()+1
	require.ErrorIs(t, p.to.g.Receive(run), ErrDiverged)
}

// run0 reads a run from an LSN on.
func (p pair) run0(t *testing.T, from record.LSN) record.Run {
	f, err := p.g.Feed(from)
	require.NoError(t, err)
	defer f.Close()
	run, err := next(t, f, 1)
	require.NoError(t, err)
	run.Bytes = bytes.Clone(run.Bytes)
	return run
}

// TestAFollowerBeginsInTheMiddle: with the definitions in force, and nothing of before.
func TestAFollowerBeginsInTheMiddle(t *testing.T) {
	r, to := newRig(t, Options{}), newRig(t, Options{})
	_, err := r.g.Define("vm", []byte("<domain/>"))
	require.NoError(t, err)
	for i := range 40 {
		require.NoError(t, r.write(int64(i%5), byte(i+1)))
	}
	require.NoError(t, r.g.Apply())
	at := r.g.Head()
	b, err := r.g.Beginning(at)
	require.NoError(t, err)
	for i := range int64(5) {
		to.scribble("seeded.raw", i*record.BlockSize, bytes.Repeat([]byte{r.live(i)}, record.BlockSize))
	}
	to.scribble("seeded.raw", rigBlocks*record.BlockSize-1, []byte{0})
	b.Disks[0].Size++
	require.ErrorContains(t, to.s.AddGroup(GroupConfig{Name: "f", Disks: []DiskConfig{{"d", "seeded.raw"}}, Begin: &b}), "the journal knows")
	b.Disks[0].Size--
	b.Reigns[0].First = at + 2
	require.ErrorIs(t, to.s.AddGroup(GroupConfig{Name: "f", Begin: &b}), record.ErrCorrupt)
	b.Reigns[0].First = 1
	require.ErrorContains(t, to.s.AddGroup(GroupConfig{Name: "f", Disks: []DiskConfig{{"x", "seeded.raw"}}, Begin: &b}), "not in group")
	require.NoError(t, to.s.AddGroup(GroupConfig{Name: "f", Disks: []DiskConfig{{"d", "seeded.raw"}}, Begin: &b}))
	for _, lose := range []bool{false, true, false} {
		f, err := to.s.Group("f")
		require.NoError(t, err)
		require.Equal(t, []record.LSN{at, at, at, at}, []record.LSN{f.Head(), f.Horizon(), f.Durable(), f.Applied()})
		require.True(t, f.Follows())
		defs, err := f.Definitions(at)
		require.NoError(t, err)
		require.Len(t, defs, 1)
		require.Equal(t, "<domain/>", string(defs[0].Content))
		require.EqualValues(t, 1, defs[0].Since)
		v, err := f.View(f.Disks()[0], at)
		require.NoError(t, err)
		got := make([]byte, 1)
		require.NoError(t, v.ReadAt(got, 4*record.BlockSize, false))
		require.Equal(t, byte(40), got[0])
		v.Close()
		_, err = f.View(f.Disks()[0], at-1)
		require.ErrorIs(t, err, ErrNoPoint)
		require.NoError(t, to.s.RemoveGroup("f"))
		if lose {
			require.NoError(t, to.s.Close())
			require.NoError(t, to.mem.RemoveAll("state/index"))
			to.open()
		}
		require.NoError(t, to.s.AddGroup(GroupConfig{Name: "f", Disks: []DiskConfig{{"d", "seeded.raw"}}}))
	}
}

// TestAFollowersBackingThatWasChanged is told, and nothing is journaled of it.
func TestAFollowersBackingThatWasChanged(t *testing.T) {
	p := newPair(t)
	require.NoError(t, p.write(3, 3))
	p.ship()
	require.NoError(t, p.to.g.Apply())
	require.NoError(t, p.to.s.Close())
	p.to.scribble("disk.raw", 3*record.BlockSize, []byte("somebody else's"))
	p.to.open()
	_, err := p.to.g.State()
	require.ErrorIs(t, err, ErrFailed)
	require.ErrorContains(t, err, "seeded again")
	require.EqualValues(t, 1, p.to.g.Head())
}

// TestLeadingIsDurable: a host that dies right after it leads still, and one that dies before has the choice.
func TestLeadingIsDurable(t *testing.T) {
	p := newPair(t)
	for i := range int64(30) {
		require.NoError(t, p.write(i, 1))
	}
	p.ship()
	var clones []*vfs.MemFS
	var mu sync.Mutex // guards them: the database has goroutines of its own
	p.to.watch(func(op errorfs.Op) {
		if isWrite(op.Kind) {
			mu.Lock()
			defer mu.Unlock()
			for i, percent := range survivals {
				clones = append(clones, p.to.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rand.New(rand.NewPCG(uint64(len(clones)), uint64(i)))}))
			}
		}
	})
	r, err := p.to.g.Lead(2)
	p.to.seen.Store(nil)
	require.NoError(t, err)
	clones = append(clones, p.to.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 0}))
	require.Greater(t, len(clones), 3)
	for i, fs := range clones {
		s, err := Open("state", []GroupConfig{{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}}}}, Options{FS: fs, SegmentSize: 64 << 10})
		require.NoError(t, err, "crash %d", i)
		g := s.Groups()[0]
		state, err := g.State()
		require.NoError(t, err)
		require.Equal(t, "active", state)
		if last := i == len(clones)-1; last || !g.Follows() {
			require.False(t, g.Follows())
			require.Equal(t, r, g.Reigns()[len(g.Reigns())-1])
			require.EqualValues(t, 30, g.Head(), "what it led from is durable with it")
		}
		require.NoError(t, s.Abandon(), fmt.Sprint(i))
	}
}

// TestAWriterComesBack: it starts as what its segments say, a writer, with its own clock; then it follows who leads now.
func TestAWriterComesBack(t *testing.T) {
	p := newPair(t)
	require.NoError(t, p.write(1, 1))
	p.ship()
	require.NoError(t, p.s.Close())
	_, err := p.to.g.Lead(2)
	require.NoError(t, err)
	require.NoError(t, p.to.write(2, 2))
	require.NoError(t, p.to.g.Sync())
	p.open()
	require.NoError(t, p.g.Follow())
	for range 2 {
		require.NoError(t, p.s.Close())
		p.open()
	}
	pair{p.to, p.rig}.ship()
	require.Equal(t, byte(2), p.live(2))
}

// TestReceiveWaitsForRoom: what it was to append is of no use if the group has another writer meanwhile.
func TestReceiveWaitsForRoom(t *testing.T) {
	p := newPair(t)
	p.to.g.o.Unapplied = 4 * record.BlockSize
	for i := range int64(4) {
		require.NoError(t, p.write(i, 1))
	}
	p.ship()
	require.NoError(t, p.write(9, 0xaa))
	run := p.run()
	received := make(chan error, 1)
	go func() { received <- p.to.g.Receive(run) }()
	for p.to.g.receiving.TryLock() {
		p.to.g.receiving.Unlock() // until it is at it
	}
	_, err := p.to.g.Lead(5)
	require.NoError(t, err)
	require.NoError(t, p.to.g.Follow())
	require.NoError(t, p.to.g.Apply())
	require.Error(t, <-received)
	require.EqualValues(t, 4, p.to.g.Head())
}

// TestABeginningIsBegunAgain at a later LSN, after a crash at any of its writes.
func TestABeginningIsBegunAgain(t *testing.T) {
	r, to := newRig(t, Options{}), newRig(t, Options{})
	for i := range 40 {
		require.NoError(t, r.write(int64(i%5), byte(i+1)))
	}
	_, err := r.g.Define("vm", []byte("<domain/>"))
	require.NoError(t, err)
	first, err := r.g.Beginning(41)
	require.NoError(t, err)
	require.NoError(t, r.write(0, 0))
	second, err := r.g.Beginning(42)
	require.NoError(t, err)
	to.scribble("seeded.raw", 0, make([]byte, rigBlocks*record.BlockSize))
	require.NoError(t, syncDirs(to.mem, ""))
	var clones []*vfs.MemFS
	var mu sync.Mutex // guards them: the database has goroutines of its own
	to.watch(func(op errorfs.Op) {
		if isWrite(op.Kind) {
			mu.Lock()
			defer mu.Unlock()
			for i, percent := range survivals {
				clones = append(clones, to.mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: percent, RNG: rand.New(rand.NewPCG(uint64(len(clones)), uint64(i)))}))
			}
		}
	})
	require.NoError(t, to.s.AddGroup(GroupConfig{Name: "f", Disks: []DiskConfig{{"d", "seeded.raw"}}, Begin: &first}))
	to.seen.Store(nil)
	require.Greater(t, len(clones), 20)
	for i, fs := range clones {
		s, err := Open("state", nil, Options{FS: fs, SegmentSize: 64 << 10})
		require.NoError(t, err)
		config := GroupConfig{Name: "f", Disks: []DiskConfig{{"d", "seeded.raw"}}, Begin: &second}
		if err := s.AddGroup(config); err != nil {
			require.ErrorContains(t, err, "already", "crash %d", i)
			config.Begin = nil
			require.NoError(t, s.AddGroup(config))
		}
		f, err := s.Group("f")
		require.NoError(t, err)
		state, err := f.State()
		require.NoError(t, err, "crash %d", i)
		require.Equal(t, "active", state)
		require.Contains(t, []record.LSN{41, 42}, f.Head(), "begun again, or it was begun")
		defs, err := f.Definitions(f.Head())
		require.NoError(t, err)
		require.Len(t, defs, 1)
		require.NoError(t, s.Abandon())
	}
}

// TestADiskThatComesToAFollower: new, gone, and come again, when what was done to its backing meanwhile is not known.
func TestADiskThatComesToAFollower(t *testing.T) {
	p := newPair(t)
	for _, r := range []*rig{p.rig, p.to} {
		r.scribble("more.raw", 0, make([]byte, 8*record.BlockSize))
	}
	require.NoError(t, p.g.AddDisk(DiskConfig{"more", "more.raw"}))
	more, err := p.g.Disk("more")
	require.NoError(t, err)
	require.NoError(t, writeTo(p.g, more, 0, 1))
	run := p.run()
	require.ErrorIs(t, p.to.g.Receive(run), ErrDetached)
	require.ErrorContains(t, p.to.g.Adopt(DiskConfig{"d", "more.raw"}, run.Disks[0]), "it is in the group")
	require.ErrorContains(t, p.to.g.Adopt(DiskConfig{"other", "more.raw"}, run.Disks[1]), "under the name")
	require.ErrorContains(t, p.g.Adopt(DiskConfig{"more", "more.raw"}, run.Disks[1]), "this daemon's")
	require.NoError(t, p.to.g.Adopt(DiskConfig{"more", "more.raw"}, run.Disks[1]))
	require.ErrorContains(t, p.to.g.Adopt(DiskConfig{"more", "more.raw"}, run.Disks[1]), "it is in the group")
	p.ship()
	require.NoError(t, p.g.RemoveDisk("more"))
	require.NoError(t, p.write(1, 1))
	p.ship()
	require.Len(t, p.to.g.Disks(), 1)
	require.NoError(t, p.g.AddDisk(DiskConfig{"more", "more.raw"}))
	require.NoError(t, p.write(1, 2))
	run = p.run()
	require.ErrorIs(t, p.to.g.Receive(run), ErrDetached)
	require.ErrorContains(t, p.to.g.Adopt(DiskConfig{"more", "more.raw"}, run.Disks[1]), "its history is")
}

// TestManyTrimsAreReceived: each costs the index many versions, and the limits on those hold.
func TestManyTrimsAreReceived(t *testing.T) {
	p := newPair(t)
	var recs []record.Header
	for i := range 3000 {
		recs = append(recs, record.Header{LSN: record.LSN(i + 1), Time: p.to.g.recordTime.Load(), Kind: record.KindTrim, Disk: 1, Extent: record.Extent{Off: record.BlockSize, Len: (rigBlocks - 2) * record.BlockSize}})
	}
	run := record.Run{First: 1, Last: record.LSN(len(recs)), Bytes: encoded(recs...), Disks: p.g.disks.Load().table, Reigns: p.g.Reigns()}
	p.to.running(func() error { return p.to.g.Receive(run) })
	require.EqualValues(t, len(recs), p.to.g.Head())
}

// TestAPassingView: it pins nothing, shows what a view does while its point can be viewed, and nothing else from then on.
func TestAPassingView(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, r.write(1, 1))
	v, err := r.g.PassingView(r.g.Disks()[0], r.g.Head())
	require.NoError(t, err)
	defer v.Close()
	b := make([]byte, record.BlockSize)
	require.NoError(t, v.ReadAt(b, record.BlockSize, false))
	require.EqualValues(t, 1, b[0])
	for i := range 60 {
		require.NoError(t, r.write(int64(i%rigBlocks), 9))
	}
	require.NoError(t, errors.Join(r.g.Sync(), r.g.Apply()))
	_, err = r.g.Expire(1)
	require.NoError(t, err)
	require.Greater(t, r.g.Horizon(), v.LSN())
	require.ErrorIs(t, v.ReadAt(b, record.BlockSize, false), ErrNoPoint)
	require.ErrorIs(t, v.Extents(record.Extent{Len: 1}, func(int64, bool) {}), ErrNoPoint)
}

// TestReceivedGroups: without a journal of the writer's, nothing is begun; what is discarded can be begun again.
func TestReceivedGroups(t *testing.T) {
	p := newPair(t)
	require.NoError(t, p.write(1, 1))
	p.ship()
	gc := GroupConfig{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}}, Received: true}
	require.ErrorIs(t, p.to.s.Discard("g"), ErrInUse)
	require.NoError(t, p.to.s.RemoveGroup("g"))
	require.NoError(t, p.to.s.AddGroup(gc))
	require.NoError(t, p.to.s.RemoveGroup("g"))
	id := p.to.g.id
	require.NoError(t, p.to.s.Discard("g"))
	ix, err := p.to.s.ix.Group(id)
	require.NoError(t, err)
	require.NoError(t, ix.Versions(func(e index.Entry) (bool, error) {
		t.Errorf("the index has %+v still", e)
		return true, nil
	}))
	mark, err := ix.Watermark()
	require.NoError(t, err)
	require.Zero(t, mark)
	require.Error(t, p.to.s.Discard("../g"))
	require.ErrorIs(t, p.to.s.AddGroup(gc), ErrNotBegun)
	require.NoError(t, p.to.s.Abandon())
	s, err := Open("state", []GroupConfig{gc}, Options{FS: p.to.fs})
	require.NoError(t, err, "a group that has not begun is left out")
	p.to.s = s
	require.Empty(t, s.Groups())
	b, err := p.g.Beginning(p.g.Head())
	require.NoError(t, err)
	gc.Begin = &b
	require.NoError(t, s.AddGroup(gc))
}

// TestClocksApart: a follower's records have its writer's times, whatever its own clock says; when it leads, none is older than what came.
func TestClocksApart(t *testing.T) {
	for name, off := range map[string]time.Duration{"behind": -365 * 24 * time.Hour, "ahead": 365 * 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			p.to.g.o.Now = func() time.Time { return time.Now().Add(off) }
			for i := range 3 {
				require.NoError(t, p.write(int64(i), byte(i+1)))
			}
			p.ship()
			times := func(g *Group) (all []int64) {
				f, err := g.Feed(1)
				require.NoError(t, err)
				defer f.Close()
				for record.LSN(len(all)) < g.Head() {
					run, err := next(t, f, 1<<20)
					require.NoError(t, err)
					require.NoError(t, record.Each(run.Bytes, func(h record.Header, _ []byte) error {
						all = append(all, h.Time)
						return nil
					}))
				}
				return all
			}
			require.Equal(t, times(p.g), times(p.to.g))
			_, err := p.to.g.Lead(2)
			require.NoError(t, err)
			require.NoError(t, p.to.write(7, 7))
			require.True(t, slices.IsSorted(times(p.to.g)))
		})
	}
}
