package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/nbd"
	"github.com/tidemark-cdp/tidemark/nbd/client"
	"github.com/tidemark-cdp/tidemark/restore/mount"
)

// flushed is a client's disk that has a marker taken behind each flush.
type flushed struct {
	*client.Client
	d     *served
	whole *atomic.Int64 // files that were synced

	mu sync.Mutex // one flush at a time
	at []int64    // by flush: the files that were synced before it began
}

func (m *flushed) ReadAt(p []byte, off int64, _ bool) error { return m.Client.ReadAt(p, off) }

func (m *flushed) Change(changes []nbd.Change) error {
	for _, c := range changes {
		var err error
		if c.Op == nbd.OpWrite {
			err = m.WriteAt(c.Buf, c.Off, false)
		} else {
			err = m.Trim(c.Off, uint32(c.Len))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *flushed) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	whole := m.whole.Load()
	if err := m.Client.Flush(); err != nil {
		return err
	}
	if _, err := m.d.api().Mark(m.d.t.Context(), "web01", api.MarkRequest{Label: fmt.Sprintf("flush-%d", len(m.at))}); err != nil {
		return err
	}
	m.at = append(m.at, whole)
	return nil
}

// content is what the nth file has.
func content(n int64) []byte {
	r := rand.New(rand.NewPCG(7, uint64(n)))
	b := make([]byte, 1+r.IntN(40_000))
	for i := range len(b) / 8 {
		binary.LittleEndian.PutUint64(b[i*8:], r.Uint64())
	}
	return b
}

// TestAPointAtEveryFlush: a busy file system, restored as of each flush that it made, is clean behind its journal's replay, and has every file that was synced before.
func TestAPointAtEveryFlush(t *testing.T) {
	needRoot(t)
	for _, fs := range []struct {
		name          string
		size          int64
		mkfs          []string
		recover, fsck string
		mount         string
	}{
		{"ext4", 64 << 20, []string{"mkfs.ext4", "-q", "-F"}, "e2fsck -E journal_only -y $I >/dev/null", "e2fsck -fn $I", "loop,ro"},
		{"xfs", 320 << 20, []string{"mkfs.xfs", "-q", "-f"}, "mount -o loop,nouuid $I $M; umount $M", "xfs_repair -n $I", "loop,ro,nouuid"},
	} {
		t.Run(fs.name, func(t *testing.T) {
			need(t, fs.mkfs[0], "losetup", "e2fsck", "xfs_repair")
			d := serve(t, fs.size)
			d.stop()
			tool(t, fs.mkfs[0], append(fs.mkfs[1:], d.disk)...)
			d.start()
			at := keepBusy(t, d, fs.name)
			t.Logf("%d flushes", len(at))
			require.Greater(t, len(at), 25)
			image, mnt := filepath.Join(inMemory(t), "image"), d.path("mnt")
			require.NoError(t, os.MkdirAll(mnt, 0o700))
			for n, whole := range at {
				d.ok("restore", fmt.Sprintf("web01/vda@flush-%d", n), "--to", image, "--force")
				script := fmt.Sprintf("%s\n%s 2>&1\nmount -o %s $I $M", fs.recover, fs.fsck, fs.mount)
				tool(t, "sh", "-ec", strings.NewReplacer("$I", image, "$M", mnt).Replace(script))
				for i := range whole {
					b, err := os.ReadFile(filepath.Join(mnt, "synced", fmt.Sprint(i)))
					if err != nil || !bytes.Equal(b, content(i)) {
						_ = exec.Command("umount", mnt).Run()
						require.NoError(t, err, "flush %d", n)
						require.Fail(t, "a file that was synced is not whole", "flush %d, file %d of %d", n, i, whole)
					}
				}
				tool(t, "umount", mnt)
			}
		})
	}
}

// inMemory is a directory where a sync costs nothing, if there is one.
func inMemory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "tidemark")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

// keepBusy mounts the disk, syncs files beside others that are made, renamed and removed, and returns, by flush, how many were synced before.
func keepBusy(t *testing.T, d *served, fstype string) []int64 {
	t.Helper()
	var whole atomic.Int64
	m := &flushed{Client: d.dial("web01/vda"), d: d, whole: &whole}
	defer m.Close()
	dir, mnt := d.path("fuse"), d.path("busy")
	require.NoError(t, os.Mkdir(dir, 0o700))
	require.NoError(t, os.Mkdir(mnt, 0o700))
	fuse, err := mount.ServeDevices(dir)
	require.NoError(t, err)
	defer func() { require.NoError(t, fuse.Close()) }()
	path, detach, err := fuse.Add(m)
	require.NoError(t, err)
	defer detach()
	loop := strings.TrimSpace(tool(t, "losetup", "-f", "--show", path))
	defer tool(t, "losetup", "-d", loop)
	tool(t, "mount", "-t", fstype, "-o", "discard", loop, mnt)
	defer tool(t, "umount", mnt)
	synced, busy := filepath.Join(mnt, "synced"), filepath.Join(mnt, "busy")
	require.NoError(t, os.Mkdir(synced, 0o755))
	require.NoError(t, os.Mkdir(busy, 0o755))
	require.NoError(t, syncDir(mnt))
	stop := make(chan struct{})
	var noise sync.WaitGroup
	noise.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			name := filepath.Join(busy, fmt.Sprint(i%50))
			_ = os.WriteFile(name, content(int64(i)), 0o600)
			_ = os.Rename(name, name+"-renamed")
			_ = os.Remove(filepath.Join(busy, fmt.Sprintf("%d-renamed", (i+25)%50)))
		}
	})
	for i := range int64(25) {
		name := filepath.Join(synced, fmt.Sprint(i))
		f, err := os.Create(name)
		require.NoError(t, err)
		_, err = f.Write(content(i))
		require.NoError(t, err)
		require.NoError(t, f.Sync())
		require.NoError(t, f.Close())
		require.NoError(t, syncDir(synced))
		whole.Store(i + 1)
	}
	close(stop)
	noise.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]int64(nil), m.at...)
}
