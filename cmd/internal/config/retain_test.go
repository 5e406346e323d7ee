package config

import (
	"testing"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/retain"
)

func TestSpan(t *testing.T) {
	const day = 24 * time.Hour
	for text, want := range map[string]time.Duration{
		"0": 0, "90s": 90 * time.Second, "24h": day, "2d": 2 * day, "1w": 7 * day, "1y": 365 * day, "1y2d3h": 367*day + 3*time.Hour, "1d1m500ms": day + time.Minute + 500*time.Millisecond,
	} {
		got, err := ParseSpan(text)
		require.NoError(t, err, text)
		require.Equal(t, want, time.Duration(got), text)
		again, err := ParseSpan(got.String())
		require.NoError(t, err, got.String())
		require.Equal(t, got, again)
	}
	for _, text := range []string{"", "1", "d", "-1d", "1d-1h", "1h1d", "300000000y", "1 d", "1.5d"} {
		_, err := ParseSpan(text)
		require.Error(t, err, text)
	}
	require.Equal(t, "1y1d30m", Span(366*day+30*time.Minute).String())
}

func TestRetain(t *testing.T) {
	c, err := Parse([]byte("groups:\n  g:\n    retain: {every_write: 24h, tiers: {1d: 1y, 1m: 2d, \"1h\": 30d}, markers: 10, limit: 5GiB}\n"))
	require.NoError(t, err)
	const day = 24 * time.Hour
	r := c.Groups["g"].Retain
	p, err := r.Policy()
	require.NoError(t, err)
	require.Equal(t, retain.Policy{EveryWrite: day, Markers: 10, Tiers: []retain.Tier{{Every: time.Minute, For: 2 * day}, {Every: time.Hour, For: 30 * day}, {Every: day, For: 365 * day}}}, p)
	require.EqualValues(t, 5<<30, r.Limit)
	b, err := yaml.Marshal(r)
	require.NoError(t, err)
	var again Retain
	require.NoError(t, yaml.Unmarshal(b, &again), string(b))
	require.Equal(t, r, again)
	c.Groups["g"] = Group{Disks: map[string]Disk{"d": {Backing: "x"}}, Retain: Retain{Tiers: map[string]Span{"soon": 1}}}
	c.Default()
	require.ErrorContains(t, c.Validate(), `groups.g: retain: time "soon"`)
	c.Groups["g"] = Group{Disks: map[string]Disk{"d": {Backing: "x"}}, Retain: Retain{EveryWrite: Span(day), Tiers: map[string]Span{"1h": Span(time.Hour)}}}
	c.Default()
	require.ErrorContains(t, c.Validate(), "the tier keeps nothing")
}
