package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

func (d *served) configure(yaml string) {
	d.t.Helper()
	if !strings.Contains(yaml, "journal:") {
		yaml = "journal: {segment: 16MiB, reserve: 16MiB}\n" + yaml
	}
	yaml = strings.ReplaceAll(yaml, "%DIR", d.dir)
	require.NoError(d.t, os.WriteFile(d.path("tidemark.yaml"), []byte(yaml), 0o600))
}

func (d *served) raw(name string, size int64) {
	d.t.Helper()
	require.NoError(d.t, os.WriteFile(d.path(name), nil, 0o600))
	require.NoError(d.t, os.Truncate(d.path(name), size))
}

func (d *served) api() *api.Client { return api.NewClient(d.path("api.sock")) }

// group is the state of a group.
func (d *served) group(name string) api.Group {
	d.t.Helper()
	s, err := d.api().Status(d.t.Context())
	require.NoError(d.t, err)
	i := slices.IndexFunc(s.Groups, func(g api.Group) bool { return g.Name == name })
	require.GreaterOrEqual(d.t, i, 0)
	return s.Groups[i]
}

func (d *served) marker(label string) api.Marker {
	d.t.Helper()
	p, err := d.api().Points(d.t.Context(), "web01", api.Filter{Label: label})
	require.NoError(d.t, err)
	require.Len(d.t, p.Markers, 1, label)
	return p.Markers[0]
}

const oneGuest = `
groups:
  web01:
    disks: {vda: {backing: %DIR/vda.raw}}
    guests: {web01: {agent: %DIR/agent}}
`

func withAgent(t *testing.T, yaml string) (*served, *fakeAgent) {
	t.Helper()
	d := &served{t: t, dir: t.TempDir()}
	d.raw("vda.raw", 16<<20)
	a := listenAgent(t, d.path("agent"))
	d.configure(yaml)
	d.start()
	return d, a
}

// TestMarkersSayWhatWasReached: each is what it says, is durable, and its guest is thawed.
func TestMarkersSayWhatWasReached(t *testing.T) {
	d, a := withAgent(t, oneGuest)
	me, err := user.Current()
	require.NoError(t, err)
	a.set(func() {
		a.during = func() {
			_, err := os.Stat(d.path("state/frozen/web01.json"))
			assert.NoError(t, err, "noted before it is frozen")
		}
	})
	out := d.ok("mark", "web01", "plain")
	require.Contains(t, out, "crash-consistent")
	require.Zero(t, a.frozenTimes())
	out = d.ok("mark", "web01", "nightly", "--consistency", "application", "--description", "before the night", "--pin")
	require.Contains(t, out, "application-consistent; frozen for")
	require.False(t, a.isFrozen())
	m := d.marker("nightly")
	require.Equal(t, "application", m.Consistency)
	require.Equal(t, "user:"+me.Username, m.By)
	require.Equal(t, "before the night", m.Description)
	require.True(t, m.Pinned)
	require.Greater(t, m.Frozen, 0.0)
	d.ok("mark", "web01", "fs", "--consistency", "filesystem")
	require.Equal(t, "filesystem", d.marker("fs").Consistency)
	require.Equal(t, 2, a.frozenTimes())
	out, code := d.tidemark("mark", "web01", "fs", "--consistency", "filesystem")
	require.Equal(t, 5, code, out)
	require.Equal(t, 2, a.frozenTimes(), "nobody is frozen for a label that is in use")

	a.set(func() {
		a.instead["guest-fsfreeze-freeze"] = func() string { a.frozen = true; return `{"error": {"class": "GenericError", "desc": "no such luck"}}` }
	})
	out, code = d.tidemark("mark", "web01", "refused", "--consistency", "application")
	require.Equal(t, 7, code, out)
	require.Contains(t, out, "no such luck")
	require.Contains(t, out, "--or-crash")
	require.False(t, a.isFrozen())
	out = d.ok("mark", "web01", "lesser", "--consistency", "application", "--or-crash")
	require.Contains(t, out, "crash-consistent")
	m = d.marker("lesser")
	require.Equal(t, "crash", m.Consistency)
	require.Equal(t, "application", m.Asked)
	require.Contains(t, m.Note, "no such luck")
	var p api.Points
	require.NoError(t, json.Unmarshal([]byte(d.ok("points", "web01", "--json", "--consistency", "application")), &p))
	require.Len(t, p.Markers, 1)
	metrics := d.metrics()
	require.Contains(t, metrics, `tidemark_markers_total{consistency="application",group="web01"} 1`)
	require.Contains(t, metrics, `tidemark_markers_refused_total{group="web01"} 1`)
	require.Contains(t, metrics, `tidemark_guest_frozen_seconds_count{group="web01"}`)
	require.Contains(t, metrics, `tidemark_group_head_lsn{group="web01"}`)
	require.Contains(t, d.ok("status"), "guest web01")
	d.stop()
}

func (d *served) metrics() string {
	d.t.Helper()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, Dial: func(string, string) (net.Conn, error) { return net.Dial("unix", d.path("api.sock")) }}}
	resp, err := c.Get("http://tidemarkd/metrics")
	require.NoError(d.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(d.t, err)
	return string(b)
}

// TestMarkersThatCanNotBe: clear errors that name the remedy, and no marker.
func TestMarkersThatCanNotBe(t *testing.T) {
	d := oneDisk(t)
	long := strings.Repeat("x", 256)
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{2, "--guest web01=agent:PATH", []string{"mark", "web01", "m", "--consistency", "application"}},
		{2, "unknown consistency", []string{"mark", "web01", "m", "--consistency", "total"}},
		{2, "at most 255", []string{"mark", "web01", long}},
		{2, "not allowed", []string{"mark", "web01", "a/b"}},
		{2, "choose another", []string{"mark", "web01", ".."}},
		{2, "not allowed", []string{"mark", "web01", "a\x1b[31m"}},
		{2, "not allowed", []string{"mark", "web01", "a\xff"}},
		{2, "another form", []string{"mark", "web01", "--", "-15m"}},
		{2, "not allowed", []string{"mark", "web01", "m", "--description", "a\nb"}},
		{4, "not found", []string{"mark", "web02", "m"}},
		{2, "no guests", []string{"thaw", "web01"}},
		{4, "not found", []string{"thaw", "web02"}},
		{4, "no marker", []string{"pin", "web01", "nope"}},
		{4, "no marker", []string{"describe", "web01", "nope", "text"}},
		{4, "no marker", []string{"delete", "web01", "nope"}},
		{4, "has no definition", []string{"definition", "web01@latest"}},
		{2, "GROUP@POINT", []string{"definition", "web01"}},
		{2, "goes with --new-identity", []string{"definition", "web01@latest", "--disk", "a=b"}},
		{2, "is no time", []string{"points", "web01", "--since", "yesterday"}},
		{2, "pattern", []string{"points", "web01", "--label", "["}},
		{2, "unknown consistency", []string{"points", "web01", "--consistency", "x"}},
	} {
		out, code := d.tidemark(c.args...)
		require.Equal(t, c.code, code, "%q: %s", c.args, out)
		require.Contains(t, out, c.want, "%q", c.args)
	}
	p, err := d.api().Points(t.Context(), "web01", api.Filter{})
	require.NoError(t, err)
	require.Empty(t, p.Markers)
}

func oneDisk(t *testing.T) *served {
	t.Helper()
	d := &served{t: t, dir: t.TempDir()}
	d.raw("vda.raw", 16<<20)
	d.configure("groups: {web01: {disks: {vda: {backing: %DIR/vda.raw}}}}")
	d.start()
	return d
}

// TestAGuestThatDoesNotThaw: the operator is told by the command, by status and by a metric, until it is thawed.
func TestAGuestThatDoesNotThaw(t *testing.T) {
	d, a := withAgent(t, oneGuest)
	a.set(func() { a.instead["guest-fsfreeze-thaw"] = func() string { return `{"return": 1}` } })
	out, code := d.tidemark("mark", "web01", "m", "--consistency", "application")
	require.Equal(t, 8, code, out)
	require.Contains(t, out, "may still be frozen")
	require.Contains(t, d.metrics(), `tidemark_guests_not_thawed{group="web01"} 1`)
	out, code = d.tidemark("mark", "web01", "second", "--consistency", "application")
	require.Equal(t, 8, code, out)
	require.Equal(t, 1, a.frozenTimes(), "a guest that may be frozen is not frozen again")
	require.Eventually(t, func() bool { // but while the daemon is trying to thaw it
		return strings.Contains(d.ok("status"), "GUESTS MAY BE FROZEN: [web01]")
	}, 30*time.Second, 50*time.Millisecond)
	d.ok("mark", "web01", "lesser", "--consistency", "application", "--or-crash")
	require.Equal(t, "crash", d.marker("lesser").Consistency)
	log, err := os.ReadFile(d.path("log"))
	require.NoError(t, err)
	require.Contains(t, string(log), "A GUEST MAY BE FROZEN")
	a.set(func() { delete(a.instead, "guest-fsfreeze-thaw") })
	d.ok("thaw", "web01")
	require.False(t, a.isFrozen())
	require.Contains(t, d.metrics(), `tidemark_guests_not_thawed{group="web01"} 0`)
	d.ok("mark", "web01", "third", "--consistency", "application")
}

// TestADaemonThatDiesWhileAGuestIsFrozen: the next one thaws it, and the marker claims nothing.
func TestADaemonThatDiesWhileAGuestIsFrozen(t *testing.T) {
	for _, orCrash := range []bool{false, true} {
		t.Run(fmt.Sprintf("or crash %v", orCrash), func(t *testing.T) {
			d, a := withAgent(t, oneGuest)
			asked := make(chan struct{})
			a.set(func() {
				a.instead["guest-fsfreeze-status"] = func() string {
					if !a.frozen {
						return `{"return": "thawed"}`
					}
					delete(a.instead, "guest-fsfreeze-status")
					close(asked)
					return "" // no answer: the record is durable by now, and the daemon waits
				}
			})
			args := []string{"mark", "web01", "m", "--consistency", "application"}
			if orCrash {
				args = append(args, "--or-crash")
			}
			cmd := exec.Command(filepath.Join(binDir, "tidemark"), append(args, "--api", "unix:"+d.path("api.sock"))...)
			require.NoError(t, cmd.Start())
			<-asked
			d.kill()
			require.Error(t, cmd.Wait())
			require.True(t, a.isFrozen())
			d.start()
			require.Eventually(t, func() bool { return !a.isFrozen() }, 20*time.Second, 10*time.Millisecond)
			p, err := d.api().Points(t.Context(), "web01", api.Filter{})
			require.NoError(t, err)
			if orCrash {
				require.Len(t, p.Markers, 1)
				require.Equal(t, "crash", p.Markers[0].Consistency)
				require.Contains(t, p.Markers[0].Note, "not brought to its end")
			} else {
				require.Empty(t, p.Markers)
			}
			require.Eventually(t, func() bool {
				out, code := d.tidemark("mark", "web01", "again", "--consistency", "application")
				return code == 0 && strings.Contains(out, "application")
			}, 20*time.Second, 100*time.Millisecond)
		})
	}
}

// TestAGuestIsThawedThoughTheStoreDoesNotOpen: a backing is missing, and the daemon does not start.
func TestAGuestIsThawedThoughTheStoreDoesNotOpen(t *testing.T) {
	d, a := withAgent(t, oneGuest)
	d.stop()
	a.set(func() { a.frozen = true })
	note := fmt.Sprintf(`{"version": 1, "group": "web01", "label": "x", "guests": {"web01": {"agent": %q}}}`, d.path("agent"))
	require.NoError(t, os.WriteFile(d.path("state/frozen/web01.json"), []byte(note), 0o600))
	require.NoError(t, os.Rename(d.path("vda.raw"), d.path("away.raw")))
	out, err := exec.Command(filepath.Join(binDir, "tidemarkd"), d.args()...).CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "does not exist")
	require.False(t, a.isFrozen())
	require.NoFileExists(t, d.path("state/frozen/web01.json"))
}

// TestAGroupIsRemovedUnderACut: the removal waits for it, and the guest is thawed.
func TestAGroupIsRemovedUnderACut(t *testing.T) {
	d, a := withAgent(t, oneGuest)
	d.raw("other.raw", 1<<20)
	frozen := make(chan struct{})
	a.set(func() {
		a.during = func() {
			close(frozen)
			time.Sleep(500 * time.Millisecond) // in which the reload comes
		}
	})
	cmd := exec.Command(filepath.Join(binDir, "tidemark"), "mark", "web01", "m", "--consistency", "application", "--api", "unix:"+d.path("api.sock"))
	require.NoError(t, cmd.Start())
	<-frozen
	d.configure("groups: {other: {disks: {vda: {backing: %DIR/other.raw}}}}")
	require.Contains(t, d.ok("reload"), "group web01 removed")
	require.NoError(t, cmd.Wait(), "it had its marker")
	require.False(t, a.isFrozen())
	d.stop()
}

func TestAPortIsNoFile(t *testing.T) {
	d := &served{t: t, dir: t.TempDir()}
	d.raw("vda.raw", 1<<20)
	d.raw("precious", 4096)
	d.configure("groups:\n  web01:\n    disks: {vda: {backing: %DIR/vda.raw}}\n    guests: {web01: {port: %DIR/precious}}\n")
	d.start()
	require.Eventually(t, func() bool { return len(d.group("web01").Problems) == 1 }, 10*time.Second, 10*time.Millisecond)
	require.Contains(t, d.group("web01").Problems[0], "something else than a socket")
	require.FileExists(t, d.path("precious"))
	out, code := d.tidemark("mark", "web01", "m", "--consistency", "filesystem")
	require.Equal(t, 2, code, out)
}

func TestABusyAgentIsNamed(t *testing.T) {
	d, _ := withAgent(t, oneGuest)
	c, err := net.Dial("unix", d.path("agent"))
	require.NoError(t, err)
	defer c.Close()
	out, code := d.tidemark("mark", "web01", "m", "--consistency", "application")
	require.Equal(t, 7, code, out)
	require.Contains(t, out, "another program is connected")
	require.NoError(t, c.Close())
	d.ok("mark", "web01", "m", "--consistency", "application")
	require.NoError(t, os.Remove(d.path("agent")))
	out, code = d.tidemark("mark", "web01", "n", "--consistency", "application")
	require.Equal(t, 7, code, out)
	require.Contains(t, out, "no socket at")
}

// TestMarkersByThemselves: they come, at most so many guests are frozen at once, and one that is missed is noticed.
func TestMarkersByThemselves(t *testing.T) {
	yaml := "metrics: tcp:127.0.0.1:0\nguests: {max_frozen: 1}\ngroups:\n"
	for i := range 3 {
		yaml += fmt.Sprintf("  g%d:\n    disks: {vda: {backing: %%DIR/%d.raw}}\n    guests: {a: {agent: %%DIR/agent%d}}\n    markers: {every: 1s, consistency: application, label: tick}\n", i, i, i)
	}
	d := &served{t: t, dir: t.TempDir()}
	frozen := make(chan struct{}, 3)
	var agents []*fakeAgent
	for i := range 3 {
		d.raw(fmt.Sprintf("%d.raw", i), 1<<20)
		a := listenAgent(t, d.path(fmt.Sprintf("agent%d", i)))
		a.set(func() {
			a.during = func() {
				frozen <- struct{}{}
				if len(frozen) > 1 {
					t.Error("two guests are frozen at once")
				}
			}
			a.instead["guest-fsfreeze-thaw"] = func() string {
				if a.frozen {
					a.frozen = false
					<-frozen
				}
				return `{"return": 1}`
			}
		})
		agents = append(agents, a)
	}
	d.configure(yaml)
	d.start()
	for i := range 3 {
		name := fmt.Sprintf("g%d", i)
		require.Eventually(t, func() bool {
			p, err := d.api().Points(t.Context(), name, api.Filter{By: "scheduler", Consistency: "application", Label: "tick-*"})
			require.NoError(t, err)
			return len(p.Markers) >= 3
		}, 30*time.Second, 50*time.Millisecond)
		s := d.group(name).Schedule
		require.NotNil(t, s)
		require.Equal(t, 1.0, s.Every)
		require.False(t, s.Last.IsZero())
	}
	agents[0].set(func() {
		agents[0].instead["guest-fsfreeze-freeze"] = func() string { return `{"error": {"class": "x", "desc": "not today"}}` }
	})
	require.Eventually(t, func() bool {
		g := d.group("g0")
		return g.Schedule.Missed > 0 && strings.Contains(g.Schedule.Why, "not today") && len(g.Problems) > 0
	}, 30*time.Second, 50*time.Millisecond)
	require.Regexp(t, `tidemark_markers_missed_total\{group="g0"\} [1-9]`, d.metrics())
	d.stop()
	time.Sleep(2500 * time.Millisecond) // two of them are missed meanwhile
	d.start()
	require.Eventually(t, func() bool {
		s := d.group("g1").Schedule
		return s.Missed >= 1 && strings.Contains(s.Why, "the daemon did not run")
	}, 30*time.Second, 50*time.Millisecond)
	d.stop()
}

func TestTimetable(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse("15:04:05", s)
		require.NoError(t, err)
		return v
	}
	q := timetable{every: 15 * time.Minute, jitter: time.Minute}
	require.Equal(t, at("10:15:00"), q.next(at("10:00:00"), 0))
	require.Equal(t, at("10:15:30"), q.next(at("10:14:59"), 0.5))
	require.Equal(t, at("10:19:00"), q.first(at("10:02:00"), at("10:19:00"), 0.5), "10:15 was not served")
	require.Equal(t, at("10:15:30"), q.first(at("10:02:00"), at("10:15:10"), 0.5))
	require.Equal(t, at("10:30:00"), q.first(at("10:15:20"), at("10:19:00"), 0))
	require.Equal(t, at("10:19:00"), q.first(time.Time{}, at("10:19:00"), 0))
	for _, c := range []struct {
		last, now string
		missed    uint64
	}{{"10:00:20", "10:15:00", 0}, {"10:00:20", "10:16:00", 0}, {"10:00:20", "10:16:01", 1}, {"10:00:20", "10:31:01", 2}, {"10:00:20", "10:30:59", 1}} {
		require.Equal(t, c.missed, q.missed(at(c.last), at(c.now)), "%+v", c)
	}
	require.Zero(t, q.missed(time.Time{}, at("10:00:00")))
}

func TestMarkersAreAmended(t *testing.T) {
	d := oneDisk(t)
	for _, l := range []string{"a-1", "a-2", "before migration 42", "b%2F ü"} {
		d.ok("mark", "web01", l)
	}
	d.ok("describe", "web01", "before migration 42", "what it was")
	require.Equal(t, "what it was", d.marker("before migration 42").Description)
	d.ok("pin", "web01", "b%2F ü")
	require.True(t, d.marker("b%2F ü").Pinned)
	out, code := d.tidemark("delete", "web01", "b%2F ü")
	require.Equal(t, 9, code, out)
	require.Contains(t, out, "unpin it first")
	d.ok("unpin", "web01", "b%2F ü")
	lsn := d.marker("a-1").LSN
	d.ok("delete", "web01", "a-1")
	out, code = d.tidemark("restore", "web01/vda@a-1", "--to", d.path("x"))
	require.Equal(t, 4, code, out)
	d.ok("restore", fmt.Sprintf("web01/vda@lsn:%d", lsn), "--to", d.path("x"))
	d.ok("mark", "web01", "a-1")
	count := func(args ...string) int {
		var p api.Points
		require.NoError(t, json.Unmarshal([]byte(d.ok(append([]string{"points", "web01", "--json"}, args...)...)), &p))
		return len(p.Markers)
	}
	require.Equal(t, 4, count())
	require.Equal(t, 2, count("--label", "a-*"))
	require.Equal(t, 0, count("--until", "-1h"))
	require.Equal(t, 4, count("--since", "-1h", "--by", "user"))
	require.Equal(t, 0, count("--by", "scheduler"))
	require.Equal(t, 0, count("--pinned"))
	d.kill()
	d.start()
	require.Equal(t, 4, count())
	require.Equal(t, "what it was", d.marker("before migration 42").Description)
}

// TestDefinitions: each point has what was in force.
func TestDefinitions(t *testing.T) {
	d := &served{t: t, dir: t.TempDir()}
	d.raw("vda.raw", 1<<20)
	write := func(text string) { require.NoError(t, os.WriteFile(d.path("vm.xml"), []byte(text), 0o600)) }
	xml := func(memory int) string {
		return fmt.Sprintf("<domain><name>vm</name><memory>%d</memory><devices><disk device='disk'><target dev='vda'/></disk></devices></domain>", memory)
	}
	write(xml(1))
	a := listenAgent(t, d.path("agent"))
	d.configure(oneGuest + "    definitions: {vm: {file: %DIR/vm.xml}, conf: {file: %DIR/vm.conf}}\n")
	d.start()
	require.Eventually(t, func() bool { return len(d.group("web01").Problems) == 1 }, 10*time.Second, 10*time.Millisecond, "vm.conf is missing")
	d.ok("mark", "web01", "first", "--consistency", "application")
	write(xml(2))
	require.NoError(t, os.WriteFile(d.path("vm.conf"), []byte("cores: 2\n"), 0o600))
	d.ok("mark", "web01", "second", "--consistency", "application")
	require.Empty(t, d.group("web01").Problems)
	require.Equal(t, xml(1), d.ok("definition", "web01@first"))
	require.Equal(t, xml(2), d.ok("definition", "web01@second", "--name", "vm"))
	require.Equal(t, "cores: 2\n", d.ok("definition", "web01@latest", "--name", "conf"))
	out, code := d.tidemark("definition", "web01@latest")
	require.Equal(t, 2, code, out)
	require.Contains(t, out, "choose one with --name: conf, vm")
	out = d.ok("definition", "web01@first", "--new-identity", "vm-test", "--disk", "vda=/r/x.qcow2")
	require.Contains(t, out, "<name>vm-test</name>")
	require.Contains(t, out, "/r/x.qcow2")
	out, code = d.tidemark("definition", "web01@latest", "--name", "conf", "--new-identity", "x")
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "not a libvirt domain's")
	d.configure(oneGuest + "    definitions: {vm: {file: %DIR/vm.xml}}\n")
	d.ok("reload")
	require.Eventually(t, func() bool {
		_, code := d.tidemark("definition", "web01@latest", "--name", "conf")
		return code == 4
	}, 10*time.Second, 10*time.Millisecond)
	require.Equal(t, "cores: 2\n", d.ok("definition", "web01@second", "--name", "conf"))
	require.Positive(t, a.frozenTimes())
}

// TestMarkersFromInside: over the guest's port, and nothing else.
func TestMarkersFromInside(t *testing.T) {
	d := &served{t: t, dir: t.TempDir()}
	d.raw("vda.raw", 1<<20)
	d.configure("groups:\n  web01:\n    disks: {vda: {backing: %DIR/vda.raw}}\n    guests: {web01: {port: %DIR/port}}\n")
	d.start()
	var c net.Conn
	require.Eventually(t, func() (ok bool) {
		var err error
		c, err = net.Dial("unix", d.path("port"))
		return err == nil
	}, 10*time.Second, 10*time.Millisecond)
	defer c.Close()
	in := bufio.NewReader(c)
	ask := func(line string) map[string]any {
		_, err := io.WriteString(c, line+"\n")
		require.NoError(t, err)
		got, err := in.ReadString('\n')
		require.NoError(t, err)
		var v map[string]any
		require.NoError(t, json.Unmarshal([]byte(got), &v), got)
		return v
	}
	a := ask(`{"id": "1", "mark": "before-migration 42", "description": "from inside"}`)
	require.Equal(t, "1", a["id"])
	require.Equal(t, "web01", a["group"])
	m := d.marker("before-migration 42")
	require.EqualValues(t, m.LSN, a["lsn"])
	require.Equal(t, "guest:web01", m.By)
	require.Equal(t, "crash", m.Consistency)
	for line, want := range map[string]string{
		`{"id": "2", "mark": "before-migration 42"}`:    "in use",
		`{"id": "3", "mark": "a/b"}`:                    "not allowed",
		`{"id": "4"}`:                                   "must not be empty",
		`nonsense`:                                      "not a question",
		`{"id": 5}`:                                     "not a question",
		`{"id": "` + strings.Repeat("x", 65) + `"}`:     "64 bytes",
		`{"id": "6", "mark": "auto-2026"}`:              "the host calls its own",
		`{"mark": "` + strings.Repeat("x", 9000) + `"}`: "4096 bytes",
	} {
		require.Contains(t, ask(line)["error"], want, line)
	}
	refused := 0
	for i := range 20 {
		if e, _ := ask(fmt.Sprintf(`{"id": "%d", "mark": "m%d"}`, i, i))["error"].(string); strings.Contains(e, "too many") {
			refused++
		}
	}
	require.Positive(t, refused, "it is limited")
	d.ok("mark", "web01", "outside")
	d.stop()
}

// TestReload: disks and groups come and go under guests that write, without a break in history.
func TestReload(t *testing.T) {
	d := &served{t: t, dir: t.TempDir()}
	for _, name := range []string{"vda.raw", "vdb.raw", "other.raw"} {
		d.raw(name, 4<<20)
	}
	vda, vdb := "vda: {backing: %DIR/vda.raw}", "vdb: {backing: %DIR/vdb.raw}"
	groups := func(disks ...string) string {
		return "groups:\n  web01:\n    disks: {" + strings.Join(disks, ", ") + "}\n"
	}
	d.configure(groups(vda))
	d.start()
	c := d.dial("web01/vda")
	defer c.Close()
	require.NoError(t, c.WriteAt(bytes.Repeat([]byte{1}, 4096), 0, false))
	require.Contains(t, d.ok("reload"), "nothing has changed")

	d.configure(groups(vda, vdb) + "  other:\n    disks: {vda: {backing: %DIR/other.raw}}\n")
	out := d.ok("reload")
	require.Contains(t, out, "disk web01/vdb added")
	require.Contains(t, out, "group other added")
	c2 := d.dial("web01/vdb")
	require.NoError(t, c2.WriteAt(bytes.Repeat([]byte{2}, 4096), 0, false))
	require.NoError(t, c.WriteAt(bytes.Repeat([]byte{3}, 4096), 0, false))
	d.ok("mark", "web01", "both")
	d.ok("mark", "other", "m")

	d.configure(groups(vda))
	out, code := d.tidemark("reload") // vdb is in use
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "disk is in use")
	require.Contains(t, out, "group other removed", "what can be done is")
	require.NoError(t, c2.WriteAt(bytes.Repeat([]byte{4}, 4096), 0, false), "what is in use stays")
	require.NoError(t, c2.Close())
	require.Eventually(t, func() bool {
		out, code = d.tidemark("reload")
		return code == 0
	}, 10*time.Second, 50*time.Millisecond)
	require.Contains(t, out, "disk web01/vdb removed")
	_, code = d.tidemark("points", "other")
	require.Equal(t, 4, code, "its group went too")
	b, err := os.ReadFile(d.path("vdb.raw"))
	require.NoError(t, err)
	require.EqualValues(t, 4, b[0])
	require.Contains(t, d.ok("status"), "removed at LSN")
	require.NoError(t, c.WriteAt(bytes.Repeat([]byte{5}, 4096), 0, false))

	d.configure(groups(vda, vdb) + "log: {level: debug}\n")
	require.NoError(t, d.cmd.Process.Signal(syscall.SIGHUP))
	require.Eventually(t, func() bool { return len(d.group("web01").Disks) == 2 && d.group("web01").Disks[1].Removed == 0 }, 10*time.Second, 10*time.Millisecond)
	require.Contains(t, d.ok("reload"), "log has changed: that takes a restart")
	for export, want := range map[string]byte{"web01/vda@both": 3, "web01/vdb@both": 2, "web01/vda": 5, "web01/vdb": 4} {
		c := d.dial(export)
		got := make([]byte, 1)
		require.NoError(t, c.ReadAt(got, 0))
		require.Equal(t, want, got[0], export)
		require.NoError(t, c.Close())
	}
	require.NotContains(t, d.ok("points", "web01"), "discontinuity")
	d.configure("groups: {web01: {disk: {}}}")
	out, code = d.tidemark("reload")
	require.Equal(t, 2, code, out)
	require.Contains(t, out, "stays as it was")
	require.NoError(t, c.WriteAt(bytes.Repeat([]byte{6}, 4096), 0, false))
}

func TestFilter(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	m := record.Marker{Label: "nightly-1", Time: now.Add(-time.Hour), By: "user:root", Consistency: record.Filesystem}
	for q, want := range map[string]bool{
		"": true, "since=-2h": true, "since=-30m": false, "until=-30m": true, "until=-2h": false, "label=nightly-*": true, "label=n": false,
		"by=user": true, "by=user:root": true, "by=use": false, "consistency=crash": true, "consistency=filesystem": true,
		"consistency=application": false, "pinned=true": false, "since=2026-11-22T10:59:00Z": true, "since=-2h&label=x": false,
	} {
		v, err := url.ParseQuery(q)
		require.NoError(t, err)
		match, err := filter(v, now)
		require.NoError(t, err)
		require.Equal(t, want, match(m), q)
	}
}
