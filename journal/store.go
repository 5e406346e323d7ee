package journal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// The state directory:
//
//	LOCK               held by the process that has the store open
//	index/             the Pebble database
//	groups/NAME/*.seg  the segments of a group
//	groups/NAME/overlay  what a checkpoint saved of the overlays
const (
	lockName   = "LOCK"
	indexName  = "index"
	groupsName = "groups"
)

// DiskConfig names a disk of a group and where its bytes are.
type DiskConfig struct {
	Name    string
	Backing string // path of a raw file or block device, which exists
}

// GroupConfig names a group and its disks.
type GroupConfig struct {
	Name  string
	Disks []DiskConfig
	// Begin is what a group begins with that follows another daemon's and has no records yet; nil: a group that is
	// begun begins with LSN 1, and is this daemon's.
	Begin *record.Beginning
	// Retain says which points are kept, and Limit how large the group's segments may grow, bytes; 0: as Options say.
	Retain retain.Policy
	Limit  int64
	// Received says that its journal comes from another daemon's: without one it is not begun here. Open leaves it out then.
	Received bool
}

// Store is a daemon's state directory, open.
type Store struct {
	dir  string
	o    Options
	lock io.Closer
	ix   *index.DB

	// joining serialises what adds and removes groups.
	joining sync.Mutex
	nextID  uint32 // of the next new group; joining held, or Open's alone

	open struct {
		sync.Mutex
		groups []*Group // by name; not changed once others may see it
		count  atomic.Int64
		run    func(*Group) // begins a group's background work; nil while Run does not
	}
	claims struct {
		sync.Mutex
		disks map[osfile.ID]string // the disk that each backing is of
	}

	failed chan error // what the index can not go on after
}

// Open opens the state directory, or makes it, and the groups given. Groups
// that the directory has beyond those stay as they are. Every group is recovered:
// its head is what it was, its disks can be read and written at once,
// and what their backings lack is applied by Run.
func Open(dir string, groups []GroupConfig, o Options) (*Store, error) {
	if err := errors.Join(o.Validate(), validateGroups(groups)); err != nil {
		return nil, err
	}
	s := &Store{dir: dir, o: o.withDefaults(len(groups)), failed: make(chan error, 1)}
	s.claims.disks = map[osfile.ID]string{}
	if err := s.openAll(groups); err != nil {
		return nil, errors.Join(err, s.Abandon())
	}
	return s, nil
}

func validateGroups(groups []GroupConfig) error {
	var errs []error
	backings := map[string]string{}
	names := map[string]bool{}
	for _, gc := range groups {
		if err := record.CheckName(gc.Name); err != nil {
			errs = append(errs, fmt.Errorf("group: %w", err))
		}
		if names[gc.Name] {
			errs = append(errs, fmt.Errorf("group %s is given twice", gc.Name))
		}
		names[gc.Name] = true
		disks := map[string]bool{}
		for _, d := range gc.Disks {
			full := gc.Name + "/" + d.Name
			if err := record.CheckName(d.Name); err != nil {
				errs = append(errs, fmt.Errorf("disk of group %s: %w", gc.Name, err))
			}
			if disks[d.Name] {
				errs = append(errs, fmt.Errorf("disk %s is given twice", full))
			}
			if other, ok := backings[d.Backing]; ok {
				errs = append(errs, fmt.Errorf("disks %s and %s have one backing, %s", other, full, d.Backing))
			}
			disks[d.Name], backings[d.Backing] = true, full
		}
		if err := gc.Retain.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("retention of group %s: %w", gc.Name, err))
		}
		if gc.Begin != nil {
			if err := gc.Begin.Check(); err != nil {
				errs = append(errs, fmt.Errorf("beginning of group %s: %w", gc.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

func (s *Store) openAll(groups []GroupConfig) error {
	fs := s.o.FS
	if !s.o.ReadOnly {
		if err := fs.MkdirAll(fs.PathJoin(s.dir, groupsName), 0o700); err != nil {
			return fmt.Errorf("make the state directory: %w", err)
		}
		var err error
		if s.lock, err = fs.Lock(fs.PathJoin(s.dir, lockName)); err != nil {
			return fmt.Errorf("lock the state directory %s (is another tidemarkd using it?): %w", s.dir, err)
		}
	}
	var err error
	s.ix, err = index.Open(fs.PathJoin(s.dir, indexName), index.Options{
		FS: fs, Cache: s.o.IndexCache, ReadOnly: s.o.ReadOnly, Logger: pebbleLog{s},
	})
	if err != nil {
		return err
	}
	if !s.o.ReadOnly {
		if err := s.clearDiscarded(); err != nil {
			return err
		}
	}
	if s.nextID, err = s.nextGroupID(); err != nil {
		return err
	}
	s.open.count.Store(int64(len(groups)))
	if err := s.openGroups(groups); err != nil {
		return err
	}
	if s.o.ReadOnly {
		return nil
	}
	return syncDirs(fs, fs.PathDir(s.dir), s.dir, fs.PathJoin(s.dir, groupsName))
}

// openAtOnce is how many groups are opened at once: each waits for the disk most of the time.
const openAtOnce = 8

// openGroups opens groups, and lists them. Their directories' names are made durable later.
func (s *Store) openGroups(groups []GroupConfig) error {
	var eg errgroup.Group
	eg.SetLimit(openAtOnce)
	for i, gc := range groups {
		newID := s.nextID + uint32(i) // of one that is new
		eg.Go(func() error {
			g, err := s.openGroup(gc, newID)
			if gc.Received && errors.Is(err, ErrNotBegun) {
				s.releaseAll(gc)
				return nil
			}
			if err != nil {
				s.releaseAll(gc)
				return fmt.Errorf("open group %s: %w", gc.Name, err)
			}
			s.list(g)
			return nil
		})
	}
	err := eg.Wait()
	s.nextID += uint32(len(groups))
	return err
}

// addGroup opens a group beside those that are open, and lists it.
func (s *Store) addGroup(gc GroupConfig) (*Group, error) {
	g, err := s.openGroup(gc, s.nextID)
	if err == nil {
		if err = s.syncGroups(); err != nil {
			err = errors.Join(err, g.closeFiles())
		}
	}
	if err != nil {
		s.releaseAll(gc)
		return nil, fmt.Errorf("open group %s: %w", gc.Name, err)
	}
	if g.id == s.nextID {
		s.nextID++
	}
	s.list(g)
	return g, nil
}

func (s *Store) list(g *Group) {
	s.open.Lock()
	defer s.open.Unlock()
	s.setGroupsLocked(append(slices.Clone(s.open.groups), g))
}

// releaseAll takes back the claims of a group's disks.
func (s *Store) releaseAll(gc GroupConfig) {
	for _, d := range gc.Disks {
		s.release(gc.Name + "/" + d.Name)
	}
}

// syncGroups makes the names of the groups' directories durable.
func (s *Store) syncGroups() error {
	if s.o.ReadOnly {
		return nil
	}
	return syncDirs(s.o.FS, s.o.FS.PathJoin(s.dir, groupsName))
}

func (s *Store) setGroupsLocked(groups []*Group) {
	slices.SortFunc(groups, func(a, b *Group) int { return cmp.Compare(a.name, b.name) })
	s.open.groups = groups
	s.open.count.Store(int64(len(groups)))
}

// AddGroup opens or makes a group beside those that are open.
func (s *Store) AddGroup(gc GroupConfig) error {
	if err := validateGroups([]GroupConfig{gc}); err != nil {
		return err
	}
	s.joining.Lock()
	defer s.joining.Unlock()
	if _, err := s.Group(gc.Name); err == nil {
		return fmt.Errorf("group %s is open already", gc.Name)
	}
	g, err := s.addGroup(gc)
	if err != nil {
		return err
	}
	s.runGroup(g)
	return nil
}

// runGroup begins a group's background work, if Run is under way.
func (s *Store) runGroup(g *Group) {
	s.open.Lock()
	defer s.open.Unlock()
	if s.open.run != nil {
		s.open.run(g)
	}
}

// RemoveGroup applies and closes a group. Its journal stays where it is. ErrInUse while anybody
// has a disk of it open.
func (s *Store) RemoveGroup(name string) (err error) {
	s.joining.Lock()
	defer s.joining.Unlock()
	g, err := s.Group(name)
	if err != nil {
		return err
	}
	g.joining.Lock()
	defer g.joining.Unlock()
	var left []*disk.Disk
	defer func() {
		if err != nil {
			g.setClosed(nil)
			g.stay(left)
			s.runGroup(g)
		}
	}()
	for _, d := range g.Disks() {
		if err := g.leave(d); err != nil {
			return err
		}
		left = append(left, d)
	}
	// From here on nothing moves the head: not a marker, not an expiry.
	g.stopLoops()
	g.setClosed(fmt.Errorf("group %q: %w: it was removed", name, ErrNotFound))
	if err := g.settle(); err != nil {
		return fmt.Errorf("close group %s: %w", name, err)
	}
	s.open.Lock()
	s.setGroupsLocked(slices.DeleteFunc(slices.Clone(s.open.groups), func(o *Group) bool { return o == g }))
	s.open.Unlock()
	for _, d := range left {
		s.release(g.name + "/" + d.Name)
	}
	return g.closeFiles()
}

// claim notes that an open backing is a disk's: under whatever paths, it can be one disk's only.
func (s *Store) claim(f vfs.File, disk string) error {
	id, ok, err := osfile.Identify(f)
	if err != nil || !ok {
		return err
	}
	s.claims.Lock()
	defer s.claims.Unlock()
	if other, taken := s.claims.disks[id]; taken {
		return fmt.Errorf("it is the backing of disk %s too", other)
	}
	s.claims.disks[id] = disk
	return nil
}

// Claim keeps a file from being any disk's backing until release.
func (s *Store) Claim(path, owner string) (release func(), err error) {
	id, err := osfile.IdentifyPath(path)
	if err != nil {
		return nil, err
	}
	s.claims.Lock()
	defer s.claims.Unlock()
	if other, taken := s.claims.disks[id]; taken {
		return nil, fmt.Errorf("it is the backing of disk %s: %w", other, ErrInUse)
	}
	s.claims.disks[id] = owner
	return func() { s.release(owner) }, nil
}

// Discard removes the journal of a group that is not open, for good.
func (s *Store) Discard(name string) error {
	s.joining.Lock()
	defer s.joining.Unlock()
	if _, err := s.Group(name); err == nil {
		return fmt.Errorf("discard the journal of group %s: it is open: %w", name, ErrInUse)
	}
	if err := record.CheckName(name); err != nil {
		return err
	}
	// First under a name that is no group's: what a crash leaves of it is nothing.
	fs := s.o.FS
	gone := fs.PathJoin(s.dir, groupsName, discarded+name)
	err := fs.Rename(fs.PathJoin(s.dir, groupsName, name), gone)
	if err == nil {
		err = s.syncGroups()
	}
	if err == nil {
		err = s.clear(gone)
	}
	if err != nil {
		return fmt.Errorf("discard the journal of group %s: %w", name, err)
	}
	return s.syncGroups()
}

// clear removes what the index has of a group whose journal was discarded, then the journal.
func (s *Store) clear(dir string) error {
	fs := s.o.FS
	id, err := segment.GroupOf(fs, dir)
	if err != nil {
		return err
	}
	ids, err := s.groupIDs()
	if err != nil {
		return err
	}
	if id != 0 && !slices.Contains(ids, id) { // a copy of a group's directory has its number
		g, err := s.ix.Group(id)
		if err != nil {
			return err
		}
		if err := errors.Join(g.DeleteAll(), s.ix.Flush()); err != nil {
			return err
		}
	}
	return fs.RemoveAll(dir)
}

// groupIDs are the numbers of the groups in the directory, be they open or not.
func (s *Store) groupIDs() (ids []uint32, err error) {
	fs := s.o.FS
	dir := fs.PathJoin(s.dir, groupsName)
	names, err := fs.List(dir)
	if err != nil {
		return nil, fmt.Errorf("list groups: %w", err)
	}
	for _, name := range names {
		if strings.HasPrefix(name, discarded) {
			continue
		}
		id, err := segment.GroupOf(fs, fs.PathJoin(dir, name))
		if err != nil {
			return nil, fmt.Errorf("group %s: %w", name, err)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// discarded begins the names of directories that a Discard has not removed yet.
const discarded = ".discarded-"

// clearDiscarded removes what discards have left.
func (s *Store) clearDiscarded() error {
	fs := s.o.FS
	dir := fs.PathJoin(s.dir, groupsName)
	names, err := fs.List(dir)
	if err != nil {
		return fmt.Errorf("list groups: %w", err)
	}
	for _, name := range names {
		if strings.HasPrefix(name, discarded) {
			if err := s.clear(fs.PathJoin(dir, name)); err != nil {
				return fmt.Errorf("remove what was discarded: %w", err)
			}
		}
	}
	return nil
}

// Has reports whether the state directory has a group's journal, be it open or not.
func (s *Store) Has(group string) bool {
	names, err := s.o.FS.List(s.o.FS.PathJoin(s.dir, groupsName, group))
	return err == nil && slices.ContainsFunc(names, func(name string) bool { return strings.HasSuffix(name, ".seg") })
}

// release takes a claim back.
func (s *Store) release(disk string) {
	s.claims.Lock()
	defer s.claims.Unlock()
	maps.DeleteFunc(s.claims.disks, func(_ osfile.ID, owner string) bool { return owner == disk })
}

// syncDirs makes the names in directories durable.
func syncDirs(fs vfs.FS, paths ...string) error {
	for _, path := range paths {
		d, err := fs.OpenDir(path)
		if err != nil {
			return err
		}
		if err := errors.Join(d.Sync(), d.Close()); err != nil {
			return fmt.Errorf("sync directory %s: %w", path, err)
		}
	}
	return nil
}

// nextGroupID is one more than the numbers of all groups in the directory, and of
// those that the index still has versions of though their segments are gone.
func (s *Store) nextGroupID() (uint32, error) {
	last, err := s.ix.LastGroup()
	if err != nil {
		return 0, err
	}
	ids, err := s.groupIDs()
	if err != nil {
		return 0, err
	}
	next := last + 1
	for _, id := range ids {
		next = max(next, id+1)
	}
	return next, nil
}

// Groups are the open groups by name. The slice must not be changed.
func (s *Store) Groups() []*Group {
	s.open.Lock()
	defer s.open.Unlock()
	return s.open.groups
}

// Group finds an open group by name.
func (s *Store) Group(name string) (*Group, error) {
	for _, g := range s.Groups() {
		if g.name == name {
			return g, nil
		}
	}
	return nil, fmt.Errorf("group %q: %w", name, ErrNotFound)
}

// KeepFree is how much of the state directory's file system others must leave free, in bytes: with less, the journal
// takes no more writes.
func (s *Store) KeepFree() int64 { return s.o.keepLog() }

// IndexBytes is what the index takes up.
func (s *Store) IndexBytes() int64 { return s.ix.Size() }

// Run does the groups' background work until ctx ends: it syncs, indexes, applies,
// checkpoints, expires, cleans, and makes segments compact. It returns an error only when the index can not
// go on: the process must then end, without a Close. A group that fails says so itself.
func (s *Store) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s.open.Lock()
	s.open.run = func(g *Group) { g.startLoops(ctx) }
	for _, g := range s.open.groups {
		s.open.run(g)
	}
	s.open.Unlock()
	var compaction sync.WaitGroup
	if s.o.CompactPace != nil {
		compaction.Go(func() { s.runCompaction(ctx) })
	}
	select {
	case <-ctx.Done():
		compaction.Wait()
		s.open.Lock()
		s.open.run = nil
		s.open.Unlock()
		for _, g := range s.Groups() {
			g.stopLoops()
		}
		return nil
	case err := <-s.failed:
		return err // the loops may hang in the index for ever
	}
}

const (
	// catchUpRounds bounds the rounds of CatchUp: a guest may write faster than they go.
	catchUpRounds = 3
	// caughtUp is how little is left for Close to apply, in bytes of records.
	caughtUp = 64 << 20
)

// CatchUp applies what is journaled while everything else goes on, so that a Close
// soon after finds little to do. Errors are the groups' state.
func (s *Store) CatchUp() {
	var wg sync.WaitGroup
	for _, g := range s.Groups() {
		wg.Go(func() {
			for n := 0; n < catchUpRounds && g.unapplied.Load() > caughtUp; n++ {
				if err := g.Apply(); err != nil {
					g.log.Warn("apply", zap.Error(err))
					return
				}
			}
		})
	}
	wg.Wait()
}

// Close applies and checkpoints every group and closes the store. Nothing else
// may be in use. Backings then are what a guest would find without Tidemark.
func (s *Store) Close() error {
	var errs []error
	for _, g := range s.Groups() {
		if err := g.settle(); err != nil {
			errs = append(errs, fmt.Errorf("close group %s: %w", g.name, err))
		}
	}
	return errors.Join(append(errs, s.Abandon())...)
}

// Abandon closes the store's files and nothing else, as a crash would: the next
// Open recovers. What the index has not flushed is lost, as it would be.
func (s *Store) Abandon() error {
	var errs []error
	for _, g := range s.Groups() {
		errs = append(errs, g.closeFiles())
	}
	s.open.Lock()
	s.setGroupsLocked(nil)
	s.open.Unlock()
	if s.ix != nil {
		errs = append(errs, s.ix.Close())
		s.ix = nil
	}
	if s.lock != nil {
		errs = append(errs, s.lock.Close())
		s.lock = nil
	}
	return errors.Join(errs...)
}

// indexErrorPause is how long the index waits after an error before it goes on.
const indexErrorPause = 250 * time.Millisecond

// pebbleLog passes Pebble's messages on. Pebble calls Fatalf when it can not
// go on and does not expect it to return: the daemon is told, the
// goroutine ends here.
type pebbleLog struct{ s *Store }

func (l pebbleLog) Infof(format string, args ...any) {
	l.s.o.Log.Debug("index", zap.String("event", fmt.Sprintf(format, args...)))
}

func (l pebbleLog) Errorf(format string, args ...any) {
	l.s.o.Log.Error("index", zap.String("event", fmt.Sprintf(format, args...)))
	// Pebble tries a flush that failed again at once, and for ever.
	time.Sleep(indexErrorPause)
}

func (l pebbleLog) Fatalf(format string, args ...any) {
	err := fmt.Errorf("%w: %s", ErrIndex, fmt.Sprintf(format, args...))
	select {
	case l.s.failed <- err:
	default:
	}
	select {} // until the process ends
}
