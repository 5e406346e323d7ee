package main

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

func (a *app) points() *cobra.Command {
	return &cobra.Command{
		Use:               "points GROUP",
		Short:             "List a group's markers and the window in which every LSN can be viewed",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			p, err := c.Points(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd, p)
			}
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintf(w, "every LSN from %d (horizon) to %d (head); durable to %d\n", p.Horizon, p.Head, p.Durable)
			fmt.Fprintln(w, "LSN\tTIME\tCONSISTENCY\tLABEL")
			for _, m := range p.Markers {
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\n", m.LSN, m.Time.Format(time.RFC3339Nano), m.Consistency, m.Label)
			}
			return w.Flush()
		},
	}
}
