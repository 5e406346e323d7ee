package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/guest"
)

func (a *app) definition() *cobra.Command {
	var name, identity string
	var disks []string
	cmd := &cobra.Command{
		Use:   "definition GROUP@POINT",
		Short: "Print what a guest was defined as at a point",
		Long: `Print what a guest was defined as at a point: its libvirt domain's XML, or the file that the
configuration names.

With --new-identity, a domain's XML is made that of a copy which can run beside the original: another name,
UUID, VM generation id and MAC addresses, and disks where --disk says.`,
		Example: `  tidemark definition web01@-2h
  tidemark definition web01@nightly --new-identity web01-test --disk vda=/images/test.raw | virsh define /dev/stdin`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			group, point, ok := strings.Cut(args[0], "@")
			if !ok || group == "" || point == "" {
				return usage(fmt.Errorf("%q: expected GROUP@POINT, as web01@latest", args[0]))
			}
			id, err := parseIdentity(cmd.Flags().Changed("new-identity"), identity, disks)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			all, err := c.Definitions(cmd.Context(), group, point)
			if err != nil {
				return err
			}
			if a.json {
				if id != nil {
					return usage(errors.New("--json shows what was journaled: it does not go with --new-identity"))
				}
				return printJSON(cmd, all)
			}
			d, err := choose(all, name)
			if err != nil {
				return err
			}
			return printDefinition(cmd, d.Content, id)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&name, "name", "", "which one, if the group has several")
	fl.StringVar(&identity, "new-identity", "", "make it a copy's, of this name")
	fl.StringArrayVar(&disks, "disk", nil, "where the copy's disk is, TARGET=FILE as vda=/images/copy.raw; TARGET= leaves it out; repeatable")
	return cmd
}

func parseIdentity(wanted bool, name string, disks []string) (*guest.Identity, error) {
	if !wanted {
		if len(disks) > 0 {
			return nil, usage(fmt.Errorf("--disk goes with --new-identity"))
		}
		return nil, nil
	}
	id := guest.Identity{Name: name, Disks: map[string]string{}}
	for _, d := range disks {
		target, path, ok := strings.Cut(d, "=")
		if !ok || target == "" {
			return nil, usage(fmt.Errorf("--disk %q: expected TARGET=FILE", d))
		}
		id.Disks[target] = path
	}
	return &id, nil
}

// choose finds the definition of a name, or the only one there is.
func choose(all api.Definitions, name string) (api.Definition, error) {
	var names []string
	for _, d := range all.Definitions {
		if d.Name == name || name == "" && len(all.Definitions) == 1 {
			return d, nil
		}
		names = append(names, d.Name)
	}
	where := fmt.Sprintf("group %s at %s (LSN %d)", all.Group, all.Point, all.LSN)
	switch {
	case len(names) == 0:
		return api.Definition{}, &api.Error{Code: api.CodeNotFound, Message: where + " has no definition: configure groups." + all.Group + ".definitions, or a guest with libvirt"}
	case name == "":
		return api.Definition{}, usage(fmt.Errorf("%s has several definitions: choose one with --name: %s", where, strings.Join(names, ", ")))
	}
	return api.Definition{}, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("%s has no definition %q, but %s", where, name, strings.Join(names, ", "))}
}

func printDefinition(cmd *cobra.Command, content []byte, id *guest.Identity) error {
	if id != nil {
		var left []string
		var err error
		if content, left, err = guest.NewIdentity(content, *id); errors.Is(err, guest.ErrIdentity) {
			return usage(err)
		} else if err != nil {
			return err
		}
		for _, l := range left {
			fmt.Fprintf(cmd.ErrOrStderr(), "tidemark: left out: %s\n", l)
		}
	}
	_, err := cmd.OutOrStdout().Write(content)
	return err
}
