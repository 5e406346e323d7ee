package mount

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Names in the tree that are no guest's.
const (
	atName    = "at"             // the directory of moments
	rawName   = "disk.raw"       // a disk as a file
	filesName = "files"          // a file system that stands on a whole disk
	notesName = "unreadable.txt" // what of a moment has no files, and why
)

// forever is how long the kernel may remember what does not change.
const forever = 24 * time.Hour

// told are the errors that say something about a file; every other one is that it can not be read.
var told = []syscall.Errno{
	syscall.ENOENT, syscall.ENOTDIR, syscall.EISDIR, syscall.ELOOP, syscall.ENAMETOOLONG, syscall.EACCES, syscall.EPERM, syscall.EROFS,
	syscall.ENODATA, syscall.ERANGE, syscall.E2BIG, syscall.EOPNOTSUPP, syscall.ENXIO, syscall.EINVAL,
}

// unavailable is an error of what stands between a file and who asks for it, and none of the file's.
type unavailable struct{ err error }

func (u *unavailable) Error() string { return u.err.Error() }

// fail makes an error one that a system call has. Where that says little the rest is a problem.
func (m *moments) fail(err error) syscall.Errno {
	var e syscall.Errno
	var gone *unavailable
	switch {
	case err == nil:
		return 0
	case errors.As(err, &gone):
		// That the way to the files is gone says nothing about the files.
		errors.As(gone.err, &e)
	case errors.As(err, &e) && slices.Contains(told, e):
		return e
	}
	m.o.Problem(err)
	if e == syscall.EBUSY {
		return e
	}
	return syscall.EIO
}

// fixedDir is a directory of the tree that is no guest's.
type fixedDir struct{ fs.Inode }

func (*fixedDir) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = fuse.S_IFDIR | 0o555
	return 0
}

// child makes a node, and tells the kernel how long it may remember it.
func child(ctx context.Context, n *fs.Inode, out *fuse.EntryOut, ops fs.InodeEmbedder, mode uint32, remember time.Duration) *fs.Inode {
	out.Mode = mode
	out.SetEntryTimeout(remember)
	out.SetAttrTimeout(remember)
	return n.NewInode(ctx, ops, fs.StableAttr{Mode: mode & syscall.S_IFMT})
}

const dirMode = fuse.S_IFDIR | 0o555

// top is the root of a mount that shows all moments.
type top struct {
	fixedDir
	m *moments
}

func (n *top) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if name != atName {
		return nil, syscall.ENOENT
	}
	return child(ctx, &n.Inode, out, &atDir{m: n.m}, dirMode, forever), 0
}

func (n *top) Readdir(context.Context) (fs.DirStream, syscall.Errno) { return dirs(atName), 0 }

func dirs(names ...string) fs.DirStream {
	all := make([]fuse.DirEntry, 0, len(names))
	for _, name := range names {
		all = append(all, fuse.DirEntry{Name: name, Mode: fuse.S_IFDIR})
	}
	return fs.NewListDirStream(all)
}

// atDir has a directory for each point, and for every name of one, listed or not.
type atDir struct {
	fixedDir
	m *moments
}

func (n *atDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	lsn, err := n.m.resolve(name)
	if err != nil {
		return nil, n.m.fail(err)
	}
	if points, err := n.m.list(); err == nil {
		if i := slices.IndexFunc(points, func(p Point) bool { return p.Name == name }); i >= 0 {
			setTime(&out.Attr, points[i].Time)
		}
	}
	// The kernel looks again: a name can mean another moment later. Who is in the directory stays with theirs. As long as it is the same one,
	// so is the directory: with another one the kernel would forget all that is below it.
	if was := n.GetChild(name); was != nil {
		if d, ok := was.Operations().(*momentDir); ok && d.lsn == lsn {
			out.Mode = dirMode
			out.SetEntryTimeout(fresh)
			out.SetAttrTimeout(fresh)
			return was, 0
		}
	}
	return child(ctx, &n.Inode, out, &momentDir{m: n.m, lsn: lsn, name: name}, dirMode, fresh), 0
}

func setTime(a *fuse.Attr, t time.Time) {
	if !t.IsZero() {
		a.SetTimes(nil, &t, &t)
	}
}

func (n *atDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	points, err := n.m.list()
	if err != nil {
		return nil, n.m.fail(err)
	}
	var names []string
	for _, p := range points {
		names = append(names, p.Name)
	}
	return dirs(names...), 0
}

// momentDir is a group as it was: a directory for each disk and each group of logical volumes.
type momentDir struct {
	fixedDir
	m    *moments
	lsn  uint64
	name string // by which it was found
}

// entry is a place of a moment's tree: a directory of it, a disk, the notes or the files of a volume.
type entry struct {
	name   string
	disk   string // disk.raw of this one
	volume string // the files of this one
	notes  bool
}

// entries are what stands in a directory of a moment: below nothing, a disk or a group of volumes.
func entries(mo Moment, below string) (all []entry) {
	disks := mo.Disks()
	add := func(e entry) {
		if !slices.ContainsFunc(all, func(o entry) bool { return o.name == e.name }) {
			all = append(all, e)
		}
	}
	for name := range disks {
		if below == "" {
			add(entry{name: name})
		} else if below == name {
			add(entry{name: rawName, disk: name})
		}
	}
	for _, v := range mo.Volumes() {
		first, rest, _ := strings.Cut(v, "/")
		switch {
		case below == "":
			add(entry{name: first})
		case below != first:
		case rest == "":
			add(entry{name: filesName, volume: v})
		default:
			add(entry{name: strings.ReplaceAll(rest, "/", "_"), volume: v})
		}
	}
	if below == "" && mo.Notes() != "" {
		add(entry{name: notesName, notes: true})
	}
	slices.SortFunc(all, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	return all
}

func (n *momentDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.m.keep(n.name)
	return n.m.lookup(ctx, &n.Inode, n.lsn, "", name, out)
}

func (n *momentDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	n.m.keep(n.name)
	return n.m.readdir(n.lsn, "")
}

// volumesDir is a disk, or a group of logical volumes.
type volumesDir struct {
	fixedDir
	m    *moments
	lsn  uint64
	name string
}

func (n *volumesDir) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return n.m.lookup(ctx, &n.Inode, n.lsn, n.name, name, out)
}

func (n *volumesDir) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	return n.m.readdir(n.lsn, n.name)
}

func (m *moments) readdir(lsn uint64, below string) (fs.DirStream, syscall.Errno) {
	var list []fuse.DirEntry
	err := m.do(lsn, func(mo Moment) error {
		for _, e := range entries(mo, below) {
			mode := uint32(fuse.S_IFDIR)
			if e.disk != "" || e.notes {
				mode = fuse.S_IFREG
			}
			list = append(list, fuse.DirEntry{Name: e.name, Mode: mode})
		}
		return nil
	})
	if err != nil {
		return nil, m.fail(err)
	}
	return fs.NewListDirStream(list), 0
}

func (m *moments) lookup(ctx context.Context, parent *fs.Inode, lsn uint64, below, name string, out *fuse.EntryOut) (n *fs.Inode, errno syscall.Errno) {
	err := m.do(lsn, func(mo Moment) error {
		all := entries(mo, below)
		i := slices.IndexFunc(all, func(e entry) bool { return e.name == name })
		if i < 0 {
			return syscall.ENOENT
		}
		switch e := all[i]; {
		case e.disk != "":
			out.Size = uint64(mo.Disks()[e.disk].Size())
			out.Blocks = (out.Size + 511) / 512
			n = child(ctx, parent, out, &rawFile{m: m, lsn: lsn, disk: e.disk}, rawMode, forever)
		case e.notes:
			f := &fs.MemRegularFile{Data: []byte(mo.Notes()), Attr: fuse.Attr{Mode: 0o444}}
			out.Size = uint64(len(f.Data))
			n = child(ctx, parent, out, f, fuse.S_IFREG|0o444, forever)
		case e.volume != "":
			// What it is like is known when it is opened, which may take the start of a VM.
			n = child(ctx, parent, out, &fileNode{v: &volume{m: m, lsn: lsn, name: e.volume}, rel: "."}, fuse.S_IFDIR|0o755, forever)
			out.SetAttrTimeout(0)
		default:
			n = child(ctx, parent, out, &volumesDir{m: m, lsn: lsn, name: e.name}, dirMode, forever)
		}
		return nil
	})
	return n, m.fail(err)
}

// rawMode lets the mount's user alone read a disk: it has every file's content, whatever its permissions.
const rawMode = fuse.S_IFREG | 0o400

// rawFile is a disk as it was.
type rawFile struct {
	fs.Inode
	m    *moments
	lsn  uint64
	disk string
}

func (n *rawFile) do(fn func(Disk) error) syscall.Errno {
	return n.m.fail(n.m.do(n.lsn, func(mo Moment) error {
		d := mo.Disks()[n.disk]
		if d == nil {
			return syscall.ENOENT
		}
		return fn(d)
	}))
}

func (n *rawFile) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	return n.do(func(d Disk) error {
		out.Mode, out.Size = rawMode, uint64(d.Size())
		out.Blocks = (out.Size + 511) / 512
		out.SetTimeout(forever)
		return nil
	})
}

func (n *rawFile) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	// The moment is held as long as the file is open: it may not expire meanwhile.
	h, err := n.m.use(n.lsn)
	if err != nil {
		return nil, 0, n.m.fail(err)
	}
	return &rawHandle{n.m, h}, fuse.FOPEN_KEEP_CACHE, 0
}

type rawHandle struct {
	m *moments
	h *held
}

func (h *rawHandle) Release(context.Context) syscall.Errno {
	h.m.release(h.h)
	return 0
}

func (n *rawFile) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (r fuse.ReadResult, e syscall.Errno) {
	e = n.do(func(d Disk) error {
		p = p[:max(0, min(int64(len(p)), d.Size()-off))]
		if err := d.ReadAt(p, off); err != nil {
			return &unavailable{fmt.Errorf("disk %s at LSN %d: %w", n.disk, n.lsn, err)}
		}
		return nil
	})
	return content(p, e)
}

// content is what a read returns. With an error there must be none: the library, where it does not splice, forgets the error over it.
func content(p []byte, e syscall.Errno) (fuse.ReadResult, syscall.Errno) {
	if e != 0 {
		return nil, e
	}
	return fuse.ReadResultData(p), 0
}

// Lseek finds data and holes.
func (n *rawFile) Lseek(_ context.Context, _ fs.FileHandle, off uint64, whence uint32) (at uint64, e syscall.Errno) {
	e = n.do(func(d Disk) error {
		size := d.Size()
		if off >= uint64(size) {
			return syscall.ENXIO
		}
		at, err := seek(d, int64(off), whence == unix.SEEK_HOLE)
		if err != nil {
			return &unavailable{fmt.Errorf("disk %s at LSN %d: %w", n.disk, n.lsn, err)}
		}
		if at < 0 {
			if whence == unix.SEEK_DATA {
				return syscall.ENXIO
			}
			at = size
		}
		off = uint64(at)
		return nil
	})
	return off, e
}

// seek finds the next hole or data at or behind off; -1: there is none.
func seek(d Disk, off int64, hole bool) (at int64, err error) {
	const step = 1 << 30
	at = -1
	for size := d.Size(); off < size && at < 0 && err == nil; {
		n := min(step, size-off)
		end := off + n
		err = d.Extents(off, n, func(n int64, zero bool) {
			if at < 0 && zero == hole {
				at = off
			}
			off += n
		})
		off = end
	}
	return at, err
}
