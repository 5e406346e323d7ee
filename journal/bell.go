package journal

import "sync/atomic"

// bell wakes everybody who waits for something to change. To ring it costs next to nothing while nobody does.
type bell struct{ rung atomic.Pointer[chan struct{}] }

// wait returns what is closed by the next ring. Whoever waits looks at the thing again after the call.
func (b *bell) wait() <-chan struct{} {
	for {
		if c := b.rung.Load(); c != nil {
			return *c
		}
		if c := make(chan struct{}); b.rung.CompareAndSwap(nil, &c) {
			return c
		}
	}
}

func (b *bell) ring() {
	if b.rung.Load() == nil {
		return
	}
	if c := b.rung.Swap(nil); c != nil {
		close(*c)
	}
}
