package main

import (
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/nbd/client"
)

func (d *served) scratches() []api.Scratch {
	d.t.Helper()
	var s api.Status
	require.NoError(d.t, json.Unmarshal([]byte(d.ok("status", "--json")), &s))
	return s.Scratches
}

// TestAScratchExport is written, survives what the daemon goes through, touches nothing else, and goes.
func TestAScratchExport(t *testing.T) {
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 100)
	d.scribble("web01/vdb", 2, 20)
	d.ok("mark", "web01", "one")
	d.scribble("web01/vda", 3, 100)
	want, wantB := d.bytesOf("web01/vda@one"), d.bytesOf("web01/vdb@one")
	live := d.bytesOf("web01/vda")
	out := d.ok("export", "web01@one", "--scratch", "--name", "test")
	require.Contains(t, out, "scratch/test/vda\tnbd+unix:///scratch%2Ftest%2Fvda?socket=")
	require.True(t, bytes.Equal(want, d.bytesOf("scratch/test/vda")))

	c := d.dial("scratch/test/vda")
	for i := range 50 {
		off := int64(i) * 1_000_003
		require.NoError(t, c.WriteAt([]byte("scratched"), off, false))
		copy(want[off:], "scratched")
	}
	require.NoError(t, c.Trim(8<<20, 5<<20))
	clear(want[8<<20 : 13<<20])
	out, code := d.tidemark("unexport", "test")
	require.Equal(t, 9, code, out)
	for _, end := range []func(){d.kill, d.stop} {
		end()
		_ = c.Close()
		d.start()
		require.True(t, bytes.Equal(want, d.bytesOf("scratch/test/vda")))
		require.True(t, bytes.Equal(wantB, d.bytesOf("scratch/test/vdb")))
	}
	require.True(t, bytes.Equal(live, d.bytesOf("web01/vda")), "the disk is what it was")
	require.NotZero(t, d.scratches()[0].Disks[0].Written)

	for _, bad := range []struct {
		code int
		args []string
	}{
		{9, []string{"export", "web01@one", "--scratch", "--name", "test"}},
		{2, []string{"export", "web01@one", "--scratch", "--name", "../x"}},
		{2, []string{"export", "web01@one", "--name", "x"}},
		{2, []string{"export", "web01", "--scratch"}},
		{4, []string{"export", "web01@none", "--scratch"}},
		{4, []string{"export", "web09@one", "--scratch"}},
		{4, []string{"export", "web01/vdz@one", "--scratch"}},
		{4, []string{"unexport", "none"}},
	} {
		out, code := d.tidemark(bad.args...)
		require.Equal(t, bad.code, code, "%v: %s", bad.args, out)
	}
	require.Len(t, d.scratches(), 1)

	c = d.dial("scratch/test/vda")
	d.ok("unexport", "test", "--force")
	require.ErrorContains(t, c.ReadAt(make([]byte, 512), 0), "thrown away")
	require.NoError(t, c.Close())
	require.Empty(t, d.scratches())
	names, err := os.ReadDir(d.path("state/scratch"))
	require.NoError(t, err)
	require.Empty(t, names)
	require.Contains(t, d.ok("export", "web01/vda@one"), "web01/vda@lsn:")
}

// guestLike writes to an export as a guest does that never gives up: what was acknowledged is in want.
type guestLike struct {
	t    *testing.T
	d    *served
	name string
	want []byte
	stop chan struct{}
	wg   sync.WaitGroup
	n    atomic.Int64
}

func (g *guestLike) run(seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 5))
	var c *client.Client
	defer func() {
		if c != nil {
			_ = c.Close()
		}
	}()
	for {
		select {
		case <-g.stop:
			return
		default:
		}
		off := rng.Int64N(int64(len(g.want)) - 70<<10)
		b := make([]byte, 1+rng.IntN(64<<10))
		for i := range b {
			b[i] = byte(int(off) + int(g.n.Load()) + i)
		}
		for { // until it is acknowledged
			var err error
			if c == nil {
				c, err = client.Dial(context.Background(), "unix", g.d.sock(), g.name, nil)
			}
			if err == nil {
				if err = c.WriteAt(b, off, false); err == nil && g.n.Load()%16 == 0 {
					err = c.Flush()
				}
			}
			if err == nil {
				break
			}
			if c != nil {
				_ = c.Close()
				c = nil
			}
			select {
			case <-g.stop:
				g.t.Error("the disk does not come back: ", err)
				return
			case <-time.After(5 * time.Millisecond):
			}
		}
		copy(g.want[off:], b)
		g.n.Add(1)
	}
}

// TestPromoteLosesNothing promotes a scratch export while its guest writes, with the daemon killed again and again
// meanwhile: every acknowledged write is in the new group's disk, and from then on history.
func TestPromoteLosesNothing(t *testing.T) {
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 600)
	d.scribble("web01/vdb", 2, 50)
	d.ok("mark", "web01", "one")
	d.ok("export", "web01@one", "--scratch", "--name", "test")
	g := &guestLike{t: t, d: d, name: "scratch/test/vda", want: d.bytesOf("scratch/test/vda"), stop: make(chan struct{})}
	g.wg.Go(func() { g.run(7) })
	ended := sync.OnceFunc(func() { close(g.stop); g.wg.Wait() })
	defer ended()
	time.Sleep(200 * time.Millisecond)
	images := d.path("images")
	d.ok("promote", "test", "--group", "web02", "--to", images)
	out, code := d.tidemark("promote", "test", "--group", "web03", "--to", d.path("other"))
	require.Equal(t, 2, code, out)
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	for range 8 {
		time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
		d.kill()
		d.start()
	}
	require.Eventually(t, func() bool {
		s := d.scratches()
		return len(s) == 1 && s[0].Promotion.Done
	}, time.Minute, 20*time.Millisecond)
	n := g.n.Load()
	d.ok("mark", "web02", "promoted")
	time.Sleep(300 * time.Millisecond)
	d.kill()
	d.start()
	time.Sleep(100 * time.Millisecond)
	ended()
	require.Greater(t, g.n.Load(), n, "the guest goes on")
	require.True(t, bytes.Equal(g.want, d.bytesOf("web02/vda")))
	require.True(t, bytes.Equal(g.want, d.bytesOf("scratch/test/vda")), "under the name that the guest knows too")
	require.True(t, bytes.Equal(d.bytesOf("web01/vdb@one"), d.bytesOf("web02/vdb")))
	require.False(t, bytes.Equal(g.want, d.bytesOf("web02/vda@promoted")), "it has a past")
	d.ok("unexport", "test")
	d.stop()
	b, err := os.ReadFile(d.path("images/vda.raw"))
	require.NoError(t, err)
	require.True(t, bytes.Equal(g.want, b), "the backing is the disk")
	d.start()
	require.True(t, bytes.Equal(g.want, d.bytesOf("web02/vda")))

	// The operator takes the group into the configuration.
	conf, err := os.ReadFile(d.path("tidemark.yaml"))
	require.NoError(t, err)
	more := "  web02:\n    disks: {vda: {backing: " + images + "/vda.raw}, vdb: {backing: " + images + "/vdb.raw}}\n"
	require.NoError(t, os.WriteFile(d.path("tidemark.yaml"), append(conf, more...), 0o600))
	require.NoError(t, os.Remove(d.path("state/promoted/web02.yaml")))
	require.NotContains(t, d.ok("reload"), "web02")
	require.True(t, bytes.Equal(g.want, d.bytesOf("web02/vda")))
}

// TestPromoteRefuses what can not come to a good end.
func TestPromoteRefuses(t *testing.T) {
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 10)
	d.ok("export", "web01/vda@latest", "--scratch", "--name", "test")
	require.NoError(t, os.Mkdir(d.path("full"), 0o700))
	require.NoError(t, os.WriteFile(d.path("full/vda.raw"), []byte("mine"), 0o600))
	for _, bad := range []struct {
		code int
		text string
		args []string
	}{
		{1, "exists", []string{"test", "--group", "web02", "--to", d.path("full")}},
		{2, "there is, or was, a group web01", []string{"test", "--group", "web01", "--to", d.path("x")}},
		{2, "not allowed", []string{"test", "--group", "a/b", "--to", d.path("x")}},
		{4, "not found", []string{"none", "--group", "web02", "--to", d.path("x")}},
		{2, "are needed", []string{"test"}},
	} {
		out, code := d.tidemark(append([]string{"promote"}, bad.args...)...)
		require.Equal(t, bad.code, code, out)
		require.Contains(t, out, bad.text)
	}
	b, err := os.ReadFile(d.path("full/vda.raw"))
	require.NoError(t, err)
	require.Equal(t, "mine", string(b))
	require.Nil(t, d.scratches()[0].Promotion)
	d.ok("promote", "test", "--group", "web02", "--to", d.path("new"), "--wait")
	require.True(t, bytes.Equal(d.bytesOf("web01/vda"), d.bytesOf("web02/vda")))
}

// TestAPromotedGroupIsAGroup like any other: nobody has its disks open but who uses them, its name can change, and what
// the promotion left is not done again.
func TestAPromotedGroupIsAGroup(t *testing.T) {
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 100)
	d.ok("export", "web01@latest", "--scratch", "--name", "test")
	d.ok("promote", "test", "--group", "web02", "--to", d.path("i"), "--wait")
	d.ok("mark", "web02", "x")
	d.ok("rollback", "web02", "--to", "x")
	// Killed between the group's file and the note that it is done.
	d.kill()
	note := d.path("state/scratch/test/scratch.json")
	b, err := os.ReadFile(note)
	require.NoError(t, err)
	require.Contains(t, string(b), `"done": true`)
	require.NoError(t, os.WriteFile(note, bytes.Replace(b, []byte(`"done": true`), []byte(`"done": false`), 1), 0o600))
	d.start()
	b, err = os.ReadFile(note)
	require.NoError(t, err)
	require.Contains(t, string(b), `"done": true`)
	d.scribble("web02/vda", 9, 100)
	want := d.bytesOf("web02/vda")
	d.stop()
	y, err := os.ReadFile(d.path("state/promoted/web02.yaml"))
	require.NoError(t, err)
	require.NoError(t, os.Remove(d.path("state/promoted/web02.yaml")))
	require.NoError(t, os.WriteFile(d.path("state/promoted/web03.yaml"), bytes.ReplaceAll(y, []byte("web02"), []byte("web03")), 0o600))
	d.start()
	require.True(t, bytes.Equal(want, d.bytesOf("web03/vda")), "the disk is what it was when it was promoted")
}

// TestABackingThatIsNotWholeIsNobodys: not by reload, not by a start with it in the configuration; and where it is not found, it is
// not made anew.
func TestABackingThatIsNotWholeIsNobodys(t *testing.T) {
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 200)
	d.ok("export", "web01/vda@latest", "--scratch", "--name", "test")
	want := d.bytesOf("scratch/test/vda")
	d.stop()
	// A promotion that broke off at its very beginning.
	note := d.path("state/scratch/test/scratch.json")
	b, err := os.ReadFile(note)
	require.NoError(t, err)
	backing := d.path("images/vda.raw")
	d.start()
	d.ok("promote", "test", "--group", "web02", "--to", d.path("images"), "--wait")
	d.stop()
	require.NoError(t, os.RemoveAll(d.path("state/promoted")))
	require.NoError(t, os.RemoveAll(d.path("state/groups/web02")))
	require.NoError(t, os.RemoveAll(d.path("images")))
	require.NoError(t, os.WriteFile(note, b, 0o600))
	d.start()
	require.Equal(t, "open "+d.path("state/scratch/test/vda.raw")+": no such file or directory", d.scratches()[0].Error, "its overlay is gone")
	d.ok("unexport", "test")

	d.ok("export", "web01/vda@latest", "--scratch", "--name", "test")
	d.stop()
	b, err = os.ReadFile(note)
	require.NoError(t, err)
	b = bytes.TrimRight(b, "\n}")
	b = append(b, (",\n\"promote\": {\"group\": \"web02\", \"backings\": {\"vda\": \"" + backing + "\"}}}\n")...)
	require.NoError(t, os.WriteFile(note, b, 0o600))
	require.NoError(t, os.Mkdir(d.path("images"), 0o700))
	d.start()
	require.Contains(t, d.scratches()[0].Error, "no such file", "the backing to be is not there, and not made")
	require.NoFileExists(t, backing)
	d.stop()
	require.NoError(t, os.WriteFile(backing, nil, 0o600))
	require.NoError(t, os.Truncate(backing, 64<<20))
	conf, err := os.ReadFile(d.path("tidemark.yaml"))
	require.NoError(t, err)
	more := "  web02:\n    disks: {vda: {backing: " + backing + "}}\n"
	require.NoError(t, os.WriteFile(d.path("tidemark.yaml"), append(conf, more...), 0o600))
	d.start()
	require.NotContains(t, d.ok("status"), "web02 ", "the group is not opened")
	require.NoError(t, os.WriteFile(d.path("tidemark.yaml"), conf, 0o600))
	require.True(t, bytes.Equal(want, d.bytesOf("web01/vda")))
}
