package guestfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Kernel is the way by the kernel's own drivers: a FUSE file, a loop device on it, and a mount that is in no name space: only
// this process can reach it. It takes root, and guests that are trusted: their metadata meets the host's kernel.
type Kernel struct {
	// Attach shows a volume, with an overlay that is thrown away, as a file, until detach. Reads of the file must end. Who serves
	// it is best another process: one that is killed while it waits for a read of its own can not end.
	Attach func(v Volume) (path string, detach func(), err error)
	// Dir is for mount points of NTFS, whose driver is a program.
	Dir string
}

// Open implements Way.
func (k *Kernel) Open(_ context.Context, volumes []Volume) (Opened, error) {
	o := &kernelOpened{k: k, volumes: map[string]*kernelVolume{}}
	for _, v := range volumes {
		o.volumes[v.Name] = &kernelVolume{v: v, fd: -1}
	}
	return o, nil
}

type kernelOpened struct {
	k      *Kernel
	broken atomic.Bool // set by Break, which does not wait for mu
	mu     sync.Mutex  // guards what is in the volumes; held during a mount

	volumes map[string]*kernelVolume
}

type kernelVolume struct {
	v    Volume
	off  func() // detaches it; nil: it is not attached
	fd   int    // of the mount; -1: there is none
	dir  string // of NTFS
	tool *program
	err  error // why it can not be mounted
}

// Dir implements Opened.
func (o *kernelOpened) Dir(ctx context.Context, volume string) (string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	v := o.volumes[volume]
	if v == nil {
		return "", fmt.Errorf("volume %q: %w", volume, os.ErrNotExist)
	}
	if v.err != nil {
		return "", v.err
	}
	if err := o.Err(); err != nil {
		return "", err
	}
	if v.fd < 0 && v.dir == "" {
		if err := o.mount(ctx, v); err != nil {
			if v.off != nil {
				v.off()
				v.off = nil
			}
			err = fmt.Errorf("volume %s (%s): %w", volume, v.v.FS.Type, err)
			if ctx.Err() == nil && o.Err() == nil {
				v.err = err
			}
			return "", err
		}
	}
	if v.dir != "" {
		return v.dir, nil
	}
	return fmt.Sprintf("/proc/self/fd/%d/.", v.fd), nil // a directory, and no link to one
}

func (o *kernelOpened) mount(ctx context.Context, v *kernelVolume) error {
	if err := v.v.Unsupported(); err != nil {
		return err
	}
	path, off, err := o.k.Attach(v.v)
	if err != nil {
		return err
	}
	v.off = off
	if v.v.FS.Type == TypeNTFS {
		return o.mountNTFS(ctx, v, path)
	}
	loop, err := attachLoop(path)
	if err != nil {
		return err
	}
	// The loop device goes with its last user.
	defer loop.Close()
	v.fd, err = mountDetached(v.v.FS.Type, loop.Name())
	return err
}

// readAheadSectors is how far the kernel reads ahead of who reads a file from one end to the other: 4 MiB, so that the way to
// the daemon and back is taken while what came before is read.
const readAheadSectors = 8192

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
			err = unix.IoctlSetInt(int(loop.Fd()), unix.BLKRASET, readAheadSectors)
			if err != nil {
				return nil, errors.Join(fmt.Errorf("set up %s: %w", loop.Name(), err), loop.Close())
			}
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
	ctx, err := unix.Fsopen(driver(fstype), unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("the kernel has no driver for %s: %w", driver(fstype), err)
	}
	defer unix.Close(ctx)
	steps := []func() error{
		func() error { return unix.FsconfigSetString(ctx, "source", dev) },
		func() error { return unix.FsconfigSetFlag(ctx, "ro") },
	}
	for _, o := range mountOptions(fstype) {
		steps = append(steps, func() error {
			if key, value, ok := strings.Cut(o, "="); ok {
				return unix.FsconfigSetString(ctx, key, value)
			}
			return unix.FsconfigSetFlag(ctx, o)
		})
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
	tool, err := start(exec.Command("ntfs-3g", "-o", "ro,norecover,nosuid,nodev,noexec,no_detach", path, dir))
	if err != nil {
		return errors.Join(err, os.Remove(dir))
	}
	for !mounted(dir) {
		select {
		case <-tool.ended:
			return errors.Join(fmt.Errorf("ntfs-3g: %w: %s", tool.err, &tool.stderr), os.Remove(dir))
		case <-ctx.Done():
			tool.kill()
			return errors.Join(ctx.Err(), os.Remove(dir))
		case <-time.After(5 * time.Millisecond):
			if o.broken.Load() {
				tool.kill()
			}
		}
	}
	v.dir, v.tool = dir, tool
	go func() { // until Close, if nothing ends it before
		<-tool.ended
		o.broken.Store(true)
	}()
	return nil
}

// Err implements Opened.
func (o *kernelOpened) Err() error {
	if o.broken.Load() {
		return ErrEnded
	}
	return nil
}

// Break implements Opened. What the kernel reads from is the caller's to end: reads then fail. Programs are killed.
func (o *kernelOpened) Break() {
	o.broken.Store(true)
	if !o.mu.TryLock() {
		return // who mounts sees it
	}
	defer o.mu.Unlock()
	for _, v := range o.volumes {
		if v.tool != nil {
			v.tool.kill()
		}
	}
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
			errs = append(errs, v.tool.unmount(v.dir), os.Remove(v.dir))
			v.dir = ""
		}
		if v.off != nil {
			v.off()
			v.off = nil
		}
	}
	return errors.Join(errs...)
}
