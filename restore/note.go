package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Origin says what is restored.
type Origin struct {
	Store string `json:"store"` // the journal's identity
	Disk  string `json:"disk"`  // GROUP/DISK
	Point string `json:"point"` // as it was asked for
	LSN   uint64 `json:"lsn"`
	Since uint64 `json:"since,omitempty"` // LSN of the copy that is brought up to date
}

// note says how far a restore is. It is a file beside the image, or in a directory of its own for what is no file, and
// locked as long as the restore goes on.
type note struct {
	Version int    `json:"version"`
	Target  string `json:"target"`
	Origin
	Size   int64  `json:"size"`
	Format string `json:"format"`
	Next   int64  `json:"next,omitempty"` // of a qcow2 image, see type qcow2
	Mark   string `json:"mark,omitempty"` // what tells a target in place from what else may come by its name
	Done   bitmap `json:"done"`           // spans
}

const noteVersion = 1

// maxNote bounds a note, in bytes: that of the largest disk has some hundred kilobytes.
const maxNote = 16 << 20

// noteFile is an open note with its lock.
type noteFile struct {
	f    *os.File
	path string
}

// openNote opens and locks a note, making it if need be.
func openNote(path string) (*noteFile, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%w: another restore writes to it (%s is locked)", ErrInUse, path)
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		// Whoever held the lock may have removed the file before letting go of it.
		mine, err := f.Stat()
		if err == nil {
			var now fs.FileInfo
			if now, err = os.Stat(path); err == nil && os.SameFile(mine, now) {
				return &noteFile{f, path}, nil
			}
		}
		if cerr := f.Close(); cerr != nil || err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, errors.Join(err, cerr)
		}
	}
}

// read is what the file says; false if it says nothing that is of use.
func (nf *noteFile) read() (n note, ok bool) { return decodeNote(nf.f) }

func decodeNote(r io.Reader) (n note, ok bool) {
	b, err := io.ReadAll(io.LimitReader(r, maxNote))
	if err != nil || json.Unmarshal(b, &n) != nil {
		return note{}, false
	}
	ok = n.Version == noteVersion && n.Size > 0 && len(n.Done) == len(newBitmap(spans(n.Size))) && n.Next >= 0
	return n, ok
}

// write replaces what the file says. A write that is torn leaves a mix of the old note and the new one, which says of
// no span that it is done unless one of them does.
func (nf *noteFile) write(n note) error {
	n.Version = noteVersion
	b, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if _, err := nf.f.WriteAt(b, 0); err != nil {
		return err
	}
	return errors.Join(nf.f.Truncate(int64(len(b))), nf.f.Sync())
}

// begin replaces what the file says by a note of other work, before that begins: a mix of both would be believed.
func (nf *noteFile) begin(n note) error {
	if err := nf.forget(); err != nil {
		return err
	}
	return nf.write(n)
}

// forget has the file say nothing, durably.
func (nf *noteFile) forget() error { return errors.Join(nf.f.Truncate(0), nf.f.Sync()) }

func (nf *noteFile) close() error { return nf.f.Close() }

func (nf *noteFile) remove() error { return errors.Join(os.Remove(nf.path), nf.f.Close()) }

// Left tells what an earlier restore to a file left unfinished beside it.
func Left(path string) (Origin, bool) { return leftAt(notePath(path)) }

// LeftOnto is Left of a target that is written in place.
func LeftOnto(dir, target string) (Origin, bool) { return leftAt(notePathOnto(dir, target)) }

// Unfinished reports whether a file in place is what an earlier restore of the same origin left unfinished.
func Unfinished(dir, target string, f *File, o Origin) bool {
	file, err := os.Open(notePathOnto(dir, target))
	if err != nil {
		return false
	}
	defer file.Close()
	n, found := decodeNote(file)
	o.Point = n.Point // the same LSN under another name
	return found && n.Origin == o && n.Mark != "" && n.Mark == f.marked()
}

func leftAt(path string) (Origin, bool) {
	f, err := os.Open(path)
	if err != nil {
		return Origin{}, false
	}
	defer f.Close()
	n, ok := decodeNote(f)
	return n.Origin, ok
}

// goesOn reports whether a note is of the same work.
func (n note) goesOn(o note) bool {
	a, b := n.Origin, o.Origin
	a.Point, b.Point = "", "" // the same LSN under another name
	return a == b && n.Mark == o.Mark && n.Target == o.Target && n.Size == o.Size && n.Format == o.Format
}

// saveEvery is how often it is noted how far a restore is.
const saveEvery = 5 * time.Second

// saving copies, noting how far it is now and then and when it ends early.
func (nf *noteFile) saving(ctx context.Context, n note, j *job, state func() (int64, error)) error {
	save := func() error {
		n.Done = j.copied()
		next, err := state()
		if err != nil {
			return err
		}
		n.Next = next
		if err := j.dst.Sync(); err != nil {
			return err
		}
		return nf.write(n)
	}
	copying, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- j.copyAll(copying) }()
	t := time.NewTicker(saveEvery)
	defer t.Stop()
	for {
		select {
		case err := <-done:
			if err != nil {
				return errors.Join(err, save())
			}
			return nil
		case <-t.C:
			if err := save(); err != nil {
				cancel()
				return errors.Join(fmt.Errorf("note how far it is: %w", err), <-done)
			}
		}
	}
}
