package mount

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Source is the moments of a group.
type Source interface {
	// Points are the names that the directory of moments lists.
	Points(ctx context.Context) ([]Point, error)
	// Resolve finds the LSN that any name means now, and whether it may mean another later; ErrNoMoment if it means none.
	Resolve(ctx context.Context, name string) (lsn uint64, moves bool, err error)
	// Open opens the moment of an LSN.
	Open(ctx context.Context, lsn uint64) (Moment, error)
}

// ErrNoMoment says that a name means no moment.
var ErrNoMoment = errors.New("no such moment")

// Point is a name of a moment.
type Point struct {
	Name string
	LSN  uint64
	Time time.Time
}

// Moment is a group as it was. Everything but Close is called from many goroutines.
type Moment interface {
	// Disks are the disks by name. They do not change, and their reads end.
	Disks() map[string]Disk
	// Volumes are the names of what has files: vda, vda/p1, vg0/root.
	Volumes() []string
	// Notes says, for people, what has none and why; empty if there is nothing to say.
	Notes() string
	// Numbered reports whether the numbers of a volume's files are theirs alone, whatever directory they are in: names with one number
	// then are names of one file.
	Numbered(volume string) bool
	// Dir is where this process finds the files of a volume, which do not change. It may take as long as the start of a small VM, or till
	// ctx ends.
	Dir(ctx context.Context, volume string) (string, error)
	// Err is why the moment is of no use any more; nil if it is.
	Err() error
	// Break has every use of it fail, also one that is waiting.
	Break()
	Close() error
}

// Disk is a disk as it was.
type Disk interface {
	Size() int64
	ReadAt(p []byte, off int64) error
	// Extents calls fn with runs that together fill the range, and whether each is known to read as zeroes.
	Extents(off, n int64, fn func(n int64, zero bool)) error
}

// Options of a mount.
type Options struct {
	// LSN is the one moment that the mount shows; 0: all of them, below "at".
	LSN uint64
	// Idle is how long what shows files is kept after its last use; 0: 5 minutes.
	Idle time.Duration
	// Limit is how long one use of a guest's file may take, before its moment is broken; 0: 3 minutes. Files that the kernel reads by itself
	// (root, 256 KiB and more) are not bound by it.
	Limit time.Duration
	// AllowOther lets other users in, by the permissions that the files have.
	AllowOther bool
	// Problem is told why users see an I/O error, and what goes wrong behind them. It is called from many goroutines; may be nil.
	Problem func(error)
}

// DefaultIdle is Options.Idle unless it is set.
const DefaultIdle = 5 * time.Minute

// Mounted is a mount.
type Mounted struct {
	dir     string
	server  *fuse.Server
	abort   string // the kernel's file that ends the connection; empty: it is not known
	moments *moments
	direct  bool
	once    sync.Once // guards the end
	err     error     // of the end
}

// Mount shows a source on a directory, until Close, or until somebody unmounts it.
func Mount(dir string, src Source, o Options) (*Mounted, error) {
	if o.Idle == 0 {
		o.Idle = DefaultIdle
	}
	if o.Limit == 0 {
		o.Limit = 3 * time.Minute
	}
	if o.Problem == nil {
		o.Problem = func(error) {}
	}
	m := newMoments(src, o)
	var root fs.InodeEmbedder = &top{m: m}
	if o.LSN != 0 {
		root = &momentDir{m: m, lsn: o.LSN}
	}
	zero := time.Duration(0)
	direct := os.Geteuid() == 0
	fo := &fs.Options{
		AttrTimeout: &zero, EntryTimeout: &zero, NegativeTimeout: &zero, NullPermissions: true, UID: uint32(os.Geteuid()), GID: uint32(os.Getegid()),
		MountOptions: fuse.MountOptions{
			DirectMountStrict: direct, DirectMountFlags: syscall.MS_RDONLY | syscall.MS_NOSUID | syscall.MS_NODEV, AllowOther: o.AllowOther,
			MaxWrite: maxWrite, MaxReadAhead: maxWrite, FsName: "tidemark", Name: "tidemark", EnableSymlinkCaching: true,
			DisableSplice: true,                       // which is for answers that are files
			Logger:        log.New(io.Discard, "", 0), // of requests that nobody waits for any more
		},
	}
	if !direct {
		fo.Options = append(fo.Options, "ro")
	}
	if o.AllowOther {
		fo.Options = append(fo.Options, "default_permissions")
	}
	server, err := fs.Mount(dir, root, fo)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount FUSE on %s: %w", dir, err), m.close())
	}
	mounted := &Mounted{dir: dir, server: server, moments: m, direct: direct}
	var st unix.Stat_t
	if unix.Stat(dir, &st) == nil {
		mounted.abort = fmt.Sprintf("/sys/fs/fuse/connections/%d/abort", unix.Minor(st.Dev))
	}
	return mounted, nil
}

// Wait waits until the directory is unmounted.
func (m *Mounted) Wait() { m.server.Wait() }

// Close unmounts the directory and ends everything that it stood on. Whoever is in there gets errors. Where the kernel can not be told
// to end the connection, and somebody stays, what answers them with errors goes with the process.
func (m *Mounted) Close() error {
	m.once.Do(func() { m.err = m.end() })
	return m.err
}

func (m *Mounted) end() error {
	ended := make(chan struct{})
	go func() {
		m.server.Wait()
		close(ended)
	}()
	err := m.server.Unmount()
	select {
	case <-ended:
		err = nil // somebody else may have unmounted it
	case <-time.After(100 * time.Millisecond):
		if err != nil {
			err = m.detach()
		}
	}
	m.moments.stop() // what is being opened
	select {
	case <-ended:
		return errors.Join(err, m.moments.close())
	case <-time.After(2 * time.Second):
	}
	// A use that hangs, or somebody's working directory, keeps the server.
	m.moments.breakAll()
	_ = os.WriteFile(m.abort, []byte("1"), 0o200) // not every system shows it
	select {
	case <-ended:
	case <-time.After(time.Second):
		m.moments.o.Problem(fmt.Errorf("unmount %s: somebody is still in it, and gets errors", m.dir))
	}
	return errors.Join(err, m.moments.close())
}

// detach takes a directory out of the tree of files though somebody is in it: with the server go their files.
func (m *Mounted) detach() error {
	if m.direct {
		if err := syscall.Unmount(m.dir, syscall.MNT_DETACH|syscall.MNT_FORCE); err != nil {
			return fmt.Errorf("unmount %s: %w", m.dir, err)
		}
		return nil
	}
	if out, err := exec.Command("fusermount3", "-u", "-z", m.dir).CombinedOutput(); err != nil {
		return fmt.Errorf("unmount %s: %w: %s", m.dir, err, out)
	}
	return nil
}
