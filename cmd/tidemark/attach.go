package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/restore"
)

func (a *app) attach() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "attach GROUP[/DISK]@POINT | scratch/NAME[/DISK]",
		Short: "Make block devices of disks as they were, or of a scratch export",
		Long: `Make block devices of the daemon's host, /dev/nbdN, of disks as they were at a point: read-only ones. A file system whose journal is
not empty takes one that can be written: a scratch export. The daemon, which must be root, connects them, again when it starts anew;
meanwhile their users wait. The kernel's nbd module must be loaded.`,
		Example: `  tidemark attach web01/vda@before-upgrade
  tidemark detach web01/vda@before-upgrade`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			r := api.AttachRequest{Asked: args[0]}
			if r.Exports, err = a.attachable(cmd, c, args[0]); err != nil {
				return err
			}
			all, err := c.Attach(cmd.Context(), r)
			if err != nil {
				return err
			}
			return a.sayAttached(cmd, all)
		},
	}
	return cmd
}

// attachable are the exports that a name means.
func (a *app) attachable(cmd *cobra.Command, c *api.Client, name string) (exports []string, err error) {
	s, err := c.Status(cmd.Context())
	if err != nil {
		return nil, err
	}
	if rest, ok := strings.CutPrefix(name, "scratch/"); ok {
		scratch, disk, _ := strings.Cut(rest, "/")
		for _, sc := range s.Scratches {
			for _, d := range sc.Disks {
				if sc.Name == scratch && (disk == "" || d.Name == disk) {
					exports = append(exports, d.Export)
				}
			}
		}
		if len(exports) == 0 {
			return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("scratch export %q: not found", rest)}
		}
		return exports, nil
	}
	n, err := splitDisk(name)
	if err != nil {
		return nil, usage(err)
	}
	r := &restoring{app: a, cmd: cmd, name: n, client: c, status: s}
	if err := r.at(restore.Origin{}, false); err != nil {
		return nil, err
	}
	disks, err := r.pastExports()
	for _, d := range disks {
		exports = append(exports, d.Export)
	}
	return exports, err
}

func (a *app) sayAttached(cmd *cobra.Command, all []api.Attachment) error {
	if a.json {
		return printJSON(cmd, all)
	}
	for _, d := range all {
		if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\t%s\n", d.Device, d.Export); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) detach() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "detach DEVICE | NAME",
		Short: "Disconnect block devices, by their file or by what was attached",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "" {
				return usage(errors.New("name a device"))
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			all, err := c.Detach(cmd.Context(), args[0], force)
			if err != nil {
				return err
			}
			return a.sayAttached(cmd, all)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "though it is mounted: who uses it gets errors")
	return cmd
}
