package segment

import (
	"errors"
	"fmt"
	"math"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
)

// Cut removes what stands in a file from off on, durably. A compact file is a plain one afterwards, unless nothing stands there.
func (s *Set) Cut(f *File, off int64) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if c, _, _ := f.pieces(); c != nil {
		if off >= c.End {
			return nil
		}
		return s.expand(f, off, nil, 0)
	}
	if err := osfile.Cut(f.f, off); err != nil {
		return fmt.Errorf("cut the tail of %s at %d: %w", f.Path, off, err)
	}
	return nil
}

// Rewrite writes a whole record over what stands at off, durably. A compact file is a plain one afterwards. [ErrUnsynced] says that it is written, but a crash may undo it and
// what else was to be durable.
func (s *Set) Rewrite(f *File, off int64, b []byte) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	if f.IsCompact() {
		return s.expand(f, math.MaxInt64, b, off)
	}
	if off < f.start || off+int64(len(b)) > f.Alloc() {
		return fmt.Errorf("%s: %d bytes at %d are not within its records", f.Path, len(b), off)
	}
	if err := osfile.WriteVec(f.f, [][]byte{b}, off); err != nil {
		return fmt.Errorf("write %s at %d: %w", f.Path, off, err)
	}
	return f.Sync()
}

// expand makes a compact file a plain one that ends at an offset of it, if not before, with some bytes of a record in the place of what stands there. What is damaged stays
// so: in other bytes than any that were written. s.changing is held.
func (s *Set) expand(f *File, end int64, b []byte, at int64) (err error) {
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
	vf, err := s.createTmp(path, end, 0)
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
	buf := make([]byte, compareBytes)
	for off := int64(len(head)); off < end; off += compareBytes {
		part := buf[:min(compareBytes, end-off)]
		if err := f.ReadDamaged(part, off); err != nil {
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
