package kernel

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/nbd"
)

// What needs the kernel's NBD client is tested in a guest that has it, by cmd/tidemarkd.

// TestListAndFind read what the kernel tells of its devices.
func TestListAndFind(t *testing.T) {
	was := sysBlock
	sysBlock = t.TempDir()
	defer func() { sysBlock = was }()
	for path, content := range map[string]string{
		"nbd0/backend": "tidemark\tstore\tweb01/vda@lsn:7\tweb01@one\n", "nbd0/size": "16\n", "nbd0/ro": "1\n",
		"nbd1/size": "0\n", "nbd1/ro": "0\n", // nobody has connected it
		"nbd12/backend": "x\n", "nbd12/size": "8\n", "nbd12/ro": "0\n",
		"sda/size": "8\n", "nbdx/backend": "x\n",
	} {
		path = filepath.Join(sysBlock, path)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
	}
	all, err := List()
	require.NoError(t, err)
	require.ElementsMatch(t, []Device{
		{Index: 0, Backend: "tidemark\tstore\tweb01/vda@lsn:7\tweb01@one", Size: 8192, ReadOnly: true},
		{Index: 12, Backend: "x", Size: 4096},
	}, all)
	_, err = Find(1)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorIs(t, Detach(Device{Index: 12, Backend: "y"}, true), os.ErrNotExist, "it is somebody else's by now")
	require.NoError(t, os.WriteFile(filepath.Join(sysBlock, "nbd12/size"), []byte("many"), 0o600))
	_, err = List()
	require.ErrorContains(t, err, "/dev/nbd12")
	sysBlock = filepath.Join(sysBlock, "none")
	all, err = List()
	require.NoError(t, err)
	require.Empty(t, all)
}

// blank is an export of zeroes, and a device.
type blank struct{ size int64 }

func (b blank) Open(string) (nbd.Device, error)                { return b, nil }
func (b blank) List() []string                                 { return nil }
func (b blank) Size() int64                                    { return b.size }
func (b blank) ReadOnly() bool                                 { return true }
func (b blank) Flush() error                                   { return nil }
func (b blank) Close() error                                   { return nil }
func (b blank) Change([]nbd.Change) error                      { return unix.EPERM }
func (b blank) Extents(_, n int64, fn func(int64, bool)) error { fn(n, true); return nil }
func (b blank) ReadAt(p []byte, _ int64, _ bool) error         { clear(p); return nil }

// TestShake has what the kernel takes over as many times as the server lets it, and nothing of what it must not.
func TestShake(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	var served sync.WaitGroup
	defer served.Wait()
	defer cancel()
	dialed := 0
	dial := func(b blank) Dial {
		return func(context.Context) (net.Conn, error) {
			dialed++
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return nil, err
			}
			var ends [2]net.Conn
			for i, fd := range fds {
				f := os.NewFile(uintptr(fd), "end")
				if ends[i], err = net.FileConn(f); err != nil {
					return nil, err
				}
				if err := f.Close(); err != nil {
					return nil, err
				}
			}
			s := &nbd.Server{Exports: b, Log: zap.NewNop()}
			served.Go(func() { s.ServeConn(ctx, ends[0]) })
			return ends[1], nil
		}
	}
	socks, s, err := shake(ctx, dial(blank{8192}), "x", "backend")
	require.NoError(t, err)
	require.Len(t, socks, Connections)
	require.EqualValues(t, 8192, s.size)
	require.Equal(t, "backend", s.backend)
	closeAll(socks)
	dialed = 0
	_, _, err = shake(ctx, dial(blank{8191}), "x", "backend")
	require.ErrorContains(t, err, "whole sectors of 512")
	require.Equal(t, 1, dialed)

	// What comes back as another one is not connected.
	err = Reattach(ctx, dial(blank{4096}), "x", Device{Index: 3, Size: 8192, ReadOnly: true})
	require.ErrorContains(t, err, "another one")
}
