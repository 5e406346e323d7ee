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
		m.Marker, err = k.g.Mark(want)
	} else {
		m, err = k.cut(ctx, want)
	}
	k.metrics.marked(k.g.Name(), want, m, err)
	if err != nil {
		return m, err
	}
	k.log.Info("marker", zap.String("label", m.Label), zap.Uint64("lsn", uint64(m.LSN)), zap.String("by", m.By), zap.Stringer("consistency", m.Consistency),
		zap.Stringer("asked", m.Asked), zap.Duration("frozen", m.Frozen), zap.String("note", m.Note))
	return m, nil
}

// cut takes a marker with the guests at rest.
func (k *keeper) cut(ctx context.Context, want record.Marker) (marked, error) {
	c := guest.Cut{Group: k.g.Name(), Label: want.Label, Guests: k.guests(), Wait: k.conf.FreezeWait, Limit: k.conf.FreezeLimit, Notes: k.notes}
	if want.Asked == record.Application {
		for _, h := range k.conf.Hooks {
			c.Hooks = append(c.Hooks, guest.Hook(h))
		}
	}
	if len(c.Guests)+len(c.Hooks) == 0 {
		return marked{}, fmt.Errorf("%w: group %s has no guest that could be frozen: configure groups.%s.guests (--guest %s=agent:PATH), or ask for a crash-consistent marker",
			errBadRequest, c.Group, c.Group, c.Group)
	}
	release, err := k.admit(ctx, int64(len(c.Guests)))
	if err != nil {
		return marked{}, err
	}
	defer release()
	if _, left, err := k.notes.Get(c.Group); left {
		return k.lesser(want, errors.Join(fmt.Errorf("%w from an earlier marker: see status, and tidemark thaw %s", errFrozen, c.Group), err))
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
	k.metrics.cut(c.Group, report)
	problem := report.Problem()
	if problem != nil {
		k.log.Error("A GUEST MAY BE FROZEN, OR A HOOK IS NOT UNDONE", zap.String("marker", want.Label), zap.Error(problem))
		k.metrics.notThawed.WithLabelValues(c.Group).Set(float64(len(report.NotThawed)))
		kick(k.rouse)
	}
	k.problem("hooks", hookProblem(report))
	switch {
	case err != nil:
		return marked{}, errors.Join(err, frozen(report, problem))
	case !report.Taken:
		lesser, err := k.lesser(want, errors.New(report.Reason()))
		lesser.problem = problem
		return lesser, errors.Join(err, frozen(report, problem))
	}
	m.Frozen, m.Note = report.Frozen, report.Reason()
	if report.AtRest {
		m.Consistency = want.Asked
	}
	kept, err := k.g.Conclude(m)
	m.Pending = false
	switch {
	case err != nil:
		return marked{}, errors.Join(err, frozen(report, problem))
	case !kept:
		return marked{}, errors.Join(k.refused(want, errors.New(report.Reason())), frozen(report, problem))
	}
	return marked{m, problem}, nil
}

// frozen is the problem of guests that may still be frozen, as an error of the call.
func frozen(r guest.Report, problem error) error {
	if len(r.NotThawed) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", errFrozen, problem)
}

func hookProblem(r guest.Report) error {
	if len(r.Hooks) == 0 {
		return nil
	}
	return errors.New(strings.Join(r.Hooks, "; "))
}

// lesser takes a crash-consistent marker where more was asked for and can not be had, if that may be.
func (k *keeper) lesser(want record.Marker, why error) (marked, error) {
	if !want.OrCrash {
		return marked{}, k.refused(want, why)
	}
	want.Note = why.Error()
	m, err := k.g.Mark(want)
	return marked{Marker: m}, err
}

func (k *keeper) refused(want record.Marker, why error) error {
	return fmt.Errorf("no %v-consistent marker of group %s: %w: %w (--or-crash takes a crash-consistent one then)", want.Asked, k.g.Name(), errNotAtRest, why)
}

// admit waits until the group's guests may be frozen: one cut of a group at a time, and only so
// many guests of the host.
func (k *keeper) admit(ctx context.Context, guests int64) (release func(), err error) {
	quiet := k.quiet(k.g.Name())
	select {
	case <-quiet:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	n := min(guests, k.most) // a group with more guests has them all to itself
	if err := k.frozen.Acquire(ctx, n); err != nil {
		quiet <- struct{}{}
		return nil, err
	}
	return func() {
		k.frozen.Release(n)
		quiet <- struct{}{}
	}, nil
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
