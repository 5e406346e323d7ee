package mount

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// startLimit bounds the start of what shows the files of a moment.
const startLimit = 5 * time.Minute

// volume is a file system of a moment.
type volume struct {
	m    *moments
	lsn  uint64
	name string
}

// with calls fn with a descriptor of the directory with the files; hold keeps the moment for the caller, who releases what is returned.
func (v *volume) with(ctx context.Context, hold bool, fn func(h *held, root int) error) (*held, error) {
	h, err := v.m.use(v.lsn)
	if err != nil {
		return nil, err
	}
	root, err := v.root(ctx, h)
	if err == nil {
		err = v.m.bounded(h.m, func() error { return fn(h, root) })
	}
	if err != nil || !hold {
		v.m.release(h)
		if err != nil {
			err = fmt.Errorf("volume %s at LSN %d: %w", v.name, v.lsn, err)
		}
		return nil, err
	}
	return h, nil
}

// root opens the directory with the files, once for each time that the moment is opened.
func (v *volume) root(ctx context.Context, h *held) (int, error) {
	if fd, ok := h.roots.Load(v.name); ok {
		return fd.(int), nil
	}
	// Others may wait for the same VM: it starts though this one goes away.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startLimit)
	defer cancel()
	dir, err := h.m.Dir(ctx, v.name)
	if err != nil {
		return -1, &unavailable{err}
	}
	fd := -1
	err = v.m.bounded(h.m, func() (err error) {
		// What shows it may be hostile: if it is a link it leads to the host.
		fd, err = unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return -1, &unavailable{err}
	}
	if first, loaded := h.roots.LoadOrStore(v.name, fd); loaded {
		return first.(int), unix.Close(fd)
	}
	return fd, nil
}

// ino is a number for a file that has several names, where numbers tell. What only looks like the same file must not become it.
func (v *volume) ino(h *held, st *unix.Stat_t) uint64 {
	if st.Nlink < 2 || st.Mode&syscall.S_IFMT != syscall.S_IFREG || !h.m.Numbered(v.name) {
		return 0
	}
	return v.m.ino(volumeID{h, v.name, st.Dev}, st.Ino)
}

// look opens a file for looking at it. What shows it may be hostile: no link is followed, not even one on the way.
func look(root int, rel string) (int, error) {
	return unix.Openat2(root, rel, &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
}

// stat tells of a file.
func stat(root int, rel string, st *unix.Stat_t) error {
	fd, err := look(root, rel)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fstat(fd, st)
}

// setAttr is what a file is.
func setAttr(a *fuse.Attr, st *unix.Stat_t) {
	a.Mode, a.Size, a.Blocks, a.Blksize = st.Mode, uint64(st.Size), uint64(st.Blocks), uint32(st.Blksize)
	a.Nlink, a.Uid, a.Gid, a.Rdev = uint32(st.Nlink), st.Uid, st.Gid, uint32(st.Rdev)
	a.Atime, a.Atimensec = uint64(st.Atim.Sec), uint32(st.Atim.Nsec)
	a.Mtime, a.Mtimensec = uint64(st.Mtim.Sec), uint32(st.Mtim.Nsec)
	a.Ctime, a.Ctimensec = uint64(st.Ctim.Sec), uint32(st.Ctim.Nsec)
}

// fileNode is a file or a directory of a guest. Its place in the volume does not change, nor does it.
type fileNode struct {
	fs.Inode
	v   *volume
	rel string // without links on the way, and below the volume's root

	size   int64
	filled atomic.Bool // the kernel was given its content
}

// passthroughSize is how long a file is at least that the kernel reads by itself, in bytes: that has its price for each opening.
const passthroughSize = 256 << 10

// fillSize is how long a file may be whose content the kernel gets with its opening, in bytes.
const fillSize = 64 << 10

var (
	_ fs.NodeGetattrer   = (*fileNode)(nil)
	_ fs.NodeLookuper    = (*fileNode)(nil)
	_ fs.NodeReaddirer   = (*fileNode)(nil)
	_ fs.NodeOpener      = (*fileNode)(nil)
	_ fs.NodeReadlinker  = (*fileNode)(nil)
	_ fs.NodeGetxattrer  = (*fileNode)(nil)
	_ fs.NodeListxattrer = (*fileNode)(nil)
	_ fs.NodeAccesser    = (*fileNode)(nil)
)

func (n *fileNode) do(ctx context.Context, fn func(root int) error) syscall.Errno {
	_, err := n.v.with(ctx, false, func(_ *held, root int) error { return fn(root) })
	return n.v.m.fail(err)
}

// looking calls fn with a descriptor of the file, whatever it is, that serves for looking at it.
func (n *fileNode) looking(ctx context.Context, fn func(fd int) error) syscall.Errno {
	return n.do(ctx, func(root int) error {
		fd, err := look(root, n.rel)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return fn(fd)
	})
}

// path is a descriptor's file for calls that take none.
func path(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// unknown reports whether this is the root of a volume that nobody has entered: who lists the volumes is not to wait for a VM. With
// others it has to be known who may go in.
func (n *fileNode) unknown() bool {
	return n.rel == "." && !n.v.m.o.AllowOther && !n.v.m.shows(n.v.lsn, n.v.name)
}

func (n *fileNode) Getattr(ctx context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	if n.unknown() {
		out.Mode = fuse.S_IFDIR | 0o755
		out.SetTimeout(0)
		return 0
	}
	return n.do(ctx, func(root int) error {
		var st unix.Stat_t
		if err := stat(root, n.rel, &st); err != nil {
			return err
		}
		setAttr(&out.Attr, &st)
		out.SetTimeout(forever)
		return nil
	})
}

// Access lets in whoever the kernel lets in: the mount's user, who may see everything, or others by the files' permissions.
func (*fileNode) Access(_ context.Context, mask uint32) syscall.Errno {
	if mask&unix.W_OK != 0 {
		return syscall.EROFS
	}
	return 0
}

func (n *fileNode) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (c *fs.Inode, errno syscall.Errno) {
	rel := name
	if n.rel != "." {
		rel = n.rel + "/" + name
	}
	_, err := n.v.with(ctx, false, func(h *held, root int) error {
		var st unix.Stat_t
		if err := stat(root, rel, &st); err != nil {
			if errors.Is(err, syscall.ENOENT) {
				out.SetEntryTimeout(forever)
			}
			return err
		}
		setAttr(&out.Attr, &st)
		out.SetEntryTimeout(forever)
		out.SetAttrTimeout(forever)
		if was := n.GetChild(name); was != nil && was.StableAttr().Mode == st.Mode&syscall.S_IFMT {
			c = was // what the kernel knows of it stays
			return nil
		}
		c = n.NewInode(ctx, &fileNode{v: n.v, rel: rel, size: st.Size}, fs.StableAttr{Mode: st.Mode & syscall.S_IFMT, Ino: n.v.ino(h, &st)})
		return nil
	})
	return c, n.v.m.fail(err)
}

// open opens a file or directory. What shows it may be hostile: no link is followed.
func (n *fileNode) open(root int, flags uint64) (int, error) {
	// A fifo would wait for somebody who writes.
	return unix.Openat2(root, n.rel, &unix.OpenHow{Flags: flags | unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
}

func (n *fileNode) Readdir(ctx context.Context) (fs.DirStream, syscall.Errno) {
	var s fs.DirStream
	h, err := n.v.with(ctx, true, func(_ *held, root int) error {
		fd, err := n.open(root, unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		ds, errno := fs.NewLoopbackDirStreamFd(fd)
		if errno != 0 {
			return errno
		}
		s = ds
		return nil
	})
	if err != nil {
		return nil, n.v.m.fail(err)
	}
	return &dirStream{s, n.v.m, h}, 0
}

// dirStream holds its moment.
type dirStream struct {
	fs.DirStream
	m *moments
	h *held
}

// HasNext reads the next entries, if there are none at hand.
func (s *dirStream) HasNext() (more bool) {
	_ = s.m.bounded(s.h.m, func() error {
		more = s.DirStream.HasNext()
		return nil
	})
	return more
}

// Seekdir implements fs.FileSeekdirer.
func (s *dirStream) Seekdir(ctx context.Context, off uint64) syscall.Errno {
	return s.DirStream.(fs.FileSeekdirer).Seekdir(ctx, off)
}

func (s *dirStream) Close() {
	s.DirStream.Close()
	s.m.release(s.h)
}

func (n *fileNode) Open(ctx context.Context, _ uint32) (fs.FileHandle, uint32, syscall.Errno) {
	f := &fileHandle{m: n.v.m, passthrough: n.size >= passthroughSize}
	h, err := n.v.with(ctx, true, func(_ *held, root int) (err error) {
		if f.fd, err = n.open(root, 0); err == nil {
			n.fill(f.fd)
		}
		return err
	})
	if err != nil {
		return nil, 0, n.v.m.fail(err)
	}
	f.h = h
	return f, fuse.FOPEN_KEEP_CACHE, 0
}

// fill gives the kernel all of a short file at once: to be asked for it takes longer than to read it. What goes wrong goes wrong
// again when it is read.
func (n *fileNode) fill(fd int) {
	if n.filled.Load() || n.size == 0 || n.size > fillSize {
		return
	}
	b := make([]byte, n.size)
	if k, err := unix.Pread(fd, b, 0); err != nil || k != len(b) {
		return
	}
	n.filled.Store(n.WriteCache(0, b) == 0)
}

// fileHandle is an open file, and holds its moment. Where it may, the kernel reads it by itself.
type fileHandle struct {
	m  *moments
	h  *held
	fd int // the library calls Release after everything else

	passthrough bool
}

// Flush has nothing to do, and the kernel need not ask again.
func (*fileHandle) Flush(context.Context) syscall.Errno { return syscall.ENOSYS }

// PassthroughFd implements fs.FilePassthroughFder.
func (h *fileHandle) PassthroughFd() (int, bool) { return h.fd, h.passthrough }

func (h *fileHandle) Read(_ context.Context, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n := 0
	err := h.m.bounded(h.h.m, func() (err error) {
		n, err = unix.Pread(h.fd, p, off)
		return err
	})
	return content(p[:max(0, n)], h.m.fail(err))
}

func (h *fileHandle) Lseek(_ context.Context, off uint64, whence uint32) (uint64, syscall.Errno) {
	at := int64(0)
	err := h.m.bounded(h.h.m, func() (err error) {
		at, err = unix.Seek(h.fd, int64(off), int(whence))
		return err
	})
	return uint64(at), h.m.fail(err)
}

func (h *fileHandle) Release(context.Context) syscall.Errno {
	err := h.m.bounded(h.h.m, func() error { return unix.Close(h.fd) })
	h.m.release(h.h)
	return h.m.fail(err)
}

func (n *fileNode) Readlink(ctx context.Context) (target []byte, errno syscall.Errno) {
	errno = n.looking(ctx, func(fd int) error {
		b := make([]byte, unix.PathMax)
		k, err := unix.Readlinkat(fd, "", b)
		target = b[:max(0, k)]
		return err
	})
	return target, errno
}

func (n *fileNode) Getxattr(ctx context.Context, attr string, dest []byte) (size uint32, errno syscall.Errno) {
	if n.unknown() {
		return 0, syscall.ENODATA
	}
	errno = n.looking(ctx, func(fd int) error {
		k, err := unix.Getxattr(path(fd), attr, dest)
		size = uint32(max(0, k))
		return err
	})
	return size, errno
}

func (n *fileNode) Listxattr(ctx context.Context, dest []byte) (size uint32, errno syscall.Errno) {
	if n.unknown() {
		return 0, 0
	}
	errno = n.looking(ctx, func(fd int) error {
		k, err := unix.Listxattr(path(fd), dest)
		size = uint32(max(0, k))
		return err
	})
	return size, errno
}
