package journal

import (
	"errors"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// scanBeside calls fn with the records of log files from the first one's start
// on, while it reads on ahead of fn: reading headers and replaying them take about as long.
func scanBeside(logs []*segment.File, fn func(queued) error) error {
	const ahead = 1024 // records handed over at once
	batches := make(chan []queued, 4)
	done := make(chan struct{}) // fn wants no more
	scanned := make(chan error, 1)
	go func() {
		var batch []queued
		var sums arena
		send := func() error {
			select {
			case batches <- batch:
				batch = make([]queued, 0, ahead)
				return nil
			case <-done:
				return segment.ErrStop
			}
		}
		err := segment.ScanLog(logs, logs[0].Start(), func(f *segment.File, off int64, h record.Header) error {
			h.Sums = sums.clone(h.Sums)
			if batch = append(batch, queued{f, off, h}); len(batch) < ahead {
				return nil
			}
			return send()
		})
		_ = send() // what was read before an error counts
		close(batches)
		scanned <- err
	}()
	var err error
	for batch := range batches {
		for i := 0; i < len(batch) && err == nil; i++ {
			if err = fn(batch[i]); err != nil {
				close(done)
			}
		}
	}
	if serr := <-scanned; err == nil {
		err = serr
	}
	return err
}

// arena keeps small slices together.
type arena []byte

func (a *arena) clone(b []byte) []byte {
	if len(b) > cap(*a)-len(*a) {
		*a = make([]byte, 0, max(64<<10, len(b)))
	}
	*a = append(*a, b...)
	return (*a)[len(*a)-len(b) : len(*a) : len(*a)]
}

// replayQueue holds records back until they are known to have been durable.
// What never is, the tail, is verified payload and all: the crash may have torn it.
type replayQueue struct {
	r    *recovery
	recs []queued
	prev record.LSN // of the last one that was replayed, or of none
}

type queued struct {
	file *segment.File
	off  int64
	h    record.Header
}

func (q *replayQueue) add(rec queued) error {
	if id := rec.h.Disk; !q.r.g.attached(id) && rec.h.LSN > q.r.overlaid && !rec.h.Kind.Note() && !slices.Contains(q.r.absent, id) {
		q.r.absent = append(q.r.absent, id)
	}
	q.recs = append(q.recs, rec)
	n := 0
	for n < len(q.recs) && q.recs[n].h.LSN <= q.r.durable {
		if err := q.replay(&q.recs[n]); err != nil {
			return err
		}
		n++
	}
	if n == len(q.recs) {
		q.recs = q.recs[:0]
	} else {
		q.recs = q.recs[n:]
	}
	return nil
}

func (q *replayQueue) replay(rec *queued) error {
	g := q.r.g
	if err := q.commit(rec.h.LSN); err != nil {
		return err
	}
	if err := q.r.replay(g.disk(rec.h.Disk), rec.file, rec.off, &rec.h); err != nil {
		return err
	}
	q.prev = rec.h.LSN
	return nil
}

// commit commits what was replayed, if that is much: all of the log, if the index is made anew, is too much for one batch. next is the LSN of the
// record that comes: the index has all of those that share one, or none.
func (q *replayQueue) commit(next record.LSN) error {
	g := q.r.g
	p := g.append.pend
	if !q.r.fresh || g.o.ReadOnly || len(p.entries) < indexBatch || next == q.prev || next > q.r.durable {
		return nil
	}
	p.last = q.prev
	g.append.pend = &pending{}
	_, err := g.commitPending([]*pending{p})
	return err
}

// finish replays the tail up to its first torn record.
func (q *replayQueue) finish() (err error) {
	var buf []byte
	defer func() {
		for i := range q.recs {
			if rec := &q.recs[i]; err == nil && !q.r.g.o.ReadOnly && (i == 0 || rec.file != q.recs[i-1].file) {
				err = rec.file.Sync()
			}
		}
	}()
	for i := 0; i < len(q.recs); {
		// All that stand under one LSN, or none.
		j := i
		for ; j < len(q.recs) && q.recs[j].h.LSN == q.recs[i].h.LSN; j++ {
			rec := &q.recs[j]
			if rec.h.LSN <= q.r.durable {
				continue
			}
			buf, err = q.r.believe(rec.file, rec.off, rec.h, buf)
			if errors.Is(err, record.ErrCorrupt) {
				q.r.last = q.prev // of a bridge, the LSN before may be far
				return nil
			}
			if err != nil {
				return err
			}
		}
		for ; i < j; i++ {
			if err := q.replay(&q.recs[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// behind looks for valid records behind a damaged one, and raises durable to
// what they say was.
func (r *recovery) behind(f *segment.File, off int64) error {
	for i, g := range r.logs {
		if g.Number < f.Number {
			continue
		}
		if i+1 < len(r.logs) && g.IsCompact() {
			r.durable = max(r.durable, r.logs[i+1].First-1) // or it would not have become so
		}
		from := g.Start()
		if g == f {
			from = off
		}
		err := g.Resync(from, func(_ int64, h record.Header) error {
			r.durable = max(r.durable, h.Durable)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// replay takes a record up again: for the index, the overlay and the labels.
func (r *recovery) replay(d *disk.Disk, f *segment.File, off int64, h *record.Header) error {
	g := r.g
	if h.Kind.Note() {
		if h.Flags&record.FlagDiscontinuity != 0 && d != nil {
			d.SetKnownSince(h.LSN)
		}
		if h.LSN > r.mark.LSN {
			err := r.note(f, off, h)
			if errors.Is(err, record.ErrCorrupt) {
				g.log.Error("a damaged record is left out", zap.Stringer("kind", h.Kind), zap.Uint64("lsn", uint64(h.LSN)), zap.Error(err))
			} else if err != nil {
				return err
			}
		}
	} else {
		if h.LSN > r.mark.LSN {
			g.append.pend.entries = appendEntries(g.append.pend.entries, h, f.Number, off)
		}
		if h.LSN > r.overlaid && d != nil && d.Attached() {
			g.append.weight += d.Insert(h, f.Number, off+int64(h.EncodedSize()))
			var cost int64
			if h.Kind != record.KindWrite {
				_, cost = d.InBacking(h.Extent, maxZeroes)
			}
			g.unapplied.Add(max(h.Size(), record.BlockSize))
			g.owed.Add(max(h.Size(), cost))
		}
	}
	if h.LSN > r.mark.LSN {
		if h.Time-g.lastTime.Load() >= timeMarkEvery || h.LSN%4096 == 1 {
			g.append.pend.times = append(g.append.pend.times,
				index.TimeMark{Time: h.Time, LSN: h.LSN, File: f.Number, Off: uint32(off)})
		}
	}
	g.newestLocked(max(g.recordTime.Load(), h.Time))
	return nil
}

// note takes up what a record without an extent says, which the index does not have.
func (r *recovery) note(f *segment.File, off int64, h *record.Header) error {
	payload, err := f.VerifyPayload(off, *h, nil)
	if err != nil {
		return err
	}
	return r.g.learnLocked(h, payload)
}

// learnLocked takes up what a record without an extent says that is in the log already.
func (g *Group) learnLocked(h *record.Header, payload []byte) error {
	a := &g.append
	switch h.Kind {
	case record.KindMarker:
		m, err := record.DecodeMarker(h.LSN, h.Time, payload)
		if err != nil {
			return err
		}
		if old, ok := a.markers.labels[m.Label]; ok && old != m.LSN && !a.markers.held(old, g.o.Now()) {
			// It was deleted, by a record that stood in a gap.
			g.unpinMarker(old)
			was, _ := a.markers.remove(old)
			a.pend.markers = append(a.pend.markers, index.MarkerChange{Marker: was, Deleted: true})
		}
		a.markers.set(m)
		a.pend.markers = append(a.pend.markers, index.MarkerChange{Marker: m})
		g.pinAs(&m)
	case record.KindAmend:
		am, err := record.DecodeAmendment(payload)
		if err != nil {
			return err
		}
		c, ok := a.markers.amend(am, g.o.Now())
		if !ok {
			return nil
		}
		a.pend.markers = append(a.pend.markers, c)
		if c.Deleted {
			g.unpinMarker(am.Target)
		} else {
			g.pinAs(&c.Marker)
		}
	case record.KindDefine:
		d, err := record.DecodeDefinition(h.LSN, payload)
		if err != nil {
			return err
		}
		a.definitions.set(d, h.LSN)
		a.pend.definitions = append(a.pend.definitions, index.Definition{Definition: d, At: h.LSN})
	}
	return nil
}
