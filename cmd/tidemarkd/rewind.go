package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/nbd"
)

// Rewind takes the group back to what it has in common with its writer. What was written here behind that is kept as a scratch
// export first, its disks as they were in the end.
func (x *receiving) Rewind(to record.LSN) error {
	one := x.one
	one.changing.Lock()
	defer one.changing.Unlock()
	r := one.r
	err := one.still(x.g)
	if err != nil {
		return err
	}
	common := to
	to, ok := x.g.NewestUpTo(common) // it may lie in a gap
	if !ok {
		one.unrewound = true
		return fmt.Errorf("group %s has LSN %d in common with its writer, and its history here does not go back that far any more: %s", one.name, common, one.seededAgain())
	}
	if !one.wrote(x.g, to) && one.consented() == consentNone {
		return fmt.Errorf("group %s has come to LSN %d here, its writer has LSN %d of that, and not all of the rest was written here: %w", one.name, x.g.Head(), to, errNoConsent)
	}
	if err := r.exports.scratches.above(one.name, to); err != nil {
		return err
	}
	if x.g, err = one.beforeGap(x.g); err != nil {
		return err
	}
	err = one.goBack(to, func() error {
		branch, err := r.exports.scratches.branch(x.g, to, r.conf.Name)
		if err != nil {
			return fmt.Errorf("keep what was written here behind LSN %d: %w", to, err)
		}
		one.log.Warn("the group goes back to what it has in common with its writer", zap.Uint64("to", uint64(to)), zap.Uint64("from", uint64(x.g.Head())), zap.String("kept_as", branch))
		return nil
	})
	if err != nil {
		return fmt.Errorf("go back to LSN %d, to follow the writer: %w", to, err)
	}
	one.consent(consentNone)
	return nil
}

// wrote reports whether everything that a group has behind an LSN was written by this daemon.
func (one *replicated) wrote(g *journal.Group, to record.LSN) bool {
	reigns, n := g.Reigns(), one.known()
	for i, r := range reigns {
		if i+1 < len(reigns) && reigns[i+1].First <= to+1 || r.First > g.Head() {
			continue // it has no record behind the LSN
		}
		own := slices.Contains(n.Own, hex.EncodeToString(r.ID[:])) || i == 0 && !one.r.reloader.configured()[one.name].Received
		if !own {
			return false
		}
	}
	return true
}

// above says which scratch export stands on what is to be dropped.
func (s *scratches) above(group string, to record.LSN) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, one := range s.sortedLocked() {
		if one.note.Group == group && record.LSN(one.note.LSN) > to {
			return fmt.Errorf("scratch export %s stands on LSN %d, and group %s goes back to LSN %d: throw it away, or promote it: %w", one.name, one.note.LSN, group, to, journal.ErrInUse)
		}
	}
	return nil
}

// rewind takes a group back; who looks after it has another one then. It may take long.
func (r *reloader) rewind(name string, to record.LSN) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.keepers.remove(name)
	quiet := r.keepers.quiet(name)
	<-quiet
	err := r.store.Rewind(name, to)
	quiet <- struct{}{}
	return errors.Join(err, r.keepers.put(name, r.now.Groups[name]))
}

// branch makes a scratch export of what a group's disks are at its head, on what they were at an LSN. It returns its name; empty: they
// do not differ, or it is there already.
func (s *scratches) branch(g *journal.Group, at record.LSN, host string) (name string, err error) {
	disks, _, err := disksAt(g, at)
	if err != nil {
		return "", err
	}
	changed := false
	for _, d := range g.Disks() {
		if changed, err = differs(g, d, at); changed || err != nil {
			break
		}
	}
	if !changed || err != nil {
		return "", err
	}
	s.making.Lock()
	defer s.making.Unlock()
	reigns := g.Reigns()
	last := reigns[len(reigns)-1]
	epoch := last.Epoch
	name = fmt.Sprintf("%.40s-epoch%d-%x-lsn%d", g.Name(), epoch, last.ID[:4], g.Head())
	if one, err := s.get(name); err == nil {
		if b := one.note.Branch; b == nil || one.note.Group != g.Name() || b.Epoch != epoch || b.To != uint64(g.Head()) {
			return "", fmt.Errorf("there is a scratch export %s of something else: remove it", name)
		}
		return name, nil // of a rewind that broke off
	}
	one := &scratch{s: s, name: name, dir: filepath.Join(s.dir, name), fresh: true, note: scratchNote{
		Version: scratchNoteVersion, Name: name, Group: g.Name(), Point: fmt.Sprintf("lsn:%d", at), LSN: uint64(at), Reign: reignAt(g, at), Disks: disks, Created: time.Now().UTC(),
		Branch: &api.Branch{Host: host, Epoch: epoch, From: uint64(at) + 1, To: uint64(g.Head())},
	}}
	if err := one.make(func() error { return one.fillBranch(g, at) }); err != nil {
		return "", errors.Join(fmt.Errorf("scratch export %s: %w", name, err), one.close(), os.RemoveAll(one.dir))
	}
	s.mu.Lock()
	s.all[name] = one
	s.mu.Unlock()
	return name, nil
}

// changesSince calls fn with what may differ on a disk between an LSN and the group's head, and the view of the head.
func changesSince(g *journal.Group, d *disk.Disk, at record.LSN, fn func(v *journal.View, ext record.Extent) error) error {
	now, err := g.View(d, g.Head())
	if err != nil {
		return err
	}
	defer now.Close()
	old, err := g.View(d, at)
	if err != nil {
		return err
	}
	defer old.Close()
	const step = 64 << 20
	for off := int64(0); off < d.Size; off += step {
		part := record.Extent{Off: off, Len: min(step, d.Size-off)}
		var exts []record.Extent
		at := off
		err := now.Changes(old, part, func(n int64, changed bool) {
			if changed {
				exts = append(exts, record.Extent{Off: at, Len: n})
			}
			at += n
		})
		if err != nil {
			return err
		}
		for _, e := range exts {
			if err := fn(now, e); err != nil {
				return err
			}
		}
	}
	return nil
}

var errDiffers = errors.New("something differs")

func differs(g *journal.Group, d *disk.Disk, at record.LSN) (bool, error) {
	err := changesSince(g, d, at, func(*journal.View, record.Extent) error { return errDiffers })
	if errors.Is(err, errDiffers) {
		return true, nil
	}
	return false, err
}

// fillBranch writes what differs from the view that the export stands on.
func (one *scratch) fillBranch(g *journal.Group, at record.LSN) error {
	buf := make([]byte, 1<<20)
	for _, name := range one.note.Disks {
		jd, err := g.Disk(name)
		if err != nil {
			return err
		}
		over := one.disks[name].over
		err = changesSince(g, jd, at, func(v *journal.View, e record.Extent) error {
			for e.Len > 0 {
				part := buf[:min(e.Len, int64(len(buf)))]
				if err := v.ReadAt(part, e.Off, false); err != nil {
					return err
				}
				if err := over.Change([]nbd.Change{{Op: nbd.OpWrite, Off: e.Off, Len: int64(len(part)), Buf: part}}); err != nil {
					return err
				}
				e.Off, e.Len = e.Off+int64(len(part)), e.Len-int64(len(part))
			}
			return nil
		})
		if err == nil {
			err = over.Flush()
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", name, err)
		}
	}
	return nil
}

var errSuspended = errors.New("its group is being rewound")

// suspend closes what stands on a group, for its journal to be changed, until resume is called. ErrInUse while anybody has one open.
func (s *scratches) suspend(group string) (resume func(), err error) {
	s.making.Lock()
	defer s.making.Unlock()
	var all []*scratch
	s.mu.Lock()
	for _, one := range s.sortedLocked() {
		if one.note.Group == group {
			all = append(all, one)
		}
	}
	s.mu.Unlock()
	var closed []*scratch
	resume = func() {
		for _, one := range closed {
			one.mu.Lock()
			if one.why = one.open(); one.why != nil {
				s.log.Error("scratch export can not be opened", zap.String("scratch", one.name), zap.Error(one.why))
			}
			one.mu.Unlock()
		}
	}
	for _, one := range all {
		one.mu.Lock()
		switch {
		case one.clients > 0 || one.fill.running:
			err = fmt.Errorf("scratch export %s, which stands on group %s: %w: close it first", one.name, group, journal.ErrInUse)
		case one.why == nil:
			if err = one.closeDisks(); err == nil {
				one.why, closed = errSuspended, append(closed, one)
			}
		}
		one.mu.Unlock()
		if err != nil {
			resume()
			return nil, err
		}
	}
	return resume, nil
}
