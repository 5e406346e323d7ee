package link

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// TestLost: what blocks held is told to who may ask, whole, up to the disk's end; or why it is not.
func TestLost(t *testing.T) {
	a, b := pairOf(t)
	b.g.begin()
	b.g.write(memBlocks)
	head := b.g.Durable()
	answers := func(asked func(c *Conn, group string) (History, error)) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.asked = asked
	}
	answers(func(c *Conn, group string) (History, error) {
		if group != "web01" || c.Peer.Name != "a" {
			return nil, errors.New("not yours")
		}
		return b.g, nil
	})
	for _, first := range []int64{0, 5, memBlocks - record.MaxLostBlocks - 3, memBlocks - 2} {
		got, err := a.FetchLost(t.Context(), "b", "web01", record.Lost{Disk: 1, First: first, Blocks: record.MaxLostBlocks, From: 1, To: head + 5})
		require.NoError(t, err)
		end := min((first+record.MaxLostBlocks)*record.BlockSize, b.g.size)
		require.Equal(t, record.LostContent{At: head, Reigns: b.g.reigns, Bytes: b.g.disk[first*record.BlockSize : end]}, got)
	}
	for what, lost := range map[string]record.Lost{
		"ends before it":             {Disk: 1, First: memBlocks, Blocks: 1, From: 1, To: head},
		"views are of the head here": {Disk: 1, Blocks: 1, From: head + 1, To: head + 5},
	} {
		_, err := a.FetchLost(t.Context(), "b", "web01", lost)
		require.ErrorContains(t, err, what)
	}
	_, err := a.FetchLost(t.Context(), "b", "db01", record.Lost{Disk: 1, Blocks: 1, From: head, To: head})
	require.ErrorContains(t, err, "not yours")
	require.NotErrorIs(t, err, ErrNoAnswer, "it may have other groups")

	answers(func(c *Conn, _ string) (History, error) { return b.g, c.Send(&wire.Content{}) })
	_, err = a.FetchLost(t.Context(), "b", "web01", record.Lost{Disk: 1, Blocks: 1, From: head, To: head})
	require.ErrorIs(t, err, replica.ErrProtocol, "one answer is due")
	answers(func(c *Conn, _ string) (History, error) { return b.g, c.Send(&wire.Seeded{Disk: 1}) })
	_, err = a.FetchLost(t.Context(), "b", "web01", record.Lost{Disk: 1, Blocks: 1, From: head, To: head})
	require.ErrorIs(t, err, replica.ErrProtocol, "none came")
	require.NotErrorIs(t, err, ErrNoAnswer)
	answers(func(c *Conn, _ string) (History, error) { return b.g, c.Close() })
	_, err = a.FetchLost(t.Context(), "b", "web01", record.Lost{Disk: 1, Blocks: 1, From: head, To: head})
	require.ErrorIs(t, err, ErrNoAnswer)
	answers(func(c *Conn, _ string) (History, error) { return b.g, c.Send(&wire.Sums{}) })
	_, err = a.FetchLost(t.Context(), "b", "web01", record.Lost{Disk: 1, Blocks: 1, From: head, To: head})
	require.ErrorIs(t, err, replica.ErrProtocol)

	b.cancel()
	b.Shut()
	<-b.done
	_, err = a.FetchLost(t.Context(), "b", "web01", record.Lost{Disk: 1, Blocks: 1, From: head, To: head})
	require.ErrorIs(t, err, ErrNoAnswer)
}
