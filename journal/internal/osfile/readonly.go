package osfile

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"
)

// ReadOnly is fs for one who promises to change nothing: Lock, which otherwise
// makes or truncates the lock file, takes a shared lock on the file that is there.
func ReadOnly(fs vfs.FS) vfs.FS { return readOnly{fs} }

type readOnly struct{ vfs.FS }

func (r readOnly) Unwrap() vfs.FS { return r.FS }

func (r readOnly) Lock(name string) (io.Closer, error) {
	if vfs.Root(r.FS) != vfs.Default {
		return io.NopCloser(nil), nil // a simulated disk: nobody else has it
	}
	f, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return io.NopCloser(nil), nil // nobody has opened it yet
	}
	if err != nil {
		return nil, err
	}
	lock := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &lock); err != nil {
		return nil, errors.Join(fmt.Errorf("another process has %s open for writing: %w", name, err), f.Close())
	}
	return f, nil
}
