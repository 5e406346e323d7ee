// Package osfile does vectored, non-blocking and preallocating I/O on files
// of a Pebble [vfs.FS]. Where a file has no descriptor (the simulated disks of
// the tests) it falls back to plain calls that mean the same.
//
// It keeps no state; concurrency is the file's own. Nothing is durable until
// the file is synced by its owner.
package osfile

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"
)

// ErrWouldBlock says that the bytes are not in memory and that the caller asked not to wait.
var ErrWouldBlock = errors.New("read would wait for the disk")

// maxVec is the kernel's limit of buffers for one vectored call (IOV_MAX).
const maxVec = 1024

// WriteVec writes the buffers one after another at off. On an error a prefix
// of them may have been written.
func WriteVec(f vfs.File, bufs [][]byte, off int64) error {
	fd := f.Fd()
	if fd == vfs.InvalidFd {
		var all []byte
		for _, b := range bufs {
			all = append(all, b...)
		}
		_, err := f.WriteAt(all, off)
		return err
	}
	for len(bufs) > 0 {
		part := bufs[:min(len(bufs), maxVec)]
		n, err := unix.Pwritev(int(fd), part, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("pwritev", err)
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		off += int64(n)
		for n > 0 || len(bufs) > 0 && len(bufs[0]) == 0 {
			if n < len(bufs[0]) {
				// A short write (out of space, a signal) ends within a
				// buffer: go on from there with a copy of the list's head.
				rest := append([][]byte{bufs[0][n:]}, bufs[1:]...)
				bufs = rest
				break
			}
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
	}
	return nil
}

// ReadFull fills p from off. With nowait it returns ErrWouldBlock, p then
// undefined, rather than wait for the disk. Bytes past the end are an
// io.ErrUnexpectedEOF.
func ReadFull(f vfs.File, p []byte, off int64, nowait bool) error {
	if fd := f.Fd(); nowait && fd != vfs.InvalidFd {
		n, err := unix.Preadv2(int(fd), [][]byte{p}, off, unix.RWF_NOWAIT)
		if err == nil && n == len(p) {
			return nil
		}
		// Not cached, cached in part, interrupted, or a file system that
		// knows no RWF_NOWAIT: all the same to the caller, who comes again.
		return ErrWouldBlock
	}
	n, err := ReadAt(f, p, off)
	if n < len(p) && err == nil {
		err = fmt.Errorf("read %d bytes at %d: got %d: %w", len(p), off, n, io.ErrUnexpectedEOF)
	}
	return err
}

// ReadAt fills p from off as far as the file goes: fewer bytes than that are its end,
// and no error. It asks the kernel itself, which for a block costs half of what
// [os.File.ReadAt] does; the caller sees to it that nobody closes the file meanwhile.
func ReadAt(f vfs.File, p []byte, off int64) (n int, err error) {
	fd := f.Fd()
	if fd == vfs.InvalidFd {
		if n, err = f.ReadAt(p, off); err == io.EOF {
			err = nil
		}
		return n, err
	}
	for n < len(p) {
		k, err := unix.Pread(int(fd), p[n:], off+int64(n))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return n, os.NewSyscallError("pread", err)
		case k == 0:
			return n, nil
		default:
			n += k
		}
	}
	return n, nil
}

// Allocate reserves n bytes from the file's start and makes them its size, so
// that later writes neither run out of space nor move the file's end.
func Allocate(f vfs.File, n int64) error {
	fd := f.Fd()
	if fd == vfs.InvalidFd {
		return f.Preallocate(0, n)
	}
	for {
		switch err := unix.Fallocate(int(fd), 0, 0, n); err {
		case unix.EINTR:
			continue
		case unix.EOPNOTSUPP:
			return nil // writes may then meet ENOSPC themselves
		default:
			return err
		}
	}
}

// Truncate sets the file's size. It does nothing on simulated disks, where
// files have no allocation beyond their bytes.
func Truncate(f vfs.File, n int64) error {
	if fd := f.Fd(); fd != vfs.InvalidFd {
		return unix.Ftruncate(int(fd), n)
	}
	return nil
}

// Cut removes what stands from off on, durably. On simulated disks, which can
// not shorten a file, it is zeroes afterwards.
func Cut(f vfs.File, off int64) error {
	if f.Fd() != vfs.InvalidFd {
		if err := Truncate(f, off); err != nil {
			return err
		}
		return f.Sync()
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if n := info.Size() - off; n > 0 {
		if _, err := f.WriteAt(make([]byte, n), off); err != nil {
			return err
		}
	}
	return f.Sync()
}

// PunchHole frees the space of a range, which then reads as zeroes. ok is
// false where the file cannot: the caller writes zeroes instead.
func PunchHole(f vfs.File, off, n int64) (ok bool, err error) {
	fd := f.Fd()
	if fd == vfs.InvalidFd {
		return false, nil
	}
	err = unix.Fallocate(int(fd), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	return err == nil, err
}

// IsNoSpace reports whether err says that a file system or quota is full.
func IsNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// ID tells files apart, whatever their paths: device and inode, of a block device its number.
type ID struct{ dev, ino uint64 }

// Identify returns the identity of an open file; ok is false on simulated disks.
func Identify(f vfs.File) (id ID, ok bool, err error) {
	fd := f.Fd()
	if fd == vfs.InvalidFd {
		return ID{}, false, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(fd), &st); err != nil {
		return ID{}, false, os.NewSyscallError("fstat", err)
	}
	return identity(&st), true, nil
}

// IdentifyPath is Identify of what a path leads to.
func IdentifyPath(path string) (ID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return ID{}, os.NewSyscallError("stat", err)
	}
	return identity(&st), nil
}

func identity(st *unix.Stat_t) ID {
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return ID{dev: st.Rdev, ino: ^uint64(0)}
	}
	return ID{dev: st.Dev, ino: st.Ino}
}

// Hole is where the hole ends that off is in, at the end of the file at most; off if there is data, or may be. Other than Run it
// does not walk along data.
func Hole(f vfs.File, off int64) (end int64) {
	fd := f.Fd()
	if fd == vfs.InvalidFd {
		return off
	}
	data, err := unix.Seek(int(fd), off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		data, err = unix.Seek(int(fd), 0, unix.SEEK_END)
	}
	if err != nil || data < off {
		return off // no such knowledge: block devices, some file systems
	}
	return data
}

// Run is the length of the run at off, at most n bytes, that is all data or
// all hole, and which.
func Run(f vfs.File, off, n int64) (run int64, hole bool) {
	fd := f.Fd()
	if fd == vfs.InvalidFd {
		return n, false
	}
	data, err := unix.Seek(int(fd), off, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO:
		return n, true // no data up to the end
	case err != nil:
		return n, false // no such knowledge: block devices, some file systems
	case data > off:
		return min(n, data-off), true
	}
	end, err := unix.Seek(int(fd), off, unix.SEEK_HOLE)
	if err != nil || end <= off {
		return n, false
	}
	return min(n, end-off), false
}
