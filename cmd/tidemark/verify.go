package main

import (
	"errors"
	"fmt"
	"io"
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
		Long: `Read every record of the groups (all by default), the index and its files, and
what the backings have of blocks that the journal knows, and compare them with
their checksums, and records and index with each other. Nothing is changed.
With --state-dir, the journal of a daemon that is not running is read, without
the backings.

With --repair, damaged records of the log and damaged content of originals are
fetched from other daemons that have the group, if they have them still, and
written again; and blocks of backings are written again as the journal has them,
whether they were damaged or somebody wrote them past the daemon.`,
		ValidArgsFunction: a.completeGroups,
		RunE: func(cmd *cobra.Command, groups []string) error {
			if repair && stateDir != "" {
				return usage(errors.New("--repair takes a running daemon"))
			}
			all, index, err := a.verifyAll(cmd, stateDir, repair, groups)
			if err != nil {
				return err
			}
			return a.printVerified(cmd, all, index)
		},
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "mend what is damaged, with what other daemons and the journal have")
	cmd.Flags().StringVar(&stateDir, "state-dir", "", "state directory of a daemon that is not running")
	return cmd
}

func (a *app) verifyAll(cmd *cobra.Command, stateDir string, repair bool, groups []string) (all []api.Verified, index api.VerifiedIndex, err error) {
	ctx := cmd.Context()
	if stateDir != "" {
		err = atRest(stateDir, groups, func(s *journal.Store) error {
			for _, g := range s.Groups() {
				v, err := api.VerifyGroup(ctx, g, journal.VerifyOptions{}, nil)
				if err != nil {
					return err
				}
				all = append(all, v)
			}
			index, err = api.VerifyIndex(ctx, s)
			return err
		})
		return all, index, err
	}
	c, groups, err := a.groups(cmd, groups)
	if err != nil {
		return nil, index, err
	}
	for _, g := range groups {
		v, err := c.Verify(ctx, g, repair)
		if err != nil {
			return nil, index, err
		}
		all = append(all, v)
	}
	index, err = c.VerifyIndex(ctx)
	return all, index, err
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
// and calls fn with the store that has the groups named, or all.
func atRest(stateDir string, groups []string, fn func(*journal.Store) error) error {
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
	return errors.Join(fn(s), s.Abandon())
}

func printFindings(out io.Writer, findings []api.Finding) {
	for _, f := range findings {
		fmt.Fprintf(out, "  %s: ", f.Where)
		if f.LSN > 0 {
			fmt.Fprintf(out, "LSN %d: ", f.LSN)
		}
		fmt.Fprintln(out, f.What)
	}
}

func (a *app) printVerified(cmd *cobra.Command, all []api.Verified, index api.VerifiedIndex) error {
	damaged := index.Damaged
	for _, v := range all {
		damaged += v.Damaged
	}
	if a.json {
		if err := printJSON(cmd, map[string]any{"groups": all, "index": index}); err != nil {
			return err
		}
	} else {
		out := cmd.OutOrStdout()
		for _, v := range all {
			fmt.Fprintf(out, "%s: %d records, %d originals, %s of payload, %d versions, %d blocks of backings: ", v.Group, v.Records, v.Originals, size(v.Bytes), v.Versions, v.Blocks)
			if v.Repaired > 0 {
				fmt.Fprintf(out, "%d repaired, ", v.Repaired)
			}
			if v.Damaged == 0 {
				fmt.Fprintln(out, "no damage")
				continue
			}
			fmt.Fprintf(out, "%d damaged\n", v.Damaged)
			printFindings(out, v.Findings)
			if v.NotRepaired != "" {
				fmt.Fprintf(out, "  not repaired: %s\n", v.NotRepaired)
			}
		}
	}
	if index.Damaged > 0 && !a.json {
		out := cmd.OutOrStdout()
		fmt.Fprintf(out, "the index: %d of %d files damaged: stop the daemon and remove the index; it is made again from the segments\n", index.Damaged, index.Files)
		printFindings(out, index.Findings)
	}
	if damaged > 0 {
		return fmt.Errorf("%w: %d findings", errDamage, damaged)
	}
	return nil
}
