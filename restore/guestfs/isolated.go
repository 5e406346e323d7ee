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
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/nbd"
)

// Isolated is the way by libguestfs: a small VM of its own opens the volumes, and shows their files by FUSE. An image from a
// guest is hostile input, and the VM stands between it and the host. It takes guestfish; not root.
type Isolated struct {
	// Dir is for sockets and mount points; only the user may enter it.
	Dir string
	Log *zap.Logger
}

const (
	// launchTime bounds the start of the VM: under software emulation it takes half a minute.
	launchTime = 5 * time.Minute
	// maxDrives bounds the drives of a VM.
	maxDrives = 200
)

// Open implements Way. The VM is started by the first Dir.
func (w *Isolated) Open(_ context.Context, volumes []*Device) (Opened, error) {
	if _, err := exec.LookPath("guestfish"); err != nil {
		return nil, errors.New("files are shown by way of libguestfs: install it (apt-get install guestmount guestfish libguestfs-xfs), or use --kernel for guests that are trusted")
	}
	o := &isolatedOpened{w: w, volumes: map[string]*Device{}, places: map[string]string{}, failed: map[string]string{}}
	for _, d := range volumes {
		o.volumes[d.V.Name] = d
		if d.check() == nil {
			o.drives = append(o.drives, d)
		}
	}
	if len(o.drives) > maxDrives {
		return nil, fmt.Errorf("%d volumes with file systems: at most %d are shown at once", len(o.drives), maxDrives)
	}
	return o, nil
}

type isolatedOpened struct {
	w       *Isolated
	volumes map[string]*Device
	drives  []*Device // those that the VM has, in order

	mu     sync.Mutex // guards what follows
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
	d := o.volumes[volume]
	if d == nil {
		return "", fmt.Errorf("volume %q: %w", volume, os.ErrNotExist)
	}
	if err := d.check(); err != nil {
		return "", err
	}
	if !o.tried {
		o.tried = true
		if o.err = o.launch(ctx); o.err != nil {
			o.err = errors.Join(fmt.Errorf("libguestfs: %w", o.err), o.end())
		}
	}
	if o.err != nil {
		return "", o.err
	}
	if why, ok := o.failed[volume]; ok {
		return "", fmt.Errorf("volume %s (%s): it can not be mounted: %s", volume, d.V.FS.Type, why)
	}
	place, ok := o.places[volume]
	if !ok {
		return "", fmt.Errorf("volume %s: it is not mounted", volume)
	}
	return filepath.Join(o.dir, "mnt", place), nil
}

// drive is the export of a drive by its name.
type drives []*Device

func (e drives) List() []string { return nil }

func (e drives) Open(name string) (nbd.Device, error) {
	for i, d := range e {
		if name == fmt.Sprint(i) {
			return shared{d}, nil
		}
	}
	return nil, os.ErrNotExist
}

// shared is a device that its clients do not close.
type shared struct{ *Device }

func (shared) Close() error { return nil }

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
	s := &nbd.Server{Exports: drives(o.drives), Log: o.w.Log}
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
	for i, d := range o.drives {
		options := "ro,nosuid,nodev,noexec"
		if d.V.FS.Type == TypeXFS {
			options += ",nouuid"
		}
		if d.V.FS.Type == TypeNTFS {
			// The probe's answer counts: a mount that is read-only looks at no journal.
			options = "ro,norecover"
			fmt.Fprintf(&b, "echo probe %d\n-ntfs-3g-probe true %s\n", i, driveName(i))
		}
		fmt.Fprintf(&b, "mkmountpoint /%d\n-mount-vfs %s %s %s /%d\n", i, options, driver(d.V.FS.Type), driveName(i), i)
	}
	fmt.Fprintf(&b, "mountpoints\necho mounted\nmount-local %s\nmount-local-run\n", mnt)
	return b.String()
}

func driver(fstype string) string {
	switch fstype {
	case TypeExt:
		return "ext4"
	case TypeNTFS:
		return "ntfs-3g"
	}
	return fstype
}

// run starts guestfish and waits until it shows the files.
func (o *isolatedOpened) run(ctx context.Context, sock, mnt string) error {
	var args []string
	for i := range o.drives {
		args = append(args, "--format=raw", "-a", fmt.Sprintf("nbd:///%d?socket=%s", i, url.QueryEscape(sock)))
	}
	cmd := exec.Command("guestfish", args...)
	cmd.Env = append(os.Environ(), "LIBGUESTFS_BACKEND="+backend())
	cmd.Stdin = strings.NewReader(o.script(mnt))
	var stderr lastBytes
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	mounted := make(chan []string, 1)
	ended := make(chan error, 1)
	go func() {
		mounted <- readMounts(out)
		_, _ = io.Copy(io.Discard, out)
		ended <- cmd.Wait()
	}()
	o.stop = append(o.stop, func() error { return endVM(cmd, mnt, ended) })
	launched, cancel := context.WithTimeout(ctx, launchTime)
	defer cancel()
	for shown, noted := false, false; !shown || !noted; {
		select {
		case lines := <-mounted:
			noted = true
			o.note(lines, stderr.String())
		case err := <-ended:
			ended <- err
			return fmt.Errorf("guestfish ended: %w: %s", err, &stderr)
		case <-launched.Done():
			return fmt.Errorf("the VM does not start: %w", launched.Err())
		case <-time.After(20 * time.Millisecond):
			shown = isFUSE(mnt)
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
	for i, d := range o.drives {
		if d.V.FS.Type == TypeNTFS {
			if k := slices.Index(lines, fmt.Sprintf("probe %d", i)); k < 0 || k+1 >= len(lines) || lines[k+1] != "0" {
				o.failed[d.V.Name] = ErrStale.Error() + ": its journal is not empty, or Windows is hibernated on it"
				continue
			}
		}
		place := fmt.Sprintf("/%d", i)
		for _, line := range lines {
			if _, at, ok := strings.Cut(line, ": "); ok && at == place {
				o.places[d.V.Name] = place
			}
		}
		if _, ok := o.places[d.V.Name]; !ok {
			why := "no reason was given"
			for _, line := range strings.Split(stderr, "\n") {
				if strings.Contains(line, driveName(i)+" ") {
					why = strings.TrimSpace(line)
				}
			}
			o.failed[d.V.Name] = why
		}
	}
}

// endVM unmounts, upon which guestfish and its VM end.
func endVM(cmd *exec.Cmd, mnt string, ended chan error) error {
	select {
	case err := <-ended:
		ended <- err
	default:
		if isFUSE(mnt) {
			if err := unmountFUSE(mnt); err != nil {
				// Somebody is in it: it goes when they do.
				_ = exec.Command("fusermount3", "-u", "-z", mnt).Run()
			}
		} else {
			_ = cmd.Process.Kill()
		}
	}
	select {
	case <-ended:
	case <-time.After(15 * time.Second):
		_ = cmd.Process.Kill()
		<-ended
		_ = exec.Command("fusermount3", "-u", "-z", mnt).Run()
	}
	return nil
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

// Close implements Opened.
func (o *isolatedOpened) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.tried, o.err = true, os.ErrClosed
	return o.end()
}
