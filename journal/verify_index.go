package journal

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// index reads all versions of the index, and compares what they say of each file with its records.
func (v *verifier) index() error {
	before := v.done.Findings
	defer func() { v.doubt = v.doubt || v.done.Findings > before }()
	err := v.versions(func(e *index.Entry) {
		v.done.Versions++
		if sum := v.attribute(e); sum != nil {
			sum.got += v.fingerprint(e)
		}
	})
	if err != nil {
		return err
	}
	located := 0
	for _, sum := range slices.Concat(v.logs, v.origs) {
		if sum.want == sum.got || !v.stable(sum) {
			continue
		}
		if located++; located > mostLocated {
			v.finding(Finding{Where: sum.f.Path}, fmt.Errorf("%w: the index says something else of its records", record.ErrCorrupt))
			continue
		}
		if err := v.held(sum.f, func() error { return v.locate(sum) }); err != nil {
			return err
		}
	}
	return nil
}

// mostLocated bounds the files of which it is found out what the index has wrong: each takes reading all of it once more.
const mostLocated = 16

// mostWrong bounds the findings of one file.
const mostWrong = 1000

// versions calls fn with the versions of the index, in steps. What can not be read is found, and ends it.
func (v *verifier) versions(fn func(e *index.Entry)) error {
	from := index.Entry{LSN: record.MaxLSN}
	for first := true; ; first = false {
		n, last := 0, from
		err := v.g.ix.VersionsFrom(from, func(e index.Entry) (bool, error) {
			if first || e != from {
				fn(&e)
			}
			n, last = n+1, e
			return n < verifyKeys, nil
		})
		if err != nil {
			err = v.failed(Finding{Where: fmt.Sprintf("index: behind disk %d class %d unit %d LSN %d", last.Disk, last.Unit.Class, last.Unit.Index, last.LSN)}, err)
			if err != nil {
				return err
			}
			for _, sum := range slices.Concat(v.logs, v.origs) {
				sum.unsure = true
			}
			return nil
		}
		if n < verifyKeys {
			return v.ctx.Err()
		}
		from = last
		if err := v.step(verifyKeys * versionBytes); err != nil {
			return err
		}
	}
}

// versionBytes is about what a version takes in the index.
const versionBytes = 24

// attribute finds the file whose record a version is of; nil: it is not known, or can not be compared. Where there is none, that is found.
func (v *verifier) attribute(e *index.Entry) *fileSum {
	if e.Until != 0 {
		if e.Zero || !before(&v.committed, e.File, int64(e.Payload)) {
			return nil
		}
		if sum := v.origOf(e.File); sum != nil {
			return sum
		}
		if v.g.rearranged.Load() == v.moved && v.moved%2 == 0 {
			v.finding(Finding{Where: where(e)}, fmt.Errorf("%w: no file has the original, number %d", record.ErrCorrupt, e.File))
		}
		return nil
	}
	if e.LSN > v.committed.LSN || !e.Zero && v.origOf(e.File) != nil { // or of an original whose end is not known
		return nil
	}
	sum := v.fileOf(e.LSN)
	if sum == nil && e.LSN > v.g.expiredTo() {
		v.finding(Finding{Where: where(e)}, fmt.Errorf("%w: no file of the log has the record", record.ErrCorrupt))
	}
	return sum
}

// origOf is a file of originals that was read.
func (v *verifier) origOf(number uint32) *fileSum {
	i, ok := slices.BinarySearchFunc(v.origs, number, func(s *fileSum, number uint32) int { return cmp.Compare(s.f.Number, number) })
	if !ok {
		return nil
	}
	return v.origs[i]
}

// stable reports whether what the index says of a file can not have changed while it was read.
func (v *verifier) stable(sum *fileSum) bool {
	if sum.unsure {
		return false
	}
	if sum.f.Kind == segment.Log {
		return sum.last > v.g.expiredTo()
	}
	return v.moved%2 == 0 && v.g.rearranged.Load() == v.moved
}

// versionKey is what a version is of.
type versionKey struct {
	disk record.DiskID
	unit index.Unit
	lsn  record.LSN
}

// locate finds what the index has wrong of a file.
func (v *verifier) locate(sum *fileSum) error {
	want := map[versionKey]index.Version{}
	_, err := sum.f.Scan(sum.f.Start(), func(off int64, h record.Header) error {
		var entries []index.Entry
		switch {
		case sum.f.Kind == segment.Originals && h.Extent.Len > 0:
			entries = appendOriginal(nil, &h, sum.f.Number, off)
		case sum.f.Kind == segment.Log && !h.Kind.Note() && h.LSN <= min(sum.last, v.committed.LSN):
			entries = appendEntries(nil, &h, sum.f.Number, off)
		}
		for _, e := range entries {
			want[versionKey{e.Disk, e.Unit, e.LSN}] = e.Version
		}
		return nil
	})
	if err != nil || v.closed() != nil {
		return nil // it could be read before: the next verification finds it
	}
	var wrong []Finding
	more := 0
	add := func(e *index.Entry, format string, args ...any) {
		if len(wrong) == mostWrong {
			more++
			return
		}
		wrong = append(wrong, Finding{Where: where(e), What: fmt.Sprintf("%v: "+format, append([]any{record.ErrCorrupt}, args...)...)})
	}
	err = v.versions(func(e *index.Entry) {
		if v.attribute(e) != sum {
			return
		}
		key := versionKey{e.Disk, e.Unit, e.LSN}
		switch has, ok := want[key]; {
		case !ok:
			add(e, "no record of %s has it", sum.f.Path)
		case has != e.Version:
			add(e, "it says %+v, and %s has %+v", e.Version, sum.f.Path, has)
		}
		delete(want, key)
	})
	if err != nil || !v.stable(sum) {
		return err
	}
	if sum.f.Kind == segment.Log { // of originals, those that are needed were looked for
		for key := range want {
			add(&index.Entry{Disk: key.disk, Unit: key.unit, LSN: key.lsn}, "the index lacks what %s has", sum.f.Path)
		}
	}
	for _, f := range wrong {
		v.done.Findings++
		v.report(f)
	}
	if more > 0 {
		v.finding(Finding{Where: sum.f.Path}, fmt.Errorf("%w: the index has %d more versions of its records wrong", record.ErrCorrupt, more))
	}
	return nil
}
