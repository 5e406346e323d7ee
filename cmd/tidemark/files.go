package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/restore/guestfs"
)

// filesFlags are those of the verbs that read files.
type filesFlags struct {
	kernel bool
	nbd    string
	keep   time.Duration
}

func (f *filesFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&f.kernel, "kernel", false, "read with the host's kernel: fast, takes root, and a guest that is trusted")
	cmd.Flags().StringVar(&f.nbd, "nbd", "", "the daemon's NBD socket, unix:PATH or tcp:HOST:PORT; asked of the daemon by default")
}

// keepFor is how long a VM that shows files is kept for the next command, unless the user says otherwise.
const keepFor = time.Minute

// addKeep adds the flag of those whose VM may serve the next command.
func (f *filesFlags) addKeep(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&f.keep, "keep", keepFor, "how long the VM that reads is kept for the next command about the same moment; 0: one for this command alone")
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

// tree is the files that a name is about, which the caller closes, and the path of the one in it.
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
		fmt.Fprintf(cmd.ErrOrStderr(), "tidemark: %s\n", plain(p.Error()))
	}
	if err != nil {
		return nil, "", err
	}
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

// withTree calls fn with the files that a name is about. When the command is broken off, so is a read that hangs.
func (a *app) withTree(cmd *cobra.Command, name string, f filesFlags, fn func(t *guestfs.Tree, path string) error) (err error) {
	n, err := parseFile(name, true)
	if err != nil {
		return usage(err)
	}
	if f.keep < 0 {
		return usage(errors.New("--keep: expected a time, as 5m, or 0"))
	}
	s, err := a.momentSource(cmd, n.group, f)
	if err != nil {
		return err
	}
	lsn, err := s.resolve(cmd.Context(), n.point)
	if err != nil {
		return err
	}
	m, err := s.open(cmd.Context(), lsn)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	defer context.AfterFunc(cmd.Context(), m.Break)()
	t, path, err := m.tree(cmd, n)
	if err != nil {
		return err
	}
	return errors.Join(fn(t, path), t.Close())
}
