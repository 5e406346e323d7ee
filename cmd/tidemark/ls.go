package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/schollz/progressbar/v3"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tidemark-cdp/tidemark/restore/guestfs"
)

// listed is one of the ls verb's JSON.
type listed struct {
	Name   string    `json:"name"`
	Mode   string    `json:"mode"`
	UID    uint32    `json:"uid"`
	GID    uint32    `json:"gid"`
	Size   int64     `json:"size"`
	Time   time.Time `json:"time"`
	Target string    `json:"target,omitempty"` // of a link
}

func (a *app) ls() *cobra.Command {
	var f filesFlags
	cmd := &cobra.Command{
		Use:   "ls GROUP@POINT:/PATH",
		Short: "List a guest's files as they were",
		Long: `List a guest's files as they were at a point, by the paths that the guest has for them, or, as GROUP/DISK@POINT:/PATH, those of
one disk, partition or logical volume. The file systems are opened in a small VM of their own (libguestfs), or by the host's kernel with --kernel.`,
		Example: `  tidemark ls web01@-1h:/etc
  tidemark ls web01/vda@before-upgrade:/p1/efi --kernel`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withTree(cmd, args[0], f, func(t *guestfs.Tree, p string) error { return a.list(cmd, t, p) })
		},
	}
	f.add(cmd)
	f.addKeep(cmd)
	return cmd
}

func (a *app) list(cmd *cobra.Command, t *guestfs.Tree, p string) error {
	p, err := t.Resolve(p, true)
	if err != nil {
		return err
	}
	info, err := t.Lstat(p)
	if err != nil {
		return err
	}
	infos := []fs.FileInfo{info}
	dir := path.Dir(p)
	if info.IsDir() {
		dir = p
		if infos, err = t.ReadDir(p); err != nil {
			return err
		}
	}
	all := []listed{}
	for _, i := range infos {
		st := i.Sys().(*syscall.Stat_t)
		l := listed{Name: i.Name(), Mode: i.Mode().String(), UID: st.Uid, GID: st.Gid, Size: i.Size(), Time: i.ModTime().UTC()}
		if i.Mode()&fs.ModeSymlink != 0 {
			if l.Target, err = t.Readlink(path.Join(dir, i.Name())); err != nil {
				return err
			}
		}
		all = append(all, l)
	}
	if a.json {
		return printJSON(cmd, all)
	}
	w := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 8, 1, ' ', tabwriter.AlignRight)
	for _, l := range all {
		// A name may hold what a terminal takes for a command.
		name := printable(l.Name)
		if l.Target != "" {
			name += " -> " + printable(l.Target)
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%s\t %s\n", l.Mode, l.UID, l.GID, l.Size, l.Time.Format("2006-01-02 15:04:05"), name)
	}
	return w.Flush()
}

// printable is a guest's name as a terminal may have it.
func printable(s string) string {
	q := fmt.Sprintf("%q", s)
	if q = q[1 : len(q)-1]; q == s {
		return s
	}
	return "\"" + q + "\""
}

func (a *app) cp() *cobra.Command {
	var f filesFlags
	cmd := &cobra.Command{
		Use:   "cp GROUP@POINT:/PATH TARGET",
		Short: "Copy a guest's file or directory as it was",
		Long: `Copy a file of a guest, or a directory with everything below it, as it was at a point. Modes, times, links, extended attributes and
holes are kept, and, as root, owners and devices. The target must not exist, or be a directory to copy into.`,
		Example: `  tidemark cp web01@before-upgrade:/etc/fstab .
  tidemark cp web01@-2h:/var/www /tmp/www`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withTree(cmd, args[0], f, func(t *guestfs.Tree, p string) error { return a.copy(cmd, t, p, args[1]) })
		},
	}
	f.add(cmd)
	f.addKeep(cmd)
	return cmd
}

func (a *app) copy(cmd *cobra.Command, t *guestfs.Tree, p, to string) error {
	if info, err := os.Stat(to); err == nil && info.IsDir() {
		name := path.Base(path.Clean(p))
		if name == "/" || name == "." {
			return usage(errors.New("the whole tree is copied to a directory that does not exist"))
		}
		to = filepath.Join(to, name)
	} else if strings.HasSuffix(to, "/") {
		return usage(fmt.Errorf("%s is no directory", to))
	}
	skipped := 0
	o := guestfs.CopyOptions{Owner: os.Geteuid() == 0, Skipped: func(p string, why error) {
		skipped++
		fmt.Fprintf(cmd.ErrOrStderr(), "tidemark: left out: %s: %v\n", printable(p), why)
	}}
	if term.IsTerminal(int(os.Stderr.Fd())) {
		bar := progressbar.DefaultBytes(-1, "copy")
		o.Copied = func(n int64) { _ = bar.Add64(n) }
		defer func() { _ = bar.Finish() }()
	}
	err := t.Copy(cmd.Context(), p, to, o)
	if err == nil && skipped > 0 {
		err = fmt.Errorf("%d files or attributes were left out", skipped)
	}
	return err
}
