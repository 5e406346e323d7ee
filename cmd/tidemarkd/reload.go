package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// reloader makes what runs what the configuration says now.
type reloader struct {
	read    func() (config.Config, error) // the file and the flags
	store   *journal.Store
	keepers *keepers
	log     *zap.Logger

	mu  sync.Mutex // one at a time
	now config.Config
	// groups are now's: whoever asks need not wait for a change that is under way.
	groups atomic.Pointer[map[string]config.Group]

	// reloaded is called behind each change of the groups.
	reloaded func()
}

// reload reads the configuration again and takes up what it says of groups. Everything that can be
// done is; what can not be is among the answer's errors, and stays as it was.
func (r *reloader) reload() (api.Reloaded, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	done := api.Reloaded{Changes: []string{}, Restart: []string{}, Errors: []string{}}
	want, err := r.read()
	if err != nil {
		return done, fmt.Errorf("%w: the configuration stays as it was: %w", errBadRequest, err)
	}
	done.Restart = append(done.Restart, fixed(r.now, want)...)
	did := func(err error, format string, args ...any) bool {
		what := fmt.Sprintf(format, args...)
		if err != nil {
			done.Errors = append(done.Errors, fmt.Sprintf("not %s: %v", what, err))
			r.log.Error("reload", zap.String("change", what), zap.Error(err))
			return false
		}
		done.Changes = append(done.Changes, what)
		r.log.Info("reloaded", zap.String("change", what))
		return true
	}
	// What leaves goes first: a backing may move from one group to another.
	groups := maps.Clone(r.now.Groups)
	for _, name := range slices.Sorted(maps.Keys(r.now.Groups)) {
		if _, ok := want.Groups[name]; !ok {
			if did(r.removeGroup(name, groups[name]), "group %s removed", name) {
				delete(groups, name)
			}
			continue
		}
		groups[name] = r.removeDisks(name, groups[name], want.Groups[name], did)
	}
	for _, name := range slices.Sorted(maps.Keys(want.Groups)) {
		next := want.Groups[name]
		now, ok := groups[name]
		if !ok && next.Received && !r.store.Has(name) {
			continue // nothing of it has come yet
		}
		if !ok {
			if did(r.addGroup(name, next), "group %s added", name) {
				groups[name] = next
			}
			continue
		}
		groups[name] = r.addDisks(name, now, next, did)
		groups[name] = r.keep(name, groups[name], next, did)
	}
	r.setGroups(groups)
	r.reloaded()
	return done, nil
}

// configured are the groups as they are configured. Not to be changed.
func (r *reloader) configured() map[string]config.Group { return *r.groups.Load() }

// setGroups notes what is configured from now on. r.mu is held.
func (r *reloader) setGroups(groups map[string]config.Group) {
	r.now.Groups = groups
	r.groups.Store(&groups)
}

// planned is what the configuration says now of a group that has not begun.
func (r *reloader) planned(name string) (config.Group, error) {
	want, err := r.read()
	return want.Groups[name], err
}

// fixed are the settings that differ and take a restart.
func fixed(now, want config.Config) (all []string) {
	now.Groups, want.Groups = nil, nil
	a, b := reflect.ValueOf(now), reflect.ValueOf(want)
	for i := range a.NumField() {
		if !reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface()) {
			all = append(all, a.Type().Field(i).Tag.Get("yaml"))
		}
	}
	return all
}

// removeGroup waits for a cut that is under way.
func (r *reloader) removeGroup(name string, conf config.Group) error {
	r.keepers.remove(name)
	quiet := r.keepers.quiet(name)
	<-quiet
	err := r.store.RemoveGroup(name)
	quiet <- struct{}{}
	if err != nil {
		return errors.Join(err, r.keepers.put(name, conf))
	}
	r.keepers.metrics.forget(name)
	return nil
}

func (r *reloader) addGroup(name string, conf config.Group) error {
	if err := r.store.AddGroup(groupConfig(name, conf)); err != nil {
		return err
	}
	return r.keepers.put(name, conf)
}

type did func(err error, format string, args ...any) bool

// removeDisks takes disks out of a group that are not to be in it, or have another backing.
func (r *reloader) removeDisks(name string, now, want config.Group, did did) config.Group {
	g, err := r.store.Group(name)
	if err != nil {
		return now
	}
	disks := maps.Clone(now.Disks)
	for _, d := range slices.Sorted(maps.Keys(now.Disks)) {
		if want.Disks[d] != now.Disks[d] && did(g.RemoveDisk(d), "disk %s/%s removed", name, d) {
			delete(disks, d)
		}
	}
	now.Disks = disks
	return now
}

func (r *reloader) addDisks(name string, now, want config.Group, did did) config.Group {
	g, err := r.store.Group(name)
	if err != nil {
		return now
	}
	disks := maps.Clone(now.Disks)
	for _, d := range slices.Sorted(maps.Keys(want.Disks)) {
		if _, ok := disks[d]; !ok && did(g.AddDisk(journal.DiskConfig{Name: d, Backing: want.Disks[d].Backing}), "disk %s/%s added", name, d) {
			disks[d] = want.Disks[d]
		}
	}
	now.Disks = disks
	return now
}

// keep has the group looked after as it is to be from now on.
func (r *reloader) keep(name string, now, want config.Group, did did) config.Group {
	next := want
	next.Disks = now.Disks
	if reflect.DeepEqual(now, next) {
		return now
	}
	if !reflect.DeepEqual(now.Retain, next.Retain) {
		if !did(r.retain(name, next), "group %s: retention as configured", name) {
			next.Retain = now.Retain
		}
		if now.Retain = next.Retain; reflect.DeepEqual(now, next) {
			return next
		}
	}
	r.keepers.remove(name)
	if !did(r.keepers.put(name, next), "group %s: guests, markers, definitions and replicas as configured", name) {
		return now
	}
	return next
}

// retain has a group keep what it is to keep from now on.
func (r *reloader) retain(name string, conf config.Group) error {
	g, err := r.store.Group(name)
	if err != nil {
		return err
	}
	gc := groupConfig(name, conf)
	return g.SetPolicy(gc.Retain, gc.Limit)
}

// adopt implements adopter: the group's configuration is a file in the state directory until the operator takes it into his own.
func (r *reloader) adopt(name string, conf config.Group, hold, back func() error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.now.Groups[name]; ok {
		return fmt.Errorf("there is a group %s", name)
	}
	if err := hold(); err != nil {
		return err
	}
	if err := r.protect(name, conf); err != nil {
		return errors.Join(err, back())
	}
	return nil
}

// protect makes a group's configuration durable and opens it. r.mu is held.
func (r *reloader) protect(name string, conf config.Group) error {
	path, err := r.write(name, conf)
	if err != nil {
		return err
	}
	want, err := r.read()
	if err == nil && !maps.Equal(want.Groups[name].Disks, conf.Disks) {
		err = fmt.Errorf("the configuration has a group %s with other disks", name)
	}
	if err == nil {
		err = r.addGroup(name, want.Groups[name])
	}
	if err != nil {
		return errors.Join(err, removeDurable(path))
	}
	r.take(name, want.Groups[name])
	r.log.Info("group is protected; its configuration is in a file that can be moved to the daemon's", zap.String("group", name), zap.String("file", path))
	return nil
}

// write makes the file of a group's configuration, durably.
func (r *reloader) write(name string, conf config.Group) (path string, err error) {
	return config.WritePromoted(r.now.StateDir, name, conf, func(path string, b []byte) error {
		return errors.Join(mkdirDurable(filepath.Dir(path)), writeDurable(path, b))
	})
}

// take notes what is configured from now on. r.mu is held.
func (r *reloader) take(name string, conf config.Group) {
	groups := maps.Clone(r.now.Groups)
	if groups == nil {
		groups = map[string]config.Group{}
	}
	groups[name] = conf
	r.setGroups(groups)
}

// begin begins with a group that comes from another daemon. Its configuration is in a file first: without its journal, the next
// start leaves it out.
func (r *reloader) begin(name string, conf config.Group, b *record.Beginning) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	path, err := r.write(name, conf)
	if err != nil {
		return err
	}
	want, err := r.read()
	if err == nil && !maps.Equal(want.Groups[name].Disks, conf.Disks) {
		err = fmt.Errorf("the configuration has a group %s with other disks", name)
	}
	if err == nil {
		conf = want.Groups[name]
		gc := groupConfig(name, conf)
		gc.Begin = b
		err = r.store.AddGroup(gc)
	}
	if err != nil {
		return errors.Join(err, removeDurable(path))
	}
	if err := r.keepers.put(name, conf); err != nil {
		return errors.Join(err, r.store.RemoveGroup(name))
	}
	r.take(name, conf)
	r.log.Info("the group comes from another daemon from here on", zap.String("group", name), zap.Uint64("lsn", uint64(b.At)), zap.String("file", path))
	return nil
}

// discard closes a group and removes its journal.
func (r *reloader) discard(name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.now.Groups[name].Received {
		return fmt.Errorf("group %s did not come from another daemon to begin with: its journal is not given up", name)
	}
	if err := r.removeGroup(name, r.now.Groups[name]); err != nil {
		return err
	}
	groups := maps.Clone(r.now.Groups)
	delete(groups, name)
	r.setGroups(groups)
	return r.store.Discard(name)
}

// adoptDisks adds disks to a group that comes from another daemon: by fn, and to its configuration.
func (r *reloader) adoptDisks(group string, disks map[string]config.Disk, fn func() error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	conf, ok := r.now.Groups[group]
	if !ok {
		return fmt.Errorf("group %s: %w", group, journal.ErrNotFound)
	}
	conf.Disks = maps.Clone(conf.Disks)
	maps.Copy(conf.Disks, disks)
	if err := fn(); err != nil || len(disks) == 0 {
		return err
	}
	r.take(group, conf)
	if !conf.Received {
		return fmt.Errorf("disks of group %s came from another daemon: add them to the configuration: %v", group, disks)
	}
	_, err := r.write(group, conf)
	return err
}

// groupConfig is the journal's part of a group.
func groupConfig(name string, g config.Group) journal.GroupConfig {
	gc := journal.GroupConfig{Name: name, Received: g.Received, Limit: int64(g.Retain.Limit)}
	gc.Retain, _ = g.Retain.Policy() // the configuration is valid
	for disk, d := range g.Disks {
		gc.Disks = append(gc.Disks, journal.DiskConfig{Name: disk, Backing: d.Backing})
	}
	slices.SortFunc(gc.Disks, func(a, b journal.DiskConfig) int { return cmp.Compare(a.Name, b.Name) })
	return gc
}
