package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

func (a *app) failover() *cobra.Command {
	var r api.FailoverRequest
	cmd := &cobra.Command{
		Use:   "failover GROUP [--to POINT]",
		Short: "Write a group here that was another daemon's, from what has come of it",
		Long: `Have this daemon write a group that comes from another one. Its epoch is raised: the daemon that wrote it before is refused when it
can be reached again, takes no more writes, and follows. What that one had written and not sent by then is not here.

The other daemon is not asked: where it can be, "tidemark failback" loses nothing. With --to, the group's disks
are taken back to an earlier point then, as "tidemark rollback" does.`,
		Example: `  tidemark failover web01
  tidemark failover web01 --to latest:application`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeGroups,
		RunE: ask(a, func(ctx context.Context, c *api.Client, args []string) (api.FailedOver, error) {
			return c.Failover(ctx, args[0], r)
		}, printFailedOver),
	}
	cmd.Flags().StringVar(&r.Point, "to", "", "an earlier point")
	return cmd
}

func (a *app) failback() *cobra.Command {
	return &cobra.Command{
		Use:   "failback GROUP",
		Short: "Take a group over from the daemon that writes it, with nothing lost",
		Long: `Ask the daemon that writes a group, and ships it here, to hand it over: it takes no more writes, what it has written gets here, and this
daemon writes the group from then on. No guest may have the group's disks open there.`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeGroups,
		RunE: ask(a, func(ctx context.Context, c *api.Client, args []string) (api.FailedOver, error) {
			return c.Failback(ctx, args[0])
		}, printFailedOver),
	}
}

func printFailedOver(cmd *cobra.Command, f api.FailedOver) error {
	err := say(cmd, "%s is written here from LSN %d on, in epoch %d (%v)", f.Group, f.LSN+1, f.Epoch, time.Duration(f.Seconds*float64(time.Second)).Round(time.Millisecond))
	if r := f.RolledBack; err == nil && r != nil {
		err = say(cmd, "its disks are what they were at LSN %d; the way back: tidemark rollback %s --to %s", r.LSN, f.Group, r.Before)
	}
	return err
}
