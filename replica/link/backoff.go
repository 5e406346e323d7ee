package link

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	firstPause = 100 * time.Millisecond
	longest    = 10 * time.Second
	// settle is how long a link that came up may take to carry anything.
	settle = 50 * time.Millisecond
)

// Backoff waits between attempts: longer each time, and cut short when the host's network changes.
type Backoff struct {
	e     *Endpoint
	pause time.Duration
}

// Backoff makes one, which one goroutine uses.
func (e *Endpoint) Backoff() *Backoff { return &Backoff{e, firstPause} }

// Reset has the next pause be a short one.
func (b *Backoff) Reset() { b.pause = firstPause }

// Wait waits, at most until ctx ends.
func (b *Backoff) Wait(ctx context.Context) {
	pause := b.pause/2 + rand.N(b.pause/2+1)
	b.pause = min(2*b.pause, longest)
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case <-b.e.network.wait():
		b.Reset()
		t.Reset(settle)
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
}

// bell wakes all who wait for it.
type bell struct {
	mu sync.Mutex
	c  chan struct{}
}

func (b *bell) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c == nil {
		b.c = make(chan struct{})
	}
	return b.c
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.c != nil {
		close(b.c)
		b.c = nil
	}
}

// Watch has those who wait to dial try at once when a link, a route or an address of the host comes up, at most once a second, until ctx
// ends. Without it they try in their own time.
func (e *Endpoint) Watch(ctx context.Context) {
	for ctx.Err() == nil {
		if err := e.watch(ctx); err != nil {
			e.Log.Warn("changes of the host's network are not seen: peers are dialled again after a while", zap.Error(err))
		}
		// A burst of changes may have been too much for the socket.
		select {
		case <-time.After(longest):
		case <-ctx.Done():
		}
	}
}

// watch returns when ctx ends, or the kernel's messages do.
func (e *Endpoint) watch(ctx context.Context) error {
	links, routes, addrs := make(chan netlink.LinkUpdate, 16), make(chan netlink.RouteUpdate, 16), make(chan netlink.AddrUpdate, 16)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := subscribe(ctx.Done(), links, routes, addrs); err != nil {
		return err
	}
	rung := time.Time{}
	for open := true; open; {
		up := false
		select {
		case u, ok := <-links:
			open, up = ok, u.Flags&unix.IFF_RUNNING != 0
		case u, ok := <-routes:
			open, up = ok, u.Type == unix.RTM_NEWROUTE
		case u, ok := <-addrs:
			open, up = ok, u.NewAddr
		case <-ctx.Done():
			open = false
		}
		if up && time.Since(rung) >= time.Second {
			rung = time.Now()
			e.network.ring()
		}
	}
	cancel() // the subscriptions end with it, and close their channels
	for range links {
	}
	for range routes {
	}
	for range addrs {
	}
	return nil
}

func subscribe(done <-chan struct{}, links chan netlink.LinkUpdate, routes chan netlink.RouteUpdate, addrs chan netlink.AddrUpdate) error {
	stop := make(chan struct{})
	if err := netlink.LinkSubscribe(links, stop); err != nil {
		close(stop)
		return err
	}
	if err := netlink.RouteSubscribe(routes, stop); err != nil {
		close(stop)
		return err
	}
	if err := netlink.AddrSubscribe(addrs, stop); err != nil {
		close(stop)
		return err
	}
	go func() {
		<-done
		close(stop)
	}()
	return nil
}
