package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/tidemark-cdp/tidemark/cmd/internal/build"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/guest"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/nbd"
)

// run serves until ctx ends, then stops in order: what is journaled is applied while guests
// go on, then no new requests, those in hand finished, the rest applied and checkpointed.
func run(ctx context.Context, read func() (config.Config, error), hup <-chan os.Signal, log *zap.Logger) error {
	began := time.Now()
	c, err := read()
	if err != nil {
		return err
	}
	if c, err = withoutUnfinished(c, log); err != nil {
		return err
	}
	tlsConf, err := c.TLS.Server()
	if err != nil {
		return err
	}
	notes, err := guest.NewNotes(filepath.Join(c.StateDir, "frozen"))
	if err != nil {
		return err
	}
	woken := wakeLeft(notes, log)
	defer func() { <-woken }()
	store, err := openStore(c, log)
	if err != nil {
		return err
	}
	id, err := storeID(c.StateDir)
	if err != nil {
		return errors.Join(err, store.Close())
	}
	c.Groups = begun(c.Groups, store, log)
	keepers, err := newKeepers(store, c, notes, newMetrics(store), log)
	if err != nil {
		return errors.Join(err, store.Close())
	}
	exports := newExports(store)
	// What stands on the past holds it before anything is forgotten.
	scratches, err := newScratches(c.StateDir, store, exports, 2*store.KeepFree(), log)
	if err == nil {
		err = scratches.load()
	}
	if err != nil {
		return errors.Join(err, store.Close())
	}
	rollbacks, err := newRollbacks(c.StateDir, store, exports, log)
	if err != nil {
		return errors.Join(err, scratches.stop(), store.Close())
	}
	keepers.marking = rollbacks.mark
	unfinished, err := rollbacks.unfinished()
	if err != nil {
		return errors.Join(err, scratches.stop(), store.Close())
	}
	ls, err := listen(c)
	if err != nil {
		return errors.Join(err, scratches.stop(), store.Close())
	}
	log.Info("serving", zap.String("version", build.Version()), zap.Duration("after", time.Since(began)),
		zap.Strings("nbd", ls.names), zap.String("api", c.API))

	stopping, stopServing := context.WithCancel(context.Background())
	defer stopServing()
	eg, serving := errgroup.WithContext(stopping)
	attached := newAttachments(serving, id, exports, log)
	attached.load()

	// The store's work goes on until the last client is gone.
	work, stopWork := context.WithCancel(context.Background())
	defer stopWork()
	storeDone := make(chan error, 1)
	go func() { storeDone <- store.Run(work) }()

	re := &reloader{read: read, store: store, keepers: keepers, log: log, now: c}
	re.setGroups(c.Groups)
	scratches.adopt = re
	repl, err := newReplication(c, id, store, exports, re, log)
	if err != nil {
		// Nothing is served yet.
		stopWork()
		return errors.Join(err, <-storeDone, ls.close(), scratches.stop(), store.Close())
	}
	re.reloaded = repl.reconcileSoon
	scrub := newScrubber(store, c.Scrub, repl, log)
	ls.serve(serving, eg, &control{store: store, keepers: keepers, reloader: re, exports: exports, rollbacks: rollbacks, attached: attached, replication: repl, scrubber: scrub, serving: serving,
		stateDir: c.StateDir, storeID: id, nbd: ls.names, log: log}, tlsConf)
	scratches.start()
	eg.Go(func() error { return scratches.janitor(serving) })
	for _, finish := range unfinished {
		eg.Go(func() error {
			finish(serving)
			return nil
		})
	}
	eg.Go(func() error { return keepers.run(serving, woken) })
	eg.Go(func() error { return reloadOn(serving, hup, re) })
	eg.Go(func() error { return repl.run(serving, ls) })
	eg.Go(func() error { return scrub.run(serving) })
	notify(log, daemon.SdNotifyReady)
	served := make(chan error, 1)
	go func() {
		err := eg.Wait()
		attached.wait()
		served <- err
	}()
	caughtUp := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(caughtUp)
		notify(log, daemon.SdNotifyStopping)
		log.Info("stopping: applying what is journaled, still serving")
		store.CatchUp()
		stopServing()
	})
	select {
	case err = <-served:
	case err := <-storeDone:
		// The index is beyond use, and whoever needs it may hang: end here.
		// Recovery has all that was acknowledged.
		return err
	}
	if !stop() {
		<-caughtUp
	}
	rollbacks.close()
	err = errors.Join(err, scratches.stop())
	stopWork()
	if serr := <-storeDone; serr != nil {
		return errors.Join(err, serr)
	}
	log.Info("stopping: applying the rest")
	if err := errors.Join(err, store.Close()); err != nil {
		return err
	}
	log.Info("stopped")
	return nil
}

func notify(log *zap.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("notify systemd", zap.Error(err))
	}
}

func openStore(c config.Config, log *zap.Logger) (*journal.Store, error) {
	var groups []journal.GroupConfig
	for _, name := range slices.Sorted(maps.Keys(c.Groups)) {
		groups = append(groups, groupConfig(name, c.Groups[name]))
	}
	return journal.Open(c.StateDir, groups, journal.Options{
		Log: log, SegmentSize: int64(c.Journal.Segment), Limit: int64(c.Journal.Limit), Total: int64(c.Journal.Total), Reserve: int64(c.Journal.Reserve),
		Unapplied: int64(c.Journal.Unapplied), IndexCache: int64(c.Journal.IndexCache),
		CompactPace: readPace(*c.Compact.Rate), CompactAfter: time.Duration(*c.Compact.After),
	})
}

// begun are the groups without those that come from another daemon and of which nothing has come yet.
func begun(groups map[string]config.Group, store *journal.Store, log *zap.Logger) map[string]config.Group {
	groups = maps.Clone(groups)
	maps.DeleteFunc(groups, func(name string, g config.Group) bool {
		_, err := store.Group(name)
		if err != nil && g.Received {
			log.Info("a group that comes from another daemon has not begun", zap.String("group", name))
		}
		return err != nil && g.Received
	})
	return groups
}

// storeID is what tells a state directory from every other one: what was copied from a journal belongs to that journal alone.
func storeID(dir string) (string, error) {
	path := filepath.Join(dir, "id")
	b, err := os.ReadFile(path)
	if err == nil && len(b) == 33 {
		return string(b[:32]), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("the state directory's identity: %w", err)
	}
	id := strings.ToLower(rand.Text() + rand.Text())[:32]
	if err := writeDurable(path, []byte(id+"\n")); err != nil {
		return "", fmt.Errorf("the state directory's identity: %w", err)
	}
	return id, nil
}

// reloadOn reloads with each signal until ctx ends. Errors are told in the log, as there is nobody else.
func reloadOn(ctx context.Context, hup <-chan os.Signal, re *reloader) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hup:
			if _, err := re.reload(); err != nil {
				re.log.Error("reload", zap.Error(err))
			} // each change was logged where it was made
		}
	}
}

// listeners are the daemon's sockets.
type listeners struct {
	nbd     []net.Listener
	api     net.Listener
	metrics net.Listener // nil: on the control socket only

	replication net.Listener // nil: peers do not dial
	names       []string
}

// listen opens the sockets, or takes them from systemd: sockets named "api" and
// "nbd" in their units' FileDescriptorName stand for the unix sockets configured.
func listen(c config.Config) (*listeners, error) {
	var ls listeners
	given, err := activation.ListenersWithNames()
	if err != nil {
		return nil, fmt.Errorf("sockets from systemd: %w", err)
	}
	for name, l := range given {
		switch name {
		case "api":
			ls.api = l[0]
		case "nbd":
			ls.nbd = l
		default:
			return nil, fmt.Errorf("systemd passed a socket named %q: FileDescriptorName must be nbd or api", name)
		}
	}
	if ls.api == nil {
		if ls.api, err = listenOn(c.API, ""); err != nil {
			return nil, err
		}
	}
	fromSystemd := len(ls.nbd) > 0
	for _, spec := range c.NBD {
		if network, _, _ := config.ParseListen(spec); fromSystemd && network == "unix" {
			continue
		}
		l, err := listenOn(spec, c.SocketGroup)
		if err != nil {
			return nil, errors.Join(err, ls.close())
		}
		ls.nbd = append(ls.nbd, l)
	}
	if c.Metrics != "" {
		if ls.metrics, err = listenOn(c.Metrics, ""); err != nil {
			return nil, errors.Join(err, ls.close())
		}
	}
	if c.Replication.Listen != "" {
		if ls.replication, err = listenOn(c.Replication.Listen, ""); err != nil {
			return nil, errors.Join(err, ls.close())
		}
	}
	for _, l := range ls.nbd {
		ls.names = append(ls.names, l.Addr().Network()+":"+l.Addr().String())
	}
	return &ls, nil
}

func (ls *listeners) close() error {
	errs := []error{ls.api.Close()}
	for _, l := range ls.nbd {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// listenOn opens one socket. A unix socket that nobody serves any more is replaced; a group that is given may
// connect to it too.
func listenOn(spec, group string) (net.Listener, error) {
	network, addr, err := config.ParseListen(spec)
	if err != nil {
		return nil, err
	}
	if network == "unix" {
		if err := os.MkdirAll(filepath.Dir(addr), 0o755); err != nil {
			return nil, err
		}
		if c, err := net.DialTimeout("unix", addr, time.Second); err == nil {
			_ = c.Close()
			return nil, fmt.Errorf("listen on %s: another process serves it", spec)
		}
		if err := removeSocket(addr); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", spec, err)
		}
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", spec, err)
	}
	if network == "unix" {
		// Whoever opens these sockets has the disks.
		if err := errors.Join(os.Chmod(addr, 0o660), giveTo(addr, group)); err != nil {
			return nil, errors.Join(err, l.Close())
		}
	}
	return l, nil
}

// removeSocket removes what is left of a socket, and nothing else.
func removeSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return errors.New("there is something else than a socket: name another path")
	}
	return os.Remove(path)
}

// giveTo gives a socket to a group of the system's; none if its name is empty.
func giveTo(path, group string) error {
	if group == "" {
		return nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return fmt.Errorf("socket_group: %w", err)
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		return fmt.Errorf("socket_group %s: %w", group, err)
	}
	return os.Chown(path, -1, gid)
}

func (ls *listeners) serve(ctx context.Context, eg *errgroup.Group, c *control, tlsConf tlsConfig) {
	for _, l := range ls.nbd {
		// A client on another host outlives this one: what it was told is
		// written must be.
		remote := l.Addr().Network() != "unix"
		s := &nbd.Server{Exports: c.exports, Log: c.log, Durable: remote}
		if remote {
			s.TLS = tlsConf
			if tlsConf == nil {
				c.log.Warn("whoever reaches this address can read and write every disk: configure tls, or listen on a unix socket",
					zap.String("nbd", l.Addr().String()))
			}
		}
		eg.Go(func() error { return s.Serve(ctx, l) })
	}
	serveHTTP(ctx, eg, ls.api, c.handler())
	if ls.metrics != nil {
		c.log.Info("metrics", zap.String("address", ls.metrics.Addr().String()))
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", c.keepers.metrics.handler())
		serveHTTP(ctx, eg, ls.metrics, mux)
	}
}

// serveHTTP serves calls until ctx ends. A call under way then sees its context end; all calls have
// returned when the group of goroutines has.
func serveHTTP(ctx context.Context, eg *errgroup.Group, l net.Listener, handler http.Handler) {
	var calls sync.WaitGroup
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			calls.Add(1)
			defer calls.Done()
			handler.ServeHTTP(w, r)
		}),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withPeer,
		ReadHeaderTimeout: 10 * time.Second,
	}
	eg.Go(func() error {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve the API: %w", err)
		}
		return nil
	})
	eg.Go(func() error {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := srv.Shutdown(grace); err != nil {
			err = srv.Close() // cut off who does not read
			calls.Wait()
			return err
		}
		return nil
	})
}
