package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// mkfs makes a file system in an image: with content, so that it has something to check.
func mkfs(t *testing.T, kind, image string, size int64) {
	t.Helper()
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, size))
	if kind == "ext4" {
		tool(t, "mkfs.ext4", "-q", "-F", "-d", "/etc", image)
	} else {
		tool(t, "mkfs."+kind, "-q", image)
	}
}

// TestRealClients has the tools that people use read and write through NBD.
func TestRealClients(t *testing.T) {
	need(t, "nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "mkfs.ext4", "e2fsck")
	const size = 192 << 20
	d := serve(t, size)
	live := d.uri("web01/vda")

	info := tool(t, "nbdinfo", live)
	for _, want := range []string{"export-size: 201326592", "can_flush: true", "can_fua: true", "can_multi_conn: true", "can_trim: true",
		"can_zero: true", "can_fast_zero: true", "can_df: true", "can_cache: true", "base:allocation", "block_size_maximum: 33554432"} {
		require.Contains(t, info, want)
	}
	list := tool(t, "nbdinfo", "--list", d.uri(""))
	require.Contains(t, list, "web01/vda")

	fs := d.path("fs.raw")
	mkfs(t, "ext4", fs, size)
	tool(t, "nbdcopy", "--flush", fs, live)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", fs, live)
	d.ok("mark", "web01", "full")

	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 0x55 1M 8M", "-c", "write -z 20M 5M", "-c", "discard 30M 3M",
		"-c", "read -P 0x55 1M 8M", "-c", "read -P 0 20M 5M", "-c", "read -P 0 30M 3M", "-c", "flush", live)

	past := d.uri("web01/vda@full")
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", fs, past)
	require.Contains(t, tool(t, "nbdinfo", "--map", past), "hole,zero")
	require.Contains(t, tool(t, "qemu-img", "map", "-f", "raw", past), "Offset")
	require.Contains(t, tool(t, "nbdinfo", past), "is_read_only: true")

	// Sparse stays sparse, by whoever copies.
	for name, copyTo := range map[string]func(to string){
		"nbdcopy":  func(to string) { tool(t, "nbdcopy", past, to) },
		"qemu-img": func(to string) { tool(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", past, to) },
		"tidemark": func(to string) { d.ok("restore", "web01/vda@full", "--to", to) },
		"qcow2":    func(to string) { d.ok("restore", "web01/vda@full", "--to", to, "--format", "qcow2") },
	} {
		to := d.path(name)
		copyTo(to)
		tool(t, "qemu-img", "compare", fs, to)
		require.Less(t, usage(t, to), int64(size/2), "%s made a copy that is not sparse", name)
	}
	tool(t, "e2fsck", "-fn", d.path("tidemark"))
	out, code := d.tidemark("restore", "web01/vda@full", "--to", fs)
	require.Equal(t, 1, code)
	require.Contains(t, out, "--force")
}

func usage(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	require.NoError(t, err)
	var blocks int64
	out := strings.Fields(tool(t, "stat", "-c", "%b %B", path))
	require.Len(t, out, 2)
	for _, c := range out[0] {
		blocks = blocks*10 + int64(c-'0')
	}
	require.LessOrEqual(t, blocks*512, info.Size()*2)
	return blocks * 512
}

// TestADiskIsBroughtBack goes back to a point through the daemon, as the operator's guide says, and back from there.
func TestADiskIsBroughtBack(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	d := serve(t, 16<<20)
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 8m", d.uri("web01/vda"))
	d.ok("mark", "web01", "good")
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 2 1m 12m", d.uri("web01/vda"))
	d.ok("mark", "web01", "before-rollback")
	for _, c := range []struct{ point, reads string }{{"good", "read -P 0 8m 8m"}, {"before-rollback", "read -P 2 1m 12m"}} {
		tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", d.uri("web01/vda@"+c.point), d.uri("web01/vda"))
		tool(t, "qemu-io", "-f", "raw", "-c", c.reads, d.uri("web01/vda"))
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", d.uri("web01/vda@"+c.point), d.uri("web01/vda"))
	}
}

func TestFioVerifies(t *testing.T) {
	need(t, "fio")
	d := serve(t, 64<<20)
	tool(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+d.uri("web01/vda"), "--rw=randwrite", "--bsrange=512-128k", "--blockalign=512",
		"--iodepth=16", "--size=64m", "--verify_state_save=0", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--randrepeat=0", "--fsync=64")
}

func TestLibnbdScript(t *testing.T) {
	need(t, "/usr/bin/python3")
	d := serve(t, 64<<20)
	script := `
import sys
sys.path.insert(0, "/usr/lib/python3/dist-packages")
import nbd
h = nbd.NBD()
h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
h.connect_uri(sys.argv[1])
h.set_strict_mode(0)
size = h.get_size()
# Many in flight, answered in any order.
bufs = [nbd.Buffer.from_bytearray(bytearray([i % 251 + 1] * 5000)) for i in range(200)]
cookies = [h.aio_pwrite(b, i * 5000) for i, b in enumerate(bufs)]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
h.pwrite(b"fua", 1 << 20, nbd.CMD_FLAG_FUA)
for i in range(200):
    assert h.pread(5000, i * 5000) == bytes([i % 251 + 1] * 5000)
for call in (lambda: h.pread(10, size - 5), lambda: h.pwrite(b"x" * 10, size - 5), lambda: h.trim(10, size - 5)):
    try:
        call()
        raise SystemExit("past the end was served")
    except nbd.Error:
        pass
runs = []
h.block_status(32 << 20, 0, lambda ctx, off, e, err: runs.extend(e))
assert sum(runs[::2]) == 32 << 20 and 3 in runs[1::2], runs
h.zero(1 << 20, 0, nbd.CMD_FLAG_FAST_ZERO)
h.zero(1 << 20, 4 << 20, nbd.CMD_FLAG_NO_HOLE)
h.cache(1 << 20, 0)
h.flush()
assert h.pread(1 << 20, 0, nbd.CMD_FLAG_DF) == bytes(1 << 20)
h.shutdown()
`
	tool(t, "/usr/bin/python3", "-c", script, d.uri("web01/vda"))
}

// TestFileSystemsAtMarkers mounts real file systems on the disk, writes, marks
// at quiet moments, goes on writing, and checks each marker's image.
func TestFileSystemsAtMarkers(t *testing.T) {
	need(t, "nbdfuse", "losetup", "mkfs.ext4", "mkfs.xfs", "xfs_repair", "e2fsck", "fusermount3")
	needRoot(t)
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			d := serve(t, 320<<20)
			dev := attach(t, d)
			tool(t, "mkfs."+kind, "-q", dev)
			mnt := d.path("mnt")
			require.NoError(t, os.Mkdir(mnt, 0o700))
			tool(t, "mount", dev, mnt)
			mounted := true
			defer func() {
				if mounted {
					tool(t, "umount", mnt)
				}
			}()
			for _, label := range []string{"one", "two", "three"} {
				tool(t, "cp", "-a", "/etc", filepath.Join(mnt, label))
				tool(t, "fsfreeze", "-f", mnt)
				d.ok("mark", "web01", label)
				tool(t, "fsfreeze", "-u", mnt)
				tool(t, "rm", "-r", filepath.Join(mnt, label))
			}
			tool(t, "umount", mnt)
			mounted = false
			for _, label := range []string{"one", "two", "three"} {
				img := d.path(label + ".raw")
				d.ok("restore", "web01/vda@"+label, "--to", img)
				checkFS(t, kind, img)
				tool(t, "mount", "-o", "loop", img, mnt)
				tool(t, "diff", "-r", "--no-dereference", "/etc", filepath.Join(mnt, label))
				tool(t, "umount", mnt)
			}
		})
	}
}

// checkFS replays the journal, as the guest's next mount would, and then wants no fault.
func checkFS(t *testing.T, kind, img string) {
	t.Helper()
	mnt := t.TempDir()
	tool(t, "mount", "-o", "loop", img, mnt)
	tool(t, "umount", mnt)
	if kind == "ext4" {
		tool(t, "e2fsck", "-fn", img)
	} else {
		tool(t, "xfs_repair", "-n", "-f", img)
	}
}

// attach makes the live disk a loop device by way of FUSE.
func attach(t *testing.T, d *served) string {
	t.Helper()
	file := d.path("fuse")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	cmd := exec.Command("nbdfuse", file, d.uri("web01/vda"))
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		tool(t, "fusermount3", "-u", file)
		require.NoError(t, cmd.Wait())
	})
	require.Eventually(t, func() bool {
		info, err := os.Stat(file)
		return err == nil && info.Size() > 0
	}, 10*time.Second, 20*time.Millisecond)
	dev := strings.TrimSpace(tool(t, "losetup", "--show", "-f", file))
	t.Cleanup(func() { tool(t, "losetup", "-d", dev) })
	return dev
}

// TestBlockDeviceBacking protects a loop device.
func TestBlockDeviceBacking(t *testing.T) {
	need(t, "losetup", "qemu-io")
	needRoot(t)
	dir := t.TempDir()
	img := filepath.Join(dir, "img")
	require.NoError(t, os.WriteFile(img, nil, 0o600))
	require.NoError(t, os.Truncate(img, 32<<20))
	dev := strings.TrimSpace(tool(t, "losetup", "--show", "-f", img))
	t.Cleanup(func() { tool(t, "losetup", "-d", dev) })
	d := serve(t, 1<<20, "--disk", "web02/vda="+dev)
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "discard 512k 64k", "-c", "flush", d.uri("web02/vda"))
	d.stop()
	tool(t, "qemu-io", "-f", "raw", "-c", "read -P 7 0 512k", "-c", "read -P 0 512k 64k", dev)
	// Somebody writes the device while the daemon is off.
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 9 64k 4k", dev)
	d.start()
	require.Contains(t, d.ok("points", "web02"), "discontinuity-vda-")
	tool(t, "qemu-io", "-f", "raw", "-c", "read -P 9 64k 4k", d.uri("web02/vda"))
	tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 7 64k 4k", d.uri("web02/vda@lsn:1"))
}

// TestFullJournal fills a real small file system: old history goes, then
// writes get ENOSPC while a view pins it, and go on when the view is closed.
func TestFullJournal(t *testing.T) {
	need(t, "mkfs.ext4", "mount")
	needRoot(t)
	dir := t.TempDir()
	img, mnt := filepath.Join(dir, "img"), filepath.Join(dir, "mnt")
	require.NoError(t, os.WriteFile(img, nil, 0o600))
	require.NoError(t, os.Truncate(img, 256<<20))
	tool(t, "mkfs.ext4", "-q", "-m", "0", img)
	require.NoError(t, os.Mkdir(mnt, 0o700))
	tool(t, "mount", "-o", "loop", img, mnt)
	t.Cleanup(func() { tool(t, "umount", mnt) })
	d := serve(t, 32<<20)
	d.stop()
	d.extra = []string{"--state-dir", filepath.Join(mnt, "state")}
	d.start()
	pin := d.dial("web01/vda@latest")
	c := d.dial("web01/vda")
	buf := make([]byte, 1<<20)
	var err error
	written := 0
	for ; err == nil && written < 1000; written++ {
		buf[0] = byte(written)
		err = c.WriteAt(buf, int64(written%16)<<20, false)
	}
	require.ErrorContains(t, err, "no space left")
	require.Greater(t, written, 100)
	got := make([]byte, 1)
	for i := written - 12; i < written-1; i++ {
		require.NoError(t, c.ReadAt(got, int64(i%16)<<20))
		require.Equal(t, byte(i), got[0], "an acknowledged write is gone")
	}
	require.NoError(t, pin.Close())
	require.Eventually(t, func() bool { return c.WriteAt(buf, 0, false) == nil }, 20*time.Second, 100*time.Millisecond)
	for i := range 40 {
		require.NoError(t, c.WriteAt(buf, int64(i%16)<<20, false), "write %d", i)
	}
	require.NoError(t, c.Close())
	require.Contains(t, d.ok("verify"), "no damage")
	d.stop()
}

func TestSocketActivation(t *testing.T) {
	need(t, "systemd-socket-activate", "nbdinfo")
	d := serve(t, 1<<20)
	d.stop()
	cmd := exec.Command("systemd-socket-activate", append([]string{"--fdname=nbd", "-l", d.sock(), filepath.Join(binDir, "tidemarkd")}, d.args()...)...)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	require.Eventually(t, func() bool {
		return exec.Command("nbdinfo", d.uri("web01/vda")).Run() == nil
	}, 20*time.Second, 100*time.Millisecond)
}
