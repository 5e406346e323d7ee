package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/restore/guestfs"
)

// The start of a VM takes seconds, so that one is kept for the next command about the same moment. It belongs to a process of its
// own, the keeper, which is this program with a verb that is not listed. Commands find it by a socket, in a directory that only
// the user can enter; it ends some time after its last user, and at once when the daemon or its VM does.

const (
	// maxKept bounds the keepers of a user; with more, a command's VM ends with it.
	maxKept = 4
	// helloTime is how long a keeper may take to answer a connection, before another is started.
	helloTime = 10 * time.Second
)

// keepRequest is what a keeper reads from its input.
type keepRequest struct {
	place
	Dir  string // for its socket
	Idle time.Duration
}

// keptRequest is what a user asks of it: where a volume's files are, or that it ends as soon as nobody else uses it: it hangs.
type keptRequest struct {
	Volume string `json:",omitempty"`
	Break  bool   `json:",omitempty"`
}

// keptAnswer is what it answers: with its socket to its start, with nothing to a connection, with a directory to a question for a volume.
type keptAnswer struct {
	Path  string `json:",omitempty"`
	Error string `json:",omitempty"`
}

// keptWay is the way by a VM that a keeper has.
type keptWay struct {
	place place
	idle  time.Duration
	own   *guestfs.Isolated // where there are too many
}

// Open implements guestfs.Way.
func (w *keptWay) Open(ctx context.Context, volumes []guestfs.Volume) (guestfs.Opened, error) {
	dir, err := keptDir()
	if err != nil {
		return nil, fmt.Errorf("%w (--keep 0 does without)", err)
	}
	if o, err := findKept(dir, w.place); o != nil || err != nil {
		return o, err
	}
	// One at a time counts keepers and starts them.
	lock, err := lockFile(filepath.Join(dir, "lock"), 0)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if o, err := findKept(dir, w.place); o != nil || err != nil {
		return o, err
	}
	if n, err := sweep(dir); err != nil {
		return nil, err
	} else if n >= maxKept {
		return w.own.Open(ctx, volumes)
	}
	sock, err := startKeeper(keepRequest{w.place, dir, w.idle})
	if err != nil {
		return nil, err
	}
	return dialKept(sock)
}

// hash is a name for what is read from a place.
func (p place) hash() string {
	b, _ := json.Marshal(p) // strings, and a map that is put in order
	return fmt.Sprintf("%x", sha256.Sum256(b))[:16]
}

// keptDir is the directory with the user's keepers.
func keptDir() (string, error) {
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("tidemark-%d", os.Geteuid()))
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return "", fmt.Errorf("%s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Mode&0o77 != 0 || int(st.Uid) != os.Geteuid() {
		return "", fmt.Errorf("%s is not this user's alone", dir)
	}
	return dir, nil
}

// lockFile locks a file that it makes if there is none; its end is the lock's. flags may have LOCK_NB.
func lockFile(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|flags); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}

// sweep counts the keepers, and removes what those have left behind that were killed. Each has its socket's lock as long as it lives.
func sweep(dir string) (alive int, err error) {
	locks, err := filepath.Glob(filepath.Join(dir, "*.sock.lock"))
	if err != nil {
		return 0, err
	}
	for _, path := range locks {
		f, err := lockFile(path, unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			alive++
			continue
		}
		if err != nil {
			return 0, err
		}
		// One that ends in order removes them itself.
		_, _ = os.Remove(strings.TrimSuffix(path, ".lock")), os.Remove(path)
		if err := f.Close(); err != nil {
			return 0, err
		}
	}
	return alive, nil
}

// startKeeper starts one, and returns when it listens.
func startKeeper(r keepRequest) (sock string, err error) {
	cmd := exec.Command("/proc/self/exe", "keep-moment")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("start what keeps the VM: %w", err)
	}
	var a keptAnswer
	if err := errors.Join(json.NewEncoder(in).Encode(r), json.NewDecoder(out).Decode(&a)); err != nil {
		return "", errors.Join(fmt.Errorf("start what keeps the VM: %w", err), cmd.Process.Kill(), cmd.Wait())
	}
	if a.Error != "" {
		_ = cmd.Wait() // it has said why
		return "", errors.New(a.Error)
	}
	return a.Path, errors.Join(in.Close(), out.Close(), cmd.Process.Release())
}

// findKept finds a keeper of what is read from a place; nil: there is none.
func findKept(dir string, p place) (guestfs.Opened, error) {
	socks, err := filepath.Glob(filepath.Join(dir, p.hash()+".*.sock"))
	if err != nil {
		return nil, err
	}
	for _, sock := range socks {
		if o, err := dialKept(sock); !notThere(err) {
			return o, err
		}
	}
	return nil, nil
}

// notThere reports whether there is no keeper, or one that is about to end or does not answer.
func notThere(err error) bool {
	for _, e := range []error{syscall.ENOENT, syscall.ECONNREFUSED, syscall.ECONNRESET, io.EOF, os.ErrDeadlineExceeded} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// keptOpened is volumes that a keeper shows.
type keptOpened struct {
	conn    *net.UnixConn
	answers chan keptAnswer
	done    chan struct{} // closed when the connection has ended

	ask sync.Mutex // one question at a time
	mu  sync.Mutex // guards writes to conn
}

// dialKept finds the keeper at a socket. It counts as used until the connection is closed.
func dialKept(sock string) (guestfs.Opened, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		return nil, err
	}
	o := &keptOpened{conn: c, answers: make(chan keptAnswer), done: make(chan struct{})}
	dec := json.NewDecoder(c)
	var hello keptAnswer
	if err := errors.Join(c.SetReadDeadline(time.Now().Add(helloTime)), dec.Decode(&hello), c.SetReadDeadline(time.Time{})); err != nil {
		return nil, errors.Join(fmt.Errorf("what keeps the VM: %w", err), c.Close())
	}
	go func() {
		defer close(o.done)
		for {
			var a keptAnswer
			if dec.Decode(&a) != nil {
				return
			}
			o.answers <- a // somebody has asked
		}
	}()
	return o, nil
}

func (o *keptOpened) send(r keptRequest) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return json.NewEncoder(o.conn).Encode(r)
}

// Dir implements guestfs.Opened.
func (o *keptOpened) Dir(_ context.Context, volume string) (string, error) {
	o.ask.Lock()
	defer o.ask.Unlock()
	if err := o.send(keptRequest{Volume: volume}); err != nil {
		return "", errors.Join(o.Err(), err)
	}
	select {
	case a := <-o.answers:
		if a.Error != "" {
			return "", errors.New(a.Error)
		}
		return a.Path, nil
	case <-o.done:
		return "", o.Err()
	}
}

// Err implements guestfs.Opened.
func (o *keptOpened) Err() error {
	select {
	case <-o.done:
		return fmt.Errorf("what keeps the VM has ended: %w", os.ErrClosed)
	default:
		return nil
	}
}

// Break implements guestfs.Opened: the VM ends if nobody else uses it, or when the last of them leaves.
func (o *keptOpened) Break() {
	_ = o.send(keptRequest{Break: true}) // it may have ended
	_ = o.conn.CloseRead()               // who waits for an answer gets none
}

// Close implements guestfs.Opened. The VM is the next command's.
func (o *keptOpened) Close() error {
	err := o.conn.Close()
	<-o.done
	return err
}

// keepMoment is the keeper's verb.
func (a *app) keepMoment() *cobra.Command {
	return &cobra.Command{
		Use:    "keep-moment",
		Short:  "Keep a VM that shows files, for this program itself",
		Hidden: true,
		Args:   args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var r keepRequest
			if err := json.NewDecoder(os.Stdin).Decode(&r); err != nil {
				return err
			}
			return keep(cmd.Context(), r, func(a keptAnswer) error {
				return errors.Join(json.NewEncoder(os.Stdout).Encode(a), os.Stdout.Close())
			})
		},
	}
}

// keep keeps a moment until it is idle, of no use, or ctx ends. Before, it says where it listens, or why it does not.
func keep(ctx context.Context, r keepRequest, say func(keptAnswer) error) (err error) {
	var stop stops
	defer func() { err = errors.Join(err, stop.run()) }()
	sock := filepath.Join(r.Dir, fmt.Sprintf("%s.%d.sock", r.hash(), os.Getpid()))
	k, err := openKeeper(ctx, r, sock, &stop)
	if err != nil {
		return errors.Join(err, say(keptAnswer{Error: err.Error()}))
	}
	if err := say(keptAnswer{Path: sock}); err != nil {
		return errors.Join(err, k.l.Close())
	}
	return k.run(ctx)
}

func openKeeper(ctx context.Context, r keepRequest, sock string, stop *stops) (*keeper, error) {
	lock, err := lockFile(sock+".lock", unix.LOCK_NB)
	if err != nil {
		return nil, err
	}
	stop.add(func() error { return errors.Join(os.Remove(lock.Name()), lock.Close()) })
	m, err := look(ctx, r.place)
	if err != nil {
		return nil, err
	}
	stop.add(m.Close)
	if m.opened, err = m.isolated().Open(ctx, m.layout.Volumes); err != nil {
		return nil, err
	}
	m.stop.add(m.opened.Close)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: sock, Net: "unix"})
	return &keeper{m: m, l: l, keep: r.Idle}, err
}

// keeper is a moment that several commands use.
type keeper struct {
	m    *moment
	l    *net.UnixListener
	keep time.Duration // how long it goes on without a user
	idle *time.Timer   // runs while there is none
	end  context.CancelFunc

	mu      sync.Mutex // guards what follows
	users   int
	givenUp int  // of them: those who have asked for its end
	ending  bool // somebody has: nobody new comes in
}

// run serves until the keeper's end, and closes the listener. The moment is the caller's to close.
func (k *keeper) run(ctx context.Context) (err error) {
	ctx, k.end = context.WithCancel(ctx)
	defer k.end()
	var unused atomic.Bool
	k.idle = time.AfterFunc(k.keep, func() {
		unused.Store(true)
		k.end()
	})
	defer k.idle.Stop()
	var served sync.WaitGroup
	served.Go(func() { k.accept(ctx, &served) })
	served.Go(func() { k.watch(ctx) })
	<-ctx.Done()
	err = k.l.Close() // from now on a command starts another
	if !unused.Load() {
		k.m.Break() // who uses it gets errors
	}
	served.Wait()
	return err
}

// watch ends the keeper when its moment is of no use any more.
func (k *keeper) watch(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if k.m.Err() != nil {
				k.end()
			}
		}
	}
}

func (k *keeper) accept(ctx context.Context, served *sync.WaitGroup) {
	for {
		c, err := k.l.AcceptUnix()
		if err != nil {
			k.end()
			return
		}
		if !k.enter() {
			_ = c.Close() // it looks for another
			continue
		}
		served.Go(func() {
			defer context.AfterFunc(ctx, func() { _ = c.Close() })()
			k.serve(ctx, c)
		})
	}
}

// enter counts a user. A keeper that is about to end has none.
func (k *keeper) enter() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.users == 0 && !k.idle.Stop() || k.ending {
		return false
	}
	k.users++
	return true
}

func (k *keeper) leave(gaveUp bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.users--
	if gaveUp {
		k.givenUp--
	}
	k.endIfGivenUp()
	if k.users == 0 {
		k.idle.Reset(k.keep)
	}
}

// giveUp ends the keeper for a user, as soon as no other still wants it.
func (k *keeper) giveUp() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.givenUp++
	k.ending = true
	k.endIfGivenUp()
}

func (k *keeper) endIfGivenUp() {
	if k.ending && k.users == k.givenUp {
		k.end()
	}
}

// serve answers a user.
func (k *keeper) serve(ctx context.Context, c *net.UnixConn) {
	var asked sync.WaitGroup
	defer asked.Wait()
	gaveUp := false
	defer func() { k.leave(gaveUp) }()
	defer c.Close()
	dec, enc := json.NewDecoder(c), json.NewEncoder(c)
	if enc.Encode(keptAnswer{}) != nil {
		return
	}
	for {
		var r keptRequest
		if dec.Decode(&r) != nil {
			return
		}
		if r.Break {
			if !gaveUp {
				gaveUp = true
				k.giveUp()
			}
			continue
		}
		// An answer may take the start of the VM. Who gives up does not wait.
		asked.Wait()
		asked.Go(func() {
			var a keptAnswer
			dir, err := k.m.opened.Dir(ctx, r.Volume)
			if a.Path = dir; err != nil {
				a.Error = err.Error()
			}
			_ = enc.Encode(a) // the user may be gone
		})
	}
}
