package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// twoDisks serves web01 with vda of 64 MiB and vdb of 8 MiB and 512 bytes, and a definition.
func twoDisks(t *testing.T, more string) *served {
	t.Helper()
	d := &served{t: t, dir: t.TempDir()}
	require.NoError(t, os.WriteFile(d.path("web01.conf"), []byte("memory: 512\n"), 0o600))
	for name, size := range map[string]int64{"a": 64 << 20, "b": 8<<20 + 512} {
		require.NoError(t, os.WriteFile(d.path(name), nil, 0o600))
		require.NoError(t, os.Truncate(d.path(name), size))
	}
	require.NoError(t, os.WriteFile(d.path("tidemark.yaml"), []byte(`journal: {segment: 16MiB, reserve: 16MiB}
groups:
  web01:
    disks: {vda: {backing: `+d.path("a")+`}, vdb: {backing: `+d.path("b")+`}}
    definitions: {web01: {file: `+d.path("web01.conf")+`}}
`+more), 0o600))
	d.start()
	return d
}

// scribble writes n times 4 to 64 KiB to a disk.
func (d *served) scribble(disk string, seed uint64, n int) {
	d.t.Helper()
	c := d.dial(disk)
	defer c.Close()
	rng := rand.New(rand.NewPCG(seed, 0))
	buf := make([]byte, 64<<10)
	for range n {
		b := buf[:4096*(1+rng.IntN(16))]
		for i := range 64 {
			b[i*len(b)/64] = byte(rng.Uint32())
		}
		require.NoError(d.t, c.WriteAt(b, rng.Int64N(c.Size()-int64(len(b))), false))
	}
	require.NoError(d.t, c.Flush())
}

// bytesOf reads all of an export.
func (d *served) bytesOf(export string) []byte {
	d.t.Helper()
	c := d.dial(export)
	defer c.Close()
	b := make([]byte, c.Size())
	for off := int64(0); off < c.Size(); {
		n := min(1<<20, c.Size()-off)
		require.NoError(d.t, c.ReadAt(b[off:off+n], off))
		off += n
	}
	return b
}

func (d *served) sameFile(path, export string) {
	d.t.Helper()
	got, err := os.ReadFile(path)
	require.NoError(d.t, err)
	require.True(d.t, bytes.Equal(d.bytesOf(export), got), "%s is not %s", path, export)
}

// TestAGroupIsRestored restores both disks and the definition as of one LSN, and brings the copy up to date.
func TestAGroupIsRestored(t *testing.T) {
	need(t, "qemu-img")
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 100)
	d.scribble("web01/vdb", 2, 50)
	d.ok("mark", "web01", "one")
	d.scribble("web01/vda", 3, 100)
	dir := d.path("out")
	d.ok("restore", "web01@one", "--to", dir, "--verify")
	d.sameFile(filepath.Join(dir, "vda.raw"), "web01/vda@one")
	d.sameFile(filepath.Join(dir, "vdb.raw"), "web01/vdb@one")
	b, err := os.ReadFile(filepath.Join(dir, "web01.definition"))
	require.NoError(t, err)
	require.Equal(t, "memory: 512\n", string(b))
	out, code := d.tidemark("restore", "web01@latest", "--to", dir)
	require.Equal(t, 1, code)
	require.Contains(t, out, "--changed-since brings it up to date")

	d.scribble("web01/vdb", 4, 20)
	d.ok("mark", "web01", "two")
	var got struct {
		LSN      uint64
		Complete bool
		Disks    []struct {
			Since    uint64
			Verified bool
		}
	}
	require.NoError(t, json.Unmarshal([]byte(d.ok("restore", "web01@two", "--to", dir, "--changed-since", "one", "--json")), &got))
	require.True(t, got.Complete)
	require.Len(t, got.Disks, 2)
	require.NotZero(t, got.Disks[0].Since)
	d.sameFile(filepath.Join(dir, "vda.raw"), "web01/vda@two")
	d.sameFile(filepath.Join(dir, "vdb.raw"), "web01/vdb@two")

	d.ok("restore", "web01@two", "--to", d.path("q"), "--format", "qcow2", "--verify")
	for _, disk := range []string{"vda", "vdb"} {
		tool(t, "qemu-img", "check", "-f", "qcow2", d.path("q/"+disk+".qcow2"))
		tool(t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", d.path("q/"+disk+".qcow2"), d.uri("web01/"+disk+"@two"))
	}
}

// TestACopyIsNotMixedUp: changes go only into what is the disk as of where they begin.
func TestACopyIsNotMixedUp(t *testing.T) {
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 20)
	d.ok("mark", "web01", "one")
	d.scribble("web01/vda", 2, 20)
	d.ok("mark", "web01", "two")
	d.scribble("web01/vda", 3, 20)
	d.ok("mark", "web01", "three")
	img := d.path("img")
	d.ok("restore", "web01/vda@one", "--to", img)
	refused := func(text string, args ...string) {
		t.Helper()
		out, code := d.tidemark(append([]string{"restore"}, args...)...)
		require.NotZero(t, code)
		require.Contains(t, out, text)
	}
	refused("and not web01/vda of this journal as of LSN", "web01/vda@three", "--changed-since", "two", "--to", img)
	refused("it is no copy", "web01/vdb@three", "--changed-since", "one", "--to", img)
	refused("newer than", "web01/vda@one", "--changed-since", "two", "--to", img)
	refused("no such file", "web01/vda@three", "--changed-since", "one", "--to", d.path("none"))
	refused("a qcow2 image is restored whole", "web01/vda@three", "--changed-since", "one", "--to", img, "--format", "qcow2")
	f, err := os.OpenFile(img, os.O_RDWR, 0)
	require.NoError(t, err)
	refused("in use", "web01/vda@three", "--changed-since", "one", "--to", img)
	_, err = f.WriteAt([]byte("booted"), 1<<20)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	refused("was written since", "web01/vda@three", "--changed-since", "one", "--to", img)
	refused("differs", "web01/vda@three", "--changed-since", "one", "--to", img, "--verify")
	d.ok("restore", "web01/vda@one", "--to", img, "--force")
	d.ok("restore", "web01/vda@three", "--to", img, "--changed-since", "one")
	d.sameFile(img, "web01/vda@three")
	refused("to go back, restore all of it", "web01/vda@two", "--changed-since", "one", "--to", img)
}

// TestARestoreGoesOnAfterAKill kills the client in the middle, again and again.
func TestARestoreGoesOnAfterAKill(t *testing.T) {
	d := twoDisks(t, "")
	d.scribble("web01/vda", 1, 3000)
	d.scribble("web01/vdb", 2, 100)
	dir := d.path("out")
	args := []string{"restore", "web01@latest", "--to", dir}
	killed := 0
	for n := range 20 {
		cmd := exec.Command(filepath.Join(binDir, "tidemark"), args...)
		cmd.Env = append(os.Environ(), "TIDEMARK_API=unix:"+d.path("api.sock"))
		require.NoError(t, cmd.Start())
		time.Sleep(time.Duration(60+15*n) * time.Millisecond)
		sig := syscall.SIGKILL
		if n%2 == 0 {
			sig = syscall.SIGINT
		}
		_ = cmd.Process.Signal(sig)
		if err := cmd.Wait(); err == nil {
			break
		}
		killed++
		if n == 3 {
			d.scribble("web01/vda", 5, 10) // the point stays what it was
		}
	}
	require.NotZero(t, killed)
	var m struct {
		LSN      uint64
		Complete bool
	}
	b, err := os.ReadFile(filepath.Join(dir, "restore.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &m))
	if !m.Complete {
		d.ok(args...)
	}
	at := "@lsn:" + strings.TrimSpace(strings.Split(strings.Split(string(b), `"lsn": `)[1], ",")[0])
	d.sameFile(filepath.Join(dir, "vda.raw"), "web01/vda"+at)
	d.sameFile(filepath.Join(dir, "vdb.raw"), "web01/vdb"+at)
	names, err := filepath.Glob(filepath.Join(dir, ".*"))
	require.NoError(t, err)
	require.Empty(t, names, "nothing is left beside the images")
}

// TestRestoreToADevice and to an export of another server.
func TestRestoreToADevice(t *testing.T) {
	needRoot(t)
	need(t, "losetup", "qemu-nbd", "mkfs.ext4")
	d := twoDisks(t, "")
	t.Setenv("XDG_CACHE_HOME", d.path("cache"))
	d.scribble("web01/vda", 1, 200)
	d.ok("mark", "web01", "one")
	old := d.path("old")
	require.NoError(t, os.WriteFile(old, bytes.Repeat([]byte{0xdd}, 80<<20), 0o600))
	loop := strings.TrimSpace(tool(t, "losetup", "-f", "--show", old))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", loop).Run() })
	out, code := d.tidemark("restore", "web01/vda@one", "--to", loop, "--format", "qcow2")
	require.Equal(t, 2, code, out)
	d.ok("restore", "web01/vda@one", "--to", loop, "--verify")
	tool(t, "cmp", "-n", "67108864", loop, d.restored("web01/vda@one"))

	d.scribble("web01/vda", 2, 50)
	out, code = d.tidemark("restore", "web01/vda@latest", "--to", loop, "--changed-since", "one")
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "nothing tells what it is a copy of")
	d.ok("restore", "web01/vda@latest", "--to", loop, "--changed-since", "one", "--verify")
	// What is mounted is not written.
	tool(t, "mkfs.ext4", "-q", loop)
	mnt := d.path("mnt")
	require.NoError(t, os.Mkdir(mnt, 0o700))
	tool(t, "mount", loop, mnt)
	out, code = d.tidemark("restore", "web01/vda@one", "--to", loop)
	require.Equal(t, 1, code)
	require.Contains(t, out, "it is mounted")
	tool(t, "umount", mnt)
	small := d.path("small")
	require.NoError(t, os.WriteFile(small, make([]byte, 1<<20), 0o600))
	smallLoop := strings.TrimSpace(tool(t, "losetup", "-f", "--show", small))
	t.Cleanup(func() { _ = exec.Command("losetup", "-d", smallLoop).Run() })
	out, code = d.tidemark("restore", "web01/vda@one", "--to", smallLoop)
	require.Equal(t, 1, code)
	require.Contains(t, out, "too small")
	tool(t, "losetup", "-d", smallLoop)

	sock := d.path("other.sock")
	other := exec.Command("qemu-nbd", "-t", "-f", "raw", "-x", "x", "-k", sock, old)
	tool(t, "losetup", "-d", loop)
	require.NoError(t, other.Start())
	defer func() { _ = other.Process.Kill(); _ = other.Wait() }()
	require.Eventually(t, func() bool { _, err := os.Stat(sock); return err == nil }, 10*time.Second, 10*time.Millisecond)
	d.ok("restore", "web01/vda@latest", "--to", "nbd+unix:///x?socket="+sock, "--verify")
	b, err := os.ReadFile(old)
	require.NoError(t, err)
	require.True(t, bytes.Equal(d.bytesOf("web01/vda@latest"), b[:64<<20]))
}

// restored is a file with a disk at a point.
func (d *served) restored(point string) string {
	d.t.Helper()
	path := filepath.Join(d.t.TempDir(), "disk")
	d.ok("restore", point, "--to", path)
	return path
}
