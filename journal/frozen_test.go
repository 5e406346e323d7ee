package journal

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

var frozenWrite = flag.String("frozen.write", "", "make a frozen sample of the present formats at this path, which must not exist")

// frozenSamples are state directories as versions of the formats left them after
// a crash: tar, gzip, base64, for the repository holds no binaries. The file "views" in each has
// the SHA-256 of each disk as of each LSN. Every later version must open all of them.
const frozenSamples = "../testdata/formats/state-*.tar.gz.base64"

var frozenGroup = GroupConfig{Name: "frozen", Disks: []DiskConfig{{Name: "a"}, {Name: "b"}}}

// frozenIn is the sample's group with its backings in a directory.
func frozenIn(dir string) []GroupConfig {
	gc := GroupConfig{Name: frozenGroup.Name}
	for _, d := range frozenGroup.Disks {
		gc.Disks = append(gc.Disks, DiskConfig{Name: d.Name, Backing: filepath.Join(dir, d.Name+".raw")})
	}
	return []GroupConfig{gc}
}

// TestFrozenFormats opens what an earlier version wrote: with its index and
// without, and at rest.
func TestFrozenFormats(t *testing.T) {
	if *frozenWrite != "" {
		writeFrozen(t, *frozenWrite)
	}
	samples, err := filepath.Glob(frozenSamples)
	require.NoError(t, err)
	require.NotEmpty(t, samples)
	for _, sample := range samples {
		t.Run(filepath.Base(sample), func(t *testing.T) { openFrozen(t, sample) })
	}
}

func openFrozen(t *testing.T, sample string) {
	for name, prepare := range map[string]func(t *testing.T, dir string){
		"recovered":  func(*testing.T, string) {},
		"lost index": func(t *testing.T, dir string) { require.NoError(t, os.RemoveAll(filepath.Join(dir, "state/index"))) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			unpackFrozen(t, sample, dir)
			prepare(t, dir)
			s, err := Open(filepath.Join(dir, "state"), frozenIn(dir), Options{SegmentSize: 64 << 10})
			require.NoError(t, err)
			g := s.Groups()[0]
			want, err := os.ReadFile(filepath.Join(dir, "views"))
			require.NoError(t, err)
			require.Equal(t, string(want), frozenViews(t, g))
			markers, err := g.Markers()
			require.NoError(t, err)
			require.Len(t, markers, 2)
			require.Equal(t, "before", markers[0].Label)
			require.Equal(t, "after", markers[1].Label)
			defs, err := g.Definitions(g.Head())
			require.NoError(t, err)
			if version := filepath.Base(sample); version >= "state-3" {
				if version >= "state-4" {
					require.Equal(t, "<older/>", string(defs[0].Content))
					require.Less(t, defs[0].Since, g.Horizon())
					defs = defs[1:]
				}
				require.Len(t, defs, 1)
				require.Equal(t, "<domain/>", string(defs[0].Content))
				require.Equal(t, record.Application, markers[1].Consistency)
				require.Equal(t, "described", markers[0].Description)
			}
			compact := slices.ContainsFunc(g.set.Files(segment.Log), (*segment.File).IsCompact)
			require.Equal(t, filepath.Base(sample) >= "state-5", compact)
			reigns := g.Reigns()
			require.Len(t, reigns, 1)
			require.EqualValues(t, 1, reigns[0].Epoch)
			require.NotEqual(t, [16]byte{}, reigns[0].ID, "two hosts' journals of older versions must not be taken for one")
			require.NoError(t, g.Sync())
			feed, err := g.Feed(g.Horizon() + 1)
			require.NoError(t, err)
			run, err := next(t, feed, 1)
			require.NoError(t, err)
			require.Equal(t, reigns, run.Reigns, "they are read from files of those versions too")
			feed.Close()
			b, err := g.Beginning(g.Horizon())
			require.NoError(t, err)
			require.Equal(t, reigns, b.Reigns)
			_, err = g.Verify(context.Background(), VerifyOptions{}, func(f Finding) { t.Errorf("%+v", f) })
			require.NoError(t, err)
			require.NoError(t, s.Close())
			s, err = Open(filepath.Join(dir, "state"), frozenIn(dir), Options{SegmentSize: 64 << 10})
			require.NoError(t, err)
			require.Equal(t, reigns, s.Groups()[0].Reigns())
			require.NoError(t, s.Close())
		})
	}
	t.Run("at rest", func(t *testing.T) {
		dir := t.TempDir()
		unpackFrozen(t, sample, dir)
		s, err := Open(filepath.Join(dir, "state"), frozenIn(dir), Options{ReadOnly: true})
		require.NoError(t, err)
		_, err = s.Groups()[0].Verify(context.Background(), VerifyOptions{}, func(f Finding) { t.Errorf("%+v", f) })
		require.NoError(t, err)
		require.NoError(t, s.Abandon())
	})
}

// frozenViews lists the checksum of each disk as of each LSN.
func frozenViews(t *testing.T, g *Group) string {
	var out bytes.Buffer
	for lsn := g.Horizon(); lsn <= g.Head(); lsn++ {
		for _, d := range g.Disks() {
			v, err := g.View(d, lsn)
			require.NoError(t, err)
			b := make([]byte, d.Size)
			require.NoError(t, v.ReadAt(b, 0, false))
			v.Close()
			fmt.Fprintf(&out, "%d %s %x\n", lsn, d.Name, sha256.Sum256(b))
		}
	}
	return out.String()
}

func unpackFrozen(t *testing.T, sample, dir string) {
	f, err := os.Open(sample)
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(base64.NewDecoder(base64.StdEncoding, f))
	require.NoError(t, err)
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			return
		}
		require.NoError(t, err)
		path := filepath.Join(dir, h.Name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		b, err := io.ReadAll(r)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(path, b, 0o600))
	}
}

// writeFrozen makes the sample: applied and unapplied records of every kind, saved overlays, originals, an index
// that lags behind the log, and a horizon above zero; then a crash.
func writeFrozen(t *testing.T, path string) {
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(1, 2))
	for i, size := range []int{40*record.BlockSize + 1000, 64 * record.BlockSize} {
		b := bytes.Repeat([]byte{byte(i + 1)}, size)
		require.NoError(t, os.WriteFile(filepath.Join(dir, frozenGroup.Disks[i].Name+".raw"), b, 0o600))
	}
	s, err := Open(filepath.Join(dir, "state"), frozenIn(dir), Options{SegmentSize: 64 << 10})
	require.NoError(t, err)
	g := s.Groups()[0]
	change := func(n int) {
		for range n {
			d := g.Disks()[rng.IntN(2)]
			ext := record.Extent{Off: rng.Int64N(d.Size - 9000), Len: 1 + rng.Int64N(9000)}
			op := Op{Disk: d, Ext: ext, Kind: record.KindWrite, Data: bytes.Repeat([]byte{byte(rng.IntN(250))}, int(ext.Len))}
			if k := rng.IntN(6); k < 2 {
				op.Kind, op.Data = []record.Kind{record.KindZero, record.KindTrim}[k], nil
			}
			require.NoError(t, g.Append([]Op{op}))
		}
	}
	_, err = g.Define("carried", []byte("<older/>"))
	require.NoError(t, err)
	change(30)
	require.NoError(t, g.Apply())
	change(20)
	require.NoError(t, g.Checkpoint())
	_, err = g.Expire(1)
	require.NoError(t, err)
	_, err = g.Mark(record.Marker{Label: "before", By: "test"})
	require.NoError(t, err)
	change(10)
	require.NoError(t, g.Apply())
	m, err := g.Cut(record.Marker{Label: "after", By: "test", Asked: record.Application})
	require.NoError(t, err)
	m.Consistency, m.Frozen = record.Application, time.Millisecond
	_, err = g.Conclude(m)
	require.NoError(t, err)
	_, err = g.Describe("before", "described")
	require.NoError(t, err)
	_, err = g.Define("vm", []byte("<domain/>"))
	require.NoError(t, err)
	_, err = g.Mark(record.Marker{Label: "deleted", By: "test"})
	require.NoError(t, err)
	_, err = g.Delete("deleted")
	require.NoError(t, err)
	change(10)
	require.NoError(t, g.closeLog())
	require.NoError(t, g.Apply())
	require.NoError(t, g.Checkpoint())
	saved, err := g.Compact()
	require.NoError(t, err)
	require.Positive(t, saved)
	change(20)
	require.NoError(t, g.Sync())
	views := frozenViews(t, g)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "views"), []byte(views), 0o600))
	require.NoError(t, s.Abandon())
	packFrozen(t, dir, path)
}

func packFrozen(t *testing.T, dir, path string) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	require.NoError(t, err)
	enc := base64.NewEncoder(base64.StdEncoding, f)
	z, err := gzip.NewWriterLevel(enc, gzip.BestCompression)
	require.NoError(t, err)
	w := tar.NewWriter(z)
	require.NoError(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(b))}); err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	}))
	require.NoError(t, w.Close())
	require.NoError(t, z.Close())
	require.NoError(t, enc.Close())
	_, err = f.WriteString("\n")
	require.NoError(t, err)
	require.NoError(t, f.Close())
}
