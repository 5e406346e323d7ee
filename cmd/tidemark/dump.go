package main

import (
	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/dump"
	"github.com/tidemark-cdp/tidemark/journal"
)

func (a *app) dump() *cobra.Command {
	var stateDir string
	var o dump.Options
	cmd := &cobra.Command{
		Use:   "dump [GROUP…]",
		Short: "Show segments, records and the index, for people",
		Long: `Show the segments with their records, the versions in the index and the
markers. Nothing is changed. With --state-dir, the journal of a daemon that is
not running is read. With --json, one object a line.`,
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, groups []string) error {
			if !o.Segments && !o.Records && !o.Index {
				o.Segments, o.Index = true, true
			}
			o.JSON = a.json
			out := cmd.OutOrStdout()
			if stateDir != "" {
				return atRest(stateDir, groups, func(s *journal.Store) error {
					for _, g := range s.Groups() {
						if err := dump.Group(cmd.Context(), out, g, o); err != nil {
							return err
						}
					}
					return nil
				})
			}
			c, groups, err := a.groups(cmd, groups)
			if err != nil {
				return err
			}
			for _, g := range groups {
				if err := c.Dump(cmd.Context(), out, g, o); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&stateDir, "state-dir", "", "state directory of a daemon that is not running")
	cmd.Flags().BoolVar(&o.Segments, "segments", false, "the segments' headers")
	cmd.Flags().BoolVar(&o.Records, "records", false, "the segments' headers and records")
	cmd.Flags().BoolVar(&o.Index, "index", false, "the index: versions and markers")
	return cmd
}
