package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// guestDisk is a daemon whose disk has a GPT with /boot and the root of a guest, at a marker, "one", and changed since.
func guestDisk(t *testing.T) *served {
	needRoot(t)
	need(t, "mkfs.ext4", "sfdisk", "nbdcopy", "losetup", "blkid")
	t.Setenv("TMPDIR", t.TempDir()) // for nothingIsLeft
	d := serve(t, 128<<20)
	img, mnt := d.path("guest.img"), d.path("mnt")
	require.NoError(t, os.WriteFile(img, nil, 0o600))
	require.NoError(t, os.Truncate(img, 128<<20))
	require.NoError(t, os.Mkdir(mnt, 0o700))
	sh := func(script string) {
		t.Helper()
		out, err := exec.Command("sh", "-ec", strings.NewReplacer("$IMG", img, "$MNT", mnt).Replace(script)).CombinedOutput()
		require.NoError(t, err, string(out))
	}
	sh(`printf 'label: gpt\nsize=32MiB\nsize=64MiB\n' | sfdisk -q $IMG
		b=$(losetup -f --show -o 1MiB --sizelimit 32MiB $IMG); r=$(losetup -f --show -o 33MiB --sizelimit 64MiB $IMG)
		mkfs.ext4 -q $b; mkfs.ext4 -q $r
		mount $r $MNT; mkdir $MNT/boot $MNT/etc; mount $b $MNT/boot
		printf "UUID=$(blkid -p -o value -s UUID $b) /boot ext4 defaults 0 2\n/dev/vda2 / ext4 defaults 0 1\n" >$MNT/etc/fstab
		echo kernel >$MNT/boot/vmlinuz; ln -s boot/vmlinuz $MNT/vmlinuz; echo first >$MNT/etc/motd; ln -s /etc/passwd $MNT/etc/escape; echo guest >$MNT/etc/passwd
		umount $MNT/boot $MNT; losetup -d $b; losetup -d $r`)
	tool(t, "nbdcopy", "--flush", img, d.uri("web01/vda"))
	d.ok("mark", "web01", "one")
	sh(`r=$(losetup -f --show -o 33MiB --sizelimit 64MiB $IMG); mount $r $MNT; echo second >$MNT/etc/motd; umount $MNT; losetup -d $r`)
	tool(t, "nbdcopy", "--flush", img, d.uri("web01/vda"))
	return d
}

// TestFilesOfThePast lists and copies files of a guest's disk as they were: a GPT disk with /boot and the root, by the host's kernel.
func TestFilesOfThePast(t *testing.T) {
	d := guestDisk(t)
	at := func(point, path string) string { return "web01@" + point + ":" + path }
	require.Contains(t, d.ok("ls", "--kernel", at("one", "/")), "vmlinuz -> boot/vmlinuz")
	require.Contains(t, d.ok("ls", "--kernel", at("one", "/boot")), "vmlinuz")
	require.Contains(t, d.ok("ls", "--kernel", "web01/vda@one:/p1"), "vmlinuz")
	var list []struct{ Name string }
	require.NoError(t, json.Unmarshal([]byte(d.ok("ls", "--kernel", "--json", at("latest", "/etc"))), &list))
	require.Len(t, list, 4)
	for name, want := range map[string]string{at("one", "/etc/motd"): "first\n", at("latest", "/etc/motd"): "second\n", at("one", "/vmlinuz"): "kernel\n", at("one", "/etc/escape"): "guest\n"} {
		to := filepath.Join(t.TempDir(), "x")
		d.ok("cp", "--kernel", name, to)
		b, err := os.ReadFile(to)
		require.NoError(t, err)
		require.Equal(t, want, string(b), name)
	}
	d.ok("cp", "--kernel", at("one", "/etc"), t.TempDir())
	require.Equal(t, "! /etc/motd (size, time)\n", d.ok("diff", "--kernel", "web01@one", at("latest", "/etc")))
	var versions []struct {
		Point   string
		Size    int64
		Missing bool
	}
	d.ok("mark", "web01", "two")
	require.NoError(t, json.Unmarshal([]byte(d.ok("versions", "--kernel", "--json", "web01:/etc/motd")), &versions))
	require.Len(t, versions, 2)
	require.Equal(t, "two", versions[1].Point)
	require.EqualValues(t, 7, versions[1].Size)
	require.Contains(t, d.ok("versions", "--kernel", "web01:/none"), "no such file")
	for _, bad := range []struct {
		code int
		text string
		args []string
	}{
		{1, "no such file", []string{"ls", at("one", "/none")}},
		{4, "no marker has this label", []string{"ls", at("none", "/")}},
		{4, "vda/p3: not found: there are vda/p1, vda/p2", []string{"ls", "web01/vda@one:/p3"}},
		{2, "names no point", []string{"ls", "web01:/etc"}},
		{2, "expected GROUP@POINT:/PATH", []string{"ls", "web01@one"}},
		{2, "is no directory", []string{"cp", at("one", "/etc/motd"), d.path("none") + "/"}},
	} {
		out, code := d.tidemark(append(bad.args, "--kernel")...)
		require.Equal(t, bad.code, code, "%v: %s", bad.args, out)
		require.Contains(t, out, bad.text)
	}
	nothingIsLeft(t)
}

// nothingIsLeft fails if a command has left something in the temporary directory.
func nothingIsLeft(t *testing.T) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(os.TempDir(), "tidemark[0-9]*"))
	require.NoError(t, err)
	require.Empty(t, names, "nothing is left behind")
}

// mount has the client mount a group in the background; what it says is in said.
func (d *served) mount(dir string, args ...string) (cmd *exec.Cmd, said *console) {
	d.t.Helper()
	require.NoError(d.t, os.MkdirAll(dir, 0o700))
	cmd = exec.Command(filepath.Join(binDir, "tidemark"), append([]string{"mount"}, args...)...)
	cmd.Env = append(os.Environ(), "TIDEMARK_API=unix:"+d.path("api.sock"))
	said = &console{}
	cmd.Stdout, cmd.Stderr = said, said
	require.NoError(d.t, cmd.Start())
	d.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		_ = exec.Command("umount", "-l", dir).Run()
		if d.t.Failed() {
			d.t.Logf("mount said:\n%s", said.String())
		}
	})
	require.Eventually(d.t, func() bool { return strings.Contains(said.String(), "is mounted on") }, time.Minute, 10*time.Millisecond)
	return cmd, said
}

func list(t *testing.T, dir string) (names []string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(b)
}

// TestMount shows all of a group's past as directories, by the host's kernel; and goes on over a restart of the daemon.
func TestMount(t *testing.T) {
	d := guestDisk(t)
	between := time.Now().UTC().Format(time.RFC3339Nano)
	mnt := d.path("all")
	cmd, said := d.mount(mnt, "web01", mnt, "--kernel", "--idle", "2s")
	require.Equal(t, []string{"at"}, list(t, mnt))
	require.ElementsMatch(t, []string{"one", "latest"}, list(t, mnt+"/at"))
	require.Equal(t, []string{"disk.raw", "p1", "p2"}, list(t, mnt+"/at/one/vda"))
	require.Equal(t, "first\n", read(t, mnt+"/at/one/vda/p2/etc/motd"))
	for _, point := range []string{"latest", between, "-1ms"} {
		require.Equal(t, "second\n", read(t, mnt+"/at/"+point+"/vda/p2/etc/motd"), point)
	}
	require.Equal(t, "kernel\n", read(t, mnt+"/at/one/vda/p1/vmlinuz"))
	target, err := os.Readlink(mnt + "/at/one/vda/p2/etc/escape")
	require.NoError(t, err)
	require.Equal(t, "/etc/passwd", target, "as it is")
	for _, none := range []string{"none", "-100000h", "2001-01-01T00:00:00Z", "lsn:99999999", ".hidden", "-x"} {
		_, err := os.Stat(mnt + "/at/" + none)
		require.ErrorIs(t, err, os.ErrNotExist, none)
	}
	err = os.WriteFile(mnt+"/at/one/vda/p2/etc/motd", []byte("x"), 0o600)
	require.ErrorIs(t, err, syscall.EROFS)

	// The disk itself, with its holes.
	d.ok("restore", "web01/vda@one", "--to", d.path("one.img"))
	tool(t, "cmp", d.path("one.img"), mnt+"/at/one/vda/disk.raw")
	tool(t, "cp", "--sparse=always", mnt+"/at/one/vda/disk.raw", d.path("copied.img"))
	tool(t, "cmp", d.path("one.img"), d.path("copied.img"))
	f, err := os.Open(mnt + "/at/one/vda/disk.raw")
	require.NoError(t, err)
	hole, err := f.Seek(0, 4) // SEEK_HOLE
	require.NoError(t, err)
	require.Less(t, hole, int64(64<<20))
	require.NoError(t, f.Close())

	// What is idle ends, and comes back.
	require.Equal(t, "first\n", read(t, mnt+"/at/one/vda/p2/etc/motd"))
	out, err := exec.Command("losetup", "-a").Output()
	require.NoError(t, err)
	require.Contains(t, string(out), os.TempDir()+"/tidemark")
	require.Eventually(t, func() bool {
		out, err := exec.Command("losetup", "-a").Output()
		return err == nil && !strings.Contains(string(out), os.TempDir()+"/tidemark")
	}, 20*time.Second, 100*time.Millisecond, "what is idle ends")
	require.Equal(t, "first\n", read(t, mnt+"/at/one/vda/p2/etc/motd"))

	// What serves the volumes to the kernel may be killed: what is open fails, and what is opened next does not.
	tool(t, "pkill", "-KILL", "-f", "-P", strconv.Itoa(cmd.Process.Pid), "show-volumes")
	require.Eventually(t, func() bool {
		b, err := os.ReadFile(mnt + "/at/one/vda/p2/etc/motd")
		return err == nil && string(b) == "first\n"
	}, 10*time.Second, 10*time.Millisecond)
	tool(t, "ls", "-l", mnt+"/at/one/vda/p2/etc")

	// A daemon that is gone is an I/O error, not a hang, and all is well when it is there again.
	d.kill()
	_, err = os.ReadFile(mnt + "/at/one/vda/p2/etc/passwd")
	require.ErrorIs(t, err, syscall.EIO)
	require.Eventually(t, func() bool { return strings.Contains(said.String(), "tidemark: ") }, 10*time.Second, 10*time.Millisecond)
	d.start()
	require.Eventually(t, func() bool {
		b, err := os.ReadFile(mnt + "/at/one/vda/p2/etc/passwd")
		return err == nil && string(b) == "guest\n"
	}, 10*time.Second, 10*time.Millisecond)

	// It ends in order though somebody is in it.
	in, err := os.Open(mnt + "/at/one/vda/p2/etc")
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, cmd.Wait(), said.String())
	require.NoError(t, in.Close())
	require.Empty(t, list(t, mnt))
	nothingIsLeft(t)
}

// needVM skips a test where libguestfs has no VM, and sets it up for the programs of the test.
func needVM(t *testing.T) {
	t.Helper()
	need(t, "guestfish", "fusermount3", "qemu-system-x86_64", "depmod")
	if kernels, err := filepath.Glob(filepath.Join(guestImage, "kernel/boot/vmlinuz-*")); err != nil || len(kernels) == 0 {
		t.Skip("there is no kernel for the VM: run make guest-deps")
	}
	for line := range strings.Lines(tool(t, "../../testdata/libguestfs", "env")) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), "="); strings.HasPrefix(name, "LIBGUESTFS_") || strings.HasPrefix(name, "SUPERMIN_") {
			t.Setenv(name, value)
		}
	}
}

// TestMountInAVM shows files by way of a VM, which may be killed, and over a restart of the daemon.
func TestMountInAVM(t *testing.T) {
	d := guestDisk(t)
	needVM(t)
	mnt := d.path("all")
	cmd, said := d.mount(mnt, "web01", mnt)
	require.Equal(t, []string{"disk.raw", "p1", "p2"}, list(t, mnt+"/at/one/vda"))
	require.Equal(t, "first\n", read(t, mnt+"/at/one/vda/p2/etc/motd"))
	require.Equal(t, "kernel\n", read(t, mnt+"/at/one/vda/p1/vmlinuz"))
	target, err := os.Readlink(mnt + "/at/one/vda/p2/etc/escape")
	require.NoError(t, err)
	require.Equal(t, "/etc/passwd", target, "as it is")
	err = os.WriteFile(mnt+"/at/one/vda/p2/etc/motd", []byte("x"), 0o600)
	require.ErrorIs(t, err, syscall.EROFS)
	reads := func() bool {
		b, err := os.ReadFile(mnt + "/at/one/vda/p2/etc/passwd")
		return err == nil && string(b) == "guest\n"
	}
	tool(t, "pkill", "-KILL", "-P", strconv.Itoa(cmd.Process.Pid), "guestfish")
	require.Eventually(t, reads, time.Minute, 10*time.Millisecond)
	d.kill()
	_, err = os.ReadFile(mnt + "/at/one/vda/p1/vmlinuz")
	require.ErrorIs(t, err, syscall.EIO)
	_, err = os.Stat(mnt + "/at/-1ms")
	require.ErrorIs(t, err, syscall.EIO)
	d.start()
	require.Eventually(t, func() bool { return reads() && read(t, mnt+"/at/one/vda/p2/etc/motd") == "first\n" }, time.Minute, 10*time.Millisecond)
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, cmd.Wait(), said.String())
	require.Empty(t, list(t, mnt))
	nothingIsLeft(t)
}

// TestAVMIsKept for the next command, and ends when it is idle or the daemon does.
func TestAVMIsKept(t *testing.T) {
	d := guestDisk(t)
	needVM(t)
	kept := func() []string {
		all, err := filepath.Glob(filepath.Join(os.TempDir(), "tidemark-*/*.sock"))
		require.NoError(t, err)
		return all
	}
	require.Contains(t, d.ok("ls", "web01@one:/boot"), "vmlinuz")
	first := kept()
	require.Len(t, first, 1)
	require.Contains(t, d.ok("ls", "web01@one:/etc", "--keep", "1s"), "motd")
	d.ok("cp", "web01@one:/etc/motd", d.path("motd"))
	require.Equal(t, "first\n", read(t, d.path("motd")))
	require.Equal(t, first, kept(), "it is the same one")

	require.Equal(t, "! /etc/motd (size, time)\n", d.ok("diff", "--keep", "2s", "web01@one", "web01@latest:/etc"))
	require.Len(t, kept(), 2)
	require.Eventually(t, func() bool { return len(kept()) == 0 }, time.Minute, 10*time.Millisecond, "what is idle ends, as the last user has it")
	require.Contains(t, d.ok("ls", "web01@one:/etc"), "motd")

	// One whose VM or daemon has ended serves nobody, at once; and one that is killed leaves nothing.
	pid := func() string {
		parts := strings.Split(kept()[0], ".")
		return parts[len(parts)-2]
	}
	tool(t, "pkill", "-KILL", "-P", pid(), "guestfish")
	require.Contains(t, d.ok("ls", "web01@one:/etc"), "motd")
	d.kill()
	d.start()
	require.Contains(t, d.ok("ls", "web01@one:/etc"), "motd")
	require.Eventually(t, func() bool { return len(kept()) == 1 }, time.Minute, 10*time.Millisecond)
	tool(t, "kill", "-KILL", pid())
	require.Contains(t, d.ok("ls", "web01@one:/etc"), "motd")
	require.Len(t, list(t, filepath.Dir(kept()[0])), 4, "a socket, its lock, a directory, and the lock of all")
	d.kill()
	require.Eventually(t, func() bool { return len(kept()) == 0 }, time.Minute, 10*time.Millisecond)
	d.start()
	require.Contains(t, d.ok("ls", "--keep", "0", "web01@one:/etc"), "motd")
	require.Empty(t, kept())
	require.Eventually(t, func() bool {
		left, err := filepath.Glob(filepath.Join(os.TempDir(), "tidemark*"))
		require.NoError(t, err)
		return len(left) == 1
	}, time.Minute, 10*time.Millisecond, "nothing is left behind but the directory")
}

// TestSubvolumesInAMount: files of one number in two subvolumes are two, in a moment that is opened again and again.
func TestSubvolumesInAMount(t *testing.T) {
	needRoot(t)
	need(t, "mkfs.btrfs", "btrfs")
	t.Setenv("TMPDIR", t.TempDir())
	d := serve(t, 128<<20)
	d.stop()
	tool(t, "mkfs.btrfs", "-q", "-f", d.disk)
	tool(t, "sh", "-ec", `m=$(mktemp -d); mount -o loop "$0" $m; cd $m; for s in sa sb; do btrfs subvolume create $s >/dev/null; mkdir $s/d; echo "of $s" >$s/d/f; ln $s/d/f $s/d/g; done; cd /; umount $m; rmdir $m`, d.disk)
	d.start()
	d.ok("mark", "web01", "one")
	mnt := d.path("mnt")
	d.mount(mnt, "web01", mnt, "--kernel", "--idle", "50ms")
	for i := range 6 {
		for _, s := range [][]string{{"sa", "sb"}, {"sb", "sa"}}[i%2] {
			require.Equal(t, []string{"f", "g"}, list(t, mnt+"/at/one/vda/files/"+s+"/d"))
			require.Equal(t, "of "+s+"\n", read(t, mnt+"/at/one/vda/files/"+s+"/d/g"))
			require.Equal(t, "of "+s+"\n", read(t, mnt+"/at/one/vda/files/"+s+"/d/f"))
		}
		require.Eventually(t, func() bool {
			out, err := exec.Command("losetup", "-a").Output()
			return err == nil && !strings.Contains(string(out), os.TempDir()+"/tidemark")
		}, time.Minute, 10*time.Millisecond, "it is idle, and ends")
	}
}

// TestMountTakesNoRoot: somebody else mounts by way of fusermount3, is shown the disks, and ends it though their shell is in it.
func TestMountTakesNoRoot(t *testing.T) {
	needRoot(t) // to be somebody else
	need(t, "fusermount3", "cmp", "sleep")
	const nobody = 65534
	d := serve(t, 16<<20)
	d.scribble("web01/vda", 1, 50)
	d.ok("mark", "web01", "one")
	image, mnt, program := d.path("image"), d.path("mnt"), d.path("tidemark")
	d.ok("restore", "web01/vda@one", "--to", image)
	b, err := os.ReadFile(filepath.Join(binDir, "tidemark"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(program, b, 0o755))
	require.NoError(t, os.Mkdir(mnt, 0o755))
	require.NoError(t, os.Chown(mnt, nobody, nobody))
	for _, path := range []string{filepath.Dir(d.dir), d.dir, image, d.sock(), d.path("api.sock")} {
		require.NoError(t, os.Chmod(path, 0o777))
	}
	as := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), "HOME=/tmp", "TIDEMARK_API=unix:"+d.path("api.sock"))
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		return cmd
	}
	m, said := as(program, "mount", "web01", mnt), &console{}
	m.Stdout, m.Stderr = said, said
	require.NoError(t, m.Start())
	defer func() { _ = exec.Command("umount", "-l", mnt).Run() }()
	require.Eventually(t, func() bool { return strings.Contains(said.String(), "is mounted on") }, time.Minute, 10*time.Millisecond)
	out, err := as("cmp", image, mnt+"/at/one/vda/disk.raw").CombinedOutput()
	require.NoError(t, err, "%s%s", out, said.String())
	in := as("sh", "-c", `cd "$0"; echo in; exec sleep 60`, mnt+"/at/one")
	stdout, err := in.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, in.Start())
	_, err = stdout.Read(make([]byte, 2))
	require.NoError(t, err)
	require.NoError(t, m.Process.Signal(syscall.SIGTERM))
	require.NoError(t, m.Wait(), said.String())
	require.NoError(t, in.Process.Kill())
	_ = in.Wait() // it was killed
	require.Empty(t, list(t, mnt))
}

// TestMountOfOnePoint: its disks stand in the directory itself; it ends when it is unmounted.
func TestMountOfOnePoint(t *testing.T) {
	d := guestDisk(t)
	mnt := d.path("one")
	cmd, said := d.mount(mnt, "web01@one", mnt, "--kernel")
	require.Equal(t, []string{"vda"}, list(t, mnt))
	require.Equal(t, "first\n", read(t, mnt+"/vda/p2/etc/motd"))
	tool(t, "umount", mnt)
	require.NoError(t, cmd.Wait(), said.String())
	nothingIsLeft(t)
	for _, bad := range []struct {
		code int
		text string
		args []string
	}{
		{4, "no marker has this label", []string{"web01@none", mnt}},
		{4, "group \"none\": not found", []string{"none", mnt}},
		{1, "no such file", []string{"web01", d.path("none")}},
		{2, "is no directory", []string{"web01", d.path("vda.raw")}},
		{2, "names no point", []string{"web01@", mnt}},
	} {
		out, code := d.tidemark(append([]string{"mount", "--kernel"}, bad.args...)...)
		require.Equal(t, bad.code, code, "%v: %s", bad.args, out)
		require.Contains(t, out, bad.text)
	}
}
