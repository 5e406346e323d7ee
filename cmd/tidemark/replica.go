package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

func (a *app) replica() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "replica",
		Short: "Pair this host's daemon with others, to ship groups to them or take theirs",
		Args:  args(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.invite(), a.join(), a.peers(), a.revoke(), a.compare(), a.accept())
	return cmd
}

const maySend = "groups that the other daemon may send here, a pattern as web*; repeatable"

func (a *app) invite() *cobra.Command {
	var r api.InviteRequest
	var valid time.Duration
	cmd := &cobra.Command{
		Use:   "invite",
		Short: "Print a token that another daemon can join with, once",
		Long: `Print a token. On the other host, "tidemark replica join" with it makes each of the two daemons trust the other, and nobody
else: each knows the other's key from then on. The token can be used once, until it expires or this daemon stops.`,
		Example: `  tidemark replica invite --may-send 'web*'`,
		Args:    args(cobra.NoArgs),
		RunE: ask(a, func(ctx context.Context, c *api.Client, _ []string) (api.Invitation, error) {
			r.Valid = valid.Seconds()
			return c.Invite(ctx, r)
		}, func(cmd *cobra.Command, i api.Invitation) error {
			err := say(cmd, "%s", i.Token)
			fmt.Fprintf(cmd.ErrOrStderr(), "valid until %s; on the other host: tidemark replica join HOST:PORT TOKEN (this daemon listens on %s)\n", i.Expires.Format(time.RFC3339), i.Listen)
			return err
		}),
	}
	fl := cmd.Flags()
	fl.StringVar(&r.Name, "name", "", "what the other daemon is called here (default: what it calls itself)")
	fl.StringArrayVar(&r.MaySend, "may-send", []string{"*"}, maySend)
	fl.DurationVar(&valid, "valid", time.Hour, "how long the token can be used")
	return cmd
}

func (a *app) join() *cobra.Command {
	var r api.JoinRequest
	cmd := &cobra.Command{
		Use:   "join HOST:PORT TOKEN",
		Short: "Make a daemon that gave out a token a peer, and this one a peer of it",
		Example: `  tidemark replica join backup1:10900 tidemark-mfrgg...
  # then, in the configuration: groups: {web01: {replicas: [backup1]}}`,
		Args: args(cobra.ExactArgs(2)),
		RunE: ask(a, func(ctx context.Context, c *api.Client, args []string) (api.Peer, error) {
			r.Address, r.Token = args[0], args[1]
			return c.Join(ctx, r)
		}, func(cmd *cobra.Command, p api.Peer) error {
			return say(cmd, "%s is a peer (key %s)", p.Name, p.Fingerprint)
		}),
	}
	fl := cmd.Flags()
	fl.StringVar(&r.Name, "name", "", "what the other daemon is called here (default: what it calls itself)")
	fl.StringArrayVar(&r.MaySend, "may-send", nil, maySend+" (default: none, but those that are shipped to it)")
	return cmd
}

func (a *app) peers() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the daemons that this one trusts, and what each may do",
		Args:  args(cobra.NoArgs),
		RunE: ask(a, func(ctx context.Context, c *api.Client, _ []string) (api.Peers, error) {
			return c.Peers(ctx)
		}, func(cmd *cobra.Command, p api.Peers) error {
			w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 2, ' ', 0)
			fmt.Fprintln(w, "PEER\tADDRESS\tMAY SEND\tKEY")
			fmt.Fprintf(w, "%s\t(this daemon)\t\t%s\n", p.Name, p.Fingerprint)
			for _, one := range p.Peers {
				address, key := one.Address, one.Fingerprint
				if address == "" {
					address = "(it dials)"
				}
				if key == "" {
					key = "(by its certificate)"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", one.Name, address, strings.Join(one.MaySend, " "), key)
			}
			return w.Flush()
		}),
	}
}

func (a *app) revoke() *cobra.Command {
	return &cobra.Command{
		Use:   "revoke PEER",
		Short: "Trust a daemon no more: its connections end, and it is not let in again",
		Args:  args(cobra.ExactArgs(1)),
		RunE: ask(a, func(ctx context.Context, c *api.Client, args []string) (api.Peer, error) {
			return c.Revoke(ctx, args[0])
		}, func(cmd *cobra.Command, p api.Peer) error {
			return say(cmd, "%s is no peer any more", p.Name)
		}),
	}
}

func (a *app) accept() *cobra.Command {
	var q api.AcceptRequest
	cmd := &cobra.Command{
		Use:   "accept GROUP",
		Short: "Allow the writer of a group, once, to have history dropped here",
		Long: `A daemon that writes a group can add to its history here, and take nothing away. Where it can not go on otherwise, the status says so: the
group here must go back behind what another daemon had written. This allows it, once, until the daemon stops.

With --anew, the group begins anew when its writer offers it next, whatever the reason: what its history holds here is dropped then, and only what differs
of the disks is sent.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: ask(a, func(ctx context.Context, c *api.Client, args []string) (api.Accepted, error) {
			return c.Accept(ctx, args[0], q)
		}, func(cmd *cobra.Command, got api.Accepted) error {
			if got.Anew {
				return say(cmd, "%s begins anew when its writer offers it next", got.Group)
			}
			return say(cmd, "the writer of %s may have it go back, once", got.Group)
		}),
	}
	cmd.Flags().BoolVar(&q.Anew, "anew", false, "drop what is here of the group, and have its writer seed it again")
	return cmd
}

func (a *app) compare() *cobra.Command {
	var point, peer string
	cmd := &cobra.Command{
		Use:   "compare GROUP [--at POINT]",
		Short: "Prove that another daemon has the same of a group, without moving it",
		Long: `Compare the disks of a group at a point, block by block, with what other daemons have of them at the same LSN: by sums under a key that is drawn for
each comparison.`,
		Args:              args(cobra.ExactArgs(1)),
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			got, err := c.Compare(cmd.Context(), args[0], point, peer)
			if err != nil {
				return err
			}
			if a.json {
				err = printJSON(cmd, got)
			} else {
				err = printCompared(cmd.OutOrStdout(), got)
			}
			for _, d := range got.Disks {
				if d.Differ > 0 {
					return fmt.Errorf("%w: disk %s differs from %s's", errDamage, d.Name, d.Peer)
				}
				if d.Error != "" {
					err = errors.Join(err, fmt.Errorf("disk %s could not be compared with %s's: %s", d.Name, d.Peer, d.Error))
				}
			}
			return err
		},
	}
	cmd.Flags().StringVar(&point, "at", "latest", "the point; the other daemon must have come so far")
	cmd.Flags().StringVar(&peer, "peer", "", "compare with this one (default: all that have the group)")
	return cmd
}

func printCompared(w io.Writer, c api.Comparison) error {
	for _, d := range c.Disks {
		what := "the same"
		switch {
		case d.Error != "":
			what = "not compared"
		case d.Differ > 0:
			what = fmt.Sprintf("%d blocks differ", d.Differ)
		}
		fmt.Fprintf(w, "%s/%s at LSN %d, here and at %s: %s (%d blocks)\n", c.Group, d.Name, c.LSN, d.Peer, what, d.Blocks)
		for _, e := range d.Differing {
			fmt.Fprintf(w, "  %d bytes at %d\n", e.Length, e.Offset)
		}
	}
	return nil
}

// printReplication says to whom a group is shipped, and whom it comes from.
func printReplication(w io.Writer, g api.Group) {
	for _, r := range g.Replicas {
		what := r.State
		switch {
		case r.Seeding != nil:
			what = fmt.Sprintf("seeding %s: %s of %s compared, %s sent", r.Seeding.Disk, size(r.Seeding.Compared), size(r.Seeding.All), size(r.Seeding.Sent))
			if r.Seeding.Left > 0 {
				what += fmt.Sprintf(", %v left", time.Duration(r.Seeding.Left*float64(time.Second)).Round(time.Second))
			}
		case r.Lag > 0:
			what += fmt.Sprintf(", %v and %s behind", time.Duration(r.Lag*float64(time.Second)).Round(time.Millisecond), size(r.LagBytes))
		}
		fmt.Fprintf(w, "  replica %s\tLSN %d\t%s\n", r.Peer, r.Acked, what)
		if r.Error != "" {
			fmt.Fprintf(w, "    %s\n", r.Error)
		}
	}
	if s := g.Source; s != nil {
		what := s.State
		if s.Behind > 0 {
			what += fmt.Sprintf(", %d records behind", s.Behind)
		}
		fmt.Fprintf(w, "  comes from %s\tepoch %d\t%s\n", s.Peer, g.Epoch, what)
	}
}
