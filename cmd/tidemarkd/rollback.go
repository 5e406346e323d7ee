package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/restore"
)

// rollbacks take groups back to points. While one is under way nobody has the group's disks open, and no marker
// names a mix of before and after. A note has it finished by the next start, before the disks are served again.
type rollbacks struct {
	dir     string // of the notes
	store   *journal.Store
	exports *exports
	log     *zap.Logger

	mu       sync.Mutex // guards what follows
	underWay map[string]bool
	left     map[string]error // by group: what could not be finished, and why
}

type rollbackNote struct {
	Version int      `json:"version"`
	Group   string   `json:"group"`
	Point   string   `json:"point"` // as it was asked for
	LSN     uint64   `json:"lsn"`
	Disks   []string `json:"disks"`
	Before  string   `json:"before"` // label of the marker of the state before
	By      string   `json:"by"`
}

const rollbackNoteVersion = 1

func newRollbacks(stateDir string, store *journal.Store, e *exports, log *zap.Logger) (*rollbacks, error) {
	r := &rollbacks{dir: filepath.Join(stateDir, "rollback"), store: store, exports: e, log: log, underWay: map[string]bool{}, left: map[string]error{}}
	if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return nil, fmt.Errorf("notes of rollbacks: %w", err)
	}
	return r, nil
}

func (r *rollbacks) path(group string) string { return filepath.Join(r.dir, group+".json") }

// begin reserves a group for a rollback.
func (r *rollbacks) begin(group string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.underWay[group] {
		return fmt.Errorf("group %s: %w: it is being rolled back", group, journal.ErrInUse)
	}
	r.underWay[group] = true
	return nil
}

func (r *rollbacks) end(group string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.underWay, group)
}

// mixed is an error if a group's disks may be a mix of before and after a rollback.
func (r *rollbacks) mixed(group string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.underWay[group] || r.left[group] != nil {
		return fmt.Errorf("group %s: %w: it is being rolled back", group, journal.ErrInUse)
	}
	return nil
}

// problem is why a rollback of the group could not be finished; nil if there is none.
func (r *rollbacks) problem(group string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.left[group]
}

// target is what a group is to be taken back to, pinned.
type rollbackTarget struct {
	g     *journal.Group
	lsn   record.LSN
	views map[*disk.Disk]*journal.View
}

func (t *rollbackTarget) close() {
	for _, v := range t.views {
		v.Close()
	}
}

// open opens the views of a point, of the disks that are named.
func (r *rollbacks) open(g *journal.Group, lsn record.LSN, names []string) (*rollbackTarget, error) {
	t := &rollbackTarget{g: g, lsn: lsn, views: map[*disk.Disk]*journal.View{}}
	for _, name := range names {
		d, err := g.Disk(name)
		if err != nil {
			t.close()
			return nil, err
		}
		v, err := g.View(d, lsn)
		if err != nil {
			t.close()
			return nil, err
		}
		t.views[d] = v
	}
	return t, nil
}

// rollback takes a group back to a point.
func (r *rollbacks) rollback(ctx context.Context, g *journal.Group, req api.RollbackRequest, by string) (done api.RolledBack, err error) {
	p, err := record.ParsePoint(req.Point)
	if err != nil {
		return done, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	if err := r.begin(g.Name()); err != nil {
		return done, err
	}
	defer r.end(g.Name())
	lsn, err := g.Resolve(p)
	if err != nil {
		return done, err
	}
	names, untouched, err := disksAt(g, lsn)
	if err != nil {
		return done, err
	}
	t, err := r.open(g, lsn, names)
	if err != nil {
		return done, err
	}
	defer t.close()
	// One that broke off is sealed already: this one takes its place.
	again := r.problem(g.Name()) != nil
	if !again {
		if err := r.exports.seal(g.Name(), "it is being rolled back", req.Force); err != nil {
			return done, err
		}
	}
	before, err := r.markBefore(g, p, by)
	if err != nil {
		if !again {
			r.exports.unseal(g.Name())
		}
		return done, err
	}
	note := rollbackNote{Version: rollbackNoteVersion, Group: g.Name(), Point: p.String(), LSN: uint64(lsn), Disks: names, Before: before.Label, By: by}
	if err := writeNote(r.path(g.Name()), note); err != nil {
		if !again {
			r.exports.unseal(g.Name())
		}
		return done, err
	}
	r.log.Info("rollback", zap.String("group", g.Name()), zap.String("point", note.Point), zap.Uint64("lsn", note.LSN), zap.String("before", before.Label), zap.String("by", by))
	if done, err = r.finish(ctx, t, note); err != nil {
		return done, err
	}
	done.Before, done.BeforeLSN, done.Untouched = before.Label, uint64(before.LSN), untouched
	return done, nil
}

// disksAt are the disks of a group that were in it at an LSN, and those that came later.
func disksAt(g *journal.Group, lsn record.LSN) (in, later []string, err error) {
	later = []string{}
	for _, d := range g.Disks() {
		if d.Added <= lsn {
			in = append(in, d.Name)
		} else {
			later = append(later, d.Name)
		}
	}
	if len(in) == 0 {
		return nil, nil, fmt.Errorf("%w: none of the disks that group %s has was in it at LSN %d", errBadRequest, g.Name(), lsn)
	}
	return in, later, nil
}

// markBefore names the state before, so that there is a way back.
func (r *rollbacks) markBefore(g *journal.Group, p record.Point, by string) (m record.Marker, err error) {
	label := "before-rollback-" + time.Now().UTC().Format("20060102T150405Z")
	for n := 1; ; n++ {
		m, err = g.Mark(record.Marker{Label: label, By: by, Description: "before the rollback to " + p.String()})
		if !errors.Is(err, journal.ErrLabelInUse) || n == 100 {
			return m, err
		}
		label = fmt.Sprintf("%s-%d", strings.TrimSuffix(label, fmt.Sprintf("-%d", n)), n+1)
	}
}

// finish writes what differs, and lets clients in again. What can not be finished stays noted, and the group sealed: a
// mix is nothing for a guest.
func (r *rollbacks) finish(ctx context.Context, t *rollbackTarget, note rollbackNote) (done api.RolledBack, err error) {
	done = api.RolledBack{Group: note.Group, Point: note.Point, LSN: note.LSN, Disks: []api.RolledBackDisk{}}
	err = r.write(ctx, t, note, &done)
	r.mu.Lock()
	if err != nil {
		err = fmt.Errorf("the rollback to %s (LSN %d) broke off, and the disks are a mix of before and after: they are not served until it is done: repeat it, or return to %s: %w", note.Point, note.LSN, note.Before, err)
		r.left[note.Group] = err
	} else {
		delete(r.left, note.Group)
	}
	r.mu.Unlock()
	if err != nil {
		r.log.Error("rollback", zap.String("group", note.Group), zap.Error(err))
		return done, err
	}
	r.exports.unseal(note.Group)
	r.log.Info("rolled back", zap.String("group", note.Group), zap.Uint64("lsn", note.LSN), zap.Uint64("head", done.Head))
	return done, nil
}

func (r *rollbacks) write(ctx context.Context, t *rollbackTarget, note rollbackNote, done *api.RolledBack) error {
	for _, name := range note.Disks {
		d, err := t.g.Disk(name)
		if err != nil {
			return err
		}
		now, err := t.g.View(d, t.g.Head())
		if err != nil {
			return err
		}
		n, err := restore.Rollback(ctx, rolledTo{t.views[d], now}, rolling{t.g, d}, nil)
		now.Close()
		if err != nil {
			return fmt.Errorf("disk %s: %w", name, err)
		}
		done.Disks = append(done.Disks, api.RolledBackDisk{Name: name, Written: n})
	}
	m, err := t.g.Mark(record.Marker{
		Label: strings.Replace(note.Before, "before-", "after-", 1), By: note.By, Description: fmt.Sprintf("after the rollback to %s, LSN %d", note.Point, note.LSN),
	})
	if err != nil && !errors.Is(err, journal.ErrLabelInUse) {
		return err
	}
	if err := t.g.Sync(); err != nil {
		return err
	}
	done.Head = uint64(max(m.LSN, t.g.Head()))
	return removeDurable(r.path(note.Group))
}

// rolledTo is a disk as it was, and how the disk of now differs.
type rolledTo struct{ to, now *journal.View }

func (r rolledTo) Size() int64                      { return r.to.Size() }
func (r rolledTo) ReadAt(p []byte, off int64) error { return r.to.ReadAt(p, off, false) }
func (r rolledTo) Extents(off, n int64, fn func(int64, bool)) error {
	return r.to.Extents(record.Extent{Off: off, Len: n}, fn)
}
func (r rolledTo) Changed(off, n int64, fn func(int64, bool)) error {
	return r.now.Changes(r.to, record.Extent{Off: off, Len: n}, fn)
}

// rolling is a disk that is rolled back: its writes are journaled like a guest's.
type rolling struct {
	g *journal.Group
	d *disk.Disk
}

func (r rolling) ReadAt(p []byte, off int64) error { return r.d.ReadAt(p, off, false) }

func (r rolling) Write(p []byte, off int64) error {
	return r.g.Append([]journal.Op{{Kind: record.KindWrite, Disk: r.d, Ext: record.Extent{Off: off, Len: int64(len(p))}, Data: p}})
}

func (r rolling) Zero(off, n int64) error {
	return r.g.Append([]journal.Op{{Kind: record.KindTrim, Disk: r.d, Ext: record.Extent{Off: off, Len: n}}})
}

// unfinished opens what rollbacks left when the daemon ended, before the journal forgets anything and before anybody is
// served. What it returns is to be run when the journal's work goes on.
func (r *rollbacks) unfinished() (resume []func(context.Context), err error) {
	paths, err := filepath.Glob(filepath.Join(r.dir, "*.json"))
	if err != nil {
		return nil, err
	}
	slices.Sort(paths)
	for _, path := range paths {
		group := strings.TrimSuffix(filepath.Base(path), ".json")
		var note rollbackNote
		err := readNote(path, &note)
		if err == nil && (note.Version != rollbackNoteVersion || note.Group != group) {
			err = fmt.Errorf("note %s is of group %q and version %d", path, note.Group, note.Version)
		}
		if err := r.exports.seal(group, "a rollback of it is not finished", false); err != nil {
			return nil, err
		}
		var t *rollbackTarget
		if err == nil {
			var g *journal.Group
			if g, err = r.store.Group(group); err == nil {
				t, err = r.open(g, record.LSN(note.LSN), note.Disks)
			}
		}
		if err != nil {
			err = fmt.Errorf("a rollback broke off and can not be finished: the disks are a mix, and not served: roll back again, or to %s: %w", note.Before, err)
			r.log.Error("rollback", zap.String("group", group), zap.Error(err))
			r.mu.Lock()
			r.left[group] = err
			r.mu.Unlock()
			continue
		}
		if err := r.begin(group); err != nil {
			return nil, err
		}
		resume = append(resume, func(ctx context.Context) {
			defer r.end(group)
			defer t.close()
			r.log.Info("finishing a rollback that broke off", zap.String("group", group), zap.Uint64("lsn", note.LSN))
			_, _ = r.finish(ctx, t, note) // it is logged, and in the status
		})
	}
	return resume, nil
}

func (c *control) rollback(r *http.Request) (any, error) {
	g, err := c.store.Group(r.PathValue("group"))
	if err != nil {
		return nil, err
	}
	var req api.RollbackRequest
	if err := decode(r, &req); err != nil {
		return nil, err
	}
	// Nobody freezes the guests meanwhile.
	quiet := c.keepers.quiet(g.Name())
	select {
	case <-quiet:
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	defer func() { quiet <- struct{}{} }()
	// Whoever hangs up does not leave a mix behind; a stop of the daemon does, and its next start finishes it.
	return c.rollbacks.rollback(c.serving, g, req, peer(r))
}
