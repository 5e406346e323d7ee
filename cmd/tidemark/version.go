package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/build"
)

func (a *app) version() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Args:  args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if a.json {
				return printJSON(cmd, map[string]string{"version": build.Version()})
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), build.Version())
			return err
		},
	}
}
