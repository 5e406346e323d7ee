package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

// The verbs that change a marker.

func (a *app) pin() *cobra.Command {
	yes := true
	return a.amendment("pin GROUP LABEL", "Keep a marker, and the history behind it, from expiring",
		"Keep a marker, and all history behind it, from expiring until it is unpinned. When a journal is full of what is pinned, its guests' writes fail.",
		func(ctx context.Context, c *api.Client, group, label string) (api.Marker, error) {
			return c.Amend(ctx, group, label, api.Amendment{Pinned: &yes})
		}, "pinned")
}

func (a *app) unpin() *cobra.Command {
	no := false
	return a.amendment("unpin GROUP LABEL", "Let a pinned marker expire with its history", "",
		func(ctx context.Context, c *api.Client, group, label string) (api.Marker, error) {
			return c.Amend(ctx, group, label, api.Amendment{Pinned: &no})
		}, "not pinned")
}

func (a *app) delete() *cobra.Command {
	return a.amendment("delete GROUP LABEL", "Have a label name nothing any more",
		"Have a label name nothing any more. What was written stays, and can be viewed by LSN or time while the window covers it.",
		func(ctx context.Context, c *api.Client, group, label string) (api.Marker, error) {
			return c.Delete(ctx, group, label)
		}, "deleted")
}

func (a *app) amendment(use, short, long string, do func(context.Context, *api.Client, string, string) (api.Marker, error), is string) *cobra.Command {
	return &cobra.Command{
		Use:               use,
		Short:             short,
		Long:              long,
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			m, err := do(cmd.Context(), c, args[0], args[1])
			if err != nil {
				return err
			}
			return a.printAmended(cmd, m, is)
		},
	}
}

func (a *app) printAmended(cmd *cobra.Command, m api.Marker, is string) error {
	if a.json {
		return printJSON(cmd, m)
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s: %s, LSN %d, is %s\n", m.Group, m.Label, m.LSN, is)
	return err
}

func (a *app) describe() *cobra.Command {
	return &cobra.Command{
		Use:               "describe GROUP LABEL TEXT",
		Short:             "Set a marker's description",
		Args:              args(cobra.ExactArgs(3)),
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			m, err := c.Amend(cmd.Context(), args[0], args[1], api.Amendment{Description: &args[2]})
			if err != nil {
				return err
			}
			return a.printAmended(cmd, m, "described")
		},
	}
}
