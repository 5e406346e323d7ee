package index

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/record"
	"github.com/cockroachdb/pebble/v2/sstable"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// VerifyFiles reads every file of the database and compares it with its checksums. It calls report for each that is damaged, with its path, and pause, which may
// wait, with the size in bytes of what it has read. An error of pause ends it. It returns the number of files. What was committed and not flushed is in none.
func (d *DB) VerifyFiles(pause func(bytes int64) error, report func(path string, err error)) (files int64, err error) {
	levels, err := d.db.SSTables()
	if err != nil {
		return 0, fmt.Errorf("list the index's tables: %w", err)
	}
	for _, tables := range levels {
		for _, t := range tables {
			path := d.path(fmt.Sprintf("%s.sst", t.BackingSSTNum))
			err := d.verifyTable(path)
			if errors.Is(err, fs.ErrNotExist) && !d.has(t.BackingSSTNum) {
				continue // compacted meanwhile
			}
			if err != nil {
				report(path, err)
			}
			files++
			if err := pause(int64(t.Size)); err != nil {
				return files, err
			}
		}
	}
	for _, one := range []struct {
		prefix string
		verify func(path string) error
	}{{"MANIFEST-", d.verifyManifest}, {"OPTIONS-", d.verifyOptions}} {
		path, size, err := d.newest(one.prefix)
		if err != nil {
			return files, err
		}
		for {
			if err = one.verify(path); err == nil {
				break
			}
			// It may have been written meanwhile, or a newer one have come in its place.
			was, before := path, size
			var lerr error
			if path, size, lerr = d.newest(one.prefix); lerr != nil {
				return files, lerr
			}
			if path == was && size == before {
				break
			}
		}
		if err != nil {
			report(path, err)
		}
		files++
	}
	return files, nil
}

func (d *DB) path(name string) string { return d.opts.FS.PathJoin(d.dir, name) }

// has reports whether the database has a table.
func (d *DB) has(number fmt.Stringer) bool {
	levels, err := d.db.SSTables()
	for _, tables := range levels {
		for _, t := range tables {
			if t.BackingSSTNum.String() == number.String() {
				return true
			}
		}
	}
	return err != nil
}

// verifyTable reads all blocks of a table. Pebble may panic over bytes that no table has, though its checksums hold.
func (d *DB) verifyTable(path string) (err error) {
	f, err := d.opts.FS.Open(path)
	if err != nil {
		return err
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", pebble.ErrCorruption, p)
		}
	}()
	readable, err := sstable.NewSimpleReadable(f)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	r, err := sstable.NewReader(context.Background(), readable, d.opts.MakeReaderOptions())
	if err != nil {
		return errors.Join(err, readable.Close())
	}
	// A damaged footer may name another format: this program's, and the one that was written before it, are taken for genuine.
	if format, err := r.TableFormat(); err != nil || format != d.db.TableFormat() && format != sstable.TableFormatPebblev5 {
		return errors.Join(fmt.Errorf("%w: table format %s", pebble.ErrCorruption, format), err, r.Close())
	}
	return errors.Join(r.ValidateBlockChecksums(), r.Close())
}

// newest is the path of the last file whose name has a prefix, and its size in bytes.
func (d *DB) newest(prefix string) (path string, size int64, err error) {
	names, err := d.opts.FS.List(d.dir)
	if err != nil {
		return "", 0, fmt.Errorf("list the index's files: %w", err)
	}
	last := ""
	for _, name := range names {
		// Numbers have six digits at least, and more when they must.
		if strings.HasPrefix(name, prefix) && (len(name) > len(last) || len(name) == len(last) && name > last) {
			last = name
		}
	}
	path = d.path(last)
	info, err := d.opts.FS.Stat(path)
	if err != nil {
		return "", 0, fmt.Errorf("find the index's %s: %w", prefix, err)
	}
	return path, info.Size(), nil
}

// verifyManifest reads all records of the list of tables. None stands behind the last.
func (d *DB) verifyManifest(path string) error {
	f, err := d.opts.FS.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	r := record.NewReader(f, 0)
	for {
		rec, err := r.Next()
		if err == nil {
			_, err = io.Copy(io.Discard, rec)
		} else if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("at %d: %w", r.Offset(), err)
		}
	}
	if end := r.Offset(); end < info.Size() {
		return fmt.Errorf("%w: nothing from %d on", pebble.ErrCorruption, end)
	}
	return nil
}

// verifyOptions compares what the database noted of its options when it was opened with those that it has.
func (d *DB) verifyOptions(path string) error {
	f, err := d.opts.FS.Open(path, vfs.SequentialReadsOption)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return err
	}
	if string(b) != d.opts.String() {
		return fmt.Errorf("%w: it is not what was written", pebble.ErrCorruption)
	}
	return nil
}
