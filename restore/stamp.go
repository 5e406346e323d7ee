package restore

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// An image carries a stamp: an extended attribute that says what it was restored from, and when it was
// last written then. So a list of changes is not written over what it does not belong to.
const stampName = "user.tidemark.restored"

type stamp struct {
	Version int `json:"version"`
	Origin
	Size  int64 `json:"size"`
	Mtime int64 `json:"mtime"` // Unix nanoseconds
}

const stampVersion = 1

// ErrNoStamp says that an image does not tell what it is.
var ErrNoStamp = errors.New("nothing tells what it is a copy of")

// Stamped is what the file was restored from. ErrNoStamp if it does not say, or was written since.
func (t *File) Stamped() (Origin, error) {
	b := make([]byte, 4096)
	n, err := unix.Fgetxattr(int(t.f.Fd()), stampName, b)
	if t.device || err != nil {
		return Origin{}, fmt.Errorf("%s: %w", t.path, ErrNoStamp)
	}
	var s stamp
	if err := json.Unmarshal(b[:n], &s); err != nil || s.Version != stampVersion {
		return Origin{}, fmt.Errorf("%s: %w: its stamp is of another version", t.path, ErrNoStamp)
	}
	info, err := t.f.Stat()
	if err != nil {
		return Origin{}, err
	}
	if info.ModTime().UnixNano() != s.Mtime || info.Size() != s.Size {
		return Origin{}, fmt.Errorf("%s: %w: it was %s as of LSN %d, and was written since", t.path, ErrNoStamp, s.Disk, s.LSN)
	}
	return s.Origin, nil
}

// StampedAt is what the file at path was restored from, see File.Stamped.
func StampedAt(path string) (Origin, error) {
	f, err := os.Open(path)
	if err != nil {
		return Origin{}, err
	}
	defer f.Close()
	return (&File{f: f, path: path}).Stamped()
}

// markName is an extended attribute of a file that is being written in place: it is the note's.
const markName = "user.tidemark.restoring"

// newMark is a mark for a file, or what tells a device from every other that may have its name.
func (t *File) newMark() string {
	if t.device {
		return t.marked()
	}
	return rand.Text()
}

// marked is the mark that the file carries; empty if there is none.
func (t *File) marked() string {
	if t.device {
		return deviceMark(t.f)
	}
	b := make([]byte, 64)
	n, err := unix.Fgetxattr(int(t.f.Fd()), markName, b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}

// deviceMark is a device's number, its sequence number (each disk has another one) and the start of the host.
func deviceMark(f *os.File) string {
	var st unix.Stat_t
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || unix.Fstat(int(f.Fd()), &st) != nil {
		return ""
	}
	seq, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/diskseq", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	if err != nil {
		return "" // a partition, or an older kernel
	}
	return fmt.Sprintf("%s %d:%d %s", strings.TrimSpace(string(boot)), unix.Major(st.Rdev), unix.Minor(st.Rdev), strings.TrimSpace(string(seq)))
}

// unstamp is called before the file is written: it carries a mark then, and no stamp.
func (t *File) unstamp(mark string) error {
	if t.device {
		return nil
	}
	fd := int(t.f.Fd())
	for _, err := range []error{unix.Fremovexattr(fd, stampName), unix.Fsetxattr(fd, markName, []byte(mark), 0)} {
		if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("mark %s: %w", t.path, err)
		}
	}
	return t.f.Sync() // before a byte is: a crash must not leave a stamp on a mix
}

// stamp is called when the file is written and synced.
func (t *File) stamp(o Origin) error {
	if t.device {
		return nil
	}
	info, err := t.f.Stat()
	if err != nil {
		return err
	}
	o.Since = 0
	b, err := json.Marshal(stamp{Version: stampVersion, Origin: o, Size: info.Size(), Mtime: info.ModTime().UnixNano()})
	if err != nil {
		return err
	}
	if err := unix.Fsetxattr(int(t.f.Fd()), stampName, b, 0); err != nil {
		return nil // a file system without attributes: the file goes without
	}
	_ = unix.Fremovexattr(int(t.f.Fd()), markName) // an image that is made anew has none
	return t.f.Sync()
}
