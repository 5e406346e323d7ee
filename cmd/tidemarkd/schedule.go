package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// byScheduler is who asked for the markers that come by themselves.
const byScheduler = "scheduler"

// timetable says when markers are due: at the multiples of every since the epoch, each a little later.
type timetable struct {
	every, jitter time.Duration
}

// next is the first due time after now. draw is at least 0 and less than 1.
func (t timetable) next(now time.Time, draw float64) time.Time {
	return now.Truncate(t.every).Add(t.every + time.Duration(draw*float64(t.jitter)))
}

// first is when the first one is due after a start, if the last one was taken then: the slot that now is
// in may not have been served.
func (t timetable) first(last, now time.Time, draw float64) time.Time {
	slot := now.Truncate(t.every)
	if !last.IsZero() && !last.Before(slot) {
		return t.next(now, draw)
	}
	due := slot.Add(time.Duration(draw * float64(t.jitter)))
	if due.Before(now) {
		return now
	}
	return due
}

// missed is how many were due between the last one that was taken and now, and were not. It is none
// before the first.
func (t timetable) missed(last, now time.Time) uint64 {
	late := now.Sub(last.Truncate(t.every)) - t.every - t.jitter
	if last.IsZero() || late <= 0 {
		return 0
	}
	return uint64(late/t.every) + 1
}

// schedule takes the group's markers until ctx ends. One that is due at the start, because the daemon
// was not there when it was, is taken at once.
func (k *keeper) schedule(ctx context.Context) {
	conf := k.conf.Markers
	table := timetable{conf.Every, conf.Jitter}
	last, err := k.lastScheduled()
	if err != nil {
		k.problem("markers", err)
	}
	now := time.Now()
	due := table.first(last, now, rand.Float64())
	if n := table.missed(last, now); n > 0 {
		k.miss(n, fmt.Errorf("the daemon did not run: the last one is of %s", last.Format(time.RFC3339)))
	}
	for {
		k.setSchedule(due, last)
		t := time.NewTimer(time.Until(due))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		taken := time.Now()
		if k.takeScheduled(ctx, taken) {
			last = taken
		}
		now := time.Now()
		if n := table.missed(taken, now); n > 0 {
			k.miss(n, fmt.Errorf("the one before took %v", now.Sub(taken).Round(time.Millisecond)))
		}
		due = table.next(now, rand.Float64())
	}
}

// lastScheduled is the time of the newest marker of the scheduler's that was what it was to be.
func (k *keeper) lastScheduled() (last time.Time, err error) {
	markers, err := k.g.Markers()
	for _, m := range markers {
		if m.By == byScheduler && m.Consistency >= m.Asked {
			last = m.Time
		}
	}
	return last, err
}

// takeScheduled takes one, and reports whether it is what was asked for.
func (k *keeper) takeScheduled(ctx context.Context, at time.Time) bool {
	conf := k.conf.Markers
	asked, err := record.ParseConsistency(conf.Consistency)
	if err != nil {
		return false // the configuration was validated
	}
	m, err := k.mark(ctx, record.Marker{
		Label: conf.Label + "-" + at.UTC().Format("20060102T150405Z"), By: byScheduler, Asked: asked, OrCrash: conf.OrCrash,
	})
	switch {
	case ctx.Err() != nil:
		return false
	case err != nil:
		k.miss(1, err)
		return false
	case m.Consistency < asked:
		k.miss(1, fmt.Errorf("it is %v-consistent only: %s", m.Consistency, m.Note))
		return false
	}
	k.problem("markers", nil)
	return true
}

// miss notes markers that were not taken, or were less than was asked for.
func (k *keeper) miss(n uint64, why error) {
	k.metrics.missed.WithLabelValues(k.g.Name()).Add(float64(n))
	k.missedSoFar(k.g.Name(), n)
	k.state.Lock()
	k.state.schedule.Why = why.Error()
	k.state.Unlock()
	k.log.Warn("a marker was missed", zap.Uint64("missed", n), zap.Error(why))
	k.problem("markers", why)
}

func (k *keeper) setSchedule(next, last time.Time) {
	k.state.Lock()
	defer k.state.Unlock()
	k.state.schedule.Next, k.state.schedule.Last = next.UTC(), last.UTC()
}
