package restore

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// Errors, to be found with errors.Is.
var (
	ErrInUse    = errors.New("it is in use")
	ErrTooSmall = errors.New("it is too small")
	ErrNoRoom   = errors.New("the file system has not enough room")
	// ErrDiffers says that a copy is not what was restored.
	ErrDiffers = errors.New("the copy differs from what was restored")
)

// File is a Target: a raw image or a block device that exists.
type File struct {
	f      *os.File
	path   string
	size   int64
	device bool
}

// OpenFile opens a raw image or a block device that nobody else has open, to be written in place.
func OpenFile(path string) (*File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	mode := info.Mode()
	device := mode&fs.ModeDevice != 0 && mode&fs.ModeCharDevice == 0
	if !device && !mode.IsRegular() {
		return nil, fmt.Errorf("%s is neither a file nor a block device", path)
	}
	flags := os.O_RDWR
	if device {
		flags |= unix.O_EXCL // EBUSY if it is mounted, or part of something else
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		if errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("%s: %w: it is mounted, or part of another device", path, ErrInUse)
		}
		return nil, err
	}
	t := &File{f: f, path: path, size: info.Size(), device: device}
	if device {
		t.size, err = f.Seek(0, io.SeekEnd)
	} else {
		err = unused(f)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	return t, nil
}

// unused fails with ErrInUse if anybody else has the file open: a lease for writing is given to a file's only
// opener alone (fcntl(2), F_SETLEASE).
func unused(f *os.File) error {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return fmt.Errorf("%w: another process has it open", ErrInUse)
	case err != nil:
		return nil // not its owner, or a file system without leases: it can not be told
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	return err
}

// Size is the device's or the image's, in bytes.
func (t *File) Size() int64 { return t.size }

// Device reports whether it is a block device.
func (t *File) Device() bool { return t.device }

// ReadAt fills p.
func (t *File) ReadAt(p []byte, off int64) error {
	_, err := t.f.ReadAt(p, off)
	return err
}

// WriteAt writes p at off.
func (t *File) WriteAt(p []byte, off int64) error {
	_, err := t.f.WriteAt(p, off)
	return err
}

// Zero gives the range's space back where it can.
func (t *File) Zero(off, n int64) error {
	err := unix.Fallocate(int(t.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	for n > 0 {
		k := min(n, grain)
		if err := t.WriteAt(zeroes[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// Sync makes durable what was written.
func (t *File) Sync() error { return t.f.Sync() }

// forget has what is read next come from the disk, as far as the kernel can be asked for that.
func (t *File) forget() { _ = unix.Fadvise(int(t.f.Fd()), 0, 0, unix.FADV_DONTNEED) }

// Close closes the file.
func (t *File) Close() error { return t.f.Close() }

// checkRoom fails if the file system of an open file can not hold the source's data. The data is counted only
// if the file system could not hold all of the disk.
func checkRoom(f *os.File, src Source, done bitmap) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return nil // it can not be told
	}
	room := int64(st.Bavail) * st.Bsize
	if room >= src.Size() {
		return nil
	}
	var need int64
	for i := range spans(src.Size()) {
		if done.get(i) {
			continue
		}
		off := int64(i) * span
		err := src.Extents(off, min(span, src.Size()-off), func(n int64, zero bool) {
			if !zero {
				need += n
			}
		})
		if err != nil {
			return err
		}
	}
	if need > room {
		return fmt.Errorf("%w: %d bytes are free, and up to %d are needed", ErrNoRoom, room, need)
	}
	return nil
}
