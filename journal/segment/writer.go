package segment

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Sizes of segment files in bytes.
const (
	DefaultSize = 256 << 20
	MinSize     = 64 << 10
	MaxSize     = 1 << 30
)

// giveBack is how many unused bytes of a file are worth giving back when the next is begun.
const giveBack = 1 << 20

// Writer appends to the newest file of one kind. Append, Roll and Close must
// be serialised by the caller; Sync may run beside them.
type Writer struct {
	set  *Set
	kind Kind
	size int64 // of a new file, bytes
	keep int64 // bytes that a new file must leave free on the file system

	cur   *File // nil before the first Roll
	tail  int64 // where the next record goes
	ahead int64 // up to here the file was written, with zeroes behind tail

	unsynced atomic.Int64 // bytes appended since the last Sync began
	eager    atomic.Bool  // little was appended between the last two Syncs: see zeroAhead

	// spare is the next file, allocated ahead so that a roll costs a rename.
	spare struct {
		wg   sync.WaitGroup
		mu   sync.Mutex
		file vfs.File // guarded by mu; nil: none
	}

	mu struct {
		sync.Mutex
		dirty   []*File // with records that no Sync has covered, oldest first; each holds a reference
		newName bool    // a file was created and the directory not synced since
	}
}

// NewWriter makes a writer without a current file: the first record needs a
// Roll. New files have size bytes, and leave at least keep bytes free on their
// file system: a roll that cannot meets ENOSPC.
func NewWriter(set *Set, kind Kind, size, keep int64) *Writer {
	return &Writer{set: set, kind: kind, size: size, keep: keep}
}

// Current is the file that records go to, nil before the first Roll.
func (w *Writer) Current() *File { return w.cur }

// Tail is where the next record goes, in bytes.
func (w *Writer) Tail() int64 { return w.tail }

// Fits reports whether n more bytes of records fit the current file.
func (w *Writer) Fits(n int64) bool { return w.cur != nil && w.tail+n <= w.cur.Alloc() }

// Roll begins a new file with room for at least n bytes of records. Number,
// Salt and Kind of h are filled in. When space runs out it is an [ErrFull], the writer is as it was
// before, and a later Roll may succeed.
func (w *Writer) Roll(h Header, n int64) (err error) {
	if err := w.roll(h, n); err != nil {
		return err
	}
	w.prepareSpare()
	return nil
}

func (w *Writer) roll(h Header, n int64) (err error) {
	defer func() {
		if osfile.IsNoSpace(err) {
			err = fmt.Errorf("%w: %w", ErrFull, err)
		}
	}()
	h.Kind, h.Number = w.kind, w.set.nextNumber()
	var salt [4]byte
	if _, err := rand.Read(salt[:]); err != nil {
		return fmt.Errorf("draw a salt: %w", err)
	}
	h.Salt = binary.LittleEndian.Uint32(salt[:])
	if err := h.Reigns.Check(); err != nil {
		return fmt.Errorf("begin a segment of group %q: %w", h.Name, err)
	}
	head := h.encode()
	if len(h.Name) > 255 || len(head) > maxHeaderSize || len(h.Disks) > record.MaxDisks {
		return fmt.Errorf("group %q with %d disks does not fit a segment's header", h.Name, len(h.Disks))
	}
	least := int64(len(head)) + n
	alloc := max(w.size, least)
	vf, err := w.takeSpare(alloc)
	// Originals are what a full journal must write before it can forget
	// anything: a small file will do.
	for w.kind == Originals && osfile.IsNoSpace(err) && alloc > least {
		alloc = max(alloc/4, least)
		vf, err = w.create(alloc, w.keep)
	}
	if err != nil {
		return fmt.Errorf("begin a segment of %d bytes in %s: %w", alloc, w.set.dir, err)
	}
	path := w.set.fs.PathJoin(w.set.dir, fileName(w.kind, h.First, h.Number))
	f := &File{Header: h, Path: path, f: vf, start: int64(len(head))}
	f.alloc.Store(alloc)
	f.refs.Store(1)
	if err := osfile.WriteVec(vf, [][]byte{head}, 0); err != nil {
		return errors.Join(fmt.Errorf("write the header of %s: %w", f.Path, err), vf.Close())
	}
	if err := w.set.fs.Rename(w.tmpPath(), f.Path); err != nil {
		return errors.Join(fmt.Errorf("name a segment: %w", err), vf.Close())
	}
	if old := w.cur; old != nil && old.Alloc()-w.tail >= giveBack {
		_ = w.set.shorten(old, w.tail) // while nobody takes it for closed; if it can not be, it is as long as it was
	}
	w.set.add(f)
	w.cur, w.tail, w.ahead = f, f.start, f.start
	w.mu.Lock()
	w.mu.newName = true
	w.markDirtyLocked(f)
	w.mu.Unlock()
	return nil
}

func (w *Writer) tmpPath() string {
	return w.set.fs.PathJoin(w.set.dir, w.kind.String()+tmpSuffix)
}

// takeSpare returns an empty file of alloc bytes at tmpPath.
func (w *Writer) takeSpare(alloc int64) (vfs.File, error) {
	w.spare.wg.Wait()
	w.spare.mu.Lock()
	vf := w.spare.file
	w.spare.file = nil
	w.spare.mu.Unlock()
	if vf != nil && alloc == w.size {
		return vf, nil
	}
	if vf != nil {
		_ = vf.Close() // unused, and replaced by the file made below
	}
	return w.create(alloc, w.keep)
}

func (w *Writer) create(alloc, keep int64) (vfs.File, error) {
	vf, err := w.set.createTmp(w.tmpPath(), alloc, keep)
	if err != nil {
		return nil, err
	}
	if err := osfile.Allocate(vf, alloc); err != nil {
		return nil, errors.Join(err, vf.Close(), w.set.fs.Remove(w.tmpPath()))
	}
	return vf, nil
}

// prepareSpare allocates the next file in the background. A failure is no
// matter: the next Roll tries itself and has someone to tell.
func (w *Writer) prepareSpare() {
	if w.cur.f.Fd() == vfs.InvalidFd || w.kind != Log {
		return
	}
	keep := w.keep
	w.spare.wg.Go(func() {
		vf, err := w.create(w.size, keep)
		if err != nil {
			return
		}
		// The size reaches the disk now, not within a guest's flush.
		if vf.Sync() != nil {
			_ = vf.Close()
			return
		}
		w.spare.mu.Lock()
		w.spare.file = vf
		w.spare.mu.Unlock()
	})
}

// DropSpare gives the space of the file that was allocated ahead back.
func (w *Writer) DropSpare() error {
	w.spare.wg.Wait()
	w.spare.mu.Lock()
	vf := w.spare.file
	w.spare.file = nil
	w.spare.mu.Unlock()
	if vf == nil {
		return nil
	}
	return errors.Join(vf.Close(), w.set.fs.Remove(w.tmpPath()))
}

// Keep sets the bytes that new files leave free from now on.
func (w *Writer) Keep(n int64) { w.keep = n }

// Room is how many bytes of new files the file system has room for, if it can tell.
func (w *Writer) Room() int64 {
	u, err := w.set.fs.GetDiskUsage(w.set.dir)
	if err != nil {
		return math.MaxInt64
	}
	return int64(u.AvailBytes) - w.keep
}

// markDirtyLocked notes that f has records to sync. w.mu is held.
func (w *Writer) markDirtyLocked(f *File) {
	if n := len(w.mu.dirty); n == 0 || w.mu.dirty[n-1] != f {
		f.refs.Add(1)
		w.mu.dirty = append(w.mu.dirty, f)
	}
}

// Append writes the encoded records to the current file, in which they fit. n
// is the sum of the buffers' lengths; the slice that holds them may be appended to. When it returns, the records are with
// the kernel; they are durable after a later Sync.
func (w *Writer) Append(bufs [][]byte, n int64) error {
	if !w.Fits(n) {
		return fmt.Errorf("append %d bytes to %s: %d are left", n, w.cur.Path, w.cur.Alloc()-w.tail)
	}
	end := w.tail + n
	if w.eager.Load() && end > w.ahead {
		w.ahead = min(end+zeroAhead, w.cur.Alloc())
		bufs = append(bufs, zeroRun[:w.ahead-end])
	}
	if err := osfile.WriteVec(w.cur.f, bufs, w.tail); err != nil {
		return fmt.Errorf("append to %s: %w", w.cur.Path, err)
	}
	// After the write, never before: a Sync that runs meanwhile would take the
	// file off the list without these bytes, and the next Sync would not find it.
	w.mu.Lock()
	w.markDirtyLocked(w.cur)
	w.mu.Unlock()
	w.unsynced.Add(n)
	w.tail = end
	return nil
}

// zeroAhead is how many bytes behind the tail are written as zeroes, together
// with a record, while little is appended from one Sync to the next. The first write
// to allocated space changes the file's metadata, which a Sync must make durable too; to write
// where zeroes are does not, and makes the Sync of a guest's flush half as long.
// Who appends more than eagerBytes between two Syncs waits for the bytes, not for the metadata.
const (
	zeroAhead  = 256 << 10
	eagerBytes = 64 << 10
)

var zeroRun [zeroAhead]byte

// Sync makes every record durable whose Append returned before Sync was
// called, and the names of their files.
func (w *Writer) Sync() error {
	w.mu.Lock()
	dirty, newName := w.mu.dirty, w.mu.newName
	w.mu.dirty, w.mu.newName = nil, false
	w.mu.Unlock()
	if n := w.unsynced.Swap(0); n > 0 {
		w.eager.Store(w.kind == Log && n <= eagerBytes)
	}
	for _, f := range dirty {
		if err := f.Sync(); err != nil {
			return err
		}
		f.Release()
	}
	if newName {
		return w.set.syncDir()
	}
	return nil
}

// Close syncs, gives unused space of the current file back, and drops the spare.
func (w *Writer) Close() error {
	err := errors.Join(w.Sync(), w.DropSpare())
	if w.cur == nil || err != nil {
		return err
	}
	if err := w.set.shorten(w.cur, w.tail); err != nil {
		return err
	}
	return w.cur.f.Sync()
}

// Encoder gathers records for one Append.
type Encoder struct {
	Headers []byte // scratch that the encoded headers stand in
	Vec     [][]byte
	Bytes   int64
}

var zeroPad [record.Alignment]byte

// Reset empties the encoder; its memory is kept. room is what Headers must
// hold until the next Reset, in bytes: it must not move while Vec points to it.
func (e *Encoder) Reset(room int) {
	if cap(e.Headers) < room {
		e.Headers = make([]byte, 0, room)
	}
	e.Headers, e.Vec, e.Bytes = e.Headers[:0], e.Vec[:0], 0
}

// Add appends a record. payload is only referred to, and must stay as it is
// until the Append.
func (e *Encoder) Add(h *record.Header, payload []byte) {
	at := len(e.Headers)
	e.Headers = h.Append(e.Headers)
	e.Vec = append(e.Vec, e.Headers[at:len(e.Headers):len(e.Headers)])
	size := h.Size()
	if len(payload) > 0 {
		e.Vec = append(e.Vec, payload)
	}
	if pad := size - int64(h.EncodedSize()) - int64(len(payload)); pad > 0 {
		e.Vec = append(e.Vec, zeroPad[:pad])
	}
	e.Bytes += size
}
