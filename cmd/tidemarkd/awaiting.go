package main

import (
	"context"
	"sync"

	"go.uber.org/zap"
)

// wait has peers offer groups here whose address is known, so that they need not know this daemon's.
func (r *replication) wait(ctx context.Context) {
	waiting := map[string]context.CancelFunc{}
	var wg sync.WaitGroup
	defer wg.Wait()
	for ctx.Err() == nil {
		changed := r.e.Peers.Changed()
		now := map[string]bool{}
		for _, p := range r.e.Peers.All() {
			if p.Address == "" {
				continue
			}
			now[p.Name] = true
			if waiting[p.Name] == nil {
				one, cancel := context.WithCancel(ctx)
				waiting[p.Name] = cancel
				wg.Go(func() { r.waitFor(one, p.Name) })
			}
		}
		for name, cancel := range waiting {
			if !now[name] {
				cancel()
				delete(waiting, name)
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
	for _, cancel := range waiting {
		cancel()
	}
}

// waitFor keeps a connection to a peer on which it may offer a group.
func (r *replication) waitFor(ctx context.Context, peer string) {
	var wg sync.WaitGroup
	defer wg.Wait()
	b := r.e.Backoff()
	for ctx.Err() == nil {
		taken := make(chan struct{})
		ended := make(chan error, 1)
		wg.Go(func() { ended <- r.e.Await(ctx, peer, func() { close(taken) }) })
		select {
		case <-taken:
			b.Reset()
		case err := <-ended:
			if ctx.Err() == nil {
				r.log.Debug("wait for a peer's offers", zap.String("peer", peer), zap.Error(err))
				b.Wait(ctx)
			}
		}
	}
}
