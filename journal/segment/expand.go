package segment

import (
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

const expandTmp = "expand" + tmpSuffix

// expand makes a compact file a plain one that ends at an offset of it, if not before, with some bytes of a record in the place of what stands there. What is damaged stays
// so: in other bytes than any that were written.
func (s *Set) expand(f *File, end int64, b []byte, at int64) error {
	f.mu.RLock()
	c := f.compact
	f.mu.RUnlock()
	if c == nil {
		return fmt.Errorf("%s has become a plain file", f.Path)
	}
	if end = min(end, c.End); len(b) > 0 && (at < c.Start || at+int64(len(b)) > end) {
		return fmt.Errorf("%s: %d bytes at %d are not within its records", f.Path, len(b), at)
	}
	head := f.Header.encode()
	if int64(len(head)) != c.Start {
		return fmt.Errorf("%s: its records began at %d, and its head has %d bytes", f.Path, c.Start, len(head))
	}
	path := s.fs.PathJoin(s.dir, expandTmp)
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

// ReadDamaged is ReadAt, but fills in what can not be read for damage with bytes that no checksum there is of.
func (f *File) ReadDamaged(p []byte, off int64) error {
	err := f.ReadAt(p, off, false)
	if !errors.Is(err, record.ErrCorrupt) {
		return err
	}
	if _, _, derr := f.pieces(); derr != nil {
		return err // all of it would be damaged
	}
	return f.readAround(p, off)
}

// around is the unit of readAround, in bytes: headers with their tables, and payloads, begin at multiples of it.
const around = 4

// readAround reads what can be read of p.
func (f *File) readAround(p []byte, off int64) error {
	if err := f.ReadAt(p, off, false); !errors.Is(err, record.ErrCorrupt) {
		return err
	}
	if len(p) <= around {
		for i := range p {
			p[i] = 0xff
		}
		return nil
	}
	half := (len(p)/2 + around - 1) &^ (around - 1)
	return errors.Join(f.readAround(p[:half], off), f.readAround(p[half:], off+int64(half)))
}
