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
type promotion struct {
	Group    string            `json:"group"`
	Backings map[string]string `json:"backings"`
	Done     bool              `json:"done"` // the disks are the group's
}

// filling is how far a promotion is; guarded by the scratch's mu.
type filling struct {
	running bool
	done    int64 // bytes
	why     error // why it ended
}

// adopter has a group protected from now on, durably. hold is called first, when nobody else changes the groups any more.
type adopter interface {
	adopt(name string, conf config.Group, hold func() error) error
}

// openFull opens a backing that is not whole yet, over what the disk was.
func (d *scratchDisk) openFull(path, maps string) (err error) {
	// From here on flushes are of the upper one alone.
	if err := d.over.Flush(); err != nil {
		return err
	}
	if d.full, err = export.Open(path, maps, d.over, export.Options{}); err != nil {
		return err
	}
	d.dev = d.full
	return nil
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
	if _, err := s.store.Group(req.Group); err == nil {
		return nil, fmt.Errorf("%w: there is a group %s: choose another name", errBadRequest, req.Group)
	}
	if !filepath.IsAbs(req.Dir) {
		return nil, fmt.Errorf("%w: directory %q: an absolute path is expected", errBadRequest, req.Dir)
	}
	one.mu.Lock()
	defer one.mu.Unlock()
	switch p := one.note.Promote; {
	case one.why != nil:
		return nil, fmt.Errorf("scratch export %s: %w", name, one.why)
	case p != nil && p.Done:
		return nil, fmt.Errorf("%w: scratch export %s is group %s already", errBadRequest, name, p.Group)
	case p != nil && one.fill.running:
		return nil, fmt.Errorf("%w: scratch export %s is being made group %s", errBadRequest, name, p.Group)
	case p != nil: // it broke off
		one.beginFillLocked()
		return one, nil
	}
	if err := one.turnLocked(req); err != nil {
		return nil, fmt.Errorf("promote scratch export %s: %w", name, err)
	}
	one.beginFillLocked()
	return one, nil
}

// turnLocked makes the new backings, and has the guest write to them. one.mu is held.
func (one *scratch) turnLocked(req api.PromoteRequest) error {
	if err := os.MkdirAll(req.Dir, 0o700); err != nil {
		return err
	}
	p := &promotion{Group: req.Group, Backings: map[string]string{}}
	var need int64
	for disk, d := range one.disks {
		path := filepath.Join(req.Dir, disk+".raw")
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			return errors.Join(fmt.Errorf("%s: %w", path, fs.ErrExist), err)
		}
		p.Backings[disk] = path
		err := d.over.Extents(0, d.size, func(n int64, zero bool) {
			if !zero {
				need += n
			}
		})
		if err != nil {
			return err
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(req.Dir, &st); err == nil && int64(st.Bavail)*st.Bsize < need {
		return fmt.Errorf("%s: %d bytes are free, and %d are needed: %w", req.Dir, int64(st.Bavail)*st.Bsize, need, journal.ErrNoSpace)
	}
	// The files first: with the note, a start expects them. Without it they are of nobody, and removed here.
	made, err := one.makeBackings(p)
	if err == nil {
		one.note.Promote = p
		if err = writeNote(filepath.Join(one.dir, scratchNoteName), one.note); err != nil {
			one.note.Promote = nil
		}
	}
	if err != nil {
		for _, f := range made {
			err = errors.Join(err, f.Close(), os.Remove(f.Path()))
		}
		return err
	}
	return one.switchOver(made)
}

// switchOver has the guest write to the new backings. What it wrote before is durable first: from then on its flushes
// are of the new ones alone.
func (one *scratch) switchOver(made map[string]*export.Overlay) error {
	for _, d := range one.disks {
		if err := d.over.Flush(); err != nil { // so that little is left to do while the guest waits
			return err
		}
	}
	for disk, f := range made {
		d := one.disks[disk]
		d.mu.Lock()
		err := d.over.Flush()
		d.full, d.dev = f, f // also if it failed: the note has it so
		d.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func (one *scratch) makeBackings(p *promotion) (made map[string]*export.Overlay, err error) {
	made = map[string]*export.Overlay{}
	for disk, path := range p.Backings {
		maps := filepath.Join(one.dir, disk+".promote")
		for _, old := range []string{maps + ".map", maps + ".flushed"} {
			if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return made, err
			}
		}
		f, err := export.Open(path, maps, one.disks[disk].over, export.Options{})
		if err != nil {
			return made, err
		}
		made[disk] = f
		if err := errors.Join(f.Flush(), syncDir(filepath.Dir(path))); err != nil {
			return made, err
		}
	}
	return made, syncDir(one.dir)
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
		d := one.disks[disk]
		err := d.full.Fill(ctx, func(n int64) {
			one.mu.Lock()
			one.fill.done += n
			one.mu.Unlock()
		})
		if err == nil {
			err = d.full.Flush() // so that little is left to do while the guest waits
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", disk, err)
		}
	}
	held, err := one.handOver()
	if err != nil {
		return err
	}
	one.s.log.Info("scratch export is a group", zap.String("scratch", one.name), zap.String("group", one.note.Promote.Group),
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
	began := time.Now()
	var locked []*scratchDisk
	defer func() {
		for _, d := range locked {
			d.mu.Unlock()
		}
	}()
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
		return nil
	})
	if err != nil {
		return 0, err
	}
	// From here on the journal has the backings: nobody may write past it.
	lives := map[string]nbd.Device{}
	for disk := range one.disks {
		dev, err := one.s.exports.openLive(p.Group, disk)
		if err != nil {
			dev = broken{fmt.Errorf("disk %s/%s: %w", p.Group, disk, err), one.disks[disk].size}
		}
		lives[disk] = dev
	}
	var errs []error
	for disk, d := range one.disks {
		errs = append(errs, d.full.Close(), d.over.Close())
		d.view.Close()
		d.full, d.over, d.view, d.dev = nil, nil, nil, lives[disk]
	}
	held = time.Since(began)
	one.mu.Lock()
	p.Done = true
	errs = append(errs, writeNote(filepath.Join(one.dir, scratchNoteName), one.note))
	one.mu.Unlock()
	if err := errors.Join(errs...); err != nil {
		one.s.log.Error("scratch export was promoted, and not all put away", zap.String("scratch", one.name), zap.Error(err))
	}
	one.removeFiles()
	return held, nil
}

// removeFiles removes what a promoted scratch export needs no more: its note stays, for the name that guests know.
func (one *scratch) removeFiles() {
	entries, err := os.ReadDir(one.dir)
	for _, e := range entries {
		if e.Name() != scratchNoteName {
			err = errors.Join(err, os.Remove(filepath.Join(one.dir, e.Name())))
		}
	}
	if err != nil {
		one.s.log.Error("remove what a promoted scratch export stood on", zap.String("scratch", one.name), zap.Error(err))
	}
}

// promoted reports whether the daemon has the group that a promotion was to make.
func (s *scratches) promoted(p *promotion) bool {
	g, err := s.store.Group(p.Group)
	if err != nil {
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
