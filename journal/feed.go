package journal

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Feed reads a group's records in their order, as they become durable: what another daemon is to keep must not be
// more than what this one will have after a crash. One goroutine uses it at a time.
//
// What it has yet to read may expire, but for what a [Hold] keeps.
type Feed struct {
	g     *Group
	next  record.LSN
	file  *segment.File // where next is, with a reference; nil: to be found
	off   int64         // of next in file
	limit record.LSN    // records from here on stand in later files
	buf   []byte
}

const (
	feedSyncLeast, feedSyncMost = 10 * time.Millisecond, 40 * time.Millisecond
	feedSyncFactor              = 3
)

// syncDelay is how long a record waits for a sync of the guest's, or of others behind it, before a Feed that waits for it asks for
// one: a guest that keeps its disk busy pays for each, and so they take a quarter of the time at most, but for feedSyncMost.
func syncDelay(took time.Duration) time.Duration {
	return min(max(feedSyncFactor*took, feedSyncLeast), feedSyncMost)
}

// Feed begins to read at an LSN that has not expired, and is not in a gap: it ends there. It may be the next one that will be.
// A *PointError says that the group has no such record.
func (g *Group) Feed(from record.LSN) (*Feed, error) {
	if from <= g.expiredTo() || g.bridged(from, from) {
		return nil, g.expired(from)
	}
	if from > g.Head()+1 {
		return nil, g.noPoint(fmt.Sprintf("lsn:%d", from), "it is newer than the head")
	}
	return &Feed{g: g, next: from}, nil
}

func (g *Group) expired(lsn record.LSN) error {
	why := "its record has expired"
	if g.bridged(lsn, lsn) {
		why = "its record never came here"
	}
	return g.noPoint(fmt.Sprintf("lsn:%d", lsn), why)
}

// Close ends the reading.
func (f *Feed) Close() {
	if f.file != nil {
		f.file.Release()
		f.file = nil
	}
}

// Next waits for records and returns those that are there, about most bytes of them, or one if that is longer.
// An error that wraps record.ErrCorrupt is of a damaged record, a *PointError says that what was to
// follow has expired; ErrFailed that the group has.
func (f *Feed) Next(ctx context.Context, most int) (record.Run, error) {
	most = max(most, 64<<10)
	durable, err := f.await(ctx)
	if err != nil {
		return record.Run{}, err
	}
	if f.next <= f.g.expiredTo() || f.g.bridged(f.next, f.next) {
		return record.Run{}, f.g.expired(f.next)
	}
	for fresh := false; ; fresh = true {
		if f.file == nil || fresh {
			if err := f.find(); err != nil {
				return record.Run{}, err
			}
		}
		run, err := f.read(min(durable, f.limit-1), most)
		if err != nil {
			return record.Run{}, fmt.Errorf("read LSN %d of group %s: %w", f.next, f.g.name, err)
		}
		if len(run.Bytes) > 0 {
			return run, nil
		}
		if fresh {
			return record.Run{}, fmt.Errorf("read LSN %d of group %s: %w: it was durable, and is not in %s", f.next, f.g.name, record.ErrCorrupt, f.file.Path)
		}
	}
}

// Digest is that of the record of an LSN, which is durable when Digest returns; zeroes if the group has no such record, or a damaged one.
func (g *Group) Digest(lsn record.LSN) (d [16]byte, err error) {
	if lsn <= g.expiredTo() || lsn > g.Head() || g.bridged(lsn, lsn) {
		return d, nil
	}
	f, err := g.Feed(lsn)
	if err != nil {
		return d, err
	}
	defer f.Close()
	run, err := f.Next(context.Background(), 0)
	var gone *PointError
	if errors.Is(err, record.ErrCorrupt) || errors.As(err, &gone) {
		return d, nil
	}
	if err != nil {
		return d, err
	}
	h, err := record.Decode(run.Bytes)
	return h.Digest(), err
}

// read reads what the present file has of the records from next to last.
func (f *Feed) read(last record.LSN, most int) (record.Run, error) {
	if len(f.buf) < most {
		f.buf = make([]byte, most)
	}
	b, next, err := f.file.ReadRun(f.buf[:most], f.off, f.next, last)
	if err != nil || len(b) == 0 {
		return record.Run{}, err
	}
	run := record.Run{First: f.next, Last: next - 1, Bytes: b, Disks: f.file.Disks, Reigns: f.g.reignsOf(f.file)}
	f.next, f.off = next, f.off+int64(len(b))
	return run, nil
}

// await returns when the next record is durable, and what is.
func (f *Feed) await(ctx context.Context) (record.LSN, error) {
	g := f.g
	for {
		appended, durable := g.moved.wait(), g.synced.wait()
		if d := g.Durable(); d >= f.next {
			return d, nil
		}
		if err := g.ended(); err != nil {
			return 0, err
		}
		if g.Head() < f.next {
			select {
			case <-appended:
			case <-ctx.Done():
				return 0, ctx.Err()
			}
			continue
		}
		age := time.NewTimer(syncDelay(time.Duration(g.syncTook.Load())))
		select {
		case <-durable:
		case <-age.C:
			if err := g.Sync(); err != nil {
				return 0, err
			}
		case <-ctx.Done():
		}
		age.Stop()
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
	}
}

// find opens the file that the next record is in, at its place.
func (f *Feed) find() error {
	f.Close()
	held, release := f.g.set.Hold(segment.Log)
	defer release()
	f.limit = record.MaxLSN
	at := -1
	for i, file := range held {
		if file.First <= f.next {
			at = i
		}
	}
	if at < 0 {
		return f.g.expired(f.next)
	}
	for _, later := range held[at+1:] {
		f.limit = min(f.limit, later.First)
	}
	file := held[at]
	f.off = file.Start()
	if f.next > file.First {
		off, err := file.Scan(f.off, func(_ int64, h record.Header) error {
			if h.LSN >= f.next {
				return segment.ErrStop
			}
			return nil
		})
		if err != nil && !errors.Is(err, segment.ErrStop) {
			return fmt.Errorf("find LSN %d of group %s: %w", f.next, f.g.name, err)
		}
		f.off = off
	}
	var err error
	if f.file, err = f.g.set.Acquire(file.Number); errors.Is(err, segment.ErrGone) {
		err = f.g.expired(f.next)
	}
	return err
}
