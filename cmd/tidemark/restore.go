package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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
	to, format, nbd, since string
	force, verify, restart bool
}

// restored is the verb's JSON for a disk.
type restored struct {
	Group    string  `json:"group"`
	Disk     string  `json:"disk"`
	LSN      uint64  `json:"lsn"`
	To       string  `json:"to"`
	Format   string  `json:"format"`
	Size     int64   `json:"size"`
	Seconds  float64 `json:"seconds"`
	Verified bool    `json:"verified"`
	Since    uint64  `json:"since,omitempty"` // LSN: what changed since was written, and no more
}

func (a *app) restore() *cobra.Command {
	var f restoreFlags
	cmd := &cobra.Command{
		Use:   "restore GROUP[/DISK]@POINT --to FILE|DIR|DEVICE|NBD-URI",
		Short: "Write a disk, or all disks of a group, as they were at a point",
		Long: `Write a disk, as it was at a point, to an image, a block device or an NBD export; or all
disks of a group, and what its guests were defined as, to a directory.

A restore that breaks off goes on where it ended when it is called again in the same words, as of the same moment.`,
		Example: `  tidemark restore web01@before-upgrade --to /images/web01
  tidemark restore web01/vda@-15m --to vda.qcow2 --format qcow2 --verify
  tidemark restore web01/vda@nightly --to /dev/vg0/web01
  tidemark restore web01/vda@latest --changed-since nightly --to vda.raw`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.runRestore(cmd, args[0], f)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.to, "to", "", "what to write; a directory for a group")
	fl.StringVar(&f.format, "format", "raw", "of images: raw or qcow2")
	fl.StringVar(&f.since, "changed-since", "", "write only what changed since this point, into an existing copy that is the disk as of then")
	fl.BoolVar(&f.verify, "verify", false, "read back what was written and compare it")
	fl.StringVar(&f.nbd, "nbd", "", "the daemon's NBD socket, unix:PATH or tcp:HOST:PORT; asked of the daemon by default")
	fl.BoolVar(&f.force, "force", false, "replace existing files; write over a copy that does not say what it is")
	fl.BoolVar(&f.restart, "restart", false, "begin anew, whatever an earlier restore left unfinished")
	return cmd
}

// splitDisk reads GROUP/DISK@POINT or GROUP@POINT, for which the disk is empty.
func splitDisk(arg string) (name record.ExportName, err error) {
	before, point, ok := strings.Cut(arg, "@")
	if !ok {
		return name, fmt.Errorf("%s names no point: add @latest, @LABEL, @TIME or @lsn:N", arg)
	}
	if strings.Contains(before, "/") {
		return record.ParseExportName(arg)
	}
	name.Group = before
	if err := record.CheckName(before); err != nil {
		return name, err
	}
	name.Point, err = record.ParsePoint(point)
	return name, err
}

func (f *restoreFlags) check(name record.ExportName) error {
	switch {
	case f.to == "":
		return errors.New("--to is missing")
	case f.to == "-":
		return errors.New("--to -: an image is written to a file; to read it as a stream, use an NBD client on " + name.String())
	case f.format != "raw" && f.format != "qcow2":
		return fmt.Errorf("--format %q: raw or qcow2", f.format)
	case f.since != "" && f.format != "raw":
		return errors.New("--changed-since goes into raw images, devices and exports: a qcow2 image is restored whole")
	case name.Disk == "" && isURI(f.to):
		return errors.New("a group is restored to a directory; name one of its disks to write to an export")
	}
	return nil
}

// restoring is what one call of the verb has.
type restoring struct {
	*app
	cmd     *cobra.Command
	f       restoreFlags
	name    record.ExportName // with an empty disk: of a group
	client  *api.Client
	status  api.Status
	network string // of the daemon's NBD server
	addr    string
	lsn     uint64
	since   uint64
}

func (a *app) runRestore(cmd *cobra.Command, arg string, f restoreFlags) error {
	name, err := splitDisk(arg)
	if err == nil {
		err = f.check(name)
	}
	if err != nil {
		return usage(err)
	}
	r := &restoring{app: a, cmd: cmd, f: f, name: name}
	if err := r.connect(); err != nil {
		return err
	}
	if name.Disk == "" {
		return r.group()
	}
	if err := r.hasDisk(name.Disk); err != nil {
		return err
	}
	t := r.target(name.Disk, f.to)
	left, ok := t.left()
	if err := r.at(left, ok && left.Disk == r.origin(name.Disk).Disk); err != nil {
		return err
	}
	out, err := r.disk(t)
	if err != nil {
		return err
	}
	if a.json {
		return printJSON(cmd, out)
	}
	return r.say(out)
}

func (r *restoring) connect() (err error) {
	if r.client, err = r.app.client(); err != nil {
		return err
	}
	if r.status, err = r.client.Status(r.cmd.Context()); err != nil {
		return err
	}
	r.network, r.addr, err = r.app.nbdServer(r.status, r.f.nbd)
	return err
}

// nbdServer is where the daemon serves NBD: where the flag says, or what the daemon says, a local socket if there is one.
func (a *app) nbdServer(s api.Status, flag string) (network, addr string, err error) {
	if flag == "" {
		if len(s.NBD) == 0 {
			return "", "", errors.New("the daemon serves no NBD socket")
		}
		flag = s.NBD[0]
		if i := slices.IndexFunc(s.NBD, func(n string) bool { return strings.HasPrefix(n, "unix:") }); i >= 0 {
			flag = s.NBD[i]
		}
	}
	if network, addr, err = config.ParseListen(flag); err != nil {
		return "", "", usage(fmt.Errorf("--nbd: %w", err))
	}
	return network, addr, nil
}

func (r *restoring) groupStatus() (api.Group, error) { return findGroup(r.status, r.name.Group) }

func findGroup(s api.Status, name string) (api.Group, error) {
	for _, g := range s.Groups {
		if g.Name == name {
			return g, nil
		}
	}
	return api.Group{}, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("group %q: not found", name)}
}

func (r *restoring) hasDisk(disk string) error {
	g, err := r.groupStatus()
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(g.Disks, func(d api.Disk) bool { return d.Name == disk }) {
		return &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("disk %q of group %s: not found", disk, g.Name)}
	}
	return nil
}

// at decides as of which LSN: a point may move while an image is written, and between two attempts; its LSN does not.
func (r *restoring) at(left restore.Origin, unfinished bool) error {
	ctx := r.cmd.Context()
	goesOn := unfinished && !r.f.restart && left.Store == r.status.Store && left.Point == r.name.Point.String()
	point := r.name.Point.String()
	if goesOn {
		point = fmt.Sprintf("lsn:%d", left.LSN)
		fmt.Fprintf(r.cmd.ErrOrStderr(), "tidemark: going on with the restore that ended early, as of LSN %d\n", left.LSN)
	}
	resolved, err := r.client.Resolve(ctx, r.name.Group, point)
	if err != nil {
		if goesOn {
			return fmt.Errorf("the restore that ended early was as of LSN %d: %w; --restart begins anew", left.LSN, err)
		}
		return err
	}
	r.lsn = resolved.LSN
	if r.f.since == "" {
		return nil
	}
	since := r.f.since
	if goesOn && left.Since != 0 {
		since = fmt.Sprintf("lsn:%d", left.Since)
	}
	if resolved, err = r.client.Resolve(ctx, r.name.Group, since); err != nil {
		return fmt.Errorf("--changed-since: %w", err)
	}
	if r.since = resolved.LSN; r.since > r.lsn {
		return usage(fmt.Errorf("--changed-since %s is LSN %d, and newer than %s, LSN %d: to go back, restore the whole disk", r.f.since, r.since, r.name.Point, r.lsn))
	}
	return nil
}

func (r *restoring) origin(disk string) restore.Origin {
	return restore.Origin{Store: r.status.Store, Disk: r.name.Group + "/" + disk, Point: r.name.Point.String(), LSN: r.lsn, Since: r.since}
}

// disk restores one disk.
func (r *restoring) disk(t *target) (out restored, err error) {
	began := time.Now()
	name := record.ExportName{Group: r.name.Group, Disk: t.disk, Point: record.Point{Form: record.FormLSN, LSN: record.LSN(r.lsn)}}
	var contexts []string
	if t.incremental() {
		contexts = []string{fmt.Sprintf("%slsn:%d", api.ChangedSince, r.since)}
	}
	src, err := client.Dial(r.cmd.Context(), r.network, r.addr, name.String(), nil, contexts...)
	if err != nil {
		return out, err
	}
	defer src.Close()
	o := restore.Options{Origin: r.origin(t.disk), Format: restore.Format(r.f.format), Force: r.f.force, Fresh: r.f.restart, Verify: r.f.verify}
	if contexts != nil {
		o.Changed = func(off, n int64, fn func(int64, bool)) error {
			return src.Status(contexts[0], off, n, func(n int64, flags uint32) { fn(n, flags&1 != 0) })
		}
	} else {
		o.Origin.Since = 0
	}
	what := r.name.Group + "/" + t.disk
	var done func()
	o.Progress, done = r.bar(src.Size(), what)
	if r.f.verify {
		var bar func()
		o.Verified, bar = r.bar(src.Size(), what+" verify")
		defer bar()
	}
	if err := t.write(r.cmd.Context(), src, o); err != nil {
		return out, err
	}
	done()
	return restored{
		Group: r.name.Group, Disk: t.disk, LSN: r.lsn, To: t.to, Format: t.format(), Size: src.Size(),
		Seconds: time.Since(began).Seconds(), Verified: r.f.verify, Since: o.Origin.Since,
	}, nil
}

// bar shows progress with rate and time left, on a terminal.
func (r *restoring) bar(size int64, what string) (add func(int64), done func()) {
	if !term.IsTerminal(int(os.Stderr.Fd())) {
		return nil, func() {}
	}
	start := sync.OnceValue(func() *progressbar.ProgressBar { return progressbar.DefaultBytes(size, what) }) // at the first byte: its rate is that of now
	return func(n int64) { _ = start().Add64(n) }, func() { _ = start().Finish() }
}

func (r *restoring) say(out restored) error {
	more := ""
	if out.Since != 0 {
		more = fmt.Sprintf(", what changed since LSN %d", out.Since)
	}
	if out.Verified {
		more += ", verified"
	}
	_, err := fmt.Fprintf(r.cmd.OutOrStdout(), "%s as of LSN %d is in %s (%s in %.1f s%s)\n",
		out.Group+"/"+out.Disk, out.LSN, out.To, size(out.Size), out.Seconds, more)
	return err
}

// target is what a disk is restored to.
type target struct {
	r    *restoring
	disk string
	to   string
	copy bool // an existing file is brought up to date
}

func (r *restoring) target(disk, to string) *target {
	return &target{r: r, disk: disk, to: to, copy: r.f.since != ""}
}

// inPlace reports whether the target is not a file that is made anew.
func (t *target) inPlace() bool {
	if isURI(t.to) || t.copy {
		return true
	}
	info, err := os.Stat(t.to)
	return err == nil && info.Mode()&os.ModeDevice != 0
}

func (t *target) incremental() bool { return t.copy }

func (t *target) format() string {
	if t.inPlace() {
		return "raw"
	}
	return t.r.f.format
}

// name is what the target is called in the note of an unfinished restore.
func (t *target) name() string {
	if isURI(t.to) {
		return t.to
	}
	if abs, err := filepath.Abs(t.to); err == nil {
		return abs
	}
	return t.to
}

func (t *target) left() (restore.Origin, bool) {
	if t.inPlace() {
		return restore.LeftOnto(noteDir(), t.name())
	}
	return restore.Left(t.name())
}

// noteDir keeps the notes of unfinished restores to what is no new file.
func noteDir() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = os.TempDir()
	}
	return filepath.Join(dir, "tidemark")
}

func (t *target) write(ctx context.Context, src *client.Client, o restore.Options) error {
	if isURI(t.to) {
		return t.writeExport(ctx, src, o)
	}
	if err := t.notServed(); err != nil {
		return err
	}
	if !t.inPlace() {
		return restore.ToFile(ctx, src, t.name(), o)
	}
	if o.Format != restore.Raw {
		return usage(fmt.Errorf("%s is written as it is: --format %s goes to a new file", t.to, o.Format))
	}
	f, err := restore.OpenFile(t.name())
	if err != nil {
		return fmt.Errorf("restore to %s: %w", t.to, err)
	}
	defer f.Close()
	if t.copy {
		if err := t.isCopy(f, src.Size()); err != nil {
			return err
		}
	}
	return restore.Onto(ctx, src, f, t.name(), noteDir(), o)
}

// isCopy fails if a file is not known to be the disk as of the LSN since which it is to get the changes.
func (t *target) isCopy(f *restore.File, size int64) error {
	was, err := f.Stamped()
	unfinished := restore.Unfinished(noteDir(), t.name(), f, t.r.origin(t.disk))
	switch {
	case f.Size() != size && !f.Device():
		return fmt.Errorf("%s has %d bytes, the disk %d: it is no copy", t.to, f.Size(), size)
	case t.r.f.force, unfinished && !t.r.f.restart:
		return nil
	case errors.Is(err, restore.ErrNoStamp) && t.r.f.verify:
		return nil
	case errors.Is(err, restore.ErrNoStamp):
		return fmt.Errorf("%w: --verify compares all of it when the changes are written, --force believes that it is the disk as of LSN %d", err, t.r.since)
	case err != nil:
		return err
	case was.Store != t.r.status.Store || was.Disk != t.r.origin(t.disk).Disk || was.LSN < t.r.since:
		return fmt.Errorf("%s is %s as of LSN %d and not %s of this journal as of LSN %d or later: restore all of it, or name --changed-since lsn:%d if it is the same disk", t.to, was.Disk, was.LSN, t.r.origin(t.disk).Disk, t.r.since, was.LSN)
	case was.LSN > t.r.lsn:
		return fmt.Errorf("%s is %s as of LSN %d, newer than LSN %d: to go back, restore all of it", t.to, was.Disk, was.LSN, t.r.lsn)
	}
	return nil
}

// notServed refuses a file that the daemon serves: it would go on with what it has open, and what guests write would be lost.
func (t *target) notServed() error {
	info, err := os.Stat(t.to)
	if err != nil {
		return nil
	}
	for _, g := range t.r.status.Groups {
		for _, d := range g.Disks {
			if b, err := os.Stat(d.Backing); err == nil && os.SameFile(b, info) {
				return fmt.Errorf("%s is the backing of %s/%s, which the daemon serves: restore to another file, or take the disk back with tidemark rollback", t.to, g.Name, d.Name)
			}
		}
	}
	return nil
}
