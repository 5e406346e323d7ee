package replica

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

func TestLag(t *testing.T) {
	at := func(s int) time.Time { return time.Unix(int64(s), 0) }
	l := NewLag(10, 1000, at(0))
	behind := func(age time.Duration, bytes int64) {
		t.Helper()
		a, b := l.Behind()
		require.Equal(t, age, a)
		require.Equal(t, bytes, b)
	}
	behind(0, 0)
	l.Look(10, 1000, at(3600)) // idle for an hour
	behind(0, 0)
	l.Look(20, 1500, at(3601))
	behind(time.Second, 500)
	l.Look(20, 1500, at(3605))
	behind(5*time.Second, 500)
	l.Look(30, 1600, at(3606))
	l.Acked(19)
	behind(6*time.Second, 600)
	l.Acked(20)
	behind(5*time.Second, 100)
	l.Acked(30)
	behind(0, 0)
	l.Acked(5)
	behind(0, 0)
}

// TestLagOverALongOutage: what it remembers is bounded, and what it says is never less than what is true, and little more.
func TestLagOverALongOutage(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	l := NewLag(0, 0, time.Unix(0, 0))
	heads := []record.LSN{0}
	for s := 1; s < 20000; s++ {
		heads = append(heads, heads[s-1]+record.LSN(rng.IntN(3)))
		l.Look(heads[s], int64(heads[s]), time.Unix(int64(s), 0))
		require.LessOrEqual(t, len(l.looks), maxLooks)
	}
	now := len(heads) - 1
	for acked := 0; acked < now; acked += 1 + rng.IntN(50) {
		l.Acked(heads[acked])
		age, bytes := l.Behind()
		newest := acked
		for newest < now && heads[newest+1] <= heads[acked] {
			newest++
		}
		if heads[acked] == heads[now] {
			continue
		}
		require.GreaterOrEqual(t, age, time.Duration(now-newest)*time.Second)
		require.LessOrEqual(t, age, time.Duration(now-newest+64)*time.Second)
		require.GreaterOrEqual(t, bytes, int64(heads[now]-heads[acked]))
	}
}
