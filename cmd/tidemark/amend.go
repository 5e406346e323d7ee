package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

// The verbs that change a marker.

func (a *app) pin() *cobra.Command {
	yes := true
	return a.amendment(amendment{
		use: "pin GROUP LABEL", args: 2, is: "pinned",
		short: "Keep a marker's point from expiring",
		long: `Keep what the disks were at a marker until it is unpinned, whatever the policy says. When a file system is full of
what is pinned, its guests' writes fail.`,
		do: func(ctx context.Context, c *api.Client, args []string) (api.Marker, error) {
			return c.Amend(ctx, args[0], args[1], api.Amendment{Pinned: &yes})
		},
	})
}

func (a *app) unpin() *cobra.Command {
	no := false
	return a.amendment(amendment{
		use: "unpin GROUP LABEL", args: 2, is: "not pinned",
		short: "Let a pinned marker expire",
		do: func(ctx context.Context, c *api.Client, args []string) (api.Marker, error) {
			return c.Amend(ctx, args[0], args[1], api.Amendment{Pinned: &no})
		},
	})
}

func (a *app) describe() *cobra.Command {
	return a.amendment(amendment{
		use: "describe GROUP LABEL TEXT", args: 3, is: "described",
		short: "Set a marker's description",
		do: func(ctx context.Context, c *api.Client, args []string) (api.Marker, error) {
			return c.Amend(ctx, args[0], args[1], api.Amendment{Description: &args[2]})
		},
	})
}

func (a *app) delete() *cobra.Command {
	return a.amendment(amendment{
		use: "delete GROUP LABEL", args: 2, is: "deleted",
		short: "Have a label name nothing any more",
		long: `Have a label name nothing any more. What was written stays, and can be viewed by LSN or time while the
window covers it.`,
		do: func(ctx context.Context, c *api.Client, args []string) (api.Marker, error) {
			return c.Delete(ctx, args[0], args[1])
		},
	})
}

// amendment is a verb that changes a marker: its first two arguments are the group and the label.
type amendment struct {
	use, short, long string
	args             int
	is               string // what the marker is then
	do               func(ctx context.Context, c *api.Client, args []string) (api.Marker, error)
}

func (a *app) amendment(v amendment) *cobra.Command {
	return &cobra.Command{
		Use:               v.use,
		Short:             v.short,
		Long:              v.long,
		Args:              args(cobra.ExactArgs(v.args)),
		ValidArgsFunction: a.completeGroups,
		RunE: ask(a, v.do, func(cmd *cobra.Command, m api.Marker) error {
			return say(cmd, "%s: %s, LSN %d, is %s", m.Group, m.Label, m.LSN, v.is)
		}),
	}
}
