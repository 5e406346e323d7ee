package segment

import (
	"bytes"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"syscall"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

const (
	// A file becomes compact only if that saves one part in worthShare of it. After worthLook bytes one is given up that does not.
	worthShare = 8
	worthLook  = 16 << 20
	// A difference is kept if it is shorter than one part in differShare of the block's own frame; if not, that is kept, and later ones are differences from it.
	differShare = 2
	// Up to runsMost bytes, runs are kept without a look at what zstd makes of the difference.
	runsMost = 512
	// manyVersions is how many versions of a block in the file make it worth to keep those whole that others are differences from so that they are read fast.
	manyVersions = 3
)

// Compact makes a file compact that nothing is added to any more, unless that saves little, and returns how many bytes it takes less. It leaves keep bytes free on the
// file system, or is an ErrFull. A file that has anything but its records, whole, stays as it is: record.ErrCorrupt. pause is called behind each step of some
// compactStep bytes, with how many were read; its error ends it. ErrGone says that the file was removed meanwhile, and [ErrUnsynced] that it is compact, but that a crash may undo what else
// was to be durable.
//
// A crash leaves the file as it was, or compact, and durable either way.
func (s *Set) Compact(f *File, keep int64, pause func(bytes int64) error) (saved int64, err error) {
	return s.compact(f, keep, compactor{pause: pause})
}

func (s *Set) compact(f *File, keep int64, c compactor) (saved int64, err error) {
	if f.IsCompact() {
		return 0, nil
	}
	defer func() {
		if osfile.IsNoSpace(err) {
			err = fmt.Errorf("%w: %w", ErrFull, err)
		}
	}()
	c.f, c.last, c.count = f, map[blockOf]base{}, map[blockOf]int{}
	if err := c.plan(); err != nil || len(c.plans) == 0 {
		return 0, err
	}
	path := s.tmpPath("compact")
	if c.out, err = s.createTmp(path, f.Alloc(), keep); err != nil {
		return 0, fmt.Errorf("begin a compact file: %w", err)
	}
	defer func() { s.temporary.Add(-c.counted) }()
	c.step = func(bytes int64) error { return s.step(&c, keep, bytes) }
	worth, err := c.write()
	if err == nil && worth {
		if err = c.compare(path); err == nil {
			s.changing.Lock()
			defer s.changing.Unlock()
			return s.replace(f, c.out, path, c.at)
		}
	}
	return 0, errors.Join(err, c.out.Close(), s.fs.Remove(path))
}

// compactStep is how many bytes are read between two pauses.
const compactStep = 1 << 20

// step is called behind each piece, with what was read.
func (s *Set) step(c *compactor, keep, bytes int64) error {
	if c.read += bytes; c.read < compactStep {
		return nil
	}
	read := c.read
	c.read = 0
	s.temporary.Add(c.at - c.counted)
	c.counted = c.at
	s.mu.RLock()
	there := s.mu.files[c.f.Number] == c.f
	s.mu.RUnlock()
	if !there {
		return fmt.Errorf("%w: number %d in %s", ErrGone, c.f.Number, s.dir)
	}
	if u, err := s.fs.GetDiskUsage(s.dir); err == nil && u.AvailBytes < uint64(keep) {
		return fmt.Errorf("%d bytes are free, %d are kept in reserve: %w", u.AvailBytes, keep, syscall.ENOSPC)
	}
	return c.pause(read)
}

// Temporary is how many bytes the compact files take up that are being written.
func (s *Set) Temporary() int64 { return s.temporary.Load() }

// compactor writes a file's records into a compact one.
type compactor struct {
	f       *File
	pause   func(int64) error
	step    func(int64) error
	read    int64 // since the last pause, bytes
	counted int64 // in Set.temporary
	// Without one, what it saves is measured.
	withoutDifferences bool

	plans []pieceAhead
	end   int64           // of the records
	count map[blockOf]int // versions of each block

	out  vfs.File
	at   int64 // where the next piece goes
	enc  *zstd.Encoder
	last map[blockOf]base

	dir                      []byte
	records                  []byte
	headers, lengths, frames []byte // of the piece under way
	frame, old, diff         []byte
	xor, s2                  []byte
}

// pieceAhead is a piece that is to be written.
type pieceAhead struct {
	first, end      int64 // of its records
	headers, frames int   // bytes, number
}

type blockOf struct {
	disk  record.DiskID
	block int64
}

// base is where a block stands whose frame needs no other: in the plain file, and that frame in the compact one.
type base struct {
	plain, at uint32
	frame     uint16 // length
	size      uint16 // of the block
}

// plan cuts the records into pieces.
func (c *compactor) plan() error {
	f := c.f
	head := make([]byte, f.start)
	if err := f.ReadAt(head, 0, false); err != nil {
		return fmt.Errorf("%s: %w", f.Path, err)
	}
	if !bytes.Equal(head, f.Header.encode()) {
		return nil // of an older version, or damaged
	}
	c.end = f.start
	end, err := f.Scan(f.start, func(off int64, h record.Header) error {
		if n := len(c.plans); n == 0 || c.plans[n-1].end-c.plans[n-1].first >= pieceBytes {
			c.plans = append(c.plans, pieceAhead{first: off, end: off})
		}
		p := &c.plans[len(c.plans)-1]
		p.end += h.Size()
		p.headers += h.EncodedSize()
		n := record.Blocks(int64(h.Payload))
		p.frames += n
		of := blockOf{h.Disk, h.Extent.Off / record.BlockSize}
		for range n {
			c.count[of]++
			of.block++
		}
		c.end = p.end
		return nil
	})
	if err != nil {
		return err
	}
	// Zeroes may be the file's end, or what damage left of a header.
	return f.Resync(end, func(at int64, _ record.Header) error {
		return fmt.Errorf("%w: %s: nothing at %d, and records behind it, at %d", record.ErrCorrupt, f.Path, end, at)
	})
}

// write writes all of the file, durably, unless it is not worth it.
func (c *compactor) write() (worth bool, err error) {
	c.enc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false),
		zstd.WithSingleSegment(true), zstd.WithWindowSize(record.BlockSize), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return false, err
	}
	h := c.f.Header
	h.Compact = CompactHead{Pieces: len(c.plans), Start: c.f.start, End: c.end}
	head, room := h.encode(), h.Compact.room()
	c.dir = make([]byte, 4, room)
	c.at = int64(len(head)) + 2*room
	most := func(read int64) int64 { return read - read/worthShare }
	for i := range c.plans {
		p := &c.plans[i]
		if err := c.piece(p); err != nil {
			return false, err
		}
		if read := p.end - c.f.start; read >= worthLook && c.at > most(read) {
			return false, nil
		}
		if err := c.step(p.end - p.first); err != nil {
			return false, err
		}
	}
	if c.at > most(c.f.Alloc()) {
		return false, nil
	}
	binary.LittleEndian.PutUint32(c.dir, record.Checksum(c.dir[4:]))
	c.dir = c.dir[:room] // made with zeroes
	if err := osfile.WriteVec(c.out, [][]byte{head, c.dir, c.dir}, 0); err != nil {
		return false, fmt.Errorf("write the head of a compact file: %w", err)
	}
	if err := c.out.Sync(); err != nil {
		return false, fmt.Errorf("sync a compact file: %w", err)
	}
	return true, nil
}

// piece writes the next piece.
func (c *compactor) piece(p *pieceAhead) error {
	n := int(p.end - p.first)
	c.records = slices.Grow(c.records[:0], n)[:n]
	if err := c.f.ReadAt(c.records, p.first, false); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: %w", record.ErrCorrupt, err) // a crash tore the last record
		}
		return fmt.Errorf("%s at %d: %w", c.f.Path, p.first, err)
	}
	c.headers, c.lengths, c.frames = c.headers[:0], c.lengths[:0], c.frames[:0]
	frames := c.at + pieceFixed + int64(p.headers) + 2*int64(p.frames)
	for off := 0; off < n; {
		h, err := record.Decode(c.records[off:])
		if err == nil && (h.Salt != c.f.Salt || h.Size() > int64(n-off)) {
			err = fmt.Errorf("%w: record of another file, or cut short", record.ErrCorrupt)
		}
		if err == nil {
			err = c.record(p.first+int64(off), &h, c.records[off:off+int(h.Size())], frames)
		}
		if err != nil {
			return fmt.Errorf("%s at %d: %w", c.f.Path, p.first+int64(off), err)
		}
		off += int(h.Size())
	}
	le := binary.LittleEndian
	b := make([]byte, pieceFixed, pieceFixed+len(c.headers)+len(c.lengths))
	le.PutUint32(b, pieceMagic)
	le.PutUint32(b[8:], record.Checksum(c.frames))
	le.PutUint32(b[12:], uint32(p.first))
	le.PutUint32(b[16:], uint32(p.end))
	le.PutUint32(b[20:], uint32(len(c.frames)))
	le.PutUint32(b[24:], uint32(len(c.headers)))
	le.PutUint32(b[28:], uint32(len(c.lengths)/2))
	b = append(append(b, c.headers...), c.lengths...)
	le.PutUint32(b[4:], record.Checksum(b[8:]))
	size := int64(len(b) + len(c.frames))
	if int64(len(b)) != frames-c.at || c.at+size > math.MaxUint32 {
		return fmt.Errorf("a piece for records from %d to %d of %s has %d bytes of headers, planned were %d", p.first, p.end, c.f.Path, len(b), frames-c.at)
	}
	if err := osfile.WriteVec(c.out, [][]byte{b, c.frames}, c.at); err != nil {
		return fmt.Errorf("write a compact file: %w", err)
	}
	c.dir = le.AppendUint32(le.AppendUint32(c.dir, uint32(p.first)), uint32(c.at))
	c.at += size
	return nil
}

// record adds a record, b, to the piece, whose frames stand from an offset on.
func (c *compactor) record(off int64, h *record.Header, b []byte, frames int64) error {
	headers := h.EncodedSize()
	payload, pad := b[headers:headers+h.Payload], b[headers+h.Payload:]
	if err := h.Sums.Verify(payload); err != nil {
		return fmt.Errorf("LSN %d: %w", h.LSN, err)
	}
	if !zeroes(pad) {
		return fmt.Errorf("%w: LSN %d: bytes behind the payload", record.ErrCorrupt, h.LSN)
	}
	c.headers = append(c.headers, b[:headers]...)
	of := blockOf{h.Disk, h.Extent.Off / record.BlockSize}
	at := off + int64(headers)
	for len(payload) > 0 {
		n := min(len(payload), record.BlockSize)
		was := len(c.frames)
		if err := c.block(of, at, payload[:n], frames+int64(was)); err != nil {
			return err
		}
		c.lengths = binary.LittleEndian.AppendUint16(c.lengths, uint16(len(c.frames)-was))
		payload, at, of.block = payload[n:], at+int64(n), of.block+1
	}
	return nil
}

func zeroes(b []byte) bool {
	for len(b) > len(zeroRun) {
		if !zeroes(b[:len(zeroRun)]) {
			return false
		}
		b = b[len(zeroRun):]
	}
	return bytes.Equal(b, zeroRun[:len(b)])
}

// block adds the frame of a block that stands at plain in the plain file; the frame will stand at at.
func (c *compactor) block(of blockOf, plain int64, b []byte, at int64) error {
	if zeroes(b) {
		return nil
	}
	from, ok := c.last[of]
	ok = ok && int(from.size) == len(b) && !c.withoutDifferences
	if ok {
		if err := c.difference(from, b); err != nil {
			return err
		}
		if len(c.frame) < int(from.frame)/(2*differShare) {
			c.frames = append(c.frames, c.frame...) // most likely: it is not compared with what the block takes itself
			return nil
		}
	}
	was := len(c.frames)
	if c.count[of] >= manyVersions && !c.withoutDifferences {
		c.s2 = slices.Grow(c.s2[:0], s2.MaxEncodedLen(len(b)))
		c.frames = append(append(c.frames, frameS2), s2.EncodeBetter(c.s2[:cap(c.s2)], b)...)
	} else {
		c.frames = c.enc.EncodeAll(b, append(c.frames, frameZstd))
	}
	if len(c.frames)-was > len(b) {
		c.frames = append(append(c.frames[:was], frameAsIs), b...)
	}
	if ok && len(c.frame) < (len(c.frames)-was)/differShare {
		c.frames = append(c.frames[:was], c.frame...)
		return nil
	}
	c.last[of] = base{uint32(plain), uint32(at), uint16(len(c.frames) - was), uint16(len(b))}
	return nil
}

// appendFrom appends how a frame begins that needs another one.
func appendFrom(dst []byte, kind byte, from base) []byte {
	dst = binary.LittleEndian.AppendUint32(append(dst, kind), from.at)
	return binary.LittleEndian.AppendUint16(dst, from.frame)
}

// difference makes c.frame a block's difference from a version of it.
func (c *compactor) difference(from base, b []byte) error {
	c.old = slices.Grow(c.old[:0], int(from.size))[:from.size]
	if err := c.f.ReadAt(c.old, int64(from.plain), false); err != nil {
		return err
	}
	c.frame = appendRuns(appendFrom(c.frame[:0], frameRuns, from), c.old, b)
	if len(c.frame) <= runsMost {
		return nil
	}
	c.diff = slices.Grow(c.diff[:0], len(b))[:len(b)]
	subtle.XORBytes(c.diff, b, c.old)
	c.xor = c.enc.EncodeAll(c.diff, appendFrom(c.xor[:0], frameXOR, from))
	if len(c.xor) < len(c.frame)*3/4 { // they take longer to read
		c.frame, c.xor = c.xor, c.frame
	}
	return nil
}

// compareBytes is how much is compared at once.
const compareBytes = 1 << 20

// compare reads all of the compact file as everybody will, and compares it with the plain one.
func (c *compactor) compare(path string) error {
	now, err := readFile(c.out, path)
	if err != nil {
		return err
	}
	was, is := make([]byte, compareBytes), make([]byte, compareBytes)
	for off := c.f.start; off < c.end; off += compareBytes {
		n := min(compareBytes, c.end-off)
		if err := errors.Join(c.f.ReadAt(was[:n], off, false), now.ReadAt(is[:n], off, false)); err != nil {
			return err
		}
		if !bytes.Equal(was[:n], is[:n]) {
			return fmt.Errorf("a compact file of %s has other bytes between %d and %d: it is not used; please report it", c.f.Path, off, off+n)
		}
		if err := c.step(n); err != nil {
			return err
		}
	}
	return nil
}

// ErrUnsynced is wrapped when a file has other bytes, or another one in its place, and it or the directory could not be synced: what else was to be durable in them may not be.
var ErrUnsynced = errors.New("the segments could not be synced")

// replace has a durable file with the same records come in the place of a file's, and returns how many bytes less it takes. s.changing is held.
func (s *Set) replace(f *File, vf vfs.File, path string, size int64) (saved int64, err error) {
	now, err := readFile(vf, path)
	if err != nil {
		return 0, errors.Join(err, vf.Close(), s.fs.Remove(path))
	}
	s.renaming.Lock()
	defer s.renaming.Unlock()
	s.mu.RLock()
	there := s.mu.files[f.Number] == f
	s.mu.RUnlock()
	if !there {
		return 0, errors.Join(fmt.Errorf("%w: number %d in %s", ErrGone, f.Number, s.dir), vf.Close(), s.fs.Remove(path))
	}
	if err := s.fs.Rename(path, f.Path); err != nil {
		return 0, errors.Join(fmt.Errorf("name a segment: %w", err), vf.Close(), s.fs.Remove(path))
	}
	f.mu.Lock()
	old := f.f
	f.f, f.compact = vf, now.compact
	saved = f.alloc.Swap(size) - size
	f.mu.Unlock()
	s.mu.Lock()
	s.mu.size -= saved
	s.mu.Unlock()
	_ = old.Close() // it was read only, or all of it is in the other one
	if err := s.syncDir(); err != nil {
		return saved, fmt.Errorf("%w: %w", ErrUnsynced, err)
	}
	return saved, nil
}
