package journal

import (
	"errors"
	"fmt"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Repair writes records of another daemon's, which has the same journal, over those of the log that are damaged here, durably. What is not
// damaged stays as it is. It returns how many records were mended.
//
// ErrDiverged says that the two journals are not the same that far. A *PointError, that the group has no such records.
func (g *Group) Repair(run record.Run) (mended int, err error) {
	if g.bridged(run.First, run.Last) {
		return 0, fmt.Errorf("LSN %d to %d of group %s are, or have some, of a gap: what stands there was made here, and no other daemon has it; to have the disks as they are from the other one, tidemark replica accept --anew", run.First, run.Last, g.name)
	}
	common, err := g.Reigns().Common(g.Durable(), run.Reigns, run.Last)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrDiverged, err)
	}
	if common < run.Last {
		return 0, fmt.Errorf("%w: they have LSN %d in common, and LSN %d is to be repaired", ErrDiverged, common, run.Last)
	}
	if run.First <= g.expiredTo() {
		return 0, g.expired(run.First)
	}
	files, release := g.set.Hold(segment.Log)
	defer release()
	err = record.Each(run.Bytes, func(h record.Header, payload []byte) error {
		done, err := g.repairOne(files, h, payload)
		if err != nil {
			return fmt.Errorf("repair LSN %d of group %s: %w", h.LSN, g.name, err)
		}
		if done {
			mended++
			g.log.Warn("a damaged record was written again, as another daemon has it", zap.Uint64("lsn", uint64(h.LSN)))
		}
		return nil
	})
	return mended, err
}

// place is where a record stands, or should.
type place struct {
	f       *segment.File
	off     int64
	have    *record.Header // nil: its header is damaged
	durable record.LSN     // as the record before it says
}

// findPlace finds where a record stands in the log.
func findPlace(files []*segment.File, lsn record.LSN) (p place, err error) {
	for _, f := range files {
		if f.First <= lsn {
			p.f = f // of two, the newer counts
		}
	}
	if p.f == nil {
		return p, fmt.Errorf("%w: no file has it", record.ErrCorrupt)
	}
	next := p.f.First
	p.off, err = p.f.Scan(p.f.Start(), func(off int64, h record.Header) error {
		if h.LSN >= lsn {
			own := h
			own.Sums = append(record.Sums(nil), h.Sums...)
			p.have, p.off = &own, off
			return segment.ErrStop
		}
		next, p.durable = h.LSN+1, h.Durable
		return nil
	})
	switch {
	case p.have != nil && p.have.LSN == lsn:
		return p, nil
	case p.have == nil && next == lsn && (err == nil || errors.Is(err, record.ErrCorrupt)):
		return p, nil
	case err == nil || errors.Is(err, record.ErrCorrupt):
		return p, fmt.Errorf("%w: %s can be read up to LSN %d only: repair what stands before it", record.ErrCorrupt, p.f.Path, next-1)
	}
	return p, err
}

func (g *Group) repairOne(files []*segment.File, h record.Header, payload []byte) (mended bool, err error) {
	p, err := findPlace(files, h.LSN)
	if err != nil {
		return false, err
	}
	if p.have != nil {
		if p.have.Digest() != h.Digest() {
			return false, fmt.Errorf("%w: another record stands in %s", ErrDiverged, p.f.Path)
		}
		if _, err := p.f.VerifyPayload(p.off, *p.have, nil); !errors.Is(err, record.ErrCorrupt) {
			return false, err
		}
		h.Durable, h.Salt = p.have.Durable, p.have.Salt
	} else {
		h.Durable, h.Salt = min(p.durable, h.LSN-1), p.f.Salt
		// It must fit what is damaged.
		err := p.f.Resync(p.off, func(at int64, next record.Header) error {
			if at < p.off+h.Size() {
				return fmt.Errorf("%w: it takes %d bytes at %d of %s, and LSN %d stands at %d", record.ErrCorrupt, h.Size(), p.off, p.f.Path, next.LSN, at)
			}
			return segment.ErrStop
		})
		if err != nil {
			return false, err
		}
	}
	b := append(h.Append(make([]byte, 0, h.Size())), payload...)
	err = g.set.Rewrite(p.f, p.off, append(b, make([]byte, h.Size()-int64(len(b)))...))
	if errors.Is(err, segment.ErrUnsynced) {
		err = g.fail(err)
	}
	g.keepPlain(p.f, false) // it may have been damaged when it was looked at
	return true, err
}
