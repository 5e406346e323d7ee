package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// openBacking opens a raw file or a block device that exists.
func openBacking(vfsys vfs.FS, path string, readOnly bool) (int64, vfs.File, error) {
	info, err := vfsys.Stat(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return 0, nil, fmt.Errorf("backing %s does not exist: create it first (truncate -s SIZE %s)", path, path)
		}
		return 0, nil, fmt.Errorf("backing: %w", err)
	}
	if m := info.Mode(); !m.IsRegular() && m&os.ModeDevice == 0 {
		return 0, nil, fmt.Errorf("backing %s is neither a file nor a block device", path)
	}
	var f vfs.File
	if readOnly {
		f, err = vfsys.Open(path)
	} else {
		f, err = vfsys.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("open backing: %w", err)
	}
	size := info.Size()
	if info.Mode()&os.ModeDevice != 0 {
		if size, err = unix.Seek(int(f.Fd()), 0, unix.SEEK_END); err != nil {
			return 0, nil, errors.Join(fmt.Errorf("size of backing %s: %w", path, err), f.Close())
		}
	}
	if size == 0 || size > record.MaxDiskSize {
		return 0, nil, errors.Join(fmt.Errorf("backing %s has %d bytes: 1 to %d are allowed", path, size, record.MaxDiskSize), f.Close())
	}
	return size, f, nil
}

// A backing's fingerprint is taken when the group is closed in order: the
// head's LSN and the file's modification time, 8 bytes each, little-endian. If
// the head is the same at the next open, nobody but others can have written
// the backing meanwhile.
func (g *Group) fingerprint(d *disk.Disk, head record.LSN) ([]byte, error) {
	info, err := g.fs.Stat(d.Path())
	if err != nil {
		return nil, fmt.Errorf("backing of disk %s: %w", d.Name, err)
	}
	b := binary.LittleEndian.AppendUint64(nil, uint64(head))
	mtime := info.ModTime().UnixNano()
	if info.Mode()&os.ModeDevice != 0 {
		mtime = 0 // a device's node tells nothing of its content
	}
	return binary.LittleEndian.AppendUint64(b, uint64(mtime)), nil
}

// sign notes what the backing is at a stop in order or when its disk leaves, so that the next start finds out
// whether somebody changed it.
func (g *Group) sign(d *disk.Disk, head record.LSN) error {
	replaced, err := d.Replaced()
	if err != nil {
		return fmt.Errorf("backing %s of disk %s: %w", d.Path(), d.Name, err)
	}
	if replaced {
		g.log.Error("the backing's path leads to another file than the one that was served: the next start journals what differs as a discontinuity",
			zap.String("disk", d.Name), zap.String("backing", d.Path()))
		return g.setState(stateChanged(d.ID), []byte{1})
	}
	// A sync of its data alone need not make the time durable.
	if err := d.Sync(); err != nil {
		return g.fail(err)
	}
	fp, err := g.fingerprint(d, head)
	if err != nil {
		return err
	}
	return g.setState(stateBacking(d.ID), fp)
}

// settle brings the backings to the head, durably, for a stop in order.
func (g *Group) settle() error {
	if g.o.ReadOnly {
		return nil
	}
	if state, err := g.State(); state == "failed" {
		return err
	}
	for g.Applied() < g.Head() {
		if err := g.Apply(); err != nil {
			return err
		}
	}
	if err := g.Sync(); err != nil {
		return err
	}
	g.apply.Lock()
	defer g.apply.Unlock()
	if err := g.checkpointLocked(); err != nil {
		return err
	}
	for _, d := range g.Disks() {
		if err := g.sign(d, g.Head()); err != nil {
			return err
		}
	}
	if err := errors.Join(g.append.log.Close(), g.apply.orig.Close()); err != nil {
		return err
	}
	return g.store.ix.Flush()
}
