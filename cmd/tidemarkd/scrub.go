package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/journal"
)

// scrubber verifies the groups in the background, one after the other, so that damage is found while there is something to mend it with.
type scrubber struct {
	store  *journal.Store
	conf   config.Scrub
	repair func(context.Context, *journal.Group, *damage) (mended int, err error)
	log    *zap.Logger

	mu  sync.Mutex // guards what follows
	now string     // the group that is being verified; empty: none
	// index is what was found in the index's files last, and when; that is kept in memory alone.
	index api.Scrub
}

func newScrubber(store *journal.Store, conf config.Scrub, repl *replication, log *zap.Logger) *scrubber {
	return &scrubber{store: store, conf: conf, repair: repl.repair, log: log}
}

const (
	// scrubLook is how often it is looked whether a group is due.
	scrubLook = time.Minute
	// scrubLogged bounds the findings of one verification that are logged.
	scrubLogged = 20
)

// run verifies what is due until ctx ends. A verification that a stop has cut off begins anew.
func (s *scrubber) run(ctx context.Context) error {
	every := time.Duration(*s.conf.Every)
	if every == 0 || *s.conf.Rate == 0 {
		return nil
	}
	t := time.NewTicker(min(scrubLook, max(every/2, time.Second)))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		for ctx.Err() == nil && s.next(ctx) {
		}
	}
}

// next verifies the group that is due the longest, and reports whether it is worth looking for another one at once.
func (s *scrubber) next(ctx context.Context) bool {
	due := time.Now().Add(-time.Duration(*s.conf.Every))
	var g *journal.Group
	for _, o := range s.store.Groups() {
		last, _ := o.Verified()
		if state, _ := o.State(); state != "failed" && last.Before(due) {
			g, due = o, last
		}
	}
	return g != nil && s.group(ctx, g)
}

// pause keeps the pace that is configured.
func (s *scrubber) pause(ctx context.Context) func(int64) error {
	wait := readPace(*s.conf.Rate)
	return func(bytes int64) error { return wait(ctx, bytes) }
}

// group verifies one, has what can be repaired repaired, and notes when. It reports whether it came to an end.
func (s *scrubber) group(ctx context.Context, g *journal.Group) bool {
	began := time.Now()
	s.setNow(g.Name())
	defer s.setNow("")
	log := s.log.With(zap.String("group", g.Name()))
	left, repaired := int64(0), 0
	// A backing is not mended unasked: what is there may be what somebody wrote past the daemon.
	for d := newDamage(false); ; d = d.next() { // behind a damaged header, a file can not be read before it is mended
		err := s.verify(ctx, g, d, log)
		if ctx.Err() != nil || errors.Is(err, os.ErrClosed) {
			return false
		}
		left = int64(d.found)
		if err != nil {
			log.Error("the group could not be verified to its end", zap.Error(err))
			_, before := g.Verified()
			left = max(left, before, 1) // it is tried again when it is due next: what stands in the way is there for a while
		}
		if !d.some() {
			break
		}
		n, why := s.repair(ctx, g, d)
		if repaired += n; why != nil {
			log.Warn("not all that is damaged could be repaired", zap.Error(why))
		}
		if n == 0 && !d.more || err != nil {
			break
		}
	}
	if err := g.SetVerified(began, left); err != nil {
		log.Warn("note that the group was verified", zap.Error(err))
		return false
	}
	log.Info("verified the group", zap.Int64("damaged", left), zap.Int("repaired", repaired), zap.Duration("took", time.Since(began)))
	s.files(ctx)
	return true
}

// verify verifies a group, and logs what it finds, the first of it.
func (s *scrubber) verify(ctx context.Context, g *journal.Group, d *damage, log *zap.Logger) error {
	_, err := g.Verify(ctx, journal.VerifyOptions{Pause: s.pause(ctx)}, func(f journal.Finding) {
		if d.add(f); d.found <= scrubLogged {
			log.Error("damage", zap.String("where", f.Where), zap.Uint64("lsn", uint64(f.LSN)), zap.String("what", f.What))
		}
	})
	return err
}

// files verifies the index's files, if they are due.
func (s *scrubber) files(ctx context.Context) {
	s.mu.Lock()
	due := time.Since(s.index.At) >= time.Duration(*s.conf.Every)
	s.mu.Unlock()
	if !due {
		return
	}
	began, damaged := time.Now(), int64(0)
	_, err := s.store.VerifyIndex(s.pause(ctx), func(f journal.Finding) {
		damaged++
		s.log.Error("damage", zap.String("where", f.Where), zap.String("what", f.What))
	})
	if err != nil {
		if ctx.Err() == nil {
			s.log.Error("the index's files could not be verified", zap.Error(err))
		}
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.index = api.Scrub{At: began, Damaged: damaged}
}

func (s *scrubber) setNow(group string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now = group
}

// status says when a group was verified in the background, and what is damaged since.
func (s *scrubber) status(g *journal.Group, a *api.Group) {
	at, damaged := g.Verified()
	s.mu.Lock()
	defer s.mu.Unlock()
	a.Scrub = &api.Scrub{At: at, Damaged: damaged, Running: s.now == g.Name()}
	if damaged > 0 {
		a.Problems = append(a.Problems, fmt.Sprintf("verified %s: %d places are damaged (tidemark verify %s says which)", at.Format(time.RFC3339), damaged, g.Name()))
	}
	if n := s.index.Damaged; n > 0 {
		a.Problems = append(a.Problems, fmt.Sprintf("%d files of the index are damaged (tidemark verify says which): stop the daemon and remove the index; it is made again from the segments", n))
	}
}
