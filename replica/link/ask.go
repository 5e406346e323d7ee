package link

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// answer answers a peer's question.
func answer(ctx context.Context, c *Conn, m *wire.Ask, src History) error {
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	own := *m
	var err error
	if own.Disk != 0 {
		err = answerSums(c, &own, src)
	} else {
		err = answerRecords(ctx, c, &own, src)
	}
	if err != nil {
		return errors.Join(err, c.Refuse(wire.ReasonFailed, err))
	}
	return c.Send(&wire.Seeded{Disk: own.Disk})
}

func answerSums(c *Conn, m *wire.Ask, src History) error {
	v, err := src.View(m.Disk, m.First)
	if err != nil {
		return err
	}
	defer v.Close()
	s, err := newSummer(&m.Key)
	if err != nil {
		return err
	}
	var b sumsBuffer
	blocks := int64(record.Blocks(v.Size()))
	for first := int64(0); first < blocks; first += sumBlocks {
		sums, err := b.sumsOf(v, s, first, min(sumBlocks, blocks-first))
		if err != nil {
			return err
		}
		if err := c.Send(&wire.Sums{Disk: m.Disk, First: first, Key: m.Key, Sums: sums}); err != nil {
			return err
		}
	}
	return nil
}

func answerRecords(ctx context.Context, c *Conn, m *wire.Ask, src History) error {
	if m.Last < m.First || m.Last > src.Durable() {
		return fmt.Errorf("LSN %d to %d: LSN %d is the newest here", m.First, m.Last, src.Durable())
	}
	f, err := src.Feed(m.First)
	if err != nil {
		return err
	}
	defer f.Close()
	for next := m.First; next <= m.Last; {
		run, err := f.Next(ctx, runBytes)
		if err != nil {
			return err
		}
		if err := c.Send(&wire.Records{Run: run, Table: true}); err != nil {
			return err
		}
		next = run.Last + 1
	}
	return nil
}

// ask asks a peer, and calls take with the answers until the last one.
func (e *Endpoint) ask(ctx context.Context, peer string, m *wire.Ask, take func(wire.Message) error) error {
	within, cancel := context.WithTimeout(ctx, introduceWithin)
	c, err := e.Open(within, peer, wire.RoleAsks)
	cancel()
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if err := c.Send(m); err != nil {
		return err
	}
	for {
		got, err := c.Receive()
		if err != nil {
			return errors.Join(ctx.Err(), fmt.Errorf("peer %s: %w", peer, err))
		}
		switch got := got.(type) {
		case *wire.Refuse:
			return fmt.Errorf("peer %s: %w", peer, &RefusedError{got.Reason, got.Text})
		case *wire.Seeded:
			return nil
		}
		if err := take(got); err != nil {
			return fmt.Errorf("peer %s: %w", peer, err)
		}
	}
}

// Compared is what came of comparing a disk with a peer's.
type Compared struct {
	Blocks int64
	// Differing are runs of bytes, the first of them up to MaxDiffering; Blocks that differ are counted in Differ.
	Differing []record.Extent
	Differ    int64
}

// MaxDiffering bounds how many runs are told.
const MaxDiffering = 100

// Compare compares a view of a disk with what a peer has of the same disk at the same LSN, by sums under a key that is drawn for it.
func (e *Endpoint) Compare(ctx context.Context, peer, group string, disk record.DiskID, at record.LSN, v View) (got Compared, err error) {
	m := &wire.Ask{Group: group, Disk: disk, First: at, Last: at}
	if _, err := rand.Read(m.Key[:]); err != nil {
		return got, fmt.Errorf("draw a key: %w", err)
	}
	s, err := newSummer(&m.Key)
	if err != nil {
		return got, err
	}
	var b sumsBuffer
	blocks := int64(record.Blocks(v.Size()))
	err = e.ask(ctx, peer, m, func(a wire.Message) error {
		theirs, ok := a.(*wire.Sums)
		n := int64(0)
		if ok {
			n = int64(len(theirs.Sums) / wire.SumSize)
		}
		if !ok || theirs.First != got.Blocks || n == 0 || n > min(sumBlocks, blocks-got.Blocks) {
			return fmt.Errorf("%w: got %v, and sums from block %d on are due, of %d", replica.ErrProtocol, a.Type(), got.Blocks, blocks)
		}
		ours, err := b.sumsOf(v, s, got.Blocks, n)
		if err != nil {
			return err
		}
		got.compare(ours, theirs.Sums, v.Size())
		return nil
	})
	if err == nil && got.Blocks != blocks {
		err = fmt.Errorf("peer %s: its disk ends at block %d of %d", peer, got.Blocks, blocks)
	}
	return got, err
}

func (got *Compared) compare(ours, theirs []byte, size int64) {
	for ; len(ours) > 0; ours, theirs = ours[wire.SumSize:], theirs[wire.SumSize:] {
		off := got.Blocks * record.BlockSize
		got.Blocks++
		if bytes.Equal(ours[:wire.SumSize], theirs[:wire.SumSize]) {
			continue
		}
		got.Differ++
		n := min(record.BlockSize, size-off)
		if k := len(got.Differing); k > 0 && got.Differing[k-1].End() == off {
			got.Differing[k-1].Len += n
		} else if k < MaxDiffering {
			got.Differing = append(got.Differing, record.Extent{Off: off, Len: n})
		}
	}
}

// Fetch gets records of a group from a peer. Their slices are fn's until it returns.
func (e *Endpoint) Fetch(ctx context.Context, peer, group string, first, last record.LSN, fn func(record.Run) error) error {
	next := first
	return e.ask(ctx, peer, &wire.Ask{Group: group, First: first, Last: last}, func(a wire.Message) error {
		m, ok := a.(*wire.Records)
		if !ok || !m.Table || m.Run.First != next || m.Run.Last < next {
			return fmt.Errorf("%w: got %v, and records from LSN %d on are due", replica.ErrProtocol, a.Type(), next)
		}
		next = m.Run.Last + 1
		return fn(m.Run)
	})
}
