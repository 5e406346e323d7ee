package guestfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/nbd"
)

// Kernel is the way by the kernel's own drivers: a FUSE file, a loop device on it, and a mount that is in no name space: only
// this process can reach it. It takes root, and guests that are trusted: their metadata meets the host's kernel.
type Kernel struct {
	// Attach shows a device as a file, until detach.
	Attach func(dev nbd.Device) (path string, detach func(), err error)
	// Dir is for mount points of NTFS, whose driver is a program.
	Dir string
}

// Open implements Way.
func (k *Kernel) Open(_ context.Context, volumes []*Device) (Opened, error) {
	o := &kernelOpened{k: k, volumes: map[string]*kernelVolume{}}
	for _, d := range volumes {
		o.volumes[d.V.Name] = &kernelVolume{d: d, fd: -1}
	}
	return o, nil
}

type kernelOpened struct {
	k  *Kernel
	mu sync.Mutex // guards what is in the volumes

	volumes map[string]*kernelVolume
}

type kernelVolume struct {
	d    *Device
	off  func() // detaches the device; nil: it is not attached
	fd   int    // of the mount; -1: there is none
	dir  string // of NTFS
	tool *exec.Cmd
}

// Dir implements Opened.
func (o *kernelOpened) Dir(ctx context.Context, volume string) (string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	v := o.volumes[volume]
	if v == nil {
		return "", fmt.Errorf("volume %q: %w", volume, os.ErrNotExist)
	}
	if v.fd < 0 && v.dir == "" {
		if err := o.mount(ctx, v); err != nil {
			if v.off != nil {
				v.off()
				v.off = nil
			}
			return "", fmt.Errorf("volume %s (%s): %w", volume, v.d.V.FS.Type, err)
		}
	}
	if v.dir != "" {
		return v.dir, nil
	}
	return fmt.Sprintf("/proc/self/fd/%d", v.fd), nil
}

func (o *kernelOpened) mount(ctx context.Context, v *kernelVolume) error {
	if err := v.d.check(); err != nil {
		return err
	}
	path, off, err := o.k.Attach(v.d)
	if err != nil {
		return err
	}
	v.off = off
	if v.d.V.FS.Type == TypeNTFS {
		return o.mountNTFS(ctx, v, path)
	}
	loop, err := attachLoop(path)
	if err != nil {
		return err
	}
	// The loop device goes with its last user.
	defer loop.Close()
	v.fd, err = mountDetached(v.d.V.FS.Type, loop.Name())
	return err
}

// attachLoop sets a loop device up on a file. It is gone when the last user is.
func attachLoop(path string) (*os.File, error) {
	back, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer back.Close()
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer ctl.Close()
	for try := 0; ; try++ {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		cfg := unix.LoopConfig{Fd: uint32(back.Fd())}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &cfg)
		if err == nil {
			return loop, nil
		}
		_ = loop.Close()
		if !errors.Is(err, unix.EBUSY) || try == 100 {
			return nil, fmt.Errorf("set up %s: %w", loop.Name(), err)
		}
	}
}

// mountDetached mounts a device read-only, and nowhere: the mount is its descriptor's.
func mountDetached(fstype, dev string) (fd int, err error) {
	driver := map[string]string{TypeExt: "ext4"}[fstype]
	if driver == "" {
		driver = fstype
	}
	ctx, err := unix.Fsopen(driver, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("the kernel has no driver for %s: %w", driver, err)
	}
	defer unix.Close(ctx)
	steps := []func() error{
		func() error { return unix.FsconfigSetString(ctx, "source", dev) },
		func() error { return unix.FsconfigSetFlag(ctx, "ro") },
	}
	switch driver {
	case "ext4":
		// An image may ask for a panic.
		steps = append(steps, func() error { return unix.FsconfigSetString(ctx, "errors", "remount-ro") })
	case TypeXFS:
		steps = append(steps, func() error { return unix.FsconfigSetFlag(ctx, "nouuid") })
	}
	steps = append(steps, func() error { return unix.FsconfigCreate(ctx) })
	for _, step := range steps {
		if err := step(); err != nil {
			return -1, fmt.Errorf("mount: %w%s", err, said(ctx))
		}
	}
	fd, err = unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC|unix.MOUNT_ATTR_NOSYMFOLLOW)
	if err != nil {
		return -1, fmt.Errorf("mount: %w", err)
	}
	return fd, nil
}

// said is what the kernel has to say about a mount that failed.
func said(ctx int) string {
	var all []string
	b := make([]byte, 1024)
	for range 16 {
		n, err := unix.Read(ctx, b)
		if err != nil || n == 0 {
			break
		}
		all = append(all, strings.TrimSpace(string(bytes.TrimPrefix(b[:n], []byte("e ")))))
	}
	if len(all) == 0 {
		return " (the kernel's log says why)"
	}
	return ": " + strings.Join(all, "; ")
}

// mountNTFS has ntfs-3g show a volume. It replays no journal: one that is not empty would be shown as it never was.
func (o *kernelOpened) mountNTFS(ctx context.Context, v *kernelVolume, path string) error {
	probe := exec.CommandContext(ctx, "ntfs-3g.probe", "--readwrite", path)
	if out, err := probe.CombinedOutput(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			switch exit.ExitCode() {
			case 14:
				return fmt.Errorf("%w: Windows is hibernated on it", ErrStale)
			case 15:
				return fmt.Errorf("%w: its journal is not empty, and is replayed by Windows alone", ErrStale)
			}
		}
		return fmt.Errorf("ntfs-3g.probe: %w: %s", err, bytes.TrimSpace(out))
	}
	dir, err := os.MkdirTemp(o.k.Dir, "ntfs")
	if err != nil {
		return err
	}
	v.tool = exec.Command("ntfs-3g", "-o", "ro,norecover,nosuid,nodev,noexec,no_detach", path, dir)
	var stderr lastBytes
	v.tool.Stderr = &stderr
	if err := v.tool.Start(); err != nil {
		return errors.Join(err, os.Remove(dir))
	}
	ended := make(chan error, 1)
	go func() { ended <- v.tool.Wait() }()
	for !isFUSE(dir) {
		select {
		case err := <-ended:
			v.tool = nil
			return errors.Join(fmt.Errorf("ntfs-3g: %w: %s", err, &stderr), os.Remove(dir))
		case <-ctx.Done():
			_ = v.tool.Process.Kill()
			<-ended
			v.tool = nil
			return errors.Join(ctx.Err(), os.Remove(dir))
		case <-time.After(5 * time.Millisecond):
		}
	}
	v.dir = dir
	return nil
}

// isFUSE reports whether a FUSE file system is mounted on a directory.
func isFUSE(dir string) bool {
	var st unix.Statfs_t
	var here, above unix.Stat_t
	if unix.Statfs(dir, &st) != nil || unix.Stat(dir, &here) != nil || unix.Stat(filepath.Dir(dir), &above) != nil {
		return false
	}
	return st.Type == unix.FUSE_SUPER_MAGIC && here.Dev != above.Dev
}

// Close implements Opened.
func (o *kernelOpened) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	var errs []error
	for _, v := range o.volumes {
		if v.fd >= 0 {
			errs = append(errs, unix.Close(v.fd))
			v.fd = -1
		}
		if v.dir != "" {
			errs = append(errs, unmountFUSE(v.dir), os.Remove(v.dir))
			v.dir = ""
		}
		if v.off != nil {
			v.off()
			v.off = nil
		}
	}
	return errors.Join(errs...)
}

// unmountFUSE ends a FUSE mount of another program, which ends with it.
func unmountFUSE(dir string) error {
	out, err := exec.Command("fusermount3", "-u", dir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("unmount %s: %w: %s", dir, err, bytes.TrimSpace(out))
	}
	return nil
}

// lastBytes keeps the last bytes written to it.
type lastBytes struct {
	mu sync.Mutex
	b  []byte
}

func (t *lastBytes) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-8192):]
	return len(p), nil
}

func (t *lastBytes) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}
