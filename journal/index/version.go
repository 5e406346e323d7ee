package index

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Version is where the content of a unit, as of an LSN, stands.
//
//	offset size field
//	  0     4   file
//	  4     4   payload: offset of the unit's first block in the file
//	  8     4   class 0: the block's checksum; else: offset of the first
//	            block's entry in the record's checksum table
//	  0     8   of an original, behind these: until
//
// A unit of zeroes has none of the first three. Integers are little-endian.
type Version struct {
	Zero    bool
	File    uint32
	Payload uint32
	Aux     uint32
	// Until is where the version ends, though the index may have no later one: from there on, the block is what the backing holds,
	// or another version says. 0: with the next version.
	Until record.LSN
}

func (v Version) append(dst []byte) []byte {
	le := binary.LittleEndian
	if !v.Zero {
		dst = le.AppendUint32(le.AppendUint32(le.AppendUint32(dst, v.File), v.Payload), v.Aux)
	}
	if v.Until != 0 {
		dst = le.AppendUint64(dst, uint64(v.Until))
	}
	return dst
}

func decodeVersion(b []byte) (v Version, err error) {
	le := binary.LittleEndian
	switch len(b) {
	case 0, 8:
		v.Zero = true
	case 12, 20:
		v = Version{File: le.Uint32(b), Payload: le.Uint32(b[4:]), Aux: le.Uint32(b[8:])}
		b = b[12:]
	default:
		return v, fmt.Errorf("%w: index value of %d bytes", record.ErrCorrupt, len(b))
	}
	if len(b) > 0 {
		v.Until = record.LSN(le.Uint64(b))
	}
	return v, nil
}

// Pick is the newest version of a block at or below an LSN. One that has ended there is not Found.
type Pick struct {
	Found bool
	LSN   record.LSN
	Class uint8
	Block uint32 // of the unit
	Version
}

// PayloadOff is the place of the block's bytes in its file.
func (p *Pick) PayloadOff() int64 { return int64(p.Payload) + int64(p.Block)*record.BlockSize }

// SumOff is the place of the block's checksum in its file, for classes other than 0.
func (p *Pick) SumOff() int64 { return int64(p.Aux) + 4*int64(p.Block) }

// Reader looks versions up in the database as it was when the reader was made.
type Reader struct {
	g    *Group
	it   *pebble.Iterator
	mark record.LSN // the watermark when it was made, or an earlier one
	gen  uint64     // of what is forgotten, when it was made, or an earlier one
	born time.Time
	key  []byte
}

// Reader returns a reader that sees every batch up to the watermark of an LSN,
// which has been committed. It may see later ones.
func (g *Group) Reader(upTo record.LSN) (*Reader, error) {
	g.pool.Lock()
	for i := len(g.pool.readers) - 1; i >= 0; i-- {
		if r := g.pool.readers[i]; r.mark >= upTo && r.gen == g.Forgotten() {
			g.pool.readers = slices.Delete(g.pool.readers, i, i+1)
			g.pool.Unlock()
			return r, nil
		}
	}
	g.pool.Unlock()
	return g.FreshReader()
}

// FreshReader returns a reader that sees every batch committed before the call.
func (g *Group) FreshReader() (*Reader, error) {
	mark, gen := record.LSN(g.committed.Load()), g.forgotten.Load()
	it, err := g.db.NewIter(&pebble.IterOptions{
		LowerBound:   appendTable(nil, g.id, tableVersion),
		UpperBound:   appendTable(nil, g.id, tableVersion+1),
		UseL6Filters: true,
	})
	if err != nil {
		return nil, fmt.Errorf("read the index: %w", err)
	}
	return &Reader{g: g, it: it, mark: mark, gen: gen, born: time.Now(), key: make([]byte, 0, versionKeyLen)}, nil
}

// Forgetting says that versions are about to be forgotten, as the backing has what came of them: what a reader of before does not find may
// have been in the backing when it was made, and is not now.
func (g *Group) Forgetting() { g.forgotten.Add(1) }

// Forgotten counts the calls of Forgetting.
func (g *Group) Forgotten() uint64 { return g.forgotten.Load() }

// Forgotten is what Group.Forgotten was when the reader was made, or before.
func (r *Reader) Forgotten() uint64 { return r.gen }

// maxIdle bounds the readers that are kept for the next who asks.
const maxIdle = 32

// Release gives the reader back.
func (r *Reader) Release() {
	g := r.g
	g.pool.Lock()
	defer g.pool.Unlock()
	if len(g.pool.readers) < maxIdle {
		g.pool.readers = append(g.pool.readers, r)
		return
	}
	_ = r.it.Close() // its errors were each call's
}

// Close ends the reader for good, as one that sees too little.
func (r *Reader) Close() { _ = r.it.Close() }

// Find sets picks[i] to the newest version at or below lsn of block first+i,
// or to one that is not Found.
func (r *Reader) Find(disk record.DiskID, first int64, lsn record.LSN, picks []Pick) error {
	clear(picks)
	mask := r.g.classMask(disk)
	for c := range Classes {
		if mask&(1<<c) == 0 {
			continue
		}
		var err error
		if len(picks) == 1 {
			err = r.findOne(disk, uint8(c), first, lsn, picks)
		} else {
			err = r.findRun(disk, uint8(c), first, lsn, picks)
		}
		if err != nil {
			return fmt.Errorf("look up block %d of disk %d: %w", first, disk, err)
		}
	}
	for i := range picks {
		if p := &picks[i]; p.Until != 0 && p.Until <= lsn {
			p.Found = false
		}
	}
	return nil
}

func (r *Reader) seek(disk record.DiskID, u Unit, lsn record.LSN) bool {
	r.key = appendVersionKey(r.key[:0], r.g.id, disk, u, lsn)
	return r.it.SeekGE(r.key)
}

// findOne looks one block up; tables whose filter knows no such unit are not read.
func (r *Reader) findOne(disk record.DiskID, c uint8, block int64, lsn record.LSN, picks []Pick) error {
	u := Unit{Class: c, Index: block >> classShift(int(c))}
	r.key = appendVersionKey(r.key[:0], r.g.id, disk, u, lsn)
	if !r.it.SeekPrefixGE(r.key) {
		return r.it.Error()
	}
	_, at := splitVersionKey(r.it.Key())
	return r.paint(u, at, block, picks)
}

// maxSteps is how many keys findRun steps over before it seeks.
const maxSteps = 8

// findRun goes through the versions of the units that touch the run: by steps where
// they stand close together, which costs a tenth of a seek, and by at most one seek and maxSteps
// steps for each unit that has any.
func (r *Reader) findRun(disk record.DiskID, c uint8, first int64, lsn record.LSN, picks []Pick) error {
	shift := classShift(int(c))
	last := (first + int64(len(picks)) - 1) >> shift
	steps := maxSteps
	for u := first >> shift; u <= last; {
		var ok bool
		if steps == maxSteps {
			ok, steps = r.seek(disk, Unit{Class: c, Index: u}, lsn), 0
		} else {
			ok, steps = r.it.Next(), steps+1
		}
		if !ok {
			return r.it.Error()
		}
		if !inClass(r.it.Key(), r.key) {
			return nil
		}
		unit, at := splitVersionKey(r.it.Key())
		switch {
		case unit > last:
			return nil
		case unit < u:
			continue // an older version of the unit before
		case at > lsn:
			u = unit // too new: its chain goes on
			continue
		}
		if err := r.paint(Unit{Class: c, Index: unit}, at, first, picks); err != nil {
			return err
		}
		u, steps = unit+1, 0
	}
	return nil
}

// inClass reports whether two version keys share group, table, disk and class.
func inClass(a, b []byte) bool {
	return len(a) == versionKeyLen && string(a[:10]) == string(b[:10])
}

// paint lets the version at the iterator replace older ones in the blocks of its unit.
func (r *Reader) paint(u Unit, at record.LSN, first int64, picks []Pick) error {
	b, err := r.it.ValueAndErr()
	if err != nil {
		return err
	}
	v, err := decodeVersion(b)
	if err != nil {
		return err
	}
	from, to := max(u.First(), first), min(u.First()+u.Blocks(), first+int64(len(picks)))
	for b := from; b < to; b++ {
		p := &picks[b-first]
		if !p.Found || at >= p.LSN {
			*p = Pick{Found: true, LSN: at, Class: u.Class, Block: uint32(b - u.First()), Version: v}
		}
	}
	return nil
}

// Chain calls fn with each single-block version of a block at or below lsn,
// newest first. fn must not use the reader.
func (r *Reader) Chain(disk record.DiskID, block int64, lsn record.LSN, fn func(Pick) error) error {
	u := Unit{Index: block}
	for ok := r.seek(disk, u, lsn); ok && inClass(r.it.Key(), r.key); ok = r.it.Next() {
		unit, at := splitVersionKey(r.it.Key())
		if unit != block {
			break
		}
		b, err := r.it.ValueAndErr()
		if err != nil {
			return err
		}
		v, err := decodeVersion(b)
		if err != nil {
			return err
		}
		if err := fn(Pick{Found: true, LSN: at, Version: v}); err != nil {
			return err
		}
	}
	return r.it.Error()
}

// At is the version of a unit at an LSN; ok is false if there is none.
func (r *Reader) At(disk record.DiskID, u Unit, lsn record.LSN) (v Version, ok bool, err error) {
	if !r.seek(disk, u, lsn) || !bytes.Equal(r.it.Key(), r.key) {
		return v, false, r.it.Error()
	}
	b, err := r.it.ValueAndErr()
	if err != nil {
		return v, false, err
	}
	v, err = decodeVersion(b)
	return v, err == nil, err
}

// Next is the LSN of the oldest version of a block above lsn, in any class; MaxLSN if there is none.
func (r *Reader) Next(disk record.DiskID, block int64, lsn record.LSN) (record.LSN, error) {
	next := record.MaxLSN
	mask := r.g.classMask(disk)
	for c := range Classes {
		if mask&(1<<c) == 0 {
			continue
		}
		u := Unit{Class: uint8(c), Index: block >> classShift(c)}
		r.key = appendVersionKey(r.key[:0], r.g.id, disk, u, lsn)
		if r.it.SeekLT(r.key) && inClass(r.it.Key(), r.key) {
			if unit, at := splitVersionKey(r.it.Key()); unit == u.Index {
				next = min(next, at)
			}
		}
		if err := r.it.Error(); err != nil {
			return 0, err
		}
	}
	return next, nil
}
