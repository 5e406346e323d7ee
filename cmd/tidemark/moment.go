package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/nbd"
	"github.com/tidemark-cdp/tidemark/nbd/client"
	"github.com/tidemark-cdp/tidemark/restore/guestfs"
	"github.com/tidemark-cdp/tidemark/restore/mount"
)

// diskTimeout bounds each read of a disk: what waits for it may wait in the kernel.
const diskTimeout = 60 * time.Second

// stops are what undoes what was done, in the order in which it was done.
type stops []func() error

func (s *stops) add(fn func() error) { *s = append(*s, fn) }

// run undoes it, the last first.
func (s *stops) run() error {
	var errs []error
	for i := len(*s) - 1; i >= 0; i-- {
		errs = append(errs, (*s)[i]())
	}
	*s = nil
	return errors.Join(errs...)
}

// momentSource opens a group's file systems as they were.
type momentSource struct {
	client  *api.Client
	group   string
	network string // of the daemon's NBD server
	addr    string
	kernel  bool          // by the host's kernel
	keep    time.Duration // how long a VM is kept for the next command
	warn    func(error)
}

func (a *app) momentSource(cmd *cobra.Command, group string, f filesFlags) (*momentSource, error) {
	r := &restoring{app: a, cmd: cmd, f: restoreFlags{nbd: f.nbd}, name: record.ExportName{Group: group}}
	if err := r.connect(); err != nil {
		return nil, err
	}
	g, err := r.groupStatus()
	if err != nil {
		return nil, err
	}
	if f.kernel && os.Geteuid() != 0 {
		return nil, errors.New("--kernel takes root: it mounts")
	}
	if r.network == "unix" { // for processes that stand elsewhere
		if r.addr, err = filepath.Abs(r.addr); err != nil {
			return nil, err
		}
	}
	warn := func(err error) { fmt.Fprintf(cmd.ErrOrStderr(), "tidemark: %s\n", plain(err.Error())) }
	return &momentSource{client: r.client, group: group, network: r.network, addr: r.addr, warn: warn, kernel: f.kernel || g.Trusted && os.Geteuid() == 0, keep: f.keep}, nil
}

// resolve finds the LSN of a point.
func (s *momentSource) resolve(ctx context.Context, point string) (uint64, error) {
	p, err := record.ParsePoint(point)
	if err != nil {
		return 0, usage(err)
	}
	r, err := s.client.Resolve(ctx, s.group, p.String())
	return r.LSN, err
}

// moment is a group's file systems at a point.
type moment struct {
	place
	lsn    uint64 // 0 in a keeper
	dir    string // for what it needs in files; removed with it
	disks  map[string]*client.Client
	layout guestfs.Layout
	opened guestfs.Opened
	shower *shower // nil: a VM shows the files
	stop   stops
}

// look finds the volumes of an LSN. Nothing of them is shown yet.
func (s *momentSource) look(ctx context.Context, lsn uint64) (*moment, error) {
	status, err := s.client.Status(ctx)
	if err != nil {
		return nil, err
	}
	exports, err := s.exportsOf(status, lsn)
	if err != nil {
		return nil, err
	}
	m, err := look(ctx, place{status.Store, s.network, s.addr, exports}, func() (string, error) { return os.MkdirTemp("", "tidemark") })
	if err != nil {
		return nil, err
	}
	m.lsn = lsn
	return m, nil
}

// place is where the disks of a moment are read.
type place struct {
	Store         string            `json:",omitempty"` // the state directory's identity
	Network, Addr string            `json:",omitempty"`
	Exports       map[string]string `json:",omitempty"` // NBD names, by disk
}

// look finds the volumes at a place. What it needs in files is in a directory that mkdir makes, and that is removed.
func look(ctx context.Context, p place, mkdir func() (string, error)) (m *moment, err error) {
	m = &moment{place: p}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.stop.run())
			m = nil
		}
	}()
	if m.dir, err = mkdir(); err != nil {
		return m, err
	}
	m.stop.add(func() error { return os.RemoveAll(m.dir) })
	if m.disks, err = dialDisks(ctx, p, &m.stop); err != nil {
		return m, err
	}
	m.layout, err = guestfs.Read(asDisks(m.disks))
	return m, err
}

// open opens the file systems of an LSN.
func (s *momentSource) open(ctx context.Context, lsn uint64) (m *moment, err error) {
	if m, err = s.look(ctx, lsn); err != nil {
		return nil, err
	}
	way, err := s.way(m)
	if err == nil {
		m.opened, err = way.Open(ctx, m.layout.Volumes)
	}
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	m.stop.add(m.opened.Close)
	return m, nil
}

// way is how the file systems of a moment are shown.
func (s *momentSource) way(m *moment) (guestfs.Way, error) {
	switch {
	case s.kernel:
	case s.keep > 0:
		return &keptWay{m.place, s.keep, m.isolated(), s.warn}, nil
	default:
		return m.isolated(), nil
	}
	shower, err := startShower(m.place, m.dir)
	if err != nil {
		return nil, err
	}
	m.shower = shower
	m.stop.add(shower.stop)
	return &guestfs.Kernel{Attach: shower.attach, Dir: m.dir}, nil
}

// isolated is the way by a VM of this process's own.
func (m *moment) isolated() *guestfs.Isolated {
	return &guestfs.Isolated{Device: m.device, Dir: m.dir, Log: zap.NewNop()}
}

func (m *moment) device(v guestfs.Volume) (nbd.Device, error) {
	return guestfs.NewDevice(v, asDisks(m.disks), m.dir)
}

// exportsOf are the NBD names of the disks that the group had at an LSN, by the disks' names.
func (s *momentSource) exportsOf(status api.Status, lsn uint64) (map[string]string, error) {
	names, err := disksAt(status, s.group, lsn)
	if err != nil {
		return nil, err
	}
	exports := map[string]string{}
	for _, name := range names {
		exports[name] = record.ExportName{Group: s.group, Disk: name, Point: record.Point{Form: record.FormLSN, LSN: record.LSN(lsn)}}.String()
	}
	return exports, nil
}

// dialDisks connects to the disks.
func dialDisks(ctx context.Context, p place, stop *stops) (map[string]*client.Client, error) {
	disks := map[string]*client.Client{}
	for name, export := range p.Exports {
		c, err := client.Dial(ctx, p.Network, p.Addr, export, nil)
		if err != nil {
			return nil, err
		}
		c.SetTimeout(diskTimeout)
		stop.add(c.Close)
		disks[name] = c
	}
	return disks, nil
}

func asDisks(clients map[string]*client.Client) map[string]guestfs.Disk {
	disks := map[string]guestfs.Disk{}
	for name, c := range clients {
		disks[name] = c
	}
	return disks
}

// Disks implements mount.Moment.
func (m *moment) Disks() map[string]mount.Disk {
	disks := map[string]mount.Disk{}
	for name, c := range m.disks {
		disks[name] = c
	}
	return disks
}

// Volumes implements mount.Moment.
func (m *moment) Volumes() (names []string) {
	for _, v := range m.layout.Volumes {
		if v.FS.Readable() {
			names = append(names, v.Name)
		}
	}
	return names
}

// Numbered implements mount.Moment.
func (m *moment) Numbered(volume string) bool {
	return slices.ContainsFunc(m.layout.Volumes, func(v guestfs.Volume) bool { return v.Name == volume && v.FS.Numbered() })
}

// Notes implements mount.Moment.
func (m *moment) Notes() string {
	var b strings.Builder
	for _, err := range m.layout.Problems {
		fmt.Fprintln(&b, plain(err.Error()))
	}
	for _, v := range m.layout.Volumes {
		if !v.FS.Readable() && !m.layout.Divided(v) {
			fmt.Fprintln(&b, plain(v.Unsupported().Error()))
		}
	}
	return b.String()
}

// Dir implements mount.Moment.
func (m *moment) Dir(ctx context.Context, volume string) (string, error) {
	return m.opened.Dir(ctx, volume)
}

// Err is why the moment is of no use any more: the daemon is gone, or what shows the files.
func (m *moment) Err() error {
	for _, c := range m.disks {
		if err := c.Err(); err != nil {
			return err
		}
	}
	if m.shower != nil {
		if err := m.shower.Err(); err != nil {
			return err
		}
	}
	return m.opened.Err()
}

// Break has what waits for the files or the disks get errors, now and from now on.
func (m *moment) Break() {
	for _, c := range m.disks {
		c.Break(guestfs.ErrEnded)
	}
	m.opened.Break()
	if m.shower != nil {
		m.shower.kill()
	}
}

// Close undoes everything.
func (m *moment) Close() error { return m.stop.run() }
