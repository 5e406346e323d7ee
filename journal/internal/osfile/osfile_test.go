package osfile

import (
	"bytes"
	"path/filepath"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
)

// TestVectorsOfAllSizes writes more buffers than the kernel takes at once, empty ones among
// them, to a real file and to a simulated one.
func TestVectorsOfAllSizes(t *testing.T) {
	for name, open := range map[string]func() (vfs.File, error){
		"real": func() (vfs.File, error) {
			return vfs.Default.OpenReadWrite(filepath.Join(t.TempDir(), "f"), vfs.WriteCategoryUnspecified)
		},
		"simulated": func() (vfs.File, error) { return vfs.NewMem().OpenReadWrite("f", vfs.WriteCategoryUnspecified) },
	} {
		f, err := open()
		require.NoError(t, err)
		require.NoError(t, Allocate(f, 1<<20))
		var bufs [][]byte
		var want []byte
		for i := range 3000 {
			b := bytes.Repeat([]byte{byte(i)}, i%7)
			bufs, want = append(bufs, b), append(want, b...)
		}
		require.NoError(t, WriteVec(f, bufs, 123), name)
		got := make([]byte, len(want))
		require.NoError(t, ReadFull(f, got, 123, false), name)
		require.Equal(t, want, got)
		require.NoError(t, ReadFull(f, got, 123, true), "what was just written is in memory")
		require.NoError(t, Cut(f, 200))
		require.NoError(t, f.Close())
	}
}

func TestRunTellsHoles(t *testing.T) {
	f, err := vfs.Default.OpenReadWrite(filepath.Join(t.TempDir(), "f"), vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, Truncate(f, 1<<20))
	_, err = f.WriteAt(make([]byte, 4096), 512<<10)
	require.NoError(t, err)
	n, hole := Run(f, 0, 1<<20)
	require.True(t, hole)
	require.EqualValues(t, 512<<10, n)
	n, hole = Run(f, 512<<10, 1<<20)
	require.False(t, hole)
	require.EqualValues(t, 4096, n)
	require.EqualValues(t, 512<<10, Hole(f, 4096))
	require.EqualValues(t, 512<<10, Hole(f, 512<<10))
	require.EqualValues(t, 1<<20, Hole(f, 516<<10))
	require.EqualValues(t, 2<<20, Hole(f, 2<<20), "nothing is known of what is behind the end")
	ok, err := PunchHole(f, 512<<10, 4096)
	require.NoError(t, err)
	if ok {
		n, hole = Run(f, 0, 1<<20)
		require.True(t, hole)
		require.EqualValues(t, 1<<20, n)
	}
}
