package export

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/nbd"
)

// Base is what an overlay stands on: a disk as it was, or another overlay.
type Base interface {
	Size() int64
	// ReadAt fills p. With nowait it may answer nbd.ErrWouldBlock.
	ReadAt(p []byte, off int64, nowait bool) error
	// Extents calls fn with runs that together fill the range, and whether
	// each is known to read as zeroes.
	Extents(off, n int64, fn func(n int64, zero bool)) error
}

// Options of an overlay.
type Options struct {
	// Reserve is what the overlay leaves free in its file system, in bytes: a write that would need more is
	// an ENOSPC.
	Reserve int64
}

const (
	// stripe is the part of a disk whose writes exclude each other, in bytes.
	stripe  = 1 << 20
	stripes = 64
	// roomEvery is how many bytes go into the file between two looks at its room.
	roomEvery = 1 << 20
)

// Overlay is a disk that can be written over one that can not. It is an nbd.Device.
type Overlay struct {
	base Base
	f    *os.File
	m    *blockMap
	o    Options

	locks [stripes]sync.Mutex // of the parts of the disk, by number modulo stripes; taken in ascending order
	sync  sync.Mutex          // one flush at a time

	taken  atomic.Int64 // bytes written since the last look at the room
	failed atomic.Pointer[error]
}

// Create makes an overlay in new files: its data at path, its maps in files whose names begin with maps.
func Create(path, maps string, base Base, o Options) (*Overlay, error) {
	return openFiles(path, maps, base, o, true)
}

// Open opens an overlay that Create made. What is missing, or of another size, is an error: to make it anew would be to
// forget what was written.
func Open(path, maps string, base Base, o Options) (*Overlay, error) {
	return openFiles(path, maps, base, o, false)
}

func openFiles(path, maps string, base Base, o Options, create bool) (*Overlay, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE | os.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, err
	}
	ov, err := open(f, maps, boot, base, o, create)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("overlay %s: %w", path, err), f.Close())
	}
	return ov, nil
}

func open(f *os.File, maps, boot string, base Base, o Options, create bool) (*Overlay, error) {
	if create {
		if err := f.Truncate(base.Size()); err != nil {
			return nil, err
		}
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if size := info.Size(); size != base.Size() {
		return nil, fmt.Errorf("it has %d bytes, the disk %d", size, base.Size())
	}
	m, err := newMap(maps, boot, base.Size(), create)
	if err != nil {
		return nil, err
	}
	return &Overlay{base: base, f: f, m: m, o: o}, nil
}

// Size is the disk's size in bytes.
func (ov *Overlay) Size() int64 { return ov.base.Size() }

// ReadOnly is false.
func (ov *Overlay) ReadOnly() bool { return false }

// Written is how many bytes of the disk stand in the overlay.
func (ov *Overlay) Written() int64 { return min(ov.m.count()*Block, ov.Size()) }

// Path is where the data is.
func (ov *Overlay) Path() string { return ov.f.Name() }

// ReadAt fills p.
func (ov *Overlay) ReadAt(p []byte, off int64, nowait bool) error {
	return ov.runs(off, int64(len(p)), func(at, n int64, present bool) error {
		part := p[at-off : at-off+n]
		if !present {
			return ov.base.ReadAt(part, at, nowait)
		}
		return ov.read(part, at, nowait)
	})
}

func (ov *Overlay) read(p []byte, off int64, nowait bool) error {
	if nowait {
		n, err := unix.Preadv2(int(ov.f.Fd()), [][]byte{p}, off, unix.RWF_NOWAIT)
		if err != nil || n != len(p) {
			return nbd.ErrWouldBlock
		}
		return nil
	}
	if _, err := ov.f.ReadAt(p, off); err != nil {
		return fmt.Errorf("read overlay %s: %w", ov.f.Name(), err)
	}
	return nil
}

// runs calls fn with the parts of a range that all stand in the file or all do not.
func (ov *Overlay) runs(off, n int64, fn func(off, n int64, present bool) error) error {
	for end := off + n; off < end; {
		first := off / Block
		k, present := ov.m.run(first, (end-1)/Block-first+1)
		to := min(end, (first+k)*Block)
		if err := fn(off, to-off, present); err != nil {
			return err
		}
		off = to
	}
	return nil
}

// Extents calls fn with runs that together fill the range, and whether each is known to read as zeroes.
func (ov *Overlay) Extents(off, n int64, fn func(n int64, zero bool)) error {
	return ov.runs(off, n, func(at, n int64, present bool) error {
		if !present {
			return ov.base.Extents(at, n, fn)
		}
		for n > 0 {
			k, hole := ov.hole(at, n)
			fn(k, hole)
			at, n = at+k, n-k
		}
		return nil
	})
}

// hole is the length of the run at off of the file that is all data or all hole, and which.
func (ov *Overlay) hole(off, n int64) (run int64, hole bool) {
	data, err := unix.Seek(int(ov.f.Fd()), off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return n, true
	case err != nil:
		return n, false
	case data > off:
		return min(n, data-off), true
	}
	end, err := unix.Seek(int(ov.f.Fd()), off, unix.SEEK_HOLE)
	if err != nil || end <= off {
		return n, false
	}
	return min(n, end-off), false
}

// lock keeps others from writing a range.
func (ov *Overlay) lock(off, n int64) (unlock func()) {
	first, last := off/stripe, (off+n-1)/stripe
	if last-first >= stripes-1 {
		first, last = 0, stripes-1
	}
	a, b := first%stripes, last%stripes
	var held [stripes]bool
	for i := int64(0); i < stripes; i++ {
		if a <= b && i >= a && i <= b || a > b && (i >= a || i <= b) {
			ov.locks[i].Lock()
			held[i] = true
		}
	}
	return func() {
		for i := range held {
			if held[i] {
				ov.locks[i].Unlock()
			}
		}
	}
}

// Change does the changes in their order.
func (ov *Overlay) Change(changes []nbd.Change) error {
	for _, c := range changes {
		if err := ov.change(c); err != nil {
			return err
		}
	}
	return nil
}

func (ov *Overlay) change(c nbd.Change) error {
	if c.Len == 0 {
		return nil
	}
	if err := ov.usable(); err != nil {
		return err
	}
	if c.Op == nbd.OpWrite {
		if err := ov.room(c.Len); err != nil {
			return err
		}
	}
	defer ov.lock(c.Off, c.Len)()
	// A block that is written in part is whole before.
	end := c.Off + c.Len
	for _, edge := range []int64{c.Off, end} {
		if edge%Block == 0 || edge == ov.Size() {
			continue
		}
		if err := ov.copyUp(edge/Block, 1); err != nil {
			return err
		}
	}
	first, n := c.Off/Block, (end-1)/Block-c.Off/Block+1
	if c.Op != nbd.OpWrite {
		if err := ov.zero(c.Off, c.Len); err != nil {
			return err
		}
	} else if _, err := ov.f.WriteAt(c.Buf, c.Off); err != nil {
		return fmt.Errorf("write overlay: %w", err)
	}
	return ov.m.set(first, n)
}

// copyUp takes those of n blocks that do not stand in the file from the base. Their part of the disk is locked.
func (ov *Overlay) copyUp(first, n int64) error {
	end := min((first+n)*Block, ov.Size())
	return ov.runs(first*Block, end-first*Block, func(off, n int64, present bool) error {
		if present {
			return nil
		}
		if err := ov.copyRun(off, n); err != nil {
			return err
		}
		return ov.m.set(off/Block, (n+Block-1)/Block)
	})
}

// copyRun copies a run of the base to the file. A crash may have left something there that counts for nothing.
func (ov *Overlay) copyRun(off, n int64) error {
	type part struct {
		n    int64
		zero bool
	}
	var parts []part
	if err := ov.base.Extents(off, n, func(n int64, zero bool) { parts = append(parts, part{n, zero}) }); err != nil {
		return err
	}
	var buf []byte
	for _, p := range parts {
		if p.zero {
			if err := ov.zero(off, p.n); err != nil {
				return err
			}
			off += p.n
			continue
		}
		for p.n > 0 {
			if buf == nil {
				buf = make([]byte, min(n, stripe))
			}
			b := buf[:min(int64(len(buf)), p.n)]
			if err := ov.base.ReadAt(b, off, false); err != nil {
				return err
			}
			if _, err := ov.f.WriteAt(b, off); err != nil {
				return fmt.Errorf("write overlay: %w", err)
			}
			off, p.n = off+int64(len(b)), p.n-int64(len(b))
		}
	}
	return nil
}

// zero makes a range of the file read as zeroes.
func (ov *Overlay) zero(off, n int64) error {
	if k, hole := ov.hole(off, n); hole && k == n {
		return nil
	}
	err := unix.Fallocate(int(ov.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	if err == nil {
		return nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("zero a part of the overlay: %w", err)
	}
	zeroes := make([]byte, min(n, stripe))
	for n > 0 {
		b := zeroes[:min(n, stripe)]
		if _, err := ov.f.WriteAt(b, off); err != nil {
			return fmt.Errorf("write overlay: %w", err)
		}
		off, n = off+int64(len(b)), n-int64(len(b))
	}
	return nil
}

// room refuses what would take the last of the file system's room from others.
func (ov *Overlay) room(n int64) error {
	if ov.o.Reserve == 0 {
		return nil
	}
	if ov.taken.Add(n) < roomEvery {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(ov.f.Fd()), &st); err != nil {
		return nil // it can not be told: the write finds out
	}
	if int64(st.Bavail)*st.Bsize-n < ov.o.Reserve {
		return fmt.Errorf("overlay %s: less than %d bytes are free in its file system, which are kept for the journal: %w", ov.f.Name(), ov.o.Reserve, syscall.ENOSPC)
	}
	ov.taken.Store(0)
	return nil
}

func (ov *Overlay) usable() error {
	if err := ov.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// Flush makes every change durable that returned before.
func (ov *Overlay) Flush() error {
	ov.sync.Lock()
	defer ov.sync.Unlock()
	if err := ov.usable(); err != nil {
		return err
	}
	pages := ov.m.changed()
	err := unix.Fdatasync(int(ov.f.Fd()))
	if err == nil {
		err = ov.m.save(pages)
	}
	if err != nil {
		err = errors.Join(fmt.Errorf("sync overlay %s: %w: it takes no more writes, and is as of the last flush when it is opened again", ov.f.Name(), err), ov.m.disown())
		ov.failed.Store(&err)
	}
	return err
}

// Fill copies what only the base has to the file, until ctx ends. When it returns nil the file is the disk; a Flush makes
// that durable. progress is told of bytes of the disk that are done.
func (ov *Overlay) Fill(ctx context.Context, progress func(bytes int64)) error {
	for off := int64(0); off < ov.Size(); off += stripe {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(stripe, ov.Size()-off)
		if err := ov.fillPart(off, n); err != nil {
			return fmt.Errorf("fill overlay %s at %d: %w", ov.f.Name(), off, err)
		}
		progress(n)
	}
	return nil
}

func (ov *Overlay) fillPart(off, n int64) error {
	first, blocks := off/Block, (n+Block-1)/Block
	if k, present := ov.m.run(first, blocks); present && k == blocks {
		return nil
	}
	if err := ov.usable(); err != nil {
		return err
	}
	defer ov.lock(off, n)()
	return ov.copyUp(first, blocks)
}

// Close closes the files. What was not flushed is with the kernel.
func (ov *Overlay) Close() error { return errors.Join(ov.m.close(), ov.f.Close()) }
