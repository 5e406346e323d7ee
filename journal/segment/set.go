package segment

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

const (
	suffix    = ".seg"
	tmpSuffix = ".tmp"

	brokenSuffix = ".broken"
)

// ErrGone says that there is no such file: it was removed, or lost.
var ErrGone = errors.New("no such segment")

// ErrFull is wrapped when a new segment finds no room: nothing was written, and
// what is tried again later may succeed.
var ErrFull = errors.New("no room for a new segment")

// Set is the files of one group. Its methods are safe for concurrent use.
type Set struct {
	fs  vfs.FS
	dir string

	mu struct {
		sync.RWMutex
		files map[uint32]*File
		last  uint32 // the highest number given out
		size  int64  // of all files, bytes
	}
	broken []Broken

	// changing is held while a closed file is written to, or another one with the same records comes in its place.
	changing sync.Mutex
	// renaming is held, changing before it, while files are removed or replaced, or the set is closed.
	renaming  sync.Mutex
	temporary atomic.Int64 // see Temporary
}

// temporaries numbers temporary files: a set that is closed may have one in the works yet while another one is of its directory.
var temporaries atomic.Uint64

func (s *Set) tmpPath(what string) string {
	return s.fs.PathJoin(s.dir, fmt.Sprintf("%s-%d%s", what, temporaries.Add(1), tmpSuffix))
}

// Broken is a file without a valid header: one that was begun before a crash
// and never synced, or a damaged one. Its name tells which records it held.
type Broken struct {
	Kind   Kind
	First  record.LSN
	Number uint32
	Path   string
	Err    error
}

// File is one file of a set: immutable but for the tail of the newest of its
// kind, and for how the others keep what they have: see Compact. A reference keeps it readable after it was removed from the set.
type File struct {
	Header // as of the plain file
	Path   string

	// mu is held for reading while f and compact are used, and for writing while they change: another file with the same records may come in the place of what they are of.
	// Who holds Set.changing, is the Writer of this file, or has the set alone, as recovery does, may use f without it.
	mu      sync.RWMutex
	f       vfs.File
	compact *contents // nil: a plain file

	start int64        // of the first record, bytes
	alloc atomic.Int64 // bytes that the file takes up
	refs  atomic.Int32 // one is the set's
}

// OpenSet opens the files in dir, which must exist. Temporary files are what a
// crash left of a roll, or of a file that was to become compact, or plain again: they are removed, unless readOnly. Files without a valid
// header are set aside: see Broken.
func OpenSet(fs vfs.FS, dir string, readOnly bool) (*Set, error) {
	s := &Set{fs: fs, dir: dir}
	s.mu.files = map[uint32]*File{}
	names, err := fs.List(dir)
	if err != nil {
		return nil, fmt.Errorf("list segments: %w", err)
	}
	for _, name := range names {
		path := fs.PathJoin(dir, name)
		switch {
		case strings.HasSuffix(name, tmpSuffix) && !readOnly:
			if err := fs.Remove(path); err != nil {
				s.Close()
				return nil, fmt.Errorf("remove unfinished segment: %w", err)
			}
		case strings.HasSuffix(name, suffix):
			f, err := openFile(fs, path, readOnly)
			if errors.Is(err, record.ErrCorrupt) {
				err = s.setAside(name, path, err)
				if err == nil {
					continue
				}
			}
			if err != nil {
				s.Close()
				return nil, fmt.Errorf("open segment %s: %w", path, err)
			}
			if twin := s.mu.files[f.Number]; twin != nil || name != fileName(f.Kind, f.First, f.Number) {
				err := fmt.Errorf("open segment %s: its head says that it is %s: it is another file than its name says; put back what was there", path, fileName(f.Kind, f.First, f.Number))
				f.Release()
				s.Close()
				return nil, err
			}
			s.add(f)
		}
	}
	return s, nil
}

// GroupOf is the number of the group whose files are in dir, as the head of one of them says; 0: none has a valid one.
func GroupOf(fs vfs.FS, dir string) (uint32, error) {
	names, err := fs.List(dir)
	if err != nil {
		return 0, fmt.Errorf("list segments: %w", err)
	}
	for _, name := range names {
		if !strings.HasPrefix(name, Log.String()+"-") || !strings.HasSuffix(name, suffix) {
			continue
		}
		f, err := openFile(fs, fs.PathJoin(dir, name), true)
		if errors.Is(err, record.ErrCorrupt) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("open segment %s: %w", name, err)
		}
		group := f.Group
		f.Release()
		return group, nil
	}
	return 0, nil
}

// fileName names a file by kind, first LSN and number.
func fileName(k Kind, first record.LSN, number uint32) string {
	return fmt.Sprintf("%s-%020d-%08d%s", k, first, number, suffix)
}

// setAside notes a file with a bad header, unless its name is none of ours.
func (s *Set) setAside(name, path string, cause error) error {
	b := Broken{Path: path, Err: cause}
	for _, k := range []Kind{Log, Originals} {
		n, _ := fmt.Sscanf(name, k.String()+"-%d-%d"+suffix, &b.First, &b.Number)
		if n == 2 && name == fileName(k, b.First, b.Number) {
			b.Kind = k
			s.broken = append(s.broken, b)
			s.mu.last = max(s.mu.last, b.Number)
			return nil
		}
	}
	return cause
}

// Broken lists the files that OpenSet found without a valid header.
func (s *Set) Broken() []Broken { return s.broken }

// RemoveBroken removes those files, durably. With keep, those of originals are
// renamed instead, to what no Set looks at.
func (s *Set) RemoveBroken(keep bool) error {
	if len(s.broken) == 0 {
		return nil
	}
	for _, b := range s.broken {
		remove := func() error { return s.fs.Remove(b.Path) }
		if keep && b.Kind == Originals {
			remove = func() error { return s.fs.Rename(b.Path, b.Path+brokenSuffix) }
		}
		if err := remove(); err != nil {
			return fmt.Errorf("remove unfinished segment: %w", err)
		}
	}
	s.broken = nil
	return s.syncDir()
}

func openFile(fs vfs.FS, path string, readOnly bool) (*File, error) {
	open := func() (vfs.File, error) { return fs.OpenReadWrite(path, vfs.WriteCategoryUnspecified) }
	if readOnly {
		open = func() (vfs.File, error) { return fs.Open(path) }
	}
	vf, err := open()
	if err != nil {
		return nil, err
	}
	f, err := readFile(vf, path)
	if err != nil {
		return nil, errors.Join(err, vf.Close())
	}
	return f, nil
}

func readFile(vf vfs.File, path string) (*File, error) {
	b := make([]byte, headerUnit)
	if n, err := vf.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	} else {
		b = b[:n]
	}
	n, err := headerLen(b)
	if err != nil {
		return nil, err
	}
	if n > len(b) {
		b = make([]byte, n)
		if err := osfile.ReadFull(vf, b, 0, false); err != nil {
			return nil, err
		}
	}
	h, err := DecodeHeader(b)
	if err != nil {
		return nil, err
	}
	info, err := vf.Stat()
	if err != nil {
		return nil, err
	}
	f := &File{Header: h, Path: path, f: vf, start: int64(n)}
	if c := h.Compact; c.Pieces > 0 {
		f.Header.Compact = CompactHead{}
		f.compact, f.start = &contents{CompactHead: c, head: int64(n)}, c.Start
	}
	f.alloc.Store(info.Size())
	f.refs.Store(1)
	return f, nil
}

func (s *Set) add(f *File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.files[f.Number] = f
	s.mu.last = max(s.mu.last, f.Number)
	s.mu.size += f.alloc.Load()
}

// createTmp makes an empty file, if so many bytes are free that it leaves keep of them.
func (s *Set) createTmp(path string, size, keep int64) (vfs.File, error) {
	if u, err := s.fs.GetDiskUsage(s.dir); err == nil && u.AvailBytes < uint64(size+keep) {
		return nil, fmt.Errorf("%d bytes are needed, %d are free, and %d of these are kept in reserve: %w", size, u.AvailBytes, keep, syscall.ENOSPC)
	}
	vf, err := s.fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return nil, err
	}
	// Create gives a write-only view on some file systems: open it again.
	err = vf.Close()
	if err == nil {
		vf, err = s.fs.OpenReadWrite(path, vfs.WriteCategoryUnspecified)
	}
	if err != nil {
		return nil, errors.Join(err, s.fs.Remove(path))
	}
	return vf, nil
}

func (s *Set) nextNumber() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.last++
	return s.mu.last
}

// Files lists the set's files of one kind in the order they were begun. They can be
// read as long as nobody removes them.
func (s *Set) Files(k Kind) []*File {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.filesLocked(k)
}

// Hold is Files with a reference to each: they can be read until release is called.
func (s *Set) Hold(k Kind) (files []*File, release func()) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	files = s.filesLocked(k)
	for _, f := range files {
		f.refs.Add(1)
	}
	return files, func() {
		for _, f := range files {
			f.Release()
		}
	}
}

func (s *Set) filesLocked(k Kind) []*File {
	var files []*File
	for _, f := range s.mu.files {
		if f.Kind == k {
			files = append(files, f)
		}
	}
	slices.SortFunc(files, func(a, b *File) int { return cmp.Compare(a.Number, b.Number) })
	return files
}

// Size is what the set's files take up, in bytes.
func (s *Set) Size() int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.mu.size
}

// Acquire takes a reference to a file; Release gives it back.
func (s *Set) Acquire(number uint32) (*File, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	f, ok := s.mu.files[number]
	if !ok {
		return nil, fmt.Errorf("%w: number %d in %s", ErrGone, number, s.dir)
	}
	f.refs.Add(1)
	return f, nil
}

// Release gives back a reference.
func (f *File) Release() {
	if f.refs.Add(-1) == 0 {
		_ = f.f.Close() // nothing unsynced is left in a removed or closed file
	}
}

// Remove takes files out of the set and unlinks them. Readers that hold a
// reference can go on. It is durable when Remove returns.
func (s *Set) Remove(files ...*File) error {
	s.renaming.Lock()
	defer s.renaming.Unlock()
	for _, f := range files {
		if err := s.fs.Remove(f.Path); err != nil {
			return fmt.Errorf("remove segment: %w", err)
		}
		s.mu.Lock()
		delete(s.mu.files, f.Number)
		s.mu.size -= f.alloc.Load()
		s.mu.Unlock()
		f.Release()
	}
	return s.syncDir()
}

// shorten gives back what a file takes up behind n bytes.
func (s *Set) shorten(f *File, n int64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.compact != nil {
		return nil
	}
	if err := osfile.Truncate(f.f, n); err != nil {
		return fmt.Errorf("trim %s: %w", f.Path, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.size -= f.alloc.Swap(n) - n
	return nil
}

func (s *Set) syncDir() error {
	d, err := s.fs.OpenDir(s.dir)
	if err != nil {
		return fmt.Errorf("open segment directory: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}

// Sync makes every file of the set durable, names included. Recovery calls it
// before it believes what the page cache holds.
func (s *Set) Sync() error {
	for _, k := range []Kind{Log, Originals} {
		for _, f := range s.Files(k) {
			if err := f.syncAll(); err != nil {
				return err
			}
		}
	}
	return s.syncDir()
}

// Close gives up the set's references. No Writer may be in use.
func (s *Set) Close() {
	s.renaming.Lock() // another set may be of the directory from now on
	defer s.renaming.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.mu.files {
		f.Release()
	}
	s.mu.files = nil
}
