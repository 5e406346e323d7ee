package journal

import (
	"errors"
	"fmt"
	"slices"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Beginning is what a group that is to follow this one from an LSN of the window on begins with, beside the disks'
// content: their views as of that LSN.
func (g *Group) Beginning(at record.LSN) (b record.Beginning, err error) {
	b.At = at
	if err := g.pinFrom(at); err != nil {
		return b, err
	}
	defer g.unpinFrom(at)
	if err := g.syncTo(at); err != nil {
		return b, err
	}
	files, release := g.set.Hold(segment.Log)
	defer release()
	i := slices.IndexFunc(files, func(f *segment.File) bool { return f.First > at+1 })
	if i < 0 {
		i = len(files)
	}
	if i == 0 {
		return b, g.expired(at + 1)
	}
	b.Disks, b.Reigns = files[i-1].Disks, g.reignsOf(files[i-1])
	// No record is older than the head of its file.
	for i--; i > 0 && files[i].First > at && files[i-1].First > g.expiredTo(); i-- {
	}
	b.Time = files[i].Created
	_, err = files[i].Scan(files[i].Start(), func(_ int64, h record.Header) error {
		if h.LSN <= at || h.Time < b.Time { // notes of older programs could be older than their file
			b.Time = h.Time
		}
		if h.LSN >= at {
			return segment.ErrStop // what stands behind it may be torn
		}
		return nil
	})
	if err != nil && !errors.Is(err, segment.ErrStop) {
		return b, fmt.Errorf("find the time of LSN %d of group %s: %w", at, g.name, err)
	}
	markers, err := g.Markers()
	if err != nil {
		return b, err
	}
	for _, m := range markers {
		if m.Pinned && m.LSN <= at {
			b.Pinned = append(b.Pinned, m.LSN)
		}
	}
	b.Definitions, err = g.Definitions(at)
	return b, err
}

// begin is the recovery of a group that has no records yet, and whose first is not LSN 1.
func (r *recovery) begin(b *record.Beginning) error {
	g := r.g
	g.horizon.Store(uint64(b.At))
	g.newestLocked(b.Time)
	r.applied, r.durable = b.At, b.At
	g.apply.Lock()
	defer g.apply.Unlock()
	batch := g.ix.NewBatch()
	for _, d := range b.Definitions {
		if err := g.carryDefinition(d, b.At); err != nil {
			return err
		}
	}
	if _, err := g.syncKept(); err != nil {
		return err
	}
	for _, d := range b.Definitions {
		g.append.definitions.set(d, b.At+1)
		if err := batch.SetDefinition(carried(d, b.At)); err != nil {
			return err
		}
	}
	return g.commit(batch)
}
