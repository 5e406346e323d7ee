package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/nbd"
)

type tlsConfig = *tls.Config

// exports makes GROUP/DISK and GROUP/DISK@POINT into devices.
type exports struct{ store *journal.Store }

// List names the live disks.
func (e *exports) List() []string {
	var names []string
	for _, g := range e.store.Groups() {
		for _, d := range g.Disks() {
			names = append(names, g.Name()+"/"+d.Name)
		}
	}
	return names
}

// Open finds a live disk, or opens a view. With one disk in all, the empty
// name is that disk: what clients ask for that were given no name.
func (e *exports) Open(name string) (nbd.Device, error) {
	if all := e.List(); name == "" && len(all) == 1 {
		name = all[0]
	}
	n, err := record.ParseExportName(name)
	if err != nil {
		return nil, err
	}
	g, err := e.store.Group(n.Group)
	if err != nil {
		return nil, err
	}
	d, err := g.Disk(n.Disk)
	if err != nil {
		return nil, err
	}
	if n.Live {
		release, err := g.Use(d)
		if err != nil {
			return nil, err
		}
		return &live{g: g, d: d, release: sync.OnceFunc(release)}, nil
	}
	lsn, err := g.Resolve(n.Point)
	if err != nil {
		return nil, err
	}
	v, err := g.View(d, lsn)
	if err != nil {
		return nil, err
	}
	return &past{v: v}, nil
}

func wouldBlock(err error) error {
	if errors.Is(err, journal.ErrWouldBlock) {
		return nbd.ErrWouldBlock
	}
	return err
}

// live is a disk as it is.
type live struct {
	g       *journal.Group
	d       *disk.Disk
	release func()
}

func (l *live) Size() int64    { return l.d.Size }
func (l *live) ReadOnly() bool { return false }
func (l *live) Flush() error   { return l.g.Sync() }

func (l *live) Close() error {
	l.release()
	return nil
}

func (l *live) ReadAt(p []byte, off int64, nowait bool) error {
	return wouldBlock(l.d.ReadAt(p, off, nowait))
}

func (l *live) Extents(off, n int64, fn func(int64, bool)) error {
	return l.d.Extents(record.Extent{Off: off, Len: n}, fn)
}

var kinds = map[nbd.Op]record.Kind{nbd.OpWrite: record.KindWrite, nbd.OpZero: record.KindZero, nbd.OpTrim: record.KindTrim}

var opsPool = sync.Pool{New: func() any { return new([]journal.Op) }}

func (l *live) Change(changes []nbd.Change) error {
	ops := opsPool.Get().(*[]journal.Op)
	defer opsPool.Put(ops)
	*ops = (*ops)[:0]
	for _, c := range changes {
		*ops = append(*ops, journal.Op{Kind: kinds[c.Op], Disk: l.d, Ext: record.Extent{Off: c.Off, Len: c.Len}, Data: c.Buf})
	}
	err := l.g.Append(*ops)
	clear(*ops)
	return err
}

// past is a disk as it was.
type past struct{ v *journal.View }

func (p *past) Size() int64    { return p.v.Size() }
func (p *past) ReadOnly() bool { return true }
func (p *past) Flush() error   { return nil }

func (p *past) Close() error {
	p.v.Close()
	return nil
}

func (p *past) ReadAt(b []byte, off int64, nowait bool) error {
	return wouldBlock(p.v.ReadAt(b, off, nowait))
}

func (p *past) Change([]nbd.Change) error {
	return fmt.Errorf("the past can not be changed: %w", syscall.EPERM)
}

func (p *past) Extents(off, n int64, fn func(int64, bool)) error {
	return p.v.Extents(record.Extent{Off: off, Len: n}, fn)
}

// Map implements nbd.Mapper: tidemark:changed-since:POINT tells, in bit 0, which runs may
// differ from what the disk was at an older point.
func (p *past) Map(context string) (nbd.Map, error) {
	s, ok := strings.CutPrefix(context, api.ChangedSince)
	if !ok {
		return nil, nil
	}
	point, err := record.ParsePoint(s)
	if err != nil {
		return nil, err
	}
	old, err := p.v.Older(point)
	if err != nil {
		return nil, err
	}
	return &changes{now: p.v, old: old}, nil
}

// changes is what became of a disk between two points.
type changes struct{ now, old *journal.View }

func (c *changes) Extents(off, n int64, fn func(int64, uint32)) error {
	return c.now.Changes(c.old, record.Extent{Off: off, Len: n}, func(n int64, changed bool) {
		if changed {
			fn(n, 1)
		} else {
			fn(n, 0)
		}
	})
}

func (c *changes) Close() error {
	c.old.Close()
	return nil
}
