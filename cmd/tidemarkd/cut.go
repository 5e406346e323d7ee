package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/guest"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

var (
	errNotAtRest = errors.New("the guests did not come to rest")
	errFrozen    = errors.New("a guest may still be frozen")
)

// marked is a marker that was taken, and what the operator must see to.
type marked struct {
	record.Marker
	problem error
}

// mark takes a marker of the consistency that is asked for, or, if that may be, a crash-consistent
// one rather than none: what it says is what was seen.
func (k *keeper) mark(ctx context.Context, want record.Marker) (marked, error) {
	if err := errors.Join(record.CheckLabel(want.Label), record.CheckDescription(want.Description)); err != nil {
		return marked{}, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	if err := k.g.CheckFree(want.Label); err != nil {
		return marked{}, err // before a guest is frozen for nothing
	}
	var m marked
	var err error
	if want.Asked <= record.Crash {
		err = k.marking(k.g.Name(), func() (err error) {
			m.Marker, err = k.g.Mark(want)
			return err
		})
	} else {
		m, err = k.cut(ctx, want)
	}
	k.metrics.marked(k.g.Name(), m, err)
	if err != nil {
		return m, err
	}
	k.log.Info("marker", zap.String("label", m.Label), zap.Uint64("lsn", uint64(m.LSN)), zap.String("by", m.By), zap.Stringer("consistency", m.Consistency),
		zap.Stringer("asked", m.Asked), zap.Duration("frozen", m.Frozen), zap.String("note", m.Note))
	return m, nil
}

// cut takes a marker with the guests at rest.
func (k *keeper) cut(ctx context.Context, want record.Marker) (marked, error) {
	c, err := k.plan(want)
	if err != nil {
		return marked{}, err
	}
	release, err := k.admit(ctx, int64(len(c.Guests)))
	if err != nil {
		return marked{}, err
	}
	defer release()
	if err := k.marking(c.Group, func() error { return nil }); err != nil {
		return marked{}, err
	}
	if _, left, err := k.notes.Get(c.Group); left {
		return k.lesser(want, errors.Join(fmt.Errorf("%w from an earlier marker: see status, and tidemark thaw %s", errFrozen, c.Group), err), guest.Report{})
	}
	k.define(ctx)
	// What was written so far is made durable before the guests wait for what they write now.
	if err := k.g.Sync(); err != nil {
		return marked{}, err
	}
	var m record.Marker
	report, err := c.Run(ctx, func(context.Context) (lsn record.LSN, err error) {
		m, err = k.g.Cut(want)
		return m.LSN, err
	})
	k.tell(c, report)
	if err != nil {
		return marked{}, errors.Join(err, stillFrozen(report))
	}
	if !report.Taken {
		return k.lesser(want, errors.New(report.Reason()), report)
	}
	return k.conclude(m, report)
}

// plan is what is to be at rest for a marker.
func (k *keeper) plan(want record.Marker) (guest.Cut, error) {
	c := guest.Cut{Group: k.g.Name(), Label: want.Label, Guests: k.guests(), Wait: k.conf.FreezeWait, Limit: k.conf.FreezeLimit, Notes: k.notes}
	if want.Asked == record.Application {
		for _, h := range k.conf.Hooks {
			c.Hooks = append(c.Hooks, guest.Hook(h))
		}
	}
	if len(c.Guests)+len(c.Hooks) == 0 {
		return c, fmt.Errorf("%w: group %s has no guest that could be frozen: configure groups.%s.guests (--guest %s=agent:PATH), or ask for a crash-consistent marker",
			errBadRequest, c.Group, c.Group, c.Group)
	}
	if len(c.Hooks) > 0 {
		return c, nil // what they bring to rest is theirs to say
	}
	for name, g := range k.conf.Guests {
		if !g.Freezes() {
			return c, fmt.Errorf("%w: guest %s of group %s can not be frozen: give it an agent or a libvirt domain, or ask for a crash-consistent marker",
				errBadRequest, name, c.Group)
		}
	}
	return c, nil
}

// tell tells everybody what was seen of a cut.
func (k *keeper) tell(c guest.Cut, r guest.Report) {
	k.metrics.cut(c.Group, r)
	k.metrics.notThawed.WithLabelValues(c.Group).Set(float64(len(r.NotThawed)))
	if len(r.NotThawed) > 0 {
		k.log.Error("A GUEST MAY BE FROZEN", zap.String("marker", c.Label), zap.Error(r.Problem()))
		kick(k.rouse)
	}
	var undone error
	if len(r.NotUndone) > 0 {
		undone = errors.New(strings.Join(r.NotUndone, "; "))
	}
	k.problem("not undone after a marker", undone)
}

// conclude says what became of a record that was taken.
func (k *keeper) conclude(m record.Marker, r guest.Report) (marked, error) {
	m.Frozen, m.Note = r.Frozen, r.Reason()
	if r.AtRest {
		m.Consistency = m.Asked
	}
	kept, err := k.g.Conclude(m)
	m.Pending = false
	switch {
	case err != nil:
		// It names no point until it is concluded, see concludeLeft.
		return marked{}, errors.Join(err, stillFrozen(r))
	case !kept:
		return marked{}, errors.Join(k.refused(m, errors.New(r.Reason())), stillFrozen(r))
	}
	return marked{m, r.Problem()}, nil
}

// stillFrozen is that guests may be frozen, as an error of the call.
func stillFrozen(r guest.Report) error {
	if len(r.NotThawed) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", errFrozen, r.Problem())
}

// lesser takes a crash-consistent marker where more was asked for and can not be had, if that may be.
func (k *keeper) lesser(want record.Marker, why error, r guest.Report) (marked, error) {
	if !want.OrCrash {
		return marked{}, errors.Join(k.refused(want, why), stillFrozen(r))
	}
	want.Note, want.Frozen = why.Error(), r.Frozen
	m, err := k.g.Mark(want)
	if err != nil {
		return marked{}, errors.Join(err, stillFrozen(r))
	}
	return marked{m, r.Problem()}, nil
}

func (k *keeper) refused(want record.Marker, why error) error {
	return fmt.Errorf("no %v-consistent marker of group %s: %w: %w (--or-crash takes a crash-consistent one then)", want.Asked, k.g.Name(), errNotAtRest, why)
}

// admit waits until the group's guests may be frozen: one cut of a group at a time, and only so
// many guests of the host.
func (k *keeper) admit(ctx context.Context, guests int64) (release func(), err error) {
	n := min(guests, k.most) // a group with more guests has them all to itself
	if err := k.frozen.Acquire(ctx, n); err != nil {
		return nil, err
	}
	quiet := k.quiet(k.g.Name())
	select {
	case <-quiet:
	case <-ctx.Done():
		k.frozen.Release(n)
		return nil, ctx.Err()
	}
	return func() {
		k.frozen.Release(n)
		quiet <- struct{}{}
	}, nil
}

// concludeLeft concludes a marker whose cut could not, for want of room.
func (k *keeper) concludeLeft() {
	quiet := k.quiet(k.g.Name())
	select {
	case <-quiet:
		defer func() { quiet <- struct{}{} }()
		k.problem("conclude markers", k.g.ConcludeLeft())
	default: // a cut is under way
	}
}

// definitionWait bounds what a marker waits for the definition of its guests.
const definitionWait = 2 * time.Second

// define journals the guests' definitions as far as they have changed. What can not be read now stays in
// force, and is told in the status.
func (k *keeper) define(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, definitionWait)
	defer cancel()
	for name, read := range k.definitions() {
		b, err := read(ctx)
		if err == nil {
			err = k.defined(name, b)
		}
		k.problem("definition "+name, err)
	}
}

func (k *keeper) defined(name string, content []byte) error {
	changed, err := k.g.Define(name, content)
	if changed {
		k.log.Info("definition changed", zap.String("name", name), zap.Int("bytes", len(content)))
	}
	if errors.Is(err, journal.ErrFailed) {
		return nil // the group's state says so
	}
	return err
}
