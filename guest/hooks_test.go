package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// The tests of this file run the hook scripts against the real servers, with QEMU's real guest agent and
// a real freeze: of a file system on a loop device, never of the machine's own.

// need skips a test, by the name of what is missing, where a tool is absent.
func need(t *testing.T, tools ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("takes root: mounts, loop devices and freezing")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("this machine has no %s: run make guest-deps", tool)
		}
	}
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, out)
	return string(out)
}

// as runs a program as another user.
func as(user, name string, args ...string) *exec.Cmd {
	cmd := exec.Command("setpriv", append([]string{"--reuid=" + user, "--regid=" + user, "--init-groups", name}, args...)...)
	cmd.Dir = "/"
	return cmd
}

func output(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%v: %s", cmd.Args, out)
	return strings.TrimSpace(string(out))
}

// start runs a server until the test ends, or stop.
func start(t *testing.T, cmd *exec.Cmd) (stop func()) {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "log")
	require.NoError(t, err)
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait() // how it ends is its own
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("%v:\n%s", cmd.Args, b)
		}
		_ = log.Close()
	}
	t.Cleanup(stop)
	return stop
}

// machine is a file system that is frozen as a guest's is, by the real agent and its hooks.
type machine struct {
	t     *testing.T
	dir   string
	image string
	mnt   string
	conf  string
	sock  string
}

func newMachine(t *testing.T, hook, conf string) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "tidemark-hook") // short: sockets are in it
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	m := &machine{t: t, dir: dir, image: dir + "/image", mnt: dir + "/mnt", conf: dir + "/hooks.conf", sock: dir + "/ga.sock"}
	require.NoError(t, os.WriteFile(m.image, nil, 0o600))
	require.NoError(t, os.Truncate(m.image, 512<<20))
	command(t, "mkfs.ext4", "-q", "-F", m.image)
	m.mount(m.image, m.mnt)
	m.configure(conf)
	require.NoError(t, os.MkdirAll(dir+"/hook.d", 0o755))
	require.NoError(t, os.MkdirAll(dir+"/state", 0o755))
	script, err := filepath.Abs("hooks/" + hook)
	require.NoError(t, err)
	require.NoError(t, os.Symlink(script, dir+"/hook.d/50-"+hook))
	dispatcher, err := filepath.Abs("hooks/fsfreeze-hook")
	require.NoError(t, err)
	agent := exec.Command("qemu-ga", "-m", "unix-listen", "-p", m.sock, "-t", dir+"/state", "-f", dir+"/ga.pid", "-F"+dispatcher)
	agent.Env = append(os.Environ(), "FSFREEZE_HOOK_D="+dir+"/hook.d", "FSFREEZE_HOOK_LOG="+dir+"/hook.log", "TIDEMARK_HOOKS_CONF="+m.conf, "TIDEMARK_RUN="+dir)
	start(t, agent)
	require.Eventually(t, func() bool { _, err := os.Stat(m.sock); return err == nil }, 10*time.Second, 10*time.Millisecond)
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(dir + "/hook.log")
			t.Logf("the hooks:\n%s", b)
		}
	})
	return m
}

func (m *machine) configure(conf string) {
	m.t.Helper()
	require.NoError(m.t, os.WriteFile(m.conf, []byte(strings.ReplaceAll(conf, "%DIR", m.dir)), 0o644))
}

func (m *machine) mount(image, at string) {
	m.t.Helper()
	require.NoError(m.t, os.MkdirAll(at, 0o755))
	command(m.t, "mount", "-o", "loop", image, at)
	m.t.Cleanup(func() { command(m.t, "umount", "-l", at) })
}

// cut takes a picture of the file system at rest, as a marker is, and mounts it.
func (m *machine) cut(during func()) (Report, string) {
	m.t.Helper()
	notes, err := NewNotes(m.dir + "/notes")
	require.NoError(m.t, err)
	c := Cut{
		Group: "g", Label: "l", Guests: []Named{{"host", Spec{Agent: m.sock, Mounts: []string{m.mnt}}}}, Limit: time.Minute, Notes: notes,
	}
	picture := fmt.Sprintf("%s/picture%d", m.dir, time.Now().UnixNano())
	r, err := c.Run(context.Background(), func(context.Context) (record.LSN, error) {
		if during != nil {
			during()
		}
		out, err := exec.Command("cp", "--sparse=always", m.image, picture).CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("%w: %s", err, out)
		}
		return 1, nil
	})
	require.NoError(m.t, err)
	require.NoError(m.t, r.Problem())
	if !r.Taken {
		return r, ""
	}
	// What was frozen is clean: there is no journal to replay.
	require.NotContains(m.t, command(m.t, "dumpe2fs", "-h", picture), "needs_recovery")
	m.mount(picture, picture+".mnt")
	return r, picture + ".mnt"
}

// pgBin is where Debian has PostgreSQL's programs.
func pgBin(t *testing.T) string {
	t.Helper()
	all, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	require.NoError(t, err)
	if len(all) == 0 {
		t.Skip("this machine has no postgresql: run make guest-deps")
	}
	return all[len(all)-1]
}

// TestPostgreSQLHook: with the hook's default, what is replayed is what was written in some milliseconds; with
// stop, nothing is. The accounts' sums agree in both.
func TestPostgreSQLHook(t *testing.T) {
	need(t, "qemu-ga", "psql", "setpriv", "dumpe2fs")
	bin := pgBin(t)
	m := newMachine(t, "postgresql", "")
	data := m.mnt + "/data"
	sock := m.dir + "/pg" // a path of a socket has 107 bytes at most
	require.NoError(t, os.Mkdir(data, 0o700))
	require.NoError(t, os.Mkdir(sock, 0o700))
	command(t, "chown", "postgres:postgres", data, sock)
	port := func(dir string) string {
		if dir == data {
			return "5432"
		}
		return "5433"
	}
	output(t, as("postgres", bin+"/initdb", "-D", data, "-A", "trust", "-N", "--locale=C"))
	ctl := func(dir, what string) string {
		return output(t, as("postgres", bin+"/pg_ctl", "-D", dir, "-w", "-s", "-l", dir+"/log", "-o", "-c listen_addresses='' -c unix_socket_directories="+sock+" -p "+port(dir), what))
	}
	ctl(data, "start")
	defer ctl(data, "stop")
	psql := func(dir, sql string) string {
		return output(t, as("postgres", "psql", "-h", sock, "-p", port(dir), "-XAtq", "-d", "bench", "-c", sql))
	}
	output(t, as("postgres", "createdb", "-h", sock, "bench"))
	output(t, as("postgres", bin+"/pgbench", "-h", sock, "-i", "-q", "bench"))
	load := func() (stop func()) {
		return start(t, as("postgres", bin+"/pgbench", "-h", sock, "-n", "-c", "4", "-T", "600", "bench"))
	}
	check := func(dir string) (log string) {
		require.NoError(t, os.RemoveAll(dir+"/log"))
		_ = os.Remove(dir + "/postmaster.pid") // of the server that the picture was taken of
		ctl(dir, "start")
		defer ctl(dir, "stop")
		sums := psql(dir, "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers), (select sum(delta) from pgbench_history)")
		parts := strings.Split(sums, "|")
		require.Len(t, parts, 4)
		for _, p := range parts {
			require.Equal(t, parts[0], p, sums)
		}
		b, err := os.ReadFile(dir + "/log")
		require.NoError(t, err)
		return string(b)
	}
	conf := "POSTGRESQL_PSQL='psql -h %DIR/pg -d postgres'\n"
	m.configure(conf)
	stop := load()
	require.Eventually(t, func() bool { return psql(data, "select count(*) from pgbench_history") > "100" }, 20*time.Second, 50*time.Millisecond)
	r, picture := m.cut(nil)
	require.True(t, r.AtRest, "%+v", r)
	log := check(picture + "/data")
	require.Contains(t, log, "redo")
	stop()

	starter := m.dir + "/pg-start"
	require.NoError(t, os.WriteFile(starter, []byte(fmt.Sprintf("#!/bin/sh\ncd /; exec setpriv --reuid=postgres --regid=postgres --init-groups %s/pg_ctl -D %s -w -s -l %s/log -o \"-c listen_addresses='' -c unix_socket_directories=%s\" start >/dev/null 2>&1 </dev/null\n", bin, data, data, sock)), 0o755))
	m.configure(conf + "POSTGRESQL_MODE=stop\nPOSTGRESQL_START=" + starter + "\n" +
		"POSTGRESQL_STOP='setpriv --reuid=postgres --regid=postgres --init-groups " + bin + "/pg_ctl -D " + data + " -w -s -m fast stop'\n")
	load()
	time.Sleep(300 * time.Millisecond) // some transactions
	r, picture = m.cut(nil)
	require.True(t, r.AtRest, "%+v", r)
	state := output(t, as("postgres", bin+"/pg_controldata", "-D", picture+"/data"))
	require.Regexp(t, `Database cluster state: +shut down\n`, state)
	require.NotContains(t, check(picture+"/data"), "recovery")
	require.Equal(t, "1", psql(data, "select 1"), "the server runs again")
	m.configure("POSTGRESQL_PSQL='psql -h /nowhere'\n")
	r, _ = m.cut(nil)
	require.False(t, r.Taken, "a hook that fails keeps the guest from freezing")
	require.Contains(t, r.Reason(), "did not freeze")
}

// TestMySQLHook: writes of every engine wait from freeze to thaw.
func TestMySQLHook(t *testing.T) {
	need(t, "qemu-ga", "mariadbd", "mariadb", "setpriv", "dumpe2fs")
	m := newMachine(t, "mysql", "MYSQL_CLIENT='mariadb --no-defaults -u root --socket=%DIR/mnt/data/s'\nMYSQL_TIMEOUT=5\n")
	data := m.mnt + "/data"
	require.NoError(t, os.Mkdir(data, 0o700))
	command(t, "chown", "mysql:mysql", data)
	output(t, as("mysql", "mariadb-install-db", "--no-defaults", "--datadir="+data, "--auth-root-authentication-method=normal", "--skip-test-db"))
	sql := func(dir, q string) string {
		return output(t, exec.Command("mariadb", "--no-defaults", "-u", "root", "--socket="+dir+"/s", "-N", "-B", "-e", q))
	}
	serve := func(dir string) (stop func()) {
		stop = start(t, as("mysql", "mariadbd", "--no-defaults", "--datadir="+dir, "--socket="+dir+"/s", "--skip-networking", "--pid-file="+dir+"/pid"))
		require.Eventually(t, func() bool {
			return exec.Command("mariadb", "--no-defaults", "-u", "root", "--socket="+dir+"/s", "-e", "select 1").Run() == nil
		}, 30*time.Second, 100*time.Millisecond)
		return stop
	}
	serve(data)
	sql(data, "create database d; create table d.i (n int) engine=innodb; create table d.a (n int) engine=aria")
	writer := exec.Command("sh", "-c", `n=0; while :; do n=$((n+1)); echo "insert into d.i values ($n); insert into d.a values ($n);"; done | mariadb --no-defaults -u root --socket=`+data+`/s`)
	writer.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	require.NoError(t, writer.Start())
	defer func() {
		_ = syscall.Kill(-writer.Process.Pid, syscall.SIGKILL)
		_ = writer.Wait() // it was killed
	}()
	rows := func(dir string) (innodb, aria int) {
		parts := strings.Fields(sql(dir, "select (select count(*) from d.i), (select count(*) from d.a)"))
		require.Len(t, parts, 2)
		innodb, err := strconv.Atoi(parts[0])
		require.NoError(t, err)
		aria, err = strconv.Atoi(parts[1])
		require.NoError(t, err)
		return innodb, aria
	}
	require.Eventually(t, func() bool { i, _ := rows(data); return i > 100 }, 20*time.Second, 50*time.Millisecond)
	var i, a, i2, a2 int
	r, picture := m.cut(func() {
		i, a = rows(data)
		time.Sleep(200 * time.Millisecond) // in which nothing may change
		i2, a2 = rows(data)
	})
	require.Equal(t, []int{i, a}, []int{i2, a2}, "writes wait")
	require.True(t, r.AtRest, "%+v", r)
	require.Eventually(t, func() bool { now, _ := rows(data); return now > i }, 10*time.Second, 50*time.Millisecond, "writes go on")
	serve(picture + "/data")
	gotI, gotA := rows(picture + "/data")
	require.Equal(t, []int{i, a}, []int{gotI, gotA})
	require.InDelta(t, i, a, 1)
	require.Contains(t, sql(picture+"/data", "check table d.i, d.a"), "OK")

	// A lock that is lost meanwhile is told by the thaw, and the cut is not what it was to be.
	var killed []byte
	r, _ = m.cut(func() {
		holder, _ := os.ReadFile(m.dir + "/tidemark-mysql.pid")
		killed, _ = exec.Command("pkill", "-e", "-s", strings.TrimSpace(string(holder)), "mariadb").CombinedOutput()
	})
	require.Contains(t, string(killed), "killed")
	require.False(t, r.AtRest, "%+v", r)

	sql(data, "create table d.slow (n int)")
	long := exec.Command("mariadb", "--no-defaults", "-u", "root", "--socket="+data+"/s", "-e", "lock tables d.slow write; select sleep(30)")
	require.NoError(t, long.Start())
	time.Sleep(300 * time.Millisecond) // until it has the lock
	m.configure("MYSQL_CLIENT='mariadb --no-defaults -u root --socket=%DIR/mnt/data/s'\nMYSQL_TIMEOUT=1\n")
	r, _ = m.cut(nil)
	require.False(t, r.Taken)
	_ = long.Process.Kill()
	_ = long.Wait() // it was killed
	require.Eventually(t, func() bool {
		n, _ := rows(data)
		time.Sleep(50 * time.Millisecond)
		now, _ := rows(data)
		return now > n
	}, 10*time.Second, 50*time.Millisecond, "nothing holds writes up")
}

// TestRedisHook: what was written before is in the dump, and nothing is written until the thaw.
func TestRedisHook(t *testing.T) {
	need(t, "qemu-ga", "redis-server", "redis-cli", "dumpe2fs")
	m := newMachine(t, "redis", "REDIS_CLI='redis-cli -s %DIR/redis.sock'\n")
	serve := func(dir, sock string) {
		start(t, exec.Command("redis-server", "--port", "0", "--unixsocket", sock, "--dir", dir, "--save", ""))
		require.Eventually(t, func() bool { return exec.Command("redis-cli", "-s", sock, "ping").Run() == nil }, 10*time.Second, 50*time.Millisecond)
	}
	sock := m.dir + "/redis.sock"
	serve(m.mnt, sock)
	get := func(sock string) string { return output(t, exec.Command("redis-cli", "-s", sock, "GET", "n")) }
	start(t, exec.Command("redis-cli", "-s", sock, "-r", "-1", "-i", "0.001", "INCR", "n"))
	require.Eventually(t, func() bool { return len(get(sock)) > 1 }, 10*time.Second, 10*time.Millisecond)
	var n, later string
	r, picture := m.cut(func() {
		n = get(sock)
		time.Sleep(100 * time.Millisecond) // in which nothing may change
		later = get(sock)
	})
	require.Equal(t, n, later, "writes wait")
	require.True(t, r.AtRest, "%+v", r)
	require.Eventually(t, func() bool { return get(sock) != n }, 10*time.Second, 10*time.Millisecond, "writes go on")
	serve(picture, m.dir+"/redis2.sock")
	require.Equal(t, n, get(m.dir+"/redis2.sock"))
	m.configure("REDIS_CLI='redis-cli -s /nowhere'\n")
	r, _ = m.cut(nil)
	require.False(t, r.Taken)
	require.Contains(t, r.Reason(), "hook")
}
