package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

func (a *app) mark() *cobra.Command {
	return &cobra.Command{
		Use:               "mark GROUP LABEL",
		Short:             "Name this moment of a group",
		Long:              "Name this moment of all disks of a group. The marker is durable when the command returns.",
		Example:           "  tidemark mark web01 before-upgrade",
		Args:              args(cobra.ExactArgs(2)),
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			m, err := c.Mark(cmd.Context(), args[0], api.MarkRequest{Label: args[1], By: "user"})
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd, m)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s is LSN %d, %s-consistent\n", m.Group, m.Label, m.LSN, m.Consistency)
			return err
		},
	}
}
