package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/restore/mount"
)

// mountedAt is the mount verb's JSON.
type mountedAt struct {
	Group string `json:"group"`
	Dir   string `json:"dir"`
	Point string `json:"point,omitempty"`
	LSN   uint64 `json:"lsn,omitempty"`
}

func (a *app) mount() *cobra.Command {
	var f filesFlags
	var o mount.Options
	cmd := &cobra.Command{
		Use:   "mount GROUP[@POINT] DIR",
		Short: "Show a guest's files, at all points or at one, as a directory",
		Long: `Show a guest's files as they were in a directory, read-only, until the command is ended or the directory unmounted.

DIR/at has a directory for each marker, and one for every other point that is named: DIR/at/2026-11-21T10:15:00Z, DIR/at/-15m. Below it
stands a directory for each disk, with the disk itself (disk.raw) and one for each partition (p1) or, without partitions, "files";
and one for each group of logical volumes. With GROUP@POINT these stand in DIR itself.

The file systems are opened in a small VM of their own (libguestfs) when they are first entered, or by the host's kernel with --kernel.
It takes fusermount3, not root.`,
		Example: `  tidemark mount web01 /mnt/web01 &
  cp /mnt/web01/at/-15m/vda/p1/etc/fstab .
  fusermount3 -u /mnt/web01`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			out := mountedAt{}
			out.Group, out.Point, _ = strings.Cut(args[0], "@")
			err := record.CheckName(out.Group)
			if err == nil && out.Point == "" && strings.Contains(args[0], "@") {
				err = fmt.Errorf("%q names no point", args[0])
			}
			if err == nil && o.Idle <= 0 {
				err = errors.New("--idle: expected a time, as 5m")
			}
			if err != nil {
				return usage(err)
			}
			if out.Dir, err = filepath.Abs(args[1]); err != nil {
				return err
			}
			return a.runMount(cmd, out, f, o)
		},
	}
	f.add(cmd)
	cmd.Flags().DurationVar(&o.Idle, "idle", mount.DefaultIdle, "how long what shows the files of a moment is kept after its last use")
	cmd.Flags().BoolVar(&o.AllowOther, "allow-other", false, "let other users in, by the permissions that the files have")
	return cmd
}

func (a *app) runMount(cmd *cobra.Command, out mountedAt, f filesFlags, o mount.Options) error {
	if info, err := os.Stat(out.Dir); err != nil {
		return err
	} else if !info.IsDir() {
		return usage(fmt.Errorf("%s is no directory", out.Dir))
	}
	s, err := a.momentSource(cmd, out.Group, f)
	if err != nil {
		return err
	}
	var src mount.Source = &mountSource{s: s}
	if out.Point != "" {
		if out.LSN, err = s.resolve(cmd.Context(), out.Point); err != nil {
			return err
		}
		// The disks are open from now on: the point does not expire.
		m, err := s.look(cmd.Context(), out.LSN)
		if err != nil {
			return err
		}
		o.LSN = out.LSN
		defer func() { _ = m.Close() }()
	}
	var mu sync.Mutex
	last := ""
	o.Problem = func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if line := plain(err.Error()); line != last { // a program that tries again and again
			last = line
			fmt.Fprintf(cmd.ErrOrStderr(), "tidemark: %s\n", line)
		}
	}
	m, err := mount.Mount(out.Dir, src, o)
	if err != nil {
		return err
	}
	gone := make(chan struct{})
	go func() {
		m.Wait()
		close(gone)
	}()
	if a.json {
		err = printJSON(cmd, out)
	} else {
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is mounted on %s\n", out.Group, out.Dir)
	}
	if err == nil {
		select {
		case <-cmd.Context().Done():
		case <-gone:
		}
	}
	return errors.Join(err, m.Close())
}

// mountSource is a group as a mount wants it.
type mountSource struct{ s *momentSource }

// Points implements mount.Source: the markers, and the head.
func (m *mountSource) Points(ctx context.Context) ([]mount.Point, error) {
	p, err := m.s.client.Points(ctx, m.s.group, api.Filter{})
	if err != nil {
		return nil, err
	}
	all := []mount.Point{{Name: "latest", LSN: p.Head, Time: time.Now()}}
	for _, k := range p.Markers {
		all = append(all, mount.Point{Name: k.Label, LSN: k.LSN, Time: k.Time})
	}
	return all, nil
}

// Resolve implements mount.Source.
func (m *mountSource) Resolve(ctx context.Context, name string) (lsn uint64, moves bool, err error) {
	p, err := record.ParsePoint(name)
	if err != nil {
		return 0, false, fmt.Errorf("%w: %w", mount.ErrNoMoment, err)
	}
	r, err := m.s.client.Resolve(ctx, m.s.group, p.String())
	var e *api.Error
	if errors.As(err, &e) && (e.Code == api.CodeNoPoint || e.Code == api.CodeNotFound || e.Code == api.CodeBadRequest) {
		err = fmt.Errorf("%w: %w", mount.ErrNoMoment, err)
	}
	return r.LSN, p.Form == record.FormLatest || p.Form == record.FormAgo, err
}

// Open implements mount.Source.
func (m *mountSource) Open(ctx context.Context, lsn uint64) (mount.Moment, error) {
	o, err := m.s.open(ctx, lsn)
	if err != nil {
		return nil, err
	}
	return o, nil
}
