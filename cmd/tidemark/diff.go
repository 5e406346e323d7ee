package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/restore/guestfs"
)

// fileDifference is one of the diff verb's JSON.
type fileDifference struct {
	Path string   `json:"path"`
	Only int      `json:"only,omitempty"` // 1 or 2: it is in that one alone
	What []string `json:"what,omitempty"`
}

func (a *app) diff() *cobra.Command {
	var f filesFlags
	cmd := &cobra.Command{
		Use:   "diff GROUP@POINT GROUP@POINT:/PATH",
		Short: "Show which files differ between two points",
		Long: `Show which files differ between two points, below a path. The first name may have a path of its own; without, it is the
second one's. Exit code 1 is an error; that files differ is none.`,
		Example: `  tidemark diff web01@before-upgrade web01@latest:/etc`,
		Args:    args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			second, err := parseFile(args[1], true)
			if err != nil {
				return usage(err)
			}
			name := args[0]
			if !strings.Contains(name, ":/") {
				name += ":" + second.path
			}
			all := []fileDifference{}
			err = a.withTree(cmd, name, f, func(ta *guestfs.Tree, pa string) error {
				return a.withTree(cmd, args[1], f, func(tb *guestfs.Tree, pb string) error {
					return guestfs.Diff(cmd.Context(), ta, pa, tb, pb, func(d guestfs.Difference) error {
						if a.json {
							all = append(all, fileDifference(d))
							return nil
						}
						return printDifference(cmd, d)
					})
				})
			})
			if err == nil && a.json {
				return printJSON(cmd, all)
			}
			return err
		},
	}
	f.add(cmd)
	f.addKeep(cmd)
	return cmd
}

func printDifference(cmd *cobra.Command, d guestfs.Difference) error {
	sign, more := "!", " ("+strings.Join(d.What, ", ")+")"
	switch d.Only {
	case 1:
		sign, more = "-", ""
	case 2:
		sign, more = "+", ""
	}
	_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s %s%s\n", sign, printable(d.Path), more)
	return err
}
