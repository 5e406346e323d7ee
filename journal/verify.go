package journal

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Finding is damage that Verify found.
type Finding struct {
	Where string     // file and offset, index entry, or disk and offset
	LSN   record.LSN // of the first record of the log that can not be read; 0: it is of something else
	Last  record.LSN // of the last one
	What  string

	// One of these, or neither, says what can be mended beside records of the log.
	original origAt     // of an original whose content it is, see RepairOriginal
	backing  *disk.Disk // see RepairBackings
	block    int64      // of the backing
}

// Verified says what Verify has looked at.
type Verified struct {
	Records   int64 // of the log
	Originals int64 // records of the originals
	Bytes     int64 // of payload
	Versions  int64 // of the index
	Blocks    int64 // of backings that the journal has a checksum for
	Findings  int64
}

// origAt is where an original stands; a file of 0: nowhere.
type origAt struct {
	file uint32
	off  int64
}

// VerifyOptions say how Verify goes about it.
type VerifyOptions struct {
	// Pause is called behind each step with the bytes that it read, and may wait. Its error ends the verification. Nothing is held meanwhile. nil: it does not wait.
	Pause func(bytes int64) error
}

// Verify compares what the group has with its checksums, up to what was durable when it was called:
//
//   - each file's header and each record of it;
//   - the index, both ways: each record that views may need has its versions in it, and each version of the index its record;
//   - the backings: each block that the journal has the newest version of, and has applied.
//
// It calls report for each damage found, and changes nothing. Its error says that it could not go on: os.ErrClosed, as the group was closed, or taken back. History
// may expire, and be cleaned up, meanwhile; what is gone is passed over, and originals then are looked for in the index, but not the other way round. Records
// of bridges are not compared with the index. A group that is open for reading alone has no backings.
func (g *Group) Verify(ctx context.Context, o VerifyOptions, report func(Finding)) (Verified, error) {
	if o.Pause == nil {
		o.Pause = func(int64) error { return nil }
	}
	v := verifier{g: g, ctx: ctx, o: o, report: report, head: g.Durable(), seed: maphash.MakeSeed()}
	if !g.o.ReadOnly {
		if err := g.indexTo(v.head); err != nil && g.alive() {
			return v.done, err
		}
	}
	g.index.Lock()
	v.mark, v.committed = g.index.mark, g.index.mark
	g.index.Unlock()
	if g.o.ReadOnly {
		var err error
		if v.committed, err = g.ix.Watermark(); err != nil {
			return v.done, err
		}
	}
	v.committed.LSN = min(v.committed.LSN, v.head)
	v.moved = g.rearranged.Load()
	defer v.closeReader()
	for _, pass := range []func() error{v.log, v.originals, v.index, v.backings} {
		if err := pass(); err != nil {
			return v.done, err
		}
	}
	return v.done, nil
}

// Verified is when the last verification that was noted was begun, and how many places it left damaged; zero: there was none, or the index was lost since.
func (g *Group) Verified() (began time.Time, damaged int64) {
	if v := g.verified.Load(); v != nil {
		return v.began, v.damaged
	}
	return time.Time{}, 0
}

// SetVerified notes a verification. It is durable with the next checkpoint.
func (g *Group) SetVerified(began time.Time, damaged int64) error {
	g.verified.Store(&verified{began, damaged})
	g.apply.Lock()
	defer g.apply.Unlock()
	if err := g.ended(); err != nil {
		return err
	}
	b := binary.LittleEndian.AppendUint64(nil, uint64(began.UnixNano()))
	return g.setState(stateVerified, binary.LittleEndian.AppendUint64(b, uint64(damaged)))
}

type verified struct {
	began   time.Time
	damaged int64
}

// loadVerified takes up what the index has of the last verification.
func (g *Group) loadVerified() error {
	b, err := g.ix.State(stateVerified)
	if err != nil || len(b) != 16 {
		return err
	}
	le := binary.LittleEndian
	g.verified.Store(&verified{time.Unix(0, int64(le.Uint64(b))), int64(le.Uint64(b[8:]))})
	return nil
}

// VerifyIndex reads the files of the index, which is of all groups, and compares them with their checksums. It calls report for each that is damaged, and pause
// behind each with the bytes that it read; an error of pause ends it. It returns how many files there are.
func (s *Store) VerifyIndex(pause func(bytes int64) error, report func(Finding)) (files int64, err error) {
	return s.ix.VerifyFiles(pause, func(path string, err error) { report(Finding{Where: path, What: err.Error()}) })
}

type verifier struct {
	g      *Group
	ctx    context.Context
	o      VerifyOptions
	report func(Finding)
	done   Verified
	buf    []byte
	read   int64         // bytes since the last pause
	file   *segment.File // that is read, with a reference; nil: none
	look   *index.Reader // see reader
	doubt  bool          // not all of the log and the index is known to agree: what the index says a backing is to have may be of before
	ended  error         // why it, or the file that is read, has ended: no error of what was read

	head record.LSN
	mark index.Watermark // behind it, originals may be half written
	// committed is up to where the index is complete: of a group that is open for reading alone, that may be less.
	committed index.Watermark
	moved     uint64 // rearranged when it was begun
	seed      maphash.Seed
	logs      []*fileSum // ascending
	origs     []*fileSum // ascending
}

// fileSum is what the index should say of a file's records, and what it says: sums of a fingerprint of each version, so that none is to be kept.
type fileSum struct {
	f           *segment.File // to be acquired
	first, last record.LSN    // of a file of the log
	want, got   uint64
	unsure      bool // not all of its records can be read, or several may be of one LSN
}

// verifyStep is how many bytes are read between two pauses, and verifyKeys how many versions.
const (
	verifyStep = 1 << 20
	verifyKeys = 1 << 14
)

// closed is an error if the group takes nothing more because it is closed, or taken back: what it has then says nothing.
func (v *verifier) closed() error {
	v.g.append.Lock()
	defer v.g.append.Unlock()
	if v.g.append.closed != nil {
		return fmt.Errorf("verify group %s: %w: %w", v.g.name, os.ErrClosed, v.g.append.closed)
	}
	return nil
}

// finding reports a finding that has everything but what it is.
func (v *verifier) finding(f Finding, err error) {
	if v.closed() != nil {
		return // the next step ends it
	}
	f.What = err.Error()
	v.done.Findings++
	v.report(f)
}

// failed reports why something can not be read, of a finding that has all else, unless that ends the verification.
func (v *verifier) failed(f Finding, err error) error {
	if v.ended = cmp.Or(v.ctx.Err(), v.closed()); v.ended == nil && errors.Is(err, os.ErrClosed) {
		v.ended = err
	}
	if v.ended == nil {
		v.finding(f, err)
	}
	return v.ended
}

// step counts what was read, and rests when it was much: without the file and the view of the index that it has.
func (v *verifier) step(bytes int64) error {
	if v.ended = cmp.Or(v.ctx.Err(), v.closed()); v.ended != nil {
		return v.ended
	}
	if v.read += bytes; v.read >= verifyStep {
		v.ended = v.pause()
	}
	return v.ended
}

// pause is an error that wraps segment.ErrGone if the file that is read expired meanwhile.
func (v *verifier) pause() error {
	n, f := v.read, v.file
	v.read, v.file = 0, nil
	v.closeReader()
	if f != nil {
		f.Release()
	}
	if err := v.o.Pause(n); err != nil || f == nil {
		return err
	}
	_, err := v.g.set.Acquire(f.Number)
	if err == nil {
		v.file = f
	}
	return err
}

// reader looks at the index as it was since the last pause.
func (v *verifier) reader() (*index.Reader, error) {
	if v.look == nil {
		var err error
		if v.look, err = v.g.ix.FreshReader(); err != nil {
			return nil, err
		}
	}
	return v.look, nil
}

func (v *verifier) closeReader() {
	if v.look != nil {
		v.look.Close()
		v.look = nil
	}
}

func (v *verifier) fingerprint(e *index.Entry) uint64 { return maphash.Comparable(v.seed, *e) }
