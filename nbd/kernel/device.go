package kernel

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/nbd/client"
	"github.com/tidemark-cdp/tidemark/nbd/internal/proto"
)

const (
	// requestTime is how long the kernel waits for an answer before it takes the connection for dead.
	requestTime = 10 * time.Second
	// DeadTime is how long requests wait for a new connection before they fail.
	DeadTime = 5 * time.Minute
	// Connections is how many a device has, where the server lets a client have several.
	Connections = 2
	// settleTime bounds how long a device may take to come or go.
	settleTime = 10 * time.Second
)

// ErrBusy says that a device is mounted, or otherwise claimed.
var ErrBusy = errors.New("the device is in use")

// Dial makes a new connection to the server; a unix or TCP one.
type Dial func(ctx context.Context) (net.Conn, error)

// Device is a block device of the kernel's.
type Device struct {
	Index    int
	Backend  string // whose it is, and what it is attached to
	Size     int64  // bytes
	ReadOnly bool
}

// Path is the device's file.
func (d Device) Path() string { return Path(d.Index) }

// Path is the file of a device by number.
func Path(index int) string { return "/dev/nbd" + strconv.Itoa(index) }

// Attach makes a device of an export. backend, which has no line break, is what List tells of it; it should say which export of whose it is.
func Attach(ctx context.Context, dial Dial, export, backend string) (d Device, err error) {
	socks, s, err := shake(ctx, dial, export, backend)
	if err != nil {
		return d, err
	}
	defer closeAll(socks)
	if d.Index, err = connect(s, socks); err != nil {
		return d, err
	}
	d.Backend, d.Size, d.ReadOnly = backend, s.size, s.flags&proto.FlagReadOnly != 0
	// The file comes by udev or devtmpfs.
	for end := time.Now().Add(settleTime); ; time.Sleep(5 * time.Millisecond) {
		if _, err = os.Stat(d.Path()); err == nil {
			return d, nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return d, errors.Join(fmt.Errorf("attach %s: its file does not come: %w", export, errors.Join(err, ctx.Err())), disconnect(d.Index))
		}
	}
}

// Reattach gives a device new connections to its export. The export must be what it was: another size, or a read-only one that can be written, is an error.
func Reattach(ctx context.Context, dial Dial, export string, d Device) error {
	socks, s, err := shake(ctx, dial, export, d.Backend)
	if err != nil {
		return err
	}
	defer closeAll(socks)
	if s.size != d.Size {
		return fmt.Errorf("reconnect %s: export %s has %d bytes, the device %d: it is another one", d.Path(), export, s.size, d.Size)
	}
	if d.ReadOnly && s.flags&proto.FlagReadOnly == 0 {
		return fmt.Errorf("reconnect %s, which is read-only: export %s can be written: it is another one", d.Path(), export)
	}
	return reconfigure(d.Index, s, socks)
}

// shake does the handshake on as many connections as there may be.
func shake(ctx context.Context, dial Dial, export, backend string) (socks []*os.File, s setup, err error) {
	s = setup{backend: backend, timeout: requestTime, dead: DeadTime}
	defer func() {
		if err != nil {
			closeAll(socks)
		}
	}()
	for len(socks) < Connections {
		c, err := dial(ctx)
		if err != nil {
			return socks, s, err
		}
		info, err := client.Handshake(ctx, c, export)
		if err != nil {
			return socks, s, errors.Join(err, c.Close())
		}
		// The kernel gets a descriptor of its own; this one is closed when it has.
		f, err := c.(interface{ File() (*os.File, error) }).File()
		if err := errors.Join(err, c.Close()); err != nil {
			return socks, s, err
		}
		socks = append(socks, f)
		s.size, s.flags = info.Size, info.Flags
		if s.size%blockSize != 0 {
			return socks, s, fmt.Errorf("export %s has %d bytes: a block device has whole sectors of %d", export, s.size, blockSize)
		}
		if info.Flags&proto.FlagMultiConn == 0 {
			break
		}
	}
	return socks, s, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // the kernel has its own reference
	}
}

// Detach disconnects a device. fs.ErrNotExist if it is not attached, or to something else by now; ErrBusy if it is mounted or otherwise claimed, unless forced: who uses it then gets errors.
func Detach(d Device, force bool) error {
	now, err := Find(d.Index)
	if err != nil {
		return err
	}
	if now.Backend != d.Backend {
		return fmt.Errorf("detach %s: it is attached to something else by now: %w", d.Path(), fs.ErrNotExist)
	}
	if !force {
		// Who asks for it alone is refused if somebody mounted it, or a partition of it.
		fd, err := unix.Open(d.Path(), unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("detach %s: %w: unmount it", d.Path(), ErrBusy)
		}
		if err != nil {
			return fmt.Errorf("detach %s: %w", d.Path(), err)
		}
		defer unix.Close(fd)
	}
	return disconnect(d.Index)
}

// sysBlock is where the kernel tells of block devices.
var sysBlock = "/sys/block"

// List is the devices that are attached and say what to.
func List() ([]Device, error) {
	entries, err := os.ReadDir(sysBlock)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var all []Device
	for _, e := range entries {
		index, err := strconv.Atoi(strings.TrimPrefix(e.Name(), "nbd"))
		if err != nil || !strings.HasPrefix(e.Name(), "nbd") {
			continue
		}
		d, err := Find(index)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, d)
	}
	return all, nil
}

// Find is an attached device by number; fs.ErrNotExist if it is not attached, or nobody said what to.
func Find(index int) (d Device, err error) {
	dir := filepath.Join(sysBlock, "nbd"+strconv.Itoa(index))
	d.Index = index
	b, err := os.ReadFile(filepath.Join(dir, "backend"))
	if err != nil {
		return d, fmt.Errorf("%s: %w", d.Path(), err)
	}
	d.Backend = strings.TrimSuffix(string(b), "\n")
	size, err := readInt(filepath.Join(dir, "size"))
	if err != nil {
		return d, fmt.Errorf("%s: %w", d.Path(), err)
	}
	ro, err := readInt(filepath.Join(dir, "ro"))
	if err != nil {
		return d, fmt.Errorf("%s: %w", d.Path(), err)
	}
	d.Size, d.ReadOnly = size*512, ro != 0
	return d, nil
}

func readInt(path string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}
