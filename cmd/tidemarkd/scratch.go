package main

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/nbd"
	"github.com/tidemark-cdp/tidemark/restore/export"
)

const (
	// onceGrace is how long a scratch export that is to go with its last client waits for the next one.
	onceGrace = time.Minute
	// onceFirst is how long it waits for the first.
	onceFirst = 10 * time.Minute
	// onceTick is how often it is looked for such.
	onceTick = 5 * time.Second

	scratchPrefix   = "scratch/"
	scratchNoteName = "scratch.json"
)

// cutScratch reads scratch/NAME/DISK.
func cutScratch(export string) (name, disk string, ok bool) {
	rest, ok := strings.CutPrefix(export, scratchPrefix)
	if !ok {
		return "", "", false
	}
	return strings.Cut(rest, "/")
}

// scratches are disks of the past that can be written. Each is a directory with a note, and for each disk an overlay.
// They outlive the daemon, and hold the history that they stand on.
type scratches struct {
	dir     string
	store   *journal.Store
	exports *exports
	reserve int64 // bytes that overlays leave free
	log     *zap.Logger

	adopt adopter // of what is promoted

	work     context.Context // of fills; ends with stop
	stopWork context.CancelFunc
	wg       sync.WaitGroup

	making sync.Mutex // one is made or removed at a time
	mu     sync.Mutex // guards what follows
	all    map[string]*scratch
}

// scratch is one of them.
type scratch struct {
	s     *scratches
	name  string
	dir   string
	fresh bool // its files are to be made

	mu      sync.Mutex // guards what follows; taken before a disk's
	note    scratchNote
	disks   map[string]*scratchDisk // empty: it could not be opened
	why     error                   // if it could not be
	clients int
	idle    time.Time // since when nobody has it open
	gone    bool      // it was thrown away
	fill    filling

	claims []func() // that are held of the backings to be; making, or the fill's alone
}

type scratchNote struct {
	Version int        `json:"version"`
	Name    string     `json:"name"`
	Group   string     `json:"group"`
	Point   string     `json:"point"` // as it was asked for
	LSN     uint64     `json:"lsn"`
	Reign   string     `json:"reign,omitempty"` // id of the reign of the LSN: an LSN of another is another point
	Disks   []string   `json:"disks"`
	Created time.Time  `json:"created"`
	Once    bool       `json:"once"`
	Promote *promotion `json:"promote,omitempty"`
	// Branch says what it was made of, if that was what a group left when it was rewound.
	Branch *api.Branch `json:"branch,omitempty"`
}

const scratchNoteVersion = 1

// scratchDisk is what clients have open: what is behind it changes when it is promoted.
type scratchDisk struct {
	size int64
	mu   sync.RWMutex // held for reading by each request; for writing while dev changes
	dev  nbd.Device
	// What dev is made of, to be closed from the top.
	view *journal.View
	over *export.Overlay // on the view
	full *export.Overlay // on over: the backing to be
}

func newScratches(stateDir string, store *journal.Store, e *exports, reserve int64, log *zap.Logger) (*scratches, error) {
	s := &scratches{dir: filepath.Join(stateDir, "scratch"), store: store, exports: e, reserve: reserve, log: log, all: map[string]*scratch{}}
	s.work, s.stopWork = context.WithCancel(context.Background())
	if err := mkdirDurable(s.dir); err != nil {
		return nil, fmt.Errorf("scratch exports: %w", err)
	}
	e.scratches = s
	return s, nil
}

// load opens what earlier runs left, before the journal forgets anything. What can not be opened is told in the status.
func (s *scratches) load() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("scratch exports: %w", err)
	}
	for _, entry := range entries {
		one := &scratch{s: s, name: entry.Name(), dir: filepath.Join(s.dir, entry.Name()), idle: time.Now()}
		err := readNote(filepath.Join(one.dir, scratchNoteName), &one.note)
		if errors.Is(err, fs.ErrNotExist) {
			// It was never finished, or was being removed.
			if err := os.RemoveAll(one.dir); err != nil {
				return fmt.Errorf("scratch exports: %w", err)
			}
			continue
		}
		if err == nil && (one.note.Version != scratchNoteVersion || one.note.Name != one.name) {
			err = fmt.Errorf("its note is of %q and version %d", one.note.Name, one.note.Version)
		}
		if err == nil {
			err = one.open()
		}
		if err != nil {
			one.why = err
			s.log.Error("scratch export can not be opened", zap.String("scratch", one.name), zap.Error(err))
		}
		s.all[one.name] = one
	}
	return nil
}

// start goes on with what is being promoted. It is called once, when the journal's work goes on.
func (s *scratches) start() {
	s.mu.Lock()
	all := s.sortedLocked()
	s.mu.Unlock()
	for _, one := range all {
		one.mu.Lock()
		if p := one.note.Promote; p != nil && !p.Done && one.why == nil {
			one.beginFillLocked()
		}
		one.mu.Unlock()
	}
}

// stop closes everything; nobody is served any more.
func (s *scratches) stop() error {
	s.stopWork()
	s.wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, one := range s.all {
		errs = append(errs, one.close())
	}
	return errors.Join(errs...)
}

func (s *scratches) sortedLocked() (all []*scratch) {
	for _, one := range s.all {
		all = append(all, one)
	}
	slices.SortFunc(all, func(a, b *scratch) int { return cmp.Compare(a.name, b.name) })
	return all
}

// list names what clients can open.
func (s *scratches) list() (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, one := range s.sortedLocked() {
		for _, disk := range one.note.Disks {
			names = append(names, scratchPrefix+one.name+"/"+disk)
		}
	}
	return names
}

func (s *scratches) get(name string) (*scratch, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if one := s.all[name]; one != nil {
		return one, nil
	}
	return nil, fmt.Errorf("scratch export %q: %w", name, journal.ErrNotFound)
}

// create makes a scratch export of a group's disks, or one of them, as of a point.
func (s *scratches) create(req api.ScratchRequest) (*scratch, error) {
	p, err := record.ParsePoint(req.Point)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	g, err := s.store.Group(req.Group)
	if err != nil {
		return nil, err
	}
	s.making.Lock()
	defer s.making.Unlock()
	name, err := s.free(req.Name, req.Group)
	if err != nil {
		return nil, err
	}
	lsn, err := g.Resolve(p)
	if err != nil {
		return nil, err
	}
	disks := []string{req.Disk}
	if req.Disk == "" {
		if disks, _, err = disksAt(g, lsn); err != nil {
			return nil, err
		}
	}
	one := &scratch{s: s, name: name, dir: filepath.Join(s.dir, name), fresh: true, idle: time.Now(), note: scratchNote{
		Version: scratchNoteVersion, Name: name, Group: g.Name(), Point: p.String(), LSN: uint64(lsn), Reign: reignAt(g, lsn), Disks: disks, Created: time.Now().UTC(), Once: req.Once,
	}}
	if err := one.make(func() error { return nil }); err != nil {
		return nil, errors.Join(fmt.Errorf("scratch export %s: %w", name, err), one.close(), os.RemoveAll(one.dir))
	}
	s.mu.Lock()
	s.all[name] = one
	s.mu.Unlock()
	s.log.Info("scratch export", zap.String("scratch", name), zap.String("group", g.Name()), zap.Uint64("lsn", uint64(lsn)), zap.Strings("disks", disks))
	return one, nil
}

// reignAt is the id of the reign that an LSN of a group is of.
func reignAt(g *journal.Group, lsn record.LSN) string {
	reigns := g.Reigns()
	r := reigns[0]
	for _, o := range reigns[1:] {
		if o.First <= lsn {
			r = o
		}
	}
	return hex.EncodeToString(r.ID[:])
}

// free is a name that no scratch export has: the one that is asked for, or one made of the group's.
func (s *scratches) free(name, group string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if name == "" {
		for n := 1; ; n++ {
			if name = fmt.Sprintf("%.50s-%d", group, n); s.all[name] == nil {
				return name, nil
			}
		}
	}
	if err := record.CheckName(name); err != nil {
		return "", fmt.Errorf("%w: %w", errBadRequest, err)
	}
	if s.all[name] != nil {
		return "", fmt.Errorf("scratch export %s: %w: choose another name", name, journal.ErrInUse)
	}
	return name, nil
}

// make makes the files of a new scratch export, and what fill writes to it; the note comes last.
func (one *scratch) make(fill func() error) error {
	if err := os.RemoveAll(one.dir); err != nil {
		return err
	}
	if err := os.Mkdir(one.dir, 0o700); err != nil {
		return err
	}
	if err := one.open(); err != nil {
		return err
	}
	one.fresh = false
	if err := fill(); err != nil {
		return err
	}
	if err := one.writeNoteLocked(); err != nil {
		return err
	}
	return syncDir(one.s.dir)
}

// open opens the views and overlays of a scratch export.
func (one *scratch) open() error {
	disks := map[string]*scratchDisk{}
	one.disks = disks
	if p := one.note.Promote; p != nil && (p.Done || one.s.promoted(p)) {
		// Its names lead to the group's disks.
		if !p.Done {
			p.Done = true
			if err := one.writeNoteLocked(); err != nil {
				p.Done = false
				return err
			}
		}
		return one.removeFiles()
	}
	g, err := one.s.store.Group(one.note.Group)
	if err != nil {
		return err
	}
	if now := reignAt(g, record.LSN(one.note.LSN)); one.note.Reign != "" && now != one.note.Reign {
		return fmt.Errorf("LSN %d of group %s is of another history than it was made on", one.note.LSN, one.note.Group)
	}
	for _, name := range one.note.Disks {
		d := &scratchDisk{}
		disks[name] = d
		if err := one.openDisk(g, name, d); err != nil {
			return errors.Join(err, one.closeDisks())
		}
	}
	if p := one.note.Promote; p != nil {
		if err := one.claim(p); err != nil {
			return errors.Join(err, one.closeDisks())
		}
	}
	return nil
}

func (one *scratch) closeDisks() error {
	var errs []error
	for _, d := range one.disks {
		errs = append(errs, d.close())
	}
	one.disks = nil
	return errors.Join(errs...)
}

// writeNoteLocked makes what the note says durable. one.mu is held, or nobody else has it yet.
func (one *scratch) writeNoteLocked() error {
	return writeNote(filepath.Join(one.dir, scratchNoteName), one.note)
}

func (one *scratch) openDisk(g *journal.Group, name string, d *scratchDisk) error {
	jd, err := g.Disk(name)
	if err != nil {
		return err
	}
	if d.view, err = g.View(jd, record.LSN(one.note.LSN)); err != nil {
		return err
	}
	d.size = d.view.Size()
	maps := filepath.Join(one.dir, name)
	open := export.Open
	if one.fresh {
		open = export.Create
	}
	if d.over, err = open(maps+".raw", maps, &past{v: d.view}, export.Options{Reserve: one.s.reserve}); err != nil {
		return err
	}
	d.dev = d.over
	if p := one.note.Promote; p != nil {
		return d.openFull(p.Backings[name], one.promoteMaps(name), one.s.reserveIn(filepath.Dir(p.Backings[name])))
	}
	return nil
}

// close closes from the top what a disk is made of.
func (d *scratchDisk) close() error {
	var errs []error
	for _, o := range []*export.Overlay{d.full, d.over} {
		if o != nil {
			errs = append(errs, o.Flush(), o.Close())
		}
	}
	if d.view != nil {
		d.view.Close()
	}
	if d.over == nil && d.full == nil && d.dev != nil {
		errs = append(errs, d.dev.Close())
	}
	d.full, d.over, d.view, d.dev = nil, nil, nil, nil
	return errors.Join(errs...)
}

func (one *scratch) close() error {
	one.mu.Lock()
	defer one.mu.Unlock()
	var errs []error
	for _, d := range one.disks {
		d.mu.Lock()
		errs = append(errs, d.close())
		d.mu.Unlock()
	}
	one.disks = nil
	one.unclaim()
	return errors.Join(errs...)
}

// open finds a disk of a scratch export, for a client.
func (s *scratches) open(name, disk string) (nbd.Device, error) {
	one, err := s.get(name)
	if err != nil {
		return nil, err
	}
	one.mu.Lock()
	defer one.mu.Unlock()
	if one.gone {
		return nil, fmt.Errorf("scratch export %q: %w", name, journal.ErrNotFound)
	}
	if errors.Is(one.why, errSuspended) {
		return nil, fmt.Errorf("scratch export %s: %w: %w", name, journal.ErrInUse, one.why)
	}
	if one.why != nil {
		// What it stands on may be configured again.
		if err := one.open(); err != nil {
			one.why = err
			return nil, fmt.Errorf("scratch export %s: %w", name, err)
		}
		one.why = nil
		if p := one.note.Promote; p != nil && !p.Done {
			one.beginFillLocked()
		}
	}
	if p := one.note.Promote; p != nil && p.Done && slices.Contains(one.note.Disks, disk) {
		return s.exports.openLive(p.Group, disk)
	}
	d := one.disks[disk]
	if d == nil {
		return nil, fmt.Errorf("disk %q of scratch export %s: %w", disk, name, journal.ErrNotFound)
	}
	one.clients++
	return &scratchClient{one: one, d: d}, nil
}

// remove throws a scratch export away. Its clients are in the way, or, with cut, get errors from then on. With onlyIdle it
// goes only if its time has come.
func (s *scratches) remove(name string, cut, onlyIdle bool) error {
	s.making.Lock()
	defer s.making.Unlock()
	one, err := s.get(name)
	if err != nil {
		return err
	}
	one.mu.Lock()
	promoted := one.note.Promote != nil && one.note.Promote.Done
	switch {
	case one.fill.running:
		err = fmt.Errorf("scratch export %s: %w: it is being promoted", name, journal.ErrInUse)
	case one.clients > 0 && !cut:
		err = fmt.Errorf("scratch export %s: %w by %d clients: stop the guest first (--force cuts them off)", name, journal.ErrInUse, one.clients)
	case one.clients > 0 && promoted:
		err = fmt.Errorf("scratch export %s: %w by %d clients, and is group %s: have them open that", name, journal.ErrInUse, one.clients, one.note.Promote.Group)
	}
	if err == nil && onlyIdle && !one.abandonedLocked() {
		err = fmt.Errorf("scratch export %s: %w", name, journal.ErrInUse)
	}
	var backings []string // of a promotion that broke off. Those that are not claimed may be another's
	if p := one.note.Promote; p != nil && !p.Done && len(one.claims) > 0 {
		backings = slices.Collect(maps.Values(p.Backings))
	}
	if err == nil {
		one.gone = true
		s.mu.Lock()
		delete(s.all, name)
		s.mu.Unlock()
	}
	one.mu.Unlock()
	if err != nil {
		return err
	}
	err = errors.Join(one.close(), one.discard())
	for _, path := range backings {
		err = errors.Join(err, os.Remove(path))
	}
	if err != nil {
		return fmt.Errorf("remove scratch export %s: %w", name, err)
	}
	s.log.Info("scratch export is gone", zap.String("scratch", name))
	return nil
}

// discard removes the files, the note first: without it the rest is of no use.
func (one *scratch) discard() error {
	err := os.Remove(filepath.Join(one.dir, scratchNoteName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(one.dir)
}

// janitor throws away what was to go with its last client.
func (s *scratches) janitor(ctx context.Context) error {
	t := time.NewTicker(onceTick)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		s.mu.Lock()
		all := s.sortedLocked()
		s.mu.Unlock()
		for _, one := range all {
			if !one.abandoned() {
				continue
			}
			if err := s.remove(one.name, false, true); err != nil && !errors.Is(err, journal.ErrInUse) {
				s.log.Error("scratch export", zap.Error(err))
			}
		}
	}
}

func (one *scratch) abandoned() bool {
	one.mu.Lock()
	defer one.mu.Unlock()
	return one.abandonedLocked()
}

func (one *scratch) abandonedLocked() bool {
	grace := onceGrace
	if one.idle.Before(one.note.Created.Add(time.Second)) {
		grace = onceFirst
	}
	return one.note.Once && one.note.Promote == nil && one.clients == 0 && time.Since(one.idle) > grace
}

// status is what the API tells of the scratch exports.
func (s *scratches) status() []api.Scratch {
	s.mu.Lock()
	all := s.sortedLocked()
	s.mu.Unlock()
	list := []api.Scratch{}
	for _, one := range all {
		list = append(list, one.status())
	}
	return list
}

func (one *scratch) status() api.Scratch {
	one.mu.Lock()
	defer one.mu.Unlock()
	n := one.note
	a := api.Scratch{Name: one.name, Group: n.Group, Point: n.Point, LSN: n.LSN, Created: n.Created, Once: n.Once, Clients: one.clients, Disks: []api.ScratchDisk{}}
	for _, name := range n.Disks {
		a.Disks = append(a.Disks, one.diskStatus(name))
	}
	if one.why != nil {
		a.Error = one.why.Error()
	}
	a.Branch = n.Branch
	if p := n.Promote; p != nil {
		a.Promotion = &api.Promotion{Group: p.Group, Done: p.Done, Filled: one.fill.done}
		if one.fill.why != nil {
			a.Promotion.Error = one.fill.why.Error()
		}
	}
	return a
}

func (one *scratch) diskStatus(name string) api.ScratchDisk {
	a := api.ScratchDisk{Name: name, Export: scratchPrefix + one.name + "/" + name}
	if d := one.disks[name]; d != nil {
		d.mu.RLock()
		defer d.mu.RUnlock()
		a.Size = d.size
		if d.over != nil {
			a.Written = d.over.Written()
		}
	}
	return a
}

func (c *control) scratch(r *http.Request) (any, error) {
	var req api.ScratchRequest
	if err := decode(r, &req); err != nil {
		return nil, err
	}
	one, err := c.exports.scratches.create(req)
	if err != nil {
		return nil, err
	}
	return one.status(), nil
}

func (c *control) promote(r *http.Request) (any, error) {
	var req api.PromoteRequest
	if err := decode(r, &req); err != nil {
		return nil, err
	}
	var one *scratch
	err := c.attached.whileDetached(r.PathValue("name"), func() (err error) {
		one, err = c.exports.scratches.promote(r.PathValue("name"), req)
		return err
	})
	if err != nil {
		return nil, err
	}
	return one.status(), nil
}

func (c *control) unexport(r *http.Request) (any, error) {
	one, err := c.exports.scratches.get(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	was := one.status()
	return was, c.exports.scratches.remove(one.name, r.URL.Query().Get("force") == "true", false)
}
