package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// shown is volumes that are shown in a directory of their names, but for "hangs", until they are broken.
type shown struct {
	once   sync.Once
	broken chan struct{}
}

func (s *shown) Dir(ctx context.Context, volume string) (string, error) {
	if volume == "hangs" {
		select {
		case <-s.broken:
		case <-ctx.Done():
		}
		return "", os.ErrClosed
	}
	if volume == "none" {
		return "", os.ErrNotExist
	}
	return "/" + volume, s.Err()
}

func (s *shown) Err() error {
	select {
	case <-s.broken:
		return os.ErrClosed
	default:
		return nil
	}
}

func (s *shown) Break()       { s.once.Do(func() { close(s.broken) }) }
func (s *shown) Close() error { return nil }

// aKeeper runs a keeper; ended is closed when it has.
func aKeeper(t *testing.T, keep time.Duration) (sock string, s *shown, ended chan struct{}) {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	sock = filepath.Join(t.TempDir(), "sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	require.NoError(t, err)
	s = &shown{broken: make(chan struct{})}
	k := &keeper{m: &moment{opened: s}, l: l, keep: keep}
	ctx, cancel := context.WithCancel(context.Background())
	ended = make(chan struct{})
	go func() {
		defer close(ended)
		if err := k.run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		goleak.VerifyNone(t, ignore)
	})
	return sock, s, ended
}

func over(t *testing.T, ended chan struct{}) {
	t.Helper()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
	}
}

func TestAKeeperEndsWhenItIsIdle(t *testing.T) {
	sock, s, ended := aKeeper(t, 50*time.Millisecond)
	for range 3 {
		o, err := dialKept(sock)
		require.NoError(t, err)
		time.Sleep(100 * time.Millisecond) // it is in use
		dir, err := o.Dir(context.Background(), "vda")
		require.NoError(t, err)
		require.Equal(t, "/vda", dir)
		_, err = o.Dir(context.Background(), "none")
		require.ErrorContains(t, err, "not exist")
		require.NoError(t, o.Err())
		require.NoError(t, o.Close())
	}
	over(t, ended)
	require.NoError(t, s.Err(), "it was not broken")
	_, err := dialKept(sock)
	require.True(t, notThere(err), "%v", err)
}

// TestOneGivesUp: what hangs ends, but not for those who still use it.
func TestOneGivesUp(t *testing.T) {
	sock, s, ended := aKeeper(t, time.Hour)
	a, err := dialKept(sock)
	require.NoError(t, err)
	b, err := dialKept(sock)
	require.NoError(t, err)
	asked := make(chan error)
	go func() {
		_, err := a.Dir(context.Background(), "hangs")
		asked <- err
	}()
	time.Sleep(20 * time.Millisecond) // most likely it waits by now
	a.Break()
	require.Error(t, <-asked)
	_, err = b.Dir(context.Background(), "vda")
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		_, err := dialKept(sock)
		return notThere(err)
	}, time.Minute, time.Millisecond, "it has nobody new")
	require.NoError(t, s.Err())
	require.NoError(t, a.Close())
	require.NoError(t, b.Close())
	over(t, ended)
}

// TestAllGiveUp: the last one to give up ends what hangs, though the others still wait in it.
func TestAllGiveUp(t *testing.T) {
	sock, s, ended := aKeeper(t, time.Hour)
	a, err := dialKept(sock)
	require.NoError(t, err)
	b, err := dialKept(sock)
	require.NoError(t, err)
	a.Break()
	b.Break()
	over(t, ended)
	require.Error(t, s.Err(), "who waits for a file gets an error")
	require.NoError(t, a.Close())
	require.NoError(t, b.Close())
	_, err = a.Dir(context.Background(), "vda")
	require.Error(t, err)
}

// TestAKeeperOfNoUse ends.
func TestAKeeperOfNoUse(t *testing.T) {
	sock, s, ended := aKeeper(t, time.Hour)
	o, err := dialKept(sock)
	require.NoError(t, err)
	s.Break()
	over(t, ended)
	require.Eventually(t, func() bool { return o.Err() != nil }, time.Minute, time.Millisecond)
	require.NoError(t, o.Close())
}

// TestSweep counts those that live, and removes what others have left.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a.1.sock", "b.2.sock"} {
		f, err := lockFile(filepath.Join(dir, name+".lock"), unix.LOCK_NB)
		require.NoError(t, err)
		defer f.Close()
	}
	for _, name := range []string{"c.3.sock", "c.3.sock.lock", "d.4.sock.lock", "lock"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	n, err := sweep(dir)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 3)
}

func TestKeptDirIsTheUsersAlone(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	dir, err := keptDir()
	require.NoError(t, err)
	again, err := keptDir()
	require.NoError(t, err)
	require.Equal(t, dir, again)
	require.NoError(t, os.Chmod(dir, 0o755))
	_, err = keptDir()
	require.ErrorContains(t, err, "not this user's alone")
	require.NoError(t, os.Remove(dir))
	require.NoError(t, os.Symlink(t.TempDir(), dir))
	_, err = keptDir()
	require.ErrorContains(t, err, "not this user's alone")
}
