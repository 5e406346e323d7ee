package guestfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/tidemark-cdp/tidemark/restore/export"
)

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

// overlayBase is a volume as what an overlay stands on.
type overlayBase struct {
	*volumeReader
	read *readAhead
}

func (b overlayBase) ReadAt(p []byte, off int64, _ bool) error { return b.read.ReadAt(p, off) }
