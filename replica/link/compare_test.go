package link

import (
	"io"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// counted counts what is read of it.
type counted struct {
	io.ReaderAt
	bytes int64
}

func (c *counted) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.ReaderAt.ReadAt(p, off)
	c.bytes += int64(n)
	return n, err
}

// TestComparison: blocks that are to be zeroes are made so, others are wanted, and a place that has none of them is not read on.
func TestComparison(t *testing.T) {
	const n = 256 // a chunk's
	disk := make([]byte, n*record.BlockSize)
	rng := rand.NewChaCha8([32]byte{3})
	_, _ = rng.Read(disk)
	for _, i := range []int{7, 8, 20} {
		clear(disk[i*record.BlockSize:][:record.BlockSize])
	}
	m := &wire.Sums{Disk: 1, Key: [32]byte{5}}
	s, err := newSummer(&m.Key)
	require.NoError(t, err)
	for b := disk; len(b) > 0; b = b[record.BlockSize:] {
		m.Sums = s.append(m.Sums, b[:record.BlockSize])
	}

	held := &memory{disk: make([]byte, len(disk))}
	_, _ = rng.Read(held.disk)
	copy(held.disk[:3*record.BlockSize], disk)
	junk := &counted{ReaderAt: &memory{disk: make([]byte, len(disk))}}
	c := comparison{backing: held, elsewhere: []*other{{r: junk}}}
	was := int64(-1)
	for range 2 * otherTried / n {
		bits := make([]byte, n/8)
		require.NoError(t, c.compareChunk(&chunk{m: m, s: s, bits: bits, end: n, bytes: int64(len(disk))}))
		require.Equal(t, disk[:3*record.BlockSize], held.disk[:3*record.BlockSize])
		for _, i := range []int{7, 8, 20} {
			require.Equal(t, zeroes[:], held.disk[i*record.BlockSize:][:record.BlockSize])
		}
		for i := range int64(n) {
			require.Equal(t, i >= 3 && i != 7 && i != 8 && i != 20, bits[i/8]&(1<<(i%8)) != 0, i)
		}
		if !c.elsewhere[0].pays() && was < 0 {
			was = junk.bytes
		}
	}
	require.Positive(t, was)
	require.Equal(t, was, junk.bytes)
	require.InDelta(t, otherTried*record.BlockSize, was, n*record.BlockSize)
}
