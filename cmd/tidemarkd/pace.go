package main

import (
	"context"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
)

// pace bounds what is sent to peers, by the time of day. Groups that wait are served in their order, a message's part each, so that
// each gets its share.
type pace struct {
	conf *config.Replication

	mu  sync.Mutex // guards what follows
	now config.Size
	l   *rate.Limiter
}

func newPace(conf *config.Replication) *pace {
	return &pace{conf: conf, l: rate.NewLimiter(rate.Inf, 0)}
}

const (
	// burst is what may go at once after a pause, in bytes.
	burst = 64 << 10
	// share is what one stream takes at once, in bytes: then it is the next one's turn.
	share = 16 << 10
)

// Take implements link.Limiter.
func (p *pace) Take(ctx context.Context, n int) (int, error) {
	l := p.limiter(time.Now())
	if l.Limit() == rate.Inf {
		return n, nil
	}
	n = min(n, share)
	return n, l.WaitN(ctx, n)
}

func (p *pace) limiter(now time.Time) *rate.Limiter {
	p.mu.Lock()
	defer p.mu.Unlock()
	if want := p.conf.At(now); want != p.now {
		p.now = want
		if want == 0 {
			p.l.SetLimit(rate.Inf)
		} else {
			p.l.SetBurst(burst)
			p.l.SetLimit(rate.Limit(want))
		}
	}
	return p.l
}
