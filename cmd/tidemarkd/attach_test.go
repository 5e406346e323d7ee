package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

// attachInit is what the guest of TestAttachInAGuest does: it protects its own disk, which the host has made, and attaches what it was.
const attachInit = `#!/bin/busybox sh
export PATH=/bin TIDEMARK_API=unix:/t/api.sock
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mkdir -p /t /tmp /a /b; mount -t tmpfs -o size=300m t /t
for pass in 1 2 3 4 5 6; do for m in /modules/*.ko; do insmod "$m" 2>/dev/null; done; done
for wait in $(seq 100); do [ -b /dev/vda ] && break; sleep 0.1; done
fail() { echo "GUEST-FAILED $*"; cat /t/log /t/err; dmesg | tail -n 20; poweroff -f; }
ok() { "$@" >/t/out 2>/t/err || fail "$*"; }
code() { want=$1; shift; "$@" >/t/out 2>/t/err; [ $? = $want ] || fail "expected code $want: $*"; }
start() {
	tidemarkd --state-dir /t/state --nbd unix:/t/nbd.sock --api unix:/t/api.sock --disk web01/vda=/dev/vda --config /tidemark.yaml >>/t/log 2>&1 &
	pid=$!
	for wait in $(seq 300); do tidemark status >/dev/null 2>&1 && return; sleep 0.1; done
	fail "the daemon does not start"
}
crash() { kill -9 $pid; wait $pid 2>/dev/null; }
start
ok tidemark mark web01 one

# What the disk was: a read-only device that can be mounted, and survives the daemon.
ok tidemark attach web01@one
dev=$(cut -f 1 /t/out); sys=/sys/block/${dev#/dev/}
[ -b $dev ] && [ $(cat $sys/ro) = 1 ] || fail "no read-only device: $dev"
ok cmp /dev/vda $dev
ok mount -t ext4 -o ro $dev /a
[ "$(cat /a/file)" = "of the host" ] || fail "the file"
code 9 tidemark detach $dev
grep -q "in use" /t/err || fail "detach of what is mounted"
ok umount /a # a mounted ext4 has its own idea of its journal's header in the device's pages
want=$(md5sum </dev/vda)
echo 3 >/proc/sys/vm/drop_caches
(md5sum <$dev >/t/sum) &
reader=$!
crash
sleep 1
start
wait $reader || fail "a reader over a crash"
[ "$(cat /t/sum)" = "$want" ] || fail "what it read"
echo 3 >/proc/sys/vm/drop_caches
crash; start
[ "$(md5sum <$dev)" = "$want" ] || fail "what was read after a crash"
ok tidemark detach web01@one
for wait in $(seq 50); do [ $(cat $sys/size) = 0 ] && break; sleep 0.1; done
[ $(cat $sys/size) = 0 ] || fail "the device is still there"
code 4 tidemark detach $dev
code 2 tidemark attach web01
code 4 tidemark attach web01@none
echo GUEST-READ

# A scratch export is written over crashes, and loses nothing.
ok tidemark export web01@one --scratch --name s
ok tidemark attach scratch/s
dev=$(cut -f 1 /t/out)
ok mount -t ext4 $dev /b
(i=0; while [ $i -lt 60 ]; do dd if=/dev/urandom of=/b/file-$i bs=64k count=2 conv=fsync 2>/dev/null || exit 1; (cd /b && md5sum file-$i) >>/t/sums; i=$((i+1)); done) &
writer=$!
for n in 10 25 40; do
	while [ $(cat /t/sums 2>/dev/null | wc -l) -lt $n ]; do sleep 0.05; done
	crash; sleep 0.5; start
done
wait $writer || fail "the writer"
ok umount /b
code 9 tidemark unexport s
ok tidemark detach scratch/s
ok tidemark attach scratch/s/vda
dev=$(cut -f 1 /t/out)
ok mount -t ext4 -o ro $dev /b
(cd /b && md5sum -c /t/sums >/t/out 2>&1) || fail "what was written"
[ $(wc -l </t/sums) = 60 ] || fail "how much was written"
code 9 tidemark detach scratch/s/vda
ok tidemark detach --force scratch/s/vda
umount -l /b
dmesg | grep -v "$(basename $dev)" | grep -iE 'i/o error|ext4-fs error' && fail dmesg

# What is attached is not promoted, and what is promoted is not attached: it would be a live disk of this host's.
ok tidemark export web01@one --scratch --name p
ok tidemark attach scratch/p
code 9 tidemark promote p --group web02 --to /t/images
grep -q "it is attached as /dev/nbd" /t/err || fail "why it is not promoted"
ok tidemark detach scratch/p
ok tidemark promote p --group web02 --to /t/images --wait
code 2 tidemark attach scratch/p
grep -q "live disk" /t/err || fail "why it is not attached"

ok tidemark status --json
grep -q '"attachments": \[\]' /t/out || fail "attachments are left"
echo GUEST-WROTE
kill $pid; wait $pid || fail "the end"
echo GUEST-DONE
poweroff -f
`

// TestAttachInAGuest: devices of the kernel's, in a guest that has the module for them, over crashes of the daemon.
func TestAttachInAGuest(t *testing.T) {
	need(t, "qemu-system-x86_64", "mkfs.ext4", "cpio")
	if _, err := os.Stat(filepath.Join(guestImage, "root/modules/nbd.ko")); err != nil {
		t.Skip("this machine has no guest image: run make guest-deps")
	}
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	require.NoError(t, os.MkdirAll(filepath.Join(root, "bin"), 0o755))
	for _, p := range []string{"tidemarkd", "tidemark"} {
		build := exec.Command("go", "build", "-o", filepath.Join(root, "bin")+"/", "../"+p)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, err := build.CombinedOutput()
		require.NoError(t, err, string(out))
	}
	require.NoError(t, os.WriteFile(filepath.Join(root, "attach-init"), []byte(attachInit), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(root, "tidemark.yaml"), []byte("journal: {segment: 16MiB, reserve: 16MiB}\n"), 0o644))
	initrd := filepath.Join(dir, "initrd")
	image, err := filepath.Abs(filepath.Join(guestImage, "initrd"))
	require.NoError(t, err)
	// The kernel takes one archive behind the other.
	tool(t, "sh", "-ec", "cp '"+image+"' '"+initrd+"'; cd '"+root+"'; find . | cpio --quiet -o -H newc | gzip -1 >>'"+initrd+"'")
	disk, content := filepath.Join(dir, "disk"), filepath.Join(dir, "content")
	require.NoError(t, os.Mkdir(content, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(content, "file"), []byte("of the host"), 0o644))
	require.NoError(t, os.WriteFile(disk, nil, 0o600))
	require.NoError(t, os.Truncate(disk, 48<<20))
	tool(t, "mkfs.ext4", "-q", "-d", content, disk)

	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Minute)
	defer cancel()
	qemu := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024", "-nographic", "-no-reboot",
		"-kernel", filepath.Join(guestImage, "vmlinuz"), "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1 rdinit=/attach-init",
		"-blockdev", "driver=file,node-name=disk,filename="+disk, "-device", "virtio-blk-pci,drive=disk")
	out, err := qemu.CombinedOutput()
	require.NoError(t, err, string(out))
	for _, says := range []string{"GUEST-READ", "GUEST-WROTE", "GUEST-DONE"} {
		require.Contains(t, string(out), says)
	}
	require.NotContains(t, strings.ReplaceAll(string(out), "\r", ""), "GUEST-FAILED")
}

// TestALiveDiskIsNotAttached, under none of its names.
func TestALiveDiskIsNotAttached(t *testing.T) {
	d := serve(t, 1<<20)
	for _, export := range []string{"web01/vda", ""} {
		_, err := d.api().Attach(t.Context(), api.AttachRequest{Exports: []string{export}, Asked: "x"})
		require.ErrorContains(t, err, "is a live disk", "%q", export)
	}
	_, err := d.api().Attach(t.Context(), api.AttachRequest{})
	require.ErrorContains(t, err, "name the exports")
	_, err = d.api().Detach(t.Context(), "web01/vda", true)
	require.ErrorContains(t, err, "no device is attached")
}
