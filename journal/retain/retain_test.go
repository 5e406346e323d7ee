package retain

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

func TestExpire(t *testing.T) {
	files := []File{{Last: 10, Size: 100}, {Last: 20, Size: 100}, {Last: 30, Size: 100}}
	for _, c := range []struct {
		excess       int64
		pin, applied record.LSN
		want         int
	}{
		{0, record.MaxLSN, 30, 0},
		{1, record.MaxLSN, 30, 1},
		{100, record.MaxLSN, 30, 1},
		{101, record.MaxLSN, 30, 2},
		{1000, record.MaxLSN, 30, 3},
		{1000, 20, 30, 2},            // LSN 20 is still viewable as the horizon
		{1000, 19, 30, 1},            // somebody needs all from LSN 19 on
		{1000, record.MaxLSN, 25, 2}, // the backings wait for the last
		{1000, 0, 30, 0},
	} {
		require.Equal(t, c.want, Expire(files, c.excess, c.pin, c.applied), "%+v", c)
	}
}
