package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/tidemark-cdp/tidemark/restore/guestfs"
)

// shown is volumes that are shown in a directory of their names, but for "hangs", until they are broken.
type shown struct {
	once    sync.Once
	broken  chan struct{}
	hanging chan struct{} // gets a value when somebody hangs
}

func (s *shown) Dir(ctx context.Context, volume string) (string, error) {
	if volume == "hangs" {
		s.hanging <- struct{}{}
		select {
		case <-s.broken:
		case <-ctx.Done():
		}
		return "", guestfs.ErrEnded
	}
	if volume == "none" {
		return "", os.ErrNotExist
	}
	return "/" + volume, s.Err()
}

func (s *shown) Err() error {
	select {
	case <-s.broken:
		return guestfs.ErrEnded
	default:
		return nil
	}
}

func (s *shown) Break()       { s.once.Do(func() { close(s.broken) }) }
func (s *shown) Close() error { return nil }

// aKeeper runs a keeper; ended is closed when it has.
func aKeeper(t *testing.T, idle time.Duration) (sock string, s *shown, ended chan struct{}) {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	sock = filepath.Join(t.TempDir(), "sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	require.NoError(t, err)
	s = &shown{broken: make(chan struct{}), hanging: make(chan struct{}, 1)}
	k := &keeper{m: &moment{opened: s}, l: l, keep: idle}
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

// enters waits until the keeper has a user again: it has one at a time.
func enters(t *testing.T, sock string) (o *keptOpened) {
	t.Helper()
	require.Eventually(t, func() (in bool) {
		var err error
		o, err = dialKept(sock)
		return err == nil
	}, time.Minute, time.Millisecond)
	return o
}

func TestAKeeperHasOneUserAfterTheOther(t *testing.T) {
	sock, s, ended := aKeeper(t, time.Hour)
	for range 3 {
		o := enters(t, sock)
		_, err := dialKept(sock)
		require.True(t, notThere(err), "%v", err)
		dir, err := o.Dir(context.Background(), "vda")
		require.NoError(t, err)
		require.Equal(t, "/vda", dir)
		require.NoError(t, o.Err())
		require.NoError(t, o.Close())
	}
	o := enters(t, sock)
	require.NoError(t, o.send(question{Idle: time.Millisecond}))
	require.NoError(t, o.Close())
	over(t, ended)
	require.NoError(t, s.Err(), "it was not broken")
	_, err := dialKept(sock)
	require.True(t, notThere(err), "%v", err)
}

// TestAUserGivesUp: what hangs ends.
func TestAUserGivesUp(t *testing.T) {
	sock, s, ended := aKeeper(t, time.Hour)
	o := enters(t, sock)
	asked := make(chan error)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, err := o.Dir(ctx, "hangs")
		asked <- err
	}()
	<-s.hanging
	cancel()
	require.ErrorIs(t, <-asked, context.Canceled)
	over(t, ended)
	require.Error(t, s.Err(), "who waits for a file gets an error")
	require.NoError(t, o.Close())
	_, err := o.Dir(context.Background(), "vda")
	require.Error(t, err)
}

// TestAVolumeThatCanNotBeShown is no end of the others.
func TestAVolumeThatCanNotBeShown(t *testing.T) {
	sock, _, _ := aKeeper(t, time.Hour)
	for range 2 {
		o := enters(t, sock)
		_, err := o.Dir(context.Background(), "none")
		require.ErrorContains(t, err, "not exist")
		_, err = o.Dir(context.Background(), "vda")
		require.NoError(t, err)
		require.NoError(t, o.Close())
	}
}

// TestAKeeperOfNoUse has nobody, from the moment on that it is.
func TestAKeeperOfNoUse(t *testing.T) {
	sock, s, ended := aKeeper(t, time.Hour)
	s.Break()
	_, err := dialKept(sock)
	require.True(t, notThere(err), "%v", err)
	over(t, ended)

	sock, s, ended = aKeeper(t, time.Hour)
	o := enters(t, sock)
	s.Break()
	_, err = o.Dir(context.Background(), "vda")
	require.ErrorContains(t, err, "has ended")
	over(t, ended) // with its user still there
	require.Eventually(t, func() bool { return o.Err() != nil }, time.Minute, time.Millisecond)
	require.NoError(t, o.Close())
}

// TestAKeeperThatDoesNotAnswer is passed over.
func TestAKeeperThatDoesNotAnswer(t *testing.T) {
	dir := t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "name.1.sock"), Net: "unix"})
	require.NoError(t, err)
	defer l.Close()
	o, err := findKept(dir, "name")
	require.NoError(t, err)
	require.Nil(t, o)
}

func TestAZombieHasEnded(t *testing.T) {
	cmd := exec.Command("true")
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool { return ended(int32(cmd.Process.Pid)) }, time.Minute, time.Millisecond)
	require.NoError(t, cmd.Wait())
	require.False(t, ended(int32(os.Getpid())))
}

// TestSweep finds those that live, the longest idle first, and removes what others have left.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a.1", "b.2"} {
		f, err := lockFile(filepath.Join(dir, name+lockSuffix))
		require.NoError(t, err)
		defer f.Close()
		_, err = lockFile(f.Name())
		require.ErrorIs(t, err, syscall.EWOULDBLOCK)
	}
	require.NoError(t, os.Chtimes(filepath.Join(dir, "b.2"+lockSuffix), time.Time{}, time.Unix(1, 0)))
	for _, name := range []string{"c.3.sock", "c.3.sock.lock", "d.4.sock.lock", "lock"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "c.3.d", "vm1", "mnt"), 0o700))
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "a.1.d", "vm1", "mnt"), 0o700))
	socks, err := sweep(dir)
	require.NoError(t, err)
	require.Equal(t, []string{filepath.Join(dir, "b.2.sock"), filepath.Join(dir, "a.1.sock")}, socks)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 4, "two locks, a directory, the lock of all")
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

// TestNames: what makes another VM has another name.
func TestNames(t *testing.T) {
	name := func(p place) string {
		n, err := p.name()
		require.NoError(t, err)
		return n
	}
	p := place{Store: "s", Network: "unix", Addr: "/a", Exports: map[string]string{"vda": "web01/vda@lsn:1"}}
	one := name(p)
	require.Equal(t, one, name(p))
	q := p
	q.Store = "t"
	require.NotEqual(t, one, name(q), "another daemon on the same socket")
	t.Setenv("LIBGUESTFS_TRACE", "0")
	require.NotEqual(t, one, name(p))
}
