// Package inventory tells everything that a tree of files is, so that tests can compare what one way of reading shows with what another does.
//
// It promises that two trees with the same inventory have the same names, contents, modes, owners, times of change, links and extended attributes.
// Directories have no size: each file system has its own. The caller must see to it that nobody changes the tree. Of reads
// in full there is one at a time.
package inventory

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Entry is all that a file is.
type Entry struct {
	Mode     fs.FileMode
	UID, GID uint32
	Nlink    uint64
	Size     int64
	Mtime    int64 // ns
	Rdev     uint64
	First    string // of the names of one file: the first
	Target   string
	Xattrs   string
	Sum      [32]byte
}

// inode is a file. Subvolumes of a Btrfs, whose roots are number 256, may share a device where a VM shows them.
type inode struct {
	subvolume string
	dev, ino  uint64
}

// Of is everything below a directory, by path.
func Of(dir string) (map[string]Entry, error) {
	all := map[string]Entry{}
	first := map[inode]string{}
	subvolumes := map[string]string{} // by directory: the one that it is in
	dir = strings.TrimSuffix(dir, "/.")
	root := dir + "/." // a descriptor's path is a link
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		name := strings.TrimPrefix(path, dir)
		e, id, err := entry(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		id.subvolume = subvolumes[filepath.Dir(path)]
		if e.Mode.IsDir() {
			subvolumes[path] = id.subvolume
			if id.ino == 256 {
				subvolumes[path] = name
			}
		}
		if e.Nlink > 1 {
			if _, ok := first[id]; !ok {
				first[id] = name
			}
			e.First = first[id]
		}
		all[name] = e
		return nil
	})
	return all, err
}

func entry(path string) (e Entry, id inode, err error) {
	info, err := os.Lstat(path)
	if err != nil {
		return e, id, err
	}
	st := info.Sys().(*syscall.Stat_t)
	e = Entry{Mode: info.Mode(), UID: st.Uid, GID: st.Gid, Mtime: info.ModTime().UnixNano(), Rdev: st.Rdev}
	if !info.IsDir() {
		e.Nlink, e.Size = st.Nlink, info.Size()
	}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		e.Target, err = os.Readlink(path)
	case info.Mode().IsRegular():
		e.Sum, err = Sum(path)
	}
	e.Xattrs = xattrs(path)
	return e, inode{dev: st.Dev, ino: st.Ino}, err
}

// Buffers of Sum.
var (
	mu          sync.Mutex
	buf, zeroes [256 << 10]byte
)

// Sum is over what is not zeroes, and where it is: files may be long and empty.
func Sum(path string) (s [32]byte, err error) {
	mu.Lock()
	defer mu.Unlock()
	f, err := os.Open(path)
	if err != nil {
		return s, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return s, err
	}
	h := sha256.New()
	for off := int64(0); off < info.Size(); {
		if data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA); err == nil {
			off = data &^ int64(len(buf)-1) // the same parts, wherever the holes are
		} else if errors.Is(err, unix.ENXIO) {
			break
		}
		b := buf[:min(int64(len(buf)), info.Size()-off)]
		if _, err := f.ReadAt(b, off); err != nil {
			return s, err
		}
		if !bytes.Equal(b, zeroes[:len(b)]) {
			_, _ = fmt.Fprint(h, off)
			_, _ = h.Write(b)
		}
		off += int64(len(b))
	}
	_, _ = fmt.Fprint(h, info.Size())
	return [32]byte(h.Sum(nil)), nil
}

func xattrs(path string) string {
	b := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, b)
	if err != nil || n == 0 {
		return ""
	}
	names := strings.Split(strings.TrimRight(string(b[:n]), "\x00"), "\x00")
	sort.Strings(names)
	var all []string
	for _, name := range names {
		v := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, v)
		if err != nil {
			all = append(all, fmt.Sprintf("%s: %v", name, err))
			continue
		}
		all = append(all, fmt.Sprintf("%s=%x", name, v[:n]))
	}
	return strings.Join(all, " ")
}

// Differences are the first few of what differs, as text.
func Differences(want, got map[string]Entry) (all []string) {
	paths := make([]string, 0, len(want))
	for path := range want {
		paths = append(paths, path)
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			paths = append(paths, path)
		}
	}
	sort.Strings(paths)
	for _, path := range paths {
		w, inWant := want[path]
		g, inGot := got[path]
		if inWant && inGot && w == g {
			continue
		}
		if len(all) == 10 {
			return append(all, "and more")
		}
		all = append(all, fmt.Sprintf("%q: expected (%t) %+v, got (%t) %+v", path, inWant, w, inGot, g))
	}
	return all
}
