package main

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"github.com/stretchr/testify/require"
)

// TestMonitoring: dashboard and alert rules are well-formed, and every metric and label in them is one that a daemon with a replica has.
func TestMonitoring(t *testing.T) {
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	b, err := os.ReadFile("monitoring/grafana.json")
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &dashboard))
	var rules struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	b, err = os.ReadFile("monitoring/alerts.yaml")
	require.NoError(t, err)
	require.NoError(t, yaml.UnmarshalWithOptions(b, &rules, yaml.Strict()))
	exprs := map[string]string{}
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			exprs[p.Title] += target.Expr + "\n"
		}
	}
	labels := regexp.MustCompile(`\$labels\.([a-z]+)`)
	used := map[string]string{}
	for _, r := range rules.Groups[0].Rules {
		exprs[r.Alert] = r.Expr
		require.NotEmpty(t, r.Annotations["summary"], r.Alert)
		for _, m := range labels.FindAllStringSubmatch(r.Annotations["summary"]+r.Annotations["description"], -1) {
			used[r.Expr] += " " + m[1]
		}
	}
	require.Greater(t, len(exprs), 12)

	a, _ := hostsOf(t, 16<<20)
	a.replicate("")
	a.ok("mark", "web01", "m", "--wait-replica")
	metrics := a.metrics()
	// Those that come with the first event of their kind.
	for _, name := range []string{"tidemark_guest_frozen_seconds", "tidemark_markers_missed_total", "tidemark_guests_not_thawed"} {
		metrics += "\n" + name + `{group="web01"`
	}
	names := regexp.MustCompile(`tidemark_[a-z_]+`)
	for what, expr := range exprs {
		for _, name := range names.FindAllString(expr, -1) {
			name = strings.TrimSuffix(name, "_bucket")
			at := strings.Index(metrics, "\n"+name+"{")
			require.GreaterOrEqual(t, at, 0, "%s: a daemon has no %s", what, name)
			line, _, _ := strings.Cut(metrics[at+1:], "\n")
			for _, label := range strings.Fields(used[expr]) {
				require.Contains(t, line, label+`="`, what)
			}
		}
	}
}
