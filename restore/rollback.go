package restore

import (
	"bytes"
	"context"
	"fmt"
)

// Past is a Source that can tell what became of it.
type Past interface {
	Source
	// Changed calls fn with runs that together fill the range, and whether each
	// may differ from what the disk is now.
	Changed(off, n int64, fn func(n int64, changed bool)) error
}

// Live is a disk that is rolled back.
type Live interface {
	// ReadAt fills p with what the disk is now.
	ReadAt(p []byte, off int64) error
	// Write writes p at off. It may wait for room. The slice is not kept.
	Write(p []byte, off int64) error
	// Zero makes a range read as zeroes, and may give its space back.
	Zero(off, n int64) error
}

// rollbackBlock is the unit in which a rollback compares, in bytes.
const rollbackBlock = 4096

// Rollback makes a disk what it was: it writes those blocks that differ, and no others. Nobody else may
// write the disk meanwhile. It returns how many bytes it wrote. After an error it can be called again, and writes
// the rest; durability is the Live's own. progress, if not nil, is told of bytes of the disk that are done.
func Rollback(ctx context.Context, to Past, now Live, progress func(bytes int64)) (written int64, err error) {
	if progress == nil {
		progress = func(int64) {}
	}
	r := rollback{ctx: ctx, to: to, now: now, was: make([]byte, chunk), is: make([]byte, chunk)}
	for off := int64(0); off < to.Size(); {
		n := min(span, to.Size()-off)
		if err := r.span(off, n); err != nil {
			return r.written, err
		}
		progress(n)
		off += n
	}
	return r.written, nil
}

// Check reads what a rollback would: an error is one that a rollback would meet in its middle. Nothing is written.
func Check(ctx context.Context, to Past) error {
	r := rollback{ctx: ctx, to: to, was: make([]byte, chunk)}
	for off := int64(0); off < to.Size(); off += span {
		if err := r.each(off, min(span, to.Size()-off), r.read); err != nil {
			return err
		}
	}
	return nil
}

type rollback struct {
	ctx     context.Context
	to      Past
	now     Live
	was, is []byte
	written int64
}

func (r *rollback) span(off, n int64) error { return r.each(off, n, r.part) }

// each calls fn with the parts of a range that may have changed, of a chunk at most.
func (r *rollback) each(off, n int64, fn func(off, n int64) error) error {
	var changed []run
	at := off
	err := r.to.Changed(off, n, func(n int64, differs bool) {
		if differs {
			changed = append(changed, run{at, n})
		}
		at += n
	})
	if err != nil {
		return fmt.Errorf("find what changed at %d: %w", off, err)
	}
	for _, c := range changed {
		for c.n > 0 {
			if err := r.ctx.Err(); err != nil {
				return err
			}
			k := min(c.n, chunk)
			if err := fn(c.off, k); err != nil {
				return err
			}
			c.off, c.n = c.off+k, c.n-k
		}
	}
	return nil
}

// part compares at most a chunk, and writes what differs in runs that are all zeroes or all not.
func (r *rollback) part(off, n int64) error {
	was, is := r.was[:n], r.is[:n]
	if err := r.read(off, n); err != nil {
		return err
	}
	if err := r.now.ReadAt(is, off); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", n, off, err)
	}
	// Blocks are the disk's, wherever the part begins.
	end := func(i int) int { return min(int(n), i+rollbackBlock-int((off+int64(i))%rollbackBlock)) }
	for i := 0; i < int(n); {
		j := end(i)
		if bytes.Equal(was[i:j], is[i:j]) {
			i = j
			continue
		}
		zero := isZero(was[i:j])
		for j < int(n) && !bytes.Equal(was[j:end(j)], is[j:end(j)]) && isZero(was[j:end(j)]) == zero {
			j = end(j)
		}
		if err := r.write(was[i:j], off+int64(i), zero); err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", j-i, off+int64(i), err)
		}
		i = j
	}
	return nil
}

func (r *rollback) read(off, n int64) error {
	if err := r.to.ReadAt(r.was[:n], off); err != nil {
		return fmt.Errorf("read %d bytes at %d as they were: %w", n, off, err)
	}
	return nil
}

func (r *rollback) write(p []byte, off int64, zero bool) error {
	r.written += int64(len(p))
	if zero {
		return r.now.Zero(off, int64(len(p)))
	}
	return r.now.Write(p, off)
}
