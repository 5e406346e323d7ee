package record

import (
	"bytes"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestEach(t *testing.T) {
	var b []byte
	var ends []int
	for lsn := range LSN(4) {
		payload := bytes.Repeat([]byte{byte(lsn) + 1}, int(3000*lsn)+1)
		h := sample(payload)
		h.LSN = lsn
		b = append(h.Append(b), payload...)
		b = append(b, make([]byte, (Alignment-len(b)%Alignment)%Alignment)...)
		ends = append(ends, len(b))
	}
	read := func(b []byte) (n int, err error) {
		err = Each(b, func(h Header, payload []byte) error {
			require.EqualValues(t, n, h.LSN)
			require.Equal(t, bytes.Repeat([]byte{byte(n) + 1}, 3000*n+1), payload)
			n++
			return nil
		})
		return n, err
	}
	n, err := read(b)
	require.NoError(t, err)
	require.Equal(t, 4, n)
	for cut := range b {
		n, err := read(b[:cut])
		whole := 0
		for whole < len(ends) && ends[whole] <= cut {
			whole++
		}
		require.Equal(t, whole, n)
		if cut > 0 && (whole == 0 || ends[whole-1] != cut) {
			require.ErrorIs(t, err, ErrCorrupt)
		} else {
			require.NoError(t, err)
		}
	}
	b[ends[1]-20] ^= 4
	n, err = read(b)
	require.Equal(t, 1, n)
	require.ErrorIs(t, err, ErrCorrupt)
	stop := errors.New("stop")
	require.ErrorIs(t, Each(b, func(Header, []byte) error { return stop }), stop)
}
