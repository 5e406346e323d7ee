package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/link"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// hostile is a peer's end in other hands.
func hostile(t *testing.T, dir, name string) *link.Endpoint {
	t.Helper()
	require.NoError(t, os.MkdirAll(dir, 0o700))
	id, err := link.LoadIdentity(dir, name, writeDurable)
	require.NoError(t, err)
	peers, err := link.LoadPeers(filepath.Join(dir, "peers.json"), nil, nil, writeDurable)
	require.NoError(t, err)
	e := &link.Endpoint{Identity: id, Peers: peers, Name: name, Build: "hostile", Log: zap.NewNop(), Offered: func(context.Context, *link.Conn, *wire.Offer) {}}
	e.Init()
	t.Cleanup(e.Shut)
	return e
}

// offerTo offers a group to a peer, and returns what that says.
func offerTo(t *testing.T, e *link.Endpoint, peer string, m *wire.Offer) (*link.Conn, wire.Message) {
	t.Helper()
	c, err := e.Open(t.Context(), peer, wire.RoleOffers)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	require.NoError(t, c.Send(m))
	got, err := c.Receive()
	require.NoError(t, err)
	return c, got
}

// until waits for what the daemon says last on a connection.
func until(t *testing.T, c *link.Conn) *wire.Refuse {
	t.Helper()
	for {
		m, err := c.Receive()
		require.NoError(t, err)
		if r, ok := m.(*wire.Refuse); ok {
			return r
		}
	}
}

// TestAPeerAndAGroupOfOnesOwn: a pattern among a peer's rights says nothing of a group that never came from it.
func TestAPeerAndAGroupOfOnesOwn(t *testing.T) {
	const size = 16 << 20
	a := &served{t: t, dir: t.TempDir()}
	listen := freePort(t)
	a.raw("vda.raw", size)
	a.disk = a.path("vda.raw")
	a.configure(fmt.Sprintf("replication: {listen: 'tcp:%s', name: hosta}\n", listen))
	a.start()
	scribble(t, a, rand.NewChaCha8([32]byte{1}), make([]byte, size), 30)
	token, err := link.ParseToken(strings.Split(a.ok("replica", "invite"), "\n")[0])
	require.NoError(t, err)
	e := hostile(t, t.TempDir(), "hostile")
	_, err = e.Join(t.Context(), listen, token, link.Peer{})
	require.NoError(t, err)
	_, got := offerTo(t, e, "hosta", &wire.Offer{Group: "web01", Head: 5, Reigns: record.Reigns{{Epoch: 9, First: 1, ID: [16]byte{9}}}})
	require.Equal(t, wire.ReasonRights, got.(*wire.Refuse).Reason)
	require.Empty(t, got.(*wire.Refuse).Reigns)
	require.Equal(t, "writes", a.group("web01").Role)

	// Nor does it make as many as it likes.
	a.configure(fmt.Sprintf("replication: {listen: 'tcp:%s', name: hosta, most_groups: 2}\n", listen))
	a.stop()
	a.start()
	var held []*link.Conn // each is about to begin
	for n := range 2 {
		c, got := offerTo(t, e, "hosta", &wire.Offer{Group: fmt.Sprint("made", n), Reigns: record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{byte(n + 1)}}}})
		require.IsType(t, &wire.Position{}, got)
		held = append(held, c)
	}
	_, got = offerTo(t, e, "hosta", &wire.Offer{Group: "made2", Reigns: record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{7}}}})
	require.Contains(t, got.(*wire.Refuse).Text, "most_groups")
	require.NoError(t, held[0].Close())
	eventually(t, func() bool {
		c, got := offerTo(t, e, "hosta", &wire.Offer{Group: "made2", Reigns: record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{7}}}})
		defer c.Close()
		_, taken := got.(*wire.Position)
		return taken
	})
}

// TestAWriterInOtherHands can not have its replica forget anything, nor leave it without an epoch to fail over with; unless who
// runs the replica says so.
func TestAWriterInOtherHands(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	image := make([]byte, size)
	a.replicate("")
	scribble(t, a, rand.NewChaCha8([32]byte{1}), image, 300)
	a.ok("mark", "web01", "one", "--wait-replica")
	a.stop()
	var note groupNote
	require.NoError(t, readNote(filepath.Join(b.path("state"), "replication/groups/web01.json"), &note))
	reigns, err := note.seen()
	require.NoError(t, err)
	e, head := hostile(t, filepath.Join(a.path("state"), "replication"), "hosta"), record.LSN(b.group("web01").Head)
	begin := &wire.Begin{Beginning: record.Beginning{At: head + 1, Time: 1, Reigns: reigns, Disks: []record.Disk{{ID: 1, Name: "vda", Size: size}}}}
	anew := &wire.Offer{Group: "web01", Head: head + 1, Horizon: head + 1, Reigns: reigns}

	// It makes the disk zeroes behind a gap, and goes away in the midst of it.
	c, got := offerTo(t, e, "hostb", anew)
	require.IsType(t, &wire.Position{}, got)
	require.NoError(t, c.Send(begin))
	require.NoError(t, c.Send(&wire.Sums{Disk: 1, Sums: make([]byte, size/4096*wire.SumSize)}))
	for _, want := got.(*wire.Want); !want; _, want = got.(*wire.Want) {
		got, err = c.Receive()
		require.NoError(t, err)
	}
	require.NoError(t, c.Close())
	require.Contains(t, b.ok("status"), "is the newest that can be viewed")
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@latest", size)))

	c, got = offerTo(t, e, "hostb", &wire.Offer{Group: "web01", Head: head + 10, Reigns: reigns.With(record.Reign{Epoch: 2, First: head - 50, ID: [16]byte{9}})})
	require.IsType(t, &wire.Position{}, got)
	require.NoError(t, c.Send(&wire.Refuse{Reason: wire.ReasonDiverged}))
	eventually(t, func() bool { return strings.Contains(b.ok("status"), "not all of the rest was written here") })
	require.EqualValues(t, head, b.group("web01").Head)
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@one", size)))

	_, got = offerTo(t, e, "hostb", &wire.Offer{Group: "web01", Head: head, Reigns: reigns.With(record.Reign{Epoch: 1 << 40, First: head + 1, ID: [16]byte{9}})})
	require.IsType(t, &wire.Refuse{}, got)

	b.ok("replica", "accept", "web01")
	c, got = offerTo(t, e, "hostb", &wire.Offer{Group: "web01", Head: head + 10, Reigns: reigns.With(record.Reign{Epoch: 2, First: head - 50, ID: [16]byte{9}})})
	require.IsType(t, &wire.Position{}, got)
	require.NoError(t, c.Send(&wire.Refuse{Reason: wire.ReasonDiverged}))
	eventually(t, func() bool { // it is closed meanwhile
		s, err := b.api().Status(t.Context())
		return err == nil && len(s.Groups) == 1 && s.Groups[0].Head == uint64(head-51)
	})
	require.NoError(t, c.Close())
	head -= 51
	begin.At, anew.Head, anew.Horizon = head+1, head+1, head+1
	b.ok("unexport", b.scratches()[0].Name)

	b.ok("replica", "accept", "web01", "--anew")
	reigns = reigns.With(record.Reign{Epoch: 3, First: head + 1, ID: [16]byte{8}})
	anew.Reigns, begin.Reigns = reigns, reigns
	c, got = offerTo(t, e, "hostb", anew)
	require.IsType(t, &wire.Position{}, got)
	require.NoError(t, c.Send(begin))
	eventually(t, func() bool { return !strings.Contains(b.ok("status"), "web01 ") })
	require.NoError(t, c.Close())
}

// TestWhereADiskComesTo: what is seeded is what is opened, wherever the configuration says that it is.
func TestWhereADiskComesTo(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	image := make([]byte, size)
	scribble(t, a, rand.NewChaCha8([32]byte{1}), image, 300)
	b.raw("mine.raw", size)
	f, err := os.OpenFile(b.path("tidemark.yaml"), os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = fmt.Fprintf(f, "groups: {web01: {received: true, disks: {vda: {backing: %s}}}}\n", b.path("mine.raw"))
	require.NoError(t, err)
	require.NoError(t, f.Close())
	b.ok("reload")
	a.replicate("")
	a.ok("mark", "web01", "one", "--wait-replica")
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@one", size)))
	require.NoFileExists(t, filepath.Join(b.path("state"), "replicas/web01/vda.raw"))
	b.stop()
	b.start()
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@one", size)))
	require.True(t, bytes.Equal(image, mustRead(t, b.path("mine.raw"))))
}

// TestAGroupThatIsClosed here is not begun over.
func TestAGroupThatIsClosed(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	image := make([]byte, size)
	rng := rand.NewChaCha8([32]byte{1})
	a.replicate("")
	scribble(t, a, rng, image, 100)
	a.ok("mark", "web01", "one", "--wait-replica")
	promoted, raw := filepath.Join(b.path("state"), "promoted/web01.yaml"), filepath.Join(b.path("state"), "replicas/web01/vda.raw")
	was := mustRead(t, promoted)
	require.NoError(t, os.Remove(promoted))
	b.ok("reload")
	before := mustRead(t, raw)
	scribble(t, a, rng, image, 100)
	eventually(t, func() bool { return strings.Contains(a.replica("web01", "hostb").Error, "is not open") })
	require.True(t, bytes.Equal(before, mustRead(t, raw)))
	require.NoFileExists(t, promoted)
	require.NoError(t, os.WriteFile(promoted, was, 0o600))
	b.ok("reload")
	a.ok("mark", "web01", "two", "--wait-replica")
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@two", size)))
}

// TestWhatWasNotedHolds: a daemon that was told of a later epoch, and died before its journal said so, takes no writes.
func TestWhatWasNotedHolds(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	a.replicate("")
	scribble(t, a, rand.NewChaCha8([32]byte{1}), make([]byte, size), 10)
	a.ok("mark", "web01", "one", "--wait-replica")
	b.kill()
	a.kill()
	var theirs groupNote
	require.NoError(t, readNote(filepath.Join(b.path("state"), "replication/groups/web01.json"), &theirs))
	id := [16]byte{9}
	require.NoError(t, writeNote(filepath.Join(a.path("state"), "replication/groups/web01.json"),
		groupNote{Version: groupNoteVersion, From: "hostb", Seen: append(theirs.Seen, reignNote{2, 12, hex.EncodeToString(id[:])})}))
	a.start()
	require.Equal(t, "follows", a.group("web01").Role)
	c := a.dial("web01/vda")
	defer c.Close()
	require.Error(t, c.WriteAt(make([]byte, 4096), 0, false))
}

// TestAScratchExportOfWhatIsDropped is in the way of that.
func TestAScratchExportOfWhatIsDropped(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	rng := rand.NewChaCha8([32]byte{2})
	image := make([]byte, size)
	scribble(t, a, rng, image, 100)
	a.replicate("")
	a.ok("mark", "web01", "common", "--wait-replica")
	b.kill()
	only := bytes.Clone(image)
	scribble(t, a, rng, only, 100)
	a.ok("mark", "web01", "only-here")
	a.ok("export", "web01@only-here", "--scratch", "--name", "keep")
	require.NoError(t, a.cmd.Process.Signal(syscall.SIGSTOP))
	b.start()
	b.ok("failover", "web01")
	require.NoError(t, a.cmd.Process.Signal(syscall.SIGCONT))
	eventually(t, func() bool { return strings.Contains(a.ok("status"), "scratch export keep stands on") })
	require.True(t, bytes.Equal(only, imageOf(t, a, "scratch/keep/vda", size)))
	a.ok("unexport", "keep")
	b.ok("mark", "web01", "on", "--wait-replica=50s")
	require.True(t, bytes.Equal(image, imageOf(t, a, "web01/vda@on", size)))
}

// TestAReplicaThatLostEverything counts as having nothing, from when that is known.
func TestAReplicaThatLostEverything(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	image := make([]byte, size)
	a.replicate(", rpo: 1s")
	scribble(t, a, rand.NewChaCha8([32]byte{1}), image, 3000)
	a.ok("mark", "web01", "one", "--wait-replica")
	b.stop()
	require.NoError(t, os.RemoveAll(filepath.Join(b.path("state"), "groups/web01")))
	require.NoError(t, os.RemoveAll(filepath.Join(b.path("state"), "replicas/web01")))
	a.configure("replication: {name: hosta, limit: 500KiB}\ngroups: {web01: {disks: {vda: {backing: %DIR/vda.raw}}, replicas: [hostb], rpo: 1s}}\n")
	a.stop()
	a.start()
	b.start()
	eventually(t, func() bool { return a.replica("web01", "hostb").State == "seeding" })
	require.Zero(t, a.replica("web01", "hostb").Acked)
	eventually(t, func() bool { return strings.Contains(strings.Join(a.group("web01").Problems, " "), "and rpo is") })
	_, code := a.tidemark("mark", "web01", "two", "--wait-replica=100ms")
	require.Equal(t, 10, code)
	a.ok("mark", "web01", "three", "--wait-replica")
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@three", size)))
}
