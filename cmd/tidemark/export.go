package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/restore"
)

// exportedDisk is one of the export verb's JSON.
type exportedDisk struct {
	Disk   string `json:"disk"`
	Export string `json:"export"`
	URI    string `json:"uri"`
}

type exportedAll struct {
	Group   string         `json:"group"`
	Point   string         `json:"point"`
	LSN     uint64         `json:"lsn"`
	Scratch string         `json:"scratch,omitempty"`
	Disks   []exportedDisk `json:"disks"`
}

func (a *app) export() *cobra.Command {
	var scratch bool
	var req api.ScratchRequest
	var nbd string
	cmd := &cobra.Command{
		Use:   "export GROUP[/DISK]@POINT [--scratch]",
		Short: "Name the NBD exports of disks as they were; writable ones with --scratch",
		Long: `Name the NBD exports that show disks as they were at a point. They are read-only and need no preparation.

With --scratch they can be written, so that a VM boots from them: what is written goes to a scratch area, never to the group's
disks or history. A scratch export stays, also over restarts of the daemon, until "tidemark unexport" throws it away or "tidemark
promote" makes it a group of its own; with --once it goes when its last client has been gone for a minute. As long as it is
there, its point is kept.`,
		Example: `  tidemark export web01@before-upgrade --scratch --name test
  qemu-system-x86_64 … -drive driver=nbd,server.type=unix,server.path=/run/tidemark/nbd.sock,export=scratch/test/vda`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := splitDisk(args[0])
			if err == nil && !scratch && (req.Name != "" || req.Once) {
				err = errors.New("--name and --once go with --scratch")
			}
			if err != nil {
				return usage(err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			out := exportedAll{Group: name.Group, Point: name.Point.String()}
			if scratch {
				req.Group, req.Disk, req.Point = name.Group, name.Disk, name.Point.String()
				s, err := c.Scratch(cmd.Context(), req)
				if err != nil {
					return err
				}
				out.LSN, out.Scratch = s.LSN, s.Name
				for _, d := range s.Disks {
					out.Disks = append(out.Disks, exportedDisk{Disk: d.Name, Export: d.Export})
				}
			}
			s, err := c.Status(cmd.Context())
			if err != nil {
				return err
			}
			if !scratch {
				r := &restoring{app: a, cmd: cmd, name: name, client: c, status: s}
				if err := r.at(restore.Origin{}, false); err != nil {
					return err
				}
				out.LSN = r.lsn
				if out.Disks, err = r.pastExports(); err != nil {
					return err
				}
			}
			network, addr, err := a.nbdServer(s, nbd)
			if err != nil {
				return err
			}
			for i := range out.Disks {
				out.Disks[i].URI = nbdURI(network, addr, out.Disks[i].Export)
			}
			if a.json {
				return printJSON(cmd, out)
			}
			for _, d := range out.Disks {
				fmt.Fprintf(cmd.OutOrStdout(), "%s\t%s\n", d.Export, d.URI)
			}
			return nil
		},
	}
	fl := cmd.Flags()
	fl.BoolVar(&scratch, "scratch", false, "exports that can be written")
	fl.StringVar(&req.Name, "name", "", "of the scratch export; GROUP-N by default")
	fl.BoolVar(&req.Once, "once", false, "throw it away when its last client is gone")
	fl.StringVar(&nbd, "nbd", "", "the daemon's NBD socket, unix:PATH or tcp:HOST:PORT; asked of the daemon by default")
	return cmd
}

// pastExports are the read-only exports of the disks at the point: they need nothing but their names.
func (r *restoring) pastExports() (all []exportedDisk, err error) {
	disks := []string{r.name.Disk}
	if r.name.Disk == "" {
		if disks, err = r.disksAt(); err != nil {
			return nil, err
		}
	} else if err := r.hasDisk(r.name.Disk); err != nil {
		return nil, err
	}
	for _, d := range disks {
		n := record.ExportName{Group: r.name.Group, Disk: d, Point: record.Point{Form: record.FormLSN, LSN: record.LSN(r.lsn)}}
		all = append(all, exportedDisk{Disk: d, Export: n.String()})
	}
	return all, nil
}

func (a *app) unexport() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "unexport NAME",
		Short: "Throw a scratch export away, with everything that was written to it",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.Unexport(cmd.Context(), args[0], force)
			if err == nil && a.json {
				return printJSON(cmd, s)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "though clients have it open: they get errors")
	return cmd
}

func (a *app) promote() *cobra.Command {
	var r api.PromoteRequest
	var wait bool
	cmd := &cobra.Command{
		Use:   "promote NAME --group GROUP --to DIR",
		Short: "Make a scratch export a protected group with backings of its own, while its VM runs",
		Long: `Make a scratch export a group of its own. Its VM goes on, under the same NBD names: what it writes goes to new backings at
once, DIR/DISK.raw, which are filled with the rest in the background. When they are whole, the journal takes them
over, and every write from then on is history. Until then the disks are as safe as a disk without Tidemark.

The group's configuration is written to promoted/GROUP.yaml in the state directory.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.Group == "" || r.Dir == "" {
				return usage(errors.New("--group and --to are needed: the new group's name, and where its backings are to be"))
			}
			dir, err := filepath.Abs(r.Dir)
			if err != nil {
				return err
			}
			r.Dir = dir
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.Promote(cmd.Context(), args[0], r)
			if err != nil {
				return err
			}
			if wait {
				if s, err = a.waitPromoted(cmd, c, s); err != nil {
					return err
				}
			}
			if a.json {
				return printJSON(cmd, s)
			}
			text := "%s becomes group %s: its disks are being filled (tidemark status)\n"
			if s.Promotion.Done {
				text = "%s is group %s, and protected\n"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), text, s.Name, s.Promotion.Group)
			return err
		},
	}
	cmd.Flags().StringVar(&r.Group, "group", "", "the new group's name")
	cmd.Flags().StringVar(&r.Dir, "to", "", "the directory of its backings")
	cmd.Flags().BoolVar(&wait, "wait", false, "until it is protected")
	return cmd
}

// waitPromoted waits until a promotion has come to its end.
func (a *app) waitPromoted(cmd *cobra.Command, c *api.Client, s api.Scratch) (api.Scratch, error) {
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-cmd.Context().Done():
			return s, cmd.Context().Err()
		case <-t.C:
		}
		all, err := c.Status(cmd.Context())
		if err != nil {
			return s, err
		}
		found := false
		for _, now := range all.Scratches {
			if now.Name == s.Name {
				s, found = now, true
			}
		}
		switch {
		case !found:
			return s, fmt.Errorf("scratch export %s is gone", s.Name)
		case s.Promotion.Error != "":
			return s, errors.New(s.Promotion.Error)
		case s.Promotion.Done:
			return s, nil
		}
	}
}
