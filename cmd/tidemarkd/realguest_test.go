package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

// The tests of this file run a Debian guest with PostgreSQL and the guest agent from Tidemark's exports: the
// data on one disk, the write-ahead log on another. testdata/guest-debian makes it.

const debianImage = "../../.cache/debian"

const realGuest = `
groups:
  web01:
    disks: {vda: {backing: %DIR/vda.raw}, vdb: {backing: %DIR/vdb.raw}}
    guests: {web01: {GUEST, port: %DIR/port}}
    freeze_wait: 60s  # under emulation everything takes its time
    freeze_limit: 20s
`

// hooksConf is the guest's /etc/tidemark/hooks.conf.
const hooksConf = `POSTGRESQL_TIMEOUT=25 # under emulation
POSTGRESQL_PSQL="psql -h /run/postgresql -d postgres"
[ ! -e /run/stop-mode ] || POSTGRESQL_MODE=stop
POSTGRESQL_STOP="tm-pg stop"
POSTGRESQL_START="tm-pg start"
`

func needGuest(t *testing.T) {
	t.Helper()
	need(t, "qemu-system-x86_64", "cpio", "dumpe2fs", "unshare", "go")
	needRoot(t)
	if _, err := os.Stat(filepath.Join(debianImage, "root.img")); err != nil {
		t.Skip("this machine has no Debian guest: run make guest-deps")
	}
}

// withGuest is a daemon with the guest's two disks, and the guest's initrd with what the project installs in guests.
func withGuest(t *testing.T, reached string) *served {
	t.Helper()
	dir, err := os.MkdirTemp("", "tmg") // short: sockets are in it
	require.NoError(t, err)
	d := &served{t: t, dir: dir}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	for file, image := range map[string]string{"vda.raw": "root.img", "vdb.raw": "wal.img"} {
		tool(t, "cp", "--sparse=always", filepath.Join(debianImage, image), d.path(file))
	}
	d.configure(strings.ReplaceAll(realGuest, "GUEST", reached))
	extra := d.path("extra/extra")
	for _, sub := range []string{"etc/qemu/fsfreeze-hook.d", "etc/tidemark", "usr/local/bin"} {
		require.NoError(t, os.MkdirAll(filepath.Join(extra, sub), 0o755))
	}
	tool(t, "cp", "../../guest/hooks/fsfreeze-hook", extra+"/etc/qemu/fsfreeze-hook")
	tool(t, "cp", "../../guest/hooks/postgresql", extra+"/etc/qemu/fsfreeze-hook.d/50-postgresql")
	require.NoError(t, os.WriteFile(extra+"/etc/tidemark/hooks.conf", []byte(hooksConf), 0o644))
	build := exec.Command("go", "build", "-o", extra+"/usr/local/bin/", "../tidemark-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	tool(t, "sh", "-c", fmt.Sprintf("cp %s/initrd %s && cd %s && find . | cpio --quiet -o -H newc | gzip -1 >>%s", debianImage, d.path("initrd"), d.path("extra"), d.path("initrd")))
	d.start()
	return d
}

// boot starts the guest in QEMU, with two disks given as -blockdev, until the test ends or stop.
func (d *served) boot(run string, disks ...string) (said *console, stop func()) {
	d.t.Helper()
	args := []string{"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "768", "-nographic", "-nodefaults", "-no-reboot", "-serial", "stdio",
		"-kernel", filepath.Join(debianImage, "vmlinuz"), "-initrd", d.path("initrd"), "-append", "console=ttyS0 quiet panic=-1 mitigations=off tidemark.run=" + run,
		"-device", "virtio-serial", "-chardev", "socket,id=ga,server=on,wait=off,path=" + d.path("ga"),
		"-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0",
		"-chardev", "socket,id=port,reconnect=1,path=" + d.path("port"), "-device", "virtserialport,chardev=port,name=org.tidemark.0"}
	for i, disk := range disks {
		args = append(args, "-blockdev", fmt.Sprintf("%s,node-name=d%d", disk, i), "-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i))
	}
	cmd := exec.Command("qemu-system-x86_64", args...)
	said = &console{}
	cmd.Stdout, cmd.Stderr = said, said
	require.NoError(d.t, cmd.Start())
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			_ = cmd.Process.Signal(syscall.SIGKILL)
			_ = cmd.Wait() // it was killed, as a host that loses power does
		}
	}
	d.t.Cleanup(func() {
		stop()
		if d.t.Failed() {
			d.t.Logf("the guest said:\n%s", said.String())
		}
	})
	return said, stop
}

func (d *served) nbdDisk(export string) string {
	return "driver=nbd,server.type=unix,server.path=" + d.sock() + ",export=" + export + ",reconnect-delay=60"
}

// says waits until the guest has said something n times.
func says(t *testing.T, said *console, what string, n int) {
	t.Helper()
	require.Eventually(t, func() bool { return strings.Count(said.String(), what) >= n }, 4*time.Minute, 50*time.Millisecond, what)
}

// works waits until the guest has done some more transactions.
func works(t *testing.T, said *console) {
	t.Helper()
	tps := regexp.MustCompile(`GUEST-TPS ([1-9]|0\.[1-9])`)
	before := len(tps.FindAllString(said.String(), -1))
	require.Eventually(t, func() bool { return len(tps.FindAllString(said.String(), -1)) > before }, 2*time.Minute, 50*time.Millisecond)
}

// exec has the guest's agent run a command, beside Tidemark, when nothing is being cut.
func (d *served) exec(command string) {
	d.t.Helper()
	c, err := net.Dial("unix", d.path("ga"))
	require.NoError(d.t, err)
	defer c.Close()
	require.NoError(d.t, c.SetDeadline(time.Now().Add(30*time.Second)))
	in := bufio.NewReader(c)
	_, err = fmt.Fprintf(c, "\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":7}}\n")
	require.NoError(d.t, err)
	_, err = in.ReadBytes(0xff)
	require.NoError(d.t, err)
	_, err = in.ReadBytes('\n')
	require.NoError(d.t, err)
	q, err := json.Marshal(map[string]any{"execute": "guest-exec", "arguments": map[string]any{"path": "/bin/sh", "arg": []string{"-c", command}}})
	require.NoError(d.t, err)
	_, err = c.Write(append(q, '\n'))
	require.NoError(d.t, err)
	answer, err := in.ReadString('\n')
	require.NoError(d.t, err)
	require.Contains(d.t, answer, `"pid"`)
}

// checkCopy restores both disks at a point and starts PostgreSQL on them, in a name space of its own. It
// returns what the guest's own check says.
func (d *served) checkCopy(point string, clean bool) string {
	d.t.Helper()
	root, wal := d.path(point+".root"), d.path(point+".wal")
	d.ok("restore", "web01/vda@"+point, "--to", root)
	d.ok("restore", "web01/vdb@"+point, "--to", wal)
	for _, image := range []string{root, wal} {
		if head := tool(d.t, "dumpe2fs", "-h", image); clean {
			require.NotContains(d.t, head, "needs_recovery", "it was frozen")
		} else {
			require.Contains(d.t, head, "needs_recovery", "it was not frozen")
		}
	}
	script := `set -e; m=$(mktemp -d); mount -o loop "$0" $m; mount -o loop "$1" $m/wal; mount -t proc proc $m/proc; mount --bind /dev $m/dev; mount -t tmpfs -o mode=1777 shm $m/dev/shm
mount -t tmpfs run $m/run; mount -t tmpfs tmp $m/tmp; mkdir -p $m/run/postgresql; chmod 1777 $m/run/postgresql $m/tmp; chroot $m /sbin/tm-check </dev/null || true
umount -R $m; rmdir $m`
	out := tool(d.t, "unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c", script, root, wal)
	require.Contains(d.t, out, "GUEST-CHECK ok", "%s: %s", point, out)
	return out
}

// TestApplicationMarkersOfARealGuest: PostgreSQL under load, data and log on two disks. At application markers both
// file systems are clean and the server needs to replay next to nothing, or nothing where the hook stops it; at
// crash-consistent ones recovery is clean. The accounts agree at all of them, so the disks are of one moment.
func TestApplicationMarkersOfARealGuest(t *testing.T) {
	needGuest(t)
	d := withGuest(t, "agent: %DIR/ga")
	said, stop := d.boot("bench", d.nbdDisk("web01/vda"), d.nbdDisk("web01/vdb"))
	says(t, said, "GUEST-READY", 1)
	works(t, said)
	d.ok("mark", "web01", "crash-1")
	d.ok("mark", "web01", "app-1", "--consistency", "application")
	works(t, said)
	d.exec(`tidemark-guest "before-migration 42" >/dev/ttyS0 2>&1; tidemark-guest "a/b" >/dev/ttyS0 2>&1`)
	says(t, said, "before-migration 42 is LSN", 1)
	says(t, said, "tidemark-guest: bad request", 1)
	require.Equal(t, "guest:web01", d.marker("before-migration 42").By)
	d.ok("mark", "web01", "fs-1", "--consistency", "filesystem")
	works(t, said)
	d.exec("touch /run/stop-mode")
	time.Sleep(time.Second) // the command runs by itself
	d.ok("mark", "web01", "app-stop", "--consistency", "application")
	works(t, said)
	d.ok("mark", "web01", "crash-2")
	stop()

	for _, m := range []string{"app-1", "fs-1", "app-stop"} {
		t.Logf("%s: frozen for %.2f s", m, d.marker(m).Frozen)
	}
	require.NotContains(t, d.checkCopy("app-stop", true), "recovery", "a server that was stopped needs none")
	out := d.checkCopy("app-1", true)
	replayed := redo(t, out)
	t.Logf("app-1: %d bytes are replayed", replayed)
	require.Less(t, replayed, int64(4<<20), "a checkpoint was made just before")
	d.checkCopy("fs-1", true)
	require.Contains(t, d.checkCopy("crash-1", false), "recovery")
	d.checkCopy("crash-2", false)

	// And it boots.
	said, _ = d.boot("none", "driver=file,filename="+d.path("app-stop.root"), "driver=file,filename="+d.path("app-stop.wal"))
	says(t, said, "GUEST-READY", 1)
	require.NotContains(t, said.String(), "GUEST-FAILED")
}

// transactions is how many the guest's own check found in its history.
func transactions(t *testing.T, out string) (n int) {
	t.Helper()
	m := regexp.MustCompile(`GUEST-SUMS (?:-?\d+\|){4}(\d+)\|`).FindStringSubmatch(out)
	require.NotNil(t, m, out)
	_, err := fmt.Sscan(m[1], &n)
	require.NoError(t, err)
	return n
}

// TestFailoverOfARealGuest: a host dies in the midst of pgbench. The guest goes on at the replica, with every transaction that the replica had
// acknowledged; then the first host takes it back, and has lost nothing.
func TestFailoverOfARealGuest(t *testing.T) {
	needGuest(t)
	d := withGuest(t, "agent: %DIR/ga")
	dir, err := os.MkdirTemp("", "tmg")
	require.NoError(t, err)
	b := &served{t: t, dir: dir}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	listen := freePort(t)
	b.configure(fmt.Sprintf("replication: {listen: 'tcp:%s', name: hostb}\n", listen))
	b.start()
	require.NoError(t, os.Symlink(d.path("initrd"), b.path("initrd")))
	// The images were shipped on a disk, as it were.
	seeds := filepath.Join(b.path("state"), "replicas/web01")
	require.NoError(t, os.MkdirAll(seeds, 0o700))
	for _, disk := range []string{"vda.raw", "vdb.raw"} {
		tool(t, "cp", "--sparse=always", d.path(disk), filepath.Join(seeds, disk))
	}
	token := strings.Split(b.ok("replica", "invite", "--name", "hosta"), "\n")[0]
	d.ok("replica", "join", listen, token)
	d.configure(strings.ReplaceAll(realGuest, "GUEST", "agent: %DIR/ga") + "    replicas: [hostb]\n")
	d.ok("reload")
	began := time.Now()
	require.Eventually(t, func() bool {
		r := d.group("web01").Replicas
		return len(r) == 1 && r[0].State == "streaming"
	}, 3*time.Minute, time.Second, "seeded")
	t.Logf("seeded after %v", time.Since(began))

	said, stop := d.boot("bench", d.nbdDisk("web01/vda"), d.nbdDisk("web01/vdb"))
	says(t, said, "GUEST-READY", 1)
	works(t, said)
	works(t, said)
	d.ok("mark", "web01", "acked", "--wait-replica")
	works(t, said)
	d.kill()
	stop()
	failed := time.Now()
	t.Log(b.ok("failover", "web01"))
	b.ok("mark", "web01", "taken-over")
	have, acked := transactions(t, b.checkCopy("taken-over", false)), transactions(t, b.checkCopy("acked", false))
	t.Logf("%d transactions at the last acknowledgement that is known, %d when it was taken over", acked, have)
	require.Positive(t, acked)
	require.GreaterOrEqual(t, have, acked)

	said, stop = b.boot("bench", b.nbdDisk("web01/vda"), b.nbdDisk("web01/vdb"))
	says(t, said, "GUEST-READY", 1)
	require.NotContains(t, said.String(), "GUEST-FAILED")
	works(t, said)
	t.Logf("it works %v later", time.Since(failed))
	d.start()
	eventually(t, func() bool { return d.group("web01").Role == "follows" })
	works(t, said)
	_, code := d.tidemark("failback", "web01")
	require.NotZero(t, code, "the guest runs")
	b.ok("mark", "web01", "stopped", "--wait-replica")
	stop()
	b.ok("mark", "web01", "end")
	eventually(t, func() bool { _, code := d.tidemark("failback", "web01"); return code == 0 })
	require.Greater(t, transactions(t, d.checkCopy("end", false)), have)
	require.Contains(t, d.ok("replica", "compare", "web01", "--at", "end"), "the same")
	require.Contains(t, d.ok("verify", "web01"), "no damage")
}

// redo is how much of its log a server's log says it replayed, in bytes.
func redo(t *testing.T, log string) int64 {
	t.Helper()
	if strings.Contains(log, "redo is not required") {
		return 0
	}
	at := func(pattern string) (lsn int64) {
		m := regexp.MustCompile(pattern + ` ([0-9A-F]+)/([0-9A-F]+)`).FindStringSubmatch(log)
		require.NotNil(t, m, log)
		var hi, lo int64
		_, err := fmt.Sscanf(m[1]+" "+m[2], "%X %X", &hi, &lo)
		require.NoError(t, err)
		return hi<<32 + lo
	}
	return at("redo done at") - at("redo starts at")
}

const domainXML = `<domain type='qemu'>
  <name>web01</name><uuid>c0a80101-1111-4222-8333-444444444444</uuid>
  <memory unit='MiB'>768</memory><vcpu>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><kernel>%IMAGE/vmlinuz</kernel><initrd>%DIR/initrd</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 mitigations=off tidemark.run=bench</cmdline></os>
  <features><acpi/></features><cpu mode='maximum'/><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>%EMULATOR</emulator>
    <disk type='network' device='disk'><driver name='qemu' type='raw' discard='unmap'/>
      <source protocol='nbd' name='web01/vda'><host transport='unix' socket='%DIR/nbd.sock'/><reconnect delay='60'/></source><target dev='vda' bus='virtio'/></disk>
    <disk type='network' device='disk'><driver name='qemu' type='raw' discard='unmap'/>
      <source protocol='nbd' name='web01/vdb'><host transport='unix' socket='%DIR/nbd.sock'/><reconnect delay='60'/></source><target dev='vdb' bus='virtio'/></disk>
    <controller type='usb' model='none'/><memballoon model='none'/>
    <serial type='file'><source path='%DIR/console'/><target port='0'/></serial>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='unix'><source mode='connect' path='%DIR/port'><reconnect enabled='yes' timeout='1'/></source><target type='virtio' name='org.tidemark.0'/></channel>
  </devices>
</domain>`

// TestAGuestOfLibvirt: a real libvirtd runs the guest, and holds its agent.
func TestAGuestOfLibvirt(t *testing.T) {
	needGuest(t)
	need(t, "libvirtd", "virsh")
	d := withGuest(t, "libvirt: web01, socket: %DIR/lv/s/libvirt-sock")
	libvirtd := exec.Command("../../testdata/libvirtd", d.path("lv"))
	var log console
	libvirtd.Stdout, libvirtd.Stderr = &log, &log
	require.NoError(t, libvirtd.Start())
	sock := d.path("lv/s/libvirt-sock")
	virsh := func(args ...string) (string, error) {
		out, err := exec.Command("virsh", append([]string{"-c", "qemu+unix:///system?socket=" + sock}, args...)...).CombinedOutput()
		return string(out), err
	}
	t.Cleanup(func() {
		_, _ = virsh("destroy", "web01") // it may be down
		_ = libvirtd.Process.Signal(syscall.SIGTERM)
		_ = libvirtd.Wait()
		if t.Failed() {
			t.Logf("libvirtd: %s", log.String())
			b, _ := os.ReadFile(d.path("console"))
			t.Logf("the guest said:\n%s", b)
		}
	})
	require.Eventually(t, func() bool { _, err := os.Stat(sock); return err == nil }, time.Minute, 50*time.Millisecond)
	out, code := d.tidemark("mark", "web01", "early", "--consistency", "application")
	require.Equal(t, 7, code, out)
	require.Contains(t, out, "Domain not found")

	image, err := filepath.Abs(debianImage)
	require.NoError(t, err)
	emulator, err := filepath.Abs("../../testdata/qemu-reconnecting")
	require.NoError(t, err)
	fill := strings.NewReplacer("%DIR", d.dir, "%IMAGE", image, "%EMULATOR", emulator)
	require.NoError(t, os.WriteFile(d.path("web01.xml"), []byte(fill.Replace(domainXML)), 0o600))
	for _, args := range [][]string{{"define", d.path("web01.xml")}, {"start", "web01"}} {
		out, err := virsh(args...)
		require.NoError(t, err, out)
	}
	said := func() string { b, _ := os.ReadFile(d.path("console")); return string(b) }
	require.Eventually(t, func() bool { return strings.Contains(said(), "GUEST-TPS") }, 3*time.Minute, 100*time.Millisecond)

	out = d.ok("mark", "web01", "app", "--consistency", "application")
	t.Log(out)
	m := d.marker("app")
	require.Equal(t, "application", m.Consistency)
	status, err := virsh("qemu-agent-command", "web01", `{"execute":"guest-fsfreeze-status"}`)
	require.NoError(t, err, status)
	require.Contains(t, status, "thawed")
	d.checkCopy("app", true)

	definition := d.ok("definition", "web01@app")
	require.Contains(t, definition, "<name>web01</name>")
	copied := d.ok("definition", "web01@app", "--new-identity", "web01-copy", "--disk", "vda="+d.path("app.root"), "--disk", "vdb="+d.path("app.wal"))
	require.NoError(t, os.WriteFile(d.path("copy.xml"), []byte(xmlOf(copied)), 0o600))
	out, err = virsh("define", "--validate", d.path("copy.xml"))
	require.NoError(t, err, out)
	defer func() { _, _ = virsh("undefine", "web01-copy") }()

	// A frozen guest whose daemon dies is thawed by the next one.
	out, err = virsh("domfsfreeze", "web01")
	require.NoError(t, err, out)
	d.kill()
	note := fmt.Sprintf(`{"version":1,"group":"web01","label":"x","guests":{"web01":{"libvirt":"web01","socket":%q}}}`, sock)
	require.NoError(t, os.WriteFile(d.path("state/frozen/web01.json"), []byte(note), 0o600))
	d.start()
	require.Eventually(t, func() bool {
		status, err := virsh("qemu-agent-command", "web01", `{"execute":"guest-fsfreeze-status"}`)
		return err == nil && strings.Contains(status, "thawed")
	}, time.Minute, 200*time.Millisecond)
	require.Eventually(t, func() bool {
		_, code := d.tidemark("mark", "web01", "again", "--consistency", "filesystem")
		return code == 0
	}, time.Minute, time.Second)
	var p api.Points
	require.NoError(t, json.Unmarshal([]byte(d.ok("points", "web01", "--json", "--consistency", "filesystem")), &p))
	require.Len(t, p.Markers, 2)
	require.NotContains(t, said(), "I/O error", "the guest waits for the daemon")
}

// xmlOf is a command's standard output without what it said on the other one.
func xmlOf(out string) string {
	if i := strings.LastIndex(out, "</domain>"); i >= 0 {
		return out[:i+len("</domain>")]
	}
	return out
}
