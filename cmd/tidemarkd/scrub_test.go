package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// spoil writes over some bytes of a file.
func spoil(t *testing.T, path string, offs ...int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	for _, off := range offs {
		_, err = f.WriteAt([]byte{1, 2, 3}, off)
		require.NoError(t, err)
	}
	require.NoError(t, f.Close())
}

// spoilAt writes over some bytes of the first file that content stands in, and returns what the file was.
func spoilAt(t *testing.T, pattern string, content []byte) (path string, was []byte) {
	t.Helper()
	files, err := filepath.Glob(pattern)
	require.NoError(t, err)
	for _, path := range files {
		was, err := os.ReadFile(path)
		require.NoError(t, err)
		if at := bytes.Index(was, content); at >= 0 {
			spoil(t, path, int64(at)+50)
			return path, was
		}
	}
	require.Fail(t, "no file has it", pattern)
	return "", nil
}

// TestScrub: what is damaged is found without being asked, and mended where another daemon has it, be it a record of the log or an original. A backing is mended when it is
// asked for. What can not be mended is said.
func TestScrub(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	rng := rand.NewChaCha8([32]byte{5})
	image, base := make([]byte, size), make([]byte, 1<<20+512)
	_, _ = rng.Read(base)
	require.NoError(t, os.WriteFile(a.path("vdb.raw"), base, 0o600))
	a.disk = ""
	a.configure("scrub: {every: 1s, rate: 1GiB}\nreplication: {name: hosta}\ngroups: {web01: {disks: {vda: {backing: %DIR/vda.raw}, vdb: {backing: %DIR/vdb.raw}}, replicas: [hostb]}}\n")
	a.stop()
	a.start()
	a.streams()
	scribble(t, a, rng, image, 200)
	a.ok("mark", "web01", "here", "--wait-replica")
	c := a.dial("web01/vdb")
	require.NoError(t, c.WriteAt(make([]byte, 300<<10), 8192, false))
	require.NoError(t, c.WriteAt(make([]byte, 512), 1<<20, false))
	require.NoError(t, c.Close())
	scribble(t, a, rng, image, 10)
	a.ok("mark", "web01", "later", "--wait-replica")
	for _, d := range []*served{a, b} {
		eventually(t, func() bool { return d.group("web01").Unapplied == 0 })
	}
	began := a.group("web01").Scrub.At
	eventually(t, func() bool { return a.group("web01").Scrub.At.After(began) })
	require.Zero(t, a.group("web01").Scrub.Damaged)

	mended := func(path string, was []byte) {
		t.Helper()
		eventually(t, func() bool {
			now, err := os.ReadFile(path)
			return err == nil && bytes.Equal(was, now)
		})
	}
	first := firstData(t, image)
	mended(spoilAt(t, a.path("state/groups/web01/log-*.seg"), image[first:first+4096]))
	mended(spoilAt(t, a.path("state/groups/web01/originals-*.seg"), base[8192:12288]))
	mended(spoilAt(t, a.path("state/groups/web01/originals-*.seg"), base[1<<20:]))
	path, was := spoilAt(t, b.path("state/groups/web01/originals-*.seg"), base[40960:45056])
	out, code := b.tidemark("verify", "web01")
	require.Equal(t, 6, code, out)
	require.Contains(t, b.ok("verify", "web01", "--repair"), "1 repaired, no damage")
	mended(path, was)
	for _, d := range []*served{a, b} {
		require.True(t, bytes.Equal(base, imageOf(t, d, "web01/vdb@here", int64(len(base)))))
	}

	overwritten, err := os.ReadFile(a.path("vdb.raw"))
	require.NoError(t, err)
	spoil(t, a.path("vda.raw"), first)
	spoil(t, a.path("vdb.raw"), 1<<20+100)
	eventually(t, func() bool { return a.group("web01").Scrub.Damaged == 2 })
	out, code = a.tidemark("verify", "web01")
	require.Equal(t, 6, code, out)
	require.Contains(t, out, "it is not what the record at LSN")
	require.Contains(t, a.ok("verify", "web01", "--repair"), "2 repaired, no damage")
	mended(a.path("vda.raw"), image)
	mended(a.path("vdb.raw"), overwritten)
	eventually(t, func() bool { return a.group("web01").Scrub.Damaged == 0 })

	b.stop()
	spoilAt(t, a.path("state/groups/web01/log-*.seg"), image[first:first+4096])
	out, code = a.tidemark("verify", "web01", "--repair")
	require.Equal(t, 6, code, out)
	require.Contains(t, out, "no answer")
	b.start()
	eventually(t, func() bool { return a.group("web01").Scrub.Damaged == 0 })

	orig, err := filepath.Glob(a.path("state/groups/web01/originals-*.seg"))
	require.NoError(t, err)
	spoil(t, orig[0], 4096+10) // a header
	eventually(t, func() bool { return a.group("web01").Scrub.Damaged > 0 })
	require.Contains(t, a.ok("status"), "places are damaged")
	require.Contains(t, a.metrics(), `tidemark_group_damaged{group="web01"} `)
	require.NotContains(t, a.metrics(), `tidemark_group_damaged{group="web01"} 0`)
	out, code = a.tidemark("verify", "web01", "--repair")
	require.Equal(t, 6, code, out)
	require.Contains(t, out, "not repaired: what is left is not kept anywhere else")

	require.Zero(t, b.group("web01").Scrub.At, "it is not due there")
}

// firstData is where the first byte stands that is not zero.
func firstData(t *testing.T, image []byte) int64 {
	t.Helper()
	i := bytes.IndexFunc(image, func(r rune) bool { return r != 0 })
	require.GreaterOrEqual(t, i, 0)
	return int64(i)
}
