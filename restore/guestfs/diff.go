package guestfs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"syscall"
)

// Difference is a file that is not the same in two trees.
type Difference struct {
	Path string   // in the first tree, or, of what is only in the second, in that
	Only int      // 1, 2: there is one in that tree alone; 0: in both
	What []string // of what is in both: type, size, content, mode, owner, time, target
}

// Diff compares what is below a path of each tree, and calls fn with what differs, by path.
func Diff(ctx context.Context, a *Tree, pa string, b *Tree, pb string, fn func(Difference) error) error {
	pa, err := a.Resolve(pa, true)
	if err != nil {
		return fmt.Errorf("first: %w", err)
	}
	if pb, err = b.Resolve(pb, true); err != nil {
		return fmt.Errorf("second: %w", err)
	}
	d := differ{ctx, a, b, fn, make([]byte, 256<<10), make([]byte, 256<<10)}
	return d.both(pa, pb)
}

type differ struct {
	ctx    context.Context
	a, b   *Tree
	fn     func(Difference) error
	ba, bb []byte
}

func (d *differ) both(pa, pb string) error {
	if err := d.ctx.Err(); err != nil {
		return err
	}
	ia, err := d.a.Lstat(pa)
	if err != nil {
		return err
	}
	ib, err := d.b.Lstat(pb)
	if err != nil {
		return err
	}
	what, err := d.compare(pa, ia, pb, ib)
	if err != nil {
		return fmt.Errorf("compare %s: %w", pa, err)
	}
	if len(what) > 0 {
		if err := d.fn(Difference{Path: pa, What: what}); err != nil {
			return err
		}
	}
	if ia.IsDir() && ib.IsDir() {
		return d.dirs(pa, pb)
	}
	return nil
}

// dirs compares two directories, whose entries are sorted.
func (d *differ) dirs(pa, pb string) error {
	la, err := d.a.ReadDir(pa)
	if err != nil {
		return err
	}
	lb, err := d.b.ReadDir(pb)
	if err != nil {
		return err
	}
	for len(la)+len(lb) > 0 {
		switch {
		case len(lb) == 0 || len(la) > 0 && la[0].Name() < lb[0].Name():
			err = d.fn(Difference{Path: path.Join(pa, la[0].Name()), Only: 1})
			la = la[1:]
		case len(la) == 0 || lb[0].Name() < la[0].Name():
			err = d.fn(Difference{Path: path.Join(pb, lb[0].Name()), Only: 2})
			lb = lb[1:]
		default:
			err = d.both(path.Join(pa, la[0].Name()), path.Join(pb, lb[0].Name()))
			la, lb = la[1:], lb[1:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (d *differ) compare(pa string, a fs.FileInfo, pb string, b fs.FileInfo) (what []string, err error) {
	if a.Mode().Type() != b.Mode().Type() {
		return []string{"type"}, nil
	}
	note := func(differs bool, name string) {
		if differs {
			what = append(what, name)
		}
	}
	sa, sb := a.Sys().(*syscall.Stat_t), b.Sys().(*syscall.Stat_t)
	switch a.Mode().Type() {
	case 0:
		note(a.Size() != b.Size(), "size")
		if a.Size() == b.Size() {
			same, err := d.sameContent(pa, pb)
			if err != nil {
				return nil, err
			}
			note(!same, "content")
		}
	case fs.ModeSymlink:
		ta, err := d.a.Readlink(pa)
		if err != nil {
			return nil, err
		}
		tb, err := d.b.Readlink(pb)
		if err != nil {
			return nil, err
		}
		note(ta != tb, "target")
	default:
		note(sa.Rdev != sb.Rdev, "device")
	}
	note(a.Mode() != b.Mode(), "mode")
	note(sa.Uid != sb.Uid || sa.Gid != sb.Gid, "owner")
	note(!a.IsDir() && !a.ModTime().Equal(b.ModTime()), "time")
	return what, nil
}

func (d *differ) sameContent(pa, pb string) (bool, error) {
	fa, err := d.a.Open(pa)
	if err != nil {
		return false, err
	}
	defer fa.Close()
	fb, err := d.b.Open(pb)
	if err != nil {
		return false, err
	}
	defer fb.Close()
	for {
		na, erra := io.ReadFull(fa, d.ba)
		nb, errb := io.ReadFull(fb, d.bb)
		for _, err := range []error{erra, errb} {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
				return false, err
			}
		}
		if !bytes.Equal(d.ba[:na], d.bb[:nb]) {
			return false, nil
		}
		if na < len(d.ba) {
			return true, d.ctx.Err()
		}
	}
}

// Fingerprint is what tells one version of a file from another: all but its times. A file that is not there has one too.
func (t *Tree) Fingerprint(ctx context.Context, p string) (print string, info fs.FileInfo, err error) {
	p, err = t.Resolve(p, false)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return "", nil, nil
	}
	if err != nil {
		return "", nil, err
	}
	if info, err = t.Lstat(p); err != nil {
		return "", nil, err
	}
	st := info.Sys().(*syscall.Stat_t)
	h := sha256.New()
	fmt.Fprintf(h, "%v %d %d %d %d\n", info.Mode(), st.Uid, st.Gid, info.Size(), st.Rdev)
	switch info.Mode().Type() {
	case 0:
		err = t.hash(ctx, p, h)
	case fs.ModeSymlink:
		var target string
		if target, err = t.Readlink(p); err == nil {
			_, err = io.WriteString(h, target)
		}
	case fs.ModeDir:
		var all []fs.FileInfo
		all, err = t.ReadDir(p)
		for _, i := range all {
			fmt.Fprintf(h, "%q %v\n", i.Name(), i.Mode())
		}
	}
	return string(h.Sum(nil)), info, err
}

func (t *Tree) hash(ctx context.Context, p string, h io.Writer) error {
	f, err := t.Open(p)
	if err != nil {
		return err
	}
	defer f.Close()
	for b := make([]byte, 1<<20); ; {
		n, err := f.Read(b)
		if _, werr := h.Write(b[:n]); werr != nil {
			return werr
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
	}
}
