package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// guestImage is where make guest-deps puts a kernel and an initramfs.
const guestImage = "../../.cache/guest"

// console gathers what a guest says, for one who waits for a line of it.
type console struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all.Write(p)
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all.String()
}

// TestGuestGoesOnOverKills runs a Linux guest on a protected disk and kills the
// daemon under it again and again. The guest sees no error, each file that it
// synced is whole, and its file system is clean: at the end, and as of a marker.
func TestGuestGoesOnOverKills(t *testing.T) {
	need(t, "qemu-system-x86_64", "mkfs.ext4", "debugfs", "md5sum")
	if _, err := os.Stat(filepath.Join(guestImage, "initrd")); err != nil {
		t.Skip("this machine has no guest image: run make guest-deps")
	}
	d := serve(t, 64<<20)
	d.stop() // to make the file system past it is what an import is
	tool(t, "mkfs.ext4", "-q", d.disk)
	d.start()

	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "256", "-nographic", "-no-reboot",
		"-kernel", filepath.Join(guestImage, "vmlinuz"), "-initrd", filepath.Join(guestImage, "initrd"), "-append", "console=ttyS0 quiet panic=-1",
		"-blockdev", "driver=nbd,node-name=net,server.type=unix,server.path="+d.sock()+",export=web01/vda,reconnect-delay=60",
		"-blockdev", "driver=raw,node-name=disk,file=net", "-device", "virtio-blk-pci,drive=disk")
	var said console
	qemu.Stdout, qemu.Stderr = &said, &said
	require.NoError(t, qemu.Start())
	ended := make(chan error, 1)
	go func() { ended <- qemu.Wait() }()
	defer func() {
		cancel()
		if t.Failed() {
			t.Logf("the guest said:\n%s", said.String())
		}
	}()
	for i, file := range []int{5, 20, 40} {
		line := fmt.Sprintf("GUEST-WROTE %d\r", file)
		require.Eventually(t, func() bool { return strings.Contains(said.String(), line) }, 2*time.Minute, 10*time.Millisecond)
		d.kill()
		d.start()
		d.ok("mark", "web01", fmt.Sprintf("kill-%d", i))
	}
	require.NoError(t, <-ended, said.String())
	require.Contains(t, said.String(), "GUEST-DONE")
	require.NotContains(t, said.String(), "GUEST-FAILED")

	d.ok("restore", "web01/vda@latest", "--to", d.path("end.img"))
	require.Equal(t, 60, checkFiles(t, d.path("end.img")))
	d.ok("restore", "web01/vda@kill-1", "--to", d.path("middle.img"))
	tool(t, "sh", "-c", "e2fsck -fy "+d.path("middle.img")+" >/dev/null; test $? -le 1") // the journal's replay changes it
	require.GreaterOrEqual(t, checkFiles(t, d.path("middle.img")), 20, "what was synced before the marker")
}

// checkFiles checks the file system of an image, and the files that the guest
// wrote by their checksums. It returns their number.
func checkFiles(t *testing.T, image string) int {
	t.Helper()
	tool(t, "e2fsck", "-fn", image)
	dir := t.TempDir()
	tool(t, "debugfs", "-R", "rdump / "+dir, image)
	sums, err := os.ReadFile(filepath.Join(dir, "sums"))
	require.NoError(t, err)
	cmd := exec.Command("md5sum", "--quiet", "-c", "sums")
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	return strings.Count(string(sums), "\n")
}
