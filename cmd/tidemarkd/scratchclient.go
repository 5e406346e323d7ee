package main

import (
	"fmt"
	"syscall"
	"time"

	"github.com/tidemark-cdp/tidemark/nbd"
)

// scratchClient is a disk of a scratch export as one client has it open.
type scratchClient struct {
	one *scratch
	d   *scratchDisk
}

var errGone = fmt.Errorf("the scratch export was thrown away: %w", syscall.ESHUTDOWN)

// device is what is behind the disk, until release.
func (c *scratchClient) device() (dev nbd.Device, release func(), err error) {
	c.d.mu.RLock()
	if c.d.dev == nil {
		c.d.mu.RUnlock()
		return nil, nil, errGone
	}
	return c.d.dev, c.d.mu.RUnlock, nil
}

func (c *scratchClient) Size() int64    { return c.d.size }
func (c *scratchClient) ReadOnly() bool { return false }

func (c *scratchClient) ReadAt(p []byte, off int64, nowait bool) error {
	if nowait {
		// The reader must not wait for a promotion.
		if !c.d.mu.TryRLock() {
			return nbd.ErrWouldBlock
		}
		defer c.d.mu.RUnlock()
		if c.d.dev == nil {
			return errGone
		}
		return c.d.dev.ReadAt(p, off, true)
	}
	dev, release, err := c.device()
	if err != nil {
		return err
	}
	defer release()
	return dev.ReadAt(p, off, false)
}

func (c *scratchClient) Change(changes []nbd.Change) error {
	dev, release, err := c.device()
	if err != nil {
		return err
	}
	defer release()
	return dev.Change(changes)
}

func (c *scratchClient) Flush() error {
	dev, release, err := c.device()
	if err != nil {
		return err
	}
	defer release()
	return dev.Flush()
}

func (c *scratchClient) Extents(off, n int64, fn func(int64, bool)) error {
	dev, release, err := c.device()
	if err != nil {
		return err
	}
	defer release()
	return dev.Extents(off, n, fn)
}

func (c *scratchClient) Close() error {
	c.one.mu.Lock()
	defer c.one.mu.Unlock()
	if c.one.clients--; c.one.clients > 0 {
		return nil
	}
	c.one.idle = time.Now()
	if p := c.one.note.Promote; p != nil && p.Done {
		return c.one.closeLivesLocked()
	}
	return nil
}
