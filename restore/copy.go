package restore

import (
	"bytes"
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Source is what is restored. Its methods are called from several goroutines.
type Source interface {
	Size() int64
	// ReadAt fills p.
	ReadAt(p []byte, off int64) error
	// Extents calls fn with runs that together fill the range, and whether
	// each is known to be zeroes.
	Extents(off, n int64, fn func(n int64, zero bool)) error
}

// Target is what is written. Its methods are called from several goroutines, for ranges that do not overlap.
type Target interface {
	Size() int64 // room for the disk, bytes
	WriteAt(p []byte, off int64) error
	// Zero makes a range read as zeroes.
	Zero(off, n int64) error
	// Sync makes durable what was written before the call.
	Sync() error
	// ReadAt fills p with what was written.
	ReadAt(p []byte, off int64) error
}

const (
	workers = 4
	// changeWorkers is how many there are for changes, which are short: what takes time is to ask for each.
	changeWorkers = 16
	// chunk is what a worker reads and writes at once, in bytes.
	chunk = 1 << 20
	// span is the range whose extents are asked for at once, and the unit of progress, in bytes.
	span = 16 << 20
	// grain is the unit in which zeroes are found and left out, in bytes.
	grain = 64 << 10
)

type run struct{ off, n int64 }

// job is a source on its way to a target.
type job struct {
	src      Source
	dst      Target
	blank    bool // the target is zeroes where nothing was written
	changed  func(off, n int64, fn func(n int64, changed bool)) error
	progress func(int64)

	mu struct {
		sync.Mutex
		done bitmap // spans that need no more work
		next int    // span to hand out
	}
}

// spans is how many there are.
func spans(size int64) int { return int((size + span - 1) / span) }

// take hands out a span that is not done; false if there is none left.
func (j *job) take() (i int, ok bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for n := spans(j.src.Size()); j.mu.next < n; {
		i := j.mu.next
		j.mu.next++
		if !j.mu.done.get(i) {
			return i, true
		}
	}
	return 0, false
}

func (j *job) finish(i int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.mu.done.set(i)
}

// copied is which spans are done now.
func (j *job) copied() bitmap {
	j.mu.Lock()
	defer j.mu.Unlock()
	return bytes.Clone(j.mu.done)
}

// each calls fn with every span that is not done, from several goroutines, and a buffer of a chunk.
func (j *job) each(ctx context.Context, fn func(ctx context.Context, r run, buf []byte) error) error {
	eg, ctx := errgroup.WithContext(ctx)
	n := workers
	if j.changed != nil {
		n = changeWorkers
	}
	for range n {
		eg.Go(func() error {
			buf := make([]byte, 2*chunk)
			for {
				i, ok := j.take()
				if !ok {
					return nil
				}
				off := int64(i) * span
				r := run{off, min(span, j.src.Size()-off)}
				if err := fn(ctx, r, buf); err != nil {
					return err
				}
				j.finish(i)
			}
		})
	}
	return eg.Wait()
}

// copyAll copies what is not done yet.
func (j *job) copyAll(ctx context.Context) error {
	for i := range spans(j.src.Size()) {
		if j.mu.done.get(i) {
			j.progress(min(span, j.src.Size()-int64(i)*span))
		}
	}
	return j.each(ctx, j.copySpan)
}

// differing is those runs of a range that must be copied.
func (j *job) differing(r run) ([]run, error) {
	if j.changed == nil {
		return []run{r}, nil
	}
	var out []run
	at := r.off
	err := j.changed(r.off, r.n, func(n int64, changed bool) {
		if changed {
			out = append(out, run{at, n})
		} else {
			j.progress(n)
		}
		at += n
	})
	if err != nil {
		return nil, fmt.Errorf("find what changed at %d: %w", r.off, err)
	}
	return out, nil
}

func (j *job) copySpan(ctx context.Context, r run, buf []byte) error {
	parts, err := j.differing(r)
	if err != nil {
		return err
	}
	for _, p := range parts {
		if err := j.copyRun(ctx, p, buf); err != nil {
			return err
		}
	}
	return nil
}

func (j *job) copyRun(ctx context.Context, r run, buf []byte) error {
	if r.n <= chunk && j.changed != nil {
		// To ask for its zeroes takes as long as to read it.
		return j.copyData(ctx, r, buf)
	}
	var data, zero []run
	at := r.off
	err := j.src.Extents(r.off, r.n, func(n int64, isZero bool) {
		list := &data
		if isZero {
			list = &zero
		}
		if k := len(*list); k > 0 && (*list)[k-1].off+(*list)[k-1].n == at {
			(*list)[k-1].n += n
		} else {
			*list = append(*list, run{at, n})
		}
		at += n
	})
	if err != nil {
		return err
	}
	for _, z := range zero {
		if err := j.zero(z.off, z.n); err != nil {
			return err
		}
		j.progress(z.n)
	}
	for _, d := range data {
		if err := j.copyData(ctx, d, buf); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// copyData copies a run, chunk by chunk.
func (j *job) copyData(ctx context.Context, d run, buf []byte) error {
	for d.n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := buf[:min(d.n, chunk)]
		if err := j.src.ReadAt(b, d.off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", len(b), d.off, err)
		}
		if err := j.write(b, d.off); err != nil {
			return err
		}
		j.progress(int64(len(b)))
		d.off, d.n = d.off+int64(len(b)), d.n-int64(len(b))
	}
	return nil
}

func (j *job) zero(off, n int64) error {
	if j.blank {
		return nil
	}
	if err := j.dst.Zero(off, n); err != nil {
		return fmt.Errorf("zero %d bytes at %d: %w", n, off, err)
	}
	return nil
}

// write writes b, the grains that are zeroes as such.
func (j *job) write(b []byte, off int64) error {
	for i := 0; i < len(b); {
		k := i + j.grain(off, i, len(b))
		zero := isZero(b[i:k])
		for k < len(b) {
			end := k + j.grain(off, k, len(b))
			if isZero(b[k:end]) != zero {
				break
			}
			k = end
		}
		if zero {
			if err := j.zero(off+int64(i), int64(k-i)); err != nil {
				return err
			}
		} else if err := j.dst.WriteAt(b[i:k], off+int64(i)); err != nil {
			return fmt.Errorf("write %d bytes at %d: %w", k-i, off+int64(i), err)
		}
		i = k
	}
	return nil
}

// grain is how far it is from b[i] of a buffer at off to the next whole grain of the disk.
func (j *job) grain(off int64, i, n int) int {
	return min(n-i, grain-int((off+int64(i))%grain))
}

// compareAll compares every byte of the target with the source.
func (j *job) compareAll(ctx context.Context) error { return j.each(ctx, j.compareSpan) }

func (j *job) compareSpan(ctx context.Context, r run, buf []byte) error {
	for r.n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(r.n, chunk)
		want, got := buf[:n], buf[chunk:chunk+n]
		if err := j.src.ReadAt(want, r.off); err != nil {
			return fmt.Errorf("read %d bytes at %d: %w", n, r.off, err)
		}
		if err := j.dst.ReadAt(got, r.off); err != nil {
			return fmt.Errorf("read %d bytes at %d of the copy: %w", n, r.off, err)
		}
		if !bytes.Equal(want, got) {
			i := 0
			for want[i] == got[i] {
				i++
			}
			return fmt.Errorf("%w at byte %d", ErrDiffers, r.off+int64(i))
		}
		j.progress(n)
		r.off, r.n = r.off+n, r.n-n
	}
	return nil
}

var zeroes [grain]byte

// isZero stops at the first part that is not zeroes, which is nearly always the first.
func isZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), 4096)
		if !bytes.Equal(b[:n], zeroes[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// bitmap is a set of spans.
type bitmap []byte

func newBitmap(n int) bitmap { return make(bitmap, (n+7)/8) }

func (b bitmap) get(i int) bool { return b[i/8]&(1<<(i%8)) != 0 }
func (b bitmap) set(i int)      { b[i/8] |= 1 << (i % 8) }
