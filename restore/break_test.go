package restore

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// breaking is a source that breaks off.
type breaking struct {
	b     []byte
	stop  int64 // an error from here on
	reads atomic.Int64
	hook  func(off int64)
}

func (m *breaking) Size() int64 { return int64(len(m.b)) }
func (m *breaking) ReadAt(p []byte, off int64) error {
	if m.hook != nil {
		m.hook(off)
	}
	if m.stop > 0 && off >= m.stop {
		for m.reads.Load() < m.stop>>20 {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(20 * time.Millisecond) // the spans before are written
		return errors.New("broken")
	}
	m.reads.Add(1)
	copy(p, m.b[off:])
	return nil
}
func (m *breaking) Extents(off, n int64, fn func(int64, bool)) error { fn(n, false); return nil }

func pattern(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := 0; i < n; i += 512 {
		b[i] = byte(r.Uint32()) | 1
	}
	return b
}

// kill -9 between qcow2.flush (tables are with the kernel) and the note's write.
func TestTablesAheadOfTheNote(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "q"))
	require.NoError(t, err)
	size := int64(64 << 20)
	q, err := newQCOW2(f, size, 0)
	require.NoError(t, err)
	c := func(x byte) []byte { return bytes.Repeat([]byte{x}, cluster) }
	require.NoError(t, q.WriteAt(c(1), 0))
	noted, err := q.flush() // save 1: the note has this
	require.NoError(t, err)
	require.NoError(t, q.WriteAt(c(2), 10*cluster)) // of a span that is not done
	_, err = q.flush()                              // save 2: killed before nf.write
	require.NoError(t, err)

	q, err = newQCOW2(f, size, noted)
	require.NoError(t, err)
	require.NoError(t, q.WriteAt(c(3), 20*cluster)) // another worker's span comes first
	require.NoError(t, q.WriteAt(c(2), 10*cluster))
	got := make([]byte, cluster)
	require.NoError(t, q.ReadAt(got, 20*cluster))
	require.Equal(t, byte(3), got[0], "cluster 20 has the bytes of cluster 10")
}

// A restore of B over what an unfinished restore of A left is killed before its first save: A's note stays.
func TestANoteIsOfItsOwnWork(t *testing.T) {
	for _, onto := range []bool{false, true} {
		dir := t.TempDir()
		a := &breaking{b: pattern(1, 64<<20), stop: 32 << 20}
		b := &breaking{b: pattern(2, 64<<20)}
		path := filepath.Join(dir, "img")
		ao := Options{Origin: Origin{Store: "s", Disk: "g/a", LSN: 10}}
		bo := Options{Origin: Origin{Store: "s", Disk: "g/a", LSN: 20}}
		run := func(src Source, o Options) error {
			if !onto {
				return ToFile(context.Background(), src, path, o)
			}
			f, err := OpenFile(path)
			require.NoError(t, err)
			defer f.Close()
			return Onto(context.Background(), src, f, path, filepath.Join(dir, "notes"), o)
		}
		if onto {
			require.NoError(t, os.WriteFile(path, make([]byte, 64<<20), 0o600))
		}
		require.Error(t, run(a, ao))
		// B runs; as it is in the middle (first 5 s) the process is killed: keep what is on disk then.
		snap := map[string][]byte{}
		names := []string{path, partialPath(path), notePath(path), notePathOnto(filepath.Join(dir, "notes"), path)}
		b.hook = func(off int64) {
			if off >= 60<<20 && len(snap) == 0 {
				for _, n := range names {
					if x, err := os.ReadFile(n); err == nil {
						snap[n] = x
					}
				}
			}
		}
		require.NoError(t, run(b, bo))
		for _, n := range names {
			_ = os.Remove(n)
		}
		for n, x := range snap {
			require.NoError(t, os.WriteFile(n, x, 0o600))
		}
		a.stop = 0
		require.NoError(t, run(a, ao))
		got, err := os.ReadFile(path)
		require.NoError(t, err)
		if !bytes.Equal(a.b, got) {
			i := 0
			for a.b[i] == got[i] {
				i++
			}
			t.Errorf("onto=%v: restored without an error, and wrong bytes from %d on", onto, i)
		}
	}
}

// An incremental restore breaks off; the operator restores the copy anew from an older point; then calls the first again.
func TestACopyThatWasMadeAnew(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "copy")
	one, two := pattern(1, 64<<20), pattern(2, 64<<20)
	oo := Options{Force: true, Origin: Origin{Store: "s", Disk: "g/a", LSN: 10}}
	all := func(off, n int64, fn func(int64, bool)) error { fn(n, true); return nil }
	to := Options{Changed: all, Origin: Origin{Store: "s", Disk: "g/a", LSN: 20, Since: 10}}
	onto := func(src Source) error {
		f, err := OpenFile(path)
		require.NoError(t, err)
		defer f.Close()
		return Onto(context.Background(), src, f, path, filepath.Join(dir, "notes"), to)
	}
	require.NoError(t, ToFile(context.Background(), &breaking{b: one}, path, oo))
	require.Error(t, onto(&breaking{b: two, stop: 32 << 20}))
	require.NoError(t, ToFile(context.Background(), &breaking{b: one}, path, oo)) // anew
	require.NoError(t, onto(&breaking{b: two}))
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(two, got), "wrong bytes")
}

// TestANoteIsNotBelievedBeforeItsImage: beside the note of a restore that has done nothing there may be, after a power cut, what another one left.
func TestANoteIsNotBelievedBeforeItsImage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "img")
	const size = 64 << 20
	one, other := Options{Origin: Origin{Store: "s", Disk: "g/a", LSN: 10}}, Options{Origin: Origin{Store: "s", Disk: "g/a", LSN: 20}}
	require.Error(t, ToFile(context.Background(), &breaking{b: pattern(1, size), stop: size / 2}, path, one))
	nf, err := openNote(notePath(path))
	require.NoError(t, err)
	o := other
	o.fill()
	require.NoError(t, nf.begin(o.note(path, size)))
	require.NoError(t, nf.close())
	require.NoError(t, ToFile(context.Background(), &breaking{b: make([]byte, size), stop: 2 * size}, path, other))
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(make([]byte, size), got))
}
