package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

func (a *app) mark() *cobra.Command {
	var req api.MarkRequest
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "mark GROUP LABEL",
		Short: "Name this moment of a group",
		Long: `Name this moment of all disks of a group. The marker is durable when the command returns.

With --consistency filesystem, the file systems of the group's guests are frozen meanwhile; with
application, the guests' own hooks and the group's hooks run too. If they do not come to rest, there is
no marker, or, with --or-crash, a crash-consistent one that says why.

A label has 1 to 255 bytes of UTF-8: printable, no '@' or '/', no space at either end, and nothing that reads
as another form of a point (latest, lsn:7, -15m, 2026-11-21).`,
		Example: `  tidemark mark web01 before-upgrade
  tidemark mark web01 nightly --consistency application --or-crash`,
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			req.Label, req.WaitReplica = args[1], wait.Seconds()
			m, err := c.Mark(cmd.Context(), args[0], req)
			if err != nil {
				return err
			}
			if a.json {
				err = printJSON(cmd, m)
			} else {
				err = printMarked(cmd, m)
			}
			if err == nil && len(m.Late) > 0 {
				return fmt.Errorf("the marker was taken, but: %w: %s", errLate, strings.Join(m.Late, ", "))
			}
			if err == nil && len(m.Problems) > 0 {
				return fmt.Errorf("the marker was taken, but: %w", &problems{m.Problems})
			}
			return err
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&req.Consistency, "consistency", "", "crash (default), filesystem or application")
	fl.BoolVar(&req.OrCrash, "or-crash", false, "rather a crash-consistent marker than none")
	fl.StringVar(&req.Description, "description", "", "a text for people")
	fl.DurationVar(&wait, "wait-replica", 0, "return when it is durable at every replica too, or after this long")
	fl.Lookup("wait-replica").NoOptDefVal = "1m"
	fl.Var((*timeFlag)(&req.Held), "hold", "let nobody let go of its point before: 2027-12-31 (the end of that day, UTC), RFC 3339, or a time from now, as 90d")
	fl.BoolVar(&req.Pin, "pin", false, "keep its point from expiring")
	return cmd
}

func printMarked(cmd *cobra.Command, m api.Marker) error {
	line := fmt.Sprintf("%s: %s is LSN %d, %s-consistent", m.Group, m.Label, m.LSN, m.Consistency)
	if m.Frozen > 0 {
		line += fmt.Sprintf("; frozen for %v", time.Duration(m.Frozen*float64(time.Second)).Round(100*time.Microsecond))
	}
	if m.Note != "" {
		line += fmt.Sprintf("\n%s was asked for: %s", m.Asked, m.Note)
	}
	_, err := fmt.Fprintln(cmd.OutOrStdout(), line)
	return err
}

func (a *app) thaw() *cobra.Command {
	return &cobra.Command{
		Use:               "thaw GROUP",
		Short:             "Thaw the guests of a group, and see that they are thawed",
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeGroups,
		RunE: ask(a, func(ctx context.Context, c *api.Client, args []string) (api.Thawed, error) {
			return c.Thaw(ctx, args[0])
		}, func(cmd *cobra.Command, t api.Thawed) error {
			for _, g := range t.Guests {
				if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%s: %s is thawed\n", t.Group, g); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}

func (a *app) reload() *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Have the daemon read its configuration again: groups, disks, guests, markers",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.Reload(cmd.Context())
			if err != nil {
				return err
			}
			var failed error
			if len(r.Errors) > 0 {
				failed = errors.New(strings.Join(r.Errors, "\n"))
			}
			if a.json {
				return errors.Join(printJSON(cmd, r), failed)
			}
			out := cmd.OutOrStdout()
			for _, change := range r.Changes {
				fmt.Fprintln(out, change)
			}
			for _, name := range r.Restart {
				fmt.Fprintf(out, "%s has changed: that takes a restart\n", name)
			}
			if len(r.Changes)+len(r.Restart)+len(r.Errors) == 0 {
				fmt.Fprintln(out, "nothing has changed")
			}
			return failed
		},
	}
}
