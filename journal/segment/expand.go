package segment

import (
	"errors"
	"fmt"
	"math"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Cut removes what stands in a file from off on, durably. A compact file is a plain one afterwards, unless nothing stands there.
func (s *Set) Cut(f *File, off int64) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if c, _, _ := f.pieces(); c != nil {
		if off >= c.End {
			return nil
		}
		return s.expand(f, off, nil, 0, 0)
	}
	if err := osfile.Cut(f.f, off); err != nil {
		return fmt.Errorf("cut the tail of %s at %d: %w", f.Path, off, err)
	}
	return nil
}

// Rewrite writes a whole record over what stands at off, durably. A compact file is a plain one afterwards, which must leave so many bytes of the file system free as keep says.
// ErrGone says that the file was removed meanwhile, and [ErrUnsynced] that the record is written, but a crash may undo it and what else was to be durable.
func (s *Set) Rewrite(f *File, off int64, b []byte, keep int64) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if f.IsCompact() {
		return s.expand(f, math.MaxInt64, b, off, keep)
	}
	if off < f.start || off+int64(len(b)) > f.Alloc() {
		return fmt.Errorf("%s: %d bytes at %d are not within its records", f.Path, len(b), off)
	}
	s.renaming.Lock() // by another set of the directory, the file may be another one
	defer s.renaming.Unlock()
	s.mu.RLock()
	there := s.mu.files[f.Number] == f
	s.mu.RUnlock()
	if !there {
		return fmt.Errorf("%w: number %d in %s", ErrGone, f.Number, s.dir)
	}
	if err := osfile.WriteVec(f.f, [][]byte{b}, off); err != nil {
		return fmt.Errorf("write %s at %d: %w", f.Path, off, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsynced, err)
	}
	return nil
}

// expand makes a compact file a plain one that ends at an offset of it, if not before, with some bytes of a record in the place of what stands there. What is damaged stays
// so: in other bytes than any that were written. What is kept as differences from that record's blocks is made of them, be what stood there damaged. So many bytes of the
// file system are left free as keep says. s.changing is held.
func (s *Set) expand(f *File, end int64, b []byte, at, keep int64) (err error) {
	defer func() {
		if osfile.IsNoSpace(err) {
			err = fmt.Errorf("%w: %w", ErrFull, err)
		}
	}()
	f.mu.RLock()
	c := f.compact
	f.mu.RUnlock()
	if end = min(end, c.End); len(b) > 0 && (at < c.Start || at+int64(len(b)) > end) {
		return fmt.Errorf("%s: %d bytes at %d are not within its records", f.Path, len(b), at)
	}
	head := f.Header.encode()
	if int64(len(head)) != c.Start {
		return fmt.Errorf("%s: its records began at %d, and its head has %d bytes", f.Path, c.Start, len(head))
	}
	path := s.tmpPath("expand")
	vf, err := s.createTmp(path, end, keep)
	if err != nil {
		return fmt.Errorf("begin a plain file in the place of %s: %w", f.Path, err)
	}
	if err := f.writePlain(vf, head, end, b, at); err != nil {
		return errors.Join(fmt.Errorf("write a plain file in the place of %s: %w", f.Path, err), vf.Close(), s.fs.Remove(path))
	}
	_, err = s.replace(f, vf, path, end)
	return err
}

func (f *File) writePlain(vf vfs.File, head []byte, end int64, b []byte, at int64) error {
	if err := osfile.WriteVec(vf, [][]byte{head}, 0); err != nil {
		return err
	}
	instead, err := f.framesOf(b, at)
	if err != nil {
		return err
	}
	buf := make([]byte, compareBytes)
	for off := int64(len(head)); off < end; off += compareBytes {
		part := buf[:min(compareBytes, end-off)]
		if err := f.readDamaged(part, off, instead); err != nil {
			return err
		}
		if overlap(part, off, at, b) > 0 {
			copy(part[max(at-off, 0):], b[max(off-at, 0):])
		}
		if err := osfile.WriteVec(vf, [][]byte{part}, off); err != nil {
			return err
		}
	}
	return vf.Sync()
}

// framesOf is what the blocks of a record are that comes in the place of one that stands at an offset, by where their frames stand: those that are what was kept there. None
// is, if that is not known.
func (f *File) framesOf(b []byte, off int64) (blocks map[int64][]byte, err error) {
	if len(b) == 0 {
		return nil, nil
	}
	h, err := record.Decode(b)
	if err != nil {
		return nil, err
	}
	s := newScratch()
	defer s.done()
	p, is, err := f.findPiece(s, off)
	if is != inPiece || errors.Is(err, record.ErrCorrupt) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	payload := b[h.EncodedSize():][:h.Payload]
	err = f.each(&p, func(header []byte, at int64, body body) (bool, error) {
		if at != off || body.n != int64(len(payload)) {
			return at < off, nil
		}
		was, err := f.decode(header)
		if err != nil {
			return false, err
		}
		blocks = map[int64][]byte{}
		frame := body.at
		for i := range was.Sums.Len() {
			block := payload[i*record.BlockSize : min((i+1)*record.BlockSize, len(payload))]
			n := p.frameLen(body, int64(i))
			if n > 0 && record.Checksum(block) == was.Sums.At(i) { // one of zeroes has none
				blocks[frame] = block
			}
			frame += n
		}
		return false, nil
	})
	if errors.Is(err, record.ErrCorrupt) {
		err = nil
	}
	return blocks, err
}
