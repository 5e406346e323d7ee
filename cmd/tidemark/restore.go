package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/config"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/nbd/client"
	"github.com/tidemark-cdp/tidemark/restore"
)

type restoreFlags struct {
	to, format, nbd string
	force           bool
}

// restored is the verb's JSON.
type restored struct {
	Group   string  `json:"group"`
	Disk    string  `json:"disk"`
	LSN     uint64  `json:"lsn"`
	To      string  `json:"to"`
	Format  string  `json:"format"`
	Size    int64   `json:"size"`
	Seconds float64 `json:"seconds"`
}

func (a *app) restore() *cobra.Command {
	var f restoreFlags
	cmd := &cobra.Command{
		Use:   "restore GROUP/DISK@POINT --to FILE",
		Short: "Write a disk, as it was at a point, to an image",
		Example: `  tidemark restore web01/vda@before-upgrade --to vda.raw
  tidemark restore web01/vda@-15m --to vda.qcow2 --format qcow2`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.runRestore(cmd, args[0], f)
		},
	}
	cmd.Flags().StringVar(&f.to, "to", "", "the image to write")
	cmd.Flags().StringVar(&f.format, "format", "raw", "raw, or qcow2 by way of qemu-img")
	cmd.Flags().StringVar(&f.nbd, "nbd", "", "the daemon's NBD socket, unix:PATH or tcp:HOST:PORT; asked of the daemon by default")
	cmd.Flags().BoolVar(&f.force, "force", false, "replace an existing file")
	return cmd
}

func (a *app) runRestore(cmd *cobra.Command, arg string, f restoreFlags) error {
	name, err := record.ParseExportName(arg)
	if err == nil && name.Live {
		err = fmt.Errorf("%s names no point: add @latest, @LABEL, @TIME or @lsn:N", arg)
	}
	if err == nil && f.to == "" {
		err = errors.New("--to is missing")
	}
	if err == nil && f.to == "-" {
		err = errors.New("--to -: an image is written to a file; to read it as a stream, use an NBD client on " + name.String())
	}
	if err == nil && f.format != "raw" && f.format != "qcow2" {
		err = fmt.Errorf("--format %q: raw or qcow2", f.format)
	}
	if err != nil {
		return usage(err)
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	ctx := cmd.Context()
	s, err := c.Status(ctx)
	if err != nil {
		return err
	}
	if err := checkTarget(s, name, f.to); err != nil {
		return err
	}
	// A point may move while the image is written; its LSN does not.
	r, err := c.Resolve(ctx, name.Group, name.Point.String())
	if err != nil {
		return err
	}
	name.Point = record.Point{Form: record.FormLSN, LSN: record.LSN(r.LSN)}
	addr := f.nbd
	if addr == "" {
		if addr, err = nbdAddr(s); err != nil {
			return err
		}
	}
	began := time.Now()
	out := restored{Group: name.Group, Disk: name.Disk, LSN: r.LSN, To: f.to, Format: f.format}
	if out.Size, err = restoreFrom(ctx, addr, name, f); err != nil {
		return err
	}
	out.Seconds = time.Since(began).Seconds()
	if a.json {
		return printJSON(cmd, out)
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s as of LSN %d is in %s (%s in %.1f s)\n",
		name.Group+"/"+name.Disk, out.LSN, f.to, size(out.Size), out.Seconds)
	return err
}

// checkTarget refuses a disk that is not there, and a target that the daemon serves: it would go on with
// the file that it has open, and what guests write would be lost.
func checkTarget(s api.Status, name record.ExportName, to string) error {
	target, err := os.Stat(to)
	if err != nil {
		target = nil
	}
	found := true // of a group that is not there, the daemon says so
	for _, g := range s.Groups {
		if g.Name == name.Group {
			found = slices.ContainsFunc(g.Disks, func(d api.Disk) bool { return d.Name == name.Disk })
		}
		for _, d := range g.Disks {
			if info, err := os.Stat(d.Backing); err == nil && target != nil && os.SameFile(info, target) {
				return fmt.Errorf("%s is the backing of %s/%s, which the daemon serves: restore to another file (docs/operating.md, \"Bringing a disk back\")", to, g.Name, d.Name)
			}
		}
	}
	if !found {
		return &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("disk %q of group %s: not found", name.Disk, name.Group)}
	}
	return nil
}

// nbdAddr is where the daemon serves NBD, a local socket if there is one.
func nbdAddr(s api.Status) (string, error) {
	for _, n := range s.NBD {
		if strings.HasPrefix(n, "unix:") {
			return n, nil
		}
	}
	if len(s.NBD) == 0 {
		return "", errors.New("the daemon serves no NBD socket")
	}
	return s.NBD[0], nil
}

func restoreFrom(ctx context.Context, addr string, name record.ExportName, f restoreFlags) (int64, error) {
	network, host, err := config.ParseListen(addr)
	if err != nil {
		return 0, usage(fmt.Errorf("--nbd: %w", err))
	}
	src, err := client.Dial(ctx, network, host, name.String(), nil)
	if err != nil {
		return 0, err
	}
	defer src.Close()
	terminal := term.IsTerminal(int(os.Stderr.Fd()))
	if f.format == "qcow2" {
		var progress io.Writer
		if terminal {
			progress = os.Stderr
		}
		// The connection above pins the view while qemu-img reads another of it.
		return src.Size(), restore.QCOW2(ctx, nbdURI(network, host, name.String()), f.to, f.force, progress)
	}
	o := restore.Options{Force: f.force}
	if terminal {
		bar := progressbar.DefaultBytes(src.Size(), name.String())
		o.Progress = func(n int64) { _ = bar.Add64(n) }
		defer func() { _ = bar.Finish() }()
	}
	return src.Size(), restore.Raw(ctx, src, f.to, o)
}

// nbdURI names an export for other programs: the NBD URI specification.
func nbdURI(network, host, export string) string {
	path := "/" + url.PathEscape(export)
	if network == "unix" {
		return "nbd+unix://" + path + "?socket=" + url.QueryEscape(host)
	}
	return "nbd://" + host + path
}
