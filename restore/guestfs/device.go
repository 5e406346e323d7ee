package guestfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/tidemark-cdp/tidemark/restore/export"
)

// A Way has file systems shown as directories. Each stands on an overlay that is thrown away: a journal that
// is not empty is replayed there, as the guest's own recovery would.
type Way interface {
	// Open begins with volumes whose names differ. Nothing is opened before it is asked for.
	Open(ctx context.Context, volumes []Volume) (Opened, error)
}

// Opened is volumes that are ready to be shown.
type Opened interface {
	// Dir is where this process finds a volume's files: a directory, and no link to one. It may take as long as the start of a small VM. What
	// is in there may be hostile: links lead to the host.
	Dir(ctx context.Context, volume string) (string, error)
	// Err is why nothing is shown any more; nil if all is well.
	Err() error
	// Break ends what shows the files, so that uses fail, also those that wait: it may hang on what is hostile. What the kernel
	// itself reads from is ended by who attached it.
	Break()
	Close() error
}

// ErrUnsupported says that a volume holds nothing that can be shown as files.
var ErrUnsupported = errors.New("no file system that is supported")

// ErrStale says that a file system would not be shown as its guest would see it.
var ErrStale = errors.New("it would be shown as it never was")

// overlayReserve is what overlays leave free in their file system, in bytes.
const overlayReserve = 256 << 20

// Device is a volume that can be written: its overlay is thrown away. It is an nbd.Device.
type Device struct{ *export.Overlay }

// NewDevice puts an overlay on a volume. Its data is in dir, without a name.
func NewDevice(v Volume, disks map[string]Disk, dir string) (*Device, error) {
	r, err := v.Open(disks)
	if err != nil {
		return nil, err
	}
	own, err := os.MkdirTemp(dir, "overlay")
	if err != nil {
		return nil, err
	}
	o, err := export.Create(filepath.Join(own, "raw"), filepath.Join(own, "o"), overlayBase{r.(*volumeReader), newReadAhead(r)}, export.Options{Reserve: overlayReserve})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("volume %s: %w", v.Name, err), os.RemoveAll(own))
	}
	// Nobody but this process is to find it.
	if err := os.RemoveAll(own); err != nil {
		return nil, errors.Join(err, o.Close())
	}
	return &Device{o}, nil
}

// Flush has nothing to do: the overlay is thrown away.
func (d *Device) Flush() error { return nil }

// Unsupported is why the files of a volume can not be shown; nil if they can.
func (v Volume) Unsupported() error {
	if v.FS.Readable() {
		return nil
	}
	what := v.FS.Type
	if what == TypeNone {
		what = "nothing that is known"
	}
	return fmt.Errorf("volume %s holds %s: %w: %s are; disk.raw has all of the disk", v.Name, what, ErrUnsupported, Supported)
}

// overlayBase is a volume as what an overlay stands on.
type overlayBase struct {
	*volumeReader
	read *readAhead
}

func (b overlayBase) ReadAt(p []byte, off int64, _ bool) error { return b.read.ReadAt(p, off) }
