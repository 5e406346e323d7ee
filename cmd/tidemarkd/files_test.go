package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestFilesOfThePast lists and copies files of a guest's disk as they were: a GPT disk with /boot and the root, by the host's kernel.
func TestFilesOfThePast(t *testing.T) {
	needRoot(t)
	need(t, "mkfs.ext4", "sfdisk", "nbdcopy", "losetup", "blkid")
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
	names, err := filepath.Glob(filepath.Join(os.TempDir(), "tidemark[0-9]*"))
	require.NoError(t, err)
	require.Empty(t, names, "nothing is left behind")
}
