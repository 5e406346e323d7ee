package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/tidemark-cdp/tidemark/nbd"
)

const (
	// maxWrite is the longest read or write that the kernel sends, in bytes.
	maxWrite = 512 << 10
	// maxBackground is how many it sends without waiting for their answers.
	maxBackground = 64
)

// Devices is a directory with a file for each device.
type Devices struct {
	dir    string
	root   *fs.Inode
	server *fuse.Server

	mu   sync.Mutex
	next int
}

// ServeDevices begins to serve a directory, which exists and is empty.
func ServeDevices(dir string) (*Devices, error) {
	hour := time.Hour
	d := &Devices{dir: dir, root: &fs.Inode{}}
	server, err := fs.Mount(dir, d.root, &fs.Options{
		AttrTimeout: &hour, EntryTimeout: &hour,
		MountOptions: fuse.MountOptions{
			DirectMountStrict: os.Geteuid() == 0, MaxWrite: maxWrite, FsName: "tidemark", Name: "tidemark", DisableXAttrs: true,
			// Without it a loop device has one request under way, whatever it is asked for.
			ExtraCapabilities: fuse.CAP_ASYNC_DIO, MaxBackground: maxBackground,
			DisableSplice: true, // which is for answers that are files
		},
	})
	if err != nil {
		return nil, fmt.Errorf("mount FUSE on %s: %w", dir, err)
	}
	d.server = server
	return d, nil
}

// Add shows a device as a file at path, until detach: when that returns nobody uses the device any more, and who has the
// file open gets errors.
func (d *Devices) Add(dev nbd.Device) (path string, detach func(), err error) {
	d.mu.Lock()
	d.next++
	name := fmt.Sprint(d.next)
	ino := uint64(1 + d.next)
	d.mu.Unlock()
	n := &device{dev: dev, size: dev.Size()}
	if !d.root.AddChild(name, d.root.NewPersistentInode(context.Background(), n, fs.StableAttr{Mode: fuse.S_IFREG, Ino: ino}), false) {
		return "", nil, fmt.Errorf("show device %s: it is there already", name)
	}
	return filepath.Join(d.dir, name), func() {
		n.detach()
		d.root.RmChild(name)
	}, nil
}

// Close ends the mount. What has a file open must be gone.
func (d *Devices) Close() error {
	err := d.server.Unmount()
	for end := time.Now().Add(5 * time.Second); err != nil && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond) // the kernel lets go of a loop device behind its last user
		err = d.server.Unmount()
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", d.dir, err)
	}
	d.server.Wait()
	return nil
}

// device is a device as a file.
type device struct {
	fs.Inode
	size int64

	mu  sync.RWMutex // held for reading by each request
	dev nbd.Device   // nil: detached
}

func (n *device) detach() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dev = nil
}

// do calls fn with the device.
func (n *device) do(fn func(nbd.Device) error) syscall.Errno {
	n.mu.RLock()
	defer n.mu.RUnlock()
	if n.dev == nil {
		return syscall.EIO
	}
	return errno(fn(n.dev))
}

var (
	_ fs.NodeGetattrer = (*device)(nil)
	_ fs.NodeSetattrer = (*device)(nil)
	_ fs.NodeOpener    = (*device)(nil)
	_ fs.NodeReader    = (*device)(nil)
	_ fs.NodeWriter    = (*device)(nil)
	_ fs.NodeFsyncer   = (*device)(nil)
	_ fs.NodeAllocater = (*device)(nil)
)

func (n *device) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Blksize = 0o600, uint64(n.size), 4096
	out.Blocks = (out.Size + 511) / 512
	return 0
}

// Setattr lets times pass; the size stays.
func (n *device) Setattr(ctx context.Context, f fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok && size != uint64(n.size) {
		return syscall.EPERM
	}
	return n.Getattr(ctx, f, out)
}

func (n *device) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, 0, 0
}

func (n *device) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if off >= n.size {
		return content(nil, 0)
	}
	p = p[:min(int64(len(p)), n.size-off)]
	return content(p, n.do(func(dev nbd.Device) error { return dev.ReadAt(p, off, false) }))
}

func (n *device) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	if off > n.size-int64(len(p)) {
		return 0, syscall.ENOSPC
	}
	e := n.do(func(dev nbd.Device) error {
		return dev.Change([]nbd.Change{{Op: nbd.OpWrite, Off: off, Len: int64(len(p)), Buf: p}})
	})
	if e != 0 {
		return 0, e
	}
	return uint32(len(p)), 0
}

func (n *device) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	return n.do(func(dev nbd.Device) error { return dev.Flush() })
}

// Allocate discards, which is all that the loop driver asks for.
func (n *device) Allocate(_ context.Context, _ fs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	const punchHole, zeroRange = 2, 16
	if mode&(punchHole|zeroRange) == 0 || off > uint64(n.size) || size > uint64(n.size)-off {
		return syscall.EOPNOTSUPP
	}
	return n.do(func(dev nbd.Device) error {
		return dev.Change([]nbd.Change{{Op: nbd.OpTrim, Off: int64(off), Len: int64(size)}})
	})
}

func errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	var e syscall.Errno
	if errors.As(err, &e) {
		return e
	}
	return syscall.EIO
}
