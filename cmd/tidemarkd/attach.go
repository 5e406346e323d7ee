package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/nbd"
	"github.com/tidemark-cdp/tidemark/nbd/kernel"
)

// attachments are exports that are block devices of this host. The kernel has the list: each device carries the identity of
// this state directory and what it is attached to, and is found by that when the daemon starts anew.
type attachments struct {
	ctx     context.Context // ends when the daemon stops serving
	store   string          // the state directory's identity
	exports *exports
	server  *nbd.Server
	log     *zap.Logger
	wg      sync.WaitGroup // of keepers and connections

	mu  sync.Mutex // guards all; held while a device is attached or a scratch export is promoted
	all map[int]*attachment
}

// attachment is one device. Its keeper alone reconnects it.
type attachment struct {
	d       kernel.Device
	export  string
	asked   string        // the name by which it was asked for
	alive   atomic.Int32  // connections that are served
	lost    chan struct{} // gets a value when one has ended
	dropped chan struct{} // closed when it is detached
}

func newAttachments(ctx context.Context, store string, exports *exports, log *zap.Logger) *attachments {
	return &attachments{ctx: ctx, store: store, exports: exports, server: &nbd.Server{Exports: exports, Log: log}, log: log, all: map[int]*attachment{}}
}

// backendPrefix begins what the kernel is told of a device: the state directory's identity, the export and the name asked for follow, between tabs.
const backendPrefix = "tidemark\t"

func (a *attachments) backend(export, asked string) string {
	return backendPrefix + strings.Join([]string{a.store, export, asked}, "\t")
}

// load reconnects the devices that an earlier daemon has left. What those show that could be reconnected is held when it returns.
func (a *attachments) load() {
	devices, err := kernel.List()
	if err != nil {
		a.log.Warn("attached devices are not found again", zap.Error(err))
	}
	for _, d := range devices {
		f := strings.Split(d.Backend, "\t")
		if !strings.HasPrefix(d.Backend, backendPrefix) || len(f) != 4 || f[1] != a.store {
			continue
		}
		at := newAttachment(f[2], f[3])
		at.d = d
		a.mu.Lock()
		a.all[d.Index] = at
		a.mu.Unlock()
		if err := a.reconnect(at); err != nil {
			a.log.Warn("an attached device is not connected yet", zap.String("device", d.Path()), zap.Error(err))
			at.lose()
		}
		a.wg.Go(func() { a.keep(at) })
	}
}

func newAttachment(export, asked string) *attachment {
	return &attachment{export: export, asked: asked, lost: make(chan struct{}, 1), dropped: make(chan struct{})}
}

func (at *attachment) lose() {
	select {
	case at.lost <- struct{}{}:
	default:
	}
}

// dial makes a connection to this daemon's exports, without a socket that others could reach.
func (a *attachments) dial(at *attachment) kernel.Dial {
	return func(context.Context) (net.Conn, error) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		var ends [2]net.Conn
		for i, fd := range fds {
			f := os.NewFile(uintptr(fd), "attached")
			c, cerr := net.FileConn(f)
			ends[i], err = c, errors.Join(err, cerr, f.Close())
		}
		if err != nil {
			for _, c := range ends {
				if c != nil {
					_ = c.Close()
				}
			}
			return nil, err
		}
		at.alive.Add(1)
		a.wg.Go(func() {
			a.server.ServeConn(a.ctx, ends[0])
			at.alive.Add(-1)
			at.lose()
		})
		return ends[1], nil
	}
}

// reconnect gives a device new connections.
func (a *attachments) reconnect(at *attachment) error {
	if err := a.attachable(at.export); err != nil {
		return err
	}
	return kernel.Reattach(a.ctx, a.dial(at), at.export, at.d)
}

// keep reconnects a device whenever its connections are lost, until it is detached or the daemon stops.
func (a *attachments) keep(at *attachment) {
	log := a.log.With(zap.String("device", at.d.Path()), zap.String("export", at.export))
	wait := time.Duration(0)
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-at.dropped:
			return
		case <-at.lost:
		}
		// One that the kernel did not need ends at once; one that it has lost it may not have noticed.
		select {
		case <-a.ctx.Done():
			return
		case <-at.dropped:
			return
		case <-time.After(wait + 50*time.Millisecond):
		}
		if at.alive.Load() >= kernel.Connections {
			wait = 0
			continue
		}
		if d, err := kernel.Find(at.d.Index); err != nil || d.Backend != at.d.Backend {
			log.Info("the device was disconnected")
			a.drop(at)
			return
		}
		err := a.reconnect(at)
		if err == nil {
			log.Info("the device is connected again")
			wait = min(wait+50*time.Millisecond, time.Second)
			continue
		}
		log.Warn("the device is not connected", zap.Error(err))
		if wait = min(2*wait+100*time.Millisecond, 5*time.Second); a.gone(at) {
			log.Error("what the device shows is gone for good: it is disconnected", zap.Error(kernel.Detach(at.d, true)))
			a.drop(at)
			return
		}
		at.lose()
	}
}

// errLive refuses a live disk: a host can hang on a disk of its own that it writes to.
var errLive = fmt.Errorf("%w: a host can hang on a disk of its own that it writes to: attach what it was, or a scratch export", errBadRequest)

// attachable refuses what is not there, and what is a live disk or becomes one.
func (a *attachments) attachable(export string) error {
	if scratch, _, ok := cutScratch(export); ok && slices.ContainsFunc(a.exports.scratches.status(), func(s api.Scratch) bool { return s.Name == scratch && s.Promotion != nil }) {
		return fmt.Errorf("%q is promoted to a live disk: %w", export, errLive)
	}
	dev, err := a.exports.Open(export)
	if err != nil {
		return err
	}
	if err := dev.Close(); err != nil {
		return err
	}
	if _, is := dev.(*live); is {
		return fmt.Errorf("%q is a live disk: %w", export, errLive)
	}
	return nil
}

// gone reports whether an export will not be there again: a group that is not configured may be again.
func (a *attachments) gone(at *attachment) bool {
	err := a.attachable(at.export)
	if errors.Is(err, errLive) {
		return true
	}
	if scratch, _, ok := cutScratch(at.export); ok {
		return !slices.ContainsFunc(a.exports.scratches.status(), func(s api.Scratch) bool { return s.Name == scratch })
	}
	return errors.Is(err, journal.ErrNoPoint)
}

// whileDetached calls fn, which promotes a scratch export, unless that is attached; and nobody attaches it meanwhile: it becomes a live disk.
func (a *attachments) whileDetached(scratch string, fn func() error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, at := range a.all {
		if name, _, ok := cutScratch(at.export); ok && name == scratch {
			return fmt.Errorf("scratch export %s: %w: it is attached as %s, and would become a live disk of this host's: detach it first", scratch, journal.ErrInUse, at.d.Path())
		}
	}
	return fn()
}

func (a *attachments) drop(at *attachment) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.all[at.d.Index] == at {
		delete(a.all, at.d.Index)
		close(at.dropped)
	}
}

// attach makes devices of exports; all of them, or none.
func (a *attachments) attach(ctx context.Context, r api.AttachRequest) (all []api.Attachment, err error) {
	var made []*attachment
	for _, export := range r.Exports {
		at := newAttachment(export, r.Asked)
		if err = a.attachOne(ctx, at); err != nil {
			break
		}
		made = append(made, at)
		all = append(all, at.status())
	}
	if err == nil {
		return all, nil
	}
	for _, at := range made {
		a.drop(at)
		err = errors.Join(err, kernel.Detach(at.d, true))
	}
	return nil, err
}

func (a *attachments) attachOne(ctx context.Context, at *attachment) (err error) {
	if n, err := record.ParseExportName(at.export); err == nil && !n.Live && n.Point.Form != record.FormLSN {
		return fmt.Errorf("%w: %q may mean another moment when it is connected again: name its LSN", errBadRequest, at.export)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.attachable(at.export); err != nil {
		return err
	}
	if a.ctx.Err() != nil {
		return a.ctx.Err()
	}
	if at.d, err = kernel.Attach(ctx, a.dial(at), at.export, a.backend(at.export, at.asked)); err != nil {
		return err
	}
	if old := a.all[at.d.Index]; old != nil {
		close(old.dropped) // somebody else had detached it
	}
	a.all[at.d.Index] = at
	a.wg.Go(func() { a.keep(at) })
	return nil
}

// detach disconnects the devices that a name means: a device, an export, or what was asked for.
func (a *attachments) detach(name string, force bool) (gone []api.Attachment, err error) {
	a.mu.Lock()
	var found []*attachment
	for _, at := range a.all {
		if slices.Contains([]string{at.d.Path(), strings.TrimPrefix(at.d.Path(), "/dev/"), at.export, at.asked}, name) {
			found = append(found, at)
		}
	}
	a.mu.Unlock()
	if len(found) == 0 {
		return nil, fmt.Errorf("%q: no device is attached to it: %w", name, journal.ErrNotFound)
	}
	slices.SortFunc(found, func(x, y *attachment) int { return x.d.Index - y.d.Index })
	for _, at := range found {
		derr := kernel.Detach(at.d, force)
		if errors.Is(derr, kernel.ErrBusy) {
			derr = fmt.Errorf("%w: %w", journal.ErrInUse, derr)
		}
		if derr != nil && !errors.Is(derr, fs.ErrNotExist) {
			err = errors.Join(err, derr)
			continue
		}
		a.drop(at)
		gone = append(gone, at.status())
	}
	return gone, err
}

func (at *attachment) status() api.Attachment {
	return api.Attachment{Device: at.d.Path(), Export: at.export, Asked: at.asked, Size: at.d.Size, ReadOnly: at.d.ReadOnly, Connected: at.alive.Load() > 0}
}

func (a *attachments) status() []api.Attachment {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := []api.Attachment{}
	for _, at := range a.all {
		all = append(all, at.status())
	}
	slices.SortFunc(all, func(x, y api.Attachment) int { return strings.Compare(x.Device, y.Device) })
	return all
}

// wait returns when the daemon has stopped serving and nothing of it goes on. The devices stay, and wait for the next daemon.
func (a *attachments) wait() { a.wg.Wait() }
