package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

// TestPrintPoints: each point has one line, in order, with its marker if it has one, and why it is kept.
func TestPrintPoints(t *testing.T) {
	var out bytes.Buffer
	cmd := &cobra.Command{}
	cmd.SetOut(&out)
	held := time.Now().Add(time.Hour)
	require.NoError(t, printPoints(cmd, api.Points{
		Kept:    []api.Kept{{LSN: 3, Why: []string{"each 1m"}}, {LSN: 9, Why: []string{"pinned", "each 1m"}}, {LSN: 12}, {LSN: 15, Why: []string{"each 1m"}}},
		Markers: []api.Marker{{LSN: 9, Label: "one", Pinned: true}, {LSN: 20, Label: "two", Held: held}},
	}))
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")[2:]
	require.Len(t, lines, 5, out.String())
	for i, want := range [][]string{{"3 ", "kept: each 1m"}, {"9 ", "one (pinned)", "kept: pinned, each 1m"}, {"12 ", "kept: in use"}, {"15 ", "kept: each 1m"}, {"20 ", "two (held until "}} {
		require.True(t, strings.HasPrefix(lines[i], want[0]), lines[i])
		for _, part := range want[1:] {
			require.Contains(t, lines[i], part)
		}
	}
}

// TestTimeFlag: a date is its end, and what no record can hold is no time.
func TestTimeFlag(t *testing.T) {
	var m timeFlag
	require.NoError(t, m.Set("2027-12-31"))
	require.Equal(t, "2028-01-01T00:00:00Z", m.String())
	require.NoError(t, m.Set("2027-12-31T10:00:00Z"))
	require.Equal(t, "2027-12-31T10:00:00Z", m.String())
	require.NoError(t, m.Set("90d"))
	require.WithinDuration(t, time.Now().Add(90*24*time.Hour), time.Time(m), time.Minute)
	for _, bad := range []string{"", "tomorrow", "9999-12-31", "3000-01-01T00:00:00Z", "290y"} {
		require.Error(t, m.Set(bad), bad)
	}
}
