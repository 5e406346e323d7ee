package guestfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/tidemark-cdp/tidemark/nbd"
	"github.com/tidemark-cdp/tidemark/restore/internal/inventory"
	"github.com/tidemark-cdp/tidemark/restore/mount"
)

// file is an image in a file.
type file struct {
	*os.File
	size int64
}

func (f file) Size() int64 { return f.size }

func (f file) ReadAt(p []byte, off int64) error {
	_, err := f.File.ReadAt(p, off)
	return err
}

func openFile(t testing.TB, path string) file {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	t.Cleanup(func() { _ = f.Close() })
	info, err := f.Stat()
	require.NoError(t, err)
	return file{f, info.Size()}
}

// zoo makes files of every kind that a file system of Unix has, and some that are hard to read.
const zoo = `
set -e
umask 022
mkdir many deep names links holes
i=0; while [ $i -lt $MANY ]; do echo "file $i" >many/a-rather-long-name-so-that-the-directory-grows-$i; i=$((i+1)); done
d=deep; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do d=$d/level-$i; mkdir $d; echo $i >$d/f; done
for n in 'with space' 'ünïcode' '日本語の名前' 'кириллица' 'עברית' '🌊tide' '-dash' '.hidden' 'new
line' 'trailing.'; do echo "$n" >"names/$n"; done
head -c 255 /dev/zero | tr '\0' n >/tmp/zoo.name.$$; : >"names/$(cat /tmp/zoo.name.$$)"; rm /tmp/zoo.name.$$
head -c 20 /dev/urandom >tiny
head -c 3000 /dev/urandom >small
head -c 5000000 /dev/urandom >large
truncate -s 1M holes/empty
truncate -s $SPARSE holes/big; printf x | dd of=holes/big bs=1 seek=$((SPARSE-1)) conv=notrunc status=none
printf y | dd of=holes/big bs=1 seek=123456789 conv=notrunc status=none
dd if=/dev/urandom of=frag-a bs=4k count=1 status=none; : >frag-b
i=0; while [ $i -lt 300 ]; do dd if=/dev/urandom bs=4k count=1 status=none >>frag-a; dd if=/dev/urandom bs=4k count=1 status=none >>frag-b; [ $((i%50)) -ne 0 ] || sync -f .; i=$((i+1)); done
`

const zooUnix = `
echo linked >links/one; ln links/one links/two; ln links/one deep/three
ln -s one links/fast; ln -s "$(head -c 200 /dev/zero | tr '\0' s)" links/slow; ln -s ../../../../../etc/passwd links/out; ln -s /links/one links/abs
mkfifo fifo; mknod node c 1 3
chmod 4755 small; chmod 0 tiny; chown 1000:1001 large; chmod 1777 names
touch -d '1999-12-31 23:59:59' large; touch -h -d '2001-01-01' links/fast
`

const zooXattr = `
python3 - <<'X'
import os
os.setxattr('small', 'user.short', b'v'); os.setxattr('large', 'user.long', b'x' * 700); os.setxattr('many', 'user.dir', b'\0\1\2'); os.setxattr('small', 'security.selinux', b'system_u:object_r:etc_t:s0\0')
X
`

// zooSubvolumes has files of one number, each with several names, in two subvolumes.
const zooSubvolumes = `
for s in sa sb; do btrfs subvolume create $s >/dev/null; echo "of $s" >$s/f; ln $s/f $s/g; done
`

type kind struct {
	name  string
	mkfs  []string
	mount string // type for mount
	parts []string
	dirty bool // a copy made while it is mounted is one that recovery makes good
	size  int64
}

var kinds = []kind{
	{"ext4", []string{"mkfs.ext4", "-q", "-F", "-O", "inline_data", "-I", "256"}, "ext4", []string{zoo, zooUnix, zooXattr}, true, 512 << 20},
	{"ext4-1k", []string{"mkfs.ext4", "-q", "-F", "-b", "1024", "-O", "^extent,^64bit"}, "ext4", []string{zoo, zooUnix, zooXattr}, true, 256 << 20},
	{"ext3", []string{"mkfs.ext3", "-q", "-F"}, "ext3", []string{zoo, zooUnix, zooXattr}, true, 512 << 20},
	{"ext2", []string{"mkfs.ext2", "-q", "-F"}, "ext2", []string{zoo, zooUnix, zooXattr}, false, 512 << 20},
	{"xfs", []string{"mkfs.xfs", "-q", "-f"}, "xfs", []string{zoo, zooUnix, zooXattr}, true, 512 << 20},
	{"btrfs", []string{"mkfs.btrfs", "-q", "-f"}, "btrfs", []string{zoo, zooUnix, zooXattr, zooSubvolumes}, true, 512 << 20},
	{"ntfs", []string{"mkfs.ntfs", "-q", "-F", "-f"}, "ntfs-3g", nil, false, 256 << 20},
}

const zooPlain = `
set -e
mkdir many deep; i=0; while [ $i -lt 300 ]; do echo "file $i" >many/a-rather-long-name-$i; i=$((i+1)); done
for n in 'with space' 'ünïcode in a long name' '日本語の名前' 'кириллица in a long name'; do echo "$n" >"$n"; done
head -c 5000000 /dev/urandom >large; head -c 20 /dev/urandom >tiny; : >empty
`

// population is an image with a zoo: one of a clean file system, and, of those that can be, one as a power cut leaves it.
type population struct {
	clean, dirty string
}

func populate(t testing.TB, k kind, many int, large int64) (p population) {
	t.Helper()
	needRoot(t)
	need(t, k.mkfs[0], "losetup", "mount", "python3")
	p.clean = sparse(t, k.size)
	tool(t, "", k.mkfs[0], append(k.mkfs[1:], p.clean)...)
	mnt := t.TempDir()
	loop := strings.TrimSpace(tool(t, "", "losetup", "-f", "--show", p.clean))
	attached := true
	defer func() {
		if attached {
			_ = exec.Command("umount", mnt).Run()
			_ = exec.Command("losetup", "-d", loop).Run()
		}
	}()
	tool(t, "", "mount", "-t", k.mount, loop, mnt)
	script := strings.Join(k.parts, "")
	if script == "" {
		script = zooPlain
	}
	env := fmt.Sprintf("MANY=%d\nSPARSE=%d\ncd '%s'\n", many, large, mnt)
	tool(t, env+script, "sh", "-e")
	if k.dirty {
		// Synced files, then more that were synced alone, and one that is open and has no name: then the power goes.
		tool(t, "", "sync", "-f", mnt)
		open, err := os.Create(filepath.Join(mnt, "deleted-while-open"))
		require.NoError(t, err)
		_, err = open.Write(bytes.Repeat([]byte("gone"), 100000))
		require.NoError(t, err)
		require.NoError(t, open.Sync())
		require.NoError(t, os.Remove(open.Name()))
		tool(t, "cd '"+mnt+"'; rm -r deep/level-1/level-2; mkdir after; i=0; while [ $i -lt 50 ]; do echo $i >after/$i; i=$((i+1)); done; mv small after/moved; sync after/* after .", "sh", "-e")
		p.dirty = sparse(t, k.size)
		// What the kernel has not written to the device is lost: the loop device is read past the file system.
		tool(t, "", "dd", "if="+p.clean, "of="+p.dirty, "bs=1M", "conv=sparse,notrunc", "status=none")
		require.NoError(t, open.Close())
	}
	tool(t, "", "umount", mnt)
	tool(t, "", "losetup", "-d", loop)
	attached = false
	released(t, p.clean)
	return p
}

// released waits until no loop device has the image: a name space that another process made while it was mounted has that
// mount, too, and the file system's last write comes when that one ends.
func released(t testing.TB, image string) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for strings.TrimSpace(tool(t, "", "losetup", "-j", image)) != "" {
		require.True(t, time.Now().Before(deadline), "%s is still attached: who has it mounted?", image)
		time.Sleep(10 * time.Millisecond)
	}
}

// reference is what the kernel's own mount of a copy shows.
func reference(t testing.TB, k kind, image string) map[string]inventory.Entry {
	t.Helper()
	copied := sparse(t, k.size)
	tool(t, "", "dd", "if="+image, "of="+copied, "bs=1M", "conv=sparse,notrunc", "status=none")
	mnt := t.TempDir()
	loop := strings.TrimSpace(tool(t, "", "losetup", "-f", "--show", copied))
	defer func() { _ = exec.Command("losetup", "-d", loop).Run() }()
	options := "ro"
	if k.mount == "xfs" {
		options = "ro,nouuid"
	}
	tool(t, "", "mount", "-t", k.mount, "-o", options, loop, mnt)
	defer tool(t, "", "umount", mnt)
	return take(t, mnt)
}

// devices opens volumes of disks, under overlays. Its files are in dir.
func devices(disks map[string]Disk, dir string) func(Volume) (nbd.Device, error) {
	return func(v Volume) (nbd.Device, error) { return NewDevice(v, disks, dir) }
}

// kernelWay is the way by the kernel.
func kernelWay(t testing.TB, disks map[string]Disk) Way {
	needRoot(t)
	dir := t.TempDir()
	d, err := mount.ServeDevices(dir)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	open := devices(disks, t.TempDir())
	return &Kernel{Dir: t.TempDir(), Attach: func(v Volume) (string, func(), error) {
		dev, err := open(v)
		if err != nil {
			return "", nil, err
		}
		path, detach, err := d.Add(dev)
		if err != nil {
			return "", nil, errors.Join(err, dev.Close())
		}
		return path, func() {
			detach()
			require.NoError(t, dev.Close())
		}, nil
	}}
}

// open opens the volumes of disks.
func open(t testing.TB, w Way, disks map[string]Disk) Opened {
	t.Helper()
	l, err := Read(disks)
	require.NoError(t, err)
	o, err := w.Open(context.Background(), l.Volumes)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, o.Close()) })
	return o
}

func take(t testing.TB, dir string) map[string]inventory.Entry {
	t.Helper()
	all, err := inventory.Of(dir)
	require.NoError(t, err)
	return all
}

func same(t testing.TB, want, got map[string]inventory.Entry) {
	t.Helper()
	require.Empty(t, inventory.Differences(want, got))
}

// TestTheKernelsWay compares every file of every kind of file system with the kernel's own mount, clean and as a power cut
// leaves it.
func TestTheKernelsWay(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			many, large := 2000, int64(1<<30)
			if k.name == "ext4" || k.name == "xfs" {
				many, large = 20000, 3<<30
			}
			p := populate(t, k, many, large)
			for name, image := range map[string]string{"clean": p.clean, "dirty": p.dirty} {
				if image == "" {
					continue
				}
				t.Run(name, func(t *testing.T) {
					want := reference(t, k, image)
					require.Greater(t, len(want), 300)
					before, err := inventory.Sum(image)
					require.NoError(t, err)
					disks := map[string]Disk{"vda": openFile(t, image)}
					dir, err := open(t, kernelWay(t, disks), disks).Dir(context.Background(), "vda")
					require.NoError(t, err)
					same(t, want, take(t, dir))
					after, err := inventory.Sum(image)
					require.NoError(t, err)
					require.Equal(t, before, after, "the disk is not written")
					if name == "dirty" {
						require.Contains(t, want, "/after/49")
						require.NotContains(t, want, "/deleted-while-open")
					}
				})
			}
		})
	}
}

// isolatedWay is the way by libguestfs. Its VM has the kernel of the tests' guest where the host has none that is installed.
func isolatedWay(t testing.TB, disks map[string]Disk) Way {
	need(t, "guestfish", "fusermount3", "qemu-system-x86_64", "depmod")
	if kernels, err := filepath.Glob("../../.cache/guest/kernel/boot/vmlinuz-*"); err != nil || len(kernels) == 0 {
		t.Skip("there is no kernel for the VM: run make guest-deps")
	}
	for line := range strings.Lines(tool(t, "", "../../testdata/libguestfs", "env")) {
		if name, value, _ := strings.Cut(strings.TrimSpace(line), "="); strings.HasPrefix(name, "LIBGUESTFS_") || strings.HasPrefix(name, "SUPERMIN_") {
			t.(*testing.T).Setenv(name, value)
		}
	}
	return &Isolated{Device: devices(disks, t.TempDir()), Dir: t.TempDir(), Log: zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel))}
}

// TestTheIsolatedWay compares every file of every kind of file system with the kernel's own mount, clean and as a power cut
// leaves it: all of them in one VM.
func TestTheIsolatedWay(t *testing.T) {
	disks := map[string]Disk{}
	w := isolatedWay(t, disks)
	want := map[string]map[string]inventory.Entry{}
	for _, k := range kinds {
		switch k.name {
		case "ext4", "xfs", "btrfs", "ntfs": // the others are the same drivers; not every host's kernel has FAT
		default:
			continue
		}
		many, large := 60, int64(200<<20)
		if k.name == "ext4" {
			many, large = 20000, 3<<30
		}
		p := populate(t, k, many, large)
		image := p.dirty
		if image == "" {
			image = p.clean
		}
		disks[k.name], want[k.name] = openFile(t, image), reference(t, k, image)
	}
	fat, files := aFAT(t)
	disks["vfat"] = fat
	disks["broken"] = broken(t)
	disks["swap"] = swap(t)
	o := open(t, w, disks)
	for name := range want {
		t.Run(name, func(t *testing.T) {
			dir, err := o.Dir(context.Background(), name)
			require.NoError(t, err)
			same(t, want[name], take(t, dir))
		})
	}
	t.Run("cp of subvolumes", func(t *testing.T) {
		tr, err := VolumeTree(context.Background(), o, "btrfs")
		require.NoError(t, err)
		defer func() { require.NoError(t, tr.Close()) }()
		to := filepath.Join(t.TempDir(), "all")
		require.NoError(t, tr.Copy(context.Background(), "/", to, CopyOptions{Owner: true}))
		for _, s := range []string{"sa", "sb"} {
			for _, name := range []string{"f", "g"} {
				b, err := os.ReadFile(filepath.Join(to, s, name))
				require.NoError(t, err)
				require.Equal(t, "of "+s+"\n", string(b), "files of one number in two subvolumes are two")
			}
		}
	})
	t.Run("vfat", func(t *testing.T) {
		dir, err := o.Dir(context.Background(), "vfat")
		require.NoError(t, err)
		got := take(t, dir)
		require.Len(t, got, len(files)+1) // and the root
		for path, w := range files {
			g := got[path]
			require.Equal(t, w.Mode.Type(), g.Mode.Type(), path)
			require.Equal(t, w.Size, g.Size, path)
			require.Equal(t, w.Sum, g.Sum, path)
		}
	})
	_, err := o.Dir(context.Background(), "broken")
	require.ErrorContains(t, err, "can not be mounted")
	_, err = o.Dir(context.Background(), "swap")
	require.ErrorIs(t, err, ErrUnsupported)
	_, err = o.Dir(context.Background(), "none")
	require.ErrorIs(t, err, os.ErrNotExist)
}

// aFAT is a FAT32 that mtools have filled, and what with: not every host's kernel has FAT. Names that are not ASCII are long ones: of short
// ones mtools and Linux have other code pages.
func aFAT(t testing.TB) (Disk, map[string]inventory.Entry) {
	t.Helper()
	need(t, "mkfs.vfat", "mcopy")
	from := t.TempDir()
	tool(t, "cd '"+from+"'\n"+zooPlain, "sh", "-e")
	image := sparse(t, 256<<20)
	tool(t, "", "mkfs.vfat", "-F", "32", image)
	tool(t, "cd '"+from+"'; LC_ALL=C.UTF-8 mcopy -s -Q -i '"+image+"' * ::", "sh", "-e")
	files := take(t, from)
	delete(files, "/.")
	return openFile(t, image), files
}

// broken is an ext4 whose superblock is not.
func broken(t testing.TB) Disk {
	need(t, "mkfs.ext4")
	path := sparse(t, 64<<20)
	tool(t, "", "mkfs.ext4", "-q", "-F", path)
	m := load(t, path)
	for i := range 300 {
		m[1024+i] ^= byte(i)
	}
	m[1024+56], m[1024+57] = 0x53, 0xef
	return m
}

func swap(t testing.TB) Disk {
	path := sparse(t, 8<<20)
	tool(t, "", "mkswap", path)
	return load(t, path)
}

// flipped is a disk with some bits that are not what they were.
type flipped struct {
	Disk
	at map[int64]byte
}

func (f flipped) ReadAt(p []byte, off int64) error {
	if err := f.Disk.ReadAt(p, off); err != nil {
		return err
	}
	for at, x := range f.at {
		if at >= off && at < off+int64(len(p)) {
			p[at-off] ^= x
		}
	}
	return nil
}

// metadata is the blocks of an image that are not zeroes, and no file's content, which has a mark.
func metadata(d image) (blocks []int64) {
	for at := 0; at+1024 <= len(d); at += 1024 {
		if b := d[at:][:1024]; !isZero(b) && !bytes.Contains(b, []byte("content")) {
			blocks = append(blocks, int64(at))
		}
	}
	return blocks
}

func isZero(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }

// flip flips one to eight bits of what is not zero in some blocks.
func flip(r *rand.Rand, d image, blocks []int64) flipped {
	f := flipped{d, map[int64]byte{}}
	for n := 1 + r.IntN(8); len(f.at) < n; {
		if at := blocks[r.IntN(len(blocks))] + int64(r.IntN(1024)); d[at] != 0 {
			f.at[at] = 1 << r.IntN(8)
		}
	}
	return f
}

// flips is how many corrupt images are read; FLIPS has more in a long test.
func flips(t testing.TB, n int) int {
	if s := os.Getenv("FLIPS"); s != "" {
		m, err := strconv.Atoi(s)
		require.NoError(t, err)
		return m
	}
	return n
}

// small is an image with some files of every kind, and little content.
func small(t testing.TB, mkfs ...string) image {
	t.Helper()
	needRoot(t)
	need(t, mkfs[0], "losetup", "mount")
	path := sparse(t, 48<<20)
	if mkfs[0] == "mkfs.xfs" {
		require.NoError(t, os.Truncate(path, 300<<20))
	}
	tool(t, "", mkfs[0], append(mkfs[1:], path)...)
	mnt := t.TempDir()
	tool(t, fmt.Sprintf(`mount -o loop '%s' '%s'; cd '%s'
mkdir -p a/b/c many; for i in $(seq 300); do echo content >many/a-name-of-some-length-$i; done; ln many/a-name-of-some-length-1 a/hard; ln -s ../many a/link
head -c 300000 /dev/zero | tr '\0' z | sed 's/zzzzzzzz/content /g' >a/b/large; truncate -s 5M a/sparse; cd /; umount '%s'`, path, mnt, mnt, mnt), "sh", "-e")
	released(t, path)
	return load(t, path)
}

// walk reads all that can be read, and returns the number of errors.
func walk(dir string) (files, errs int) {
	buf := make([]byte, 64<<10)
	_ = filepath.WalkDir(dir+"/.", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			errs++
			return nil
		}
		files++
		if files > 5000 {
			return fs.SkipAll
		}
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			_, err = os.Readlink(path)
		case d.Type().IsRegular():
			var f *os.File
			if f, err = os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0); err == nil {
				for n := 0; n < 1<<20 && err == nil; {
					var k int
					k, err = f.Read(buf)
					n += k
				}
				_ = f.Close()
			}
		}
		if err != nil && !errors.Is(err, io.EOF) {
			errs++
		}
		return nil
	})
	return files, errs
}

// tally counts what came of reading volumes: those that were refused, those whose files had errors, those whose files had none, and
// those that ended what shows them, or hung it.
type tally struct{ refused, errs, whole, ended int }

func (c tally) String() string {
	return fmt.Sprintf("refused %d, errors in %d, none in %d, ended it %d", c.refused, c.errs, c.whole, c.ended)
}

// read reads all of a volume's files, and reports whether they were shown. What hangs is broken.
func (c *tally) read(ctx context.Context, o Opened, volume string) (shown bool) {
	dir, err := o.Dir(ctx, volume)
	bad := 0
	if err == nil {
		hung := time.AfterFunc(time.Minute, o.Break)
		_, bad = walk(dir)
		hung.Stop()
	}
	switch {
	case o.Err() != nil:
		c.ended++
	case err != nil:
		c.refused++
	case bad > 0:
		c.errs++
	default:
		c.whole++
	}
	return err == nil
}

func (c *tally) add(d tally) {
	c.refused, c.errs, c.whole, c.ended = c.refused+d.refused, c.errs+d.errs, c.whole+d.whole, c.ended+d.ended
}

// counted fails if not all were read, or nothing was wrong with any.
func (c *tally) counted(t *testing.T, n int) {
	t.Helper()
	t.Log(*c)
	require.Positive(t, c.refused+c.errs)
	require.Equal(t, n, c.refused+c.errs+c.whole+c.ended)
}

// corruptible is the file systems whose bits are flipped. Btrfs and XFS check what they read; ext3 and an ext4 without checksums take
// what is there. A Btrfs has one copy of its metadata, since a second would hide what was flipped.
var corruptible = []struct {
	name string
	mkfs []string
}{
	{"ext4", []string{"mkfs.ext4", "-q", "-F"}},
	{"ext4-inline", []string{"mkfs.ext4", "-q", "-F", "-O", "inline_data,^metadata_csum"}},
	{"ext3", []string{"mkfs.ext3", "-q", "-F"}},
	{"xfs", []string{"mkfs.xfs", "-q", "-f"}},
	{"btrfs", []string{"mkfs.btrfs", "-q", "-f", "-m", "single"}},
	{"ntfs", []string{"mkfs.ntfs", "-q", "-F", "-f"}},
}

// TestCorruptImagesByTheKernel flips bits of metadata: what the kernel makes of it is errors, or files, and ends.
func TestCorruptImagesByTheKernel(t *testing.T) {
	for _, k := range corruptible {
		if k.name == "ext3" { // the driver of ext4-inline
			continue
		}
		t.Run(k.name, func(t *testing.T) {
			image := small(t, k.mkfs...)
			blocks := metadata(image)
			var c tally
			n := flips(t, 120)
			for i := range n {
				disks := map[string]Disk{"vda": flip(rand.New(rand.NewPCG(1, uint64(i))), image, blocks)}
				t.Run("", func(t *testing.T) { // so that each ends what it began
					l, err := Read(disks)
					require.NoError(t, err)
					o, err := kernelWay(t, disks).Open(context.Background(), l.Volumes)
					require.NoError(t, err)
					defer func() { require.NoError(t, o.Close()) }()
					c.read(context.Background(), o, "vda")
				})
			}
			c.counted(t, n)
		})
	}
}

// TestCorruptImagesInTheVM has some of every kind in one VM.
func TestCorruptImagesInTheVM(t *testing.T) {
	const ofAKind = 4
	var images [][]image
	var blocks [][]int64
	for _, k := range corruptible {
		all := []image{small(t, k.mkfs...)}
		for k.name == "btrfs" && len(all) < ofAKind { // a kernel takes two of one identity for one
			all = append(all, small(t, k.mkfs...))
		}
		images, blocks = append(images, all), append(blocks, metadata(all[0]))
	}
	kinds := len(corruptible)
	tallies := make([]tally, kinds)
	n := flips(t, ofAKind*kinds)
	for from := 0; from < n; from += ofAKind * kinds {
		var disks []corrupt
		for i := from; i < min(n, from+ofAKind*kinds); i++ {
			kind := i % kinds
			of := images[kind][i/kinds%len(images[kind])]
			disks = append(disks, corrupt{fmt.Sprintf("d%03d", i), flip(rand.New(rand.NewPCG(2, uint64(i))), of, blocks[kind]), &tallies[kind]})
		}
		readInVMs(t, disks)
	}
	var all tally
	for i, c := range tallies {
		t.Logf("%s: %v", corruptible[i].name, c)
		all.add(c)
	}
	all.counted(t, n)
}

// corrupt is a disk whose bits were flipped, and where what came of it is counted.
type corrupt struct {
	name string
	disk Disk
	into *tally
}

// readInVMs reads all of disks in one VM, and, if one of them ends or hangs it, those that are left in another.
func readInVMs(t *testing.T, disks []corrupt) {
	for len(disks) > 0 {
		read := readInAVM(t, disks)
		if read == 0 && len(disks) > 1 { // it did not start, and nothing says on whose account
			half := len(disks) / 2
			readInVMs(t, disks[:half])
			read = half
		}
		disks = disks[max(1, read):]
	}
}

// readInAVM reads disks in one VM, and returns how many of them it has counted before one ended it: that one too, if it was read or alone.
func readInAVM(t *testing.T, disks []corrupt) (read int) {
	all := map[string]Disk{}
	for _, d := range disks {
		all[d.name] = d.disk
	}
	l, err := Read(all)
	require.NoError(t, err)
	o, err := isolatedWay(t, all).Open(context.Background(), l.Volumes)
	require.NoError(t, err)
	defer func() { require.NoError(t, o.Close()) }()
	shown := false
	for i, d := range disks {
		got := *d.into
		shown = got.read(context.Background(), o, d.name) || shown
		if o.Err() != nil && !shown && len(disks) > 1 {
			return i
		}
		*d.into = got
		if o.Err() != nil {
			t.Logf("%s ended the VM: %v", d.name, o.Err())
			return i + 1
		}
	}
	return len(disks)
}

// TestAVMThatIsBroken: who waits for it gets an error, and so does everybody after.
func TestAVMThatIsBroken(t *testing.T) {
	disks := map[string]Disk{"vda": small(t, "mkfs.ext4", "-q", "-F")}
	o := open(t, isolatedWay(t, disks), disks)
	go func() {
		for o.(*isolatedOpened).vm.Load() == nil {
			time.Sleep(time.Millisecond)
		}
		o.Break()
	}()
	_, err := o.Dir(context.Background(), "vda")
	require.Error(t, err)
	o = open(t, isolatedWay(t, disks), disks)
	dir, err := o.Dir(context.Background(), "vda")
	require.NoError(t, err)
	require.NoError(t, o.Err())
	_, err = os.ReadFile(filepath.Join(dir, "many/a-name-of-some-length-7"))
	require.NoError(t, err)
	o.Break()
	require.Error(t, o.Err())
	_, err = os.ReadFile(filepath.Join(dir, "many/a-name-of-some-length-8"))
	require.Error(t, err)
}
