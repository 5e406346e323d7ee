package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/build"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/link"
	"github.com/tidemark-cdp/tidemark/replica/wire"
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
	changing sync.Mutex

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
}

// consent is what who runs this daemon allows to be dropped of a group, once, of what this daemon did not write itself.
type consent int

const (
	consentNone consent = iota
	consentDrop         // what its writer can not have it keep
	consentAnew         // all of it, when its writer offers it next
)

// groupNote is what must be known of a group after a crash, beside its journal.
type groupNote struct {
	Version int `json:"version"`
	// Seen are the reigns of the highest epoch that this daemon was told of.
	Seen []reignNote `json:"seen,omitempty"`
	// From is the peer that the group came from last, and FromKey its key.
	From    string `json:"from,omitempty"`
	FromKey string `json:"from_key,omitempty"`
	// Own are the ids of reigns of this daemon's.
	Own []string `json:"own,omitempty"`
	// Yielded is the peer that the group was handed over to, until it is known that it was taken.
	Yielded string `json:"yielded,omitempty"`
	// Acked is what each replica has, at least, of the present history.
	Acked map[string]record.LSN `json:"acked,omitempty"`
}

type reignNote struct {
	Epoch uint64     `json:"epoch"`
	First record.LSN `json:"first"`
	ID    string     `json:"id"`
}

const groupNoteVersion = 1

func reignNotes(r record.Reigns) (all []reignNote) {
	for _, x := range r {
		all = append(all, reignNote{x.Epoch, x.First, hex.EncodeToString(x.ID[:])})
	}
	return all
}

// isFrom reports whether a peer is the one that the group came from.
func (n *groupNote) isFrom(p link.Peer) bool {
	return n.From == p.Name && (n.FromKey == "" || n.FromKey == p.Fingerprint.String())
}

// seen are the note's reigns.
func (n *groupNote) seen() (r record.Reigns, err error) {
	for _, x := range n.Seen {
		one := record.Reign{Epoch: x.Epoch, First: x.First}
		if k, err := hex.Decode(one.ID[:], []byte(x.ID)); err != nil || k != len(one.ID) {
			return nil, fmt.Errorf("id %q of epoch %d", x.ID, x.Epoch)
		}
		r = append(r, one)
	}
	if len(r) > 0 {
		err = r.Check()
	}
	return r, err
}

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

func (r *replication) loadNotes() error {
	entries, err := os.ReadDir(filepath.Join(r.dir, "groups"))
	if err != nil {
		return fmt.Errorf("replication: %w", err)
	}
	for _, entry := range entries {
		name, ok := strings.CutSuffix(entry.Name(), ".json")
		if !ok {
			continue // of a write that a crash cut off
		}
		one := r.group(name)
		if err := readNote(one.path(), &one.note); err != nil {
			return fmt.Errorf("replication: %w", err)
		}
		if one.note.Version != groupNoteVersion {
			return fmt.Errorf("replication: note %s has version %d, this Tidemark knows %d: use the one that wrote it", one.path(), one.note.Version, groupNoteVersion)
		}
		if _, err := one.note.seen(); err != nil {
			return fmt.Errorf("replication: note %s: %w", one.path(), err)
		}
	}
	return nil
}

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

func (one *replicated) path() string { return filepath.Join(one.r.dir, "groups", one.name+".json") }

// setNote changes the note, durably.
func (one *replicated) setNote(change func(*groupNote)) error {
	one.mu.Lock()
	defer one.mu.Unlock()
	next := one.note
	next.Acked = maps.Clone(next.Acked)
	change(&next)
	if err := writeNote(one.path(), next); err != nil {
		return err
	}
	one.note = next
	return nil
}

// isFrom reports whether a peer is the one that the group came from.
func (one *replicated) isFrom(p link.Peer) bool {
	n := one.known()
	return n.isFrom(p)
}

func (one *replicated) known() groupNote {
	one.mu.Lock()
	defer one.mu.Unlock()
	return one.note
}

// seen are the reigns of the highest epoch that this daemon was told of.
func (one *replicated) seen() record.Reigns {
	n := one.known()
	r, _ := n.seen() // they were read, or written, as such
	return r
}

func (one *replicated) setSeen(reigns record.Reigns) error {
	return one.setNote(func(n *groupNote) {
		n.Seen = reignNotes(reigns)
	})
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
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for n := 1; ctx.Err() == nil; n++ {
		select {
		case <-tick.C:
			r.look(n%noteEvery == 0)
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
	r.look(true)
	return nil
}

const (
	// lookEvery is how often it is looked at how far writers have come, and every how many looks it is noted what replicas have.
	lookEvery = 50 * time.Millisecond
	noteEvery = 200
)

// look measures how far replicas are behind.
func (r *replication) look(note bool) {
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
		if !note || !changed {
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

// wait has peers offer groups here whose address is known, so that they need not know this daemon's.
func (r *replication) wait(ctx context.Context) {
	waiting := map[string]context.CancelFunc{}
	var wg sync.WaitGroup
	defer wg.Wait()
	for ctx.Err() == nil {
		changed := r.e.Peers.Changed()
		now := map[string]bool{}
		for _, p := range r.e.Peers.All() {
			if p.Address == "" {
				continue
			}
			now[p.Name] = true
			if waiting[p.Name] == nil {
				one, cancel := context.WithCancel(ctx)
				waiting[p.Name] = cancel
				wg.Go(func() { r.waitFor(one, p.Name) })
			}
		}
		for name, cancel := range waiting {
			if !now[name] {
				cancel()
				delete(waiting, name)
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
	for _, cancel := range waiting {
		cancel()
	}
}

// waitFor keeps a connection to a peer on which it may offer a group.
func (r *replication) waitFor(ctx context.Context, peer string) {
	var wg sync.WaitGroup
	defer wg.Wait()
	b := r.e.Backoff()
	for ctx.Err() == nil {
		taken := make(chan struct{})
		ended := make(chan error, 1)
		wg.Go(func() { ended <- r.e.Await(ctx, peer, func() { close(taken) }) })
		select {
		case <-taken:
			b.Reset()
		case err := <-ended:
			if ctx.Err() == nil {
				r.log.Debug("wait for a peer's offers", zap.String("peer", peer), zap.Error(err))
				b.Wait(ctx)
			}
		}
	}
}

// offered takes a group that a peer offers, if it may.
func (r *replication) offered(ctx context.Context, c *link.Conn, m *wire.Offer) {
	log := r.log.With(zap.String("group", m.Group), zap.String("peer", c.Peer.Name))
	one, err := r.admit(c.Peer, m)
	if err == nil {
		err = one.receive(ctx, c, m)
		r.forget(one)
	} else {
		r.e.Refused.Add(1)
		err = errors.Join(err, c.Refuse(wire.ReasonRights, err), c.Close())
	}
	if err != nil && ctx.Err() == nil {
		log.Warn("the group does not come any more", zap.Error(err))
	}
	if one != nil {
		one.mu.Lock()
		one.why = err
		one.mu.Unlock()
	}
	r.reconcileSoon()
}

// admit says whether a peer may send a group here: one to which it is shipped from here, which may have taken it over; one that came from that
// peer; one that the peer's rights name; or one that a pattern of its rights fits, and of which nothing is here.
func (r *replication) admit(p link.Peer, m *wire.Offer) (*replicated, error) {
	may, named := p.Sends(m.Group)
	conf := r.reloader.configured()[m.Group]
	r.mu.Lock()
	one := r.groups[m.Group]
	r.mu.Unlock()
	var n groupNote
	if one != nil {
		n = one.known()
	}
	switch {
	case slices.Contains(conf.Replicas, p.Name), n.isFrom(p), named:
	case !may:
		return nil, fmt.Errorf("peer %s may not send group %s to %s", p.Name, m.Group, r.conf.Name)
	case n.From != "":
		return nil, fmt.Errorf("group %s came to %s from peer %s, and peer %s may send it only if that is said of this very group", m.Group, r.conf.Name, n.From, p.Name)
	case r.store.Has(m.Group):
		return nil, fmt.Errorf("group %s is %s's own, and peer %s may send it only if that is said of this very group", m.Group, r.conf.Name, p.Name)
	case r.from(p) >= r.conf.MostGroups:
		return nil, fmt.Errorf("group %s would be one more of %d that peer %s has sent here, and replication.most_groups allows that only if it is said of this very group", m.Group, r.conf.MostGroups, p.Name)
	}
	one = r.group(m.Group)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.groups[m.Group] = one // it may have been forgotten between
	one.users++
	return one, nil
}

// from is how many groups have come from a peer, or are about to.
func (r *replication) from(p link.Peer) (n int) {
	for _, one := range r.all() {
		one.mu.Lock()
		if one.note.isFrom(p) || one.comes != nil && one.comes.peer == p.Name {
			n++
		}
		one.mu.Unlock()
	}
	return n
}

// forget drops what is kept of a name of which nothing has come.
func (r *replication) forget(one *replicated) {
	r.mu.Lock()
	defer r.mu.Unlock()
	one.mu.Lock()
	defer one.mu.Unlock()
	n := one.note
	if one.users--; one.users == 0 && one.comes == nil && len(one.ships) == 0 && len(n.Seen)+len(n.From)+len(n.Own) == 0 && one.journal() == nil {
		delete(r.groups, one.name)
	}
}

// reserved reports whether a name is that of a peer that groups are shipped to, or come from.
func (r *replication) reserved(name string) bool {
	for _, g := range r.reloader.configured() {
		if slices.Contains(g.Replicas, name) {
			return true
		}
	}
	for _, one := range r.all() {
		if n := one.known(); n.From == name || n.Yielded == name {
			return true
		}
	}
	return false
}

// await returns when every replica of a group has everything up to an LSN, or says which have not by the time that ctx ends.
func (r *replication) await(ctx context.Context, group string, lsn record.LSN) (late []string, err error) {
	one := r.group(group)
	conf := r.reloader.configured()[group]
	peers := one.replicas(conf)
	if len(peers) == 0 {
		return nil, fmt.Errorf("%w: group %s has no replica", errBadRequest, group)
	}
	for _, peer := range peers {
		one.mu.Lock()
		s := one.ships[peer]
		one.mu.Unlock()
		if s == nil || !s.await(ctx, lsn) {
			late = append(late, peer)
		}
	}
	return late, nil
}

// status adds what is known of a group's replication.
func (r *replication) status(g *journal.Group, a *api.Group) {
	one := r.group(g.Name())
	a.Epoch, a.Role = g.Reigns().Epoch(), "writes"
	n := one.known()
	if g.Follows() {
		a.Role = "follows"
	}
	if n.Yielded != "" && g.Follows() {
		a.Problems = append(a.Problems, fmt.Sprintf("it was handed over to %s, and whether that has taken it is not known: if it has not, tidemark failover %s here, where everything is", n.Yielded, g.Name()))
	}
	a.Replicas = one.shipped()
	rpo := r.reloader.configured()[g.Name()].RPO
	for _, s := range a.Replicas {
		if lag := time.Duration(s.Lag * float64(time.Second)); rpo > 0 && lag > rpo {
			a.Problems = append(a.Problems, fmt.Sprintf("replica %s is %v behind, and rpo is %v", s.Peer, lag.Round(time.Millisecond), rpo))
		}
	}
	if seen := one.seen(); seen.Epoch() > g.Reigns().Epoch() && !g.Follows() {
		a.Problems = append(a.Problems, fmt.Sprintf("it was said to be another daemon's in epoch %d", seen.Epoch()))
	}
	one.mu.Lock()
	defer one.mu.Unlock()
	if one.consents == consentAnew {
		a.Problems = append(a.Problems, "it begins anew, and its history here ends, when its writer offers it next: that was asked for")
	}
	if one.why != nil && one.comes == nil && g.Follows() {
		a.Problems = append(a.Problems, fmt.Sprintf("it does not come any more: %v", one.why))
	}
	if one.comes != nil {
		a.Source = one.comes.status(g)
	} else if g.Follows() {
		a.Source = &api.Source{Peer: n.From, State: notConnected}
	}
}

// shipped is how far each replica is.
func (one *replicated) shipped() (all []api.Replica) {
	one.mu.Lock()
	defer one.mu.Unlock()
	for _, peer := range slices.Sorted(maps.Keys(one.ships)) {
		all = append(all, one.ships[peer].status())
	}
	return all
}

const notConnected = "not connected"

// backing is where a disk of a group that comes is kept, if the configuration says nothing else.
func (one *replicated) backing(disk string) string {
	return filepath.Join(one.r.conf.Dir, one.name, disk+".raw")
}
