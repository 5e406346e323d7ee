package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/restore/guestfs"
)

// differing is one of the diff verb's JSON.
type differing struct {
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
			all := []differing{}
			err = a.withTree(cmd, name, f, func(ta *guestfs.Tree, pa string) error {
				return a.withTree(cmd, args[1], f, func(tb *guestfs.Tree, pb string) error {
					return guestfs.Diff(cmd.Context(), ta, pa, tb, pb, func(d guestfs.Difference) error {
						if a.json {
							all = append(all, differing(d))
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

// version is one of the versions verb's JSON.
type version struct {
	LSN     uint64    `json:"lsn"`
	Point   string    `json:"point"` // a marker's label, or latest
	Time    time.Time `json:"time,omitzero"`
	Missing bool      `json:"missing"` // there is no such file
	Mode    string    `json:"mode,omitempty"`
	Size    int64     `json:"size"`
	Changed time.Time `json:"changed,omitzero"` // as the file has it
}

func (a *app) versions() *cobra.Command {
	var f filesFlags
	var filter api.Filter
	cmd := &cobra.Command{
		Use:   "versions GROUP:/PATH",
		Short: "Show the markers at which a file is another than before",
		Long: `Show the markers at which a file is another than at the one before, by its content, mode, owner and type. What a file was between two
markers is not looked at.`,
		Example: `  tidemark versions web01:/etc/fstab --since -7d --kernel`,
		Args:    args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := parseFile(args[0], false)
			if err == nil && n.point != "" {
				err = errors.New("all points are looked at: GROUP:/PATH")
			}
			if err != nil {
				return usage(err)
			}
			all, err := a.findVersions(cmd, n, filter, f)
			if err != nil {
				return err
			}
			if a.json {
				return printJSON(cmd, all)
			}
			for _, v := range all {
				what := fmt.Sprintf("%s %d bytes, of %s", v.Mode, v.Size, v.Changed.Format(time.RFC3339))
				if v.Missing {
					what = "no such file"
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s@%s (LSN %d)\t%s\n", n.group, v.Point, v.LSN, what)
			}
			return nil
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&filter.Since, "since", "", "markers from this time on: RFC 3339, or -2h")
	cmd.Flags().StringVar(&filter.Until, "until", "", "markers up to this time")
	cmd.Flags().StringVar(&filter.Label, "label", "", "a pattern for the label: *, ? and [a-z]")
	return cmd
}

func (a *app) findVersions(cmd *cobra.Command, n fileName, filter api.Filter, f filesFlags) ([]version, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	points, err := c.Points(cmd.Context(), n.group, filter)
	if err != nil {
		return nil, err
	}
	at := []version{}
	for _, m := range points.Markers {
		at = append(at, version{LSN: m.LSN, Point: m.Label, Time: m.Time})
	}
	if filter.Until == "" && filter.Label == "" {
		at = append(at, version{LSN: points.Head, Point: "latest"})
	}
	found := []version{}
	last, first := "", true
	for _, v := range at {
		n.point = fmt.Sprintf("lsn:%d", v.LSN)
		print, err := a.versionAt(cmd, n, &v, f)
		if err != nil {
			return nil, fmt.Errorf("at %s (LSN %d): %w", v.Point, v.LSN, err)
		}
		if first || print != last {
			found = append(found, v)
		}
		last, first = print, false
	}
	return found, nil
}

func (a *app) versionAt(cmd *cobra.Command, n fileName, v *version, f filesFlags) (print string, err error) {
	m, err := a.moment(cmd, n.group, n.point, f)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, m.close()) }()
	t, path, err := m.tree(cmd, n)
	if err != nil {
		return "", err
	}
	print, info, err := t.Print(cmd.Context(), path)
	if err != nil {
		return "", err
	}
	if v.Missing = info == nil; !v.Missing {
		v.Mode, v.Size, v.Changed = info.Mode().String(), info.Size(), info.ModTime().UTC()
	}
	return print, nil
}
