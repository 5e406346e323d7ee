package guestfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// CopyOptions say how to copy files out of a tree.
type CopyOptions struct {
	// Owner keeps owners, and what only root may make; else they are the caller's.
	Owner bool
	// Skipped is told what was left out, and why; may be nil.
	Skipped func(path string, why error)
	// Copied is told of bytes; may be nil.
	Copied func(bytes int64)
}

// Copy copies a file or a directory with all below it to a path of the host that does not exist: modes, times, links, extended
// attributes and holes are kept.
func (t *Tree) Copy(ctx context.Context, from, to string, o CopyOptions) error {
	from, err := t.Resolve(from, true)
	if err != nil {
		return err
	}
	if o.Skipped == nil {
		o.Skipped = func(string, error) {}
	}
	if o.Copied == nil {
		o.Copied = func(int64) {}
	}
	dir, err := os.Open(filepath.Dir(to))
	if err != nil {
		return err
	}
	defer dir.Close()
	c := copier{ctx: ctx, t: t, o: o, links: map[inode]string{}, base: filepath.Dir(to), buf: make([]byte, 1<<20)}
	return c.copy(from, dir, filepath.Base(to), to)
}

// inode is a file, whatever its name. What one VM shows has one device: its volumes, and the subvolumes of a Btrfs, each of which
// numbers its files from 256, its root, on.
type inode struct {
	volume    *os.Root
	subvolume string // the path of the nearest directory above with that number
	dev, ino  uint64
}

const subvolumeRoot = 256

type copier struct {
	ctx   context.Context
	t     *Tree
	o     CopyOptions
	links map[inode]string // of files with several names: the one that was made
	base  string
	buf   []byte

	subvolume string // that the files stand in which are copied now
}

// copy copies one file to a name in an open directory; to is its path, for links and messages.
func (c *copier) copy(from string, dir *os.File, name, to string) (err error) {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	info, err := c.t.Lstat(from)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			var p *fs.PathError
			if !errors.As(err, &p) || !strings.HasPrefix(p.Path, "/") {
				err = &fs.PathError{Op: "copy", Path: from, Err: err}
			}
		}
	}()
	st := info.Sys().(*syscall.Stat_t)
	root, _, err := c.t.place(from)
	if err != nil {
		return err
	}
	id := inode{root, c.subvolume, st.Dev, st.Ino}
	if first, ok := c.links[id]; ok && st.Nlink > 1 && !info.IsDir() {
		return unix.Linkat(unix.AT_FDCWD, first, int(dir.Fd()), name, 0)
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		return c.dir(from, dir, name, to, st)
	case 0:
		err = c.file(from, dir, name, st)
	case fs.ModeSymlink:
		err = c.link(from, dir, name, st)
	default:
		if !c.o.Owner {
			c.o.Skipped(from, fmt.Errorf("a %v is made by root alone", info.Mode().Type()))
			return nil
		}
		err = c.special(dir, name, st)
	}
	if err == nil && st.Nlink > 1 {
		c.links[id] = to
	}
	return err
}

func (c *copier) dir(from string, parent *os.File, name, to string, st *syscall.Stat_t) error {
	if err := unix.Mkdirat(int(parent.Fd()), name, 0o700); err != nil {
		return err
	}
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	dir := os.NewFile(uintptr(fd), to)
	defer dir.Close()
	src, err := c.t.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	all, err := c.t.ReadDir(from)
	if err != nil {
		return err
	}
	if st.Ino == subvolumeRoot {
		above := c.subvolume
		c.subvolume = from
		defer func() { c.subvolume = above }()
	}
	for _, e := range all {
		if err := c.copy(path.Join(from, e.Name()), dir, e.Name(), filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	return c.attributes(src, dir, st)
}

func (c *copier) file(from string, dir *os.File, name string, st *syscall.Stat_t) error {
	src, err := c.t.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	dst := os.NewFile(uintptr(fd), name)
	err = c.content(src, dst, st.Size)
	if err == nil {
		err = c.attributes(src, dst, st)
	}
	return errors.Join(err, dst.Close())
}

// content copies what is data; a file of zeroes takes no room.
func (c *copier) content(src, dst *os.File, size int64) error {
	if err := dst.Truncate(size); err != nil {
		return err
	}
	for off := int64(0); off < size; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if data, err := unix.Seek(int(src.Fd()), off, unix.SEEK_DATA); err == nil {
			off = data
		} else if errors.Is(err, unix.ENXIO) {
			return nil
		}
		b := c.buf[:min(int64(len(c.buf)), size-off)]
		if _, err := src.ReadAt(b, off); err != nil {
			return err
		}
		if err := writeData(dst, b, off); err != nil {
			return err
		}
		c.o.Copied(int64(len(b)))
		off += int64(len(b))
	}
	return nil
}

var zeroPage [4096]byte

// writeData writes b but for the pages that are zeroes.
func writeData(dst *os.File, b []byte, off int64) error {
	for i := 0; i < len(b); {
		j := i
		for j < len(b) && !bytes.Equal(b[j:min(len(b), j+len(zeroPage))], zeroPage[:min(len(b)-j, len(zeroPage))]) {
			j = min(len(b), j+len(zeroPage))
		}
		if j > i {
			if _, err := dst.WriteAt(b[i:j], off+int64(i)); err != nil {
				return err
			}
			i = j
			continue
		}
		i = min(len(b), i+len(zeroPage))
	}
	return nil
}

// attributes gives an open file the owner, extended attributes, mode and times of another, in the order in which they do not undo each other.
func (c *copier) attributes(src, dst *os.File, st *syscall.Stat_t) error {
	mode := st.Mode & 0o7777
	if c.o.Owner {
		if err := dst.Chown(int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	} else {
		mode &^= unix.S_ISUID | unix.S_ISGID // they would be the caller's
	}
	if err := c.xattrs(src, dst); err != nil {
		return err
	}
	if err := unix.Fchmod(int(dst.Fd()), mode); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", dst.Fd()), times(st), 0)
}

func times(st *syscall.Stat_t) []unix.Timespec {
	return []unix.Timespec{{Sec: st.Atim.Sec, Nsec: st.Atim.Nsec}, {Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}}
}

// xattrs copies extended attributes; those that the target's file system or the caller's rights do not allow are left out, and told.
func (c *copier) xattrs(src, dst *os.File) error {
	list := make([]byte, 64<<10) // the kernel's own bounds of a list and of a value
	n, err := unix.Flistxattr(int(src.Fd()), list)
	if err != nil || n == 0 {
		return nil // a file system without
	}
	value := make([]byte, 64<<10)
	for _, name := range strings.Split(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		k, err := unix.Fgetxattr(int(src.Fd()), name, value)
		if err == nil {
			err = unix.Fsetxattr(int(dst.Fd()), name, value[:k], 0)
		}
		if err != nil {
			c.o.Skipped(dst.Name(), fmt.Errorf("attribute %s: %w", name, err))
		}
	}
	return nil
}

func (c *copier) link(from string, dir *os.File, name string, st *syscall.Stat_t) error {
	target, err := c.t.Readlink(from)
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(target, int(dir.Fd()), name); err != nil {
		return err
	}
	return c.ownAndDate(dir, name, st)
}

func (c *copier) special(dir *os.File, name string, st *syscall.Stat_t) error {
	if err := unix.Mknodat(int(dir.Fd()), name, st.Mode, int(st.Rdev)); err != nil {
		return err
	}
	if err := unix.Fchmodat(int(dir.Fd()), name, st.Mode&0o7777, 0); err != nil {
		return err
	}
	return c.ownAndDate(dir, name, st)
}

// ownAndDate gives what can not be opened its owner and times.
func (c *copier) ownAndDate(dir *os.File, name string, st *syscall.Stat_t) error {
	if c.o.Owner {
		if err := unix.Fchownat(int(dir.Fd()), name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	return unix.UtimesNanoAt(int(dir.Fd()), name, times(st), unix.AT_SYMLINK_NOFOLLOW)
}
