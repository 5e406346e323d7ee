package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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

	marking sync.RWMutex // held for reading while a marker is taken; for writing to begin

	mu       sync.Mutex // guards what follows
	underWay map[string]bool
	left     map[string]*leftRollback // by group: what could not be finished
}

// leftRollback is a rollback that broke off. It holds the history of the point, and of the way back.
type leftRollback struct {
	err  error
	note rollbackNote
	held []*rollbackTarget
}

type rollbackNote struct {
	Version int      `json:"version"`
	Group   string   `json:"group"`
	Point   string   `json:"point"` // as it was asked for
	LSN     uint64   `json:"lsn"`
	Disks   []string `json:"disks"`
	Before  string   `json:"before"` // label of the marker of the state before

	BeforeLSN uint64 `json:"before_lsn"`
	By        string `json:"by"`
}

const rollbackNoteVersion = 1

func newRollbacks(stateDir string, store *journal.Store, e *exports, log *zap.Logger) (*rollbacks, error) {
	r := &rollbacks{dir: filepath.Join(stateDir, "rollback"), store: store, exports: e, log: log, underWay: map[string]bool{}, left: map[string]*leftRollback{}}
	if err := mkdirDurable(r.dir); err != nil {
		return nil, fmt.Errorf("notes of rollbacks: %w", err)
	}
	return r, nil
}

// close lets go of the history that is held for rollbacks that broke off.
func (r *rollbacks) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.left {
		l.close()
	}
	r.left = map[string]*leftRollback{}
}

func (l *leftRollback) close() {
	for _, t := range l.held {
		t.close()
	}
}

func (r *rollbacks) path(group string) string { return filepath.Join(r.dir, group+".json") }

// begin reserves a group for a rollback: markers that are being taken are waited for, and no more are taken.
func (r *rollbacks) begin(group string) error {
	r.marking.Lock()
	defer r.marking.Unlock()
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

// mark calls fn, which takes a marker, unless the group's disks may be a mix of before and after a rollback.
func (r *rollbacks) mark(group string, fn func() error) error {
	r.marking.RLock()
	defer r.marking.RUnlock()
	r.mu.Lock()
	mixed := r.underWay[group] || r.left[group] != nil
	r.mu.Unlock()
	if mixed {
		return fmt.Errorf("group %s: %w: it is being rolled back", group, journal.ErrInUse)
	}
	return fn()
}

// problem is why a rollback of the group could not be finished; nil if there is none.
func (r *rollbacks) problem(group string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.left[group]; l != nil {
		return l.err
	}
	return nil
}

// before is what broke off before, if anything did.
func (r *rollbacks) before(group string) *leftRollback {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.left[group]
}

// rollbackTarget is what a group is to be taken back to, pinned.
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
	defer func() { t.close() }()
	if err := t.check(ctx); err != nil {
		return done, fmt.Errorf("what the disks were at LSN %d can not be read, and nothing was changed: %w", lsn, err)
	}
	if err := r.begin(g.Name()); err != nil {
		return done, err
	}
	defer r.end(g.Name())
	note := rollbackNote{Version: rollbackNoteVersion, Group: g.Name(), Point: p.String(), LSN: uint64(lsn), Disks: names, By: by}
	before := t
	if again := r.before(g.Name()); again != nil {
		// It is sealed already, and what there is now is a mix that deserves no name: the way back is the first one's.
		note.Before, note.BeforeLSN = again.note.Before, again.note.BeforeLSN
		if note.Before == "" { // its note could not be read
			note.BeforeLSN = note.LSN
		}
		if err := coversAll(g, again.note.Disks, names, lsn, req.Force); err != nil {
			return done, err
		}
		if err := writeNote(r.path(g.Name()), note); err != nil {
			return done, err
		}
	} else if before, err = r.prepare(g, &note, req.Force); err != nil {
		return done, err
	}
	r.log.Info("rollback", zap.String("group", g.Name()), zap.String("point", note.Point), zap.Uint64("lsn", note.LSN), zap.String("before", note.Before), zap.String("by", by))
	if done, err = r.finish(ctx, t, before, note); err != nil {
		t = &rollbackTarget{} // it is held
		return done, err
	}
	done.Before, done.BeforeLSN, done.Untouched = note.Before, note.BeforeLSN, untouched
	return done, nil
}

// coversAll refuses a rollback that would leave a disk a mix which one that broke off has begun to write: it had those that its note
// names, or, where that can not be read, perhaps any. One that is not in the group any more can be given up.
func coversAll(g *journal.Group, mixed, names []string, lsn record.LSN, force bool) error {
	if len(mixed) == 0 {
		for _, d := range g.Disks() {
			mixed = append(mixed, d.Name)
		}
	}
	for _, name := range mixed {
		if slices.Contains(names, name) {
			continue
		}
		d, err := g.Disk(name)
		switch {
		case err == nil:
			return fmt.Errorf("%w: disk %s of group %s may be a mix, as a rollback of it broke off, and it came to the group after LSN %d: choose a point at which it was there (LSN %d or later)",
				errBadRequest, name, g.Name(), lsn, d.Added)
		case !force:
			return fmt.Errorf("%w: disk %s, which was in group %s, may be a mix, as a rollback of it broke off: add it again first (--force gives it up)", errBadRequest, name, g.Name())
		}
	}
	return nil
}

// prepare keeps clients out, marks the state before, and notes what is to be done. It returns that state, held.
func (r *rollbacks) prepare(g *journal.Group, note *rollbackNote, force bool) (before *rollbackTarget, err error) {
	if err := r.exports.seal(g.Name(), "it is being rolled back", force); err != nil {
		return nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		if before != nil {
			before.close()
		}
		// The note may be there though its write failed; with it, the next start would go on.
		rerr := os.Remove(r.path(g.Name()))
		if errors.Is(rerr, fs.ErrNotExist) {
			rerr = nil
		}
		if rerr = errors.Join(rerr, syncDir(r.dir)); rerr != nil {
			err = errors.Join(err, rerr)
			r.mu.Lock()
			r.left[g.Name()] = &leftRollback{err: err, note: *note}
			r.mu.Unlock()
			return
		}
		r.exports.unseal(g.Name())
	}()
	m, err := r.markBefore(g, note)
	if err != nil {
		return nil, err
	}
	note.Before, note.BeforeLSN = m.Label, uint64(m.LSN)
	if before, err = r.open(g, m.LSN, note.Disks); err != nil {
		return nil, err
	}
	return before, writeNote(r.path(g.Name()), *note)
}

// check reads everything that is to be restored.
func (t *rollbackTarget) check(ctx context.Context) error {
	for d, v := range t.views {
		now, err := t.g.View(d, t.g.Head())
		if err != nil {
			return err
		}
		err = restore.Check(ctx, rolledTo{v, now})
		now.Close()
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	return nil
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
func (r *rollbacks) markBefore(g *journal.Group, note *rollbackNote) (m record.Marker, err error) {
	base := "before-rollback-" + time.Now().UTC().Format("20060102T150405Z")
	label := base
	for n := 2; ; n++ {
		m, err = g.Mark(record.Marker{Label: label, By: note.By, Description: "before the rollback to " + note.Point})
		if !errors.Is(err, journal.ErrLabelInUse) || n == 100 {
			return m, err
		}
		label = fmt.Sprintf("%s-%d", base, n)
	}
}

// finish writes what differs, and lets clients in again. What can not be finished stays noted, the group sealed, and the history of
// both ways held: a mix is nothing for a guest.
func (r *rollbacks) finish(ctx context.Context, t, before *rollbackTarget, note rollbackNote) (done api.RolledBack, err error) {
	done = api.RolledBack{Group: note.Group, Point: note.Point, LSN: note.LSN, Disks: []api.RolledBackDisk{}}
	err = r.write(ctx, t, note, &done)
	r.mu.Lock()
	was := r.left[note.Group]
	if err != nil {
		err = fmt.Errorf("the rollback to %s (LSN %d) broke off, and the disks are a mix of before and after: they are not served until it is done: repeat it, or return to %s: %w", note.Point, note.LSN, note.Before, err)
		now := &leftRollback{err: err, note: note, held: []*rollbackTarget{t}}
		if was != nil {
			now.held = append(now.held, was.held...)
		} else {
			now.held = append(now.held, before)
		}
		r.left[note.Group] = now
	} else {
		delete(r.left, note.Group)
	}
	r.mu.Unlock()
	if err != nil {
		r.log.Error("rollback", zap.String("group", note.Group), zap.Error(err))
		return done, err
	}
	if was != nil {
		was.close()
	} else {
		before.close()
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
	label := strings.Replace(note.Before, "before-", "after-", 1)
	if label == "" {
		label = "after-rollback-" + time.Now().UTC().Format("20060102T150405Z")
	}
	m, err := t.g.Mark(record.Marker{
		Label: label, By: note.By, Description: fmt.Sprintf("after the rollback to %s, LSN %d", note.Point, note.LSN),
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
	entries, err := os.ReadDir(r.dir)
	if err != nil {
		return nil, fmt.Errorf("notes of rollbacks: %w", err)
	}
	for _, e := range entries {
		group, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue // one that was being written
		}
		if err := r.exports.seal(group, "a rollback of it is not finished", false); err != nil {
			return nil, err
		}
		var note rollbackNote
		t, before, err := r.reopen(group, &note)
		if err != nil {
			err = fmt.Errorf("a rollback broke off and can not be finished: the disks are a mix, and not served: roll back again, or to %s: %w", note.Before, err)
			r.log.Error("rollback", zap.String("group", group), zap.Error(err))
			r.left[group] = &leftRollback{err: err, note: note}
			continue
		}
		if err := r.begin(group); err != nil {
			return nil, err
		}
		resume = append(resume, func(ctx context.Context) {
			defer r.end(group)
			r.log.Info("finishing a rollback that broke off", zap.String("group", group), zap.Uint64("lsn", note.LSN))
			if _, err := r.finish(ctx, t, before, note); err == nil { // it is logged, and in the status
				t.close()
			}
		})
	}
	return resume, nil
}

// reopen opens what a note is about.
func (r *rollbacks) reopen(group string, note *rollbackNote) (t, before *rollbackTarget, err error) {
	if err := readNote(r.path(group), note); err != nil {
		return nil, nil, err
	}
	if note.Version != rollbackNoteVersion || note.Group != group || len(note.Disks) == 0 {
		return nil, nil, fmt.Errorf("note %s is of group %q, version %d and %d disks", r.path(group), note.Group, note.Version, len(note.Disks))
	}
	g, err := r.store.Group(group)
	if err != nil {
		return nil, nil, err
	}
	if t, err = r.open(g, record.LSN(note.LSN), note.Disks); err != nil {
		return nil, nil, err
	}
	if before, err = r.open(g, record.LSN(note.BeforeLSN), note.Disks); err != nil {
		t.close()
		return nil, nil, err
	}
	return t, before, nil
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
