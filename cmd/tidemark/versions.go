package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/nbd"
	"github.com/tidemark-cdp/tidemark/nbd/client"
	"github.com/tidemark-cdp/tidemark/restore/guestfs"
)

// batch is how many moments one VM has at most.
const batch = 16

// fileVersion is one of the versions verb's JSON.
type fileVersion struct {
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

func (a *app) findVersions(cmd *cobra.Command, n fileName, filter api.Filter, f filesFlags) ([]fileVersion, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	points, err := c.Points(cmd.Context(), n.group, filter)
	if err != nil {
		return nil, err
	}
	at := []fileVersion{}
	for _, m := range points.Markers {
		at = append(at, fileVersion{LSN: m.LSN, Point: m.Label, Time: m.Time})
	}
	if filter.Until == "" && filter.Label == "" {
		at = append(at, fileVersion{LSN: points.Head, Point: "latest"})
	}
	s, err := a.momentSource(cmd, n.group, f)
	if err != nil {
		return nil, err
	}
	if at, err = s.dropUnchanged(cmd.Context(), at); err != nil {
		return nil, err
	}
	found := []fileVersion{}
	last := ""
	for i := 0; i < len(at); {
		moments, err := s.openSome(cmd.Context(), at[i:])
		if err != nil {
			return nil, fmt.Errorf("at %s (LSN %d): %w", at[i].Point, at[i].LSN, err)
		}
		for k, m := range moments.all {
			v := at[i+k]
			print, err := a.versionAt(cmd, m, n, &v)
			if err != nil {
				return nil, errors.Join(fmt.Errorf("at %s (LSN %d): %w", v.Point, v.LSN, err), moments.close())
			}
			if i+k == 0 || print != last {
				found = append(found, v)
			}
			last = print
		}
		i += len(moments.all)
		if err := moments.close(); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// dropUnchanged leaves out the points at which no disk differs from what it was at the one before.
func (s *momentSource) dropUnchanged(ctx context.Context, at []fileVersion) (some []fileVersion, err error) {
	status, err := s.client.Status(ctx)
	if err != nil {
		return nil, err
	}
	var before map[string]string
	var last uint64
	for _, v := range at {
		if len(some) > 0 && v.LSN == last {
			continue
		}
		exports, err := s.exportsOf(status, v.LSN)
		if err != nil {
			return nil, fmt.Errorf("at %s (LSN %d): %w", v.Point, v.LSN, err)
		}
		changed := len(exports) != len(before)
		for name, export := range exports {
			if changed {
				break
			}
			if _, ok := before[name]; !ok {
				changed = true
			} else if changed, err = s.changed(ctx, export, last); err != nil {
				return nil, fmt.Errorf("at %s (LSN %d): %w", v.Point, v.LSN, err)
			}
		}
		if changed {
			some = append(some, v)
		}
		before, last = exports, v.LSN
	}
	return some, nil
}

// changed reports whether a disk of the past may differ from what it was at an older LSN.
func (s *momentSource) changed(ctx context.Context, export string, since uint64) (changed bool, err error) {
	name := fmt.Sprintf("%slsn:%d", api.ChangedSince, since)
	c, err := client.Dial(ctx, s.network, s.addr, export, nil, name)
	if err != nil {
		return false, err
	}
	defer c.Close()
	c.SetTimeout(diskTimeout)
	const step = 1 << 30
	for off := int64(0); off < c.Size() && !changed && err == nil; off += step {
		err = c.Status(name, off, min(step, c.Size()-off), func(_ int64, flags uint32) { changed = changed || flags&1 != 0 })
	}
	return changed, err
}

// moments are several, which may share a VM.
type moments struct {
	all  []*moment
	stop stops
}

func (m *moments) close() error { return m.stop.run() }

// openSome opens the first of some points, or, where a VM of its own shows the files, as many as it can have: its start is what takes time.
func (s *momentSource) openSome(ctx context.Context, at []fileVersion) (some *moments, err error) {
	some = &moments{}
	if s.kernel {
		m, err := s.open(ctx, at[0].LSN)
		if err != nil {
			return nil, err
		}
		some.all = []*moment{m}
		some.stop.add(m.Close)
		return some, nil
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, some.close())
			some = nil
		}
	}()
	whose := map[string]*moment{}
	original := map[string]guestfs.Volume{}
	var volumes []guestfs.Volume
	for _, v := range at[:min(len(at), batch)] {
		m, err := s.look(ctx, v.LSN)
		if err != nil {
			return some, err
		}
		if len(some.all) > 0 && (!m.sharesVM() || !some.all[0].sharesVM() || len(volumes)+len(m.layout.Volumes) > guestfs.MaxDrives) {
			if err := m.Close(); err != nil {
				return some, err
			}
			break
		}
		some.all = append(some.all, m)
		some.stop.add(m.Close)
		for _, v := range m.layout.Volumes {
			name := m.inVM(v.Name)
			whose[name], original[name] = m, v
			v.Name = name
			volumes = append(volumes, v)
		}
	}
	way := &guestfs.Isolated{Dir: some.all[0].dir, Log: zap.NewNop(), Device: func(v guestfs.Volume) (nbd.Device, error) {
		return whose[v.Name].device(original[v.Name])
	}}
	opened, err := way.Open(ctx, volumes)
	if err != nil {
		return some, err
	}
	some.stop.add(opened.Close)
	for _, m := range some.all {
		m.opened = oneOf{opened, m}
	}
	return some, nil
}

// sharesVM reports whether a VM may have a moment's volumes beside another's. A kernel takes two Btrfs of one identity for one.
func (m *moment) sharesVM() bool {
	for _, v := range m.layout.Volumes {
		if v.FS.Type == guestfs.TypeBtrfs {
			return false
		}
	}
	return true
}

// inVM is what a moment's volume is called among those of several.
func (m *moment) inVM(volume string) string { return fmt.Sprintf("%d:%s", m.lsn, volume) }

// oneOf is the volumes of one moment among those of several.
type oneOf struct {
	guestfs.Opened
	m *moment
}

func (o oneOf) Dir(ctx context.Context, volume string) (string, error) {
	return o.Opened.Dir(ctx, o.m.inVM(volume))
}

func (a *app) versionAt(cmd *cobra.Command, m *moment, n fileName, v *fileVersion) (print string, err error) {
	defer context.AfterFunc(cmd.Context(), m.Break)()
	t, path, err := m.tree(cmd, n)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	print, info, err := t.Fingerprint(cmd.Context(), path)
	if err != nil {
		return "", err
	}
	if v.Missing = info == nil; !v.Missing {
		v.Mode, v.Size, v.Changed = info.Mode().String(), info.Size(), info.ModTime().UTC()
	}
	return print, nil
}
