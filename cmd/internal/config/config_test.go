package config

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/guest"
)

func TestParse(t *testing.T) {
	c, err := Parse([]byte(`
state_dir: /s
nbd: ["unix:/run/n.sock", "tcp:0.0.0.0:10809"]
journal: {limit: 100GiB, segment: "64MiB", reserve: 1048576}
groups:
  web01:
    disks:
      vda: {backing: /images/vda.raw}
`))
	require.NoError(t, err)
	c.Default()
	require.NoError(t, c.Validate())
	require.Equal(t, Size(100<<30), c.Journal.Limit)
	require.Equal(t, Size(64<<20), c.Journal.Segment)
	require.Equal(t, Size(1<<20), c.Journal.Reserve)
	require.Equal(t, "/images/vda.raw", c.Groups["web01"].Disks["vda"].Backing)
	require.Equal(t, DefaultAPI, c.API)
}

// TestBackgroundWork has a pace by default, and none if that is what was said.
func TestBackgroundWork(t *testing.T) {
	for conf, want := range map[string][2]Size{"": {ScrubRate, CompactRate}, "scrub: {rate: 0}\ncompact: {rate: 0}": {}, "scrub: {rate: 1MiB}\ncompact: {rate: 2MiB}": {1 << 20, 2 << 20}} {
		c, err := Parse([]byte(conf))
		require.NoError(t, err)
		c.Default()
		require.Equal(t, want, [2]Size{*c.Scrub.Rate, *c.Compact.Rate}, conf)
		require.Equal(t, ScrubEvery, *c.Scrub.Every)
		require.Equal(t, CompactAfter, *c.Compact.After)
	}
}

func TestUnknownKeysAreErrors(t *testing.T) {
	for _, s := range []string{"colour: red", "groups: {g: {disk: {}}}", "journal: {limit: -1}", "journal: {limit: 5XB}", "journal: {limit: 9999999999TiB}"} {
		_, err := Parse([]byte(s))
		require.Error(t, err, s)
	}
}

// TestValidateReportsEveryFault at once, each with its place.
func TestValidateReportsEveryFault(t *testing.T) {
	c := Config{NBD: []string{"http://x"}, API: "tcp:1.2.3.4:5", Log: Log{Format: "xml", Level: "loud"}, TLS: TLS{Cert: "c"},
		Groups: map[string]Group{"a/b": {}, "g": {Disks: map[string]Disk{"d": {}}}}}
	err := c.Validate()
	for _, want := range []string{"nbd[0]", "api:", "log.format", "log.level", "tls:", "groups.a/b", "no disks", "groups.g.disks.d", "backing is missing"} {
		require.ErrorContains(t, err, want)
	}
}

func TestAddDisk(t *testing.T) {
	var c Config
	require.NoError(t, c.AddDisk("web01/vda=/images/a=b.raw"))
	require.Equal(t, "/images/a=b.raw", c.Groups["web01"].Disks["vda"].Backing)
	for _, bad := range []string{"", "web01", "web01/vda", "web01/vda=", "vda=/x", "web01/vda=/again"} {
		require.Error(t, c.AddDisk(bad), bad)
	}
}

func TestGuests(t *testing.T) {
	c, err := Parse([]byte(`
guests: {max_frozen: 2}
groups:
  web01:
    disks: {vda: {backing: /images/vda.raw}}
    guests:
      web01: {libvirt: web01, port: /run/tidemark/web01.port}
      db01: {agent: /run/db01.agent, mounts: [/, /srv]}
    hooks:
    - {before: [/bin/true, a b], after: [/bin/true], timeout: 5s}
    freeze_limit: 1500ms
    markers: {every: 15m, consistency: application, jitter: 1m, or_crash: true}
    definitions:
      db01: {file: /etc/pve/qemu-server/101.conf}
`))
	require.NoError(t, err)
	c.Default()
	require.NoError(t, c.Validate())
	g := c.Groups["web01"]
	require.Equal(t, 1500*time.Millisecond, g.FreezeLimit)
	require.Equal(t, 15*time.Minute, g.Markers.Every)
	require.Equal(t, guest.Spec{Agent: "/run/db01.agent", Mounts: []string{"/", "/srv"}}, g.Guests["db01"].Spec())
	require.Equal(t, []string{"/bin/true", "a b"}, g.Hooks[0].Before)
	require.Equal(t, "auto", g.Markers.Label)
}

// TestFaultsOfGuests are reported all at once, each with its place and the remedy.
func TestFaultsOfGuests(t *testing.T) {
	c := Config{Metrics: "unix:/x", Guests: Guests{MaxFrozen: -1}, Groups: map[string]Group{
		"g": {
			Disks:  map[string]Disk{"d": {Backing: "/x"}},
			Guests: map[string]Guest{"a/b": {Agent: "x"}, "none": {}, "p": {Port: "x"}, "q": {Port: "x"}, "both": {Agent: "x", Libvirt: "y"}, "vm": {Libvirt: "vm"}},
			Hooks:  []Hook{{}, {Before: []string{"true"}}}, FreezeLimit: -1,
			Markers:     Markers{Every: time.Millisecond, Consistency: "total", Label: "a@b"},
			Definitions: map[string]Definition{"vm": {File: "/x"}, "f": {}},
		},
		"h": {Disks: map[string]Disk{"d": {Backing: "/y"}}, Markers: Markers{Every: time.Hour, Jitter: time.Hour, Consistency: "application"}},
	}}
	c.Default()
	err := c.Validate()
	for _, want := range []string{"metrics:", "guests.max_frozen", "guests.a/b", "guests.none", "is that of groups.g.guests.p too", "full path", "guests.both", "hooks[0]", "hooks[1]", "full path",
		"freeze_limit", "every 1ms", "unknown consistency", "'@' is not allowed", "definitions.vm", "definitions.f: file is missing",
		"jitter of 1h0m0s", "application markers need guests"} {
		require.ErrorContains(t, err, want)
	}
}

func TestAddGuest(t *testing.T) {
	var c Config
	require.ErrorContains(t, c.AddGuest("web01=agent:/x"), "give its disks too")
	require.NoError(t, c.AddDisk("web01/vda=/images/a.raw"))
	require.NoError(t, c.AddGuest("web01=agent:/run/a=b"))
	require.NoError(t, c.AddGuest("web01/second=libvirt:dom"))
	require.Equal(t, map[string]Guest{"web01": {Agent: "/run/a=b"}, "second": {Libvirt: "dom"}}, c.Groups["web01"].Guests)
	for _, bad := range []string{"", "web01", "web01=", "web01=qemu:x", "web01=agent:/x"} {
		require.Error(t, c.AddGuest(bad), bad)
	}
}

func TestReplication(t *testing.T) {
	c, err := Parse([]byte(`
replication:
  listen: tcp:0.0.0.0:10900
  name: hosta
  compression: 0
  limit: 10MiB
  hours:
  - {from: "08:00", to: "18:00", limit: 1MiB}
  - {from: "22:00", to: "06:00", limit: 0}
  peers: {hostb: {address: "hostb:10900", fingerprint: aa, may_send: ["db*"]}}
groups: {web01: {disks: {vda: {backing: /x}}, replicas: [hostb], rpo: 5s}}
`))
	require.NoError(t, err)
	c.Default()
	require.NoError(t, c.Validate())
	require.Equal(t, 0, c.Replication.Level())
	require.Equal(t, DefaultStateDir+"/replicas", c.Replication.Dir)
	for at, want := range map[string]Size{"07:59": 10 << 20, "08:00": 1 << 20, "17:59": 1 << 20, "18:00": 10 << 20, "23:00": 0, "05:59": 0, "06:00": 10 << 20} {
		when, err := time.Parse("15:04", at)
		require.NoError(t, err)
		require.Equal(t, want, c.Replication.At(when), at)
	}

	empty := Config{}
	empty.Default()
	require.ErrorContains(t, empty.Validate(), "no disk is given")
	empty = Config{Replication: Replication{Name: "b"}}
	empty.Default()
	require.NoError(t, empty.Validate(), "one that waits for groups has none to begin with")
	require.Equal(t, 2, empty.Replication.Level())

	nine := 9
	bad := Config{Replication: Replication{Listen: "unix:/x", Name: "a b", Dir: "here", Compression: &nine, Cert: "c", Hours: []Hour{{From: "8:00", To: "25:00"}}, Peers: map[string]Peer{"p": {}}},
		Groups: map[string]Group{"g": {Disks: map[string]Disk{"d": {Backing: "/x"}}, Replicas: []string{"p", "p", "a/b"}, RPO: -1}}}
	bad.Default()
	err = bad.Validate()
	for _, want := range []string{"replication.listen", "replication.name", "replication.dir", "replication.compression", "cert and key", `"8:00"`, `"25:00"`, "replication.peers.p", "p is given twice", "replicas[2]", "rpo"} {
		require.ErrorContains(t, err, want)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte("groups: {web01: {disks: {vda: {backing: /x}}}}\njournal: {limit: 1GiB}\nnbd: [\"unix:/x\"]"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		if c, err := Parse(b); err == nil {
			c.Default()
			_ = c.Validate()
		}
	})
}
