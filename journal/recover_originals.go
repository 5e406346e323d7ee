package journal

import (
	"errors"
	"fmt"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// originals replays the originals that the index does not have. A torn tail
// is of originals whose blocks were not overwritten yet.
func (r *recovery) originals() error {
	g := r.g
	for _, f := range g.set.Files(segment.Originals) {
		if f.Number < r.mark.OrigFile {
			continue
		}
		from := f.Start()
		if f.Number == r.mark.OrigFile {
			from = int64(r.mark.OrigOff)
		}
		var entries []index.Entry
		var buf []byte
		end, err := f.Scan(from, func(off int64, h record.Header) (err error) {
			if durable := h.Flags&record.FlagCarried == 0 && h.LSN <= r.applied && !r.copied(f); durable {
				// Its block was overwritten: if it is damaged, a view must find that out.
			} else if buf, err = r.believe(f, off, h, buf); err != nil {
				return err
			}
			if h.Kind == record.KindDefine {
				return r.carriedDefinition(f, off, &h)
			}
			entries = append(entries, r.original(f, off, h)...)
			return nil
		})
		if err != nil && !errors.Is(err, record.ErrCorrupt) {
			return fmt.Errorf("replay originals: %w", err)
		}
		if err := r.originalsTail(f, end, err); err != nil {
			return err
		}
		if len(entries) > 0 && !g.o.ReadOnly {
			if err := f.Sync(); err != nil {
				return err
			}
		}
		r.mark.OrigFile, r.mark.OrigOff = f.Number, uint32(end)
		g.index.mark.OrigFile, g.index.mark.OrigOff = f.Number, uint32(end)
		if err := r.commitOriginals(entries); err != nil {
			return err
		}
	}
	return nil
}

// originalsTail looks at what stands behind the last original that could be read,
// and why it was the last: nil if nothing seems to be written there.
//
// A crash tears only what was appended after the last commit. The header of each
// original says which round it was kept for: one of a round that the backings have durably was synced.
func (r *recovery) originalsTail(f *segment.File, end int64, cause error) error {
	behind, durable, err := r.originalsBehind(f, end)
	if err != nil {
		return err
	}
	durable = durable || f.IsCompact() && cause != nil // or it would not have become so
	if !durable && (behind || cause != nil) {
		if durable, err = r.notedBehind(f); err != nil {
			return err
		}
	}
	if durable && !r.copied(f) {
		if cause == nil {
			cause = fmt.Errorf("%w: %s: nothing at %d, and originals behind it", record.ErrCorrupt, f.Path, end)
		}
		if r.damage == nil {
			r.damage = fmt.Errorf("an original that was durable is damaged: %w", cause)
		}
		return nil
	}
	if cause == nil && !behind || r.g.o.ReadOnly {
		return nil
	}
	// Now, while a torn tail can be told from damage: later, the rounds of the
	// originals in it will have been applied.
	return r.g.set.Cut(f, end)
}

// copied reports whether a file of originals may have what a rewind copied, which says nothing of when it was durable.
func (r *recovery) copied(f *segment.File) bool { return r.rewind != nil && f.Number > r.rewind.last }

// originalsBehind reports whether any valid original stands at or behind off, and
// whether what stands before one of them was durable: it is of a round that was applied, or notes the end of an expiry. What a crash left of an append is neither.
func (r *recovery) originalsBehind(f *segment.File, off int64) (any, durable bool, err error) {
	err = f.Resync(off, func(_ int64, h record.Header) error {
		any = true
		if h.Kind == record.KindExpired || h.Flags&record.FlagCarried == 0 && h.LSN <= r.applied {
			durable = true
			return segment.ErrStop
		}
		return nil
	})
	return any, durable, err
}

// notedBehind reports whether the end of an expiry is noted in a later file of originals.
func (r *recovery) notedBehind(f *segment.File) (noted bool, err error) {
	for _, later := range r.g.set.Files(segment.Originals) {
		if later.Number <= f.Number || noted {
			continue
		}
		_, err := later.Scan(later.Start(), func(_ int64, h record.Header) error {
			if noted = h.Kind == record.KindExpired; noted {
				return segment.ErrStop
			}
			return nil
		})
		if err != nil && !errors.Is(err, segment.ErrStop) && !errors.Is(err, record.ErrCorrupt) {
			return false, err
		}
	}
	return noted, nil
}

// cutOff reports whether an original was carried over by an expiry that has not happened: a crash, or a lack of room, cut it off. It counts for nothing.
func cutOff(h *record.Header, horizon record.LSN) bool {
	return h.Flags&record.FlagCarried != 0 && h.Durable > horizon
}

// original makes the index entries of a replayed original.
func (r *recovery) original(f *segment.File, off int64, h record.Header) []index.Entry {
	if cutOff(&h, r.g.expiredTo()) {
		return nil
	}
	return appendOriginal(nil, &h, f.Number, off)
}

// carriedDefinition takes up a definition that an expiry carried over, unless it is not the last one.
func (r *recovery) carriedDefinition(f *segment.File, off int64, h *record.Header) error {
	if h.Durable != r.g.expiredTo() {
		return nil
	}
	return r.note(f, off, h)
}

// commitOriginals sets the bits of replayed originals, and commits them to the
// index with their entries.
func (r *recovery) commitOriginals(entries []index.Entry) error {
	blocks := map[*disk.Disk][]int64{}
	for _, e := range entries {
		if d := r.g.disk(e.Disk); d != nil && (e.Until == 0 || e.Until > r.g.expiredTo()) {
			blocks[d] = append(blocks[d], e.Unit.Index)
		}
	}
	for d, captured := range blocks {
		d.Keep(captured)
	}
	if len(entries) == 0 || r.g.o.ReadOnly {
		return nil
	}
	b := r.g.ix.NewBatch()
	for d, captured := range blocks {
		if err := setPages(b, d, d.Pages(captured, nil)); err != nil {
			return err
		}
	}
	// Of several with one LSN, see dropStale, the last counts.
	type key struct {
		disk  record.DiskID
		block int64
		lsn   record.LSN
	}
	last := make(map[key]int, len(entries))
	for i, e := range entries {
		last[key{e.Disk, e.Unit.Index, e.LSN}] = i
	}
	unique := entries[:0]
	for i, e := range entries {
		if last[key{e.Disk, e.Unit.Index, e.LSN}] == i {
			unique = append(unique, e)
		}
	}
	b.Set(unique)
	return b.Commit(r.g.index.mark)
}
