package journal

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"slices"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
)

// definition is what is known of a definition without its content, which is in the index.
type definition struct {
	name  string
	since record.LSN // in force from here on
	at    record.LSN // the newest record that holds it, at or above since; of one carried over, where it is superseded
	time  time.Time
	gone  bool
	sum   [sha256.Size]byte
}

// definitions are a group's definitions by ascending since, of all names.
type definitions []definition

func (t *definitions) set(d record.Definition, at record.LSN) {
	i, ok := slices.BinarySearchFunc(*t, d, func(have definition, d record.Definition) int {
		return cmp.Or(cmp.Compare(have.since, d.Since), cmp.Compare(have.name, d.Name))
	})
	def := definition{name: d.Name, since: d.Since, at: at, time: d.Time, gone: d.Gone, sum: sha256.Sum256(d.Content)}
	if ok {
		(*t)[i] = def
	} else {
		*t = slices.Insert(*t, i, def)
	}
}

// inForce are the newest definitions of each name at an LSN, those that are gone too.
func (t definitions) inForce(at record.LSN) map[string]definition {
	found := map[string]definition{}
	for _, d := range t {
		if d.since <= at {
			found[d.name] = d
		}
	}
	return found
}

// heldBehind reports whether a record behind the horizon holds a definition of a name that is older
// than an LSN: an index that is made again will find it.
func (t definitions) heldBehind(horizon record.LSN, name string, before record.LSN) bool {
	return slices.ContainsFunc(t, func(d definition) bool { return d.name == name && d.since < before && d.at > horizon })
}

// expire divides those whose records are not behind the horizon, the last of some points: the ones that must be carried over before the records expire, as they are
// in force at one of the points, and the ones that nobody will find any more.
func (t definitions) expire(points []record.LSN) (carried, superseded []definition) {
	horizon := points[len(points)-1]
	older := map[string]bool{} // names of which one is carried
	for i, d := range t {
		if d.at > horizon {
			continue
		}
		until := record.MaxLSN
		for _, next := range t[i+1:] {
			if next.name == d.name {
				until = next.since
				break
			}
		}
		// That there is none must be said for as long as something says that there is one.
		if retain.Lives(points, d.since, until) && (!d.gone || older[d.name] || t.heldBehind(horizon, d.name, d.since)) {
			carried, older[d.name] = append(carried, d), true
		} else {
			superseded = append(superseded, d)
		}
	}
	return carried, superseded
}

// Define journals what a guest is defined as from now on, unless it is that already; it reports
// which. name is of the form of [record.CheckName]. It is durable when Define returns. The slice is not kept.
func (g *Group) Define(name string, content []byte) (changed bool, err error) {
	if len(content) > record.MaxDefinition {
		return false, fmt.Errorf("definition %s of group %s has %d bytes: at most %d are journaled", name, g.name, len(content), record.MaxDefinition)
	}
	return g.define(record.Definition{Name: name, Content: content})
}

// Undefine journals that there is no definition of that name any more, if there was one.
func (g *Group) Undefine(name string) (changed bool, err error) {
	return g.define(record.Definition{Name: name, Gone: true})
}

func (g *Group) define(d record.Definition) (changed bool, err error) {
	if err := record.CheckName(d.Name); err != nil {
		return false, fmt.Errorf("definition: %w", err)
	}
	var at record.LSN
	err = g.admittedNote(func() error {
		was, ok := g.append.definitions.inForce(record.MaxLSN)[d.Name]
		if (ok && !was.gone) == !d.Gone && (d.Gone || was.sum == sha256.Sum256(d.Content)) {
			return nil
		}
		at, err = g.defineLocked(d)
		return err
	})
	if err != nil || at == 0 {
		return false, err
	}
	return true, g.syncTo(at)
}

// defineLocked journals a definition from now on.
func (g *Group) defineLocked(d record.Definition) (record.LSN, error) {
	a := &g.append
	h, err := g.appendNoteLocked(record.KindDefine, 0, 0, func(lsn record.LSN, now time.Time) []byte {
		d.Since, d.Time = lsn, now
		return d.Append(nil)
	})
	if err != nil {
		return 0, err
	}
	a.definitions.set(d, h.LSN)
	d.Content = slices.Clone(d.Content)
	a.pend.definitions = append(a.pend.definitions, index.Definition{Definition: d, At: h.LSN})
	return h.LSN, nil
}

// Definitions returns what was in force at an LSN of the window, by name.
func (g *Group) Definitions(at record.LSN) ([]record.Definition, error) {
	if err := g.pin(at); err != nil {
		return nil, err
	}
	defer g.unpin(at)
	g.append.Lock()
	found := g.append.definitions.inForce(at)
	head := g.Head()
	g.append.Unlock()
	var all []record.Definition
	for _, d := range found {
		if d.gone {
			continue
		}
		if err := g.indexTo(min(d.at, head)); err != nil {
			return nil, err
		}
		def, err := g.ix.Definition(d.name, d.since)
		if err != nil {
			return nil, fmt.Errorf("definition %s of group %s: %w", d.name, g.name, err)
		}
		all = append(all, def)
	}
	slices.SortFunc(all, func(a, b record.Definition) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// carryDefinition adds a definition that is in force at a horizon, and whose record is not behind it, to the originals.
// The next expiry does so again: each is of the one alone to whose horizon the journal has come.
func (g *Group) carryDefinition(d record.Definition, horizon record.LSN) error {
	h := record.Header{Kind: record.KindDefine, Flags: record.FlagCarried, LSN: horizon + 1, Durable: horizon}
	if err := g.keep(h, d.Append(nil)); err != nil {
		return fmt.Errorf("carry over definition %s: %w", d.Name, err)
	}
	return nil
}

// carried is what the index has of a definition that is carried over.
func carried(d record.Definition, horizon record.LSN) index.Definition {
	return index.Definition{Definition: d, At: horizon + 1}
}
