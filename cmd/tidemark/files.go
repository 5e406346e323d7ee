package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/nbd/client"
	"github.com/tidemark-cdp/tidemark/restore/guestfs"
	"github.com/tidemark-cdp/tidemark/restore/mount"
)

// diskTimeout bounds each read of a disk: what waits for it may wait in the kernel.
const diskTimeout = 60 * time.Second

// filesFlags are those of the verbs that read files.
type filesFlags struct {
	kernel bool
	nbd    string
}

func (f *filesFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.kernel, "kernel", false, "read with the host's kernel: fast, takes root, and a guest that is trusted")
	cmd.Flags().StringVar(&f.nbd, "nbd", "", "the daemon's NBD socket, unix:PATH or tcp:HOST:PORT; asked of the daemon by default")
}

// fileName is GROUP@POINT:/PATH, a guest's file, or GROUP/VOLUME@POINT:/PATH, one of a disk, partition or logical volume.
type fileName struct {
	group, volume string
	point         string
	path          string
}

// parseFile reads a file's name. Times have colons too: the path begins at the first one that a slash follows.
func parseFile(s string, needPoint bool) (n fileName, err error) {
	name, p, ok := strings.Cut(s, ":/")
	if !ok {
		return n, fmt.Errorf("%q: expected GROUP@POINT:/PATH, as web01@-1h:/etc/fstab", s)
	}
	n.path = "/" + p
	name, n.point, ok = strings.Cut(name, "@")
	if needPoint && (!ok || n.point == "") {
		return n, fmt.Errorf("%q names no point: GROUP@POINT:/PATH, as web01@-1h:/etc/fstab", s)
	}
	n.group, n.volume, _ = strings.Cut(name, "/")
	return n, record.CheckName(n.group)
}

// moment is a group's file systems at a point.
type moment struct {
	lsn    uint64
	layout guestfs.Layout
	opened guestfs.Opened
	stop   []func() error // in the order in which they were begun
}

func (m *moment) close() error {
	var errs []error
	for i := len(m.stop) - 1; i >= 0; i-- {
		errs = append(errs, m.stop[i]())
	}
	return errors.Join(errs...)
}

// moment opens the file systems of a group at a point.
func (a *app) moment(cmd *cobra.Command, group, point string, f filesFlags) (m *moment, err error) {
	p, err := record.ParsePoint(point)
	if err != nil {
		return nil, usage(err)
	}
	r := &restoring{app: a, cmd: cmd, f: restoreFlags{nbd: f.nbd}, name: record.ExportName{Group: group, Point: p}}
	if err := r.connect(); err != nil {
		return nil, err
	}
	g, err := r.groupStatus()
	if err != nil {
		return nil, err
	}
	resolved, err := r.client.Resolve(cmd.Context(), group, p.String())
	if err != nil {
		return nil, err
	}
	r.lsn = resolved.LSN
	m = &moment{lsn: r.lsn}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.close())
			m = nil
		}
	}()
	dir, err := os.MkdirTemp("", "tidemark")
	if err != nil {
		return m, err
	}
	m.stop = append(m.stop, func() error { return os.RemoveAll(dir) })
	disks, err := m.disks(cmd.Context(), r)
	if err != nil {
		return m, err
	}
	return m, m.open(cmd.Context(), disks, dir, f.kernel || g.Trusted && os.Geteuid() == 0)
}

// disks connects to the group's disks as they were.
func (m *moment) disks(ctx context.Context, r *restoring) (map[string]guestfs.Disk, error) {
	names, err := r.disksAt()
	if err != nil {
		return nil, err
	}
	disks := map[string]guestfs.Disk{}
	for _, name := range names {
		n := record.ExportName{Group: r.name.Group, Disk: name, Point: record.Point{Form: record.FormLSN, LSN: record.LSN(r.lsn)}}
		c, err := client.Dial(ctx, r.network, r.addr, n.String(), nil)
		if err != nil {
			return nil, err
		}
		c.SetTimeout(diskTimeout)
		m.stop = append(m.stop, c.Close)
		disks[name] = c
	}
	return disks, nil
}

func (m *moment) open(ctx context.Context, disks map[string]guestfs.Disk, dir string, kernel bool) (err error) {
	if m.layout, err = guestfs.Read(disks); err != nil {
		return err
	}
	var devices []*guestfs.Device
	for _, v := range m.layout.Volumes {
		if !v.FS.Readable() {
			continue
		}
		d, err := guestfs.NewDevice(v, disks, dir)
		if err != nil {
			return err
		}
		m.stop = append(m.stop, d.Close)
		devices = append(devices, d)
	}
	way, err := m.way(dir, kernel)
	if err != nil {
		return err
	}
	if m.opened, err = way.Open(ctx, devices); err != nil {
		return err
	}
	m.stop = append(m.stop, m.opened.Close)
	return nil
}

// way is how file systems are read.
func (m *moment) way(dir string, kernel bool) (guestfs.Way, error) {
	if !kernel {
		return &guestfs.Isolated{Dir: dir, Log: zap.NewNop()}, nil
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("--kernel takes root: it mounts")
	}
	at := filepath.Join(dir, "disks")
	if err := os.Mkdir(at, 0o700); err != nil {
		return nil, err
	}
	d, err := mount.ServeDevices(at)
	if err != nil {
		return nil, err
	}
	m.stop = append(m.stop, d.Close)
	return &guestfs.Kernel{Attach: d.Add, Dir: dir}, nil
}

// tree is the files that a name is about, and the path of the one in it.
func (m *moment) tree(cmd *cobra.Command, n fileName) (t *guestfs.Tree, path string, err error) {
	var problems []error
	path = n.path
	if n.volume == "" {
		t, problems, err = guestfs.GuestTree(cmd.Context(), m.opened, m.layout)
		problems = append(m.layout.Problems, problems...)
	} else {
		var volume string
		if volume, path, err = m.volume(n); err == nil {
			t, err = guestfs.VolumeTree(cmd.Context(), m.opened, volume)
		}
	}
	for _, p := range problems {
		fmt.Fprintf(cmd.ErrOrStderr(), "tidemark: %v\n", p)
	}
	if err != nil {
		return nil, "", err
	}
	m.stop = append(m.stop, t.Close)
	return t, path, nil
}

// volume finds the volume of a name: the disk or volume itself, or one below it by the first part of the path.
func (m *moment) volume(n fileName) (volume, path string, err error) {
	var names []string
	first, rest, _ := strings.Cut(strings.TrimPrefix(n.path, "/"), "/")
	for _, v := range m.layout.Volumes {
		if !v.FS.Readable() {
			continue
		}
		switch v.Name {
		case n.volume:
			return v.Name, n.path, nil
		case n.volume + "/" + first:
			return v.Name, "/" + rest, nil
		}
		names = append(names, v.Name)
	}
	return "", "", &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("volume %s: not found: there are %s (%s are shown; a disk as a whole by tidemark restore)",
		filepath.Join(n.volume, first), strings.Join(names, ", "), guestfs.Supported)}
}

// withTree calls fn with the files that a name is about.
func (a *app) withTree(cmd *cobra.Command, name string, f filesFlags, fn func(t *guestfs.Tree, path string) error) error {
	n, err := parseFile(name, true)
	if err != nil {
		return usage(err)
	}
	m, err := a.moment(cmd, n.group, n.point, f)
	if err != nil {
		return err
	}
	t, path, err := m.tree(cmd, n)
	if err == nil {
		err = fn(t, path)
	}
	return errors.Join(err, m.close())
}
