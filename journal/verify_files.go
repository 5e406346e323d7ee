package journal

import (
	"errors"
	"fmt"
	"slices"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// log reads the files of the log.
func (v *verifier) log() error {
	files := v.g.set.Files(segment.Log)
	limit := v.head + 1 // records from there on are another file's, or may be half written
	limits := make([]record.LSN, len(files))
	for i := len(files) - 1; i >= 0; i-- {
		limits[i], limit = limit, min(limit, files[i].First)
	}
	for i, f := range files {
		if f.First >= limits[i] {
			continue
		}
		if err := v.held(f, func() error { return v.logFile(f, limits[i]) }); err != nil {
			return err
		}
	}
	return nil
}

// held calls fn with a reference to a file, unless it is gone. If it goes in a pause, the rest of it is passed over.
func (v *verifier) held(f *segment.File, fn func() error) error {
	f, err := v.g.set.Acquire(f.Number)
	if err == nil {
		v.file = f
		defer func() {
			if v.file != nil {
				v.file.Release()
				v.file = nil
			}
		}()
		err = fn()
	}
	if errors.Is(err, segment.ErrGone) {
		v.ended = v.closed() // then all are
		return v.ended
	}
	return err
}

// asItStands reads what reading a file's records passes over: its head, and, of a compact file, all that is kept.
func (v *verifier) asItStands(f *segment.File) error {
	if err := f.VerifyHeader(); err != nil {
		if err := v.failed(Finding{Where: f.Path}, err); err != nil {
			return err
		}
	}
	return f.VerifyPieces(func(at int64, err error) error {
		return v.failed(Finding{Where: fmt.Sprintf("%s at %d", f.Path, at)}, err)
	}, v.step)
}

// logFile reads the records of a file up to a limit. Behind damage, it goes on where it finds the next one.
func (v *verifier) logFile(f *segment.File, limit record.LSN) error {
	sum := &fileSum{f: f, first: f.First, last: limit - 1, unsure: f.Bridge}
	v.doubt = v.doubt || f.Bridge // records of bridges are not compared
	v.logs = append(v.logs, sum)
	if sum.last <= v.g.expiredTo() {
		sum.unsure = true
		return nil // it is about to go, and the index forgets it
	}
	if err := v.asItStands(f); err != nil {
		return err
	}
	next, off := f.First, f.Start()
	for {
		end, err := f.Scan(off, func(off int64, h record.Header) error {
			if h.LSN >= limit {
				return segment.ErrStop
			}
			if h.LSN < next && !(f.Bridge && h.LSN == next-1) {
				return nil
			}
			if h.LSN >= next && !f.Succeeds(next-1, &h) {
				sum.unsure, v.doubt = true, true
				v.finding(Finding{Where: fmt.Sprintf("%s at %d", f.Path, off), LSN: next, Last: h.LSN - 1}, fmt.Errorf("%w: LSN %d to %d are missing", record.ErrCorrupt, next, h.LSN-1))
			}
			next = h.LSN + 1
			return v.logRecord(sum, off, &h)
		})
		if errors.Is(err, segment.ErrStop) || next >= limit && (err == nil || errors.Is(err, record.ErrCorrupt)) {
			return nil
		}
		if v.ended != nil {
			return err
		}
		if err == nil {
			err = fmt.Errorf("%w: nothing stands there", record.ErrCorrupt)
		}
		sum.unsure, v.doubt = true, true
		lost, where := next, fmt.Sprintf("%s at %d", f.Path, end)
		off = 0
		rerr := f.Resync(end+record.Alignment, func(at int64, h record.Header) error {
			if h.LSN > lost && h.LSN < limit {
				off, next = at, h.LSN
				return segment.ErrStop
			}
			return nil
		})
		if off == 0 {
			next = limit
		}
		v.finding(Finding{Where: where, LSN: lost, Last: next - 1}, fmt.Errorf("LSN %d to %d can not be read: %w", lost, next-1, errors.Join(err, rerr)))
		if off == 0 {
			return nil
		}
	}
}

// logRecord checks a record's payload, and adds what the index should have of it.
func (v *verifier) logRecord(sum *fileSum, off int64, h *record.Header) error {
	v.done.Records++
	if !h.Kind.Note() && h.LSN <= v.committed.LSN {
		for _, e := range appendEntries(nil, h, sum.f.Number, off) {
			sum.want += v.fingerprint(&e)
		}
	}
	return v.payload(sum.f, off, h, Finding{LSN: h.LSN, Last: h.LSN})
}

// payload checks a record's payload. A finding of it is what is given, with where it is.
func (v *verifier) payload(f *segment.File, off int64, h *record.Header, is Finding) (err error) {
	if v.buf, err = f.VerifyRecord(off, *h, v.buf); err != nil {
		is.Where = fmt.Sprintf("%s at %d", f.Path, off)
		if err := v.failed(is, err); err != nil {
			return err
		}
	}
	v.done.Bytes += int64(h.Payload)
	return v.step(h.Size())
}

// before reports whether a place among the originals stands before a mark.
func before(mark *index.Watermark, file uint32, off int64) bool {
	return file < mark.OrigFile || file == mark.OrigFile && off < int64(mark.OrigOff)
}

// originals reads the files of originals.
func (v *verifier) originals() error {
	for _, f := range v.g.set.Files(segment.Originals) {
		if err := v.held(f, func() error { return v.originalsFile(f) }); err != nil {
			return err
		}
	}
	return nil
}

func (v *verifier) originalsFile(f *segment.File) error {
	sum := &fileSum{f: f}
	v.origs = append(v.origs, sum)
	if err := v.asItStands(f); err != nil {
		return err
	}
	off := f.Start()
	for {
		end, err := f.Scan(off, func(off int64, h record.Header) error {
			if !before(&v.mark, f.Number, off) {
				return segment.ErrStop
			}
			return v.original(sum, off, &h)
		})
		if errors.Is(err, segment.ErrStop) || !before(&v.mark, f.Number, end) && (err == nil || errors.Is(err, record.ErrCorrupt)) {
			return nil
		}
		if v.ended != nil {
			return err
		}
		// Zeroes may be the end of a file that was closed, or what damage left of a header.
		clean := err == nil && f.Number < v.mark.OrigFile
		if err == nil {
			err = fmt.Errorf("%w: nothing stands there", record.ErrCorrupt)
		}
		off = 0
		rerr := f.Resync(end+record.Alignment, func(at int64, _ record.Header) error {
			if before(&v.mark, f.Number, at) {
				off = at
			}
			return segment.ErrStop
		})
		if clean && off == 0 && rerr == nil {
			return nil
		}
		sum.unsure = true
		v.finding(Finding{Where: fmt.Sprintf("%s at %d", f.Path, end)}, errors.Join(err, rerr))
		if off == 0 {
			return nil
		}
	}
}

// original checks an original's payload, and looks for it in the index. It may stand elsewhere by now, or nobody need it any more.
func (v *verifier) original(sum *fileSum, off int64, h *record.Header) error {
	v.done.Originals++
	var is Finding
	if h.Extent.Len > 0 { // else it is a list of what is kept
		is.original = origAt{sum.f.Number, off}
	}
	if err := v.payload(sum.f, off, h, is); err != nil || h.Extent.Len == 0 || !before(&v.committed, sum.f.Number, off) {
		return err
	}
	reader, err := v.reader()
	if err != nil {
		return err
	}
	for _, e := range appendOriginal(nil, h, sum.f.Number, off) {
		has, ok, err := reader.At(e.Disk, e.Unit, e.LSN)
		if err == nil && !ok && v.needed(h) {
			if ok, err = v.findable(h, &e); err == nil && !ok && v.needed(h) {
				v.doubt = true
				v.finding(Finding{Where: where(&e)}, fmt.Errorf("%w: the index lacks the original at %d of %s", record.ErrCorrupt, off, sum.f.Path))
			}
		}
		if err != nil {
			v.doubt = true
			return v.failed(Finding{Where: where(&e)}, err)
		}
		if has == e.Version && !e.Zero && e.Until != 0 {
			sum.want += v.fingerprint(&e)
		}
	}
	return nil
}

// findable reports whether views that need an original find it, or a version that came between and left the same: zeroes over zeroes are not captured.
func (v *verifier) findable(h *record.Header, e *index.Entry) (bool, error) {
	reader, err := v.g.ix.FreshReader()
	if err != nil {
		return false, err
	}
	defer reader.Close()
	points := v.g.allPoints()
	first, _ := retain.First(points, h.Durable)
	last := h.LSN - 1
	if horizon := v.g.expiredTo(); h.LSN <= horizon {
		i, _ := slices.BinarySearch(points, h.LSN)
		last = points[max(i-1, 0)]
	} else if h.Durable > horizon {
		first = h.Durable
	}
	for _, lsn := range []record.LSN{first, last} {
		var p [1]index.Pick
		if err := reader.Find(e.Disk, e.Unit.Index, lsn, p[:]); err != nil || !p[0].Found {
			return false, err
		}
	}
	return true, nil
}

// needed reports whether a view can need an original. Of carried-over zeroes, some may be what is left of an expiry that had no room.
func (v *verifier) needed(h *record.Header) bool {
	horizon := v.g.expiredTo()
	if h.Flags&record.FlagExact == 0 || cutOff(h, horizon) || h.Flags&record.FlagCarried != 0 && h.Kind == record.KindHole {
		return false
	}
	return h.LSN > horizon || retain.Lives(v.g.allPoints(), h.Durable, h.LSN)
}

// fileOf is the file of the log, of those that were read, that a record stands in; nil: in none.
func (v *verifier) fileOf(lsn record.LSN) *fileSum {
	i, _ := slices.BinarySearchFunc(v.logs, lsn+1, func(s *fileSum, lsn record.LSN) int {
		if s.first >= lsn {
			return 1
		}
		return -1
	})
	if i == 0 || v.logs[i-1].last < lsn {
		return nil
	}
	return v.logs[i-1]
}

func where(e *index.Entry) string {
	return fmt.Sprintf("index: disk %d class %d unit %d LSN %d", e.Disk, e.Unit.Class, e.Unit.Index, e.LSN)
}
