package segment

import (
	"cmp"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// CompactHead is what the head of a compact file says of it.
//
// A compact file is one that no record is added to any more, in less space. Offsets in it are those of the plain file that it was, and who
// reads at them finds the same bytes: index, views, feeds and scans see no difference.
//
// Its head has a flag, and where its records were in the plain file. Behind it stands the directory, twice, each time from a multiple of 4096 bytes on, so that
// one damaged sector does not cost the file, then the pieces, one after the other, without gaps. Integers are little-endian.
//
//	directory
//	  0     4   CRC-32C of what follows
//	  4     8   of each piece: offset of its first record in the plain file (4), offset of the piece in this one (4)
//
//	piece
//	  0     4   magic, "TMP1"
//	  4     4   CRC-32C of byte 8 to the lengths' end
//	  8     4   CRC-32C of the frames
//	 12     4   offset of its first record in the plain file
//	 16     4   where its last record ended there
//	 20     4   length of the frames, bytes
//	 24     4   length of the headers, bytes
//	 28     4   number of frames
//	 32     …   headers of its records with their tables, as they were
//	  …     2   of each frame: its length
//	  …     …   frames: one for each block of the records' payloads, in their order
//
//	frame: none of a block of zeroes
//	  0     1   how the block is kept, see below
//	  1     4   of 4 and 5: offset in this file of the frame of an earlier version of the block, one of 1 to 3
//	  5     2   of 4 and 5: its length
//	  …     …   1: the block, as it is
//	            2: a zstd frame of it
//	            3: an S2 block of it, which takes more space than zstd's, and less time to read: of blocks that the file has several versions of
//	            4: a zstd frame of its exclusive or with that version
//	            5: what is other than in that version, run by run: how many bytes are the same before, and how many are not (uvarints), and those
//
// Padding is not kept: it is zeroes. As those versions need no others, no more than two frames are read for a block.
// That blocks are what was written, the records' tables say; the pieces' checksums say whether all that was kept is there still.
type CompactHead struct {
	Pieces     int   // 0: it is a plain file
	Start, End int64 // of the records in the plain file, bytes
}

const (
	pieceMagic = 0x31504d54 // "TMP1"
	pieceFixed = 32
	// pieceBytes is how many bytes of records, at least, are in each piece but the last. Of a piece all headers are read for a block.
	pieceBytes = 32 << 10
	// pieceGuess is what is read of a piece at first: the headers, and often the frames.
	pieceGuess = 8192

	frameAsIs = 1
	frameZstd = 2
	frameS2   = 3
	frameXOR  = 4
	frameRuns = 5
	frameFrom = 7 // length of what a frame begins with that needs another one
)

// room is what one directory takes.
func (c *CompactHead) room() int64 {
	return (4 + 8*int64(c.Pieces) + headerUnit - 1) &^ (headerUnit - 1)
}

// contents is what a compact file has. It does not change but for the directory, which is read when it is needed.
type contents struct {
	CompactHead
	head int64 // length of the file's head

	mu  sync.Mutex
	dir []dirEntry // guarded by mu until it is there
}

// dirEntry is where a piece's first record was in the plain file, and where the piece is in this one.
type dirEntry struct{ plain, at uint32 }

// piece is a piece without its frames.
type piece struct {
	first, end int64  // of its records in the plain file
	headers    []byte // and their tables
	lengths    []byte // of the frames
	frames     int64  // where they begin
	size       int64  // of them, bytes
	sum        uint32 // of them
	at         int64  // where it begins
	read       []byte // what was read of it, from there on
}

// scratch is what reading a compact file takes of memory.
type scratch struct {
	piece, frames, from []byte
	block, diff         [record.BlockSize]byte

	nowait bool
	// around has what can not be read for damage filled in with 0xff, which fails the records' checksums.
	around bool
	good   int64 // up to this offset of the plain file, what was asked for was read
	// instead has blocks in the place of frames that others may need, by where they stand.
	instead map[int64][]byte
}

var scratches = sync.Pool{New: func() any { return &scratch{piece: make([]byte, pieceGuess)} }}

// keptScratch is how large a buffer of a scratch may be to be kept for the next one, in bytes.
const keptScratch = 1 << 20

func newScratch() *scratch {
	s := scratches.Get().(*scratch)
	s.nowait, s.around, s.instead = false, false, nil
	return s
}

func (s *scratch) done() {
	for _, b := range []*[]byte{&s.piece, &s.frames, &s.from} {
		if cap(*b) > keptScratch {
			*b = nil
		}
	}
	if cap(s.piece) < pieceGuess {
		s.piece = make([]byte, pieceGuess)
	}
	scratches.Put(s)
}

// failed returns err, or fills p with 0xff and returns nil if damage is to be got around.
func (s *scratch) failed(err error, p []byte) error {
	if !s.around || !errors.Is(err, record.ErrCorrupt) {
		return err
	}
	for i := range p {
		p[i] = 0xff
	}
	return nil
}

// unzstd is for any number of goroutines. Nothing that it is given has more than a block.
var unzstd = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxMemory(1<<20))
})

func (f *File) damaged(off int64, format string, args ...any) error {
	return fmt.Errorf("%w: %s at %d: %s", record.ErrCorrupt, f.Path, off, fmt.Sprintf(format, args...))
}

// IsCompact reports whether the file is compact.
func (f *File) IsCompact() bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.compact != nil
}

// Saved is how many bytes a compact file takes less than its records.
func (f *File) Saved() int64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.compact == nil {
		return 0
	}
	return f.compact.End - f.alloc.Load()
}

// directory is where the pieces are, as far as that can be known. f.mu is held.
func (f *File) directory(nowait bool) ([]dirEntry, error) {
	c := f.compact
	if nowait && !c.mu.TryLock() {
		return nil, osfile.ErrWouldBlock // somebody reads it
	} else if !nowait {
		c.mu.Lock()
	}
	defer c.mu.Unlock()
	if c.dir != nil {
		return c.dir, nil
	}
	dir, err := f.readDirectory(c.head, nowait)
	if err != nil && !errors.Is(err, osfile.ErrWouldBlock) {
		dir, err = f.readDirectory(c.head+c.room(), nowait)
	}
	if err != nil && nowait {
		return nil, osfile.ErrWouldBlock
	}
	if err != nil {
		dir, err = f.walkPieces(err)
	}
	if len(dir) == c.Pieces { // or what could not be read may be next time
		c.dir = dir
	}
	return dir, err
}

// walkPieces makes the directory from the pieces: up to the first that can not be read. cause is why. f.mu is held.
func (f *File) walkPieces(cause error) (dir []dirEntry, err error) {
	c := f.compact
	s := newScratch()
	defer s.done()
	plain, at := c.Start, c.head+2*c.room()
	for plain < c.End && len(dir) < c.Pieces {
		p, err := f.readPieceAt(s, at)
		if err == nil && p.first != plain {
			err = f.damaged(at, "a piece for records at %d, where one for %d must be", p.first, plain)
		}
		if err != nil && len(dir) == 0 {
			return nil, cause
		}
		if err != nil {
			break
		}
		dir = append(dir, dirEntry{uint32(plain), uint32(at)})
		plain, at = p.end, p.frames+p.size
	}
	return dir, nil
}

func (f *File) readDirectory(at int64, nowait bool) ([]dirEntry, error) {
	c := f.compact
	if at+c.room() > f.alloc.Load() {
		return nil, f.damaged(at, "it ends before the end of a directory of %d pieces", c.Pieces)
	}
	b := make([]byte, c.room())
	if err := f.readRaw(b, at, nowait); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if used := b[:4+8*c.Pieces]; record.Checksum(used[4:]) != le.Uint32(used) {
		return nil, f.damaged(at, "a directory has another checksum than was recorded")
	}
	dir := make([]dirEntry, c.Pieces)
	plain, next := c.Start, c.head+2*c.room()
	for i := range dir {
		d := dirEntry{le.Uint32(b[4+8*i:]), le.Uint32(b[8+8*i:])}
		if i == 0 && (int64(d.plain) != plain || int64(d.at) != next) || i > 0 && int64(d.plain) <= plain || int64(d.plain) >= c.End || int64(d.at) < next {
			return nil, f.damaged(at, "piece %d of its directory is for records at %d, and stands at %d", i, d.plain, d.at)
		}
		dir[i], plain, next = d, int64(d.plain), int64(d.at)+pieceFixed
	}
	return dir, nil
}

// readRaw reads what stands at a place of a compact file itself. That the file ends before is damage. f.mu is held.
func (f *File) readRaw(p []byte, at int64, nowait bool) error {
	err := osfile.ReadFull(f.f, p, at, nowait)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return f.damaged(at, "it ends before %d", at+int64(len(p)))
	}
	return err
}

// readPiece reads a piece but for its frames. It is of s, until the next one is read. f.mu is held.
func (f *File) readPiece(s *scratch, dir []dirEntry, i int) (p piece, err error) {
	p, err = f.readPieceAt(s, int64(dir[i].at))
	if err != nil {
		return p, err
	}
	end, plainEnd := p.frames+p.size, p.end
	switch {
	case i+1 < len(dir):
		end, plainEnd = int64(dir[i+1].at), int64(dir[i+1].plain)
	case len(dir) == f.compact.Pieces:
		end, plainEnd = f.alloc.Load(), f.compact.End
	}
	if p.first != int64(dir[i].plain) || p.end != plainEnd || p.frames+p.size != end {
		return p, f.damaged(p.at, "a piece for records from %d to %d that ends at %d, where one for %d to %d that ends at %d must be", p.first, p.end, p.frames+p.size, dir[i].plain, plainEnd, end)
	}
	return p, nil
}

// readPieceAt reads the piece that begins at an offset of the file, but for its frames. f.mu is held.
func (f *File) readPieceAt(s *scratch, at int64) (p piece, err error) {
	rest := f.alloc.Load() - at
	if rest < pieceFixed {
		return p, f.damaged(at, "no room for a piece")
	}
	b := s.piece[:min(rest, pieceGuess)]
	if err := f.readRaw(b, at, s.nowait); err != nil {
		return p, err
	}
	le := binary.LittleEndian
	p = piece{first: int64(le.Uint32(b[12:])), end: int64(le.Uint32(b[16:])), size: int64(le.Uint32(b[20:])), sum: le.Uint32(b[8:]), at: at}
	headers, frames := int64(le.Uint32(b[24:])), int64(le.Uint32(b[28:]))
	all := pieceFixed + headers + 2*frames
	if le.Uint32(b) != pieceMagic || all+p.size > rest {
		return p, f.damaged(at, "no piece begins there")
	}
	if all > int64(len(b)) {
		if int64(cap(s.piece)) < all {
			s.piece = slices.Grow(s.piece[:0], int(all))
		}
		b = s.piece[:all]
		if err := f.readRaw(b, at, s.nowait); err != nil {
			return p, err
		}
		s.piece = b
	}
	if record.Checksum(b[8:all]) != le.Uint32(b[4:]) {
		return p, f.damaged(at, "a piece's headers have another checksum than was recorded")
	}
	if p.end <= p.first {
		return p, f.damaged(at, "a piece for records from %d to %d", p.first, p.end)
	}
	p.headers, p.lengths, p.frames, p.read = b[pieceFixed:pieceFixed+headers], b[pieceFixed+headers:all], at+all, b
	return p, nil
}

// searchDir is the number of the piece that has an offset of the plain file.
func searchDir(dir []dirEntry, off int64) int {
	i, found := slices.BinarySearchFunc(dir, off, func(d dirEntry, off int64) int { return cmp.Compare(int64(d.plain), off) })
	if !found {
		i--
	}
	return i
}

// body is a record's payload in a piece.
type body struct {
	off, n int64 // where it begins in the plain file; bytes
	frame  int   // number of its first frame
	at     int64 // where that stands
}

// each calls fn with the records of a piece, until it returns false: their header with its table, and where they begin in the plain file.
func (f *File) each(p *piece, fn func(header []byte, off int64, b body) (bool, error)) error {
	off, frame, at := p.first, 0, p.frames
	for b := p.headers; len(b) > 0; {
		if len(b) < record.HeaderSize {
			return f.damaged(p.frames, "%d bytes of a header", len(b))
		}
		payload := int64(binary.LittleEndian.Uint32(b[56:]))
		n := record.Blocks(payload)
		if payload > record.MaxPayload || len(b) < record.HeaderSize+4*n || 2*(frame+n) > len(p.lengths) {
			return f.damaged(p.frames, "a header of a payload of %d bytes in %d", payload, len(b))
		}
		h := record.Header{Payload: int(payload)}
		if more, err := fn(b[:h.EncodedSize()], off, body{off + int64(h.EncodedSize()), payload, frame, at}); err != nil || !more {
			return err
		}
		for range n {
			at += int64(binary.LittleEndian.Uint16(p.lengths[2*frame:]))
			frame++
		}
		off, b = off+h.Size(), b[h.EncodedSize():]
	}
	if off != p.end || 2*frame != len(p.lengths) || at != p.frames+p.size {
		return f.damaged(p.frames, "its records end at %d, and its frames at %d", off, at)
	}
	return nil
}

// readCompact reads at an offset of the plain file. f.mu is held.
func (f *File) readCompact(s *scratch, p []byte, off int64) error {
	s.good = off
	if off < f.compact.Start || off > f.compact.End-int64(len(p)) {
		return fmt.Errorf("read %d bytes at %d of %s: its records stand from %d to %d: %w", len(p), off, f.Path, f.compact.Start, f.compact.End, io.ErrUnexpectedEOF)
	}
	dir, err := f.directory(s.nowait)
	if err != nil {
		return err
	}
	for i := searchDir(dir, off); len(p) > 0; i++ {
		end := f.compact.End
		if i+1 < len(dir) {
			end = int64(dir[i+1].plain)
		}
		n := min(end-off, int64(len(p)))
		err := f.fromPiece(s, dir, i, p[:n], off)
		if err := s.failed(err, p[max(s.good-off, 0):n]); err != nil {
			return err
		}
		p, off = p[n:], off+n
		s.good = off
	}
	return nil
}

// fromPiece fills p with what stood from off on in the plain file, all of which is of a piece.
func (f *File) fromPiece(s *scratch, dir []dirEntry, i int, p []byte, off int64) error {
	pc, err := f.readPiece(s, dir, i)
	if err != nil {
		return err
	}
	cut := off+int64(len(p)) > pc.end
	if cut {
		p = p[:max(pc.end-off, 0)]
	}
	if end := off + int64(len(p)); end > off {
		err = f.fromRecords(s, &pc, p, off, end)
	}
	if err == nil && cut {
		err = f.damaged(pc.at, "where the piece behind it stands is not known")
	}
	return err
}

// fromRecords fills p with what stood from off to end in the plain file, all of which the piece has.
func (f *File) fromRecords(s *scratch, pc *piece, p []byte, off, end int64) error {
	return f.each(pc, func(header []byte, at int64, b body) (bool, error) {
		h := record.Header{Payload: int(b.n)}
		if at+h.Size() <= off {
			return true, nil
		}
		if n := overlap(p, off, at, header); n > 0 {
			copy(p[max(at-off, 0):], header[max(off-at, 0):])
		}
		s.good = min(b.off, end)
		if err := f.payload(s, pc, b, p, off); err != nil {
			return false, err
		}
		if pad, padEnd := b.off+b.n, at+h.Size(); pad < end && padEnd > off {
			clear(p[max(pad-off, 0) : min(padEnd, end)-off])
		}
		s.good = min(at+h.Size(), end)
		return at+h.Size() < end, nil
	})
}

// overlap is how many bytes of b, which stands at at, are of p, which is to be what stands from off on.
func overlap(p []byte, off, at int64, b []byte) int64 {
	return min(off+int64(len(p)), at+int64(len(b))) - max(off, at)
}

// payload fills in what p, from off on, has of a payload.
func (f *File) payload(s *scratch, pc *piece, b body, p []byte, off int64) error {
	from, to := max(off, b.off)-b.off, min(off+int64(len(p)), b.off+b.n)-b.off
	if from >= to {
		return nil
	}
	first, last := from/record.BlockSize, (to-1)/record.BlockSize
	frames, at, err := f.frames(s, pc, b, first, last)
	if err != nil {
		return err
	}
	for i := first; i <= last; i++ {
		n := pc.frameLen(b, i)
		size := min(b.n-i*record.BlockSize, record.BlockSize)
		begin, end := max(from-i*record.BlockSize, 0), min(to-i*record.BlockSize, size)
		dst := p[b.off+i*record.BlockSize+begin-off:][:end-begin]
		part := end-begin < size
		whole := dst
		if part {
			whole = s.block[:size]
		}
		if err := s.failed(f.block(s, whole, frames[:n], at), whole); err != nil {
			return err
		}
		if part {
			copy(dst, whole[begin:])
		}
		at, frames = at+n, frames[n:]
		s.good = b.off + i*record.BlockSize + end
	}
	return nil
}

// frameLen is the length of the frame of a payload's block.
func (p *piece) frameLen(b body, block int64) int64 {
	return int64(binary.LittleEndian.Uint16(p.lengths[2*(int64(b.frame)+block):]))
}

// frames are those of the blocks first to last of a payload, and where they stand. They are of pc or s.
func (f *File) frames(s *scratch, pc *piece, b body, first, last int64) (frames []byte, at int64, err error) {
	at = b.at
	for i := range first {
		at += pc.frameLen(b, i)
	}
	var n int64
	for i := first; i <= last; i++ {
		n += pc.frameLen(b, i)
	}
	if end := at + n - pc.at; end <= int64(len(pc.read)) {
		return pc.read[at-pc.at : end], at, nil
	}
	s.frames = slices.Grow(s.frames[:0], int(n))[:n]
	return s.frames, at, f.readRaw(s.frames, at, s.nowait)
}

// block fills dst with the block that a frame, which stands at at, keeps.
func (f *File) block(s *scratch, dst, frame []byte, at int64) error {
	if len(frame) == 0 {
		clear(dst)
		return nil
	}
	if frame[0] < frameXOR {
		return f.full(dst, frame, at)
	}
	if len(frame) < frameFrom {
		return f.damaged(at, "a frame of %d bytes that needs another one", len(frame))
	}
	le, kind := binary.LittleEndian, frame[0]
	from, n := int64(le.Uint32(frame[1:])), int64(le.Uint16(frame[5:]))
	if n == 0 || from+n > at {
		return f.damaged(at, "a frame that needs one of %d bytes at %d, which is not before it", n, from)
	}
	if err := f.earlier(s, dst, from, n); err != nil {
		return err
	}
	switch frame = frame[frameFrom:]; kind {
	case frameXOR:
		diff := s.diff[:len(dst)]
		if err := f.inflate(diff, frame, at); err != nil {
			return err
		}
		subtle.XORBytes(dst, dst, diff)
		return nil
	case frameRuns:
		return f.runs(dst, frame, at)
	}
	return f.damaged(at, "a frame of kind %d", kind)
}

// earlier fills dst with an earlier version of its block, whose frame of n bytes stands at from.
func (f *File) earlier(s *scratch, dst []byte, from, n int64) error {
	if b := s.instead[from]; len(b) == len(dst) {
		copy(dst, b)
		return nil
	}
	s.from = slices.Grow(s.from[:0], int(n))[:n]
	if err := f.readRaw(s.from, from, s.nowait); err != nil {
		return err
	}
	return f.full(dst, s.from, from)
}

// runs makes dst another block, by what is other than in it.
func (f *File) runs(dst, b []byte, at int64) error {
	for len(b) > 0 {
		same, i := binary.Uvarint(b)
		if i <= 0 || same > uint64(len(dst)) {
			return f.damaged(at, "%d bytes that are the same, of %d", same, len(dst))
		}
		n, j := binary.Uvarint(b[i:])
		if b = b[i+max(j, 0):]; j <= 0 || n > uint64(len(b)) || n > uint64(len(dst))-same {
			return f.damaged(at, "%d bytes that are other ones, of %d", n, len(dst))
		}
		dst = dst[same+uint64(copy(dst[same:], b[:n])):]
		b = b[n:]
	}
	return nil
}

// appendRuns appends what is other in a block than in another one.
func appendRuns(dst, was, is []byte) []byte {
	const near = 4 // bytes that are the same, between others, which are not worth a run's end
	for at := 0; at < len(is); {
		from := at
		for from < len(is) && was[from] == is[from] {
			from++
		}
		if from == len(is) {
			break
		}
		to := from + 1 // where the run ends
		for i := to; i < len(is) && i < to+near; i++ {
			if was[i] != is[i] {
				to = i + 1
			}
		}
		dst = binary.AppendUvarint(binary.AppendUvarint(dst, uint64(from-at)), uint64(to-from))
		dst = append(dst, is[from:to]...)
		at = to
	}
	return dst
}

// full fills dst with a block that needs no other one.
func (f *File) full(dst, frame []byte, at int64) error {
	switch {
	case frame[0] == frameAsIs && len(frame) == 1+len(dst):
		copy(dst, frame[1:])
		return nil
	case frame[0] == frameZstd:
		return f.inflate(dst, frame[1:], at)
	case frame[0] == frameS2:
		if n, err := s2.DecodedLen(frame[1:]); err != nil || n != len(dst) {
			return f.damaged(at, "an S2 block of %d bytes, expected %d", n, len(dst))
		}
		if _, err := s2.Decode(dst, frame[1:]); err != nil {
			return f.damaged(at, "an S2 block: %v", err)
		}
		return nil
	}
	return f.damaged(at, "a frame of %d bytes of kind %d", len(frame), frame[0])
}

func (f *File) inflate(dst, b []byte, at int64) error {
	dec, err := unzstd()
	if err != nil {
		return err
	}
	out, err := dec.DecodeAll(b, dst[:0:len(dst)])
	if err != nil || len(out) != len(dst) {
		return f.damaged(at, "a zstd frame that is not one of %d bytes: %v", len(dst), err)
	}
	return nil
}
