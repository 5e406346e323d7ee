package guestfs

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// badSector is a disk that can not be read in one place.
type badSector struct {
	image
	at int64
}

var errBadSector = errors.New("bad sector")

func (b badSector) ReadAt(p []byte, off int64) error {
	if b.at >= off && b.at < off+int64(len(p)) {
		return errBadSector
	}
	return b.image.ReadAt(p, off)
}

// TestReadAhead compares short and long reads of many readers with the disk, over more chunks than are kept, to an end that is in the midst of one; beside
// a bad sector, which is an error where it is read, and nowhere else.
func TestReadAhead(t *testing.T) {
	disk := make(image, 3*chunks*chunk/2+12345)
	fill := rand.New(rand.NewPCG(1, 2))
	for i := 0; i+8 <= len(disk); i += 512 {
		disk[i], disk[i+1], disk[i+7] = byte(fill.Uint32()), byte(i>>9), byte(i>>17)
	}
	const bad = 5*chunk + 777
	r := newReadAhead(badSector{disk, bad})
	var wg sync.WaitGroup
	for g := range uint64(8) {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(3, g))
			buf := make([]byte, 3*chunk)
			for range 3000 {
				n := 1 + rnd.IntN(9000)
				if rnd.IntN(20) == 0 {
					n = 1 + rnd.IntN(len(buf))
				}
				off := rnd.Int64N(int64(len(disk) - n + 1))
				if rnd.IntN(4) == 0 {
					off = min(4*chunk+rnd.Int64N(3*chunk), int64(len(disk)-n)) // all meet here
				}
				p := buf[:n]
				clear(p)
				err := r.ReadAt(p, off)
				if hit := bad >= off && bad < off+int64(n); hit != (err != nil) {
					t.Errorf("%d bytes at %d: %v", n, off, err)
				} else if !hit && !bytes.Equal(p, disk[off:off+int64(n)]) {
					t.Errorf("%d bytes at %d are others", n, off)
				}
			}
		})
	}
	wg.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	require.LessOrEqual(t, r.order.Len(), chunks)
	require.Len(t, r.chunks, r.order.Len())
	for e := r.order.Front(); e != nil; e = e.Next() {
		require.Zero(t, e.Value.(*readChunk).refs)
	}
}
