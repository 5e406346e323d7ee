package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Journal is what a disk needs of its group's journal.
type Journal interface {
	// Acquire returns a segment to read from, with a reference.
	Acquire(number uint32) (*segment.File, error)
	// Original appends what an extent of whole blocks holds before it is
	// overwritten for the first time, with what the record at an LSN left of it; nil content is zeroes. The slice is not kept.
	// A segment.ErrFull says that this one is not kept, and those before it are.
	Original(d *Disk, ext record.Extent, content []byte, until record.LSN) error
	// CommitOriginals makes every Original so far durable and findable by
	// views, together with the pages of the captured bitmap.
	CommitOriginals(d *Disk, pages map[int64][]byte) error
}

// Disk is one disk of a group with its backing. A disk that was removed from its group is
// without one until it comes back.
type Disk struct {
	ID    record.DiskID
	Name  string
	Size  int64      // bytes
	Added record.LSN // the disk has no past before

	backing  atomic.Pointer[backing] // nil: detached
	journal  Journal
	captured bitmap
	since    atomic.Uint64 // LSN, see KnownSince

	mu struct {
		sync.RWMutex
		active *layer
		frozen *layer // nil unless between Freeze and Drop
	}
}

type backing struct {
	vfs.File
	path string
	// flushed says that what others wrote to the file before it was a disk is durable; Apply's.
	flushed bool
}

// flushOnce makes what others wrote to the file durable: file systems have taken what was not for holes.
func (b *backing) flushOnce() error {
	if b.flushed {
		return nil
	}
	err := b.SyncData()
	b.flushed = err == nil
	return err
}

// ErrDetached is wrapped by what needs the backing of a disk that has none.
var ErrDetached = errors.New("disk was removed from its group")

// New makes a disk without a backing; the overlay is empty.
func New(id record.DiskID, name string, size int64, added record.LSN, j Journal) *Disk {
	d := &Disk{ID: id, Name: name, Size: size, Added: added, journal: j}
	d.captured.pages = map[int64]*[pageBytes]byte{}
	d.mu.active = newLayer()
	return d
}

// Attach gives the disk its open backing, which the disk owns from then on. The backing is what
// the journal last left there.
func (d *Disk) Attach(f vfs.File, path string) { d.backing.Store(&backing{File: f, path: path}) }

// Detach closes the backing. Everything is applied, and nobody uses the disk.
func (d *Disk) Detach() error {
	if b := d.backing.Swap(nil); b != nil {
		return b.Close()
	}
	return nil
}

// Attached reports whether the disk has a backing.
func (d *Disk) Attached() bool { return d.backing.Load() != nil }

// Path is where the backing is; empty if there is none.
func (d *Disk) Path() string {
	if b := d.backing.Load(); b != nil {
		return b.path
	}
	return ""
}

// attached is the backing, or why there is none.
func (d *Disk) attached() (*backing, error) {
	b := d.backing.Load()
	if b == nil {
		return nil, fmt.Errorf("disk %s: %w", d.Name, ErrDetached)
	}
	return b, nil
}

// Replaced reports whether the backing's path leads to another file than the one that
// is open, or to none: what is applied does not reach it.
func (d *Disk) Replaced() (bool, error) {
	b, err := d.attached()
	if err != nil {
		return false, err
	}
	id, ok, err := osfile.Identify(b.File)
	if err != nil || !ok {
		return false, err
	}
	now, err := osfile.IdentifyPath(b.path)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	return now != id, err
}

// BlockLen is the length of a block in bytes: short for the last one of a
// disk that is not whole blocks.
func (d *Disk) BlockLen(block int64) int {
	return int(min(record.BlockSize, d.Size-block*record.BlockSize))
}

// Insert puts a record, already in its segment, over the backing. payload is
// the place of its payload in the file. It returns what the overlay grew by, in
// units of some 400 bytes.
func (d *Disk) Insert(h *record.Header, file uint32, payload int64) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	first, n := h.Extent.Off/record.BlockSize, int64(record.Blocks(h.Extent.Len))
	l := d.mu.active
	before := l.weight()
	switch h.Kind {
	case record.KindWrite:
		l.insert(first, n, func(i int64) place {
			return place{lsn: h.LSN, file: file, off: uint32(payload + i*record.BlockSize), sum: h.Sums.At(int(i))}
		})
	case record.KindZero:
		l.insertZero(first, n, place{lsn: h.LSN, file: zeroes})
	case record.KindTrim:
		l.insertZero(first, n, place{lsn: h.LSN, file: zeroes, off: 1})
	}
	return l.weight() - before
}

// Captured reports whether the journal holds what the block was before its
// overwrites: if not, the backing still does.
func (d *Disk) Captured(block int64) bool { return d.captured.get(block) }

// CapturedIn calls fn with the runs of captured blocks within a run of n blocks.
func (d *Disk) CapturedIn(first, n int64, fn func(first, n int64) error) error {
	end := first + n
	for b := first; b < end; {
		if next := d.captured.next(b); next > b {
			b = next
			continue
		}
		k := b
		for k < end && d.captured.get(k) {
			k++
		}
		if k == b {
			b++
			continue
		}
		if err := fn(b, k-b); err != nil {
			return err
		}
		b = k
	}
	return nil
}

// KnownSince is the LSN from which on the backing is known to hold what the
// journal says of blocks that are not captured: above zero if it was found
// changed by someone else. Views below it must not fall to the backing.
func (d *Disk) KnownSince() record.LSN { return record.LSN(d.since.Load()) }

// SetKnownSince notes a discontinuity.
func (d *Disk) SetKnownSince(lsn record.LSN) { d.since.Store(uint64(lsn)) }

// LoadCaptured sets a page of the bitmap, at open.
func (d *Disk) LoadCaptured(page int64, bits []byte) { d.captured.load(page, bits) }

// Pages returns the bitmap pages as they are with some blocks captured and others not.
func (d *Disk) Pages(captured, forgotten []int64) map[int64][]byte {
	return d.captured.changed(captured, forgotten)
}

// Forget clears the blocks' bits: their newest version stands in the backing,
// and the journal holds no other. Apply must not be under way, and none of the
// blocks be in the overlay: those have a newer version, for which theirs is kept.
func (d *Disk) Forget(blocks []int64) { d.captured.change(blocks, false) }

// Keep sets the blocks' bits: the journal holds a version of each that has no record any more.
func (d *Disk) Keep(blocks []int64) { d.captured.change(blocks, true) }

// placesPool keeps scratch for reads, up to 256 blocks (1 MiB).
var placesPool = sync.Pool{New: func() any { s := make([]place, 0, 256); return &s }}

// ReadAt fills p with the disk's current bytes from off, any alignment, within
// the disk. With nowait it returns osfile.ErrWouldBlock rather than wait for
// the disk under the files.
func (d *Disk) ReadAt(p []byte, off int64, nowait bool) error {
	if !(record.Extent{Off: off, Len: int64(len(p))}).In(d.Size) {
		return fmt.Errorf("read %d bytes at %d of disk %s: its size is %d", len(p), off, d.Name, d.Size)
	}
	if len(p) == 0 {
		return nil
	}
	first := off / record.BlockSize
	n := int((off+int64(len(p))-1)/record.BlockSize - first + 1)
	scratch := placesPool.Get().(*[]place)
	defer placesPool.Put(scratch)
	if cap(*scratch) < n {
		*scratch = make([]place, n)
	}
	places := (*scratch)[:n]
	for try := 0; ; try++ {
		d.mu.RLock()
		any := lookup(d.mu.active, d.mu.frozen, first, places)
		d.mu.RUnlock()
		if !any {
			return d.readBacking(p, off, nowait)
		}
		err := d.readPlaces(p, off, places, nowait)
		// A segment may be applied and expire between look-up and read: the
		// backing has its blocks then.
		if !errors.Is(err, segment.ErrGone) || try == maxRetries {
			return err
		}
	}
}

// maxRetries bounds how often a read follows blocks that move.
const maxRetries = 16

func (d *Disk) readBacking(p []byte, off int64, nowait bool) error {
	b, err := d.attached()
	if err != nil {
		return err
	}
	if err := osfile.ReadFull(b.File, p, off, nowait); err != nil {
		if err == osfile.ErrWouldBlock {
			return err
		}
		return fmt.Errorf("read backing %s of disk %s: %w", b.path, d.Name, err)
	}
	return nil
}

// ReadBacking reads the backing itself, past the overlay.
func (d *Disk) ReadBacking(p []byte, off int64, nowait bool) error {
	return d.readBacking(p, off, nowait)
}

// readPlaces reads run by run: blocks of the backing together, each block of a
// segment alone, verified.
func (d *Disk) readPlaces(p []byte, off int64, places []place, nowait bool) error {
	first := off / record.BlockSize
	end := off + int64(len(p))
	var file *segment.File
	defer func() {
		if file != nil {
			file.Release()
		}
	}()
	for i := 0; i < len(places); {
		j := i + 1
		for j < len(places) && places[j].file == 0 && places[i].file == 0 {
			j++
		}
		from := max(off, (first+int64(i))*record.BlockSize)
		to := min(end, (first+int64(j))*record.BlockSize)
		dst := p[from-off : to-off]
		switch pl := places[i]; pl.file {
		case 0:
			if err := d.readBacking(dst, from, nowait); err != nil {
				return err
			}
		case zeroes:
			clear(dst)
		default:
			if file == nil || file.Number != pl.file {
				if file != nil {
					file.Release()
				}
				var err error
				if file, err = d.journal.Acquire(pl.file); err != nil {
					return err
				}
			}
			if err := d.readBlock(dst, from, file, first+int64(i), pl, nowait); err != nil {
				return err
			}
		}
		i = j
	}
	return nil
}

// readBlock reads dst, which is all of a block or part of it, from the block's place.
func (d *Disk) readBlock(dst []byte, off int64, f *segment.File, block int64, pl place, nowait bool) error {
	n := d.BlockLen(block)
	if len(dst) == n {
		return f.Block(dst, int64(pl.off), pl.sum, nowait)
	}
	var whole [record.BlockSize]byte
	if err := f.Block(whole[:n], int64(pl.off), pl.sum, nowait); err != nil {
		return err
	}
	copy(dst, whole[off-block*record.BlockSize:])
	return nil
}

// Extents calls fn with runs of the extent that together fill it, and whether
// each is known to read as zeroes without being read.
func (d *Disk) Extents(ext record.Extent, fn func(n int64, zero bool)) error {
	const step = 4096 // blocks looked up at once
	for ext.Len > 0 {
		first := ext.Off / record.BlockSize
		n := min(step, int((ext.End()-1)/record.BlockSize-first+1))
		places := make([]place, n)
		d.mu.RLock()
		lookup(d.mu.active, d.mu.frozen, first, places)
		d.mu.RUnlock()
		for i := 0; i < n; {
			j := i + 1
			for j < n && (places[j].file == 0) == (places[i].file == 0) && (places[j].file == zeroes) == (places[i].file == zeroes) {
				j++
			}
			from := max(ext.Off, (first+int64(i))*record.BlockSize)
			run := min(ext.End(), (first+int64(j))*record.BlockSize) - from
			if places[i].file == 0 {
				d.BackingExtents(record.Extent{Off: from, Len: run}, fn)
			} else {
				fn(run, places[i].file == zeroes)
			}
			i = j
		}
		done := min(ext.End(), (first+int64(n))*record.BlockSize) - ext.Off
		ext.Off, ext.Len = ext.Off+done, ext.Len-done
	}
	return nil
}

// BackingExtents is Extents of the backing itself. What the file system can
// not tell is data.
func (d *Disk) BackingExtents(ext record.Extent, fn func(n int64, zero bool)) {
	b, err := d.attached()
	if err != nil {
		fn(ext.Len, false)
		return
	}
	for ext.Len > 0 {
		n, hole := osfile.Run(b.File, ext.Off, ext.Len)
		fn(n, hole)
		ext.Off, ext.Len = ext.Off+n, ext.Len-n
	}
}

// InBacking is how long a run from the start of an extent of whole blocks is, also of whole blocks, of which
// the backing holds not many more than most bytes that are no hole; data is how many.
func (d *Disk) InBacking(ext record.Extent, most int64) (n, data int64) {
	b, err := d.attached()
	if err != nil {
		return ext.Len, 0 // nothing is applied to it
	}
	for n < ext.Len && data < most {
		run, hole := osfile.Run(b.File, ext.Off+n, ext.Len-n)
		if !hole {
			run = min(run, most-data)
			data += run
		}
		n += run
	}
	if n < ext.Len {
		n = min(max(n&^(record.BlockSize-1), record.BlockSize), ext.Len)
	}
	return n, data
}

// Restore writes bytes to the backing that it held before. Nobody applies anything to it meanwhile. Zeroes may become a hole.
func (d *Disk) Restore(p []byte, off int64) error {
	b, err := d.attached()
	if err != nil {
		return err
	}
	if isZero(p) {
		ok, err := osfile.PunchHole(b.File, off, int64(len(p)))
		if ok || err != nil {
			return err
		}
	}
	if _, err := b.WriteAt(p, off); err != nil {
		return fmt.Errorf("write backing %s of disk %s at %d: %w", b.path, d.Name, off, err)
	}
	return nil
}

// SyncBacking makes what Apply wrote durable.
func (d *Disk) SyncBacking() error {
	b := d.backing.Load()
	if b == nil {
		return nil // it was synced before it was detached
	}
	if err := b.SyncData(); err != nil {
		return fmt.Errorf("sync backing %s of disk %s: %w", b.path, d.Name, err)
	}
	return nil
}

// Sync is SyncBacking with what the file system keeps of the file beside its data.
func (d *Disk) Sync() error {
	b, err := d.attached()
	if err != nil {
		return err
	}
	if err := b.File.Sync(); err != nil {
		return fmt.Errorf("sync backing %s of disk %s: %w", b.path, d.Name, err)
	}
	return nil
}

// errNoFrozen is a misuse of Apply.
var errNoFrozen = errors.New("apply without freeze")
