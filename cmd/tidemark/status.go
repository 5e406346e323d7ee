package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

func (a *app) status() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the groups, their disks and how far each is",
		Args:  args(cobra.NoArgs),
		RunE: ask(a, func(ctx context.Context, c *api.Client, _ []string) (api.Status, error) {
			return c.Status(ctx)
		}, func(cmd *cobra.Command, s api.Status) error {
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "GROUP\tSTATE\tHORIZON\tAPPLIED\tDURABLE\tHEAD\tJOURNAL\tUNAPPLIED")
			for _, g := range s.Groups {
				fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%d\t%s\t%s\n", g.Name, g.State, g.Horizon, g.Applied, g.Durable, g.Head, size(g.JournalBytes), size(g.Unapplied))
				if g.Error != "" {
					fmt.Fprintf(w, "  %s\n", g.Error)
				}
				printMembers(w, g)
			}
			printScratches(w, s.Scratches)
			return w.Flush()
		}),
	}
}

func printScratches(w io.Writer, all []api.Scratch) {
	if len(all) == 0 {
		return
	}
	fmt.Fprintln(w, "SCRATCH\tOF\tWRITTEN\tCLIENTS\t")
	for _, s := range all {
		var written, whole int64
		for _, d := range s.Disks {
			written, whole = written+d.Written, whole+d.Size
		}
		note := ""
		switch p := s.Promotion; {
		case s.Error != "":
			note = s.Error
		case p != nil && p.Done:
			note = "is group " + p.Group
		case p != nil && p.Error != "":
			note = "not promoted: " + p.Error
		case p != nil:
			note = fmt.Sprintf("becomes group %s: %s of %s", p.Group, size(p.Filled), size(whole))
		case s.Branch != nil:
			note = fmt.Sprintf("what %s had written in epoch %d, LSN %d to %d, and its group has not", s.Branch.Host, s.Branch.Epoch, s.Branch.From, s.Branch.To)
		case s.Once:
			note = "goes with its last client"
		}
		fmt.Fprintf(w, "%s\t%s@%s (LSN %d)\t%s\t%d\t%s\n", s.Name, s.Group, s.Point, s.LSN, size(written), s.Clients, note)
	}
}

func printMembers(w io.Writer, g api.Group) {
	for _, d := range g.Disks {
		where := d.Backing
		if d.Removed != 0 {
			where = fmt.Sprintf("(removed at LSN %d)", d.Removed)
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\n", d.Name, size(d.Size), where)
	}
	for _, one := range g.Guests {
		fmt.Fprintf(w, "  guest %s\t%s\n", one.Name, one.Reached)
	}
	if s := g.Schedule; s != nil {
		last := "none yet"
		if !s.Last.IsZero() {
			last = s.Last.Format(time.RFC3339)
		}
		fmt.Fprintf(w, "  every %v, %s: last %s, next %s, missed %d\n", time.Duration(s.Every*float64(time.Second)), s.Consistency, last, s.Next.Format(time.RFC3339), s.Missed)
	}
	printReplication(w, g)
	for _, p := range g.Problems {
		fmt.Fprintf(w, "  PROBLEM %s\n", p)
	}
}

// size is a number of bytes for people.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, i := float64(n)/1024, 0
	for v >= 1024 && i < len(units)-1 {
		v, i = v/1024, i+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[i])
}
