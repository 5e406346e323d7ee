package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

func (a *app) rollback() *cobra.Command {
	var r api.RollbackRequest
	cmd := &cobra.Command{
		Use:   "rollback GROUP --to POINT",
		Short: "Take a group's disks back to a point",
		Long: `Take all disks of a group back to what they were at a point: what differs is written to them, and journaled
like a guest's writes, so that "rollback --to" the marker of the state before returns to the present.

The guest must be stopped. With --force it is cut off instead: its disks fail until it is started anew.`,
		Example: `  virsh destroy web01
  tidemark rollback web01 --to before-upgrade
  virsh start web01`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.Point == "" {
				return usage(errors.New("--to is missing"))
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			d, err := c.Rollback(cmd.Context(), args[0], r)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd, d)
			}
			for _, disk := range d.Disks {
				fmt.Fprintf(cmd.OutOrStdout(), "%s/%s is what it was at LSN %d: %s differed\n", d.Group, disk.Name, d.LSN, size(disk.Written))
			}
			if len(d.Untouched) > 0 {
				fmt.Fprintf(cmd.OutOrStdout(), "not touched, as they came to the group later: %s\n", strings.Join(d.Untouched, ", "))
			}
			if d.Before == "" { // it was in a note that could not be read
				return nil
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "the way back: tidemark rollback %s --to %s\n", d.Group, d.Before)
			return err
		},
	}
	cmd.Flags().StringVar(&r.Point, "to", "", "the point")
	cmd.Flags().BoolVar(&r.Force, "force", false, "cut clients off that have the disks open; give up a disk that left the group in the midst of a rollback")
	return cmd
}
