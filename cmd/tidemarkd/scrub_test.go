package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// damage writes over some bytes of a file.
func damage(t *testing.T, path string, offs ...int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	for _, off := range offs {
		_, err = f.WriteAt([]byte{1, 2, 3}, off)
		require.NoError(t, err)
	}
	require.NoError(t, f.Close())
}

// TestScrub: what is damaged is found without being asked, and mended where there is something to mend it with: a record by the other daemon's. What can not be
// mended, an original or a block of a backing, is said.
func TestScrub(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	rng := rand.NewChaCha8([32]byte{5})
	image := make([]byte, size)
	a.replicate("")
	a.configure(fmt.Sprintf("scrub: {every: 1s, rate: 1GiB}\nreplication: {name: hosta}\ngroups: {web01: {disks: {vda: {backing: %s}}, replicas: [hostb]}}\n", a.path("vda.raw")))
	a.stop()
	a.start()
	a.streams()
	scribble(t, a, rng, image, 200)
	a.ok("mark", "web01", "here", "--wait-replica")
	scribble(t, a, rng, image, 10)
	eventually(t, func() bool { return a.group("web01").Unapplied == 0 })
	began := a.group("web01").Scrub.At
	eventually(t, func() bool { return a.group("web01").Scrub.At.After(began) })
	require.Zero(t, a.group("web01").Scrub.Damaged)

	log, err := filepath.Glob(filepath.Join(a.path("state"), "groups/web01/log-*.seg"))
	require.NoError(t, err)
	var large string
	for _, name := range log {
		if info, err := os.Stat(name); err == nil && info.Size() > 400_000 {
			large = name // the one that has the records
			break
		}
	}
	mended := func(path string, offs ...int64) {
		t.Helper()
		before, err := os.ReadFile(path)
		require.NoError(t, err)
		damage(t, path, offs...)
		eventually(t, func() bool {
			now, err := os.ReadFile(path)
			return err == nil && bytes.Equal(before, now)
		})
	}
	mended(large, 20000, 300_000)
	damage(t, a.path("vda.raw"), firstData(t, image))
	eventually(t, func() bool { return a.group("web01").Scrub.Damaged == 1 })
	out, code := a.tidemark("verify", "web01")
	require.Equal(t, 6, code, out)
	require.Contains(t, out, "it is not what the record at LSN")
	restore, err := os.OpenFile(a.path("vda.raw"), os.O_RDWR, 0)
	require.NoError(t, err)
	_, err = restore.WriteAt(image, 0)
	require.NoError(t, errors.Join(err, restore.Close()))
	eventually(t, func() bool { return a.group("web01").Scrub.Damaged == 0 })

	orig, err := filepath.Glob(filepath.Join(a.path("state"), "groups/web01/originals-*.seg"))
	require.NoError(t, err)
	damage(t, orig[0], 4096+100)
	eventually(t, func() bool { return a.group("web01").Scrub.Damaged > 0 })
	require.Contains(t, a.ok("status"), "places are damaged")
	require.Contains(t, a.metrics(), `tidemark_group_damaged{group="web01"} `)
	require.NotContains(t, a.metrics(), `tidemark_group_damaged{group="web01"} 0`)

	require.Zero(t, b.group("web01").Scrub.At, "it is not due there")
}

// firstData is where the first byte stands that is not zero.
func firstData(t *testing.T, image []byte) int64 {
	t.Helper()
	i := bytes.IndexFunc(image, func(r rune) bool { return r != 0 })
	require.GreaterOrEqual(t, i, 0)
	return int64(i)
}
