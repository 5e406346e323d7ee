package guestfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Tree is files of a guest at one moment, by the paths that the guest has for them. Links are followed within it: none leads to
// a file of the host. It is safe for concurrent use.
type Tree struct {
	mounts []mountpoint // the longest path first
}

type mountpoint struct {
	at   string // "/", "/boot"
	root *os.Root
	sub  string // the directory of the volume that is mounted there
	err  error  // why it can not be shown: what is below it then is not the guest's
}

const (
	// maxLinks bounds the links on the way of one path, as Linux does.
	maxLinks = 40
	// maxFstab bounds what is read of a guest's fstab, in bytes.
	maxFstab = 1 << 20
	// maxMounts bounds the file systems of a tree.
	maxMounts = 256
)

// VolumeTree is the files of one volume.
func VolumeTree(ctx context.Context, o Opened, volume string) (*Tree, error) {
	root, err := openVolume(ctx, o, volume)
	if err != nil {
		return nil, err
	}
	return &Tree{mounts: []mountpoint{{"/", root, ".", nil}}}, nil
}

func openVolume(ctx context.Context, o Opened, volume string) (*os.Root, error) {
	dir, err := o.Dir(ctx, volume)
	if err != nil {
		return nil, err
	}
	// What shows it may be hostile: if it is a link it leads to the host.
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", volume, err)
	}
	defer unix.Close(fd)
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d/.", fd))
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", volume, err)
	}
	return root, nil
}

// GuestTree is the files of a guest as it has them: the volume that it has as its root, and on it what its fstab mounts. What of
// that can not be shown is a problem, and the rest is there.
func GuestTree(ctx context.Context, o Opened, l Layout) (t *Tree, problems []error, err error) {
	t = &Tree{}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
			t = nil
		}
	}()
	root, tab, problems, err := findRoot(ctx, o, l)
	if err != nil {
		return t, problems, err
	}
	t.mounts = []mountpoint{root}
	for _, e := range tab {
		m := mountpoint{at: e.at, sub: e.sub}
		if v, err := l.find(e.spec); err != nil {
			m.err = err
		} else if m.root, m.err = openVolume(ctx, o, v.Name); m.err == nil {
			_, m.err = m.root.Lstat(m.sub)
		}
		if m.err != nil {
			m.err = fmt.Errorf("fstab mounts %q on %q: %w", e.spec, e.at, m.err)
			problems = append(problems, m.err)
		}
		if t.mounts = append(t.mounts, m); len(t.mounts) == maxMounts {
			break
		}
	}
	slices.SortStableFunc(t.mounts, func(a, b mountpoint) int { return len(b.at) - len(a.at) })
	return t, problems, nil
}

// findRoot finds the volume with the guest's fstab, or the only one that can be shown. Several are nobody's to choose from but the user's.
func findRoot(ctx context.Context, o Opened, l Layout) (root mountpoint, tab []fstabEntry, problems []error, err error) {
	var shown, guests []string
	for _, v := range l.Volumes {
		if !v.FS.Readable() {
			continue
		}
		r, err := openVolume(ctx, o, v.Name)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		shown = append(shown, v.Name)
		sub, b, ok, err := findFstab(r, v.FS.Type)
		if err != nil {
			// It may be the guest's root: another one is not to be taken for it.
			return root, nil, nil, errors.Join(fmt.Errorf("volume %s: whether it is the guest's root can not be told: name a volume: %w", v.Name, err), r.Close(), closeRoot(root))
		}
		if ok {
			guests = append(guests, v.Name)
		}
		if ok && root.root == nil {
			tab, root = parseFstab(b, mountpoint{at: "/", root: r, sub: sub})
			continue
		}
		if err := r.Close(); err != nil {
			return root, nil, problems, errors.Join(err, closeRoot(root))
		}
	}
	switch {
	case len(guests) == 1:
		return root, tab, problems, nil
	case len(guests) > 1:
		return root, nil, nil, errors.Join(fmt.Errorf("several volumes have a guest's /etc/fstab: name one of %s", strings.Join(guests, ", ")), closeRoot(root))
	case len(shown) == 1 && len(problems) == 0 && len(l.Problems) == 0: // what could not be read may be the root
		r, err := openVolume(ctx, o, shown[0])
		return mountpoint{at: "/", root: r, sub: "."}, nil, nil, err
	case len(shown) == 0:
		return root, nil, nil, errors.Join(append([]error{fmt.Errorf("none of the volumes can be shown: %w", ErrUnsupported)}, problems...)...)
	}
	return root, nil, problems, fmt.Errorf("none of the volumes that can be shown has a guest's /etc/fstab: name one of %s", strings.Join(shown, ", "))
}

func closeRoot(m mountpoint) error {
	if m.root == nil {
		return nil
	}
	return m.root.Close()
}

// findFstab finds a guest's fstab. A subvolume of Btrfs may be its root. That it can not be read is an error; that there is none, or something else in
// its place, is none.
func findFstab(r *os.Root, fstype string) (sub string, b []byte, ok bool, err error) {
	subs := []string{"."}
	if fstype == TypeBtrfs {
		subs = append(subs, "@", "root")
	}
	for _, sub := range subs {
		b, err := readSmall(r, path.Join(sub, "etc/fstab"))
		var e syscall.Errno
		switch {
		case err == nil:
			return sub, b, true, nil
		case errors.As(err, &e) && e != syscall.ENOENT && e != syscall.ENOTDIR && e != syscall.ELOOP:
			return "", nil, false, err
		}
	}
	return "", nil, false, nil
}

func readSmall(r *os.Root, name string) ([]byte, error) {
	// A socket can not be opened, nor can a device: that is no error of reading.
	if info, err := r.Stat(name); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fs.ErrInvalid)
	}
	f, err := r.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fs.ErrInvalid)
	}
	return io.ReadAll(io.LimitReader(f, maxFstab))
}

type fstabEntry struct{ spec, at, sub string }

// parseFstab reads what stands on disks; the root may say which subvolume it is.
func parseFstab(b []byte, root mountpoint) ([]fstabEntry, mountpoint) {
	var tab []fstabEntry
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\134`, `\`)
	for s := bufio.NewScanner(strings.NewReader(string(b))); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 4 || strings.HasPrefix(f[0], "#") || !strings.HasPrefix(f[1], "/") {
			continue
		}
		sub := "."
		auto := true
		for _, o := range strings.Split(f[3], ",") {
			auto = auto && o != "noauto"
			if v, ok := strings.CutPrefix(o, "subvol="); ok {
				sub = path.Join(".", path.Clean("/" + v)[1:])
			}
		}
		at := path.Clean(unescape.Replace(f[1]))
		if !auto {
			continue
		}
		switch f[2] {
		case "swap", "tmpfs", "proc", "sysfs", "devpts", "nfs", "nfs4", "cifs", "overlay":
			continue
		}
		if at == "/" {
			if sub != "." {
				root.sub = sub
			}
			continue
		}
		// What is mounted last on a path is what is there.
		tab = slices.DeleteFunc(tab, func(e fstabEntry) bool { return e.at == at })
		tab = append(tab, fstabEntry{unescape.Replace(f[0]), at, sub})
	}
	return tab, root
}

var plainDevice = regexp.MustCompile(`^/dev/(?:[shv]d|xvd)([a-z])([0-9]*)$`)

// find is the volume that a line of fstab means.
func (l *Layout) find(spec string) (Volume, error) {
	match := func(ok func(Volume) bool) (found Volume, err error) {
		var names []string
		for _, v := range l.Volumes {
			if ok(v) {
				found = v
				names = append(names, v.Name)
			}
		}
		switch len(names) {
		case 0:
			return found, errors.New("none of the volumes is that")
		case 1:
			return found, nil
		}
		return found, fmt.Errorf("%s are all that, and which of them the guest takes is not known", strings.Join(names, ", "))
	}
	for prefix, of := range map[string]func(Volume) string{
		"UUID=": func(v Volume) string { return v.FS.UUID }, "/dev/disk/by-uuid/": func(v Volume) string { return v.FS.UUID },
		"LABEL=": func(v Volume) string { return v.FS.Label }, "/dev/disk/by-label/": func(v Volume) string { return v.FS.Label },
		"PARTUUID=": func(v Volume) string { return v.PartUUID }, "/dev/disk/by-partuuid/": func(v Volume) string { return v.PartUUID },
		"PARTLABEL=": func(v Volume) string { return v.PartLabel }, "/dev/disk/by-partlabel/": func(v Volume) string { return v.PartLabel },
	} {
		if want, ok := strings.CutPrefix(spec, prefix); ok {
			want = strings.Trim(want, `"`)
			label := strings.Contains(strings.ToLower(prefix), "label") // other than identities, labels differ by case
			return match(func(v Volume) bool {
				return want != "" && (of(v) == want || !label && strings.EqualFold(of(v), want))
			})
		}
	}
	if name, ok := strings.CutPrefix(spec, "/dev/mapper/"); ok {
		return match(func(v Volume) bool {
			group, lv, ok := cutName(v.Name)
			return ok && strings.ReplaceAll(group, "-", "--")+"-"+strings.ReplaceAll(lv, "-", "--") == name
		})
	}
	if m := plainDevice.FindStringSubmatch(spec); m != nil {
		// The guest's disks in their order: names differ with the bus.
		var disks []string
		for _, v := range l.Volumes {
			if d := v.Extents[0].Disk; len(v.Extents) == 1 && !slices.Contains(disks, d) {
				disks = append(disks, d)
			}
		}
		slices.Sort(disks)
		if i := int(m[1][0] - 'a'); i < len(disks) {
			name := disks[i]
			if m[2] != "" {
				name += "/p" + m[2]
			}
			return match(func(v Volume) bool { return v.Name == name })
		}
		return Volume{}, errors.New("none of the volumes is that")
	}
	return match(func(v Volume) bool { return "/dev/"+v.Name == spec })
}

// Close ends the tree; what it stands on stays.
func (t *Tree) Close() error {
	var errs []error
	for _, m := range t.mounts {
		errs = append(errs, closeRoot(m))
	}
	return errors.Join(errs...)
}

// place is where a path without links is.
func (t *Tree) place(p string) (root *os.Root, name string, err error) {
	for _, m := range t.mounts {
		rest, ok := strings.CutPrefix(p, m.at)
		if m.at == "/" {
			rest, ok = p, true
		}
		if ok && (rest == "" || rest[0] == '/') {
			return m.root, path.Join(m.sub, strings.TrimPrefix(rest, "/")), m.err
		}
	}
	return nil, "", fs.ErrNotExist
}

// Resolve follows the links of a path, but for the last part if follow is false. What it returns has none.
func (t *Tree) Resolve(p string, follow bool) (string, error) {
	at := "/"
	rest := split(p)
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		if part == ".." {
			at = path.Dir(at)
			continue
		}
		next := path.Join(at, part)
		root, name, err := t.place(next)
		if err != nil {
			return "", &fs.PathError{Op: "find", Path: next, Err: err}
		}
		info, err := root.Lstat(name)
		if err != nil {
			return "", &fs.PathError{Op: "find", Path: next, Err: errors.Unwrap(err)}
		}
		if info.Mode()&fs.ModeSymlink == 0 || len(rest) == 0 && !follow {
			at = next
			continue
		}
		if links++; links > maxLinks {
			return "", &fs.PathError{Op: "find", Path: p, Err: syscall.ELOOP}
		}
		target, err := root.Readlink(name)
		if err != nil {
			return "", &fs.PathError{Op: "read link", Path: next, Err: errors.Unwrap(err)}
		}
		if path.IsAbs(target) {
			at = "/"
		}
		rest = append(split(target), rest...)
	}
	return at, nil
}

func split(p string) []string {
	return slices.DeleteFunc(strings.Split(p, "/"), func(s string) bool { return s == "" || s == "." })
}

// Lstat tells of a file by a path that Resolve returned.
func (t *Tree) Lstat(p string) (fs.FileInfo, error) {
	root, name, err := t.place(p)
	if err != nil {
		return nil, &fs.PathError{Op: "find", Path: p, Err: err}
	}
	return root.Lstat(name)
}

// Readlink reads a link.
func (t *Tree) Readlink(p string) (string, error) {
	root, name, err := t.place(p)
	if err != nil {
		return "", &fs.PathError{Op: "read link", Path: p, Err: err}
	}
	return root.Readlink(name)
}

// Open opens a regular file or a directory by a path that Resolve returned.
func (t *Tree) Open(p string) (*os.File, error) {
	root, name, err := t.place(p)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: p, Err: err}
	}
	// A fifo would wait for somebody who writes.
	return root.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
}

// ReadDir lists a directory by name.
func (t *Tree) ReadDir(p string) ([]fs.FileInfo, error) {
	d, err := t.Open(p)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	infos := make([]fs.FileInfo, 0, len(names))
	for _, name := range names {
		info, err := t.Lstat(path.Join(p, name))
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	return infos, nil
}
