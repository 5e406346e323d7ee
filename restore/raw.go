package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Source is what is restored. Its methods are called from several goroutines.
type Source interface {
	Size() int64
	// ReadAt fills p.
	ReadAt(p []byte, off int64) error
	// Extents calls fn with runs that together fill the range, and whether
	// each is known to be zeroes.
	Extents(off, n int64, fn func(n int64, zero bool)) error
}

// Options of a restore.
type Options struct {
	Force    bool              // replace an existing file
	Progress func(bytes int64) // told of bytes of the disk that are done; from several goroutines; may be nil
}

const (
	workers = 4
	// chunk is what a worker reads and writes at once, in bytes.
	chunk = 1 << 20
	// span is the range whose extents are asked for at once, in bytes.
	span = 64 << 20
	// grain is the unit in which zeroes are found and left out, in bytes.
	grain = 64 << 10
)

// Raw writes the source to a raw image at path.
func Raw(ctx context.Context, src Source, path string, o Options) error {
	return replace(path, o.Force, func(f *os.File) error {
		if err := f.Truncate(src.Size()); err != nil {
			return err
		}
		return copyAll(ctx, src, f, o.Progress)
	})
}

// replace has fn write a file beside path, which takes its name when it is
// whole and durable; nobody but the owner may read it. After an error before that, path is as it was.
func replace(path string, force bool, fn func(f *os.File) error) error {
	if err := writeBeside(path, force, fn); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("restore to %s: it is written, its name may not be durable: %w", path, err)
	}
	return nil
}

func writeBeside(path string, force bool, fn func(f *os.File) error) (err error) {
	if info, serr := os.Lstat(path); serr == nil {
		switch {
		case !info.Mode().IsRegular():
			return fmt.Errorf("restore to %s: it is not a file", path)
		case !force:
			return fmt.Errorf("restore to %s: %w; --force replaces it", path, fs.ErrExist)
		}
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*.partial")
	if err != nil {
		return fmt.Errorf("restore to %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			_ = f.Close() // again, perhaps
			err = errors.Join(fmt.Errorf("restore to %s: %w", path, err), os.Remove(f.Name()))
		}
	}()
	if err := fn(f); err != nil {
		return err
	}
	// Whoever wrote it: the bytes are the file's.
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if force {
		return os.Rename(f.Name(), path)
	}
	// Whoever made the file meanwhile, in an hour of copying, keeps it.
	err = unix.Renameat2(unix.AT_FDCWD, f.Name(), unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return os.Rename(f.Name(), path) // a file system that knows no such rename
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

// copyAll copies everything but zeroes, the spans by several workers.
func copyAll(ctx context.Context, src Source, dst *os.File, progress func(int64)) error {
	if progress == nil {
		progress = func(int64) {}
	}
	eg, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range workers {
		eg.Go(func() error {
			buf := make([]byte, chunk)
			for {
				off := next.Add(span) - span
				if off >= src.Size() {
					return nil
				}
				if err := copySpan(ctx, src, dst, off, min(span, src.Size()-off), buf, progress); err != nil {
					return err
				}
			}
		})
	}
	return eg.Wait()
}

type run struct{ off, n int64 }

func copySpan(ctx context.Context, src Source, dst *os.File, off, n int64, buf []byte, progress func(int64)) error {
	var data []run
	at := off
	err := src.Extents(off, n, func(n int64, zero bool) {
		if !zero {
			data = append(data, run{at, n})
		} else {
			progress(n)
		}
		at += n
	})
	if err != nil {
		return err
	}
	for _, r := range data {
		for r.n > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			b := buf[:min(r.n, int64(len(buf)))]
			if err := src.ReadAt(b, r.off); err != nil {
				return fmt.Errorf("read %d bytes at %d: %w", len(b), r.off, err)
			}
			if err := writeSparse(dst, b, r.off); err != nil {
				return err
			}
			progress(int64(len(b)))
			r.off, r.n = r.off+int64(len(b)), r.n-int64(len(b))
		}
	}
	return nil
}

// writeSparse writes b but for the grains that are zeroes.
func writeSparse(dst *os.File, b []byte, off int64) error {
	for i := 0; i < len(b); {
		j := i
		for j < len(b) && !isZero(b[j:min(len(b), j+grain)]) {
			j = min(len(b), j+grain)
		}
		if j > i {
			if _, err := dst.WriteAt(b[i:j], off+int64(i)); err != nil {
				return err
			}
			i = j
			continue
		}
		i = min(len(b), i+grain)
	}
	return nil
}

var zeroes [grain]byte

func isZero(b []byte) bool { return bytes.Equal(b, zeroes[:len(b)]) }
