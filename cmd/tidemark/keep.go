package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/cmd/internal/build"
	"github.com/tidemark-cdp/tidemark/restore/guestfs"
)

// The start of a VM takes seconds, so that one is kept for the next command about the same moment. It belongs to a process of its
// own, the keeper, which is this program with a verb that is not listed. Commands find it by a socket, in a directory that only
// the user can enter. It has one user at a time: a VM that hangs is ended for who gives it up, and for nobody else. It ends some time after
// its last user, and at once when the daemon or its VM does.

const (
	// maxKept bounds the keepers of a user.
	maxKept = 4
	// helloTime is how long a keeper may take to answer a connection.
	helloTime = time.Second
	// firstTime is how long it waits for its first user, at least.
	firstTime = 10 * time.Second
	// lockTime is how long a command waits for others that start keepers, before it does without.
	lockTime = 15 * time.Second
)

// startRequest is what a keeper reads from its input.
type startRequest struct {
	place
	Dir  string // for its socket, and what it needs in files
	Name string // of the moment
	Idle time.Duration
}

// question is what a user asks.
type question struct {
	Volume string        `json:",omitempty"` // where its files are
	Idle   time.Duration `json:",omitempty"` // how long the VM is to be kept behind this user
	Break  bool          `json:",omitempty"` // the VM is to end
}

// answer is what a process of this program's answers another one. The keeper's has its socket, to its start; nothing, to a connection; and
// a directory, to a question for a volume.
type answer struct {
	Path  string `json:",omitempty"`
	Error string `json:",omitempty"`
}

// errTaken says that all keepers that there may be have other users, which is nothing to be told.
var errTaken = errors.New("all that are kept are in use")

// keptWay is the way by a VM that a keeper has.
type keptWay struct {
	place place
	idle  time.Duration
	own   *guestfs.Isolated // where none can be kept: the command does not depend on it
	warn  func(error)
}

// Open implements guestfs.Way.
func (w *keptWay) Open(ctx context.Context, volumes []guestfs.Volume) (guestfs.Opened, error) {
	o, err := w.kept(ctx)
	switch {
	case err == nil:
		return o, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case !errors.Is(err, errTaken):
		w.warn(fmt.Errorf("the VM is not kept for the next command: %w", err))
	}
	return w.own.Open(ctx, volumes)
}

func (w *keptWay) kept(ctx context.Context) (*keptOpened, error) {
	dir, err := keptDir()
	if err != nil {
		return nil, err
	}
	name, err := w.place.name()
	if err != nil {
		return nil, err
	}
	if o, err := findKept(dir, name); o != nil || err != nil {
		return o.keptFor(w.idle, err)
	}
	// One at a time counts keepers and starts them.
	lock, err := lockWithin(ctx, filepath.Join(dir, "lock"), lockTime)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if o, err := findKept(dir, name); o != nil || err != nil { // one that was started meanwhile
		return o.keptFor(w.idle, err)
	}
	all, err := sweep(dir)
	if err != nil {
		return nil, err
	}
	if len(all) >= maxKept && !endIdle(all) {
		return nil, errTaken
	}
	sock, err := startKeeper(ctx, startRequest{w.place, dir, name, w.idle})
	if err != nil {
		return nil, err
	}
	o, err := dialKept(sock)
	return o.keptFor(w.idle, err)
}

// keptFor says how long the VM is to be kept behind this user.
func (o *keptOpened) keptFor(idle time.Duration, err error) (*keptOpened, error) {
	if err == nil {
		if err = o.send(question{Idle: idle}); err == nil {
			return o, nil
		}
		_ = o.Close() // it has ended
	}
	if notThere(err) {
		err = errTaken // somebody else was faster
	}
	return nil, err
}

// name is one for all that makes a VM what it is.
func (p place) name() (string, error) {
	ns, err := os.Readlink("/proc/self/ns/mnt") // what another one shows can not be seen
	if err != nil {
		return "", err
	}
	env := slices.DeleteFunc(os.Environ(), func(s string) bool { return !strings.HasPrefix(s, "LIBGUESTFS_") && !strings.HasPrefix(s, "SUPERMIN_") })
	slices.Sort(env)
	b, err := json.Marshal([]any{build.Version(), ns, env, p})
	return fmt.Sprintf("%x", sha256.Sum256(b))[:12], err
}

// keptDir is the directory with the user's keepers.
func keptDir() (string, error) {
	dir, err := filepath.Abs(filepath.Join(os.TempDir(), fmt.Sprintf("tidemark-%d", os.Geteuid())))
	if err != nil {
		return "", err
	}
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

// lockFile locks a file, which it makes if there is none; its end is the lock's. Another's lock is EWOULDBLOCK.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f, nil
}

func lockWithin(ctx context.Context, path string, limit time.Duration) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		f, err := lockFile(path)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// A keeper's files in the directory are NAME.PID.sock, NAME.PID.sock.lock, which it has locked as long as it lives and touches when it becomes
// idle, and NAME.PID.d, a directory.
const lockSuffix = ".sock.lock"

// sweep finds the sockets of the keepers that live, the longest idle first, and removes what others have left that were killed.
func sweep(dir string) (socks []string, err error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	touched := map[string]time.Time{}
	for _, e := range files {
		base, is := strings.CutSuffix(e.Name(), lockSuffix)
		if !is {
			continue
		}
		path := filepath.Join(dir, e.Name())
		f, err := lockFile(path)
		if errors.Is(err, unix.EWOULDBLOCK) {
			sock := strings.TrimSuffix(path, ".lock")
			socks = append(socks, sock)
			if info, err := e.Info(); err == nil {
				touched[sock] = info.ModTime()
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, left := range files {
			if strings.HasPrefix(left.Name(), base+".") && left.IsDir() {
				removeMoment(filepath.Join(dir, left.Name()))
			}
		}
		// One that ends in order removes them itself.
		_, _ = os.Remove(strings.TrimSuffix(path, ".lock")), os.Remove(path)
		if err := f.Close(); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(socks, func(a, b string) int { return touched[a].Compare(touched[b]) })
	return socks, nil
}

// removeMoment removes the directory of a keeper that was killed. Its VM has ended with it.
func removeMoment(dir string) {
	vms, err := os.ReadDir(dir)
	for _, vm := range vms {
		_ = exec.Command("fusermount3", "-u", "-z", filepath.Join(dir, vm.Name(), "mnt")).Run() // most have none
	}
	if err == nil {
		_ = os.RemoveAll(dir) // the next one tries again
	}
}

// endIdle ends one of some keepers that nobody uses.
func endIdle(socks []string) bool {
	for _, sock := range socks {
		if o, err := dialKept(sock); err == nil {
			o.Break()
			return o.Close() == nil
		}
	}
	return false
}

// startKeeper starts one, and returns when it listens.
func startKeeper(ctx context.Context, r startRequest) (sock string, err error) {
	cmd := exec.Command("/proc/self/exe", "keep-moment")
	cmd.Args[0] = "tidemark"
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Dir(r.Dir))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	// What this process was given (a lock, a pipe) is not the keeper's, which lives longer.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return "", fmt.Errorf("close_range: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("start a process for it: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })()
	var a answer
	if err := errors.Join(json.NewEncoder(in).Encode(r), json.NewDecoder(out).Decode(&a)); err != nil {
		return "", errors.Join(fmt.Errorf("start a process for it: %w", err), cmd.Process.Kill(), cmd.Wait())
	}
	if a.Error != "" {
		_ = cmd.Wait() // it has said why
		return "", errors.New(a.Error)
	}
	return a.Path, errors.Join(in.Close(), out.Close())
}

// findKept finds a keeper of a moment that nobody uses; nil: there is none.
func findKept(dir, name string) (*keptOpened, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range files {
		if strings.HasPrefix(e.Name(), name+".") && strings.HasSuffix(e.Name(), ".sock") {
			if o, err := dialKept(filepath.Join(dir, e.Name())); !notThere(err) {
				return o, err
			}
		}
	}
	return nil, nil
}

// notThere reports whether there is no keeper, or one that is in use, about to end, or does not answer.
func notThere(err error) bool {
	for _, e := range []error{syscall.ENOENT, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, io.EOF, os.ErrDeadlineExceeded} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// keptOpened is volumes that a keeper shows.
type keptOpened struct {
	conn    *net.UnixConn
	answers chan answer
	done    chan struct{} // closed when the connection has ended

	ask sync.Mutex // one question at a time
	mu  sync.Mutex // guards writes to conn
}

// dialKept finds the keeper at a socket. It is in use until the connection is closed.
func dialKept(sock string) (*keptOpened, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: sock, Net: "unix"})
	if err != nil {
		return nil, err
	}
	o := &keptOpened{conn: c, answers: make(chan answer), done: make(chan struct{})}
	dec := json.NewDecoder(c)
	var hello answer
	if err := errors.Join(c.SetReadDeadline(time.Now().Add(helloTime)), dec.Decode(&hello), c.SetReadDeadline(time.Time{})); err != nil {
		return nil, errors.Join(fmt.Errorf("what keeps the VM: %w", err), c.Close())
	}
	go func() {
		defer close(o.done)
		for {
			var a answer
			if dec.Decode(&a) != nil {
				return
			}
			select {
			case o.answers <- a:
			case <-time.After(helloTime): // who asked has gone
				return
			}
		}
	}()
	return o, nil
}

func (o *keptOpened) send(q question) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return json.NewEncoder(o.conn).Encode(q)
}

// Dir implements guestfs.Opened.
func (o *keptOpened) Dir(ctx context.Context, volume string) (string, error) {
	o.ask.Lock()
	defer o.ask.Unlock()
	if err := o.send(question{Volume: volume}); err != nil {
		return "", errors.Join(o.Err(), err)
	}
	select {
	case a := <-o.answers:
		if a.Error != "" {
			return "", errors.New(a.Error)
		}
		return a.Path, nil
	case <-o.done:
		return "", guestfs.ErrEnded
	case <-ctx.Done():
		o.Break() // an answer that comes now would be taken for the next one's
		return "", ctx.Err()
	}
}

// Err implements guestfs.Opened.
func (o *keptOpened) Err() error {
	select {
	case <-o.done:
		return guestfs.ErrEnded
	default:
		return nil
	}
}

// Break implements guestfs.Opened: it ends the keeper, and its VM.
func (o *keptOpened) Break() {
	_ = o.send(question{Break: true}) // it may have ended
	_ = o.conn.CloseRead()            // who waits for an answer gets none
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
			var r startRequest
			if err := json.NewDecoder(os.Stdin).Decode(&r); err != nil {
				return err
			}
			return keep(cmd.Context(), r, func(a answer) error {
				return errors.Join(json.NewEncoder(os.Stdout).Encode(a), os.Stdout.Close())
			})
		},
	}
}

// keep keeps a moment until it is idle, of no use, or ctx ends. Before, it says where it listens, or why it does not.
func keep(ctx context.Context, r startRequest, say func(answer) error) (err error) {
	var stop stops
	defer func() { err = errors.Join(err, stop.run()) }()
	base := fmt.Sprintf("%s.%d", r.Name, os.Getpid())
	k, err := openKeeper(ctx, r, base, &stop)
	if err != nil {
		return errors.Join(err, say(answer{Error: err.Error()}))
	}
	if err := say(answer{Path: k.l.Addr().String()}); err != nil {
		return errors.Join(err, k.l.Close())
	}
	return k.run(ctx)
}

func openKeeper(ctx context.Context, r startRequest, base string, stop *stops) (*keeper, error) {
	lock, err := lockFile(filepath.Join(r.Dir, base+lockSuffix))
	if err != nil {
		return nil, err
	}
	stop.add(func() error { return errors.Join(os.Remove(lock.Name()), lock.Close()) })
	dir := filepath.Join(r.Dir, base+".d")
	m, err := look(ctx, r.place, func() (string, error) { return dir, os.Mkdir(dir, 0o700) })
	if err != nil {
		return nil, err
	}
	stop.add(m.Close)
	if m.opened, err = m.isolated().Open(ctx, m.layout.Volumes); err != nil {
		return nil, err
	}
	m.stop.add(m.opened.Close)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(r.Dir, base+".sock"), Net: "unix"})
	return &keeper{m: m, l: l, lock: lock.Name(), keep: r.Idle}, err
}

// keeper is a moment that one command after the other uses.
type keeper struct {
	m    *moment
	l    *net.UnixListener
	lock string             // a file, touched when it becomes idle; "": none
	idle *time.Timer        // runs while there is no user
	end  context.CancelFunc // ends run

	mu   sync.Mutex    // guards what follows
	keep time.Duration // how long it goes on without a user
	used bool
	user int32 // a process; 0: it is not known
}

// run serves until the keeper's end, and closes the listener. The moment is the caller's to close.
func (k *keeper) run(ctx context.Context) (err error) {
	ctx, k.end = context.WithCancel(ctx)
	defer k.end()
	var unused atomic.Bool
	k.idle = time.AfterFunc(max(k.keep, firstTime), func() {
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

// watch ends the keeper when its moment is of no use any more, or its user has ended and does not go: a thread of that one waits for a file,
// and keeps the connection open.
func (k *keeper) watch(ctx context.Context) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			k.mu.Lock()
			user := k.user
			k.mu.Unlock()
			if k.m.Err() != nil || user != 0 && ended(user) {
				k.end()
			}
		}
	}
}

// ended reports whether a process is a zombie.
func ended(pid int32) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false // its connection is closed
	}
	_, state, _ := strings.Cut(string(b[max(0, strings.LastIndexByte(string(b), ')')):]), ") ")
	return strings.HasPrefix(state, "Z") || strings.HasPrefix(state, "X")
}

func (k *keeper) accept(ctx context.Context, served *sync.WaitGroup) {
	for {
		c, err := k.l.AcceptUnix()
		if err != nil {
			k.end()
			return
		}
		if !k.enter(peer(c)) {
			_ = c.Close() // it looks for another
			continue
		}
		served.Go(func() {
			defer context.AfterFunc(ctx, func() { _ = c.Close() })()
			k.serve(ctx, c)
		})
	}
}

// peer is the process at the other end; 0: it is not known.
func peer(c *net.UnixConn) (pid int32) {
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				pid = cred.Pid
			}
		})
	}
	return pid
}

// enter makes somebody the user. A keeper in use, one that is about to end, and one whose moment is of no use, has none.
func (k *keeper) enter(pid int32) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.used || k.m.Err() != nil || !k.idle.Stop() {
		return false
	}
	k.used, k.user = true, pid
	return true
}

func (k *keeper) leave() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.used, k.user = false, 0
	if k.m.Err() != nil {
		k.end()
		return
	}
	if now := time.Now(); k.lock != "" {
		_ = os.Chtimes(k.lock, now, now) // it says who is idle the longest, and no more
	}
	k.idle.Reset(k.keep)
}

// serve answers the user.
func (k *keeper) serve(ctx context.Context, c *net.UnixConn) {
	var asked sync.WaitGroup
	defer k.leave()
	defer asked.Wait()
	ctx, gone := context.WithCancel(ctx)
	defer gone()
	defer c.Close()
	dec, enc := json.NewDecoder(c), json.NewEncoder(c)
	if enc.Encode(answer{}) != nil {
		return
	}
	for {
		var q question
		if dec.Decode(&q) != nil {
			return
		}
		k.mu.Lock()
		if q.Idle > 0 {
			k.keep = q.Idle
		}
		k.mu.Unlock()
		if q.Break {
			k.end()
			return
		}
		if q.Volume == "" {
			continue
		}
		// An answer may take the start of the VM. Who gives up does not wait.
		asked.Wait()
		asked.Go(func() { _ = enc.Encode(k.find(ctx, q.Volume)) }) // the user may be gone
	}
}

// find answers where a volume's files are.
func (k *keeper) find(ctx context.Context, volume string) (a answer) {
	dir, err := k.m.opened.Dir(ctx, volume)
	if err == nil {
		err = k.m.Err()
	}
	if a.Path = dir; err != nil {
		a = answer{Error: err.Error()}
	}
	return a
}
