package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

// fallBehind has hosta's web01 shipped to hostb up to the marker "one", and go on without it until its writer has the next records no more. It
// returns what the disk was then, and what it is. Other disks come meanwhile.
func fallBehind(t *testing.T, a, b *served, rng *rand.ChaCha8, size int64, others string) (one, image []byte) {
	t.Helper()
	conf := "replication: {name: hosta, limit: 1MiB}\njournal: {limit: 8MiB, segment: 2MiB}\ngroups: {web01: {disks: {vda: {backing: %%DIR/vda.raw}%s}, replicas: [%s]}}\n"
	image = make([]byte, size)
	scribble(t, a, rng, image, 1000)
	a.replicate("")
	a.ok("mark", "web01", "one", "--wait-replica")
	one = bytes.Clone(image)
	a.stop()
	a.configure(fmt.Sprintf(conf, others, ""))
	a.start()
	acked := b.group("web01").Head
	for n := 0; n < 5 || a.group("web01").Horizon <= acked; n++ { // enough for a gap that takes a while
		scribble(t, a, rng, image, 1000)
	}
	a.ok("mark", "web01", "lost")
	scribble(t, a, rng, image, 100)
	a.stop()
	a.configure(fmt.Sprintf(conf, others, "hostb"))
	return one, image
}

// TestBehindTheHorizon: a replica that its writer has the next records for no more is brought to where the writer is, over a gap, by what differs alone, and keeps
// the history that it has, whoever is killed meanwhile.
func TestBehindTheHorizon(t *testing.T) {
	const size = 32 << 20
	a, b := hostsOf(t, size)
	rng := rand.NewChaCha8([32]byte{31})
	one, image := fallBehind(t, a, b, rng, size, "")
	head := b.group("web01").Head
	a.start()
	open := func() bool { return strings.Contains(b.ok("status"), "is the newest that can be viewed") }
	eventually(t, open)
	c := b.dial("web01/vda")
	require.Error(t, c.ReadAt(make([]byte, 4096), 0), "it is a mix")
	require.NoError(t, c.Close())
	for _, d := range []struct{ end, begin func() }{{b.kill, b.start}, {a.kill, a.start}, {b.stop, b.start}} {
		eventually(t, func() bool { return b.group("web01").Head > head })
		head = b.group("web01").Head
		require.True(t, bytes.Equal(one, imageOf(t, b, "web01/vda@latest", size)))
		require.True(t, open())
		d.end()
		d.begin()
	}
	b.kill()
	waits := make(chan int, 1)
	go func() {
		_, code := a.tidemark("mark", "web01", "on-the-way", "--wait-replica=50s")
		waits <- code
	}()
	eventually(t, func() bool { return strings.Contains(a.ok("points", "web01"), "on-the-way") })
	b.start()
	require.Equal(t, 10, <-waits, "it lies in the gap")
	a.streams()
	a.ok("mark", "web01", "two", "--wait-replica", "--pin") // what is rolled back is more than the limit
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda", size)))
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@two", size)))
	require.True(t, bytes.Equal(one, imageOf(t, b, "web01/vda@one", size)))
	require.Contains(t, a.ok("replica", "compare", "web01", "--at", "two"), "the same")
	require.Contains(t, b.ok("verify", "web01"), "no damage")
	points := b.ok("points", "web01")
	require.Contains(t, points, "before a gap")
	require.NotContains(t, points, "lost")
	out, code := b.tidemark("restore", fmt.Sprintf("web01/vda@lsn:%d", head+1), "--to", b.path("gap.raw"))
	require.NotZero(t, code)
	require.Contains(t, out, "its record never came here")

	// And is the writer, from any of it.
	a.kill()
	b.ok("failover", "web01", "--to", "one")
	require.True(t, bytes.Equal(one, imageOf(t, b, "web01/vda", size)))
	a.start()
	eventually(t, func() bool {
		g := a.group("web01")
		return g.Role == "follows" && g.Head == b.group("web01").Head
	})
	require.True(t, bytes.Equal(one, imageOf(t, a, "web01/vda", size)))
	require.True(t, bytes.Equal(image, imageOf(t, a, "web01/vda@two", size)))
}

// TestFailoverInAGap: what can be failed over to is what was there before.
func TestFailoverInAGap(t *testing.T) {
	const size = 32 << 20
	a, b := hostsOf(t, size)
	rng := rand.NewChaCha8([32]byte{32})
	one, _ := fallBehind(t, a, b, rng, size, "")
	head := b.group("web01").Head
	a.start()
	eventually(t, func() bool { return b.group("web01").Head > head })
	a.kill()
	b.ok("test-failover", "web01", "--name", "try")
	require.True(t, bytes.Equal(one, imageOf(t, b, "scratch/try/vda", size)))
	held := b.dial("scratch/try/vda")
	out, code := b.tidemark("failover", "web01")
	require.NotZero(t, code, "it may be a guest's")
	require.Contains(t, out, "scratch export try")
	require.NoError(t, held.Close())
	looks := b.dial("web01/vda@one")
	defer looks.Close()
	require.NoError(t, looks.ReadAt(make([]byte, 4096), 0))
	require.Contains(t, b.ok("failover", "web01"), fmt.Sprintf("from LSN %d on, in epoch 2", head+1))
	require.True(t, bytes.Equal(one, imageOf(t, b, "web01/vda", size)))
	require.True(t, bytes.Equal(one, imageOf(t, b, "scratch/try/vda", size)))
	require.Error(t, looks.ReadAt(make([]byte, 4096), 0), "it was cut off")
	scribble(t, b, rng, one, 100)
	b.ok("mark", "web01", "taken-over")
	b.stop()
	b.start()
	require.True(t, bytes.Equal(one, imageOf(t, b, "web01/vda@taken-over", size)))
	require.Contains(t, b.ok("verify", "web01"), "no damage")
}

// TestADiskComesInAGap: from the gap's end on, all points have it.
func TestADiskComesInAGap(t *testing.T) {
	const size = 8 << 20
	a, b := hostsOf(t, size)
	rng := rand.NewChaCha8([32]byte{34})
	other := make([]byte, size)
	_, _ = rng.Read(other)
	require.NoError(t, os.WriteFile(a.path("vdb.raw"), other, 0o600))
	one, image := fallBehind(t, a, b, rng, size, ", vdb: {backing: %DIR/vdb.raw}")
	a.start()
	a.streams()
	p, err := b.api().Points(t.Context(), "web01", api.Filter{})
	require.NoError(t, err)
	require.Len(t, p.Earlier, 1)
	at := fmt.Sprint("@lsn:", p.Horizon)
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda"+at, size)))
	require.True(t, bytes.Equal(other, imageOf(t, b, "web01/vdb"+at, size)))
	require.True(t, bytes.Equal(one, imageOf(t, b, "web01/vda@one", size)))
	b.kill()
	b.start()
	a.ok("mark", "web01", "two", "--wait-replica")
	require.Contains(t, a.ok("replica", "compare", "web01", "--at", "two"), "the same")
	require.True(t, bytes.Equal(other, imageOf(t, b, "web01/vdb@two", size)))
}

// TestAFormerWriterInAGap goes the same way as one whose group came to begin with.
func TestAFormerWriterInAGap(t *testing.T) {
	const size = 8 << 20
	a, b := hostsOf(t, size)
	rng := rand.NewChaCha8([32]byte{35})
	image := make([]byte, size)
	scribble(t, a, rng, image, 300)
	a.replicate("")
	a.ok("mark", "web01", "one", "--wait-replica")
	one := bytes.Clone(image)
	a.stop()
	b.ok("failover", "web01")
	scribble(t, b, rng, image, 100)
	b.stop()
	f, err := os.OpenFile(b.path("state/replicas/web01/vda.raw"), os.O_RDWR, 0) // a guest without Tidemark
	require.NoError(t, err)
	for off := int64(0); off < size; off += 64 << 10 {
		_, err = f.WriteAt([]byte{7}, off)
		require.NoError(t, err)
		image[off] = 7
	}
	require.NoError(t, f.Close())
	b.start()
	a.start()
	eventually(t, func() bool { return strings.Contains(a.ok("points", "web01"), "before a gap") })
	b.ok("mark", "web01", "two", "--wait-replica")
	require.True(t, bytes.Equal(image, imageOf(t, a, "web01/vda@two", size)))
	require.True(t, bytes.Equal(one, imageOf(t, a, "web01/vda@one", size)))
	require.Contains(t, a.ok("replica", "compare", "web01", "--at", "two"), "the same")
}
