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

// asked has a peer's question about a group answered.
func (e *Endpoint) asked(ctx context.Context, c *Conn, group string, answer func(History) error) error {
	defer c.Close()
	src, err := e.Asked(c, group)
	if err != nil {
		return errors.Join(err, c.Refuse(wire.ReasonRights, err))
	}
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if err := answer(src); err != nil {
		return errors.Join(err, c.Refuse(wire.ReasonFailed, err))
	}
	return nil
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
	return c.Send(&wire.Seeded{Disk: m.Disk})
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
	return c.Send(&wire.Seeded{})
}

func answerLost(c *Conn, m *wire.AskLost, src History) error {
	at, err := src.PointWithin(m.From, m.To)
	if err != nil {
		return err
	}
	reigns := src.Reigns()
	b, err := readLost(m, src, at)
	if err != nil {
		return err
	}
	if err := c.Send(&wire.Content{LostContent: record.LostContent{At: at, Reigns: reigns, Bytes: b}}); err != nil {
		return err
	}
	return c.Send(&wire.Seeded{Disk: m.Disk})
}

// readLost has the disk in use for no longer than it is read.
func readLost(m *wire.AskLost, src History, at record.LSN) ([]byte, error) {
	v, err := src.View(m.Disk, at)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	off := m.First * record.BlockSize
	n := min(int64(m.Blocks)*record.BlockSize, v.Size()-off)
	if n <= 0 {
		return nil, fmt.Errorf("block %d: disk %d ends before it", m.First, m.Disk)
	}
	b := make([]byte, n)
	return b, v.ReadAt(b, off)
}

// ErrNoAnswer is wrapped when a peer can not be asked, or answers nothing that can be read.
var ErrNoAnswer = errors.New("no answer")

// ask asks a peer, and calls take with the answers until the last one.
func (e *Endpoint) ask(ctx context.Context, peer string, m wire.Message, take func(wire.Message) error) error {
	within, cancel := context.WithTimeout(ctx, introduceWithin)
	c, err := e.Open(within, peer, wire.RoleAsks)
	cancel()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoAnswer, err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if err := c.Send(m); err != nil {
		return fmt.Errorf("%w: %w", ErrNoAnswer, err)
	}
	for {
		got, err := c.Receive()
		if err != nil {
			return errors.Join(ctx.Err(), fmt.Errorf("%w: peer %s: %w", ErrNoAnswer, peer, err))
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

// FetchLost gets the content of blocks of a group that are lost here from a peer. It is as the peer has it: the caller checks all of it.
func (e *Endpoint) FetchLost(ctx context.Context, peer, group string, lost record.Lost) (got record.LostContent, err error) {
	came := false
	err = e.ask(ctx, peer, &wire.AskLost{Group: group, Lost: lost}, func(a wire.Message) error {
		m, ok := a.(*wire.Content)
		if !ok || came {
			return fmt.Errorf("%w: got %v, and the content of %d blocks is due", replica.ErrProtocol, a.Type(), lost.Blocks)
		}
		got, came = m.LostContent, true
		got.Bytes = bytes.Clone(got.Bytes)
		return nil
	})
	if err == nil && !came {
		err = fmt.Errorf("peer %s: %w: it answered without the content of %d blocks", peer, replica.ErrProtocol, lost.Blocks)
	}
	return got, err
}
