package segment

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// ReadRun reads the records from next to last that stand from off on, as many as buf has room for, whole and verified.
// It returns their bytes and the LSN behind them. A record that is longer than buf comes alone, in memory of its own.
// There are none, and no error, if nothing is written at off. Others than those that must be there are
// record.ErrCorrupt.
func (f *File) ReadRun(buf []byte, off int64, next, last record.LSN) ([]byte, record.LSN, error) {
	b, err := f.some(buf, off)
	if err != nil || len(b) < record.HeaderSize || bytes.Equal(b[:record.HeaderSize], zeroHeader[:]) {
		return nil, next, err
	}
	h, err := record.Decode(b)
	if errors.Is(err, record.ErrShort) && len(b) == len(buf) {
		if b, err = f.some(make([]byte, record.MaxHeaderSize), off); err != nil {
			return nil, next, err
		}
		h, err = record.Decode(b)
	}
	if err == nil && h.Size() > int64(len(b)) {
		b, err = f.some(make([]byte, h.Size()), off)
	}
	if err != nil {
		return nil, next, f.corrupt(off, err)
	}
	at := int64(0)
	for next <= last && !bytes.HasPrefix(b[at:], zeroHeader[:]) {
		h, err := record.Decode(b[at:])
		if err == nil {
			err = f.check(h, b[at:], next)
		}
		if err != nil && at > 0 {
			break // the next run begins with it, which may be cut short here, or damaged
		}
		if err != nil {
			return nil, next, f.corrupt(off+at, err)
		}
		at, next = at+h.Size(), next+1
	}
	return b[:at], next, nil
}

// some reads as much of buf as the file has.
func (f *File) some(buf []byte, off int64) ([]byte, error) {
	n, err := f.readSome(buf, off)
	if err != nil {
		return nil, fmt.Errorf("%s at %d: %w", f.Path, off, err)
	}
	return buf[:n], nil
}

// check says whether the record at b's start is what must stand there.
func (f *File) check(h record.Header, b []byte, lsn record.LSN) error {
	switch {
	case h.Salt != f.Salt:
		return fmt.Errorf("%w: record of another file (salt %08x, expected %08x)", record.ErrCorrupt, h.Salt, f.Salt)
	case h.LSN != lsn:
		return fmt.Errorf("%w: LSN %d, expected %d", record.ErrCorrupt, h.LSN, lsn)
	case h.Size() > int64(len(b)):
		return fmt.Errorf("%w: LSN %d runs past the end of the file", record.ErrCorrupt, h.LSN)
	}
	return h.Sums.Verify(b[h.EncodedSize():][:h.Payload])
}

// corrupt is an error at a place of the file.
func (f *File) corrupt(off int64, err error) error {
	if !errors.Is(err, record.ErrCorrupt) {
		err = fmt.Errorf("%w: %w", record.ErrCorrupt, err)
	}
	return fmt.Errorf("%s at %d: %w", f.Path, off, err)
}
