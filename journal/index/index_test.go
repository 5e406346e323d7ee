package index

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

func openTest(t *testing.T) *Group {
	t.Helper()
	db, err := Open("index", Options{FS: vfs.NewMem()})
	require.NoError(t, err)
	g, err := db.Group(1)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, g.RetireReaders(time.Now(), 0))
		require.NoError(t, db.Close())
	})
	return g
}

// TestFindAgainstModel compares look-ups of single blocks and of runs with a
// table of all versions, on the memtable and on flushed tables.
func TestFindAgainstModel(t *testing.T) {
	g := openTest(t)
	rng := rand.New(rand.NewPCG(1, 1))
	const blocks = 700
	newest := map[record.LSN][]record.LSN{}
	cur := make([]record.LSN, blocks)
	for lsn := record.LSN(1); lsn <= 200; lsn++ {
		first := rng.Int64N(blocks)
		n := 1 + rng.Int64N(min(blocks-first, 1+rng.Int64N(600)))
		if rng.IntN(2) == 0 {
			n = 1
		}
		var entries []Entry
		Cut(first, n, func(u Unit) {
			entries = append(entries, Entry{Disk: 1, Unit: u, LSN: lsn, Version: Version{File: 1, Payload: uint32(lsn)}})
		})
		b := g.NewBatch()
		b.Set(entries)
		require.NoError(t, b.Commit(Watermark{LSN: lsn}))
		if lsn%70 == 0 {
			require.NoError(t, g.db.Flush())
		}
		for i := first; i < first+n; i++ {
			cur[i] = lsn
		}
		newest[lsn] = append([]record.LSN(nil), cur...)
	}
	r, err := g.FreshReader()
	require.NoError(t, err)
	defer r.Release()
	for range 3000 {
		lsn := 1 + record.LSN(rng.Uint64N(200))
		first := rng.Int64N(blocks)
		n := 1 + rng.Int64N(blocks-first)
		if rng.IntN(2) == 0 {
			n = 1
		}
		picks := make([]Pick, n)
		require.NoError(t, r.Find(1, first, lsn, picks))
		for i := range picks {
			want := newest[lsn][first+int64(i)]
			require.Equal(t, want != 0, picks[i].Found, "block %d at %d", first+int64(i), lsn)
			require.Equal(t, want, picks[i].LSN, "block %d at %d", first+int64(i), lsn)
		}
	}
}
