package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/link"
)

// TestRepairsEnd: a repair of a backing that somebody goes on writing past the daemon comes to an end, and says that there is damage.
func TestRepairsEnd(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "d.raw")
	require.NoError(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	s, err := journal.Open(filepath.Join(dir, "state"), []journal.GroupConfig{{Name: "g", Disks: []journal.DiskConfig{{Name: "d", Backing: path}}}}, journal.Options{SegmentSize: 4 << 20})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Abandon()) }()
	g := s.Groups()[0]
	require.NoError(t, g.Append([]journal.Op{{Kind: record.KindWrite, Disk: g.Disks()[0], Ext: record.Extent{Len: 1 << 20}, Data: bytes.Repeat([]byte{1}, 1<<20)}}))
	require.NoError(t, g.Sync())
	require.NoError(t, g.Apply())
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	write := func(i int) {
		_, err := f.WriteAt([]byte{byte(i) | 2}, int64(i%256)*4096+7)
		require.NoError(t, err)
	}
	write(0)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
				write(i)
			}
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := &control{replication: &replication{}}
	v, err := c.repaired(ctx, g)
	close(done)
	<-ended
	require.NoError(t, err)
	require.Positive(t, v.Repaired)
	require.LessOrEqual(t, v.Repaired, int64(256), "each block is mended once")
	v, err = c.repaired(ctx, g)
	require.NoError(t, err)
	require.Zero(t, v.Damaged)
}

// TestDamage: of what a verification finds, there is so much to be mended in a round, the rest in the next ones, and nothing in two.
func TestDamage(t *testing.T) {
	d := newDamage(false)
	gap := journal.Finding{Where: "x", LSN: 10, Last: 10 + 2*api.MaxFindings}
	d.add(gap)
	require.Len(t, d.records, api.MaxFindings)
	require.True(t, d.some())
	require.False(t, d.more)
	later := journal.Finding{Where: "y", LSN: 5000, Last: 5000}
	d.add(later)
	require.True(t, d.more)
	d.add(journal.Finding{Where: "index"})
	require.Equal(t, 3, d.found)
	d = d.next()
	d.add(gap)
	require.False(t, d.some(), "it was tried")
	d.add(later)
	require.Equal(t, []record.LSN{5000}, d.records)
	require.False(t, d.more)
}

// TestMender: every peer is asked until one has it, and one that does not answer never again.
func TestMender(t *testing.T) {
	m := mender{peers: []string{"silent", "damaged", "whole"}}
	asked := map[string]int{}
	for i := range 3 {
		m.try(t.Context(), func(_ context.Context, peer string) error {
			asked[peer]++
			switch peer {
			case "silent":
				return fmt.Errorf("%w: it is off", link.ErrNoAnswer)
			case "damaged":
				return record.ErrCorrupt
			}
			return nil
		})
		require.Equal(t, map[string]int{"silent": 1, "damaged": i + 1, "whole": i + 1}, asked)
	}
	require.Empty(t, m.why)
	for range 2 * mostReasons {
		m.try(t.Context(), func(context.Context, string) error { return record.ErrCorrupt })
	}
	require.Len(t, m.why, mostReasons)
	m.try(t.Context(), func(context.Context, string) error { return journal.ErrFailed })
	require.Empty(t, m.peers, "nothing can be written here")
}
