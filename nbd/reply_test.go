package nbd

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/nbd/internal/proto"
)

// TestSparseRepliesInPlace: data becomes chunks where it stands, whatever of it is zeroes.
func TestSparseRepliesInPlace(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 500 {
		n := 1 + rng.IntN(5*zeroGrain)
		want := make([]byte, n)
		for i := 0; i < n; i += zeroGrain {
			if rng.IntN(2) == 0 {
				for j := range want[i:min(n, i+zeroGrain)] {
					want[i+j] = byte(rng.Uint32())
				}
			}
		}
		head := proto.StructuredSize + 8
		out := make([]byte, head+n, head+n+rng.IntN(64))
		copy(out[head:], want)
		c := &conn{sess: &session{structured: true}}
		out = c.appendSparse(out[:0], request{off: 7, n: uint32(n), cookie: 9}, out[head:head+n])
		require.True(t, bytes.Equal(want, chunksOf(t, out, 7, n)))
	}
}

// chunksOf puts together what the chunks of a reply say of n bytes at off.
func chunksOf(t *testing.T, out []byte, off uint64, n int) []byte {
	be := binary.BigEndian
	got, filled, done := bytes.Repeat([]byte{0xee}, n), 0, false
	for len(out) > 0 {
		require.False(t, done)
		require.Equal(t, proto.MagicStructuredReply, be.Uint32(out))
		done = be.Uint16(out[4:]) == proto.ReplyFlagDone
		typ, size := be.Uint16(out[6:]), int(be.Uint32(out[16:]))
		body := out[proto.StructuredSize:][:size]
		at := int(be.Uint64(body) - off)
		if typ == proto.ReplyOffsetHole {
			k := int(be.Uint32(body[8:]))
			clear(got[at:][:k])
			filled += k
		} else {
			filled += copy(got[at:], body[8:])
		}
		out = out[proto.StructuredSize+size:]
	}
	require.True(t, done)
	require.Equal(t, n, filled)
	return got
}
