package segment

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Start is the offset of the first record, in bytes.
func (f *File) Start() int64 { return f.start }

// Alloc is what the file takes up, in bytes.
func (f *File) Alloc() int64 { return f.alloc.Load() }

// ReadAt fills p from off. With nowait it returns osfile.ErrWouldBlock rather
// than wait for the disk. The bytes are not verified: the caller has the sums. An error of a compact file may wrap record.ErrCorrupt.
func (f *File) ReadAt(p []byte, off int64, nowait bool) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.compact != nil {
		s := newScratch()
		defer s.done()
		s.nowait = nowait
		return f.readCompact(s, p, off)
	}
	return osfile.ReadFull(f.f, p, off, nowait)
}

// readSome fills p from off as far as the file's records go, or can be read, if any of it can.
func (f *File) readSome(p []byte, off int64) (int, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.compact == nil {
		return osfile.ReadAt(f.f, p, off)
	}
	if off >= f.compact.End {
		return 0, nil
	}
	p = p[:min(int64(len(p)), f.compact.End-off)]
	s := newScratch()
	defer s.done()
	err := f.readCompact(s, p, off)
	if n := s.good - off; n > 0 && errors.Is(err, record.ErrCorrupt) {
		return int(n), nil
	}
	return len(p), err
}

// ReadDamaged is ReadAt, but fills in what can not be read for damage with 0xff, which fails the records' checksums.
func (f *File) ReadDamaged(p []byte, off int64) error { return f.readDamaged(p, off, nil) }

// readDamaged is ReadDamaged, with blocks in the place of some frames, by where those stand.
func (f *File) readDamaged(p []byte, off int64, instead map[int64][]byte) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.compact == nil {
		return osfile.ReadFull(f.f, p, off, false)
	}
	s := newScratch()
	defer s.done()
	s.around, s.instead = true, instead
	return f.readCompact(s, p, off)
}

// Block reads the block of a payload at off and verifies it.
func (f *File) Block(p []byte, off int64, sum uint32, nowait bool) error {
	if err := f.ReadAt(p, off, nowait); err != nil {
		return err
	}
	if got := record.Checksum(p); got != sum {
		return fmt.Errorf("%w: %s: block at %d has checksum %08x, recorded %08x", record.ErrCorrupt, f.Path, off, got, sum)
	}
	return nil
}

// scanWindow is what a scan reads at once, in bytes; scanPeek is that behind a
// payload of scanFar bytes or more, which it passes over: a call costs less than
// the copy, and a disk that is read ahead of does not notice.
const (
	scanWindow = 1 << 20
	scanPeek   = 128
	scanFar    = 2 << 10
)

// Scan calls fn with each record's header from off on, which must be a
// record's place (or Start). It returns where it stopped, and nil if that is
// the end of what was written, an error that wraps record.ErrCorrupt if the
// bytes there are no record of this file, or fn's or the disk's error. Headers
// are verified, payloads are not. The header's table is valid until fn returns.
func (f *File) Scan(off int64, fn func(off int64, h record.Header) error) (int64, error) {
	off, end, err := f.scanPieces(off, fn)
	if end || err != nil {
		return off, err
	}
	w := window{f: f}
	defer w.done()
	for {
		h, err := w.header(off)
		switch {
		case errors.Is(err, errEnd):
			return off, nil
		case err != nil:
			return off, fmt.Errorf("%s at %d: %w", f.Path, off, err)
		}
		if err := fn(off, h); err != nil {
			return off, err
		}
		off += h.Size()
		if w.peek = 0; h.Payload >= scanFar {
			w.peek = max(scanPeek, h.EncodedSize()) // the next one is likely as long
		}
	}
}

var errEnd = errors.New("end of segment")

// ErrStop returned by a callback ends ScanLog and Resync without an error; Scan returns it.
var ErrStop = errors.New("stop")

// ScanLog calls fn with the records of log files, which follow each other,
// from offset from of the first one on. Records that a later file supersedes,
// and what follows them in their file, are passed over, damaged or not.
func ScanLog(files []*File, from int64, fn func(f *File, off int64, h record.Header) error) error {
	for i, f := range files {
		limit := record.MaxLSN
		for _, later := range files[i+1:] {
			limit = min(limit, later.First)
		}
		next := f.First
		_, err := f.Scan(from, func(off int64, h record.Header) error {
			if h.LSN >= limit {
				return errEnd
			}
			next = h.LSN + 1
			return fn(f, off, h)
		})
		switch {
		case errors.Is(err, ErrStop):
			return nil
		case errors.Is(err, errEnd), err != nil && next >= limit && errors.Is(err, record.ErrCorrupt):
		case err != nil:
			return err
		}
		if i+1 < len(files) {
			from = files[i+1].start
		}
	}
	return nil
}

// Succeeds reports whether a record of the file may come behind that of an LSN: as the next; of a bridge, as one more of those that share that LSN,
// or, a KindStanding, with a leap to where the gap ends.
func (f *File) Succeeds(last record.LSN, h *record.Header) bool {
	return h.LSN == last+1 || f.Bridge && (h.LSN == last && last >= f.First || h.LSN > last && last >= f.First-1 && h.Kind == record.KindStanding)
}

// window reads a file in large pieces for a scan.
type window struct {
	f     *File
	whole *[scanWindow]byte // nil: not read yet
	buf   []byte            // of whole: what was read
	off   int64             // of buf in the file
	peek  int               // read no more than this many bytes at once; 0: scanWindow
}

// windowPool keeps windows: a scan of a short file takes less than clearing one.
var windowPool = sync.Pool{New: func() any { return new([scanWindow]byte) }}

// done gives the window back. No header that it has returned is used any more.
func (w *window) done() {
	if w.whole != nil {
		windowPool.Put(w.whole)
		*w = window{}
	}
}

// at returns at least n bytes at off, or what is left of the file.
func (w *window) at(off int64, n int) ([]byte, error) {
	if off < w.off || off+int64(n) > w.off+int64(len(w.buf)) {
		if w.whole == nil {
			w.whole = windowPool.Get().(*[scanWindow]byte)
		}
		size := scanWindow
		if w.peek > 0 {
			size = max(w.peek, n)
		}
		got, err := w.f.readSome(w.whole[:size], off)
		if err != nil {
			w.buf = nil
			return nil, err
		}
		w.buf, w.off = w.whole[:got], off
	}
	b := w.buf[off-w.off:]
	return b, nil
}

func (w *window) header(off int64) (record.Header, error) {
	b, err := w.at(off, record.HeaderSize)
	if err != nil {
		return record.Header{}, err
	}
	if len(b) < record.HeaderSize || bytes.Equal(b[:record.HeaderSize], zeroHeader[:]) {
		return record.Header{}, errEnd
	}
	h, err := record.Decode(b)
	if errors.Is(err, record.ErrShort) {
		if b, err = w.at(off, record.MaxHeaderSize); err != nil {
			return record.Header{}, err
		}
	}
	if h, err = w.f.decode(b); err != nil {
		return record.Header{}, err
	}
	return h, nil
}

var zeroHeader [record.HeaderSize]byte

// decode reads a header that stands at b's start, of the file.
func (f *File) decode(b []byte) (record.Header, error) {
	h, err := record.Decode(b)
	if errors.Is(err, record.ErrShort) {
		err = fmt.Errorf("%w: header runs past the end of the file", record.ErrCorrupt)
	}
	if err == nil && h.Salt != f.Salt {
		err = fmt.Errorf("%w: record of another file (salt %08x, expected %08x)", record.ErrCorrupt, h.Salt, f.Salt)
	}
	return h, err
}

// VerifyPayload reads the payload of the record at off and compares it with
// the header's table. buf is scratch and is returned, perhaps grown.
func (f *File) VerifyPayload(off int64, h record.Header, buf []byte) ([]byte, error) {
	if h.Payload == 0 {
		return buf, nil
	}
	if cap(buf) < h.Payload {
		buf = make([]byte, h.Payload)
	}
	buf = buf[:h.Payload]
	if err := f.ReadAt(buf, off+int64(h.EncodedSize()), false); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: payload runs past the end of the file", record.ErrCorrupt)
		}
		return buf, fmt.Errorf("%s at %d: %w", f.Path, off, err)
	}
	if err := h.Sums.Verify(buf); err != nil {
		return buf, fmt.Errorf("%s at %d: LSN %d: %w", f.Path, off, h.LSN, err)
	}
	return buf, nil
}

// VerifyRecord is VerifyPayload, and looks for bytes behind the payload that nobody wrote, too.
func (f *File) VerifyRecord(off int64, h record.Header, buf []byte) ([]byte, error) {
	buf, err := f.VerifyPayload(off, h, buf)
	end := off + int64(h.EncodedSize()) + int64(h.Payload)
	if err != nil || end == off+h.Size() {
		return buf, err
	}
	var pad [record.Alignment]byte
	behind := pad[:off+h.Size()-end]
	if err := f.ReadAt(behind, end, false); err != nil {
		return buf, fmt.Errorf("%s at %d: %w", f.Path, end, err)
	}
	if pad != [record.Alignment]byte{} {
		return buf, fmt.Errorf("%w: %s at %d: LSN %d: bytes behind the payload", record.ErrCorrupt, f.Path, end, h.LSN)
	}
	return buf, nil
}

// VerifyHeader reads the file's header and compares it with what it was when the file was opened or begun.
func (f *File) VerifyHeader() error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	is, n := f.Header, f.start
	if f.compact != nil {
		is.Compact, n = f.compact.CompactHead, f.compact.head
	}
	b := make([]byte, n)
	if err := osfile.ReadFull(f.f, b, 0, false); err != nil {
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	h, err := DecodeHeader(b)
	if err != nil {
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	if !bytes.Equal(h.encode(), is.encode()) {
		return fmt.Errorf("%w: %s: its header is another one than when it was opened", record.ErrCorrupt, f.Path)
	}
	return nil
}

// Renew verifies the record at off like VerifyPayload, and writes it again as it
// stands. A kernel that failed to write a page may call it clean afterwards: what it shows then is
// not on the disk, and a Sync has nothing to do. After a Renew it has.
func (f *File) Renew(off int64, h record.Header, buf []byte) ([]byte, error) {
	if f.IsCompact() {
		return f.VerifyPayload(off, h, buf) // it was durable before it had its name
	}
	size := int(h.Size())
	if cap(buf) < size {
		buf = make([]byte, size)
	}
	buf = buf[:size]
	if err := f.ReadAt(buf, off, false); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: record runs past the end of the file", record.ErrCorrupt)
		}
		return buf, fmt.Errorf("%s at %d: %w", f.Path, off, err)
	}
	if err := h.Sums.Verify(buf[h.EncodedSize():][:h.Payload]); err != nil {
		return buf, fmt.Errorf("%s at %d: LSN %d: %w", f.Path, off, h.LSN, err)
	}
	if err := osfile.WriteVec(f.f, [][]byte{buf}, off); err != nil {
		return buf, fmt.Errorf("write %s again at %d: %w", f.Path, off, err)
	}
	return buf, nil
}

// RenewHeader does the same with the file's header.
func (f *File) RenewHeader() error {
	if f.IsCompact() {
		return nil
	}
	b := make([]byte, f.start)
	if err := f.ReadAt(b, 0, false); err != nil {
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	if err := osfile.WriteVec(f.f, [][]byte{b}, 0); err != nil {
		return fmt.Errorf("write the header of %s again: %w", f.Path, err)
	}
	return nil
}

// Sync makes the file's records durable, for one who used Renew. Writers have their own.
func (f *File) Sync() error { return f.sync(vfs.File.SyncData) }

// syncAll does so with what the file system knows of it, too.
func (f *File) syncAll() error { return f.sync(vfs.File.Sync) }

func (f *File) sync(how func(vfs.File) error) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if err := how(f.f); err != nil {
		return fmt.Errorf("sync %s: %w", f.Path, err)
	}
	return nil
}

// hole is the length of the run at off that is all data or all hole, and which.
func (f *File) hole(off int64) (n int64, hole bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.compact != nil {
		return f.compact.End - off, false // it has become so meanwhile
	}
	return osfile.Run(f.f, off, f.Alloc()-off)
}

// Resync calls fn with each valid record header at or after off, so that what lies
// behind damage can be told from a torn tail. ErrStop from fn ends it without an error.
func (f *File) Resync(off int64, fn func(at int64, h record.Header) error) error {
	if f.IsCompact() {
		return f.resyncPieces(off, fn)
	}
	w := window{f: f}
	defer w.done()
	first := record.Header{Kind: record.KindTrim, Extent: record.Extent{Len: 1}}
	magic := first.Append(nil)[:4]
	off = (off + record.Alignment - 1) &^ (record.Alignment - 1)
	data := off // up to here there is no hole
	for {
		// What was allocated and never written is a hole, and large.
		if off >= data && off < f.Alloc() {
			n, hole := f.hole(off)
			if hole {
				off += max(n&^(record.Alignment-1), record.Alignment)
				continue
			}
			data = off + n
		}
		b, err := w.at(off, record.HeaderSize)
		if err != nil {
			return err
		}
		if len(b) < record.HeaderSize {
			return nil
		}
		i := bytes.Index(b, magic)
		if i < 0 {
			i = len(b) - len(magic) + 1 // it may begin here
		}
		if i &^= record.Alignment - 1; i > 0 {
			off += int64(i)
			continue
		}
		if h, err := w.header(off); err == nil {
			if err := fn(off, h); err != nil {
				if errors.Is(err, ErrStop) {
					return nil
				}
				return err
			}
		}
		off += record.Alignment
	}
}
