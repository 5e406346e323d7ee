package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

// tested is the report of a failover that was tried out.
type tested struct {
	Group   string      `json:"group"`
	Writer  string      `json:"writer,omitempty"` // whom the group comes from
	Point   string      `json:"point"`
	LSN     uint64      `json:"lsn"`
	Missing uint64      `json:"missing"` // records that the writer has, and the point has not
	Took    float64     `json:"took_seconds"`
	Scratch api.Scratch `json:"scratch"`
	Problem string      `json:"problem,omitempty"`
}

func (a *app) testFailover() *cobra.Command {
	var point, name string
	cmd := &cobra.Command{
		Use:   "test-failover GROUP [--to POINT]",
		Short: "Try out what a failover would give, beside the replication that goes on",
		Long: `Make a scratch export of what a failover of the group would write on: a VM can be started from it, and what it writes is thrown
away with "tidemark unexport". The group goes on to come from its writer meanwhile.`,
		Example: `  tidemark test-failover web01
  qemu-system-x86_64 … -drive file=nbd+unix:///scratch/web01-1/vda?socket=/run/tidemark/nbd.sock
  tidemark unexport web01-1`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			began := time.Now()
			t := tested{Group: args[0]}
			if t.Scratch, err = c.Scratch(cmd.Context(), api.ScratchRequest{Group: args[0], Point: point, Name: name}); err != nil {
				return err
			}
			t.Took, t.Point, t.LSN = time.Since(began).Seconds(), t.Scratch.Point, t.Scratch.LSN
			s, err := c.Status(cmd.Context())
			if err != nil {
				return err
			}
			for _, g := range s.Groups {
				if g.Name == args[0] {
					t.report(g)
				}
			}
			if a.json {
				return printJSON(cmd, t)
			}
			return t.print(cmd, s)
		},
	}
	cmd.Flags().StringVar(&point, "to", "latest", "the point")
	cmd.Flags().StringVar(&name, "name", "", "of the scratch export")
	return cmd
}

// report adds what is known of the group.
func (t *tested) report(g api.Group) {
	head := g.Head
	if g.Source != nil {
		t.Writer = g.Source.Peer
		head = max(head, g.Source.Head)
		if g.Source.State != "connected" {
			t.Problem = fmt.Sprintf("%s is not connected: what it has written since is not known here", t.Writer)
		}
	}
	t.Missing = head - min(head, t.LSN)
}

func (t *tested) print(cmd *cobra.Command, s api.Status) error {
	w := cmd.OutOrStdout()
	fmt.Fprintf(w, "%s@%s is LSN %d: ready after %v\n", t.Group, t.Point, t.LSN, time.Duration(t.Took*float64(time.Second)).Round(time.Millisecond))
	switch {
	case t.Writer == "":
		fmt.Fprintln(w, "the group is written here: it does not come from another daemon")
	case t.Missing == 0:
		fmt.Fprintf(w, "it has every record that %s has said it has\n", t.Writer)
	default:
		fmt.Fprintf(w, "it lacks %d records that %s has said it has\n", t.Missing, t.Writer)
	}
	if t.Problem != "" {
		fmt.Fprintf(w, "PROBLEM %s\n", t.Problem)
	}
	for _, d := range t.Scratch.Disks {
		fmt.Fprintf(w, "  %s\t%s\t%s\n", d.Name, size(d.Size), d.Export)
	}
	_, err := fmt.Fprintf(w, "throw it away with: tidemark unexport %s\n", t.Scratch.Name)
	return err
}
