package main

import (
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/link"
)

// groupNote is what must be known of a group after a crash, beside its journal.
type groupNote struct {
	Version int `json:"version"`
	// Seen are the reigns of the highest epoch that this daemon was told of.
	Seen []reignNote `json:"seen,omitempty"`
	// From is the peer that the group came from last, and FromKey its key.
	From    string `json:"from,omitempty"`
	FromKey string `json:"from_key,omitempty"`
	// Own are the ids of reigns of this daemon's.
	Own []string `json:"own,omitempty"`
	// Yielded is the peer that the group was handed over to, until it is known that it was taken.
	Yielded string `json:"yielded,omitempty"`
	// Acked is what each replica has, at least, of the present history.
	Acked map[string]record.LSN `json:"acked,omitempty"`
}

type reignNote struct {
	Epoch uint64     `json:"epoch"`
	First record.LSN `json:"first"`
	ID    string     `json:"id"`
}

const groupNoteVersion = 1

func reignNotes(r record.Reigns) (all []reignNote) {
	for _, x := range r {
		all = append(all, reignNote{x.Epoch, x.First, hex.EncodeToString(x.ID[:])})
	}
	return all
}

// isFrom reports whether a peer is the one that the group came from.
func (n *groupNote) isFrom(p link.Peer) bool {
	return n.From == p.Name && (n.FromKey == "" || n.FromKey == p.Fingerprint.String())
}

// seen are the note's reigns.
func (n *groupNote) seen() (r record.Reigns, err error) {
	for _, x := range n.Seen {
		one := record.Reign{Epoch: x.Epoch, First: x.First}
		if k, err := hex.Decode(one.ID[:], []byte(x.ID)); err != nil || k != len(one.ID) {
			return nil, fmt.Errorf("id %q of epoch %d", x.ID, x.Epoch)
		}
		r = append(r, one)
	}
	if len(r) > 0 {
		err = r.Check()
	}
	return r, err
}

func (r *replication) loadNotes() error {
	entries, err := os.ReadDir(filepath.Join(r.dir, "groups"))
	if err != nil {
		return fmt.Errorf("replication: %w", err)
	}
	for _, entry := range entries {
		name, ok := strings.CutSuffix(entry.Name(), ".json")
		if !ok {
			continue // of a write that a crash cut off
		}
		one := r.group(name)
		if err := readNote(one.path(), &one.note); err != nil {
			return fmt.Errorf("replication: %w", err)
		}
		if one.note.Version != groupNoteVersion {
			return fmt.Errorf("replication: note %s has version %d, this Tidemark knows %d: use the one that wrote it", one.path(), one.note.Version, groupNoteVersion)
		}
		if _, err := one.note.seen(); err != nil {
			return fmt.Errorf("replication: note %s: %w", one.path(), err)
		}
	}
	return nil
}

func (one *replicated) path() string { return filepath.Join(one.r.dir, "groups", one.name+".json") }

// setNote changes the note, durably.
func (one *replicated) setNote(change func(*groupNote)) error {
	one.mu.Lock()
	defer one.mu.Unlock()
	next := one.note
	next.Acked = maps.Clone(next.Acked)
	change(&next)
	if err := writeNote(one.path(), next); err != nil {
		return err
	}
	one.note = next
	return nil
}

// isFrom reports whether a peer is the one that the group came from.
func (one *replicated) isFrom(p link.Peer) bool {
	n := one.known()
	return n.isFrom(p)
}

func (one *replicated) known() groupNote {
	one.mu.Lock()
	defer one.mu.Unlock()
	return one.note
}

// seen are the reigns of the highest epoch that this daemon was told of.
func (one *replicated) seen() record.Reigns {
	n := one.known()
	r, _ := n.seen() // they were read, or written, as such
	return r
}

func (one *replicated) setSeen(reigns record.Reigns) error {
	return one.setNote(func(n *groupNote) {
		n.Seen = reignNotes(reigns)
	})
}
