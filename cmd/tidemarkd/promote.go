package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/nbd"
	"github.com/tidemark-cdp/tidemark/restore/export"
)

// promotion is what a scratch export is to become: a group whose disks have backings of their own. Each backing is an
// overlay on the scratch export's until it is whole; the guest writes to it from the start.
//
//	step                                            a kill or a power cut right after it
//	1 backings made, claimed; note with promotion   they are filled on by the next start
//	2 the guest's disks are the backings' overlays  the same: nothing is written to the lower ones any more
//	3 filled, flushed; note: whole                  the same, with nothing left to fill; or 5, if the group is there
//	4 the guest waits; flush; configuration's file  the next start has the group, and with "whole" takes step 6
//	5 the group is opened, the guest's disks are its own, and it goes on
//	6 note: done                                    the names lead to the group
//	7 overlays removed                              removed by the next start
type promotion struct {
	Group    string            `json:"group"`
	Backings map[string]string `json:"backings"` // by disk
	Whole    bool              `json:"whole"`    // the backings have every block
	Done     bool              `json:"done"`     // the disks are the group's
}

// filling is how far a promotion is; guarded by the scratch's mu.
type filling struct {
	running bool
	done    int64 // bytes
	why     error // why it ended
}

// adopter has a group protected from now on, durably. hold is called first, and back if nothing came of it: nobody else changes the
// groups between them.
type adopter interface {
	adopt(name string, conf config.Group, hold, back func() error) error
}

// unfinishedBackings are the backings of promotions that are not whole, by path: no group may have them yet.
func unfinishedBackings(stateDir string) (map[string]string, error) {
	found := map[string]string{}
	entries, err := os.ReadDir(filepath.Join(stateDir, "scratch"))
	if errors.Is(err, fs.ErrNotExist) {
		return found, nil
	}
	for _, e := range entries {
		var note scratchNote
		err := readNote(filepath.Join(stateDir, "scratch", e.Name(), scratchNoteName), &note)
		if err != nil || note.Promote == nil || note.Promote.Whole || note.Promote.Done {
			continue // what is wrong with a note is told when it is loaded
		}
		for _, path := range note.Promote.Backings {
			found[path] = e.Name()
		}
	}
	return found, err
}

// withoutUnfinished is a configuration without the groups that have backings of promotions which are not whole.
func withoutUnfinished(c config.Config, log *zap.Logger) (config.Config, error) {
	unfinished, err := unfinishedBackings(c.StateDir)
	if err != nil {
		return c, fmt.Errorf("scratch exports: %w", err)
	}
	c.Groups = maps.Clone(c.Groups)
	for path, scratch := range unfinished {
		a, err := os.Stat(path)
		if err != nil {
			continue
		}
		for name, g := range c.Groups {
			for _, d := range g.Disks {
				if b, err := os.Stat(d.Backing); err == nil && os.SameFile(a, b) {
					log.Error("group is not opened: a scratch export is being promoted to its backing, which is not whole yet",
						zap.String("group", name), zap.String("backing", path), zap.String("scratch", scratch))
					delete(c.Groups, name)
				}
			}
		}
	}
	return c, nil
}

// promote begins to make a scratch export a group of its own. It returns when the guest writes to the new backings.
func (s *scratches) promote(name string, req api.PromoteRequest) (*scratch, error) {
	s.making.Lock()
	defer s.making.Unlock()
	one, err := s.get(name)
	if err != nil {
		return nil, err
	}
	if err := record.CheckName(req.Group); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	if !filepath.IsAbs(req.Dir) {
		return nil, fmt.Errorf("%w: directory %q: an absolute path is expected", errBadRequest, req.Dir)
	}
	one.mu.Lock()
	defer one.mu.Unlock()
	again := one.note.Promote != nil && one.note.Promote.Group == req.Group
	if !again && s.store.Has(req.Group) {
		return nil, fmt.Errorf("%w: there is, or was, a group %s, whose journal is in the state directory: choose another name", errBadRequest, req.Group)
	}
	switch p := one.note.Promote; {
	case one.why != nil:
		return nil, fmt.Errorf("scratch export %s: %w", name, one.why)
	case p != nil && p.Done:
		return nil, fmt.Errorf("%w: scratch export %s is group %s already", errBadRequest, name, p.Group)
	case p != nil && one.fill.running:
		return nil, fmt.Errorf("%w: scratch export %s is being made group %s", errBadRequest, name, p.Group)
	case p != nil: // it broke off; perhaps because of the name
		was := p.Group
		p.Group = req.Group
		if err := one.writeNoteLocked(); err != nil {
			p.Group = was
			return nil, err
		}
	default:
		if err := one.turnLocked(req); err != nil {
			return nil, fmt.Errorf("promote scratch export %s: %w", name, err)
		}
	}
	one.beginFillLocked()
	return one, nil
}

// turnLocked makes the new backings, and has the guest write to them. one.mu is held.
func (one *scratch) turnLocked(req api.PromoteRequest) error {
	if err := mkdirDurable(req.Dir); err != nil {
		return err
	}
	p := &promotion{Group: req.Group, Backings: map[string]string{}}
	for disk := range one.disks {
		p.Backings[disk] = filepath.Join(req.Dir, disk+".raw")
	}
	if err := one.roomFor(req.Dir); err != nil {
		return err
	}
	made, err := one.makeBackings(p)
	if err == nil {
		if err = one.claim(p); err == nil {
			err = one.switchOver(p, made)
		}
	}
	if err != nil {
		one.unclaim()
		for _, f := range made {
			err = errors.Join(err, f.Close(), os.Remove(f.Path()))
		}
	}
	return err
}

// roomFor fails if a directory's file system can not hold the disks.
func (one *scratch) roomFor(dir string) error {
	var need int64
	for _, d := range one.disks {
		err := d.over.Extents(0, d.size, func(n int64, zero bool) {
			if !zero {
				need += n
			}
		})
		if err != nil {
			return err
		}
	}
	need += one.s.reserveIn(dir)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err == nil && int64(st.Bavail)*st.Bsize < need {
		return fmt.Errorf("%s: %d bytes are free, and %d are needed: %w", dir, int64(st.Bavail)*st.Bsize, need, journal.ErrNoSpace)
	}
	return nil
}

// reserveIn is what overlays leave free in a directory's file system: something, if it is the journal's.
func (s *scratches) reserveIn(dir string) int64 {
	var a, b unix.Stat_t
	if unix.Stat(dir, &a) == nil && unix.Stat(s.dir, &b) == nil && a.Dev != b.Dev {
		return 0
	}
	return s.reserve
}

// promoteDir is where the maps of the new backings are: a disk's files beside it can not be taken for them.
func (one *scratch) promoteDir() string { return filepath.Join(one.dir, "promote") }

func (one *scratch) promoteMaps(disk string) string { return filepath.Join(one.promoteDir(), disk) }

// makeBackings makes the files of a promotion, durably.
func (one *scratch) makeBackings(p *promotion) (made map[string]*export.Overlay, err error) {
	made = map[string]*export.Overlay{}
	// What a promotion left that never came to be.
	if err := os.RemoveAll(one.promoteDir()); err != nil {
		return made, err
	}
	if err := os.Mkdir(one.promoteDir(), 0o700); err != nil {
		return made, err
	}
	for disk, path := range p.Backings {
		f, err := export.Create(path, one.promoteMaps(disk), one.disks[disk].over, export.Options{Reserve: one.s.reserveIn(filepath.Dir(path))})
		if err != nil {
			return made, err
		}
		made[disk] = f
		if err := errors.Join(f.Flush(), syncDir(filepath.Dir(path))); err != nil {
			return made, err
		}
	}
	return made, errors.Join(syncDir(one.promoteDir()), syncDir(one.dir))
}

// claim keeps the backings from being any group's until they are whole.
func (one *scratch) claim(p *promotion) error {
	for disk, path := range p.Backings {
		release, err := one.s.store.Claim(path, scratchPrefix+one.name+"/"+disk)
		if err != nil {
			one.unclaim()
			return fmt.Errorf("backing %s: %w", path, err)
		}
		one.claims = append(one.claims, release)
	}
	return nil
}

func (one *scratch) unclaim() {
	for _, release := range one.claims {
		release()
	}
	one.claims = nil
}

// switchOver notes the promotion, and has the guest write to the new backings. What it wrote before is durable first: from then on
// its flushes are of the new ones alone.
func (one *scratch) switchOver(p *promotion, made map[string]*export.Overlay) error {
	for _, d := range one.disks {
		if err := d.over.Flush(); err != nil { // so that little is left to do while the guest waits
			return err
		}
	}
	for _, d := range one.disks {
		d.mu.Lock()
		defer d.mu.Unlock()
	}
	for _, d := range one.disks {
		if err := d.over.Flush(); err != nil {
			return err
		}
	}
	one.note.Promote = p
	if err := one.writeNoteLocked(); err != nil {
		one.note.Promote = nil
		return errors.Join(err, one.writeNoteLocked()) // it may be there all the same
	}
	for disk, f := range made {
		d := one.disks[disk]
		d.full, d.dev = f, f
	}
	return nil
}

// openFull opens a backing that is not whole yet, over what the disk was.
func (d *scratchDisk) openFull(path, maps string, reserve int64) (err error) {
	// From here on flushes are of the upper one alone.
	if err := d.over.Flush(); err != nil {
		return err
	}
	if d.full, err = export.Open(path, maps, d.over, export.Options{Reserve: reserve}); err != nil {
		return err
	}
	d.dev = d.full
	return nil
}

// beginFillLocked fills the backings in the background. one.mu is held.
func (one *scratch) beginFillLocked() {
	one.fill = filling{running: true}
	one.s.wg.Go(func() {
		err := one.fillAll(one.s.work)
		one.mu.Lock()
		defer one.mu.Unlock()
		one.fill.running = false
		if one.fill.why = err; err != nil {
			one.s.log.Error("promotion broke off: the guest goes on, unprotected; promote again, or start the daemon again", zap.String("scratch", one.name), zap.Error(err))
		}
	})
}

func (one *scratch) fillAll(ctx context.Context) error {
	began := time.Now()
	for _, disk := range slices.Sorted(maps.Keys(one.disks)) {
		full := one.disks[disk].full
		if full == nil {
			return fmt.Errorf("disk %s: its backing is not open", disk)
		}
		err := full.Fill(ctx, func(n int64) {
			one.mu.Lock()
			one.fill.done += n
			one.mu.Unlock()
		})
		if err == nil {
			err = full.Flush()
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", disk, err)
		}
	}
	one.mu.Lock()
	one.note.Promote.Whole = true
	group, err := one.note.Promote.Group, one.writeNoteLocked()
	one.mu.Unlock()
	if err != nil {
		return err
	}
	held, err := one.handOver()
	if err != nil {
		return err
	}
	one.s.log.Info("scratch export is a group", zap.String("scratch", one.name), zap.String("group", group),
		zap.Duration("after", time.Since(began)), zap.Duration("held", held))
	return nil
}

// handOver makes whole backings the disks of a group. The guest's requests wait meanwhile, for held.
func (one *scratch) handOver() (held time.Duration, err error) {
	p := one.note.Promote
	conf := config.Group{Disks: map[string]config.Disk{}}
	for disk, path := range p.Backings {
		conf.Disks[disk] = config.Disk{Backing: path}
	}
	var began time.Time
	var locked []*scratchDisk
	letGo := sync.OnceFunc(func() {
		for _, d := range locked {
			d.mu.Unlock()
		}
	})
	defer letGo()
	err = one.s.adopt.adopt(p.Group, conf, func() error {
		began = time.Now()
		for _, disk := range slices.Sorted(maps.Keys(one.disks)) {
			d := one.disks[disk]
			d.mu.Lock()
			locked = append(locked, d)
			if err := d.full.Flush(); err != nil {
				return err
			}
		}
		one.unclaim()
		return nil
	}, func() error { return one.claim(p) })
	if err != nil {
		return 0, err
	}
	// From here on the journal has the backings: nobody may write past it.
	var old []*scratchDisk
	for disk, d := range one.disks {
		dev, err := one.s.exports.openLive(p.Group, disk)
		if err != nil {
			dev = broken{fmt.Errorf("disk %s/%s: %w", p.Group, disk, err), d.size}
		}
		old = append(old, &scratchDisk{view: d.view, over: d.over, full: d.full})
		d.full, d.over, d.view, d.dev = nil, nil, nil, dev
	}
	letGo() // the guest goes on
	held = time.Since(began)
	if err := one.finished(old); err != nil {
		one.s.log.Error("scratch export was promoted, and not all put away", zap.String("scratch", one.name), zap.Error(err))
	}
	return held, nil
}

// finished notes that a promotion is done, and puts away what it stood on.
func (one *scratch) finished(old []*scratchDisk) error {
	one.mu.Lock()
	defer one.mu.Unlock()
	one.note.Promote.Done = true
	err := one.writeNoteLocked()
	if one.clients == 0 {
		err = errors.Join(err, one.closeLivesLocked())
	}
	for _, d := range old {
		err = errors.Join(err, d.close())
	}
	if err != nil {
		return err
	}
	return one.removeFiles()
}

// closeLivesLocked closes the group's disks: who comes now opens them himself. one.mu is held.
func (one *scratch) closeLivesLocked() error {
	var errs []error
	for _, d := range one.disks {
		d.mu.Lock()
		errs = append(errs, d.close())
		d.mu.Unlock()
	}
	return errors.Join(errs...)
}

// removeFiles removes what a promoted scratch export needs no more: its note stays, for the name that guests know.
func (one *scratch) removeFiles() error {
	entries, err := os.ReadDir(one.dir)
	for _, e := range entries {
		if e.Name() != scratchNoteName {
			err = errors.Join(err, os.RemoveAll(filepath.Join(one.dir, e.Name())))
		}
	}
	return err
}

// promoted reports whether the daemon has the group that a promotion was to make: its backings are whole, and the group's.
func (s *scratches) promoted(p *promotion) bool {
	g, err := s.store.Group(p.Group)
	if err != nil || !p.Whole {
		return false
	}
	for disk, path := range p.Backings {
		if d, err := g.Disk(disk); err != nil || d.Path() != path {
			return false
		}
	}
	return true
}

// broken is a disk whose group could not be opened.
type broken struct {
	err  error
	size int64
}

func (b broken) Size() int64                                   { return b.size }
func (b broken) ReadOnly() bool                                { return false }
func (b broken) ReadAt([]byte, int64, bool) error              { return b.err }
func (b broken) Change([]nbd.Change) error                     { return b.err }
func (b broken) Flush() error                                  { return b.err }
func (b broken) Extents(int64, int64, func(int64, bool)) error { return b.err }
func (b broken) Close() error                                  { return nil }
