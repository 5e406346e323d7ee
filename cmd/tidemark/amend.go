package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/journal/record"
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

func (a *app) hold() *cobra.Command {
	var until timeFlag
	cmd := a.amendment(amendment{
		use: "hold GROUP LABEL --until TIME", args: 2, is: "held",
		short: "Let nobody let go of a marker's point before a time",
		long: `Keep what the disks were at a marker until a time, whatever the policy says, and whoever would have it otherwise: a hold can be made longer, and not shorter, and
the marker is not deleted. A replica keeps to it whatever its writer's daemon says.`,
		do: func(ctx context.Context, c *api.Client, args []string) (api.Marker, error) {
			held := time.Time(until)
			return c.Amend(ctx, args[0], args[1], api.Amendment{Held: &held})
		},
	})
	cmd.Flags().Var(&until, "until", "2027-12-31 (the end of that day, UTC), RFC 3339, or a time from now, as 90d")
	_ = cmd.MarkFlagRequired("until")
	return cmd
}

// timeFlag is a flag for a time to come.
type timeFlag time.Time

// String implements pflag.Value.
func (m *timeFlag) String() string {
	if time.Time(*m).IsZero() {
		return ""
	}
	return time.Time(*m).Format(time.RFC3339)
}

// Type implements pflag.Value.
func (m *timeFlag) Type() string { return "time" }

// Set implements pflag.Value.
func (m *timeFlag) Set(s string) error {
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		if t, err = time.Parse(time.DateOnly, s); err == nil {
			t = t.AddDate(0, 0, 1) // the day is over
		}
	}
	if err != nil {
		span, err := config.ParseSpan(s)
		if err != nil {
			return fmt.Errorf("%q is no time: 2027-12-31, 2027-12-31T10:00:00Z, or, from now, 90d", s)
		}
		t = time.Now().Add(time.Duration(span))
	}
	*m = timeFlag(t)
	return record.CheckHeld(t)
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
