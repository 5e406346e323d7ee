package restore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Format is how an image is written.
type Format string

// The formats.
const (
	Raw   Format = "raw"
	QCOW2 Format = "qcow2"
)

// Options of a restore. The functions are called from several goroutines, and may be nil.
type Options struct {
	Origin Origin
	Format Format // of ToFile; raw if empty
	Force  bool   // replace an existing file
	Fresh  bool   // begin anew, whatever an earlier restore left
	Verify bool   // compare the target with the source when it is written
	// Changed, if set, tells which runs may differ from what the target is: nothing else is written.
	Changed  func(off, n int64, fn func(n int64, changed bool)) error
	Progress func(bytes int64) // told of bytes of the disk that are done
	Verified func(bytes int64) // told of bytes of the disk that were compared
}

func (o *Options) fill() {
	if o.Format == "" {
		o.Format = Raw
	}
	if o.Progress == nil {
		o.Progress = func(int64) {}
	}
	if o.Verified == nil {
		o.Verified = func(int64) {}
	}
}

func (o *Options) note(target string, size int64) note {
	return note{Target: target, Origin: o.Origin, Size: size, Format: string(o.Format), Done: newBitmap(spans(size))}
}

// What stands beside an image until it is whole.
func partialPath(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".partial")
}

func notePath(path string) string { return partialPath(path) + ".note" }

// ToFile writes the source to an image at path. Nobody but the owner may read it. After an error path is as it was.
func ToFile(ctx context.Context, src Source, path string, o Options) error {
	o.fill()
	if err := free(path, o.Force); err != nil {
		return fmt.Errorf("restore to %s: %w", path, err)
	}
	nf, err := openNote(notePath(path))
	if err != nil {
		return fmt.Errorf("restore to %s: %w", path, err)
	}
	if err := writeBeside(ctx, src, path, nf, o); err != nil {
		return fmt.Errorf("restore to %s: %w", path, err)
	}
	if err := errors.Join(nf.remove(), syncDir(filepath.Dir(path))); err != nil {
		return fmt.Errorf("restore to %s: it is written, its name may not be durable: %w", path, err)
	}
	return nil
}

// free fails if path is nothing that may be replaced.
func free(path string, force bool) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	switch {
	case !info.Mode().IsRegular():
		return errors.New("it is not a file")
	case !force:
		return fmt.Errorf("%w; --force replaces it", fs.ErrExist)
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unused(f)
}

// writeBeside writes the image beside path, and gives it the name when it is whole and durable.
func writeBeside(ctx context.Context, src Source, path string, nf *noteFile, o Options) (err error) {
	partial := partialPath(path)
	n := o.note(path, src.Size())
	was, ok := nf.read()
	if ok = ok && was.goesOn(n) && !allZero(was.Done) && !o.Fresh; ok {
		_, serr := os.Lstat(partial)
		ok = serr == nil
	}
	if !ok {
		if err := nf.forget(); err != nil {
			return errors.Join(err, nf.close())
		}
	}
	f, err := os.OpenFile(partial, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return errors.Join(err, nf.remove())
	}
	if ok {
		n = was
	} else if err := beginEmpty(f, nf, n); err != nil {
		return errors.Join(err, f.Close(), nf.close())
	}
	j := &job{src: src, blank: true, progress: o.Progress}
	j.mu.done = n.Done
	defer func() {
		if err == nil {
			return
		}
		_ = f.Close() // again, perhaps
		if errors.Is(err, ErrDiffers) || allZero(j.copied()) {
			err = errors.Join(err, os.Remove(partial), nf.remove())
			return
		}
		err = errors.Join(fmt.Errorf("%w (the same command goes on from where this one ended; --restart begins anew)", err), nf.close())
	}()
	if err := checkRoom(f, src, j.mu.done); err != nil {
		return err
	}
	finish, err := writeImage(ctx, f, n, j, nf)
	if err != nil {
		return err
	}
	if err := errors.Join(finish(), f.Sync()); err != nil {
		return err
	}
	if o.Verify {
		if err := verify(ctx, j, o); err != nil {
			return err
		}
	}
	if err := (&File{f: f}).stamp(o.Origin); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return rename(partial, path, o.Force)
}

// beginEmpty notes an image that has nothing yet. What is not written of it is zeroes: it is durably empty before there is a note of it.
func beginEmpty(f *os.File, nf *noteFile, n note) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return nf.write(n)
}

// writeImage copies what is not done, and returns what makes the image complete.
func writeImage(ctx context.Context, f *os.File, n note, j *job, nf *noteFile) (finish func() error, err error) {
	if n.Format == string(Raw) {
		if err := f.Truncate(n.Size); err != nil {
			return nil, err
		}
		j.dst = &File{f: f, path: f.Name(), size: n.Size}
		return func() error { return nil }, nf.saving(ctx, n, j, func() (int64, error) { return 0, nil })
	}
	q, err := newQCOW2(f, n.Size, n.Next)
	if err != nil {
		return nil, err
	}
	j.dst = q
	return q.finish, nf.saving(ctx, n, j, q.flush)
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}

func rename(from, to string, replace bool) error {
	if replace {
		return os.Rename(from, to)
	}
	// Whoever made the file meanwhile, in an hour of copying, keeps it.
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return os.Rename(from, to) // a file system that knows no such rename
	}
	return err
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// verify compares the job's target with its source, read from the disk as far as the kernel can be asked for that.
func verify(ctx context.Context, j *job, o Options) error {
	if f, ok := j.dst.(interface{ forget() }); ok {
		f.forget()
	}
	v := &job{src: j.src, dst: j.dst, progress: o.Verified}
	v.mu.done = newBitmap(spans(j.src.Size()))
	return v.compareAll(ctx)
}

func notePathOnto(dir, target string) string {
	sum := sha256.Sum256([]byte(target))
	return filepath.Join(dir, hex.EncodeToString(sum[:8])+".note")
}

// Onto writes the source to a target in place; name names it in the note, which is kept in noteDir. Only what is
// within the disk's size is written.
func Onto(ctx context.Context, src Source, dst Target, name, noteDir string, o Options) error {
	o.fill()
	if dst.Size() < src.Size() {
		return fmt.Errorf("restore to %s: %w: it has %d bytes, the disk %d", name, ErrTooSmall, dst.Size(), src.Size())
	}
	if err := os.MkdirAll(noteDir, 0o700); err != nil {
		return fmt.Errorf("restore to %s: %w", name, err)
	}
	nf, err := openNote(notePathOnto(noteDir, name))
	if err != nil {
		return fmt.Errorf("restore to %s: %w", name, err)
	}
	n, err := goOn(nf, dst, o.note(name, src.Size()), o.Fresh)
	if err != nil {
		return fmt.Errorf("restore to %s: %w", name, errors.Join(err, nf.close()))
	}
	j := &job{src: src, dst: dst, changed: o.Changed, progress: o.Progress}
	j.mu.done = n.Done
	if err := inPlace(ctx, j, n, nf); err != nil {
		return fmt.Errorf("restore to %s: %w: it is neither what it was nor the disk (the same command goes on; --restart begins anew)", name, errors.Join(err, nf.close()))
	}
	if o.Verify {
		if err := verify(ctx, j, o); err != nil {
			return fmt.Errorf("restore to %s: %w", name, errors.Join(err, nf.remove()))
		}
	}
	if f, ok := dst.(*File); ok {
		if err := f.stamp(o.Origin); err != nil {
			return fmt.Errorf("restore to %s: %w", name, errors.Join(err, nf.close()))
		}
	}
	return nf.remove()
}

// goOn is the note of a target in place: the one that an earlier attempt left, if it is of the same work and the target carries its
// mark still, or a new one, which is durable before the target is touched. An export carries no mark, and begins anew.
func goOn(nf *noteFile, dst Target, n note, fresh bool) (note, error) {
	f, ok := dst.(*File)
	if !ok {
		return n, nf.begin(n)
	}
	if was, found := nf.read(); found && !fresh && was.Mark != "" {
		n.Mark = was.Mark
		if was.goesOn(n) && f.marked() == was.Mark {
			return was, nil
		}
	}
	n.Mark = f.newMark()
	if err := nf.begin(n); err != nil {
		return n, err
	}
	return n, f.unstamp(n.Mark)
}

func inPlace(ctx context.Context, j *job, n note, nf *noteFile) error {
	if err := nf.saving(ctx, n, j, func() (int64, error) { return 0, nil }); err != nil {
		return err
	}
	return j.dst.Sync()
}
