package restore

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// image is a source in memory.
type image struct {
	b     []byte
	holes bool        // tell zeroes as such
	fail  atomic.Bool // reads fail
	first func()      // called before the first read
	reads atomic.Int32
}

func (m *image) Size() int64 { return int64(len(m.b)) }

func (m *image) ReadAt(p []byte, off int64) error {
	if m.reads.Add(1) == 1 && m.first != nil {
		m.first()
	}
	if m.fail.Load() {
		return syscall.EIO
	}
	copy(p, m.b[off:])
	return nil
}

func (m *image) Extents(off, n int64, fn func(n int64, zero bool)) error {
	for end := off + n; off < end; off += grain {
		k := min(grain, end-off)
		fn(k, m.holes && isZero(m.b[off:off+k]))
	}
	return nil
}

func newImage() *image {
	m := &image{b: make([]byte, 5<<20+1000)}
	for _, off := range []int{0, 1 << 20, 3<<20 + 70000, 5 << 20} {
		copy(m.b[off:], bytes.Repeat([]byte{0xaa}, 900))
	}
	return m
}

func TestRawIsWholeAndSparse(t *testing.T) {
	for _, holes := range []bool{true, false} {
		m, path := newImage(), filepath.Join(t.TempDir(), "out.raw")
		m.holes = holes
		var told atomic.Int64
		require.NoError(t, Raw(context.Background(), m, path, Options{Progress: func(n int64) { told.Add(n) }}))
		got, err := os.ReadFile(path)
		require.NoError(t, err)
		require.True(t, bytes.Equal(m.b, got))
		require.Equal(t, m.Size(), told.Load())
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.Less(t, info.Sys().(*syscall.Stat_t).Blocks*512, int64(1<<20))
	}
}

// TestRawIsCompleteOrNothing: a source that fails midway leaves what was there
// before, and nothing beside it.
func TestRawIsCompleteOrNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "out.raw")
	m := newImage()
	m.fail.Store(true)
	require.ErrorIs(t, Raw(context.Background(), m, path, Options{}), syscall.EIO)
	require.NoFileExists(t, path)
	require.NoError(t, os.WriteFile(path, []byte("before"), 0o600))
	require.ErrorIs(t, Raw(context.Background(), m, path, Options{Force: true}), syscall.EIO)
	m.fail.Store(false)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	require.ErrorIs(t, Raw(ctx, m, path, Options{Force: true}), context.Canceled)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "before", string(b))
	names, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, names, 1)

	require.ErrorIs(t, Raw(context.Background(), m, path, Options{}), fs.ErrExist)
	require.NoError(t, Raw(context.Background(), m, path, Options{Force: true}))
	require.ErrorContains(t, Raw(context.Background(), m, dir, Options{Force: true}), "not a file")
}

// TestRawReplacesNothingThatCameMeanwhile: without Force, a file that is made
// while the source is copied stays.
func TestRawReplacesNothingThatCameMeanwhile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out.raw")
	m := newImage()
	m.first = func() { require.NoError(t, os.WriteFile(path, []byte("other"), 0o600)) }
	err := Raw(context.Background(), m, path, Options{})
	require.True(t, errors.Is(err, fs.ErrExist), err)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "other", string(b))
}
