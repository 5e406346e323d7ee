package mount

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/tidemark-cdp/tidemark/restore/internal/inventory"
)

// shelf is a source whose moments have the files of directories: LSN n has those of its nth.
type shelf struct {
	dirs []string

	opened, closed atomic.Int64
	moves          atomic.Uint64 // the LSN that "now" means
	broken         atomic.Bool   // moments are of no use, and there is no daemon to ask
	hang           chan struct{} // reads of a disk wait for it, if there is one
	waiting        atomic.Int64  // how many have waited
}

// errNoDaemon is what a daemon's client says when its socket is not there.
var errNoDaemon = &os.SyscallError{Syscall: "connect", Err: syscall.ENOENT}

func (s *shelf) Points(context.Context) (all []Point, err error) {
	if s.broken.Load() {
		return nil, errNoDaemon
	}
	for i := range s.dirs {
		all = append(all, Point{Name: fmt.Sprintf("p%d", i+1), LSN: uint64(i + 1)})
	}
	return all, nil
}

func (s *shelf) Resolve(_ context.Context, name string) (uint64, bool, error) {
	if s.broken.Load() {
		return 0, false, errNoDaemon
	}
	if name == "now" {
		return s.moves.Load(), true, nil
	}
	var n uint64
	if _, err := fmt.Sscanf(name, "p%d", &n); err != nil || n == 0 || n > uint64(len(s.dirs)) {
		return 0, false, ErrNoMoment
	}
	return n, false, nil
}

func (s *shelf) Open(_ context.Context, lsn uint64) (Moment, error) {
	if s.broken.Load() {
		return nil, errNoDaemon
	}
	s.opened.Add(1)
	return &book{s: s, dir: s.dirs[lsn-1], broken: make(chan struct{})}, nil
}

type book struct {
	s      *shelf
	dir    string
	once   sync.Once
	broken chan struct{}
}

func (b *book) Disks() map[string]Disk { return map[string]Disk{"vda": zeroes{5 << 30, b}} }
func (b *book) Volumes() []string      { return []string{"vda/p1", "vdb", "vg0/root"} }
func (b *book) Notes() string          { return "vda/p2 holds swap\n" }

func (b *book) Dir(context.Context, string) (string, error) { return b.dir, nil }

func (b *book) Numbered(volume string) bool { return volume != "vdb" }

func (b *book) Err() error {
	select {
	case <-b.broken:
		return os.ErrClosed
	default:
	}
	if b.s.broken.Load() {
		return os.ErrClosed
	}
	return nil
}

func (b *book) Break() { b.once.Do(func() { close(b.broken) }) }

func (b *book) Close() error {
	b.s.closed.Add(1)
	return nil
}

// zeroes is a disk of a size with one block of data, at 4 GiB.
type zeroes struct {
	size int64
	b    *book
}

const dataAt = 4 << 30

func (z zeroes) Size() int64 { return z.size }

func (z zeroes) ReadAt(p []byte, off int64) error {
	if z.b.s.hang != nil {
		z.b.s.waiting.Add(1)
		select {
		case <-z.b.s.hang:
		case <-z.b.broken:
			return os.ErrClosed
		}
	}
	for i := range p {
		if at := off + int64(i); at >= dataAt && at < dataAt+4096 {
			p[i] = 'd'
		}
	}
	return nil
}

func (z zeroes) Extents(off, n int64, fn func(int64, bool)) error {
	for _, edge := range []int64{dataAt, dataAt + 4096, z.size} {
		if k := min(n, edge-off); k > 0 {
			fn(k, edge != dataAt+4096)
			off, n = off+k, n-k
		}
	}
	return nil
}

func mountShelf(t *testing.T, s *shelf, o Options) (dir string, m *Mounted) {
	t.Helper()
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Geteuid() != 0 {
		t.Skip("takes root, and /dev/fuse")
	}
	dir = t.TempDir()
	o.Problem = func(err error) { t.Log(err) }
	ignore := goleak.IgnoreCurrent()
	m, err := Mount(dir, s, o)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, m.Close())
		require.Equal(t, s.opened.Load(), s.closed.Load(), "every moment is closed")
		goleak.VerifyNone(t, ignore)
	})
	return dir, m
}

const files = `set -e
mkdir -p many deep/er names; i=0; while [ $i -lt 3000 ]; do echo "file $i" >many/a-rather-long-name-so-that-the-directory-grows-$i; i=$((i+1)); done
echo one >deep/one; ln deep/one deep/er/two; ln deep/one three; ln -s deep/one link; ln -s /etc/passwd out; ln -s "$(head -c 300 /dev/zero | tr '\0' s)" long
for n in 'with space' 'ünïcode' '日本語の名前' 'new
line' '-dash' 'disk.raw'; do echo "$n" >"names/$n"; done
head -c 3000000 /dev/urandom >large; truncate -s 3G sparse; echo end >>sparse; : >empty
mkfifo fifo; mknod node c 1 3; chmod 4755 large; chmod 0 empty; chown 1000:1001 large; chmod 700 deep; touch -h -d 1999-12-31 link; touch -d '2001-02-03 04:05:06.789' empty
setfattr -n user.short -v x large || python3 -c "import os; os.setxattr('large', 'user.short', b'x'); os.setxattr('deep', 'user.dir', b'y' * 3000)"
`

func aShelf(t *testing.T) *shelf {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", files)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	other := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(other, "which"), []byte("other"), 0o600))
	return &shelf{dirs: []string{dir, other}}
}

// TestEveryFileIsShown compares everything below a volume with what it is made of.
func TestEveryFileIsShown(t *testing.T) {
	s := aShelf(t)
	want, err := inventory.Of(s.dirs[0])
	require.NoError(t, err)
	dir, _ := mountShelf(t, s, Options{})
	_, err = os.ReadDir(dir + "/at/p1/vg0/root") // until somebody enters it, nobody knows what its root is like
	require.NoError(t, err)
	for range 2 {
		got, err := inventory.Of(dir + "/at/p1/vg0/root")
		require.NoError(t, err)
		require.Empty(t, inventory.Differences(want, got))
	}
	d, err := os.Open(dir + "/at/p1/vg0/root/names")
	require.NoError(t, err)
	defer d.Close()
	for range 2 { // a directory can be read again from its beginning
		names, err := d.Readdirnames(-1)
		require.NoError(t, err)
		require.Len(t, names, 6)
		_, err = d.Seek(0, 0)
		require.NoError(t, err)
	}
	out, err := exec.Command("find", dir, "-maxdepth", "4", "-printf", "%P %y\n").Output()
	require.NoError(t, err)
	for _, line := range []string{"at/p1/vda/disk.raw f", "at/p1/vda/p1 d", "at/p1/vdb/files d", "at/p2/vg0/root d", "at/p2/unreadable.txt f"} {
		require.Contains(t, string(out), line+"\n")
	}
	require.NotContains(t, string(out), "vdb/disk.raw")
	b, err := os.ReadFile(dir + "/at/p1/unreadable.txt")
	require.NoError(t, err)
	require.Equal(t, "vda/p2 holds swap\n", string(b))
}

// TestADiskIsAFile: its bytes, its holes, its end.
func TestADiskIsAFile(t *testing.T) {
	dir, _ := mountShelf(t, aShelf(t), Options{LSN: 1})
	f, err := os.Open(dir + "/vda/disk.raw")
	require.NoError(t, err)
	defer f.Close()
	data, err := f.Seek(0, 3)
	require.NoError(t, err)
	require.EqualValues(t, dataAt, data)
	hole, err := f.Seek(dataAt, 4)
	require.NoError(t, err)
	require.EqualValues(t, dataAt+4096, hole)
	_, err = f.Seek(hole, 3)
	require.ErrorIs(t, err, syscall.ENXIO)
	hole, err = f.Seek(dataAt+5000, 4)
	require.NoError(t, err)
	require.EqualValues(t, dataAt+5000, hole)
	b := make([]byte, 8)
	_, err = f.ReadAt(b, dataAt-4)
	require.NoError(t, err)
	require.Equal(t, "\x00\x00\x00\x00dddd", string(b))
	n, err := f.ReadAt(b, 5<<30-3)
	require.Equal(t, 3, n)
	require.Error(t, err)
	_, err = os.OpenFile(dir+"/vda/disk.raw", os.O_RDWR, 0)
	require.ErrorIs(t, err, syscall.EROFS)
}

// TestNamesThatMove stay with their moment as long as they are used.
func TestNamesThatMove(t *testing.T) {
	s := aShelf(t)
	s.moves.Store(2)
	m := newMoments(s, Options{Idle: time.Hour, Limit: time.Minute})
	defer func() { require.NoError(t, m.close()) }()
	var now atomic.Int64
	m.now = func() time.Time { return time.Unix(now.Load(), 0) }
	at := func() uint64 {
		lsn, err := m.resolve("now")
		require.NoError(t, err)
		return lsn
	}
	require.EqualValues(t, 2, at())
	s.moves.Store(1)
	for range 5 {
		now.Add(int64(stick/time.Second) - 1)
		require.EqualValues(t, 2, at())
	}
	now.Add(int64(stick / time.Second))
	require.EqualValues(t, 1, at())
}

// TestMomentsAreFew: what is idle makes room, what is in use does not.
func TestMomentsAreFew(t *testing.T) {
	s := aShelf(t)
	for len(s.dirs) < maxOpen+2 {
		s.dirs = append(s.dirs, s.dirs[1])
	}
	m := newMoments(s, Options{Idle: time.Hour, Limit: time.Minute, Problem: func(error) {}})
	var held []*held
	for lsn := range uint64(maxOpen) {
		h, err := m.use(lsn + 1)
		require.NoError(t, err)
		held = append(held, h)
	}
	_, err := m.use(maxOpen + 1)
	require.ErrorIs(t, err, syscall.EBUSY)
	m.release(held[3])
	h, err := m.use(maxOpen + 1)
	require.NoError(t, err)
	require.EqualValues(t, 1, s.closed.Load())
	m.release(h)
	for i, h := range held {
		if i != 3 {
			m.release(h)
		}
	}
	require.NoError(t, m.close())
	require.Equal(t, s.opened.Load(), s.closed.Load())
}

// TestWhatIsBrokenIsOpenedAnew, and who has a file of it open keeps it till they close it.
func TestWhatIsBrokenIsOpenedAnew(t *testing.T) {
	s := aShelf(t)
	m := newMoments(s, Options{Idle: time.Hour, Limit: time.Minute, Problem: func(error) {}})
	h, err := m.use(1)
	require.NoError(t, err)
	h.m.Break()
	again, err := m.use(1)
	require.NoError(t, err)
	require.NotSame(t, h, again)
	require.Zero(t, s.closed.Load())
	m.release(h)
	require.EqualValues(t, 1, s.closed.Load())
	s.broken.Store(true)
	_, err = m.use(1)
	require.ErrorContains(t, err, "connect")
	s.broken.Store(false)
	m.release(again)
	third, err := m.use(1)
	require.NoError(t, err)
	m.release(third)
	require.NoError(t, m.close())
	require.Equal(t, s.opened.Load(), s.closed.Load())
}

// TestWhatHangsIsEnded: a file that is not read in time is an error, also for who waits at the mount's end.
func TestWhatHangsIsEnded(t *testing.T) {
	s := aShelf(t)
	s.hang = make(chan struct{})
	dir, _ := mountShelf(t, s, Options{Limit: 300 * time.Millisecond})
	read := func() error {
		f, err := os.Open(dir + "/at/p1/vda/disk.raw")
		require.NoError(t, err)
		defer f.Close()
		_, err = f.ReadAt(make([]byte, 10), 0)
		return err
	}
	require.ErrorIs(t, read(), syscall.EIO)
	close(s.hang)
	require.Eventually(t, func() bool { return read() == nil }, time.Minute, time.Millisecond) // one may take long on a busy host
}

// TestTheEndWaitsForNobody: a read that hangs gets an error when the mount ends.
func TestTheEndWaitsForNobody(t *testing.T) {
	s := aShelf(t)
	s.hang = make(chan struct{})
	dir, m := mountShelf(t, s, Options{})
	f, err := os.Open(dir + "/at/p1/vda/disk.raw")
	require.NoError(t, err)
	defer f.Close()
	failed := make(chan error, 1)
	go func() {
		_, err := f.ReadAt(make([]byte, 10), 0)
		failed <- err
	}()
	require.Eventually(t, func() bool { return s.waiting.Load() > 0 }, time.Minute, time.Millisecond)
	require.NoError(t, m.Close())
	require.Error(t, <-failed)
}

// TestNoDaemon: that nobody can be asked says nothing about what there is, whatever the system call for it had to say.
func TestNoDaemon(t *testing.T) {
	s := aShelf(t)
	dir, _ := mountShelf(t, s, Options{})
	s.broken.Store(true)
	for _, path := range []string{"/at/p1", "/at/p2/vda/disk.raw", "/at/none"} {
		_, err := os.Stat(dir + path)
		require.ErrorIs(t, err, syscall.EIO, path)
	}
	_, err := os.ReadDir(dir + "/at")
	require.ErrorIs(t, err, syscall.EIO)
	s.broken.Store(false)
	_, err = os.Stat(dir + "/at/p2/vda/disk.raw")
	require.NoError(t, err)
	_, err = os.Stat(dir + "/at/none")
	require.ErrorIs(t, err, syscall.ENOENT)
}

// TestALinkIsNoVolume: what shows the files may be hostile, and have a link to the host in the place of a directory.
func TestALinkIsNoVolume(t *testing.T) {
	s := aShelf(t)
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(s.dirs[1], link))
	s.dirs = append(s.dirs, link)
	dir, _ := mountShelf(t, s, Options{})
	require.FileExists(t, dir+"/at/p2/vda/p1/which")
	_, err := os.ReadFile(dir + "/at/p3/vda/p1/which")
	require.ErrorIs(t, err, syscall.EIO)
	_, err = os.ReadDir(dir + "/at/p3/vda/p1")
	require.ErrorIs(t, err, syscall.EIO)
}

// TestManyReaders read beside moments that end as soon as they are idle.
func TestManyReaders(t *testing.T) {
	s := aShelf(t)
	dir, _ := mountShelf(t, s, Options{Idle: time.Millisecond})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for k := range 100 {
				p := fmt.Sprintf("%s/at/p1/vda/p1/many/a-rather-long-name-so-that-the-directory-grows-%d", dir, i*100+k)
				b, err := os.ReadFile(p)
				if err != nil || !strings.HasPrefix(string(b), "file ") {
					t.Errorf("%s: %q, %v", p, b, err)
				}
				if b, err := os.ReadFile(dir + "/at/p2/vg0/root/which"); err != nil || string(b) != "other" {
					t.Errorf("other: %q, %v", b, err)
				}
			}
		})
	}
	wg.Wait()
	require.Greater(t, s.opened.Load(), int64(1))
}
