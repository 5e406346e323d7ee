package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Note is what must be undone of a cut: guests to thaw, and hooks to run after it. It has all that is
// needed for that, though the configuration may be another by then.
type Note struct {
	Version int             `json:"version"` // 1
	Group   string          `json:"group"`
	Label   string          `json:"label"`
	Time    time.Time       `json:"time"`
	Guests  map[string]Spec `json:"guests,omitempty"`
	After   []Hook          `json:"after,omitempty"`
}

// Notes are the notes of all groups in a directory, a file each. They outlive the process; a host that
// goes down takes its guests with it, so that they are not synced.
type Notes struct {
	dir string
}

const (
	noteSuffix  = ".json"
	noteVersion = 1
)

// NewNotes makes the directory.
func NewNotes(dir string) (*Notes, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("directory of frozen guests: %w", err)
	}
	return &Notes{dir: dir}, nil
}

func (n *Notes) path(group string) string { return filepath.Join(n.dir, group+noteSuffix) }

// put writes a group's note in the place of what it had; one with nothing to undo is removed.
func (n *Notes) put(note Note) error {
	path := n.path(note.Group)
	if len(note.Guests) == 0 && len(note.After) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("note of frozen guests: %w", err)
		}
		return nil
	}
	note.Version = noteVersion
	b, err := json.Marshal(note)
	if err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("note which guests are frozen: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("note which guests are frozen: %w", err)
	}
	return nil
}

// Get reads a group's note; ok is false if there is none.
func (n *Notes) Get(group string) (note Note, ok bool, err error) {
	path := n.path(group)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return note, false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &note)
	}
	switch {
	case err != nil:
	case note.Version != noteVersion:
		err = fmt.Errorf("it has version %d: this program knows %d", note.Version, noteVersion)
	case note.Group != group:
		err = fmt.Errorf("it is of group %q", note.Group)
	}
	if err != nil {
		return note, true, fmt.Errorf("note %s of guests that may be frozen: %w: see that they are thawed, then remove it", path, err)
	}
	return note, true, nil
}

// Left are the notes of cuts that were not brought to their end. A note that can not be read is in the error.
func (n *Notes) Left() ([]Note, error) {
	entries, err := os.ReadDir(n.dir)
	if err != nil {
		return nil, fmt.Errorf("directory of frozen guests: %w", err)
	}
	var notes []Note
	var errs []error
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), noteSuffix) {
			continue // one that was being written
		}
		note, ok, err := n.Get(strings.TrimSuffix(e.Name(), noteSuffix))
		errs = append(errs, err)
		if ok && err == nil {
			notes = append(notes, note)
		}
	}
	return notes, errors.Join(errs...)
}

// Wake undoes what a note has: it thaws the guests, sees to it that they are, and runs the hooks. Guests that
// it could not thaw are noted again.
func (n *Notes) Wake(ctx context.Context, note Note) Report {
	c := Cut{Group: note.Group, Label: note.Label, Hooks: note.After, Notes: n}
	for name, spec := range note.Guests {
		c.Guests = append(c.Guests, Named{name, spec})
	}
	r := run{Cut: &c, ctx: ctx}
	for _, g := range c.Guests {
		r.guests = append(r.guests, &patient{Named: g, guest: g.Spec.New(), asked: true})
	}
	r.hooksRun = len(c.Hooks)
	r.thaw()
	r.after(0)
	r.finish()
	return r.report
}
