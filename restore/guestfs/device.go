package guestfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/tidemark-cdp/tidemark/restore/export"
)

// A Way has file systems shown as directories. Each stands on an overlay that is thrown away: a journal that
// is not empty is replayed there, as the guest's own recovery would.
type Way interface {
	// Open begins with the volumes of one moment.
	Open(ctx context.Context, volumes []*Device) (Opened, error)
}

// Opened is the volumes of one moment, ready to be shown.
type Opened interface {
	// Dir is where this process finds a volume's files. It may take as long as the start of a small VM.
	Dir(ctx context.Context, volume string) (string, error)
	Close() error
}

// ErrUnsupported says that a volume holds nothing that can be shown as files.
var ErrUnsupported = errors.New("no file system that is supported")

// ErrStale says that a file system would not be shown as its guest would see it.
var ErrStale = errors.New("it would be shown as it never was")

// Device is a volume with its overlay.
type Device struct {
	V Volume
	*export.Overlay
}

// NewDevice puts an overlay on a volume. Its files are in dir, which is the caller's to remove.
func NewDevice(v Volume, disks map[string]Disk, dir string) (*Device, error) {
	r, err := v.Open(disks)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, strings.ReplaceAll(v.Name, "/", "_"))
	o, err := export.Create(path+".raw", path, overlayBase{r.(*volumeReader)}, export.Options{})
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", v.Name, err)
	}
	// Nobody but this process is to find it.
	if err := errors.Join(os.Remove(path+".raw"), os.Remove(path+".map"), os.Remove(path+".flushed")); err != nil {
		return nil, errors.Join(err, o.Close())
	}
	return &Device{v, o}, nil
}

// Flush has nothing to do: the overlay is thrown away.
func (d *Device) Flush() error { return nil }

// check refuses what can not be shown.
func (d *Device) check() error {
	if d.V.FS.Readable() {
		return nil
	}
	what := d.V.FS.Type
	if what == TypeNone {
		what = "nothing that is known"
	}
	return fmt.Errorf("volume %s holds %s: %w: %s are; disk.raw has all of the disk", d.V.Name, what, ErrUnsupported, Supported)
}

// overlayBase is a volume as what an overlay stands on.
type overlayBase struct{ *volumeReader }

func (b overlayBase) ReadAt(p []byte, off int64, _ bool) error { return b.volumeReader.ReadAt(p, off) }
