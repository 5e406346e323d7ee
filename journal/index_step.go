package journal

import (
	"fmt"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Index commits every durable record to the index. The index never holds a
// record that is not durable: after a crash it would name bytes that are gone.
func (g *Group) Index() error {
	g.index.Lock()
	defer g.index.Unlock()
	g.append.Lock()
	ready := g.append.ready
	g.append.ready = nil
	g.append.Unlock()
	if len(ready) == 0 {
		return nil
	}
	n, err := g.commitPending(ready)
	if err != nil {
		return g.fail(err)
	}
	g.append.Lock()
	g.append.lag -= n
	g.append.room.Broadcast()
	g.append.Unlock()
	g.indexed.Store(uint64(ready[len(ready)-1].last))
	return nil
}

// commitPending commits runs of records together, and returns how many
// versions they are. g.index is held.
func (g *Group) commitPending(ready []*pending) (n int, err error) {
	mark := g.index.mark
	last := ready[len(ready)-1].last
	for _, p := range ready {
		n += len(p.entries)
	}
	if last <= mark.LSN {
		if n > 0 {
			return 0, fmt.Errorf("%d versions up to LSN %d are new to an index that has all up to LSN %d", n, last, mark.LSN)
		}
		return 0, nil // a sync of nothing new
	}
	b := g.ix.NewBatch()
	for _, p := range ready {
		b.Set(p.entries)
		for _, t := range p.times {
			if err := b.AddTime(t.Time, t.LSN, t.File, t.Off); err != nil {
				return 0, err
			}
			mark.LastTime = t.Time
		}
		for _, m := range p.markers {
			if err := b.ChangeMarker(m); err != nil {
				return 0, err
			}
		}
		for _, d := range p.definitions {
			if err := b.SetDefinition(d); err != nil {
				return 0, err
			}
		}
	}
	mark.LSN = last
	if err := b.Commit(mark); err != nil {
		return 0, fmt.Errorf("index %d versions up to LSN %d: %w", n, last, err)
	}
	g.index.mark = mark
	return n, nil
}

// indexTo makes the index complete to an LSN at least.
func (g *Group) indexTo(lsn record.LSN) error {
	if record.LSN(g.indexed.Load()) >= lsn {
		return nil
	}
	if err := g.syncTo(lsn); err != nil {
		return err
	}
	return g.Index()
}

// commit commits a batch of what g.apply guards, which is held, or nobody else
// has the group yet; the originals that the batch names are durable. While others are on their
// way, the mark stays before them.
func (g *Group) commit(b *index.Batch) error {
	g.index.Lock()
	defer g.index.Unlock()
	if f := g.apply.orig.Current(); f != nil && len(g.apply.pending) == 0 {
		g.index.mark.OrigFile, g.index.mark.OrigOff = f.Number, uint32(g.apply.orig.Tail())
	}
	return b.Commit(g.index.mark)
}

// setState commits one value of the group's state, as commit does.
func (g *Group) setState(name string, value []byte) error {
	b := g.ix.NewBatch()
	if err := b.SetState(name, value); err != nil {
		return err
	}
	return g.commit(b)
}
