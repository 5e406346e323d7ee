package main

import (
	"context"
	"fmt"
	"math"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

func (a *app) points() *cobra.Command {
	var f api.Filter
	cmd := &cobra.Command{
		Use:   "points GROUP",
		Short: "List a group's markers, its kept points, and the windows in which every LSN can be viewed",
		Example: `  tidemark points web01 --consistency application --since -24h
  tidemark points web01 --label 'nightly-*' --by scheduler`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeGroups,
		RunE: ask(a, func(ctx context.Context, c *api.Client, args []string) (api.Points, error) {
			return c.Points(ctx, args[0], f)
		}, printPoints),
	}
	fl := cmd.Flags()
	fl.StringVar(&f.Since, "since", "", "markers from this time on: RFC 3339, or -2h")
	fl.StringVar(&f.Until, "until", "", "markers up to this time")
	fl.StringVar(&f.Label, "label", "", "a pattern for the label: *, ? and [a-z]")
	fl.StringVar(&f.Consistency, "consistency", "", "at least this: crash, filesystem or application")
	fl.StringVar(&f.By, "by", "", "who asked: user, user:NAME, scheduler, guest, guest:NAME, tidemark")
	fl.BoolVar(&f.Pinned, "pinned", false, "pinned markers only")
	return cmd
}

func printPoints(cmd *cobra.Command, p api.Points) error {
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "every LSN from %d (horizon) to %d (head), since %s; durable to %d\n", p.Horizon, p.Head, p.Since.Format(time.RFC3339), p.Durable)
	for _, r := range p.Earlier {
		fmt.Fprintf(w, "every LSN from %d to %d, before a gap\n", r.First, r.Last)
	}
	fmt.Fprintln(w, "LSN\tTIME\tCONSISTENCY\tBY\tLABEL\t")
	kept := p.Kept
	// why prints the kept points before an LSN that have no marker, and returns why that one is kept.
	why := func(at uint64) string {
		for len(kept) > 0 && kept[0].LSN <= at {
			k := kept[0]
			if kept = kept[1:]; k.LSN == at {
				return " kept: " + reasons(k)
			}
			fmt.Fprintf(w, "%d\t%s\tcrash\t\t\tkept: %s\n", k.LSN, k.Time.Format(time.RFC3339Nano), reasons(k))
		}
		return ""
	}
	for _, m := range p.Markers {
		beyond := why(m.LSN)
		label, more := m.Label, m.Description
		if m.Pinned {
			label += " (pinned)"
		}
		if m.Held.After(time.Now()) {
			label += " (held until " + m.Held.Format(time.RFC3339) + ")"
		}
		if m.Note != "" {
			more += " [" + m.Asked + " was asked for: " + m.Note + "]"
		}
		fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\n", m.LSN, m.Time.Format(time.RFC3339Nano), m.Consistency, m.By, label, more+beyond)
	}
	why(math.MaxUint64)
	return w.Flush()
}
