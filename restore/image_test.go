package restore

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// image is a source in memory.
type image struct {
	b     []byte
	holes bool         // tell zeroes as such
	fail  atomic.Int64 // reads fail from this one on; 0: never
	first func()       // called before the first read
	reads atomic.Int64
}

func (m *image) Size() int64 { return int64(len(m.b)) }

func (m *image) ReadAt(p []byte, off int64) error {
	n := m.reads.Add(1)
	if n == 1 && m.first != nil {
		m.first()
	}
	if f := m.fail.Load(); f != 0 && n >= f {
		return syscall.EIO
	}
	copy(p, m.b[off:])
	return nil
}

func (m *image) Extents(off, n int64, fn func(n int64, zero bool)) error {
	const step = 4096
	for end := off + n; off < end; {
		k := min(end-off, step-off%step)
		fn(k, m.holes && isZero(m.b[off:off+k]))
		off += k
	}
	return nil
}

func newImage() *image {
	m := &image{b: make([]byte, 5<<20+1000)}
	for _, off := range []int{0, 1 << 20, 3<<20 + 70000, 5 << 20} {
		copy(m.b[off:], bytes.Repeat([]byte{0xaa}, 900))
	}
	return m
}

// large has several spans, with data here and there.
func large(seed uint64) *image {
	rng := rand.New(rand.NewPCG(seed, 0))
	m := &image{b: make([]byte, 7*span+12345), holes: true}
	for range 200 {
		off := rng.IntN(len(m.b))
		b := m.b[off:min(len(m.b), off+1+rng.IntN(300<<10))]
		for i := range min(len(b), 64) {
			b[i] = byte(rng.Uint32())
		}
		for i := 64; i < len(b); i += copy(b[i:], b[:i]) {
		}
	}
	return m
}

func blocks(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	require.NoError(t, err)
	return info.Sys().(*syscall.Stat_t).Blocks * 512
}

func TestAnImageIsWholeAndSparse(t *testing.T) {
	for _, holes := range []bool{true, false} {
		m, path := newImage(), filepath.Join(t.TempDir(), "out.raw")
		m.holes = holes
		var told, verified atomic.Int64
		o := Options{Verify: true, Progress: func(n int64) { told.Add(n) }, Verified: func(n int64) { verified.Add(n) }}
		require.NoError(t, ToFile(context.Background(), m, path, o))
		got, err := os.ReadFile(path)
		require.NoError(t, err)
		require.True(t, bytes.Equal(m.b, got))
		require.Equal(t, m.Size(), told.Load())
		require.Equal(t, m.Size(), verified.Load())
		require.Less(t, blocks(t, path), int64(1<<20))
	}
}

// TestAnImageIsCompleteOrNothing: what was there before stays until the new one is whole, and nothing is left beside it
// of what never began.
func TestAnImageIsCompleteOrNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "out.raw")
	ctx := context.Background()
	m := newImage()
	m.fail.Store(1)
	require.ErrorIs(t, ToFile(ctx, m, path, Options{}), syscall.EIO)
	require.NoFileExists(t, path)
	require.NoError(t, os.WriteFile(path, []byte("before"), 0o600))
	require.ErrorIs(t, ToFile(ctx, m, path, Options{Force: true}), syscall.EIO)
	m.fail.Store(0)
	ended, cancel := context.WithCancel(ctx)
	cancel()
	require.ErrorIs(t, ToFile(ended, m, path, Options{Force: true}), context.Canceled)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "before", string(b))
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, names, 1)

	require.ErrorIs(t, ToFile(ctx, m, path, Options{}), fs.ErrExist)
	require.NoError(t, ToFile(ctx, m, path, Options{Force: true}))
	require.ErrorContains(t, ToFile(ctx, m, dir, Options{Force: true}), "not a file")
}

// TestAnImageReplacesNothingThatCameMeanwhile: without Force, a file that is made
// while the source is copied stays.
func TestAnImageReplacesNothingThatCameMeanwhile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out.raw")
	m := newImage()
	m.first = func() { require.NoError(t, os.WriteFile(path, []byte("other"), 0o600)) }
	err := ToFile(context.Background(), m, path, Options{})
	require.True(t, errors.Is(err, fs.ErrExist), err)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "other", string(b))
}

// TestAnImageInUseIsNotReplaced: somebody who has the old file open would go on with it.
func TestAnImageInUseIsNotReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out.raw")
	f, err := os.Create(path)
	require.NoError(t, err)
	require.ErrorIs(t, ToFile(context.Background(), newImage(), path, Options{Force: true}), ErrInUse)
	_, err = OpenFile(path)
	require.ErrorIs(t, err, ErrInUse)
	require.NoError(t, f.Close())
	require.NoError(t, ToFile(context.Background(), newImage(), path, Options{Force: true}))
}

// TestABrokenRestoreGoesOn breaks restores in the middle, each time a bit later: every attempt goes on from the
// last one, reading less than the whole, and the image is right. The same for a restore that is killed after its
// note was written, which is what a copy of the directory at that moment is.
func TestABrokenRestoreGoesOn(t *testing.T) {
	for _, format := range []Format{Raw, QCOW2} {
		t.Run(string(format), func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "out")
			ctx := context.Background()
			m := large(1)
			o := Options{Format: format, Verify: true, Origin: Origin{Disk: "g/d", LSN: 7, Point: "-5m"}}
			m.fail.Store(1 << 62)
			whole := Options{Format: format}
			require.NoError(t, ToFile(ctx, m, filepath.Join(dir, "whole"), whole))
			reads := m.reads.Swap(0)
			m.fail.Store(reads * 2 / 3)
			require.ErrorIs(t, ToFile(ctx, m, path, o), syscall.EIO)
			require.NoFileExists(t, path)
			left, ok := Left(path)
			require.True(t, ok)
			require.Equal(t, o.Origin, left)

			// Another point does not go on from there, and takes what is left away.
			copyTree(t, dir, dir+".killed")
			m.fail.Store(0)
			other := o
			other.Origin.LSN = 8
			other.Verify = false
			m.reads.Store(0)
			require.NoError(t, ToFile(ctx, m, path, other))
			require.Equal(t, reads, m.reads.Load())
			require.NoError(t, os.Remove(path))

			m.reads.Store(0)
			o.Verify = false
			killed := filepath.Join(dir+".killed", "out")
			require.NoError(t, ToFile(ctx, m, killed, retarget(t, o, killed)))
			require.Less(t, m.reads.Load(), reads)
			require.True(t, bytes.Equal(m.b, contents(t, killed, format)[:len(m.b)]))
			names, err := os.ReadDir(dir + ".killed")
			require.NoError(t, err)
			require.Len(t, names, 2, "out and whole")
		})
	}
}

// retarget makes the note of a copied directory say where it is now.
func retarget(t *testing.T, o Options, path string) Options {
	nf, err := openNote(notePath(path))
	require.NoError(t, err)
	n, ok := nf.read()
	require.True(t, ok)
	n.Target = path
	require.NoError(t, nf.write(n))
	require.NoError(t, nf.close())
	return o
}

func copyTree(t *testing.T, from, to string) {
	out, err := exec.Command("cp", "-a", from, to).CombinedOutput()
	require.NoError(t, err, string(out))
}

// contents is a disk as an image has it, for qcow2 as QEMU reads it.
func contents(t *testing.T, path string, format Format) []byte {
	t.Helper()
	if format == QCOW2 {
		if _, err := exec.LookPath("qemu-img"); err != nil {
			t.Skip("qemu-img is not installed: make deps")
		}
		out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
		require.NoError(t, err, string(out))
		require.Contains(t, string(out), "No errors were found")
		raw := filepath.Join(t.TempDir(), "raw")
		out, err = exec.Command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw).CombinedOutput()
		require.NoError(t, err, string(out))
		path = raw
	}
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// TestQCOW2IsWhatQEMUReads: images of odd sizes, empty and full, pass qemu-img's check and have the disk's bytes.
func TestQCOW2IsWhatQEMUReads(t *testing.T) {
	full := &image{b: bytes.Repeat([]byte{1, 2, 3, 4, 5, 6, 7}, 3<<20)}
	for name, m := range map[string]*image{
		"odd": newImage(), "large": large(2), "empty": {b: make([]byte, 700<<20+1), holes: true}, "tiny": {b: []byte{9}}, "full": full,
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "out.qcow2")
			require.NoError(t, ToFile(context.Background(), m, path, Options{Format: QCOW2, Verify: true}))
			got := contents(t, path, QCOW2)
			require.True(t, bytes.Equal(m.b, got[:len(m.b)]))
			require.Len(t, got, (len(m.b)+511)&^511)
			if name == "empty" {
				require.Less(t, blocks(t, path), int64(1<<20))
			}
		})
	}
}

// TestChangesGoIntoACopy brings a copy up to date by a list of changes, also after a break, and refuses what is no copy.
func TestChangesGoIntoACopy(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	path := filepath.Join(dir, "copy.raw")
	old := large(3)
	require.NoError(t, ToFile(ctx, old, path, Options{Origin: Origin{Store: "s", Disk: "g/d", LSN: 5}}))
	m := &image{b: bytes.Clone(old.b), holes: true}
	changed := map[int64]bool{} // blocks of 4 KiB
	rng := rand.New(rand.NewPCG(4, 0))
	for range 200 {
		b := rng.Int64N(int64(len(m.b)) / 4096)
		changed[b] = true
		if rng.IntN(3) == 0 {
			clear(m.b[b*4096 : (b+1)*4096])
		} else {
			copy(m.b[b*4096:], "changed")
		}
	}
	list := func(off, n int64, fn func(int64, bool)) error {
		for end := off + n; off < end; {
			k := min(end-off, 4096-off%4096)
			fn(k, changed[off/4096])
			off += k
		}
		return nil
	}
	f, err := OpenFile(path)
	require.NoError(t, err)
	from, err := f.Stamped()
	require.NoError(t, err)
	require.Equal(t, Origin{Store: "s", Disk: "g/d", LSN: 5}, from)
	o := Options{Changed: list, Verify: true, Origin: Origin{Store: "s", Disk: "g/d", LSN: 9, Since: 5}}
	notes := filepath.Join(dir, "notes")
	m.fail.Store(100)
	require.ErrorIs(t, Onto(ctx, m, f, path, notes, o), syscall.EIO)
	_, err = f.Stamped()
	require.ErrorIs(t, err, ErrNoStamp, "a mix of both")
	left, ok := LeftOnto(notes, path)
	require.True(t, ok)
	require.Equal(t, o.Origin, left)
	m.fail.Store(0)
	m.reads.Store(0)
	require.NoError(t, Onto(ctx, m, f, path, notes, o))
	from, err = f.Stamped()
	require.NoError(t, err)
	require.EqualValues(t, 9, from.LSN)
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(m.b, got))
	_, ok = LeftOnto(notes, path)
	require.False(t, ok)

	// Written by somebody else: no copy any more.
	require.NoError(t, f.WriteAt([]byte("x"), 77))
	_, err = f.Stamped()
	require.ErrorContains(t, err, "was written since")
	// And a list that is wrong is found by comparing.
	require.ErrorIs(t, Onto(ctx, m, f, path, notes, Options{Changed: func(_, n int64, fn func(int64, bool)) error { fn(n, false); return nil }, Verify: true}), ErrDiffers)
	require.NoError(t, f.Close())

	require.ErrorIs(t, Onto(ctx, &image{b: make([]byte, len(m.b)+1)}, f, path, notes, o), ErrTooSmall)
}

// TestOntoMakesZeroesOfWhatWasThere: a target in place is not blank.
func TestOntoMakesZeroesOfWhatWasThere(t *testing.T) {
	m := large(5)
	path := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(path, bytes.Repeat([]byte{0xee}, len(m.b)+4096), 0o600))
	f, err := OpenFile(path)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, Onto(context.Background(), m, f, path, t.TempDir(), Options{Verify: true}))
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(m.b, got[:len(m.b)]))
	require.True(t, bytes.Equal(bytes.Repeat([]byte{0xee}, 4096), got[len(m.b):]), "what is behind the disk stays")
}

// TestTwoRestoresToOneFile: the second one is told.
func TestTwoRestoresToOneFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out.raw")
	m := newImage()
	m.first = func() {
		require.ErrorIs(t, ToFile(context.Background(), newImage(), path, Options{}), ErrInUse)
	}
	require.NoError(t, ToFile(context.Background(), m, path, Options{}))
}

// TestNoRoom: a file system that can not hold the data is found before anything is written.
func TestNoRoom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a tmpfs takes root")
	}
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"))
	defer func() { require.NoError(t, unix.Unmount(dir, 0)) }()
	path := filepath.Join(dir, "out.raw")
	require.ErrorIs(t, ToFile(context.Background(), large(6), path, Options{}), ErrNoRoom)
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, names)
	require.NoError(t, ToFile(context.Background(), newImage(), path, Options{}), "little data in a large disk")
}
