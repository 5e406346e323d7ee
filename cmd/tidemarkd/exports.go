package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/nbd"
)

type tlsConfig = *tls.Config

// exports makes GROUP/DISK, GROUP/DISK@POINT and scratch/NAME/DISK into devices.
type exports struct {
	store     *journal.Store
	scratches *scratches

	mu     sync.Mutex                    // guards what follows
	lives  map[string]map[*live]struct{} // by group: the disks that clients have open
	pasts  map[string]map[*past]struct{} // likewise, as they were
	sealed map[string]string             // by group: why its disks can not be opened
}

func newExports(store *journal.Store) *exports {
	return &exports{store: store, lives: map[string]map[*live]struct{}{}, pasts: map[string]map[*past]struct{}{}, sealed: map[string]string{}}
}

// List names the live disks and the scratch exports.
func (e *exports) List() []string {
	var names []string
	for _, g := range e.store.Groups() {
		for _, d := range g.Disks() {
			names = append(names, g.Name()+"/"+d.Name)
		}
	}
	return append(names, e.scratches.list()...)
}

// Open finds a live disk or a scratch export, or opens a view. With one disk in all, the empty
// name is that disk: what clients ask for that were given no name.
func (e *exports) Open(name string) (nbd.Device, error) {
	if all := e.List(); name == "" && len(all) == 1 {
		name = all[0]
	}
	if scratch, disk, ok := cutScratch(name); ok {
		return e.scratches.open(scratch, disk)
	}
	n, err := record.ParseExportName(name)
	if err != nil {
		return nil, err
	}
	if n.Live {
		return e.openLive(n.Group, n.Disk)
	}
	g, err := e.store.Group(n.Group)
	if err != nil {
		return nil, err
	}
	d, err := g.Disk(n.Disk)
	if err != nil {
		return nil, err
	}
	lsn, err := g.Resolve(n.Point)
	if err != nil {
		return nil, err
	}
	v, err := g.View(d, lsn)
	if err != nil {
		return nil, err
	}
	p := &past{e: e, g: g, v: v, release: sync.OnceFunc(v.Close)}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.pasts[g.Name()] == nil {
		e.pasts[g.Name()] = map[*past]struct{}{}
	}
	e.pasts[g.Name()][p] = struct{}{}
	return p, nil
}

func (e *exports) openLive(group, disk string) (nbd.Device, error) {
	g, err := e.store.Group(group)
	if err != nil {
		return nil, err
	}
	d, err := g.Disk(disk)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if why, sealed := e.sealed[group]; sealed {
		return nil, fmt.Errorf("group %s: %s: %w", group, why, syscall.EBUSY)
	}
	release, err := g.Use(d)
	if err != nil {
		return nil, err
	}
	l := &live{e: e, g: g, d: d, follows: g.Follows(), release: sync.OnceFunc(release)}
	if e.lives[group] == nil {
		e.lives[group] = map[*live]struct{}{}
	}
	e.lives[group][l] = struct{}{}
	return l, nil
}

// seal keeps clients from a group's disks. Those who have one open are in the way, or, with cut, get errors from
// then on: when seal returns, none of their writes is under way.
func (e *exports) seal(group, why string, cut bool) error {
	e.mu.Lock()
	if other, sealed := e.sealed[group]; sealed {
		e.mu.Unlock()
		return fmt.Errorf("group %s: %w: %s", group, journal.ErrInUse, other)
	}
	var open []*live
	for l := range e.lives[group] {
		if !l.cut.Load() {
			open = append(open, l)
		}
	}
	if len(open) > 0 && !cut {
		e.mu.Unlock()
		return fmt.Errorf("group %s: %w by %d clients: stop the guest first (--force cuts them off)", group, journal.ErrInUse, len(open))
	}
	e.sealed[group] = why
	e.mu.Unlock()
	for _, l := range open {
		l.cutOff()
	}
	return nil
}

// cutPasts has clients that look at what a group's disks were get errors from then on.
func (e *exports) cutPasts(group string) {
	e.mu.Lock()
	open := slices.Collect(maps.Keys(e.pasts[group]))
	e.mu.Unlock()
	for _, p := range open {
		p.cutOff()
	}
}

func (e *exports) unseal(group string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.sealed, group)
}

func wouldBlock(err error) error {
	if errors.Is(err, journal.ErrWouldBlock) {
		return nbd.ErrWouldBlock
	}
	return err
}

// live is a disk as it is, as one client has it open.
type live struct {
	e       *exports
	g       *journal.Group
	d       *disk.Disk
	follows bool   // it was another daemon's when it was opened: it can be read
	release func() // may be called again

	cut  atomic.Bool
	busy sync.RWMutex // held for reading by each request; for writing to wait for them
}

// errCut is what clients get whose disk was taken from them.
var errCut = fmt.Errorf("the disk was rolled back: the guest must be started anew: %w", syscall.ESHUTDOWN)

// begin is called before each request, and end behind it.
func (l *live) begin() (end func(), err error) {
	l.busy.RLock()
	if l.cut.Load() {
		l.busy.RUnlock()
		return nil, errCut
	}
	if after, open := l.g.Bridging(); open {
		l.busy.RUnlock()
		return nil, fmt.Errorf("group %s is being brought over a gap, and disk %s is a mix until it is: read it as of lsn:%d: %w", l.g.Name(), l.d.Name, after, syscall.EIO)
	}
	return l.busy.RUnlock, nil
}

// cutOff makes every request from now on an error, and waits for those under way. The disk is let go of.
func (l *live) cutOff() {
	l.cut.Store(true)
	l.busy.Lock()
	defer l.busy.Unlock()
	l.release()
}

func (l *live) Size() int64    { return l.d.Size }
func (l *live) ReadOnly() bool { return l.follows }

func (l *live) Flush() error {
	end, err := l.begin()
	if err != nil {
		return err
	}
	defer end()
	return l.g.Sync()
}

func (l *live) Close() error {
	l.e.mu.Lock()
	delete(l.e.lives[l.g.Name()], l)
	l.e.mu.Unlock()
	l.release()
	return nil
}

func (l *live) ReadAt(p []byte, off int64, nowait bool) error {
	end, err := l.begin()
	if err != nil {
		return err
	}
	defer end()
	return wouldBlock(l.d.ReadAt(p, off, nowait))
}

func (l *live) Extents(off, n int64, fn func(int64, bool)) error {
	end, err := l.begin()
	if err != nil {
		return err
	}
	defer end()
	return l.d.Extents(record.Extent{Off: off, Len: n}, fn)
}

var kinds = map[nbd.Op]record.Kind{nbd.OpWrite: record.KindWrite, nbd.OpZero: record.KindZero, nbd.OpTrim: record.KindTrim}

var opsPool = sync.Pool{New: func() any { return new([]journal.Op) }}

func (l *live) Change(changes []nbd.Change) error {
	end, err := l.begin()
	if err != nil {
		return err
	}
	defer end()
	ops := opsPool.Get().(*[]journal.Op)
	defer opsPool.Put(ops)
	*ops = (*ops)[:0]
	for _, c := range changes {
		*ops = append(*ops, journal.Op{Kind: kinds[c.Op], Disk: l.d, Ext: record.Extent{Off: c.Off, Len: c.Len}, Data: c.Buf})
	}
	err = l.g.Append(*ops)
	clear(*ops)
	return err
}

// past is a disk as it was, as one client has it open.
type past struct {
	e       *exports
	g       *journal.Group
	v       *journal.View
	release func() // may be called again

	cut  atomic.Bool
	busy sync.RWMutex // as a live's; guards what follows
	maps []*changes   // that are open
}

// errPastCut is what clients get whose view was taken from them.
var errPastCut = fmt.Errorf("the group was failed over, and goes back for that: open it again: %w", syscall.ESHUTDOWN)

func (p *past) begin() (end func(), err error) {
	p.busy.RLock()
	if p.cut.Load() {
		p.busy.RUnlock()
		return nil, errPastCut
	}
	return p.busy.RUnlock, nil
}

func (p *past) cutOff() {
	p.cut.Store(true)
	p.busy.Lock()
	defer p.busy.Unlock()
	for _, c := range p.maps {
		c.release()
	}
	p.release()
}

func (p *past) Size() int64    { return p.v.Size() }
func (p *past) ReadOnly() bool { return true }
func (p *past) Flush() error   { return nil }

func (p *past) Close() error {
	p.e.mu.Lock()
	delete(p.e.pasts[p.g.Name()], p)
	p.e.mu.Unlock()
	p.release()
	return nil
}

func (p *past) ReadAt(b []byte, off int64, nowait bool) error {
	end, err := p.begin()
	if err != nil {
		return err
	}
	defer end()
	return wouldBlock(p.v.ReadAt(b, off, nowait))
}

func (p *past) Change([]nbd.Change) error {
	return fmt.Errorf("the past can not be changed: %w", syscall.EPERM)
}

func (p *past) Extents(off, n int64, fn func(int64, bool)) error {
	end, err := p.begin()
	if err != nil {
		return err
	}
	defer end()
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
	p.busy.Lock()
	defer p.busy.Unlock()
	if p.cut.Load() {
		return nil, errPastCut
	}
	old, err := p.v.Older(point)
	if err != nil {
		return nil, err
	}
	c := &changes{past: p, old: old, release: sync.OnceFunc(old.Close)}
	p.maps = append(p.maps, c)
	return c, nil
}

// changes is what became of a disk between two points.
type changes struct {
	past    *past
	old     *journal.View
	release func() // may be called again
}

func (c *changes) Extents(off, n int64, fn func(int64, uint32)) error {
	end, err := c.past.begin()
	if err != nil {
		return err
	}
	defer end()
	return c.past.v.Changes(c.old, record.Extent{Off: off, Len: n}, func(n int64, changed bool) {
		if changed {
			fn(n, 1)
		} else {
			fn(n, 0)
		}
	})
}

func (c *changes) Close() error {
	c.past.busy.Lock()
	defer c.past.busy.Unlock()
	c.past.maps = slices.DeleteFunc(c.past.maps, func(o *changes) bool { return o == c })
	c.release()
	return nil
}
