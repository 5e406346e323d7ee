package journal

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"
)

// tick is how often the background loops look whether something is due, beside
// being told; restTick, while the group has nothing to sync, index or apply: what is due by the clock alone can wait so long.
const (
	tick     = 100 * time.Millisecond
	restTick = 2 * time.Second
)

// rest has the loops look less often if there is nothing to do, until a record comes. It returns how often.
func (g *Group) rest() time.Duration {
	g.append.Lock()
	defer g.append.Unlock()
	a := &g.append
	a.resting = a.bytes == a.synced && a.lag == 0 && len(a.ready) == 0 && g.unapplied.Load() == 0
	if a.resting {
		return restTick
	}
	return tick
}

// loops are a group's background work.
type loops struct {
	sync.Mutex
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// startLoops begins the background work but for compaction, which is the store's; stopLoops ends it and waits for that.
func (g *Group) startLoops(ctx context.Context) {
	g.loops.Lock()
	defer g.loops.Unlock()
	if g.loops.cancel != nil {
		return // they run
	}
	ctx, g.loops.cancel = context.WithCancel(ctx)
	g.settled.CompareAndSwap(0, g.o.Now().Add(settleTime).UnixNano())
	g.loops.wg.Go(func() { g.runCommits(ctx) })
	g.loops.wg.Go(func() { g.runApplies(ctx) })
	g.loops.wg.Go(func() { g.runCleans(ctx) })
}

func (g *Group) stopLoops() {
	g.loops.Lock()
	defer g.loops.Unlock()
	if g.loops.cancel != nil {
		g.loops.cancel()
		g.loops.wg.Wait()
		g.loops.cancel = nil
	}
}

// runCommits syncs and indexes until ctx ends.
func (g *Group) runCommits(ctx context.Context) {
	t := time.NewTicker(tick)
	defer t.Stop()
	var lastSync, lastIndex time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-g.kickSync:
		}
		g.append.Lock()
		dirty, failed := g.append.bytes-g.append.synced, g.append.err != nil
		lag := g.append.lag
		g.append.Unlock()
		if failed {
			continue
		}
		now := g.o.Now()
		if dirty >= syncBytes || lag >= indexLag || dirty > 0 && now.Sub(lastSync) >= syncAge {
			lastSync = now
			if err := g.Sync(); err != nil {
				continue // the group has failed and has said so
			}
		}
		// Many versions at once are neighbours in the index, and cost it less.
		if lag >= indexBatch || now.Sub(lastIndex) >= indexAge {
			lastIndex = now
			if err := g.Index(); err != nil {
				continue
			}
		}
		if err := g.ix.RetireReaders(time.Now(), time.Second); err != nil {
			g.log.Error("close index readers", zap.Error(err))
		}
		t.Reset(g.rest())
	}
}

// runApplies applies, checkpoints and expires until ctx ends.
func (g *Group) runApplies(ctx context.Context) {
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-g.kickApply:
		}
		if state, _ := g.State(); state == "failed" {
			continue
		}
		g.background()
		t.Reset(g.rest())
	}
}

// background does one round of whatever is due. Errors are the group's state,
// which has been logged where it was set.
func (g *Group) background() {
	now := g.o.Now()
	g.append.Lock()
	full := g.append.full
	g.append.Unlock()
	if g.applyDue(now) {
		if err := g.Apply(); err != nil && full == nil {
			g.log.Warn("apply", zap.Error(err))
		}
	}
	g.apply.Lock()
	due := g.checkpointDueLocked(now)
	g.apply.Unlock()
	if due {
		if err := g.Checkpoint(); err != nil {
			return
		}
	}
	if now.Before(g.expireNext) {
		return
	}
	freed, err := g.expireDue()
	if freed > 0 {
		kick(g.kickApply) // there may be more, behind what is to be applied
	}
	if err != nil {
		// What stands in the way is there for a while: a disk that is not configured, damage.
		g.expireNext = now.Add(expireRetry)
		g.log.Warn("history is not expired", zap.Error(err), zap.Duration("again_in", expireRetry))
	}
}

// applyDue decides whether to begin a round. It is called by one goroutine.
func (g *Group) applyDue(now time.Time) bool {
	g.append.Lock()
	defer g.append.Unlock()
	a := &g.append
	written := a.bytes - a.lastLook
	if now.Sub(a.lookedAt) >= tick {
		if written >= busyBytes || g.Follows() && written >= busyFollower {
			a.busyAt = now
		}
		a.lastLook, a.lookedAt = a.bytes, now
		g.limitOwedLocked()
	}
	pending := g.unapplied.Load()
	age := applyAge
	if now.Sub(a.busyAt) < busyHold {
		age = busyAge
	}
	return pending > 0 && (g.muchUnappliedLocked() || now.Sub(a.oldest) >= age)
}

const (
	// cleanEvery is how often a group looks for points that are kept no longer, and for what nobody needs then.
	cleanEvery = 15 * time.Second
	// settleTime is how long after a start points stay of which views were open before: exports and mounts are made again by who had them.
	settleTime = 30 * time.Second
	// cleanRest is how many times as long as a step of cleaning took the next one waits.
	cleanRest = 3
	// cleanHold is how long a step waits at most for a guest that writes much.
	cleanHold = 10 * time.Second
	// closeShare is how much of a file of originals must be filled before it is closed for a Clean, of a segment's size.
	closeShare = 8
)

// runCleans lets go of what is kept no longer until ctx ends.
func (g *Group) runCleans(ctx context.Context) {
	t := time.NewTicker(cleanEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if !g.everKept() || !g.alive() {
			continue
		}
		began := time.Now()
		rest := func() error {
			err := g.cleanPause(ctx, time.Since(began))
			began = time.Now()
			return err
		}
		_, err := g.Thin()
		if err == nil {
			err = g.closeOriginals(g.o.SegmentSize / closeShare)
		}
		if err == nil {
			_, err = g.clean(cleanShare, rest)
		}
		if err == nil && g.excess() > 0 && !g.logCanGo() && !g.early() {
			_, err = g.giveUp() // what they took is cleaned up before more of them go
		}
		if err != nil && ctx.Err() == nil {
			g.log.Warn("what nobody needs any more is not cleaned up", zap.Error(err))
		}
	}
}

// cleanPause waits behind a step that took some time, unless somebody waits for the space.
func (g *Group) cleanPause(ctx context.Context, took time.Duration) error {
	now := time.Now()
	rest, hold := now.Add(cleanRest*took), now.Add(cleanHold)
	for now.Before(rest) || now.Before(hold) && g.busy() {
		if g.hurry.Load() > 0 {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(tick, max(time.Until(rest), time.Millisecond))):
		}
		now = time.Now()
	}
	return ctx.Err()
}

// busy reports whether the guest has written much lately.
func (g *Group) busy() bool {
	g.append.Lock()
	defer g.append.Unlock()
	return g.o.Now().Sub(g.append.busyAt) < busyHold
}
