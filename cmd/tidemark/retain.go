package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
)

func (a *app) retain() *cobra.Command {
	var everyWrite string
	var tiers []string
	var markers int
	var dry bool
	cmd := &cobra.Command{
		Use:   "retain GROUP",
		Short: "Show what a group keeps, and what another policy would",
		Long: `Show how long every write of a group is kept, which points beyond that, and why. With --dry-run, show what would go now, and how much space
that would free: by the policy that is configured, of which each flag replaces its part. Nothing is changed: a policy is the configuration's (see retain in
docs/operating.md), and takes effect with a reload.`,
		Example: `  tidemark retain web01
  tidemark retain web01 --dry-run --every-write 12h --tier 1m=2d --tier 1h=30d --markers 5`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeGroups,
	}
	cmd.RunE = ask(a, func(ctx context.Context, c *api.Client, args []string) (api.Retention, error) {
		q := url.Values{}
		if cmd.Flags().Changed("every-write") {
			q.Set("every_write", everyWrite)
		}
		if cmd.Flags().Changed("markers") {
			q.Set("markers", strconv.Itoa(markers))
		}
		for _, t := range tiers {
			q.Add("tier", t)
		}
		if len(q) > 0 && !dry {
			return api.Retention{}, usage(errors.New("a policy that is not the configuration's can be looked at only: add --dry-run"))
		}
		if dry {
			q.Set("plan", "true")
		}
		return c.Retention(ctx, args[0], q)
	}, printRetention)
	fl := cmd.Flags()
	fl.BoolVar(&dry, "dry-run", false, "show what would go now, and what that would free")
	fl.StringVar(&everyWrite, "every-write", "", "how long every write is kept: 24h, 7d; 0: as long as there is room")
	fl.StringArrayVar(&tiers, "tier", nil, "keep a point each EVERY for FOR, as 1h=30d; several, or none")
	fl.IntVar(&markers, "markers", 0, "how many of the newest markers are kept")
	return cmd
}

func span(seconds float64) string {
	return config.Span(time.Duration(seconds * float64(time.Second))).String()
}

// reasons says why a point is kept.
func reasons(k api.Kept) string {
	if len(k.Why) == 0 {
		return "in use"
	}
	return strings.Join(k.Why, ", ")
}

func printRetention(cmd *cobra.Command, r api.Retention) error {
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
	every := "as long as there is room"
	if r.EveryWrite > 0 {
		every = "for " + span(r.EveryWrite)
	}
	fmt.Fprintf(w, "every write\t%s; since %s at present\n", every, r.Since.Format(time.RFC3339))
	for _, t := range r.Tiers {
		fmt.Fprintf(w, "a point each %s\tfor %s\n", span(t.Every), span(t.For))
	}
	if r.Markers > 0 {
		fmt.Fprintf(w, "the newest markers\t%d\n", r.Markers)
	}
	limit := "; as far as the file system has room"
	if r.Limit > 0 {
		limit = ", of at most " + size(r.Limit)
	}
	fmt.Fprintf(w, "space\t%s%s\n", size(r.Used), limit)
	if r.Short {
		fmt.Fprintln(w, "PROBLEM\tspace has run short: less is kept than is to be")
	}
	kept := r.Kept
	if would := r.Would; would != nil {
		fmt.Fprintf(w, "would go now\tevery write up to LSN %d, but for the points below, and %d points; frees about %s\n", would.Horizon, len(would.Gone), size(would.Frees))
		for _, k := range would.Gone {
			fmt.Fprintf(w, "  goes\tLSN %d\t%s\n", k.LSN, k.Time.Format(time.RFC3339Nano))
		}
		kept = would.Kept
	}
	for _, k := range kept {
		fmt.Fprintf(w, "  kept\tLSN %d\t%s\t%s\n", k.LSN, k.Time.Format(time.RFC3339Nano), reasons(k))
	}
	return w.Flush()
}
