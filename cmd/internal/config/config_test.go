package config

import (
	"testing"

	"github.com/stretchr/testify/require"
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

func FuzzConfig(f *testing.F) {
	f.Add([]byte("groups: {web01: {disks: {vda: {backing: /x}}}}\njournal: {limit: 1GiB}\nnbd: [\"unix:/x\"]"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		if c, err := Parse(b); err == nil {
			c.Default()
			_ = c.Validate()
		}
	})
}
