package guestfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/nbd"
)

// Isolated is the way by libguestfs: a small VM of its own opens the volumes, and shows their files by FUSE. An image from a
// guest is hostile input, and the VM stands between it and the host. It takes guestfish and fusermount3; not root.
type Isolated struct {
	// Device opens a volume, with an overlay that is thrown away.
	Device func(v Volume) (nbd.Device, error)
	// Dir is for sockets and mount points; only the user may enter it.
	Dir string
	Log *zap.Logger
}

const (
	// launchTime bounds the start of the VM, and driveTime is what a drive adds to that: under software emulation a start takes half a
	// minute, and every drive a second more.
	launchTime, driveTime = 5 * time.Minute, 3 * time.Second
	// MaxDrives bounds the volumes with file systems that one VM can have.
	MaxDrives = 200
	// maxSocket is how long the path of a unix socket may be.
	maxSocket = 107
)

// Open implements Way. The VM is started by the first Dir.
func (w *Isolated) Open(_ context.Context, volumes []Volume) (Opened, error) {
	for _, tool := range []string{"guestfish", "fusermount3"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("files are shown by way of libguestfs, which takes %s: install it (apt-get install guestmount guestfish libguestfs-xfs fuse3), or use --kernel for guests that are trusted", tool)
		}
	}
	if n := len(w.Dir) + len("/vm1234567890/nbd"); n > maxSocket {
		return nil, fmt.Errorf("the directory %s has a name that is too long for sockets in it: choose another one (TMPDIR)", w.Dir)
	}
	o := &isolatedOpened{w: w, volumes: map[string]Volume{}, places: map[string]string{}, failed: map[string]string{}, broken: make(chan struct{})}
	for _, v := range volumes {
		o.volumes[v.Name] = v
		if v.Unsupported() == nil {
			o.drives = append(o.drives, v)
		}
	}
	if len(o.drives) > MaxDrives {
		return nil, fmt.Errorf("%d volumes with file systems: at most %d are shown at once", len(o.drives), MaxDrives)
	}
	return o, nil
}

type isolatedOpened struct {
	w       *Isolated
	volumes map[string]Volume
	drives  []Volume // those that the VM has, in order

	once   sync.Once
	broken chan struct{}           // closed by Break
	vm     atomic.Pointer[program] // while it starts, run sees to broken

	mu     sync.Mutex // guards what follows; held while the VM starts
	tried  bool
	err    error             // why there is no VM
	places map[string]string // by volume: its directory under dir
	failed map[string]string // by volume: why it could not be mounted
	dir    string            // of the socket and the mount point
	stop   []func() error    // in the order in which they were begun
}

// Dir implements Opened.
func (o *isolatedOpened) Dir(ctx context.Context, volume string) (string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	v, ok := o.volumes[volume]
	if !ok {
		return "", fmt.Errorf("volume %q: %w", volume, os.ErrNotExist)
	}
	if err := v.Unsupported(); err != nil {
		return "", err
	}
	if !o.tried {
		o.tried = true
		if o.err = o.launch(ctx); o.err != nil {
			o.err = errors.Join(fmt.Errorf("libguestfs: %w", o.err), o.end())
			o.once.Do(func() { close(o.broken) }) // another time it may start
		}
	}
	if o.err != nil {
		return "", o.err
	}
	if why, ok := o.failed[volume]; ok {
		return "", fmt.Errorf("volume %s (%s): it can not be mounted: %s", volume, v.FS.Type, why)
	}
	place, ok := o.places[volume]
	if !ok {
		return "", fmt.Errorf("volume %s: it is not mounted", volume)
	}
	return filepath.Join(o.dir, "mnt", place), nil
}

// drives are the exports that the VM reads, by number.
type drives struct{ o *isolatedOpened }

func (e drives) List() []string { return nil }

func (e drives) Open(name string) (nbd.Device, error) {
	for i, v := range e.o.drives {
		if name == fmt.Sprint(i) {
			return e.o.w.Device(v)
		}
	}
	return nil, os.ErrNotExist
}

// launch serves the drives on a socket, and starts the VM on them.
func (o *isolatedOpened) launch(ctx context.Context) (err error) {
	if o.dir, err = os.MkdirTemp(o.w.Dir, "vm"); err != nil {
		return err
	}
	o.stop = append(o.stop, func() error { return os.RemoveAll(o.dir) })
	mnt := filepath.Join(o.dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		return err
	}
	sock := filepath.Join(o.dir, "nbd")
	if err := o.serve(sock); err != nil {
		return err
	}
	return o.run(ctx, sock, mnt)
}

func (o *isolatedOpened) serve(sock string) error {
	l, err := net.Listen("unix", sock)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &nbd.Server{Exports: drives{o}, Log: o.w.Log}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, l) }()
	o.stop = append(o.stop, func() error {
		cancel()
		return <-served
	})
	return nil
}

// driveName is how the VM names its nth drive.
func driveName(n int) string {
	if n < 26 {
		return "/dev/sd" + string(rune('a'+n))
	}
	return "/dev/sd" + string(rune('a'+n/26-1)) + string(rune('a'+n%26))
}

// script has guestfish mount each drive, say which it could, and show them.
func (o *isolatedOpened) script(mnt string) string {
	var b strings.Builder
	b.WriteString("run\n")
	for i, v := range o.drives {
		options := strings.Join(append([]string{"ro", "nosuid", "nodev", "noexec"}, mountOptions(v.FS.Type)...), ",")
		if v.FS.Type == TypeNTFS {
			// The probe's answer counts: a mount that is read-only looks at no journal.
			options = "ro,norecover"
			fmt.Fprintf(&b, "echo probe %d\n-ntfs-3g-probe true %s\n", i, driveName(i))
		}
		fmt.Fprintf(&b, "mkmountpoint /%d\n-mount-vfs %s %s %s /%d\n", i, options, driver(v.FS.Type), driveName(i), i)
	}
	fmt.Fprintf(&b, "mountpoints\necho mounted\nmount-local \"%s\" options:use_ino\nmount-local-run\n", strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(mnt))
	return b.String()
}

// run starts guestfish and waits until it shows the files.
func (o *isolatedOpened) run(ctx context.Context, sock, mnt string) error {
	var args []string
	for i := range o.drives {
		args = append(args, "--format=raw", "-a", fmt.Sprintf("nbd:///%d?socket=%s", i, url.QueryEscape(sock)))
	}
	cmd := exec.Command("guestfish", args...)
	cmd.Env = append(os.Environ(), "LIBGUESTFS_BACKEND="+backend())
	if os.Getenv("LIBGUESTFS_TMPDIR") == "" {
		// One that is killed removes nothing: what it has in files goes with the directory. Its socket stands elsewhere.
		cmd.Env = append(cmd.Env, "LIBGUESTFS_TMPDIR="+o.dir)
	}
	cmd.Stdin = strings.NewReader(o.script(mnt))
	out, stdout, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd.Stdout = stdout
	vm, err := start(cmd)
	if err := errors.Join(err, stdout.Close()); err != nil {
		return errors.Join(err, out.Close())
	}
	o.vm.Store(vm)
	said := make(chan []string, 1)
	read := make(chan struct{})
	go func() {
		defer close(read)
		said <- readMounts(out)
		_, _ = io.Copy(io.Discard, out)
	}()
	o.stop = append(o.stop, func() error {
		err := vm.unmount(mnt)
		_ = out.Close() // it ends the reading
		<-read
		return err
	})
	launched, cancel := context.WithTimeout(ctx, launchTime+time.Duration(len(o.drives))*driveTime)
	defer cancel()
	for shown, noted := false, false; !shown || !noted; {
		select {
		case lines := <-said:
			noted = true
			o.note(lines, vm.stderr.String())
		case <-vm.ended:
			return fmt.Errorf("guestfish ended: %w: %s", vm.err, &vm.stderr)
		case <-o.broken:
			return ErrEnded
		case <-launched.Done():
			return fmt.Errorf("the VM does not start: %w", launched.Err())
		case <-time.After(20 * time.Millisecond):
			shown = mounted(mnt)
		}
	}
	return nil
}

// backend runs QEMU directly, without libvirt, unless the user has chosen.
func backend() string {
	if b := os.Getenv("LIBGUESTFS_BACKEND"); b != "" {
		return b
	}
	return "direct"
}

// readMounts reads what guestfish says is mounted.
func readMounts(r io.Reader) (lines []string) {
	for s := bufio.NewScanner(r); s.Scan() && s.Text() != "mounted"; {
		lines = append(lines, s.Text())
	}
	return lines
}

// note takes down which drives are mounted, and of the others why not.
func (o *isolatedOpened) note(lines []string, stderr string) {
	for i, v := range o.drives {
		if v.FS.Type == TypeNTFS {
			if k := slices.Index(lines, fmt.Sprintf("probe %d", i)); k < 0 || k+1 >= len(lines) || lines[k+1] != "0" {
				o.failed[v.Name] = ErrStale.Error() + ": its journal is not empty, or Windows is hibernated on it"
				continue
			}
		}
		place := fmt.Sprintf("/%d", i)
		for _, line := range lines {
			if _, at, ok := strings.Cut(line, ": "); ok && at == place {
				o.places[v.Name] = place
			}
		}
		if _, ok := o.places[v.Name]; !ok {
			why := "no reason was given"
			for _, line := range strings.Split(stderr, "\n") {
				if strings.Contains(line, driveName(i)+" ") {
					why = strings.TrimSpace(line)
				}
			}
			o.failed[v.Name] = why
		}
	}
}

// end stops what was begun, the last first.
func (o *isolatedOpened) end() error {
	var errs []error
	for i := len(o.stop) - 1; i >= 0; i-- {
		errs = append(errs, o.stop[i]())
	}
	o.stop = nil
	return errors.Join(errs...)
}

// Err implements Opened.
func (o *isolatedOpened) Err() error {
	select {
	case <-o.broken:
		return ErrEnded
	default:
	}
	vm := o.vm.Load()
	if vm == nil {
		return nil
	}
	select {
	case <-vm.ended:
		return fmt.Errorf("the VM has ended: %w: %s", errors.Join(vm.err, ErrEnded), &vm.stderr)
	default:
		return nil
	}
}

// Break implements Opened: it kills the VM.
func (o *isolatedOpened) Break() {
	o.once.Do(func() { close(o.broken) })
	if vm := o.vm.Load(); vm != nil {
		vm.kill()
	}
}

// Close implements Opened.
func (o *isolatedOpened) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.tried, o.err = true, ErrEnded
	return o.end()
}
