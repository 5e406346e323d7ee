package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/semaphore"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/guest"
	"github.com/tidemark-cdp/tidemark/journal"
)

// keepers look after the groups: their guests, their markers, their definitions.
type keepers struct {
	store   *journal.Store
	notes   *guest.Notes
	metrics *metrics
	log     *zap.Logger

	socketGroup string // who may connect to ports, beside root

	frozen *semaphore.Weighted // guests that may be frozen at once
	most   int64               // its size

	// marking calls what takes a marker, unless the group's disks are a mix of before and after a rollback.
	marking func(group string, fn func() error) error

	rouse chan struct{} // kicks the loop that thaws what is left frozen

	mu     sync.Mutex // guards what follows
	all    map[string]*keeper
	missed map[string]uint64        // by group: markers of the schedule, since the daemon started
	quiets map[string]chan struct{} // by group: holds one token while nobody cuts or thaws
	start  func(*keeper)            // nil while they do not run
}

func newKeepers(store *journal.Store, c config.Config, notes *guest.Notes, m *metrics, log *zap.Logger) (*keepers, error) {
	k := &keepers{
		store: store, notes: notes, metrics: m, log: log, rouse: make(chan struct{}, 1),
		socketGroup: c.SocketGroup, most: int64(c.Guests.MaxFrozen), frozen: semaphore.NewWeighted(int64(c.Guests.MaxFrozen)),
		marking: func(_ string, fn func() error) error { return fn() },
		all:     map[string]*keeper{}, missed: map[string]uint64{}, quiets: map[string]chan struct{}{},
	}
	for name, g := range c.Groups {
		if err := k.put(name, g); err != nil {
			return nil, err
		}
	}
	return k, nil
}

// put begins to look after a group that the store has, by a configuration.
func (k *keepers) put(name string, conf config.Group) error {
	g, err := k.store.Group(name)
	if err != nil {
		return err
	}
	one := &keeper{keepers: k, g: g, conf: conf, log: k.log.With(zap.String("group", name))}
	one.state.problems = map[string]string{}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.all[name] = one
	if k.start != nil {
		k.start(one)
	}
	return nil
}

// remove ends what looks after a group, and waits for it.
func (k *keepers) remove(name string) {
	k.mu.Lock()
	one := k.all[name]
	delete(k.all, name)
	k.mu.Unlock()
	if one != nil {
		one.stop()
	}
}

// get finds what looks after a group.
func (k *keepers) get(name string) (*keeper, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if one := k.all[name]; one != nil {
		return one, nil
	}
	return nil, fmt.Errorf("group %q: %w", name, journal.ErrNotFound)
}

// quiet is the token of who cuts or thaws a group: one at a time.
func (k *keepers) quiet(group string) chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	c := k.quiets[group]
	if c == nil {
		c = make(chan struct{}, 1)
		c <- struct{}{}
		k.quiets[group] = c
	}
	return c
}

// run looks after the groups until ctx ends. woken is closed when nobody else thaws what was left.
func (k *keepers) run(ctx context.Context, woken <-chan struct{}) error {
	k.mu.Lock()
	k.start = func(one *keeper) { one.begin(ctx) }
	for _, one := range k.all {
		k.start(one)
	}
	k.mu.Unlock()
	<-woken
	k.thawLeft(ctx) // until ctx ends
	k.mu.Lock()
	k.start = nil
	all := slices.Collect(maps.Values(k.all))
	k.mu.Unlock()
	for _, one := range all {
		one.stop()
	}
	return nil
}

// wakeLeft thaws once what a daemon before this one left frozen: before anything that may keep this one from
// starting, and beside it. What it can not thaw now is tried again when the groups are served.
func wakeLeft(notes *guest.Notes, log *zap.Logger) (done <-chan struct{}) {
	woken := make(chan struct{})
	go func() {
		defer close(woken)
		left, err := notes.Left()
		if err != nil {
			log.Error("guests may be frozen", zap.Error(err))
		}
		for _, note := range left {
			r := notes.Wake(context.Background(), note)
			logWoken(log, note, r)
		}
	}()
	return woken
}

// logWoken tells what became of a note.
func logWoken(log *zap.Logger, note guest.Note, r guest.Report) {
	log = log.With(zap.String("group", note.Group), zap.String("marker", note.Label), zap.Time("since", note.Time))
	switch {
	case len(r.NotThawed) > 0:
		log.Error("A GUEST MAY BE FROZEN: trying again", zap.Error(r.Problem()))
	case r.Problem() != nil:
		log.Error("guests that were left frozen are thawed, and not all is undone", zap.Error(r.Problem()))
	default:
		log.Warn("guests that were left frozen are thawed")
	}
}

const (
	rouseFirst = time.Second
	rouseLast  = 5 * time.Second
)

// thawLeft thaws what cuts left frozen, those of a daemon before this one too, until it is thawed.
func (k *keepers) thawLeft(ctx context.Context) {
	wait := rouseFirst
	for {
		left, err := k.notes.Left()
		if err != nil {
			k.log.Error("guests may be frozen", zap.Error(err))
		}
		busy := false
		for _, note := range left {
			busy = k.thawNote(ctx, note.Group) || busy
		}
		var again <-chan time.Time
		if busy {
			again = time.After(wait)
			wait = min(2*wait, rouseLast)
		} else {
			wait = rouseFirst
		}
		select {
		case <-ctx.Done():
			return
		case <-again:
		case <-k.rouse:
		}
	}
}

// thawNote undoes what is noted of a group, and reports whether something is left of it.
func (k *keepers) thawNote(ctx context.Context, group string) (left bool) {
	quiet := k.quiet(group)
	select {
	case <-quiet:
	default:
		return true // of a cut under way
	}
	defer func() { quiet <- struct{}{} }()
	note, ok, err := k.notes.Get(group)
	if err != nil || !ok {
		return false
	}
	r := k.notes.Wake(ctx, note)
	logWoken(k.log, note, r)
	k.metrics.notThawed.WithLabelValues(group).Set(float64(len(r.NotThawed)))
	return len(r.NotThawed) > 0
}

// thaw thaws the guests of a group now, and says which those are.
func (k *keepers) thaw(ctx context.Context, group string) ([]string, error) {
	note, noted, err := k.notes.Get(group)
	if err != nil {
		return nil, err
	}
	one, err := k.get(group)
	if err != nil && !noted {
		return nil, err
	}
	quiet := k.quiet(group)
	select {
	case <-quiet:
		defer func() { quiet <- struct{}{} }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if note, noted, err = k.notes.Get(group); err != nil {
		return nil, err
	}
	if !noted {
		note = guest.Note{Group: group, Time: time.Now(), Guests: map[string]guest.Spec{}}
	}
	if one != nil {
		for _, n := range one.guests() {
			note.Guests[n.Name] = n.Spec
		}
	}
	names := slices.Sorted(maps.Keys(note.Guests))
	if len(names) == 0 {
		return nil, fmt.Errorf("%w: group %s has no guests that can be frozen", errBadRequest, group)
	}
	r := k.notes.Wake(ctx, note)
	k.metrics.notThawed.WithLabelValues(group).Set(float64(len(r.NotThawed)))
	if len(r.NotThawed) > 0 {
		kick(k.rouse)
		return nil, fmt.Errorf("%w: %w", errFrozen, r.Problem())
	}
	return names, r.Problem()
}

// mayBeFrozen says which guests of a group may be frozen though no cut is under way; nil if none is.
func (k *keepers) mayBeFrozen(group string) error {
	quiet := k.quiet(group)
	select {
	case <-quiet:
		defer func() { quiet <- struct{}{} }()
	default:
		return nil // a cut or a thaw is under way
	}
	note, ok, err := k.notes.Get(group)
	if err != nil || !ok {
		return err
	}
	return fmt.Errorf("%v since %s, for marker %q: the daemon tries to thaw them; tidemark thaw %s tries now",
		slices.Sorted(maps.Keys(note.Guests)), note.Time.Format(time.RFC3339), note.Label, group)
}

func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// missedSoFar adds to the markers of a group's schedule that were missed, and returns how many that are.
func (k *keepers) missedSoFar(group string, more uint64) uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.missed[group] += more
	return k.missed[group]
}

// keeper looks after one group, by one configuration.
type keeper struct {
	*keepers
	g    *journal.Group
	conf config.Group
	log  *zap.Logger

	cancel context.CancelFunc // nil before begin
	wg     sync.WaitGroup

	state struct {
		sync.Mutex
		problems map[string]string // by what has it
		schedule api.Schedule
	}
}

// begin starts the group's loops.
func (k *keeper) begin(ctx context.Context) {
	ctx, k.cancel = context.WithCancel(ctx)
	for _, name := range slices.Sorted(maps.Keys(k.conf.Guests)) {
		if port := k.conf.Guests[name].Port; port != "" {
			k.wg.Go(func() { k.servePort(ctx, name, port) })
		}
	}
	k.wg.Go(func() { k.watchDefinitions(ctx) })
	if k.conf.Markers.Every > 0 {
		k.wg.Go(func() { k.schedule(ctx) })
	}
}

func (k *keeper) stop() {
	if k.cancel != nil {
		k.cancel()
		k.wg.Wait()
	}
}

// guests are those that can be frozen, by name.
func (k *keeper) guests() (all []guest.Named) {
	for _, name := range slices.Sorted(maps.Keys(k.conf.Guests)) {
		if g := k.conf.Guests[name]; g.Freezes() {
			all = append(all, guest.Named{Name: name, Spec: g.Spec()})
		}
	}
	return all
}

// problem notes what is wrong with a part of the group, or that nothing is; it logs what is new.
func (k *keeper) problem(what string, err error) {
	k.state.Lock()
	defer k.state.Unlock()
	if err == nil {
		delete(k.state.problems, what)
		return
	}
	if errors.Is(err, context.Canceled) {
		return
	}
	if k.state.problems[what] != err.Error() {
		k.log.Warn(what, zap.Error(err))
	}
	k.state.problems[what] = err.Error()
}

// status adds what is known of guests and markers to the group's state.
func (k *keeper) status(a *api.Group) {
	a.Trusted = k.conf.Trusted
	for _, name := range slices.Sorted(maps.Keys(k.conf.Guests)) {
		g := api.Guest{Name: name}
		if c := k.conf.Guests[name]; c.Freezes() {
			g.Reached = c.Spec().String()
		}
		a.Guests = append(a.Guests, g)
	}
	if err := k.mayBeFrozen(k.g.Name()); err != nil {
		a.Problems = append(a.Problems, "GUESTS MAY BE FROZEN: "+err.Error())
	}
	k.state.Lock()
	defer k.state.Unlock()
	if k.conf.Markers.Every > 0 {
		s := k.state.schedule
		s.Missed = k.missedSoFar(k.g.Name(), 0)
		s.Every, s.Consistency = k.conf.Markers.Every.Seconds(), k.conf.Markers.Consistency
		a.Schedule = &s
	}
	for _, what := range slices.Sorted(maps.Keys(k.state.problems)) {
		a.Problems = append(a.Problems, what+": "+k.state.problems[what])
	}
}
