package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Named is a guest of a group.
type Named struct {
	Name string
	Spec Spec
}

// Cut is what is to be at rest while one record is taken.
type Cut struct {
	Group, Label string
	Hooks        []Hook
	Guests       []Named
	Wait         time.Duration // for the guests to come to rest, their own hooks and all; 0: DefaultWait
	Limit        time.Duration // from the first guest's answer that it is frozen to asking for the thaw; 0: DefaultLimit
	Notes        *Notes

	open func(Named) Guest // tests have their own
}

// How long guests may take to come to rest, and how long they may be at it, unless told otherwise.
const (
	DefaultWait  = 30 * time.Second
	DefaultLimit = 2 * time.Second
)

// Report is what was seen of a cut.
type Report struct {
	AtRest bool       // everything was at rest from before the record was taken until after
	Taken  bool       // the record was taken
	LSN    record.LSN // of the record
	// Rested is how long the guests took to come to rest, their own hooks included: until the last one's
	// answer that it is frozen. They do work for most of it.
	Rested time.Duration
	// Frozen is how long guests stood still: from the first one's answer that it is frozen until the
	// last one's that it is thawed.
	Frozen time.Duration
	// Own is the part of Frozen that was Tidemark's own work: from the last one's answer that it
	// is frozen until all are asked to thaw.
	Own time.Duration
	Why []string // it was not at rest
	// NotThawed are the guests that were asked to freeze and are not known to be thawed.
	NotThawed []string
	// NotUndone is what else could not be brought to its end: hooks' second programs, the note.
	NotUndone []string
}

func (r *Report) because(format string, args ...any) {
	r.AtRest = false
	r.Why = append(r.Why, fmt.Sprintf(format, args...))
}

// Problem is an error if guests may still be frozen or hooks did not undo what they did: the operator must see to it.
func (r *Report) Problem() error {
	var errs []error
	for _, g := range r.NotThawed {
		errs = append(errs, fmt.Errorf("guest %s may still be frozen: thaw it (tidemark thaw, or guest-fsfreeze-thaw by its agent)", g))
	}
	for _, what := range r.NotUndone {
		errs = append(errs, errors.New(what))
	}
	return errors.Join(errs...)
}

const (
	// thawWait is how long one attempt to thaw a guest, and to see that it is, may take.
	thawWait = 10 * time.Second
	// thawTries is how often it is tried before the cut ends; Notes has it from then on.
	thawTries = 3
)

// patient is a guest under way to its thaw.
type patient struct {
	Named
	guest  Guest
	asked  bool // to freeze
	frozen int  // file systems
	err    error
	thawed bool
}

type run struct {
	*Cut
	ctx      context.Context
	guests   []*patient
	hooksRun int // hooks whose first program was begun
	report   Report

	clock clock
}

// clock ends the context of a cut: when the guests do not come to rest, and when they were at it
// for long enough.
type clock struct {
	cancel context.CancelCauseFunc

	mu    sync.Mutex // guards what follows while guests are asked to freeze
	timer *time.Timer
	began time.Time // of the first guest that is frozen; zero: none is
}

// start begins the wait for the guests.
func (c *clock) start(ctx context.Context, wait time.Duration) context.Context {
	ctx, c.cancel = context.WithCancelCause(ctx)
	c.timer = time.AfterFunc(wait, func() {
		c.cancel(fmt.Errorf("it did not come to rest within %v", wait))
	})
	return ctx
}

// frozen notes that a guest is frozen: from the first one on, the limit runs.
func (c *clock) frozen(limit time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.began.IsZero() {
		return
	}
	if c.began = time.Now(); !c.timer.Stop() {
		return // the wait is over, and with it the cut
	}
	c.timer = time.AfterFunc(limit, func() { c.cancel(fmt.Errorf("guests may be frozen for %v, and that is over", limit)) })
}

func (c *clock) stop() {
	c.timer.Stop()
	c.cancel(nil)
}

// Run brings everything to rest, calls take, and undoes it. take returns the LSN of what it
// journaled, durable; it is not called if something does not come to rest. The error is take's, or says that
// nothing could be begun. Run goes on to the thaw though ctx ends.
func (c *Cut) Run(ctx context.Context, take func(context.Context) (record.LSN, error)) (Report, error) {
	r := run{Cut: c, ctx: ctx}
	open := c.open
	if open == nil {
		open = func(n Named) Guest { return n.Spec.New() }
	}
	for _, g := range c.Guests {
		r.guests = append(r.guests, &patient{Named: g, guest: open(g)})
	}
	note := Note{Group: c.Group, Label: c.Label, Time: time.Now(), Guests: map[string]Spec{}, After: c.Hooks}
	for _, g := range c.Guests {
		note.Guests[g.Name] = g.Spec
	}
	if err := c.Notes.put(note); err != nil {
		return r.report, err
	}
	r.report.AtRest = true
	var err error
	if r.before() {
		err = r.freezeAndTake(take)
	}
	r.after(r.report.LSN)
	r.finish()
	return r.report, err
}

// before runs the hooks' first programs until one fails.
func (r *run) before() bool {
	for _, h := range r.Hooks {
		r.hooksRun++
		if len(h.Before) == 0 {
			continue
		}
		if err := runHook(r.ctx, h.Before, h.Timeout, hookEnv(r.Group, r.Label, phaseBefore, 0)); err != nil {
			r.report.because("%v", err)
			return false
		}
	}
	return true
}

// after runs the second programs of hooks that were begun, the last one first.
func (r *run) after(lsn record.LSN) {
	for _, h := range slices.Backward(r.Hooks[:r.hooksRun]) {
		if len(h.After) == 0 {
			continue
		}
		err := runHook(context.WithoutCancel(r.ctx), h.After, h.Timeout, hookEnv(r.Group, r.Label, phaseAfter, lsn))
		if err != nil {
			r.report.NotUndone = append(r.report.NotUndone, err.Error())
		}
	}
}

func (r *run) freezeAndTake(take func(context.Context) (record.LSN, error)) error {
	asked := time.Now()
	ctx := r.clock.start(r.ctx, cmp.Or(r.Wait, DefaultWait))
	defer r.clock.stop()
	var err error
	var taken chan error // until take has returned
	if r.freeze(ctx) {
		rested := time.Now()
		r.report.Rested = rested.Sub(asked)
		taken = make(chan error, 1)
		go func() {
			lsn, err := take(ctx)
			r.report.LSN, r.report.Taken = lsn, err == nil // read when taken is
			taken <- err
		}()
		select {
		case err = <-taken:
			taken = nil
			if err == nil {
				r.stillFrozen(ctx)
			}
		case <-ctx.Done():
			r.report.because("the record was not durable in time: %v", context.Cause(ctx))
		}
		r.report.Own = time.Since(rested)
	}
	r.thaw()
	if !r.clock.began.IsZero() {
		r.report.Frozen = time.Since(r.clock.began)
	}
	if taken != nil {
		err = <-taken // the guests do not wait for it any more
	}
	return err
}

// each calls fn with all guests at once and waits.
func (r *run) each(fn func(*patient)) {
	var wg sync.WaitGroup
	for _, p := range r.guests {
		wg.Go(func() { fn(p) })
	}
	wg.Wait()
}

// freeze freezes all guests, and reports whether all are frozen.
func (r *run) freeze(ctx context.Context) bool {
	r.each(func(p *patient) {
		p.frozen, p.err = p.guest.Freeze(ctx)
		p.asked = !errors.Is(p.err, ErrNotAsked)
		if p.err == nil {
			r.clock.frozen(cmp.Or(r.Limit, DefaultLimit))
		}
		if p.err == nil && p.frozen <= 0 {
			p.err = errors.New("it froze no file system")
		}
	})
	for _, p := range r.guests {
		if p.err != nil {
			r.report.because("guest %s did not freeze: %v", p.Name, p.err)
		}
	}
	if r.report.AtRest && ctx.Err() != nil {
		r.report.because("not all guests came to rest in time: %v", context.Cause(ctx))
	}
	return r.report.AtRest
}

// stillFrozen asks whether the guests were frozen until now. An agent's answer is its own state; what
// else thawed the file systems shows in the count of the thaw.
func (r *run) stillFrozen(ctx context.Context) {
	r.each(func(p *patient) {
		frozen, err := p.guest.Frozen(ctx)
		if p.err = err; err == nil && !frozen {
			p.err = errors.New("it was thawed before the record was durable")
		}
	})
	for _, p := range r.guests {
		if p.err != nil {
			r.report.because("guest %s is not known to have been frozen: %v", p.Name, p.err)
		}
	}
}

// thaw thaws every guest that may be frozen, and sees to it that it is.
func (r *run) thaw() {
	ctx := context.WithoutCancel(r.ctx)
	r.each(func(p *patient) {
		if !p.asked {
			return
		}
		n := -1 // not answered
		for try := 0; try < thawTries && !p.thawed; try++ {
			n, p.thawed, p.err = p.thaw(ctx, n)
		}
		switch {
		case p.err != nil:
		case p.frozen > 0 && n < p.frozen:
			p.err = fmt.Errorf("%d of its file systems were frozen, and %d when it was thawed: something else had thawed them", p.frozen, max(n, 0))
		}
	})
	for _, p := range r.guests {
		if !p.asked {
			continue
		}
		if p.err != nil {
			r.report.because("guest %s: %v", p.Name, p.err)
		}
		if !p.thawed {
			r.report.NotThawed = append(r.report.NotThawed, p.Name)
		}
	}
}

// thaw tries once. n is what an attempt before this one thawed: a second finds nothing to do. The
// error says that the guest may not have been frozen until now, or is still.
func (p *patient) thaw(ctx context.Context, n int) (int, bool, error) {
	ctx, cancel := context.WithTimeout(ctx, thawWait)
	defer cancel()
	m, err := p.guest.Thaw(ctx)
	if err == nil {
		n = max(n, m)
	}
	frozen, serr := p.guest.Frozen(ctx)
	switch {
	case serr != nil:
		_ = p.guest.Close() // the next attempt makes a new connection
		return n, false, errors.Join(err, fmt.Errorf("whether it is thawed is not known: %w", serr))
	case frozen:
		return n, false, errors.Join(err, errors.New("it was asked to thaw and is still frozen"))
	}
	return n, true, err
}

// finish lets go of the guests, and notes what is still to be undone.
func (r *run) finish() {
	note := Note{Group: r.Group, Label: r.Label, Time: time.Now(), Guests: map[string]Spec{}}
	for _, p := range r.guests {
		_ = p.guest.Close() // nothing is asked on it any more
		if p.asked && !p.thawed {
			note.Guests[p.Name] = p.Spec
		}
	}
	if err := r.Notes.put(note); err != nil {
		r.report.NotUndone = append(r.report.NotUndone, err.Error())
	}
}

// Reason is why the cut was not at rest, in a line.
func (r *Report) Reason() string { return strings.Join(r.Why, "; ") }
