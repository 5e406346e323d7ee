package journal

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// strayed is a follower that wrote the group itself from LSN 3 on, and follows again.
func strayed(t *testing.T) pair {
	p := newPair(t)
	for i := range 3 {
		require.NoError(t, p.write(int64(i), byte(i+1)))
	}
	p.ship()
	_, err := p.to.g.Lead(2)
	require.NoError(t, err)
	for i := range 5 {
		require.NoError(t, p.to.write(int64(i), 0xee))
	}
	_, err = p.to.g.Mark(record.Marker{Label: "stray", Asked: record.Crash, Consistency: record.Crash, Pinned: true})
	require.NoError(t, err)
	require.NoError(t, p.to.g.Follow())
	return p
}

// TestRewind: nothing of what was recorded behind the LSN is left, and the group goes on with its writer.
func TestRewind(t *testing.T) {
	p := strayed(t)
	require.ErrorContains(t, p.s.Rewind("g", 1), "have it follow first")
	for _, to := range []record.LSN{100, record.MaxLSN} {
		require.ErrorIs(t, p.to.s.Rewind("g", to), ErrNoPoint)
	}
	v, err := p.to.g.View(p.to.g.Disks()[0], 3)
	require.NoError(t, err)
	require.ErrorIs(t, p.to.s.Rewind("g", 3), ErrInUse)
	v.Close()
	require.EqualValues(t, 9, p.to.g.Head(), "a refusal changes nothing")

	require.NoError(t, p.to.s.Rewind("g", 3))
	p.to.g, err = p.to.s.Group("g")
	require.NoError(t, err)
	require.EqualValues(t, 3, p.to.g.Head())
	require.Equal(t, p.g.Reigns(), p.to.g.Reigns())
	markers, err := p.to.g.Markers()
	require.NoError(t, err)
	require.Empty(t, markers)
	require.NoError(t, p.write(1, 7))
	p.ship()
	for i, want := range []byte{1, 7, 3, 0xb0, 0xb0} {
		require.Equal(t, want, p.to.live(int64(i)))
	}
	b, err := p.to.at(3, 1)
	require.NoError(t, err)
	require.EqualValues(t, 2, b)
}

// TestARewindThatFails fails the group, and the next opening goes on with it.
func TestARewindThatFails(t *testing.T) {
	for _, spare := range []int32{0, 3, 6, 9, 12, 15, 20} {
		p := strayed(t)
		f := p.to.inject(errorfs.OpFileSync, "state/groups/g", errors.New("no"))
		f.spare.Store(spare)
		err := p.to.s.Rewind("g", 3)
		p.to.fault.Store(nil)
		if f.fired.Load() == 0 {
			require.NoError(t, err)
		}
		require.NoError(t, p.to.s.Abandon())
		s, err := Open("state", []GroupConfig{{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}}}}, Options{FS: p.to.fs, SegmentSize: 64 << 10})
		require.NoError(t, err)
		p.to.s = s
		if g := s.Groups()[0]; g.Head() != 3 {
			require.EqualValues(t, 9, g.Head(), "it failed before its note")
			require.NoError(t, s.Rewind("g", 3))
		}
		p.to.g = s.Groups()[0]
		require.EqualValues(t, 3, p.to.g.Head())
		p.ship()
		for i, want := range []byte{1, 2, 3, 0xb0, 0xb0} {
			require.Equal(t, want, p.to.live(int64(i)))
		}
	}
}

// TestNoRewindOverDisks: one that came, or was changed by others, behind the LSN has no content of before.
func TestNoRewindOverDisks(t *testing.T) {
	p := newPair(t)
	require.NoError(t, p.write(1, 1))
	p.ship()
	_, err := p.to.g.Lead(2)
	require.NoError(t, err)
	p.to.scribble("more.raw", 0, make([]byte, 8*record.BlockSize))
	require.NoError(t, p.to.write(1, 2))
	require.NoError(t, p.to.g.AddDisk(DiskConfig{"more", "more.raw"}))
	require.NoError(t, p.to.g.Follow())
	require.ErrorContains(t, p.to.s.Rewind("g", 1), "disk more came to the group")
}

func TestRewindNotes(t *testing.T) {
	n := rewindNote{to: 7, last: 4, file: 9}
	b := n.append(nil)
	require.Len(t, b, rewindSize)
	got, err := decodeRewindNote(b)
	require.NoError(t, err)
	require.Equal(t, n, got)
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		_, err := decodeRewindNote(bad)
		require.Error(t, err)
	}
	_, err = decodeRewindNote(b[:20])
	require.ErrorIs(t, err, record.ErrCorrupt)
}

func TestBlockSets(t *testing.T) {
	s := make(blockSet, 4)
	for _, b := range []int64{0, 1, 62, 63, 64, 65, 130, 255} {
		s.add(b, 1)
	}
	var runs [][2]int64
	require.NoError(t, s.runs(3, func(first, n int64) error {
		runs = append(runs, [2]int64{first, n})
		return nil
	}))
	require.Equal(t, [][2]int64{{0, 2}, {62, 3}, {65, 1}, {130, 1}, {255, 1}}, runs)
}

// reopen opens the follower's store again, as its daemon does.
func (r *rig) reopen() {
	r.t.Helper()
	s, err := Open("state", []GroupConfig{{Name: "g", Disks: []DiskConfig{{"d", "disk.raw"}}, Received: true}}, Options{FS: r.fs, SegmentSize: 64 << 10})
	require.NoError(r.t, err)
	require.Len(r.t, s.Groups(), 1)
	r.s, r.g = s, s.Groups()[0]
}

func (r *rig) state() string {
	state, _ := r.g.State()
	return state
}

func (r *rig) trim(block int64) {
	r.t.Helper()
	require.NoError(r.t, r.g.Append([]Op{{Kind: record.KindTrim, Disk: r.g.Disks()[0], Ext: record.Extent{Off: block * record.BlockSize, Len: record.BlockSize}}}))
}

// TestRewindToATornTail: what a crash tore behind the LSN, and a later file went on after, is no damage.
func TestRewindToATornTail(t *testing.T) {
	p := newPair(t)
	for i := range 4 {
		require.NoError(t, p.write(int64(i), byte(i+1)))
	}
	p.ship()
	require.NoError(t, p.to.g.syncTo(3))
	f, at := p.to.g.append.log.Current(), int64(0)
	_, err := f.Scan(f.Start(), func(off int64, h record.Header) error {
		if h.LSN == 4 {
			at = off
		}
		return nil
	})
	require.NoError(t, err)
	require.NoError(t, p.to.s.Abandon())
	p.to.damage(f.Path, at+8)
	p.to.reopen()
	require.EqualValues(t, 3, p.to.g.Head())
	_, err = p.to.g.Lead(2)
	require.NoError(t, err)
	require.NoError(t, p.to.write(1, 9))
	require.NoError(t, p.to.g.Follow())
	require.NoError(t, p.to.s.Rewind("g", 3))
}

// TestNoRewindOfAFailedGroup: it would come back as one that has not failed.
func TestNoRewindOfAFailedGroup(t *testing.T) {
	p := strayed(t)
	require.NoError(t, p.to.s.Close())
	time.Sleep(5 * time.Millisecond) // the backing's time is to be another
	p.to.scribble("disk.raw", 100*record.BlockSize, bytes.Repeat([]byte{0x66}, record.BlockSize))
	p.to.reopen()
	require.ErrorIs(t, p.to.s.Rewind("g", 3), ErrFailed)

	p = strayed(t)
	require.NoError(t, p.to.g.Apply())
	p.to.inject(errorfs.OpFileSyncData, "disk.raw", errors.New("no"))
	require.Error(t, p.to.g.Checkpoint())
	p.to.fault.Store(nil)
	require.ErrorIs(t, p.to.s.Rewind("g", 3), ErrFailed, "a failed sync is final")
}

// TestARewindAndAnExpiry that is under way when it begins: one of the two gives way, before anything is noted.
func TestARewindAndAnExpiry(t *testing.T) {
	p := newPair(t)
	for i := range 40 {
		require.NoError(t, p.write(int64(i), byte(i+1)))
	}
	p.ship()
	_, err := p.to.g.Lead(2)
	require.NoError(t, err)
	for i := range 60 {
		require.NoError(t, p.to.write(int64(i), 0xee))
	}
	require.NoError(t, errors.Join(p.to.g.Follow(), p.to.g.Apply()))
	g := p.to.g
	g.loops.Lock() // a background expiry is under way
	done := make(chan error)
	go func() { done <- p.to.s.Rewind("g", 40) }()
	require.Eventually(t, func() bool {
		g.pins.Lock()
		defer g.pins.Unlock()
		return g.pins.users[g.disks.Load().all[0]] < 0
	}, 10*time.Second, time.Millisecond)
	_, err = g.Expire(1 << 40)
	require.NoError(t, err)
	g.loops.Unlock()
	require.NoError(t, <-done)
	p.to.g = p.to.s.Groups()[0]
	require.EqualValues(t, 40, p.to.g.Head())
	require.EqualValues(t, 3, p.to.live(2))
}

// TestARewindWithoutItsIndex: originals whose history has expired are not believed while backings are restored.
func TestARewindWithoutItsIndex(t *testing.T) {
	p := newPair(t)
	p.trim(7)
	for i := range 30 {
		require.NoError(t, p.write(int64(i+20), byte(i+1)))
	}
	p.ship()
	require.NoError(t, p.to.g.Apply())
	require.NoError(t, p.write(2, 2))
	p.ship()
	require.NoError(t, p.to.g.Apply())
	_, err := p.to.g.Expire(1)
	require.NoError(t, err)
	require.NotZero(t, p.to.g.Horizon())
	to := p.to.g.Head()
	_, err = p.to.g.Lead(2)
	require.NoError(t, err)
	p.to.trim(7)
	require.NoError(t, p.to.write(3, 0xee))
	require.NoError(t, p.to.g.Follow())
	f := p.to.inject(errorfs.OpCreate, "rewind.new", errors.New("no"))
	f.spare.Store(1)
	require.Error(t, p.to.s.Rewind("g", to))
	p.to.fault.Store(nil)
	require.NoError(t, p.to.s.Abandon())
	require.NoError(t, p.to.mem.RemoveAll("state/index"))
	p.to.reopen()
	require.Equal(t, to, p.to.g.Head())
	require.EqualValues(t, 0, p.to.live(7))
}

// TestARewindBehindADiscontinuity: an original of a block that nothing has overwritten but what is dropped goes with that.
func TestARewindBehindADiscontinuity(t *testing.T) {
	r := newRig(t, Options{})
	require.NoError(t, errors.Join(r.write(0, 1), r.write(1, 1), r.s.Close()))
	time.Sleep(5 * time.Millisecond)
	r.scribble("disk.raw", 0, bytes.Repeat([]byte{0x66}, record.BlockSize))
	r.open()
	require.NotZero(t, r.g.Disks()[0].KnownSince())
	to := r.g.Head()
	require.NoError(t, errors.Join(r.write(50, 9), r.g.Apply(), r.g.Follow(), r.s.Rewind("g", to)))
	r.g = r.s.Groups()[0]
	_, err := r.g.Lead(5)
	require.NoError(t, err)
	for i := range 60 {
		require.NoError(t, r.write(int64(100+i), 1))
	}
	require.NoError(t, errors.Join(r.g.Apply(), r.s.Close()))
	r.open()
	require.NoError(t, errors.Join(r.write(2, 2), r.g.Apply()))
	for range 30 {
		_, err = r.g.Expire(1 << 40)
		require.NoError(t, err)
	}
	require.Greater(t, r.g.Horizon(), to)
	b, err := r.at(r.g.Head(), 50)
	require.NoError(t, err)
	require.EqualValues(t, 0xb0, b)
}

// TestARewindThatCanNotGoOn fails its group, whose disks nobody gets, and no other one.
func TestARewindThatCanNotGoOn(t *testing.T) {
	for _, name := range []string{"originals.tmp", "log.tmp"} {
		p := strayed(t)
		require.NoError(t, p.to.g.Apply())
		p.to.inject(errorfs.OpCreate, name, fmt.Errorf("x: %w", syscall.ENOSPC))
		require.Error(t, p.to.s.Rewind("g", 3))
		_, err := p.to.g.Use(p.to.g.disks.Load().all[0])
		require.ErrorIs(t, err, ErrDetached)
		require.NoError(t, p.to.s.Abandon())
		p.to.reopen()
		require.Equal(t, "failed", p.to.state(), name)
		_, err = p.to.g.Use(p.to.g.disks.Load().all[0])
		require.ErrorIs(t, err, ErrDetached, "they may be a mix")
		p.to.fault.Store(nil)
		require.NoError(t, p.to.s.Abandon())
		p.to.reopen()
		require.Equal(t, "active", p.to.state())
		require.EqualValues(t, 3, p.to.g.Head())
	}

	p := strayed(t)
	p.to.inject(errorfs.OpCreate, "originals.tmp", fmt.Errorf("x: %w", syscall.ENOSPC))
	require.Error(t, p.to.s.Rewind("g", 3))
	p.to.fault.Store(nil)
	require.Equal(t, "full", p.to.state(), "it could not be applied, and nothing was noted")
	require.NoError(t, p.to.s.Rewind("g", 3))
}

// TestARewindOverDamage: what is damaged among the originals is, behind it, where it is read.
func TestARewindOverDamage(t *testing.T) {
	p := newPair(t)
	require.NoError(t, errors.Join(p.write(1, 1), p.write(1, 2)))
	p.ship()
	_, err := p.to.g.Lead(2)
	require.NoError(t, err)
	require.NoError(t, errors.Join(p.to.write(5, 0xee), p.to.g.Follow(), p.to.g.Apply()))
	f, n := p.to.g.set.Files(segment.Originals)[0], 0
	_, err = f.Scan(f.Start(), func(off int64, h record.Header) error {
		if h.Kind == record.KindOriginal && h.Extent.Off == record.BlockSize {
			p.to.damage(f.Path, off+int64(h.EncodedSize())+100)
			n++
		}
		return nil
	})
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.NoError(t, p.to.s.Rewind("g", 2))
	p.to.g = p.to.s.Groups()[0]
	_, err = p.to.at(0, 1)
	require.ErrorIs(t, err, record.ErrCorrupt)
	b, err := p.to.at(2, 1)
	require.NoError(t, err)
	require.EqualValues(t, 2, b)
	require.EqualValues(t, 0xb0, p.to.live(5))
}

// TestTwoCrashesOfARewind of a group whose log has no record leave a file that says who it is.
func TestTwoCrashesOfARewind(t *testing.T) {
	p := newPair(t)
	_, err := p.to.g.Lead(2)
	require.NoError(t, err)
	require.NoError(t, p.to.g.Follow())
	p.to.inject(errorfs.OpCreate, "originals.tmp", errors.New("no"))
	require.Error(t, p.to.s.Rewind("g", 0))
	p.to.inject(errorfs.OpCreate, "rewind.new", errors.New("no"))
	require.NoError(t, p.to.s.Abandon())
	p.to.reopen()
	require.Equal(t, "failed", p.to.state())
	p.to.fault.Store(nil)
	require.NoError(t, p.to.s.Abandon())
	p.to.reopen()
	require.True(t, p.to.g.Follows())
	require.Equal(t, "active", p.to.state())
}

// TestANoteWithoutALog is of a journal that was removed.
func TestANoteWithoutALog(t *testing.T) {
	p := strayed(t)
	p.to.inject(errorfs.OpRemove, "state/groups/g", errors.New("no"))
	require.Error(t, p.to.s.Rewind("g", 3))
	p.to.fault.Store(nil)
	names, err := p.to.mem.List("state/groups/g")
	require.NoError(t, err)
	for _, n := range names {
		if strings.HasSuffix(n, ".seg") {
			require.NoError(t, p.to.mem.Remove("state/groups/g/"+n))
		}
	}
	require.NoError(t, p.to.s.Abandon())
	s, err := Open("state", []GroupConfig{{Name: "g", Received: true}}, Options{FS: p.to.fs})
	require.NoError(t, err)
	p.to.s = s
	require.Empty(t, s.Groups())
}

// TestAFeedEndsWithItsGroup: who waits for more is told.
func TestAFeedEndsWithItsGroup(t *testing.T) {
	p := strayed(t)
	f, err := p.to.g.Feed(p.to.g.Head() + 1)
	require.NoError(t, err)
	defer f.Close()
	done := make(chan error, 1)
	go func() {
		_, err := f.Next(t.Context(), 0)
		done <- err
	}()
	require.NoError(t, p.to.s.Rewind("g", 3))
	require.ErrorContains(t, <-done, "being rewound")
}
