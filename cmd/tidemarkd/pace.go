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

// burst is what goes at once, in bytes: more than one record of TLS.
const burst = 64 << 10

// Wait implements link.Limiter.
func (p *pace) Wait(ctx context.Context, n int) error {
	for n > 0 {
		k := min(n, burst)
		if err := p.limiter(time.Now()).WaitN(ctx, k); err != nil {
			return err
		}
		n -= k
	}
	return nil
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
