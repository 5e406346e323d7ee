package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/wan"
)

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// hostsOf are a daemon hosta that has web01, and one hostb that it is shipped to.
func hostsOf(t *testing.T, size int64) (a, b *served) {
	t.Helper()
	a, b = &served{t: t, dir: t.TempDir()}, &served{t: t, dir: t.TempDir()}
	pairUp(t, size, a, b, freePort(t))
	return a, b
}

// pairUp starts both and has hosta join hostb.
func pairUp(t *testing.T, size int64, a, b *served, listen string) {
	t.Helper()
	b.configure(fmt.Sprintf("replication: {listen: 'tcp:%s', name: hostb}\n", listen))
	b.start()
	a.raw("vda.raw", size)
	a.disk = a.path("vda.raw")
	a.configure("replication: {name: hosta}\n")
	a.start()
	token := strings.TrimSpace(b.ok("replica", "invite"))
	token = strings.Split(token, "\n")[0]
	require.Contains(t, a.ok("replica", "join", listen, token), "hostb is a peer")
}

// replicate has hosta ship web01 to hostb, and returns when that has begun with it: what is marked from then on has its label there too.
func (d *served) replicate(rest string) {
	d.t.Helper()
	d.ship(rest)
	d.streams()
}

// streams returns when hosta's web01 has got to hostb, but for what comes.
func (d *served) streams() {
	d.t.Helper()
	eventually(d.t, func() bool { return d.replica("web01", "hostb").State == "streaming" })
}

// ship has hosta begin to ship web01 to hostb.
func (d *served) ship(rest string) {
	d.t.Helper()
	d.disk = "" // the file has it
	d.configure(fmt.Sprintf("replication: {name: hosta}\ngroups: {web01: {disks: {vda: {backing: %s}}, replicas: [hostb]%s}}\n", d.path("vda.raw"), rest))
	d.stop()
	d.start()
}

// scribble writes random blocks, and returns the disk as it is.
func scribble(t *testing.T, d *served, rng *rand.ChaCha8, image []byte, n int) {
	t.Helper()
	c := d.dial("web01/vda")
	defer c.Close()
	b := make([]byte, 4096)
	for range n {
		_, _ = rng.Read(b)
		off := int64(rng.Uint64()%uint64(len(image)/4096)) * 4096
		require.NoError(t, c.WriteAt(b, off, false))
		copy(image[off:], b)
	}
	require.NoError(t, c.Flush())
}

func imageOf(t *testing.T, d *served, export string, size int64) []byte {
	t.Helper()
	c := d.dial(export)
	defer c.Close()
	b := make([]byte, size)
	for off := int64(0); off < size; off += 1 << 20 {
		require.NoError(t, c.ReadAt(b[off:min(off+1<<20, size)], off))
	}
	return b
}

// replica is how far a group is at a peer; zero if it is not shipped there.
func (d *served) replica(group, peer string) (r api.Replica) {
	s, err := d.api().Status(d.t.Context())
	if err != nil {
		return r
	}
	for _, g := range s.Groups {
		for _, one := range g.Replicas {
			if g.Name == group && one.Peer == peer {
				return one
			}
		}
	}
	return r
}

func eventually(t *testing.T, what func() bool, args ...any) {
	t.Helper()
	require.Eventually(t, what, 60*time.Second, 20*time.Millisecond, args...)
}

// TestReplication: a group is seeded and shipped, read and restored at its replica, taken over there, and the daemon that wrote it before
// is refused.
func TestReplication(t *testing.T) {
	const size = 64 << 20
	a, b := hostsOf(t, size)
	rng := rand.NewChaCha8([32]byte{1})
	image := make([]byte, size)
	scribble(t, a, rng, image, 500)
	a.ok("mark", "web01", "before")
	a.replicate("")
	a.ok("mark", "web01", "shipped", "--wait-replica")
	atShipped := bytes.Clone(image)
	scribble(t, a, rng, image, 300)
	a.ok("mark", "web01", "later", "--wait-replica")

	// Everything from the replica.
	require.True(t, bytes.Equal(atShipped, imageOf(t, b, "web01/vda@shipped", size)))
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@later", size)))
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda", size)))
	b.ok("restore", "web01/vda@shipped", "--to", b.path("restored.raw"))
	require.True(t, bytes.Equal(atShipped, mustRead(t, b.path("restored.raw"))))
	ro := b.dial("web01/vda")
	require.Error(t, ro.WriteAt(make([]byte, 4096), 0, false), "nobody but its writer writes it")
	require.NoError(t, ro.Close())
	require.Contains(t, b.ok("points", "web01"), "later")
	require.Contains(t, b.ok("verify", "web01"), "no damage")
	g := b.group("web01")
	require.Equal(t, "follows", g.Role)
	require.Equal(t, "hosta", g.Source.Peer)
	_, code := b.tidemark("mark", "web01", "here")
	require.NotZero(t, code, "a follower takes no markers of its own")
	s := a.group("web01").Replicas[0]
	require.Equal(t, "streaming", s.State)

	// Either side is killed.
	b.kill()
	scribble(t, a, rng, image, 200)
	_, code = a.tidemark("mark", "web01", "alone", "--wait-replica=200ms")
	require.Equal(t, 10, code)
	b.start()
	a.ok("mark", "web01", "again", "--wait-replica")
	a.kill()
	a.start()
	scribble(t, a, rng, image, 200)
	a.ok("mark", "web01", "last", "--wait-replica")
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@last", size)))

	// Failover, while the writer is away.
	a.kill()
	require.Contains(t, b.ok("failover", "web01"), "in epoch 2")
	require.Equal(t, "writes", b.group("web01").Role)
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda", size)))
	scribble(t, b, rng, image, 100)
	b.ok("mark", "web01", "taken-over")

	// The one that comes back is refused, and follows.
	a.start()
	eventually(t, func() bool { return a.group("web01").Role == "follows" })
	eventually(t, func() bool { return a.group("web01").Head == b.group("web01").Head })
	require.True(t, bytes.Equal(image, imageOf(t, a, "web01/vda@taken-over", size)))

	// And takes over again, with nothing lost.
	scribble(t, b, rng, image, 100)
	require.Contains(t, a.ok("failback", "web01"), "in epoch 3")
	require.True(t, bytes.Equal(image, imageOf(t, a, "web01/vda", size)))
	scribble(t, a, rng, image, 100)
	eventually(t, func() bool {
		return b.group("web01").Role == "follows" && b.group("web01").Head == a.group("web01").Head
	})
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda", size)))
	a.stop()
	b.stop()
	require.True(t, bytes.Equal(image, mustRead(t, a.path("vda.raw"))))
	require.True(t, bytes.Equal(image, mustRead(t, filepath.Join(b.path("state"), "replicas/web01/vda.raw"))))
}

func mustRead(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// TestDivergence: both daemons wrote the group, of which one did not know yet that the other had taken it over. It goes back to what they have in
// common, keeps what only it has, follows, and takes over again.
func TestDivergence(t *testing.T) {
	const size = 64 << 20
	a, b := hostsOf(t, size)
	rng := rand.NewChaCha8([32]byte{2})
	image := make([]byte, size)
	scribble(t, a, rng, image, 300)
	a.replicate("")
	a.ok("mark", "web01", "common", "--wait-replica")
	common := bytes.Clone(image)
	b.kill()
	only := bytes.Clone(image)
	scribble(t, a, rng, only, 400)
	a.ok("mark", "web01", "only-here")
	held := a.dial("web01/vda") // the guest runs on
	defer held.Close()
	scratch := strings.Fields(a.ok("export", "web01@common", "--scratch", "--name", "keep"))
	require.NotEmpty(t, scratch)

	require.NoError(t, a.cmd.Process.Signal(syscall.SIGSTOP)) // else it may get there first
	b.start()
	b.ok("failover", "web01")
	require.NoError(t, a.cmd.Process.Signal(syscall.SIGCONT))
	eventually(t, func() bool { return a.group("web01").Role == "follows" })
	require.Error(t, held.WriteAt(make([]byte, 4096), 0, false), "its guest is cut off")
	scribble(t, b, rng, image, 200)
	b.ok("mark", "web01", "taken-over", "--wait-replica")

	g := a.group("web01")
	require.Equal(t, b.group("web01").Head, g.Head)
	require.True(t, bytes.Equal(image, imageOf(t, a, "web01/vda", size)))
	require.True(t, bytes.Equal(common, imageOf(t, a, "web01/vda@common", size)), "history before stays whole")
	_, code := a.tidemark("points", "web01", "--label", "only-here")
	require.Zero(t, code)
	require.NotContains(t, a.ok("points", "web01"), "only-here")
	require.Contains(t, a.ok("verify", "web01"), "no damage")

	s, err := a.api().Status(t.Context())
	require.NoError(t, err)
	require.Len(t, s.Scratches, 2)
	for _, one := range s.Scratches {
		if one.Name == "keep" {
			require.True(t, bytes.Equal(common, imageOf(t, a, "scratch/keep/vda", size)))
			continue
		}
		require.EqualValues(t, 1, one.Branch.Epoch)
		require.True(t, bytes.Equal(only, imageOf(t, a, "scratch/"+one.Name+"/vda", size)), "what only it had written is kept")
	}
	require.Less(t, g.Source.ReceivedBytes, int64(300*4200+64<<10), "what both have is not sent again")

	a.kill()
	a.start()
	eventually(t, func() bool {
		return a.group("web01").Source.State == "connected" && a.group("web01").Head == b.group("web01").Head
	})
	a.ok("failback", "web01")
	require.True(t, bytes.Equal(image, imageOf(t, a, "web01/vda", size)))
	scribble(t, a, rng, image, 50)
	eventually(t, func() bool {
		return b.group("web01").Role == "follows" && b.group("web01").Head == a.group("web01").Head
	})
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda", size)))
}

// TestRepairAndCompare: damaged records come from the other daemon, on either side, and views are proved to be the same.
func TestRepairAndCompare(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	rng := rand.NewChaCha8([32]byte{3})
	image := make([]byte, size)
	a.replicate("")
	scribble(t, a, rng, image, 200)
	a.ok("mark", "web01", "here", "--wait-replica")
	for _, d := range []*served{a, b} {
		require.Contains(t, d.ok("replica", "compare", "web01", "--at", "here"), "the same")
		require.Contains(t, d.ok("test-failover", "web01", "--name", "try"), "ready after")
		require.True(t, bytes.Equal(image, imageOf(t, d, "scratch/try/vda", size)))
		d.ok("unexport", "try")
		eventually(t, func() bool { return d.group("web01").Unapplied == 0 }) // else the group fails at what is damaged
		log, err := filepath.Glob(filepath.Join(d.path("state"), "groups/web01/log-*.seg"))
		require.NoError(t, err)
		f, err := os.OpenFile(log[0], os.O_RDWR, 0)
		require.NoError(t, err)
		for _, off := range []int64{20000, 100_000, 300_000} {
			_, err = f.WriteAt([]byte{1, 2, 3}, off)
			require.NoError(t, err)
		}
		require.NoError(t, f.Close())
		out, code := d.tidemark("verify", "web01")
		require.Equal(t, 6, code, out)
		require.Contains(t, d.ok("verify", "web01", "--repair"), "repaired, no damage")
		require.True(t, bytes.Equal(image, imageOf(t, d, "web01/vda@here", size)))
	}
	_, code := b.tidemark("replica", "compare", "web01", "--peer", "nobody")
	require.NotZero(t, code)

	// A backing that was changed behind the replica's back.
	b.stop()
	raw := filepath.Join(b.path("state"), "replicas/web01/vda.raw")
	f, err := os.OpenFile(raw, os.O_RDWR, 0)
	require.NoError(t, err)
	info, err := f.Stat()
	require.NoError(t, err)
	_, err = f.WriteAt([]byte{9}, size-1)
	require.NoError(t, err)
	require.NoError(t, os.Chtimes(raw, info.ModTime(), info.ModTime())) // so that it is not noticed
	require.NoError(t, f.Close())
	b.start()
	require.Equal(t, "active", b.group("web01").State)
	out, code := b.tidemark("replica", "compare", "web01", "--at", "here")
	require.Equal(t, 6, code, out)
	require.Contains(t, out, "1 blocks differ")
}

// TestABadLink: over a long way that loses packets, is cut in the midst of records, and while either side is killed, nothing is lost, and
// nothing is other than it was.
func TestABadLink(t *testing.T) {
	needRoot(t)
	need(t, "ip")
	const size = 32 << 20
	link, err := wan.New("tmdtest", wan.Shape{Rate: 100_000_000, Delay: 15 * time.Millisecond, Loss: 0.01})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, link.Close()) })
	a, b := &served{t: t, dir: t.TempDir(), wrap: link.Prefix(0)}, &served{t: t, dir: t.TempDir(), wrap: link.Prefix(1)}
	t.Cleanup(func() { // before the link goes
		_ = a.cmd.Process.Kill()
		_ = b.cmd.Process.Kill()
	})
	pairUp(t, size, a, b, wan.AddressB+":10900")
	rng := rand.NewChaCha8([32]byte{7})
	image := make([]byte, size)
	scribble(t, a, rng, image, 2000)
	a.ship("")
	points := map[string][]byte{}
	for n := range 6 {
		scribble(t, a, rng, image, 400)
		switch n {
		case 1, 3: // for less than a stream waits, and in the midst of what is under way
			link.Cut(true)
			time.Sleep(700 * time.Millisecond)
			link.Cut(false)
		case 2:
			b.kill()
			b.start()
		case 4:
			a.kill()
			a.start()
		}
		label := fmt.Sprint("point-", n)
		a.ok("mark", "web01", label)
		points[label] = bytes.Clone(image)
	}
	a.streams()
	a.ok("mark", "web01", "end", "--wait-replica=50s")
	seen := 0
	for label, want := range points {
		if _, code := b.tidemark("points", "web01", "--label", label); code == 0 && strings.Contains(b.ok("points", "web01"), label) {
			require.True(t, bytes.Equal(want, imageOf(t, b, "web01/vda@"+label, size)), label)
			seen++
		}
	}
	require.Positive(t, seen)
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@end", size)))
	require.Contains(t, a.ok("replica", "compare", "web01", "--at", "end"), "the same")
	require.Contains(t, b.ok("verify", "web01"), "no damage")
}

// TestAFullReplica: the replica's file system has no room. The guest does not notice, and what it wrote gets there when there is room.
func TestAFullReplica(t *testing.T) {
	needRoot(t)
	const size = 256 << 20
	a, b := &served{t: t, dir: t.TempDir()}, &served{t: t, dir: t.TempDir()}
	require.NoError(t, os.Mkdir(b.path("state"), 0o700))
	tool(t, "mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", b.path("state"))
	t.Cleanup(func() {
		_ = b.cmd.Process.Kill()
		_ = b.cmd.Wait()
		tool(t, "umount", b.path("state"))
	})
	pairUp(t, size, a, b, freePort(t))
	a.replicate("")
	rng := rand.NewChaCha8([32]byte{8})
	image := make([]byte, size)
	scribble(t, a, rng, image, 100)
	a.ok("mark", "web01", "begun", "--wait-replica")
	began := time.Now()
	scribble(t, a, rng, image, 40000)
	t.Logf("160 MB were written in %v", time.Since(began))
	eventually(t, func() bool { return b.group("web01").State != "active" || a.replica("web01", "hostb").Error != "" })
	require.Equal(t, "active", a.group("web01").State)
	tool(t, "mount", "-o", "remount,size=1g", b.path("state"))
	a.ok("mark", "web01", "room", "--wait-replica=55s")
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@room", size)))
}
