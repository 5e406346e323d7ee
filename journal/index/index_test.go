package index

import (
	"math/rand/v2"
	"slices"
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

// TestVerifyFilesFindsEveryFlippedBit flips single bits all over the files of a database.
func TestVerifyFilesFindsEveryFlippedBit(t *testing.T) {
	fs := vfs.NewMem()
	db, err := Open("index", Options{FS: fs})
	require.NoError(t, err)
	g, err := db.Group(1)
	require.NoError(t, err)
	rng := rand.New(rand.NewPCG(3, 4))
	lsn := record.LSN(0)
	for range 3 {
		b := g.NewBatch()
		var entries []Entry
		for range 3000 {
			lsn++
			entries = append(entries, Entry{Disk: 1, Unit: Unit{Index: rng.Int64N(500)}, LSN: lsn, Version: Version{File: 1, Payload: rng.Uint32(), Aux: rng.Uint32()}})
		}
		b.Set(entries)
		require.NoError(t, b.Commit(Watermark{LSN: lsn}))
		require.NoError(t, db.Flush())
	}
	require.NoError(t, g.db.Compact(t.Context(), []byte{0}, []byte{0xff}, false))
	b := g.NewBatch()
	b.Set([]Entry{{Disk: 1, LSN: lsn + 1, Version: Version{Zero: true}}})
	require.NoError(t, b.Commit(Watermark{LSN: lsn + 1}))
	require.NoError(t, db.Flush())
	damaged := func() (paths []string) {
		files, err := db.VerifyFiles(func(int64) error { return nil }, func(path string, err error) { paths = append(paths, path) })
		require.NoError(t, err)
		require.Greater(t, files, int64(3))
		return paths
	}
	require.Empty(t, damaged())
	var paths []string
	levels, err := db.db.SSTables()
	require.NoError(t, err)
	for _, table := range slices.Concat(levels...) {
		paths = append(paths, db.path(table.BackingSSTNum.String()+".sst"))
	}
	for _, prefix := range []string{"MANIFEST-", "OPTIONS-"} {
		path, _, err := db.newest(prefix)
		require.NoError(t, err)
		paths = append(paths, path)
	}
	flipped := 0
	for _, path := range paths {
		info, err := fs.Stat(path)
		require.NoError(t, err)
		t.Log(path, info.Size())
		bits := rng.Perm(int(info.Size() * 8))
		if most := 200; len(bits) > most {
			bits = bits[:most]
			for i := range 8 * 57 { // the footer
				bits = append(bits, int(info.Size()*8)-1-i)
			}
		}
		for _, bit := range bits {
			flip(t, fs, path, bit)

			require.Equal(t, []string{path}, damaged(), "bit %d of %s of %d bytes", bit, path, info.Size())
			flip(t, fs, path, bit)
			flipped++
		}
	}
	require.Greater(t, flipped, 1000)
	require.Empty(t, damaged())
	require.NoError(t, db.Close())
}

func flip(t *testing.T, fs vfs.FS, path string, bit int) {
	t.Helper()
	f, err := fs.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	var b [1]byte
	_, err = f.ReadAt(b[:], int64(bit/8))
	require.NoError(t, err)
	b[0] ^= 1 << (bit % 8)
	_, err = f.WriteAt(b[:], int64(bit/8))
	require.NoError(t, err)
	require.NoError(t, f.Close())
}
