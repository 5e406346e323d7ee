package export

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/nbd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is a base.
type memory struct{ b []byte }

func (m memory) Size() int64 { return int64(len(m.b)) }

func (m memory) ReadAt(p []byte, off int64, _ bool) error {
	copy(p, m.b[off:])
	return nil
}

func (m memory) Extents(off, n int64, fn func(int64, bool)) error {
	for end := off + n; off < end; {
		k := min(end-off, Block-off%Block)
		fn(k, len(bytes.Trim(m.b[off:off+k], "\x00")) == 0)
		off += k
	}
	return nil
}

func newBase(seed uint64) memory {
	rng := rand.New(rand.NewPCG(seed, 9))
	b := make([]byte, 3<<20+700)
	for off := 0; off < len(b); off += Block {
		if rng.IntN(3) > 0 {
			fill(rng, b[off:min(len(b), off+Block)])
		}
	}
	return memory{b}
}

func fill(rng *rand.Rand, b []byte) {
	for i := range min(len(b), 32) {
		b[i] = byte(1 + rng.IntN(255))
	}
	for i := 32; i < len(b); i += copy(b[i:], b[:i]) {
	}
}

// model is an overlay beside what it must be.
type model struct {
	t    *testing.T
	rng  *rand.Rand
	dir  string
	boot int
	base memory
	ov   *Overlay
	want []byte
	// since has, for each block, what it may be after a crash of the host: what it was at the last flush
	// and everything that was written to it later.
	since map[int64][][]byte
}

func (m *model) open() {
	f, err := os.OpenFile(filepath.Join(m.dir, "d.raw"), os.O_RDWR|os.O_CREATE, 0o600)
	require.NoError(m.t, err)
	_, missing := os.Stat(filepath.Join(m.dir, "d.map"))
	m.ov, err = open(f, filepath.Join(m.dir, "d"), fmt.Sprint("boot ", m.boot), m.base, Options{}, missing != nil)
	require.NoError(m.t, err)
}

func (m *model) block(b int64) []byte { return m.want[b*Block : min(int64(len(m.want)), (b+1)*Block)] }

func (m *model) change() {
	off := m.rng.Int64N(int64(len(m.want)))
	n := 1 + m.rng.Int64N(min(int64(len(m.want))-off, 1+m.rng.Int64N(100<<10)))
	if m.rng.IntN(2) == 0 {
		off &^= Block - 1
		n = min((n+Block-1)&^(Block-1), int64(len(m.want))-off)
	}
	c := nbd.Change{Op: nbd.Op(1 + m.rng.IntN(3)), Off: off, Len: n}
	for b := off / Block; b <= (off+n-1)/Block; b++ {
		if m.since[b] == nil {
			m.since[b] = [][]byte{bytes.Clone(m.block(b))}
		}
	}
	if c.Op == nbd.OpWrite {
		c.Buf = make([]byte, n)
		fill(m.rng, c.Buf)
		copy(m.want[off:], c.Buf)
	} else {
		clear(m.want[off : off+n])
	}
	require.NoError(m.t, m.ov.Change([]nbd.Change{c}))
	for b := off / Block; b <= (off+n-1)/Block; b++ {
		m.since[b] = append(m.since[b], bytes.Clone(m.block(b)))
	}
}

func (m *model) check() {
	off := m.rng.Int64N(int64(len(m.want)))
	n := 1 + m.rng.Int64N(int64(len(m.want))-off)
	got := make([]byte, n)
	require.NoError(m.t, m.ov.ReadAt(got, off, false))
	require.True(m.t, bytes.Equal(m.want[off:off+n], got))
	at := off
	require.NoError(m.t, m.ov.Extents(off, n, func(n int64, zero bool) {
		if zero {
			require.Empty(m.t, bytes.Trim(m.want[at:at+n], "\x00"))
		}
		at += n
	}))
	require.Equal(m.t, off+n, at)
}

// hostCrash is what the disk may have after one: of the data, each block as of the last flush or later; of the live map, anything.
func (m *model) hostCrash(flushed []byte) {
	require.NoError(m.t, m.ov.Close())
	path := filepath.Join(m.dir, "d.raw")
	now, err := os.ReadFile(path)
	require.NoError(m.t, err)
	for off := 0; off < len(now); off += Block {
		if m.rng.IntN(2) == 0 {
			copy(now[off:min(len(now), off+Block)], flushed[off:])
		}
	}
	require.NoError(m.t, os.WriteFile(path, now, 0o600))
	live, err := os.OpenFile(filepath.Join(m.dir, "d.map"), os.O_RDWR, 0)
	require.NoError(m.t, err)
	junk := make([]byte, 64)
	fill(m.rng, junk)
	_, err = live.WriteAt(junk, mapHeader)
	require.NoError(m.t, err)
	require.NoError(m.t, live.Close())
	m.boot++
	m.open()
	for b := int64(0); b*Block < int64(len(m.want)); b++ {
		got := make([]byte, len(m.block(b)))
		require.NoError(m.t, m.ov.ReadAt(got, b*Block, false))
		may := append([][]byte{}, m.since[b]...)
		if may == nil || len(may) == 0 {
			may = [][]byte{m.block(b)}
		}
		found := false
		for _, v := range may {
			found = found || bytes.Equal(v, got)
		}
		require.True(m.t, found, "block %d after a crash of the host: %x", b, got[:16])
		copy(m.block(b), got)
	}
	m.since = map[int64][][]byte{}
}

// TestOverlayAgainstAModel drives overlays with random changes, kills of the daemon and crashes of the host, and
// fills them in the end.
func TestOverlayAgainstAModel(t *testing.T) {
	for seed := range uint64(24) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			m := &model{t: t, rng: rand.New(rand.NewPCG(seed, 1)), dir: t.TempDir(), base: newBase(seed), since: map[int64][][]byte{}}
			m.want = bytes.Clone(m.base.b)
			m.open()
			flushed := make([]byte, len(m.want)) // the file at the last flush
			flush := func() {
				require.NoError(t, m.ov.Flush())
				var err error
				flushed, err = os.ReadFile(filepath.Join(m.dir, "d.raw"))
				require.NoError(t, err)
				m.since = map[int64][][]byte{}
			}
			for range 150 {
				switch n := m.rng.IntN(100); {
				case n < 60:
					m.change()
				case n < 85:
					m.check()
				case n < 91:
					flush()
				case n < 95: // a kill: nothing is flushed, everything is there
					require.NoError(t, m.ov.Close())
					m.open()
				case n < 97:
					m.hostCrash(flushed)
					flush()
				case n < 99:
					off := m.rng.Int64N(2) << 20
					require.NoError(t, m.ov.fillPart(off, 1<<20))
				default:
					m.check()
				}
			}
			var done int64
			require.NoError(t, m.ov.Fill(context.Background(), func(n int64) { done += n }))
			require.Equal(t, m.ov.Size(), done)
			require.Equal(t, m.ov.Size(), m.ov.Written())
			require.NoError(t, m.ov.Flush())
			require.NoError(t, m.ov.Close())
			b, err := os.ReadFile(filepath.Join(m.dir, "d.raw"))
			require.NoError(t, err)
			require.True(t, bytes.Equal(m.want, b), "the file is the disk")
		})
	}
}

// TestFillBesideWrites: writers who write parts of blocks, each its own bytes, while the file is filled.
func TestFillBesideWrites(t *testing.T) {
	base := newBase(77)
	dir := t.TempDir()
	ov, err := Create(filepath.Join(dir, "d.raw"), filepath.Join(dir, "d"), base, Options{})
	require.NoError(t, err)
	want := bytes.Clone(base.b)
	var wg sync.WaitGroup
	const writers = 4
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 3))
			for range 3000 {
				off := rng.Int64N(int64(len(want)))/writers*writers + int64(w)
				if off >= int64(len(want)) {
					continue
				}
				want[off] = byte(rng.Uint32())
				if err := ov.Change([]nbd.Change{{Op: nbd.OpWrite, Off: off, Len: 1, Buf: want[off : off+1]}}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	require.NoError(t, ov.Fill(context.Background(), func(int64) {}))
	wg.Wait()
	require.NoError(t, ov.Flush())
	require.NoError(t, ov.Close())
	b, err := os.ReadFile(filepath.Join(dir, "d.raw"))
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, b))
}

// TestAnOverlayLeavesRoom: scratch writes end before the file system is full.
func TestAnOverlayLeavesRoom(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting a tmpfs takes root")
	}
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=32m"))
	defer func() { require.NoError(t, unix.Unmount(dir, 0)) }()
	ov, err := Create(filepath.Join(dir, "d.raw"), filepath.Join(dir, "d"), memory{make([]byte, 64<<20)}, Options{Reserve: 8 << 20})
	require.NoError(t, err)
	buf := bytes.Repeat([]byte{1}, 1<<20)
	var n int64
	for err == nil {
		if err = ov.Change([]nbd.Change{{Op: nbd.OpWrite, Off: n, Len: 1 << 20, Buf: buf}}); err == nil {
			n += 1 << 20
		}
	}
	require.ErrorIs(t, err, syscall.ENOSPC)
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(dir, &st))
	require.GreaterOrEqual(t, int64(st.Bavail)*st.Bsize, int64(7<<20))
	require.NoError(t, ov.Change([]nbd.Change{{Op: nbd.OpTrim, Off: 0, Len: n}}))
	require.NoError(t, ov.Change([]nbd.Change{{Op: nbd.OpWrite, Off: 0, Len: 1 << 20, Buf: buf}}), "room again")
	require.NoError(t, ov.Close())
}

// TestMapsOfOthersAreRefused: a map of another disk or version tells nothing.
func TestMapsOfOthersAreRefused(t *testing.T) {
	dir := t.TempDir()
	path, maps := filepath.Join(dir, "d.raw"), filepath.Join(dir, "d")
	ov, err := Create(path, maps, newBase(1), Options{})
	require.NoError(t, err)
	require.NoError(t, ov.Close())
	_, err = Create(path, maps, newBase(1), Options{})
	require.ErrorIs(t, err, os.ErrExist)
	for _, name := range []string{path, maps + ".map", maps + ".flushed"} {
		require.NoError(t, os.Rename(name, name+".moved"))
		_, err = Open(path, maps, newBase(1), Options{})
		require.ErrorIs(t, err, os.ErrNotExist, "not made anew")
		require.NoFileExists(t, name)
		require.NoError(t, os.Rename(name+".moved", name))
	}
	for _, name := range []string{".map", ".flushed"} {
		b, err := os.ReadFile(maps + name)
		require.NoError(t, err)
		for _, bad := range [][]byte{append([]byte{'x'}, b[1:]...), b[:len(b)-1], b[:10]} {
			require.NoError(t, os.WriteFile(maps+name, bad, 0o600))
			_, err = Open(path, maps, newBase(1), Options{})
			require.Error(t, err)
		}
		require.NoError(t, os.WriteFile(maps+name, b, 0o600))
	}
	_, err = Open(path, maps, memory{make([]byte, 5<<20)}, Options{})
	require.ErrorContains(t, err, "the disk 5242880")
	require.False(t, errors.Is(err, os.ErrNotExist))
}

// TestAFailedSyncIsRemembered: what may have been dropped is not there when the overlay is opened again.
func TestAFailedSyncIsRemembered(t *testing.T) {
	dir := t.TempDir()
	path, maps := filepath.Join(dir, "d.raw"), filepath.Join(dir, "d")
	base := newBase(1)
	ov, err := Create(path, maps, base, Options{})
	require.NoError(t, err)
	write := func(off int64) error {
		return ov.Change([]nbd.Change{{Op: nbd.OpWrite, Off: off, Len: 4, Buf: []byte("data")}})
	}
	require.NoError(t, write(0))
	require.NoError(t, ov.Flush())
	require.NoError(t, write(Block))
	require.NoError(t, ov.m.flushed.Close()) // its sync fails
	require.Error(t, ov.Flush())
	require.ErrorContains(t, write(0), "takes no more writes")
	require.ErrorContains(t, ov.Flush(), "takes no more writes")
	_ = ov.Close()
	ov, err = Open(path, maps, base, Options{})
	require.NoError(t, err)
	got := make([]byte, 4)
	require.NoError(t, ov.ReadAt(got, 0, false))
	require.Equal(t, "data", string(got))
	require.NoError(t, ov.ReadAt(got, Block, false))
	require.Equal(t, base.b[Block:Block+4], got, "as of the flush")
	require.NoError(t, ov.Close())
}

// TestAFullFileSystem: a copy-on-write file system has no room for the map either: an error, and nothing worse.
func TestAFullFileSystem(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting btrfs takes root")
	}
	if _, err := exec.LookPath("mkfs.btrfs"); err != nil {
		t.Skip("this machine has no mkfs.btrfs: run make deps")
	}
	image, dir := filepath.Join(t.TempDir(), "image"), t.TempDir()
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 128<<20))
	for _, args := range [][]string{{"mkfs.btrfs", "-q", "-M", image}, {"mount", "-o", "loop", image, dir}} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		require.NoError(t, err, string(out))
	}
	defer func() { require.NoError(t, exec.Command("umount", dir).Run()) }()
	base := memory{make([]byte, 256<<20)}
	ov, err := Create(filepath.Join(dir, "d.raw"), filepath.Join(dir, "d"), base, Options{})
	require.NoError(t, err)
	want := map[int64]byte{}
	rng := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, Block)
	failures := 0
	for n := 0; failures < 20 && n < 200000; n++ {
		off := rng.Int64N(256<<20/Block) * Block
		for i := range buf {
			buf[i] = byte(n + i*7)
		}
		if err := ov.Change([]nbd.Change{{Op: nbd.OpWrite, Off: off, Len: Block, Buf: buf}}); err != nil {
			failures++
			delete(want, off)
			continue
		}
		want[off] = buf[0]
	}
	require.NotZero(t, failures, "the file system is not full")
	for off, b := range want {
		require.NoError(t, ov.ReadAt(buf[:1], off, false))
		require.Equal(t, b, buf[0])
	}
	_ = ov.Close() // it may not be able to flush
}
