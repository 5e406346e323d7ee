package segment

import (
	"errors"
	"fmt"
	"slices"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// scanPieces is Scan, while the file is compact. end says that all of it was scanned; if not, it is no compact file.
func (f *File) scanPieces(off int64, fn func(off int64, h record.Header) error) (at int64, end bool, err error) {
	if !f.IsCompact() {
		return off, false, nil
	}
	s := newScratch()
	defer s.done()
	for {
		p, is, err := f.findPiece(s, off)
		switch {
		case err != nil:
			return off, true, fmt.Errorf("%s at %d: %w", f.Path, off, err)
		case is != inPiece:
			return off, is == behindPieces, nil
		}
		begun := false
		err = f.each(&p, func(header []byte, at int64, _ body) (bool, error) {
			if at < off {
				return true, nil
			}
			if at > off && !begun {
				return false, f.damaged(off, "no record begins there")
			}
			begun = true
			h, err := f.decode(header)
			if err != nil {
				return false, fmt.Errorf("%s at %d: %w", f.Path, at, err)
			}
			if err := fn(at, h); err != nil {
				return false, err
			}
			off = at + h.Size()
			return true, nil
		})
		if err == nil && !begun {
			err = f.damaged(off, "no record begins there")
		}
		if err != nil {
			return off, true, err
		}
	}
}

// where an offset is.
type where int

const (
	inPlain      where = iota // of a file that is none of pieces
	inPiece                   // of a piece
	behindPieces              // behind them
)

// findPiece reads the piece that has an offset of the plain file.
func (f *File) findPiece(s *scratch, off int64) (p piece, is where, err error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.compact == nil {
		return p, inPlain, nil
	}
	if off >= f.compact.End {
		return p, behindPieces, nil
	}
	dir, err := f.directory(false)
	if err != nil {
		return p, inPiece, err
	}
	if off < f.compact.Start {
		return p, inPiece, f.damaged(off, "no record begins there")
	}
	p, err = f.readPiece(s, dir, searchDir(dir, off))
	if err == nil && off >= p.end {
		err = f.damaged(p.at, "where the piece behind it stands is not known")
	}
	return p, inPiece, err
}

// pieces is what the file has as a compact one, and where its pieces are; nil if it is plain.
func (f *File) pieces() (*contents, []dirEntry, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.compact == nil {
		return nil, nil, nil
	}
	dir, err := f.directory(false)
	return f.compact, dir, err
}

// resyncPieces is Resync of a compact file.
func (f *File) resyncPieces(off int64, fn func(at int64, h record.Header) error) error {
	s := newScratch()
	defer s.done()
	for {
		c, dir, err := f.pieces()
		if c == nil {
			return f.Resync(off, fn)
		}
		if off = max(off, c.Start); off >= c.End || errors.Is(err, record.ErrCorrupt) {
			return nil
		}
		if err != nil {
			return err
		}
		next := c.End
		if i := searchDir(dir, off); i+1 < len(dir) {
			next = int64(dir[i+1].plain)
		}
		p, is, err := f.findPiece(s, off)
		if is == inPlain {
			continue
		}
		if err != nil && !errors.Is(err, record.ErrCorrupt) {
			return err
		}
		var ended error
		if err == nil {
			_ = f.each(&p, func(header []byte, at int64, _ body) (bool, error) { // what is damaged of it, there is no record of
				h, err := f.decode(header)
				if err == nil && at >= off {
					ended = fn(at, h)
				}
				return ended == nil, nil
			})
		}
		if errors.Is(ended, ErrStop) {
			return nil
		}
		if ended != nil {
			return ended
		}
		off = next
	}
}

// VerifyPieces reads all that a compact file keeps, both directories and all frames, whether records need them or not, and calls found with what can not be read, or is not as it was written, and where; of a
// plain file, nothing. step is called with how many bytes were read: its error, or found's, ends it.
func (f *File) VerifyPieces(found func(at int64, err error) error, step func(bytes int64) error) error {
	c, dir, err := f.pieces()
	if c == nil {
		return nil
	}
	for _, at := range []int64{c.head, c.head + c.room()} {
		if err := f.verifyDirectory(c, at); err != nil {
			if err := found(at, err); err != nil {
				return err
			}
		}
	}
	if err != nil {
		return nil // that is what was found
	}
	s := newScratch()
	defer s.done()
	for i := range dir {
		n, err := f.verifyPiece(s, c, dir, i)
		if err != nil {
			err = found(int64(dir[i].at), err)
		}
		if err == nil {
			err = step(n)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *File) verifyDirectory(c *contents, at int64) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.compact != c {
		return nil // another file has come in its place
	}
	if _, err := f.readDirectory(at, false); err != nil {
		return err
	}
	b := make([]byte, c.room())
	if err := f.readRaw(b, at, false); err != nil {
		return err
	}
	if !zeroes(b[4+8*c.Pieces:]) {
		return f.damaged(at, "bytes behind a directory")
	}
	return nil
}

// verifyPiece returns how many bytes of frames the piece has.
func (f *File) verifyPiece(s *scratch, c *contents, dir []dirEntry, i int) (n int64, err error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if f.compact != c {
		return 0, nil
	}
	p, err := f.readPiece(s, dir, i)
	if err != nil {
		return 0, err
	}
	s.frames = slices.Grow(s.frames[:0], int(p.size))[:p.size]
	if err := f.readRaw(s.frames, p.frames, false); err != nil {
		return 0, err
	}
	if record.Checksum(s.frames) != p.sum {
		return p.size, f.damaged(p.frames, "a piece's frames have another checksum than was recorded")
	}
	return p.size, f.each(&p, func([]byte, int64, body) (bool, error) { return true, nil })
}
