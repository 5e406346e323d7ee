package link

import (
	"context"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestTheNetworkComesUp: who waits to dial tries at once when a link, an address or a route does, and not when one goes.
func TestTheNetworkComesUp(t *testing.T) {
	const name = "tmtest-watch"
	if os.Geteuid() != 0 {
		t.Skip("needs root: a network namespace of its own")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs ip")
	}
	ip := func(args ...string) {
		out, err := exec.Command("ip", args...).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	_ = exec.Command("ip", "netns", "delete", name).Run() // of a test that was killed
	ip("netns", "add", name)
	t.Cleanup(func() { ip("netns", "delete", name) })
	ns, err := os.Open("/run/netns/" + name)
	require.NoError(t, err)
	defer ns.Close()

	h := newHost(t, "a")
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	entered := make(chan error, 1)
	wg.Go(func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		if entered <- err; err == nil {
			h.Watch(ctx)
		}
	})
	require.NoError(t, <-entered)

	b := h.Backoff()
	wait := func(pause time.Duration) (ended <-chan time.Duration) {
		c, began := make(chan time.Duration, 1), time.Now()
		b.pause = pause
		wg.Go(func() {
			b.Wait(ctx)
			c <- time.Since(began)
		})
		return c
	}
	ended := wait(longest)
	for up := true; up; {
		ip("-n", name, "link", "set", "lo", "down") // the first time it is not looked at yet
		ip("-n", name, "link", "set", "lo", "up")
		select {
		case took := <-ended:
			require.Less(t, took, longest/2)
			up = false
		case <-time.After(200 * time.Millisecond):
		}
	}
	require.Equal(t, firstPause, b.pause, "the next pause is a short one")

	time.Sleep(1200 * time.Millisecond) // it wakes once a second at most
	ended = wait(800 * time.Millisecond)
	ip("-n", name, "link", "set", "lo", "down")
	require.GreaterOrEqual(t, <-ended, 400*time.Millisecond)
}
