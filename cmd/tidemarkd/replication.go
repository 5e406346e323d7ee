package main

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/build"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/link"
)

// replication ships groups to other daemons, and takes those of others.
type replication struct {
	conf     config.Replication
	store    *journal.Store
	exports  *exports
	reloader *reloader
	e        *link.Endpoint
	dir      string // of keys, peers and notes
	log      *zap.Logger

	mu     sync.Mutex // guards what follows
	groups map[string]*replicated
	ctx    context.Context // of what runs; nil while nothing does
	wg     sync.WaitGroup

	kick chan struct{} // of one slot: look at what is to be shipped to whom
}

// replicated is what is known of a group beside its journal: one that is shipped, that comes, or that came once.
type replicated struct {
	r    *replication
	name string
	log  *zap.Logger

	// changing serialises what changes who writes the group, or whether it is here.
	changing  sync.Mutex
	unrewound bool // the last rewind failed, or history does not go back that far; guarded by changing

	mu    sync.Mutex // guards what follows
	note  groupNote
	ships map[string]*shipping // by peer
	comes *receiving           // nil: nobody sends it
	// barred keeps offers out while who writes the group is being changed here.
	barred   int
	users    int // who hold it though nothing is known of the group; guarded by the replication's mu
	consents consent
	asks     chan struct{} // closed when the writer is to be asked for the group
	why      error         // the last stream on which it came has ended
	stuck    place         // the record behind it could not be taken; the next one says so again, after a restart
}

// place is how far a group had come, in whose reign.
type place struct {
	head  record.LSN
	reign record.Reign
}

func placeOf(l replica.Local) place { return place{l.Head, l.Reigns[len(l.Reigns)-1]} }

// consent is what who runs this daemon allows to be dropped of a group, once, of what this daemon did not write itself.
type consent int

const (
	consentNone consent = iota
	consentDrop         // what its writer can not have it keep of what others wrote
	consentAnew         // all of it, when its writer offers it next
)

func newReplication(c config.Config, storeID string, store *journal.Store, x *exports, re *reloader, log *zap.Logger) (*replication, error) {
	r := &replication{conf: c.Replication, store: store, exports: x, reloader: re, dir: filepath.Join(c.StateDir, "replication"), log: log, groups: map[string]*replicated{}, kick: make(chan struct{}, 1)}
	if err := mkdirDurable(filepath.Join(r.dir, "groups")); err != nil {
		return nil, fmt.Errorf("replication: %w", err)
	}
	e := &link.Endpoint{Name: c.Replication.Name, Build: build.Version(), Log: log, Offered: r.offered, Asked: r.asked, Reserved: r.reserved,
		MaxConns: c.Replication.MostGroups + spareConns}
	copy(e.Node[:], storeID)
	var err error
	if c.Replication.Cert != "" {
		e.Identity, err = link.ReadIdentity(c.Replication.Cert, c.Replication.Key)
	} else {
		e.Identity, err = link.LoadIdentity(r.dir, c.Replication.Name, writeDurable)
	}
	if err != nil {
		return nil, fmt.Errorf("replication: %w", err)
	}
	roots, err := c.Replication.Roots()
	if err != nil {
		return nil, err
	}
	var given []link.Peer
	for _, name := range slices.Sorted(maps.Keys(c.Replication.Peers)) {
		p := c.Replication.Peers[name]
		one := link.Peer{Name: name, Address: p.Address, MaySend: p.MaySend}
		if p.Fingerprint != "" {
			if err := one.Fingerprint.UnmarshalText([]byte(p.Fingerprint)); err != nil {
				return nil, fmt.Errorf("replication.peers.%s: %w", name, err)
			}
		}
		given = append(given, one)
	}
	if e.Peers, err = link.LoadPeers(filepath.Join(r.dir, "peers.json"), given, roots, writeDurable); err != nil {
		return nil, fmt.Errorf("replication: %w", err)
	}
	e.Limit = newPace(&r.conf)
	e.Init()
	r.e = e
	if err := r.loadNotes(); err != nil {
		return nil, err
	}
	if err := r.fence(); err != nil {
		return nil, err
	}
	re.keepers.metrics.registry.MustRegister(replicaCollector{r})
	return r, nil
}

// spareConns are those that a peer may have beside the ones on which groups are shipped.
const spareConns = 64

// group finds what is known of a group, or begins to.
func (r *replication) group(name string) *replicated {
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.groups[name]
	if one == nil {
		one = &replicated{r: r, name: name, log: r.log.With(zap.String("group", name)), ships: map[string]*shipping{}, asks: make(chan struct{})}
		one.note.Version = groupNoteVersion
		r.groups[name] = one
	}
	return one
}

// journal is the group's, nil if there is none here that is open.
func (one *replicated) journal() *journal.Group {
	g, err := one.r.store.Group(one.name)
	if err != nil {
		return nil
	}
	return g
}

// local is what this daemon has of the group, durably, and its journal; nil if it has none.
func (one *replicated) local() (*journal.Group, replica.Local, error) {
	l := replica.Local{Seen: one.seen()}
	g := one.journal()
	if g == nil && one.r.store.Has(one.name) {
		return nil, l, fmt.Errorf("group %s has a journal here and is not open: configure it again, or remove its journal", one.name)
	}
	if g == nil {
		return nil, l, nil
	}
	if state, why := g.State(); state == "failed" {
		return nil, l, why
	}
	if err := g.Sync(); err != nil {
		return nil, l, err
	}
	l.Known, l.Leads, l.Head, l.Horizon, l.Reigns, l.Disks = true, !g.Follows(), g.Durable(), g.Horizon(), g.Reigns(), g.Table()
	after, open := g.Bridging()
	if open {
		l.Head = after
	}
	l.Stuck = open || one.isStuck(placeOf(l))
	var err error
	l.Digest, err = g.Digest(l.Head)
	return g, l, err
}

// still is an error if the group is another than when a stream began: closed, or this daemon's. one.changing is held.
func (one *replicated) still(g *journal.Group) error {
	now := one.journal()
	if now != g || g != nil && !g.Follows() || g == nil && one.r.store.Has(one.name) {
		return fmt.Errorf("group %s is not what it was here when it was offered", one.name)
	}
	return nil
}

// fence has groups follow of which this daemon was told that another one writes them, and which it led when it stopped.
func (r *replication) fence() error {
	for _, one := range r.all() {
		g, seen := one.journal(), one.seen()
		if g == nil || g.Follows() || seen.Epoch() <= g.Reigns().Epoch() {
			continue
		}
		if _, err := g.Reigns().Common(g.Head(), seen, record.MaxLSN); err != nil {
			continue // of a group that had this name before
		}
		if err := g.Follow(); err != nil {
			return fmt.Errorf("group %s is another daemon's, in epoch %d: %w", one.name, seen.Epoch(), err)
		}
		one.log.Warn("another daemon writes the group in a later epoch: its disks take no writes here", zap.Uint64("epoch", seen.Epoch()))
	}
	return nil
}

// run does what replication has to until ctx ends.
func (r *replication) run(ctx context.Context, ls *listeners) error {
	r.mu.Lock()
	r.ctx = ctx
	r.mu.Unlock()
	r.reconcile()
	if ls.replication != nil {
		r.wg.Go(func() { _ = r.e.Serve(ctx, ls.replication) }) // it returns nil
	}
	r.wg.Go(func() { r.wait(ctx) })
	r.wg.Go(func() { r.e.Watch(ctx) })
	measure, note := time.NewTicker(measureEvery), time.NewTicker(noteEvery)
	defer measure.Stop()
	defer note.Stop()
	for ctx.Err() == nil {
		select {
		case <-measure.C:
			r.measure()
		case <-note.C:
			r.noteAcked()
		case <-r.kick:
			r.reconcile()
		case <-ctx.Done():
		}
	}
	r.mu.Lock()
	r.ctx = nil
	r.mu.Unlock()
	r.e.Shut()
	for _, one := range r.all() {
		one.mu.Lock()
		ships := slices.Collect(maps.Values(one.ships))
		one.mu.Unlock()
		for _, s := range ships {
			s.stop()
		}
	}
	r.wg.Wait()
	r.noteAcked()
	return nil
}

const (
	// measureEvery is how often it is looked at how far writers have come, and noteEvery how often it is noted what replicas have.
	measureEvery = 50 * time.Millisecond
	noteEvery    = 10 * time.Second
)

// measure looks at how far replicas are behind.
func (r *replication) measure() {
	for _, one := range r.all() {
		one.mu.Lock()
		for _, s := range one.ships {
			s.look()
		}
		one.mu.Unlock()
	}
}

// noteAcked notes what replicas have, for the next start.
func (r *replication) noteAcked() {
	for _, one := range r.all() {
		one.mu.Lock()
		acked := maps.Clone(one.note.Acked)
		for peer, s := range one.ships {
			if acked == nil {
				acked = map[string]record.LSN{}
			}
			acked[peer] = s.look()
		}
		changed := !maps.Equal(acked, one.note.Acked)
		one.mu.Unlock()
		if !changed {
			continue
		}
		if err := one.setNote(func(n *groupNote) { n.Acked = acked }); err != nil {
			one.log.Warn("note what replicas have", zap.Error(err))
		}
	}
}

func (r *replication) all() []*replicated {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*replicated, 0, len(r.groups))
	for _, name := range slices.Sorted(maps.Keys(r.groups)) {
		all = append(all, r.groups[name])
	}
	return all
}

// reconcileSoon has run do so.
func (r *replication) reconcileSoon() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// reconcile has every group shipped to whom it is to be shipped to, and to nobody else.
func (r *replication) reconcile() {
	groups := r.reloader.configured()
	for _, g := range r.store.Groups() {
		r.group(g.Name())
	}
	for _, one := range r.all() {
		one.reconcile(groups[one.name])
	}
}

// replicas are the peers that the group is to be shipped to.
func (one *replicated) replicas(conf config.Group) []string {
	g := one.journal()
	if g == nil {
		return nil
	}
	if g.Follows() {
		if to := one.known().Yielded; to != "" {
			return []string{to} // the last records are on their way
		}
		return nil
	}
	peers := slices.Clone(conf.Replicas)
	if n := one.known(); n.From != "" && !slices.Contains(peers, n.From) {
		if p, err := one.r.e.Peers.Get(n.From); err == nil && n.isFrom(p) {
			peers = append(peers, n.From)
		}
	}
	return peers
}

// proclaim has replicas know of a disk that came, or of this daemon's reign, before anything is written.
func (one *replicated) proclaim(g *journal.Group) {
	if state, _ := g.State(); state == "failed" {
		return
	}
	if err := g.Proclaim(); err != nil {
		one.log.Warn("replicas learn of the group's disks and its epoch with the next write", zap.Error(err))
	}
}

func (one *replicated) reconcile(conf config.Group) {
	one.r.mu.Lock()
	ctx := one.r.ctx
	one.r.mu.Unlock()
	if ctx == nil {
		return
	}
	want := one.replicas(conf)
	if g := one.journal(); g != nil && len(want) > 0 {
		// Beside this loop: other groups do not wait for the disk of this one.
		one.r.wg.Go(func() { one.proclaim(g) })
	}
	one.mu.Lock()
	var gone []*shipping
	for peer, s := range one.ships {
		if !slices.Contains(want, peer) || s.g != one.journal() || s.ended() {
			gone = append(gone, s)
			delete(one.ships, peer)
		}
	}
	for _, peer := range want {
		if one.ships[peer] == nil {
			one.ships[peer] = one.ship(ctx, one.journal(), peer)
		}
	}
	one.mu.Unlock()
	for _, s := range gone {
		s.stop()
	}
}

// backing is where a disk of a group that comes is kept, if the configuration says nothing else.
func (one *replicated) backing(disk string) string {
	return filepath.Join(one.r.conf.Dir, one.name, disk+".raw")
}
