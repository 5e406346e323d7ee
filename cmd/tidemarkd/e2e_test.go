package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/nbd/client"
)

// The tests of this file run the real programs and real clients.

var binDir string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if binDir, err = os.MkdirTemp("", "tidemark-bin"); err != nil {
			panic(err)
		}
		defer os.RemoveAll(binDir)
		// A program with the race detector sleeps for a second at its end otherwise.
		if err := os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE")); err != nil {
			panic(err)
		}
		for _, p := range []string{"tidemarkd", "tidemark"} {
			cmd := exec.Command("go", "build", "-race", "-o", binDir+"/", "../"+p)
			cmd.Stderr = os.Stderr
			if err := cmd.Run(); err != nil {
				fmt.Fprintln(os.Stderr, "build", p, err)
				return 1
			}
		}
		return m.Run()
	}())
}

// need skips a test, by the name of what is missing, where a tool is absent.
func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("this machine has no %s: run make deps", tool)
		}
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("takes root: mounts and loop devices")
	}
}

// served is a tidemarkd with one disk, web01/vda, or, without disk, what its configuration has.
type served struct {
	t     *testing.T
	dir   string
	disk  string
	extra []string
	wrap  []string // what the daemon is run by
	cmd   *exec.Cmd
	log   *os.File
}

func serve(t *testing.T, size int64, extra ...string) *served {
	t.Helper()
	d := &served{t: t, dir: t.TempDir(), extra: extra}
	d.disk = filepath.Join(d.dir, "vda.raw")
	require.NoError(t, os.WriteFile(d.disk, nil, 0o600))
	require.NoError(t, os.Truncate(d.disk, size))
	d.start()
	return d
}

func (d *served) path(name string) string { return filepath.Join(d.dir, name) }
func (d *served) sock() string            { return d.path("nbd.sock") }

func (d *served) args() []string {
	args := []string{"--state-dir", d.path("state"), "--nbd", "unix:" + d.sock(), "--api", "unix:" + d.path("api.sock"),
		"--log-format", "console", "--config", d.config()}
	if d.disk != "" {
		args = append(args, "--disk", "web01/vda="+d.disk)
	}
	return append(args, d.extra...)
}

func (d *served) config() string {
	path := d.path("tidemark.yaml")
	if _, err := os.Stat(path); err != nil {
		require.NoError(d.t, os.WriteFile(path, []byte("journal: {segment: 16MiB, reserve: 16MiB}\n"), 0o600))
	}
	return path
}

// start starts the daemon and waits until it is ready, as systemd would.
func (d *served) start() {
	d.t.Helper()
	var err error
	d.log, err = os.OpenFile(d.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(d.t, err)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: d.path("notify"), Net: "unixgram"})
	require.NoError(d.t, err)
	defer func() { require.NoError(d.t, errors.Join(notify.Close(), os.RemoveAll(d.path("notify")))) }()
	argv := append(append(slices.Clone(d.wrap), filepath.Join(binDir, "tidemarkd")), d.args()...)
	d.cmd = exec.Command(argv[0], argv[1:]...)
	d.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+d.path("notify"))
	d.cmd.Stderr = d.log
	require.NoError(d.t, d.cmd.Start())
	cmd := d.cmd
	d.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		if d.t.Failed() {
			b, _ := os.ReadFile(d.path("log"))
			d.t.Logf("the daemon's log:\n%s", b)
		}
	})
	b := make([]byte, 100)
	require.NoError(d.t, notify.SetReadDeadline(time.Now().Add(30*time.Second)))
	n, err := notify.Read(b)
	if err != nil {
		out, _ := os.ReadFile(d.path("log"))
		d.t.Fatalf("the daemon does not get ready: %s", out)
	}
	require.Equal(d.t, "READY=1", string(b[:n]))
}

// stop stops the daemon in order.
func (d *served) stop() {
	d.t.Helper()
	require.NoError(d.t, d.cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(d.t, d.cmd.Wait())
	require.NoError(d.t, d.log.Close())
}

func (d *served) kill() {
	d.t.Helper()
	require.NoError(d.t, d.cmd.Process.Kill())
	_ = d.cmd.Wait() // it was killed
	require.NoError(d.t, d.log.Close())
}

// uri names an export as other programs do.
func (d *served) uri(export string) string {
	return "nbd+unix:///" + strings.ReplaceAll(export, "@", "%40") + "?socket=" + d.sock()
}

func (d *served) dial(export string) *client.Client {
	d.t.Helper()
	c, err := client.Dial(context.Background(), "unix", d.sock(), export, nil)
	require.NoError(d.t, err)
	return c
}

// tidemark runs the client and returns its output and exit code.
func (d *served) tidemark(args ...string) (string, int) {
	d.t.Helper()
	cmd := exec.Command(filepath.Join(binDir, "tidemark"), args...)
	cmd.Env = append(os.Environ(), "TIDEMARK_API=unix:"+d.path("api.sock"))
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil {
		require.ErrorAs(d.t, err, &exit)
		return out.String() + stderr.String(), exit.ExitCode()
	}
	return out.String(), 0
}

func (d *served) ok(args ...string) string {
	d.t.Helper()
	out, code := d.tidemark(args...)
	require.Zero(d.t, code, "tidemark %v: %s", args, out)
	return out
}

// tool runs a program and wants it to succeed.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, out)
	return string(out)
}

func TestStopInOrderAndStartAgain(t *testing.T) {
	d := serve(t, 16<<20)
	c := d.dial("web01/vda")
	want := bytes.Repeat([]byte("tidemark"), 8192)
	require.NoError(t, c.WriteAt(want, 12345, false))
	d.stop()
	require.Error(t, c.WriteAt(want, 0, false), "the connection is gone")
	require.NoError(t, c.Close())
	b, err := os.ReadFile(d.disk)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, b[12345:12345+len(want)]), "the backing is what was written")
	d.start()
	c = d.dial("web01/vda")
	defer c.Close()
	got := make([]byte, len(want))
	require.NoError(t, c.ReadAt(got, 12345))
	require.Equal(t, want, got)
	past := d.dial("web01/vda@lsn:0")
	defer past.Close()
	require.True(t, past.ReadOnly())
	require.NoError(t, past.ReadAt(got, 12345))
	require.Equal(t, make([]byte, len(want)), got)
}

func TestJSONContractAndExitCodes(t *testing.T) {
	d := serve(t, 16<<20)
	decode := func(s string) map[string]any {
		var v map[string]any
		require.NoError(t, json.Unmarshal([]byte(s), &v))
		return v
	}
	mark := decode(d.ok("mark", "web01", "first", "--json"))
	for _, k := range []string{"group", "lsn", "label", "time", "consistency"} {
		require.Contains(t, mark, k)
	}
	require.Equal(t, "crash", mark["consistency"])
	points := decode(d.ok("points", "web01", "--json"))
	for _, k := range []string{"group", "horizon", "durable", "head", "markers"} {
		require.Contains(t, points, k)
	}
	require.Len(t, points["markers"], 1)
	group := decode(d.ok("status", "--json"))["groups"].([]any)[0].(map[string]any)
	for _, k := range []string{"name", "state", "head", "durable", "applied", "horizon", "disks"} {
		require.Contains(t, group, k)
	}
	for _, k := range []string{"name", "size", "backing"} {
		require.Contains(t, group["disks"].([]any)[0], k)
	}
	require.Contains(t, decode(d.ok("version", "--json")), "version")
	require.Contains(t, d.ok("completion", "bash"), "tidemark")
	for _, c := range []struct {
		code int
		args []string
	}{
		{2, []string{"mark", "web01"}},
		{2, []string{"nonsense"}},
		{2, []string{"status", "--nonsense"}},
		{2, []string{"mark", "web01", "lsn:4"}},
		{2, []string{"restore", "web01/vda", "--to", "x"}},
		{3, []string{"status", "--api", "unix:/nonexistent"}},
		{4, []string{"mark", "web02", "x"}},
		{4, []string{"restore", "web01/vda@nope", "--to", d.path("x")}},
		{4, []string{"restore", "web01/vdz@latest", "--to", d.path("x")}},
		{1, []string{"restore", "web01/vda@latest", "--force", "--to", d.disk}},
		{5, []string{"mark", "web01", "first"}},
	} {
		out, code := d.tidemark(c.args...)
		require.Equal(t, c.code, code, "%v: %s", c.args, out)
		require.NotEmpty(t, out)
	}
}

// TestVerifyTellsDamage: a byte of a payload changes on the disk.
func TestVerifyTellsDamage(t *testing.T) {
	d := serve(t, 1<<20)
	c := d.dial("web01/vda")
	require.NoError(t, c.WriteAt(bytes.Repeat([]byte("precious"), 512), 8192, false))
	require.NoError(t, c.Close())
	d.stop()
	logs, err := filepath.Glob(d.path("state/groups/web01/log-*.seg"))
	require.NoError(t, err)
	flipped := 0
	for _, log := range logs {
		b, err := os.ReadFile(log)
		require.NoError(t, err)
		if i := bytes.Index(b, []byte("precious")); i >= 0 {
			b[i] ^= 1
			flipped++
			require.NoError(t, os.WriteFile(log, b, 0o600))
		}
	}
	require.Equal(t, 1, flipped)
	verify := func(args ...string) {
		out, code := d.tidemark(append([]string{"verify", "--json"}, args...)...)
		require.Equal(t, 6, code, out)
		require.Contains(t, out, `"damaged"`)
		require.Contains(t, out, filepath.Base(logs[0]))
	}
	verify("--state-dir", d.path("state"))
	d.start()
	verify()
}

// TestAtRestVerbsChangeNothing compares every byte and time of the state
// directory before and after.
func TestAtRestVerbsChangeNothing(t *testing.T) {
	d := serve(t, 16<<20)
	c := d.dial("web01/vda")
	for i := range int64(50) {
		require.NoError(t, c.WriteAt(bytes.Repeat([]byte{byte(i)}, 70000), i*70001, false))
	}
	require.NoError(t, c.Close())
	d.ok("mark", "web01", "m")
	picture := func() (all []string) {
		require.NoError(t, filepath.WalkDir(d.path("state"), func(path string, e os.DirEntry, err error) error {
			require.NoError(t, err)
			info, err := e.Info()
			require.NoError(t, err)
			line := fmt.Sprint(path, info.Size(), info.ModTime(), info.Mode())
			if info.Mode().IsRegular() {
				b, err := os.ReadFile(path)
				require.NoError(t, err)
				line += fmt.Sprintf("%x", bytes.Compare(b, nil)) + string(b)
			}
			all = append(all, line)
			return nil
		}))
		return all
	}
	for _, end := range []func(){d.kill, d.stop} {
		end()
		before := picture()
		require.Contains(t, d.ok("verify", "--state-dir", d.path("state")), "no damage")
		require.Contains(t, d.ok("dump", "--state-dir", d.path("state"), "--records"), "LSN 1 ")
		d.ok("dump", "--state-dir", d.path("state"), "--json")
		require.True(t, strings.Join(before, "\n") == strings.Join(picture(), "\n"), "something changed")
		d.start()
	}
	out, code := d.tidemark("verify", "--state-dir", d.path("state"))
	require.Equal(t, 1, code, "a running daemon has the directory: %s", out)
	require.Contains(t, d.ok("dump"), "segment")
	require.Contains(t, d.ok("verify"), "no damage")
}

// TestAReplacedBackingIsADiscontinuity: another file is put in the place of the one that is
// served. What was answered went to the one that is open.
func TestAReplacedBackingIsADiscontinuity(t *testing.T) {
	d := serve(t, 1<<20)
	c := d.dial("web01/vda")
	require.NoError(t, c.WriteAt(bytes.Repeat([]byte{7}, 4096), 0, false))
	require.NoError(t, os.WriteFile(d.path("new.raw"), make([]byte, 1<<20), 0o600))
	require.NoError(t, os.Rename(d.path("new.raw"), d.disk))
	require.NoError(t, c.WriteAt(bytes.Repeat([]byte{8}, 4096), 8192, false))
	require.NoError(t, c.Close())
	d.stop()
	d.start()
	require.Contains(t, d.ok("points", "web01"), "discontinuity-vda-")
	got := make([]byte, 1)
	for export, want := range map[string][2]byte{"web01/vda": {0, 0}, "web01/vda@lsn:2": {7, 8}} {
		c := d.dial(export)
		for i, off := range []int64{0, 8192} {
			require.NoError(t, c.ReadAt(got, off))
			require.Equal(t, want[i], got[0], "%s at %d", export, off)
		}
		require.NoError(t, c.Close())
	}
}

func TestBadStartsSayWhy(t *testing.T) {
	d := serve(t, 1<<20)
	fails := func(args ...string) string {
		out, err := exec.Command(filepath.Join(binDir, "tidemarkd"), args...).CombinedOutput()
		require.Error(t, err)
		return string(out)
	}
	base := []string{"--state-dir", d.path("s2"), "--nbd", "unix:" + d.path("n2"), "--api", "unix:" + d.path("a2")}
	require.Contains(t, fails(append(base, "--disk", "web01")...), "GROUP/DISK=BACKING")
	require.Contains(t, fails(append(base, "--disk", "web01/vda=/nonexistent")...), "does not exist")
	require.Contains(t, fails(append(base, "--disk", "we b/vda="+d.disk)...), "not allowed")
	require.Contains(t, fails(base...), "no disk is given")
	link := d.path("link.raw")
	require.NoError(t, os.Symlink(d.disk, link))
	require.Regexp(t, "it is the backing of disk (a/a|b/b) too", fails(append(base, "--disk", "a/a="+d.disk, "--disk", "b/b="+link)...)) // groups are opened at once
	require.Contains(t, fails(d.args()...), "another")
	bad := d.path("bad.yaml")
	require.NoError(t, os.WriteFile(bad, []byte("groups: {g: {disks: {d: {backing: /x, colour: red}}}}"), 0o600))
	require.Contains(t, fails("--config", bad), "colour")
}

// certificate makes a self-signed one for 127.0.0.1, and writes it and its key
// as cert.pem and key.pem. It returns what a client needs to trust it.
func certificate(t *testing.T, dir string) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	write := func(name, kind string, der []byte) {
		b := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
	}
	write("cert.pem", "CERTIFICATE", der)
	write("key.pem", "PRIVATE KEY", pkcs8)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &tls.Config{RootCAs: pool, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13}
}

// TestTCPTakesTLSAndAnswersWhenDurable: a client on another host is refused
// without TLS, and what it was told is written survives this host.
func TestTCPTakesTLSAndAnswersWhenDurable(t *testing.T) {
	d := &served{t: t, dir: t.TempDir(), extra: []string{"--nbd", "tcp:127.0.0.1:0"}}
	conf := certificate(t, d.dir)
	d.disk = d.path("vda.raw")
	require.NoError(t, os.WriteFile(d.disk, make([]byte, 1<<20), 0o600))
	yaml := fmt.Sprintf("journal: {segment: 16MiB, reserve: 16MiB}\ntls: {cert: %q, key: %q}\n", d.path("cert.pem"), d.path("key.pem"))
	require.NoError(t, os.WriteFile(d.path("tidemark.yaml"), []byte(yaml), 0o600))
	d.start()
	defer d.stop()
	var s struct{ NBD []string }
	require.NoError(t, json.Unmarshal([]byte(d.ok("status", "--json")), &s))
	i := slices.IndexFunc(s.NBD, func(n string) bool { return strings.HasPrefix(n, "tcp:") })
	require.GreaterOrEqual(t, i, 0, "%v", s.NBD)
	addr := strings.TrimPrefix(s.NBD[i], "tcp:")

	_, err := client.Dial(context.Background(), "tcp", addr, "web01/vda", nil)
	require.ErrorContains(t, err, "TLS")
	c, err := client.Dial(context.Background(), "tcp", addr, "web01/vda", conf)
	require.NoError(t, err)
	defer c.Close()
	for i := range int64(3) {
		require.NoError(t, c.WriteAt(bytes.Repeat([]byte{1}, 4096), i*4096, false))
		var p struct{ Durable, Head float64 }
		require.NoError(t, json.Unmarshal([]byte(d.ok("points", "web01", "--json")), &p))
		require.EqualValues(t, i+1, p.Head)
		require.Equal(t, p.Head, p.Durable, "answered before it was durable")
	}
}
