package main

import (
	"context"

	"golang.org/x/time/rate"

	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
)

// readBurst is what may be read at once behind a pause, in bytes.
const readBurst = 4 << 20

// readPace is what background work that reads so many bytes a second calls with what it has read, or is to read; nil: it is not to be done.
func readPace(bytesPerSecond config.Size) func(ctx context.Context, bytes int64) error {
	if bytesPerSecond == 0 {
		return nil
	}
	l := rate.NewLimiter(rate.Limit(bytesPerSecond), readBurst)
	return func(ctx context.Context, bytes int64) error {
		for ; bytes > 0; bytes -= readBurst {
			if err := l.WaitN(ctx, int(min(bytes, readBurst))); err != nil {
				return err
			}
		}
		return nil
	}
}
