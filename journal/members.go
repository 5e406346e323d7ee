package journal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// members are the disks of a group. It is not changed once others may see it.
type members struct {
	all   []*disk.Disk  // in the order of the table; those that were removed are detached
	table []record.Disk // every disk the group ever had; at the head of each segment
}

// with is the members with one disk's entry as it is from now on.
func (m *members) with(d *disk.Disk, t record.Disk) *members {
	n := &members{all: slices.Clone(m.all), table: slices.Clone(m.table)}
	if i := slices.IndexFunc(n.table, func(o record.Disk) bool { return o.ID == t.ID }); i >= 0 {
		n.all[i], n.table[i] = d, t
	} else {
		n.all, n.table = append(n.all, d), append(n.table, t)
	}
	return n
}

func (m *members) entry(d *disk.Disk) record.Disk { return m.table[slices.Index(m.all, d)] }

func (m *members) named(name string) *disk.Disk {
	for _, d := range m.all {
		if d.Name == name {
			return d
		}
	}
	return nil
}

// Disks are the disks that are in the group.
func (g *Group) Disks() []*disk.Disk {
	m := g.disks.Load()
	var in []*disk.Disk
	for i, d := range m.all {
		if m.table[i].Removed == 0 && d.Attached() {
			in = append(in, d)
		}
	}
	return in
}

// Table is what is known of the disks that are in the group.
func (g *Group) Table() []record.Disk {
	m := g.disks.Load()
	var in []record.Disk
	for i, d := range m.all {
		if m.table[i].Removed == 0 && d.Attached() {
			in = append(in, m.table[i])
		}
	}
	return in
}

// Removed are the disks that were in the group, whose history it has, by the LSN at which they left.
func (g *Group) Removed() map[*disk.Disk]record.LSN {
	m := g.disks.Load()
	gone := map[*disk.Disk]record.LSN{}
	for i, d := range m.all {
		if m.table[i].Removed != 0 {
			gone[d] = m.table[i].Removed
		}
	}
	return gone
}

// Disk finds a disk that is in the group by name. ErrDetached if it was.
func (g *Group) Disk(name string) (*disk.Disk, error) {
	for _, d := range g.Disks() {
		if d.Name == name {
			return d, nil
		}
	}
	if d := g.disks.Load().named(name); d != nil {
		return nil, fmt.Errorf("disk %q of group %s: %w: %w: add it again to see its past", name, g.name, ErrNotFound, ErrDetached)
	}
	return nil, fmt.Errorf("disk %q of group %s: %w", name, g.name, ErrNotFound)
}

// disk finds a disk by its id, nil if the group never had it. Groups have few.
func (g *Group) disk(id record.DiskID) *disk.Disk {
	for _, d := range g.disks.Load().all {
		if d.ID == id {
			return d
		}
	}
	return nil
}

func (g *Group) attached(id record.DiskID) bool {
	d := g.disk(id)
	return d != nil && d.Attached()
}

// Use keeps a disk in its group until release, which may be called once. ErrDetached if it is not in it.
func (g *Group) Use(d *disk.Disk) (release func(), err error) {
	g.pins.Lock()
	defer g.pins.Unlock()
	if g.pins.users[d] < 0 || !slices.Contains(g.Disks(), d) {
		return nil, fmt.Errorf("disk %q of group %s: %w", d.Name, g.name, ErrDetached)
	}
	g.pins.users[d]++
	return func() {
		g.pins.Lock()
		defer g.pins.Unlock()
		g.pins.users[d]--
	}, nil
}

// open opens a disk's backing and claims it.
func (g *Group) open(c DiskConfig, d *disk.Disk) (newcomer *disk.Disk, err error) {
	size, f, err := openBacking(g.fs, c.Backing, g.o.ReadOnly)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", c.Name, err)
	}
	if d != nil && d.Size != size {
		return nil, errors.Join(fmt.Errorf("disk %s: backing %s has %d bytes, the journal knows %d: restore its size, or protect it under another disk name",
			c.Name, c.Backing, size, d.Size), f.Close())
	}
	if err := g.store.claim(f, g.name+"/"+c.Name); err != nil {
		return nil, errors.Join(fmt.Errorf("backing %s: %w", c.Backing, err), f.Close())
	}
	if d == nil {
		if n := len(g.disks.Load().table); n >= record.MaxDisks {
			return nil, errors.Join(fmt.Errorf("group %s has had %d disks, and can have no more: begin another group", g.name, n), f.Close())
		}
		id := record.DiskID(1)
		for _, t := range g.disks.Load().table {
			id = max(id, t.ID+1)
		}
		d = disk.New(id, c.Name, size, 0, g)
	}
	d.Attach(f, c.Backing)
	return d, nil
}

// openDisks opens the backings that are configured, and gives new disks their ids. Disks that are not
// configured are there without a backing.
func (r *recovery) openDisks(table []record.Disk, configs []DiskConfig) error {
	g := r.g
	m := &members{table: slices.Clone(table)}
	for _, t := range table {
		m.all = append(m.all, disk.New(t.ID, t.Name, t.Size, t.Added, g))
	}
	g.disks.Store(m)
	for _, c := range configs {
		known := g.disks.Load().named(c.Name)
		d, err := g.open(c, known)
		if err != nil {
			return err
		}
		switch {
		case known == nil && g.Follows():
			return errors.Join(fmt.Errorf("disk %s is not in group %s, which follows another daemon's", c.Name, g.name), d.Detach())
		case known == nil:
			r.added = append(r.added, d)
			g.disks.Store(g.disks.Load().with(d, record.Disk{ID: d.ID, Name: d.Name, Size: d.Size}))
		case g.disks.Load().entry(d).Removed != 0:
			r.returning = append(r.returning, d)
		}
	}
	return nil
}

// membersAt notes at which LSN disks came to the group or left it, of those that did while it was closed.
func (g *Group) membersAt(last record.LSN, added []*disk.Disk) {
	m := g.disks.Load()
	for i, d := range m.all {
		t := m.table[i]
		switch {
		case slices.Contains(added, d) || t.Added > last: // a crash may have taken what was older than the disk
			t.Added, d.Added = last, last
		case !d.Attached() && t.Removed == 0 && !g.Follows():
			t.Removed = max(last, 1)
		default:
			continue
		}
		g.disks.Store(g.disks.Load().with(d, t))
	}
}

// welcome takes disks that were removed into the group again. What others did to their backings
// meanwhile is journaled as a discontinuity. Nobody sees the disks before.
func (g *Group) welcome(returning []*disk.Disk, fresh bool) error {
	for _, d := range returning {
		t := g.disks.Load().entry(d)
		changed := fresh
		if !fresh {
			var err error
			if changed, err = g.changedSince(d, t.Removed); err != nil {
				return err
			}
		}
		if changed {
			if err := g.discontinuity(d); err != nil {
				return fmt.Errorf("backing %s of disk %s was changed while it was not in the group: journal the difference: %w", d.Path(), d.Name, err)
			}
		}
		t.Removed = 0
		if err := g.become(d, t, false); err != nil {
			return err
		}
		g.log.Info("disk is in the group again", zap.String("disk", d.Name), zap.String("backing", d.Path()))
	}
	return nil
}

// changedSince is changed for a disk that left the group at an LSN.
func (g *Group) changedSince(d *disk.Disk, left record.LSN) (bool, error) {
	was, err := g.ix.State(stateBacking(d.ID))
	if err != nil {
		return false, err
	}
	if !signedAt(was, left) || binary.LittleEndian.Uint64(was[8:]) == 0 {
		// It left without being signed, or is a device: what was written meanwhile does not show.
		return true, nil
	}
	return g.changed(d, left)
}

// become makes an entry of the table what it is from now on, durably: recovery reads the table at the head of
// the newest segment of the log. A disk that came is not older than what is journaled so far.
func (g *Group) become(d *disk.Disk, t record.Disk, came bool) error {
	return g.rollWith(g.Follows(), func() (undo func(), err error) {
		was := g.disks.Load()
		if came {
			t.Added = g.Head()
			d.Added = t.Added
		}
		g.disks.Store(was.with(d, t))
		return func() { g.disks.Store(was) }, nil
	})
}

// AddDisk takes a disk into the group, a new one or one that was removed. Its history begins, or
// goes on, with the head. It is durable when AddDisk returns.
func (g *Group) AddDisk(c DiskConfig) error {
	if err := record.CheckName(c.Name); err != nil {
		return fmt.Errorf("disk of group %s: %w", g.name, err)
	}
	g.joining.Lock()
	defer g.joining.Unlock()
	if g.Follows() {
		return fmt.Errorf("add disk %s to group %s: %w", c.Name, g.name, ErrFollows)
	}
	known := g.disks.Load().named(c.Name)
	d := known
	switch {
	case known == nil || !known.Attached():
		var err error
		if d, err = g.open(c, known); err != nil {
			return err
		}
	case g.disks.Load().entry(known).Removed == 0:
		return fmt.Errorf("disk %s is in group %s already", c.Name, g.name)
	case known.Path() != c.Backing:
		return fmt.Errorf("disk %s of group %s still has the backing %s of an attempt to add it: add it with that one", c.Name, g.name, known.Path())
	}
	var err error
	if known != nil {
		err = g.welcome([]*disk.Disk{d}, false)
	} else {
		err = g.become(d, record.Disk{ID: d.ID, Name: d.Name, Size: d.Size}, true)
	}
	if err != nil {
		return errors.Join(err, g.letGo(d))
	}
	g.log.Info("disk is in the group", zap.String("disk", d.Name), zap.String("backing", c.Backing), zap.Uint64("added", uint64(d.Added)))
	return nil
}

// letGo detaches a disk that did not get into the group. What was journaled of it is applied first: as
// long as it can not be, the disk stays attached, and nobody sees it.
func (g *Group) letGo(d *disk.Disk) error {
	err := g.applyTo(g.Head())
	if err == nil {
		err = g.Checkpoint()
	}
	if err != nil {
		return fmt.Errorf("disk %s keeps its backing until what was journaled of it is applied; add it again then: %w", d.Name, err)
	}
	return g.detach(d)
}

// RemoveDisk takes a disk out of the group: what is journaled of it is applied, and its backing closed.
// Its history stays, and can be viewed when it is added again. ErrInUse while anybody has it open.
func (g *Group) RemoveDisk(name string) (err error) {
	g.joining.Lock()
	defer g.joining.Unlock()
	if g.Follows() {
		return fmt.Errorf("remove disk %s of group %s: %w", name, g.name, ErrFollows)
	}
	d, err := g.Disk(name)
	if err != nil {
		return err
	}
	if err := g.leave(d); err != nil {
		return err
	}
	defer g.stay([]*disk.Disk{d})
	// Nobody can write it any more.
	left := max(g.Head(), 1)
	if err := g.applyTo(left); err != nil {
		return err
	}
	g.apply.Lock()
	err = g.signLeaving(d, left)
	g.apply.Unlock()
	if err != nil {
		return err
	}
	t := g.disks.Load().entry(d)
	t.Removed = left
	if err := g.become(d, t, false); err != nil {
		return err
	}
	if err := g.detach(d); err != nil {
		return err
	}
	g.log.Info("disk was removed from the group", zap.String("disk", d.Name), zap.Uint64("lsn", uint64(left)))
	return nil
}

// leave sees to it that nobody uses a disk from now on.
func (g *Group) leave(d *disk.Disk) error {
	g.pins.Lock()
	defer g.pins.Unlock()
	if n := g.pins.users[d]; n != 0 {
		return fmt.Errorf("disk %s of group %s: %w by %d clients: detach it from the guest and close its views first", d.Name, g.name, ErrInUse, n)
	}
	g.pins.users[d] = -1
	return nil
}

// stay takes leave back.
func (g *Group) stay(disks []*disk.Disk) {
	g.pins.Lock()
	defer g.pins.Unlock()
	for _, d := range disks {
		delete(g.pins.users, d)
	}
}

func (g *Group) applyTo(lsn record.LSN) error {
	for g.Applied() < min(lsn, g.Head()) {
		if err := g.Apply(); err != nil {
			return err
		}
	}
	return nil
}

// signLeaving makes a disk's backing durable and notes what it is. g.apply is held.
func (g *Group) signLeaving(d *disk.Disk, left record.LSN) error {
	if err := d.SyncBacking(); err != nil {
		return g.fail(err)
	}
	if err := g.checkpointLocked(); err != nil {
		return err
	}
	if err := g.sign(d, left); err != nil {
		return err
	}
	return g.store.ix.Flush()
}

// detach closes a disk's backing. A round or a checkpoint under way may be at it.
func (g *Group) detach(d *disk.Disk) error {
	g.apply.Lock()
	defer g.apply.Unlock()
	g.store.release(g.name + "/" + d.Name)
	return d.Detach()
}
