package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/link"
)

// damage is what a verification has found, and what of it is to be mended before the next one.
type damage struct {
	backingsToo bool // backings are to be mended

	found     int
	records   []record.LSN // of the log, up to api.MaxFindings
	originals []journal.Finding
	backings  []journal.Finding
	more      bool            // not all that is to be mended is in these
	tried     map[string]bool // places that were, in this round or one before: no round mends one again, so that rounds end
}

const (
	mostOriginals = 1000
	mostBackings  = 1 << 16
)

func newDamage(backingsToo bool) *damage {
	return &damage{backingsToo: backingsToo, tried: map[string]bool{}}
}

// next is for the verification behind the round.
func (d *damage) next() *damage { return &damage{backingsToo: d.backingsToo, tried: d.tried} }

// some reports whether there is anything to be mended.
func (d *damage) some() bool { return len(d.records)+len(d.originals)+len(d.backings) > 0 }

func (d *damage) add(f journal.Finding) {
	d.found++
	if d.tried[f.Where] {
		return
	}
	full := false
	switch {
	case f.LSN > 0:
		full = len(d.records) >= api.MaxFindings
		for lsn := f.LSN; lsn <= f.Last && len(d.records) < api.MaxFindings; lsn++ {
			d.records = append(d.records, lsn)
		}
	case f.IsOriginal():
		if full = len(d.originals) >= mostOriginals; !full {
			d.originals = append(d.originals, f)
		}
	case f.IsBacking() && d.backingsToo:
		if full = len(d.backings) >= mostBackings; !full {
			d.backings = append(d.backings, f)
		}
	default:
		return
	}
	d.more = d.more || full
	d.tried[f.Where] = !full
}

// mender has what is damaged in a group mended.
type mender struct {
	r      *replication
	g      *journal.Group
	peers  []string // that have the group, and have not failed to answer
	mended int
	why    []error // what could not be, the first few
}

// repair mends what is damaged in a group: segments with what peers have of them, and then backings with what its journal has. It returns how many records and blocks were
// mended, and why no more were.
func (r *replication) repair(ctx context.Context, g *journal.Group, d *damage) (mended int, why error) {
	m := mender{r: r, g: g}
	if len(d.records)+len(d.originals) > 0 {
		if m.peers = r.group(g.Name()).others(); len(m.peers) == 0 {
			m.failed(fmt.Errorf("%w: no other daemon has group %s", errBadRequest, g.Name()))
		}
	}
	slices.Sort(d.records)
	for _, lsn := range slices.Compact(slices.Clone(d.records)) {
		m.try(ctx, func(ctx context.Context, peer string) error { return m.record(ctx, peer, lsn) })
	}
	for _, f := range d.originals {
		m.try(ctx, func(ctx context.Context, peer string) error { return m.original(ctx, peer, f) })
	}
	n, err := g.RepairBackings(ctx, d.backings)
	if m.mended += n; err != nil {
		m.failed(err)
	}
	return m.mended, errors.Join(m.why...)
}

// mostReasons bounds what is said of what could not be mended.
const mostReasons = 20

func (m *mender) failed(err error) {
	if len(m.why) < mostReasons {
		m.why = append(m.why, err)
	}
}

// answerWithin is how long a peer may take for an answer to its end, a record or a MiB of content.
const answerWithin = 5 * time.Minute

// try asks the peers one after the other. One that does not answer is asked no more, for there may be much to ask for; nor is any if what comes can not be written here.
func (m *mender) try(ctx context.Context, one func(ctx context.Context, peer string) error) {
	var why error
	for _, peer := range slices.Clone(m.peers) {
		if ctx.Err() != nil {
			return
		}
		within, cancel := context.WithTimeout(ctx, answerWithin)
		err := one(within, peer)
		cancel()
		if err == nil {
			return
		}
		why = errors.Join(why, err)
		if errors.Is(err, journal.ErrFailed) || errors.Is(err, syscall.ENOSPC) {
			m.peers = nil
			break
		}
		if errors.Is(err, link.ErrNoAnswer) {
			m.peers = slices.DeleteFunc(m.peers, func(p string) bool { return p == peer })
		}
	}
	if why != nil {
		m.failed(why)
	}
}

// record has a record of the log mended.
func (m *mender) record(ctx context.Context, peer string, lsn record.LSN) error {
	err := m.r.e.Fetch(ctx, peer, m.g.Name(), lsn, lsn, func(run record.Run) error {
		run, err := only(run, lsn)
		if err != nil {
			return err
		}
		n, err := m.g.Repair(run)
		m.mended += n
		return err
	})
	if err != nil {
		return fmt.Errorf("LSN %d: %w", lsn, err)
	}
	return nil
}

// original has an original mended.
func (m *mender) original(ctx context.Context, peer string, f journal.Finding) error {
	done, err := m.g.RepairOriginal(f, func(l record.Lost) (record.LostContent, error) {
		return m.r.e.FetchLost(ctx, peer, m.g.Name(), l)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", f.Where, err)
	}
	if done {
		m.mended++
	}
	return nil
}

// only is a run's record of an LSN, which the run begins with.
func only(run record.Run, lsn record.LSN) (record.Run, error) {
	h, err := record.Decode(run.Bytes)
	if err != nil {
		return run, err
	}
	if h.LSN != lsn || h.Size() > int64(len(run.Bytes)) {
		return run, fmt.Errorf("%w: LSN %d was asked for, and LSN %d came", record.ErrCorrupt, lsn, h.LSN)
	}
	run.Last, run.Bytes = lsn, run.Bytes[:h.Size()]
	return run, nil
}
