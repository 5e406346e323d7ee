package journal

import (
	"context"
	"errors"
	"fmt"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Finding is damage that Verify found.
type Finding struct {
	Where string     // file and offset, or index entry
	LSN   record.LSN // 0: not known
	What  string
}

// Verified says what Verify has looked at.
type Verified struct {
	Records   int64 // of the log
	Originals int64 // records of the originals
	Bytes     int64 // of payload
	Versions  int64 // of the index
	Findings  int64
}

// Verify reads every record of the group, up to what was durable when it was called, and compares it with
// its checksums, and every version in the index with the bytes it names. It
// calls report for each damage found and changes nothing. Its error says that it could not go on.
func (g *Group) Verify(ctx context.Context, report func(Finding)) (Verified, error) {
	v := verifier{g: g, ctx: ctx, report: report}
	// The horizon is pinned: nothing expires from under the scan.
	defer g.unpinFrom(g.pinAll())
	head := g.Durable()
	if err := v.log(head); err != nil {
		return v.done, err
	}
	if err := v.originals(); err != nil {
		return v.done, err
	}
	return v.done, v.index()
}

type verifier struct {
	g      *Group
	ctx    context.Context
	report func(Finding)
	done   Verified
	buf    []byte
}

func (v *verifier) found(where string, lsn record.LSN, err error) {
	v.done.Findings++
	v.report(Finding{Where: where, LSN: lsn, What: err.Error()})
}

// payload checks a record's payload.
func (v *verifier) payload(f *segment.File, off int64, h record.Header) error {
	if err := v.ctx.Err(); err != nil {
		return err
	}
	var err error
	if v.buf, err = f.VerifyPayload(off, h, v.buf); errors.Is(err, record.ErrCorrupt) {
		v.found(fmt.Sprintf("%s at %d", f.Path, off), h.LSN, err)
		return nil
	}
	v.done.Bytes += int64(h.Payload)
	return err
}

func (v *verifier) log(head record.LSN) error {
	files, release := v.g.set.Hold(segment.Log)
	defer release()
	if len(files) == 0 {
		return nil
	}
	next := files[0].First
	for next <= head {
		at, atOff := files[0], files[0].Start()
		err := segment.ScanLog(files, atOff, func(f *segment.File, off int64, h record.Header) error {
			at, atOff = f, off+h.Size()
			if h.LSN < next-1 || h.LSN < next && !f.Bridge {
				return nil
			}
			if h.LSN > head {
				return segment.ErrStop
			}
			if h.LSN >= next && !f.Succeeds(next-1, &h) {
				v.found(fmt.Sprintf("%s at %d", f.Path, off), next, fmt.Errorf("%w: LSN %d to %d are missing", record.ErrCorrupt, next, h.LSN-1))
			}
			next = h.LSN + 1
			v.done.Records++
			if err := v.payload(f, off, h); err != nil || h.LSN < head {
				return err
			}
			if f.Bridge && f != files[len(files)-1] {
				return nil // others may have the same LSN
			}
			return segment.ErrStop // what follows may be half written
		})
		switch {
		case err == nil && next <= head:
			v.found(at.Path, next, fmt.Errorf("%w: the log ends before LSN %d", record.ErrCorrupt, head))
			return nil
		case err == nil:
			return nil
		case !errors.Is(err, record.ErrCorrupt):
			return err
		}
		v.found(fmt.Sprintf("%s at %d", at.Path, atOff), next, err)
		if files, next = v.skip(files, at); files == nil {
			return nil
		}
	}
	return nil
}

// skip finds the files and the LSN at which the log can be read again behind damage.
func (v *verifier) skip(files []*segment.File, at *segment.File) ([]*segment.File, record.LSN) {
	for len(files) > 0 && files[0] != at {
		files = files[1:]
	}
	// The rest of a damaged file is passed over: its records behind the damage
	// can not be replayed, and are reported as missing.
	if len(files) < 2 {
		return nil, 0
	}
	return files[1:], files[1].First
}

func (v *verifier) originals() error {
	v.g.index.Lock()
	last := v.g.index.mark // behind it, originals may be half written
	v.g.index.Unlock()
	files, release := v.g.set.Hold(segment.Originals)
	defer release()
	for _, f := range files {
		indexed := func(off int64) bool {
			return f.Number < last.OrigFile || f.Number == last.OrigFile && off < int64(last.OrigOff)
		}
		end, err := f.Scan(f.Start(), func(off int64, h record.Header) error {
			if !indexed(off) {
				return segment.ErrStop
			}
			v.done.Originals++
			return v.payload(f, off, h)
		})
		if errors.Is(err, segment.ErrStop) {
			continue
		}
		if err == nil && indexed(end) {
			// A header of zeroes looks like the file's end.
			err = f.Resync(end, func(off int64, _ record.Header) error {
				if !indexed(off) {
					return segment.ErrStop
				}
				return fmt.Errorf("%w: nothing at %d, and an original at %d", record.ErrCorrupt, end, off)
			})
			if err == nil && f.Number == last.OrigFile {
				err = fmt.Errorf("%w: nothing at %d, and originals were indexed up to %d", record.ErrCorrupt, end, last.OrigOff)
			}
		}
		if errors.Is(err, record.ErrCorrupt) {
			v.found(f.Path, 0, err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// index reads what every version names.
func (v *verifier) index() error {
	var buf [record.BlockSize]byte
	var sums []byte
	return v.g.ix.Versions(func(e index.Entry) (bool, error) {
		if err := v.ctx.Err(); err != nil {
			return false, err
		}
		v.done.Versions++
		if e.Zero {
			return true, nil
		}
		where := fmt.Sprintf("index: disk %d class %d unit %d LSN %d", e.Disk, e.Unit.Class, e.Unit.Index, e.LSN)
		f, err := v.g.set.Acquire(e.File)
		if err != nil {
			v.found(where, e.LSN, err)
			return true, nil
		}
		defer f.Release()
		n := int(e.Unit.Blocks())
		sums = append(sums[:0], byte(e.Aux), byte(e.Aux>>8), byte(e.Aux>>16), byte(e.Aux>>24))
		if e.Unit.Class > 0 {
			sums = append(sums[:0], make([]byte, 4*n)...)
			if err := f.ReadAt(sums, int64(e.Aux), false); err != nil {
				v.found(where, e.LSN, err)
				return true, nil
			}
		}
		for i := range n {
			b := buf[:v.blockLen(e, i)]
			if err := f.Block(b, int64(e.Payload)+int64(i)*record.BlockSize, record.Sums(sums).At(i), false); err != nil {
				v.found(where, e.LSN, err)
				break
			}
		}
		return true, nil
	})
}

// blockLen is the length of block i of an entry's unit: the last of a disk may be short.
func (v *verifier) blockLen(e index.Entry, i int) int64 {
	for _, t := range v.g.disks.Load().table {
		if t.ID == e.Disk {
			return min(record.BlockSize, t.Size-(e.Unit.First()+int64(i))*record.BlockSize)
		}
	}
	return record.BlockSize
}
