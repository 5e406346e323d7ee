package journal

import (
	"errors"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// dropStale is for an index that is made anew behind a horizon: an original may
// be of a block whose history has expired since. It is one to keep only if a record in the
// window, and as old as the original says, overwrote the block, or a point is kept that it is of.
func (r *recovery) dropStale() error {
	g := r.g
	if err := g.Index(); err != nil {
		return err
	}
	reader, err := g.ix.FreshReader()
	if err != nil {
		return err
	}
	defer reader.Close()
	b := g.ix.NewBatch()
	type place struct {
		disk  record.DiskID
		block int64
	}
	live := map[place]bool{} // by whether what overwrote some original of the block is in the window
	kept := g.keptLSNs()
	var picks [1]index.Pick
	for _, f := range g.set.Files(segment.Originals) {
		_, err := f.Scan(f.Start(), func(off int64, h record.Header) error {
			if cutOff(&h, g.expiredTo()) {
				return nil
			}
			for _, e := range appendOriginal(nil, &h, f.Number, off) {
				if err := reader.Find(e.Disk, e.Unit.Index, h.LSN, picks[:]); err != nil {
					return err
				}
				at := place{e.Disk, e.Unit.Index}
				window := overwrote(&picks[0], &h, g.expiredTo())
				live[at] = live[at] || window
				// Another one may be of the same LSN: one that ended later, and was kept when this one was forgotten.
				now, ok, err := reader.At(e.Disk, e.Unit, e.LSN)
				if err != nil {
					return err
				}
				if window || e.Until != 0 && retain.Lives(kept, e.LSN, e.Until) {
					if !ok || now.Until != e.Until {
						b.Set([]index.Entry{e})
					}
					continue
				}
				if now != e.Version {
					continue
				}
				b.Delete(e.Disk, e.Unit, e.LSN)
			}
			return nil
		})
		if err != nil && !errors.Is(err, record.ErrCorrupt) {
			return err
		}
	}
	stale := map[*disk.Disk][]int64{}
	for at, ok := range live {
		if d := g.disk(at.disk); d != nil && !ok {
			stale[d] = append(stale[d], at.block)
		}
	}
	for d, blocks := range stale {
		if err := setPages(b, d, d.Pages(nil, blocks)); err != nil {
			return err
		}
		d.Forget(blocks)
	}
	for _, d := range g.disks.Load().all {
		if err := setStateLSN(b, stateKnown(d.ID), d.KnownSince()); err != nil {
			return err
		}
	}
	if err := errors.Join(g.setKept(b), setStateLSN(b, stateHorizon, g.expiredTo())); err != nil {
		return err
	}
	if err := b.SetState(stateRebuild, nil); err != nil {
		return err
	}
	return b.Commit(g.index.mark)
}

// overwrote reports whether a version of a block is of a record in the window that overwrote what an original holds, and not that original.
func overwrote(pick *index.Pick, original *record.Header, horizon record.LSN) bool {
	return pick.Found && pick.LSN > max(horizon, original.Durable)
}
