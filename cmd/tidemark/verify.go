package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal"
)

func (a *app) verify() *cobra.Command {
	var stateDir string
	var repair bool
	cmd := &cobra.Command{
		Use:   "verify [GROUP…]",
		Short: "Read everything in the journal and compare it with its checksums",
		Long: `Read every record and every version in the index of the groups (all by
default) and compare them with their checksums. Nothing is changed. With
--state-dir, the journal of a daemon that is not running is read.

With --repair, damaged records of the log are fetched from other daemons that have the group, and written again. Damaged originals
can not be: what they held may be in views of the other daemon.`,
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, groups []string) error {
			if repair && stateDir != "" {
				return usage(errors.New("--repair takes a running daemon"))
			}
			all, err := a.verifyAll(cmd, stateDir, repair, groups)
			if err != nil {
				return err
			}
			return a.printVerified(cmd, all)
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "fetch what is damaged from other daemons that have the group")
	cmd.Flags().StringVar(&stateDir, "state-dir", "", "state directory of a daemon that is not running")
	return cmd
}

func (a *app) verifyAll(cmd *cobra.Command, stateDir string, repair bool, groups []string) (all []api.Verified, err error) {
	ctx := cmd.Context()
	if stateDir != "" {
		err = atRest(stateDir, groups, func(g *journal.Group) error {
			v, err := api.VerifyGroup(ctx, g)
			all = append(all, v)
			return err
		})
		return all, err
	}
	c, groups, err := a.groups(cmd, groups)
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		v, err := c.Verify(ctx, g, repair)
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, nil
}

// groups is the daemon's client, and the groups named or all that it has.
func (a *app) groups(cmd *cobra.Command, named []string) (*api.Client, []string, error) {
	c, err := a.client()
	if err != nil || len(named) > 0 {
		return c, named, err
	}
	s, err := c.Status(cmd.Context())
	for _, g := range s.Groups {
		named = append(named, g.Name)
	}
	return c, named, err
}

// atRest opens a state directory that no daemon uses, changes nothing in it,
// and calls fn with the groups named, or all.
func atRest(stateDir string, groups []string, fn func(*journal.Group) error) error {
	names, err := journal.GroupNames(stateDir, journal.Options{})
	if err != nil {
		return err
	}
	if len(groups) == 0 {
		groups = names
	}
	var configs []journal.GroupConfig
	for _, g := range groups {
		if !slices.Contains(names, g) {
			return &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("group %q is not in %s", g, stateDir)}
		}
		configs = append(configs, journal.GroupConfig{Name: g})
	}
	s, err := journal.Open(stateDir, configs, journal.Options{ReadOnly: true})
	if err != nil {
		return fmt.Errorf("%w (if a daemon is using %s, leave out --state-dir)", err, stateDir)
	}
	for _, g := range s.Groups() {
		if err := fn(g); err != nil {
			return errors.Join(err, s.Abandon())
		}
	}
	return s.Abandon()
}

func (a *app) printVerified(cmd *cobra.Command, all []api.Verified) error {
	var damaged int64
	for _, v := range all {
		damaged += v.Damaged
	}
	if a.json {
		if err := printJSON(cmd, map[string]any{"groups": all}); err != nil {
			return err
		}
	} else {
		out := cmd.OutOrStdout()
		for _, v := range all {
			fmt.Fprintf(out, "%s: %d records, %d originals, %s of payload, %d versions: ", v.Group, v.Records, v.Originals, size(v.Bytes), v.Versions)
			if v.Repaired > 0 {
				fmt.Fprintf(out, "%d repaired, ", v.Repaired)
			}
			if v.Damaged == 0 {
				fmt.Fprintln(out, "no damage")
				continue
			}
			fmt.Fprintf(out, "%d damaged\n", v.Damaged)
			for _, f := range v.Findings {
				fmt.Fprintf(out, "  %s: LSN %d: %s\n", f.Where, f.LSN, f.What)
			}
			if v.NotRepaired != "" {
				fmt.Fprintf(out, "  not repaired: %s\n", v.NotRepaired)
			}
		}
	}
	if damaged > 0 {
		return fmt.Errorf("%w: %d findings", errDamage, damaged)
	}
	return nil
}
