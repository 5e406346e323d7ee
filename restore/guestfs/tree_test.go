package guestfs

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// shown is volumes that are directories.
type shown map[string]string

func (s shown) Break()     {}
func (s shown) Err() error { return nil }

func (s shown) Close() error { return nil }

func (s shown) Dir(_ context.Context, volume string) (string, error) {
	if dir, ok := s[volume]; ok {
		return dir, nil
	}
	return "", fmt.Errorf("volume %q: %w", volume, os.ErrNotExist)
}

func write(t testing.TB, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
	require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
}

func link(t testing.TB, dir, name, target string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
	require.NoError(t, os.Symlink(target, filepath.Join(dir, name)))
}

// aGuest has its root on a logical volume, /boot on a partition, /home on a subvolume and /srv on another disk.
func aGuest(t testing.TB) (Layout, shown) {
	s := shown{"vda/p4": t.TempDir(), "vda/p5": t.TempDir(), "vda/p1": t.TempDir(), "vg-0/ro-ot": t.TempDir(), "vda/p3": t.TempDir(), "vdb": t.TempDir()}
	fs := func(uuid, label string) FS { return FS{TypeExt, uuid, label} }
	l := Layout{Volumes: []Volume{
		{Name: "vda", Extents: []Extent{{"vda", 0, 1}}},
		{Name: "vda/p1", FS: fs("AAAA-1", ""), Extents: []Extent{{"vda", 0, 1}}},
		{Name: "vda/p2", FS: FS{Type: TypeLVM}, Extents: []Extent{{"vda", 0, 1}}},
		{Name: "vda/p3", FS: fs("", "homes"), Extents: []Extent{{"vda", 0, 1}}},
		{Name: "vda/p4", FS: fs("", "twin"), Extents: []Extent{{"vda", 0, 1}}},
		{Name: "vda/p5", FS: fs("", "twin"), Extents: []Extent{{"vda", 0, 1}}},
		{Name: "vdb", FS: fs("", ""), Extents: []Extent{{"vdb", 0, 1}}},
		{Name: "vg-0/ro-ot", FS: fs("", ""), Extents: []Extent{{"vda", 0, 1}, {"vdb", 0, 1}}},
	}}
	root := s["vg-0/ro-ot"]
	write(t, root, "etc/fstab", `# comment
/dev/mapper/vg--0-ro--ot / ext4 defaults 0 1
UUID=aaaa-1 /boot ext4 defaults 0 2
LABEL=homes /home btrfs subvol=/@home,compress 0 0
/dev/sdb /srv\040data ext4 defaults 0 0
UUID=none /lost ext4 defaults 0 0
LABEL=twin /twin ext4 defaults 0 0
/dev/sdb /mnt/by-hand ext4 noauto 0 0
LABEL=homes /late ext4 defaults 0 0
UUID=AAAA-1 /late ext4 defaults 0 0
tmpfs /tmp tmpfs defaults 0 0
`)
	write(t, root, "etc/passwd", "root")
	write(t, s["vda/p1"], "vmlinuz", "kernel")
	write(t, s["vda/p3"], "@home/me/mail", "mail")
	write(t, s["vda/p3"], "@other/x", "x")
	write(t, s["vdb"], "file", "srv")
	for name, target := range map[string]string{
		"bin": "usr/bin", "abs": "/boot/vmlinuz", "out": "../../../../etc/passwd", "loop": "loop", "a/up": "../etc/passwd", "here": "/home/../home/me", "dangling": "/nowhere",
	} {
		link(t, root, name, target)
	}
	write(t, root, "usr/bin/sh", "shell")
	return l, s
}

func readAll(t testing.TB, tr *Tree, p string) (string, error) {
	p, err := tr.Resolve(p, true)
	if err != nil {
		return "", err
	}
	f, err := tr.Open(p)
	require.NoError(t, err)
	defer f.Close()
	b := make([]byte, 100)
	n, err := f.Read(b)
	require.NoError(t, err)
	return string(b[:n]), nil
}

// TestAGuestsPaths: what the guest has under a path, wherever it is, and never a file of the host.
func TestAGuestsPaths(t *testing.T) {
	l, s := aGuest(t)
	tr, problems, err := GuestTree(context.Background(), s, l)
	require.NoError(t, err)
	defer func() { require.NoError(t, tr.Close()) }()
	require.Len(t, problems, 2)
	require.ErrorContains(t, problems[0], `"UUID=none" on "/lost"`)
	require.ErrorContains(t, problems[1], "vda/p4, vda/p5 are all that")
	_, err = tr.Resolve("/mnt/by-hand/file", true)
	require.ErrorIs(t, err, os.ErrNotExist, "the guest has not mounted it")
	late, err := readAll(t, tr, "/late/vmlinuz")
	require.NoError(t, err)
	require.Equal(t, "kernel", late, "what was mounted last is on top")
	require.NoError(t, os.Mkdir(filepath.Join(s["vg-0/ro-ot"], "lost"), 0o755))
	for _, p := range []string{"/lost", "/lost/x"} {
		_, err = tr.Resolve(p, true)
		require.ErrorContains(t, err, "none of the volumes is that", "not the empty directory below it")
	}
	_, err = tr.Lstat("/lost")
	require.Error(t, err)
	for p, want := range map[string]string{
		"/etc/passwd": "root", "/boot/vmlinuz": "kernel", "/home/me/mail": "mail", "/srv data/file": "srv", "/bin/sh": "shell", "/abs": "kernel",
		"/out": "root", "/a/up": "root", "/here/mail": "mail", "/../../etc/passwd": "root", "etc/./passwd": "root",
	} {
		got, err := readAll(t, tr, p)
		require.NoError(t, err, p)
		require.Equal(t, want, got, p)
	}
	_, err = tr.Resolve("/loop", true)
	require.ErrorIs(t, err, syscall.ELOOP)
	for _, p := range []string{"/dangling", "/etc/shadow", "/home/@other/x", "/etc/passwd/x"} {
		_, err = tr.Resolve(p, true)
		require.Error(t, err, p)
	}
	p, err := tr.Resolve("/dangling", false)
	require.NoError(t, err)
	require.Equal(t, "/dangling", p)
	infos, err := tr.ReadDir("/boot")
	require.NoError(t, err)
	require.Len(t, infos, 1)
}

func TestVolumesWithoutAGuest(t *testing.T) {
	l, s := aGuest(t)
	write(t, s["vdb"], "etc/fstab", "")
	write(t, s["vda/p3"], "root/etc/fstab", "") // no Btrfs: a directory like any other
	_, _, err := GuestTree(context.Background(), s, l)
	require.ErrorContains(t, err, "several volumes have a guest's /etc/fstab: name one of vdb, vg-0/ro-ot")
	require.NoError(t, os.Remove(filepath.Join(s["vdb"], "etc/fstab")))
	require.NoError(t, os.Remove(filepath.Join(s["vg-0/ro-ot"], "etc/fstab")))
	_, _, err = GuestTree(context.Background(), s, l)
	require.ErrorContains(t, err, "name one of vda/p1, vda/p3, vda/p4, vda/p5, vdb, vg-0/ro-ot")
	whole := l.Volumes
	l.Volumes = append(l.Volumes[6:7:7], Volume{Name: "vda/p9", FS: FS{Type: TypeXFS}})
	_, _, err = GuestTree(context.Background(), s, l)
	require.ErrorContains(t, err, "name one of vdb", "the other one may be the guest's root")
	l.Volumes = whole[6:7]
	tr, _, err := GuestTree(context.Background(), s, l)
	require.NoError(t, err)
	got, err := readAll(t, tr, "/file")
	require.NoError(t, err)
	require.Equal(t, "srv", got)
	require.NoError(t, tr.Close())
	_, _, err = GuestTree(context.Background(), s, Layout{Volumes: []Volume{{Name: "vda"}}})
	require.ErrorIs(t, err, ErrUnsupported)
}

// TestCopyKeepsWhatFilesAre compares a copied zoo with the original.
func TestCopyKeepsWhatFilesAre(t *testing.T) {
	needRoot(t)
	need(t, "python3")
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "copy")
	tool(t, fmt.Sprintf("MANY=200\nSPARSE=%d\ncd '%s'\n", 200<<20, from)+zoo+zooUnix+zooXattr, "sh", "-e")
	tr, err := VolumeTree(context.Background(), shown{"v": from}, "v")
	require.NoError(t, err)
	defer func() { require.NoError(t, tr.Close()) }()
	o := CopyOptions{Owner: true, Skipped: func(p string, why error) { t.Errorf("%s was left out: %v", p, why) }}
	require.NoError(t, tr.Copy(context.Background(), "/", to, o))
	same(t, take(t, from), take(t, to))
	var st syscall.Stat_t
	require.NoError(t, syscall.Stat(filepath.Join(to, "holes/big"), &st))
	require.Less(t, st.Blocks*512, int64(1<<20))
	require.ErrorIs(t, tr.Copy(context.Background(), "/small", to, o), os.ErrExist)

	// One file, by a link; and not as root, who alone makes devices.
	require.NoError(t, tr.Copy(context.Background(), "/links/abs", filepath.Join(t.TempDir(), "x"), o))
	var left []string
	plain := CopyOptions{Skipped: func(p string, _ error) { left = append(left, p) }}
	dir := filepath.Join(t.TempDir(), "plain")
	require.NoError(t, tr.Copy(context.Background(), "/", dir, plain))
	require.Contains(t, strings.Join(left, " "), "/node")
	info, err := os.Stat(filepath.Join(dir, "small"))
	require.NoError(t, err)
	require.Zero(t, info.Mode()&os.ModeSetuid, "it would run as whoever copied it")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	require.ErrorIs(t, tr.Copy(ctx, "/", filepath.Join(t.TempDir(), "y"), o), context.Canceled)
}

// TestDiffTellsWhatDiffers between two directories, and that a print does too.
func TestDiffTellsWhatDiffers(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for _, dir := range []string{a, b} {
		write(t, dir, "same", "same")
		write(t, dir, "d/content", "aaaa")
		write(t, dir, "d/mode", "x")
		link(t, dir, "target", "same")
		require.NoError(t, os.Chtimes(filepath.Join(dir, "same"), time.Unix(1, 0), time.Unix(1, 0)))
		require.NoError(t, os.Chtimes(filepath.Join(dir, "d/mode"), time.Unix(1, 0), time.Unix(1, 0)))
	}
	write(t, a, "only-a/below", "")
	write(t, b, "only-b", "")
	write(t, b, "d/content", "bbbb")
	for _, dir := range []string{a, b} {
		require.NoError(t, os.Chtimes(filepath.Join(dir, "d/content"), time.Unix(1, 0), time.Unix(1, 0)))
	}
	require.NoError(t, os.Chmod(filepath.Join(b, "d/mode"), 0o600))
	require.NoError(t, os.Remove(filepath.Join(b, "target")))
	write(t, b, "target", "a file")
	ctx := context.Background()
	s := shown{"a": a, "b": b}
	ta, err := VolumeTree(ctx, s, "a")
	require.NoError(t, err)
	tb, err := VolumeTree(ctx, s, "b")
	require.NoError(t, err)
	var got []Difference
	require.NoError(t, Diff(ctx, ta, "/", tb, "/", func(d Difference) error { got = append(got, d); return nil }))
	require.Equal(t, []Difference{
		{Path: "/d/content", What: []string{"content"}}, {Path: "/d/mode", What: []string{"mode"}}, {Path: "/only-a", Only: 1}, {Path: "/only-b", Only: 2},
		{Path: "/target", What: []string{"type"}},
	}, got)
	for p, same := range map[string]bool{"/same": true, "/d/content": false, "/d/mode": false, "/target": false, "/none": true, "/only-a": false} {
		pa, _, err := ta.Fingerprint(ctx, p)
		require.NoError(t, err)
		pb, _, err := tb.Fingerprint(ctx, p)
		require.NoError(t, err)
		require.Equal(t, same, pa == pb, p)
	}
	require.NoError(t, ta.Close())
	require.NoError(t, tb.Close())
}

// TestAnFstabThatCanNotBeRead: another volume's is not taken for the guest's.
func TestAnFstabThatCanNotBeRead(t *testing.T) {
	needRoot(t)
	a, b := t.TempDir(), t.TempDir()
	for _, dir := range []string{a, b} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, "etc"), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "etc/fstab"), []byte("/dev/vda1 / ext4 defaults 0 1\n"), 0o644))
	}
	l := Layout{Volumes: []Volume{
		{Name: "vda/p1", FS: FS{TypeExt, "A", ""}, Extents: []Extent{{"vda", 0, 1}}},
		{Name: "vdb/p1", FS: FS{TypeExt, "B", ""}, Extents: []Extent{{"vdb", 0, 1}}},
	}}
	fstab := filepath.Join(a, "etc/fstab")
	require.NoError(t, unix.Mount("/proc/self/mem", fstab, "", unix.MS_BIND, "")) // reading it is EIO
	defer func() { require.NoError(t, unix.Unmount(fstab, unix.MNT_DETACH)) }()
	_, err := os.ReadFile(fstab)
	require.ErrorIs(t, err, unix.EIO)
	_, _, err = GuestTree(context.Background(), shown{"vda/p1": a, "vdb/p1": b}, l)
	require.ErrorIs(t, err, unix.EIO)
	require.ErrorContains(t, err, "name a volume")
}

// TestTheOnlyOneIsNoRootBesideAProblem: what could not be found may be the guest's root, and what is left is not taken for it.
func TestTheOnlyOneIsNoRootBesideAProblem(t *testing.T) {
	l := Layout{Volumes: []Volume{{Name: "vda/p1", FS: FS{TypeExt, "A", ""}, Extents: []Extent{{"vda", 0, 1}}}}}
	s := shown{"vda/p1": t.TempDir()}
	tr, _, err := GuestTree(context.Background(), s, l)
	require.NoError(t, err)
	require.NoError(t, tr.Close())
	l.Problems = []error{ErrLayout}
	_, _, err = GuestTree(context.Background(), s, l)
	require.ErrorContains(t, err, "name one of vda/p1")
}
