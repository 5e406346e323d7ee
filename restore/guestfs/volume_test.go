package guestfs

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// image is a disk in memory.
type image []byte

func (m image) Size() int64 { return int64(len(m)) }

func (m image) ReadAt(p []byte, off int64) error {
	if off < 0 || off > int64(len(m)-len(p)) {
		return fmt.Errorf("read outside of the disk: %d bytes at %d", len(p), off)
	}
	copy(p, m[off:])
	return nil
}

// need skips a test, by the name of what is missing, where a tool is absent.
func need(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("this machine has no %s: run make deps", tool)
		}
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("takes root: mounts and loop devices")
	}
}

func tool(t testing.TB, stdin, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, out)
	return string(out)
}

// sparse makes an empty image file.
func sparse(t testing.TB, size int64) string {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "disk")
	require.NoError(t, err)
	require.NoError(t, f.Truncate(size))
	require.NoError(t, f.Close())
	return f.Name()
}

func load(t testing.TB, path string) image {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// sfdisk is what the tool says of an image's partitions: the other reader.
func sfdisk(t *testing.T, path string) (parts []Volume) {
	t.Helper()
	var v struct {
		PartitionTable struct {
			Partitions []struct {
				Node, Type, UUID, Name string
				Start, Size            int64
			}
		}
	}
	require.NoError(t, json.Unmarshal([]byte(tool(t, "", "sfdisk", "-J", path)), &v))
	for _, p := range v.PartitionTable.Partitions {
		if p.Type == "5" || p.Type == "f" {
			continue
		}
		n := strings.TrimPrefix(p.Node, path)
		parts = append(parts, Volume{
			Name: "vda/p" + strings.TrimPrefix(n, "p"), Size: p.Size * 512, Extents: []Extent{{"vda", p.Start * 512, p.Size * 512}},
			PartUUID: strings.ToLower(p.UUID), PartLabel: p.Name,
		})
	}
	return parts
}

func readOne(t *testing.T, m image) Layout {
	t.Helper()
	l, err := Read(map[string]Disk{"vda": m})
	require.NoError(t, err)
	return l
}

func sortVolumes(all []Volume) []Volume {
	l := Layout{Volumes: all}
	for i := range l.Volumes {
		l.Volumes[i].FS = FS{}
	}
	for i := range all {
		for j := i + 1; j < len(all); j++ {
			if all[j].Name < all[i].Name {
				all[i], all[j] = all[j], all[i]
			}
		}
	}
	return all
}

const (
	gptScript = "label: gpt\nsize=8MiB, name=\"boot é\"\nsize=16MiB\nstart=40MiB, size=1MiB, name=last\n"
	mbrScript = "label: dos\nsize=8MiB, type=83\nsize=30MiB, type=5\nsize=4MiB, type=83\nstart=14MiB, size=5MiB, type=83\nstart=20MiB, size=3MiB, type=82\nsize=3MiB, type=83\n"
)

func TestPartitionsAsTheToolHasThem(t *testing.T) {
	need(t, "sfdisk")
	for name, script := range map[string]string{"gpt": gptScript, "mbr": mbrScript} {
		t.Run(name, func(t *testing.T) {
			path := sparse(t, 64<<20)
			tool(t, script, "sfdisk", "-q", path)
			l := readOne(t, load(t, path))
			require.Empty(t, l.Problems)
			want := sfdisk(t, path)
			require.Greater(t, len(want), 2)
			got := sortVolumes(l.Volumes)
			if name == "mbr" {
				for i := range want {
					want[i].PartUUID = ""
				}
			}
			require.Equal(t, sortVolumes(want), got)
		})
	}
}

// TestTheOtherGPT: a damaged header or table is made up for by the copy at the end, and without one is an error beside the whole disk.
func TestTheOtherGPT(t *testing.T) {
	need(t, "sfdisk")
	path := sparse(t, 64<<20)
	tool(t, gptScript, "sfdisk", "-q", path)
	want := readOne(t, load(t, path))
	for _, at := range []int{512 + 40, 1024 + 33} {
		m := load(t, path)
		m[at] ^= 1
		require.Equal(t, want, readOne(t, m))
		m[len(m)-512+16] ^= 1
		l := readOne(t, m)
		require.Len(t, l.Problems, 1)
		require.ErrorIs(t, l.Problems[0], ErrLayout)
		require.Len(t, l.Volumes, 1)
		require.Equal(t, "vda", l.Volumes[0].Name)
	}
}

// TestFileSystemsAreTold as blkid tells them, on disks without a table too.
func TestFileSystemsAreTold(t *testing.T) {
	for name, mk := range map[string][]string{
		TypeExt:   {"mkfs.ext4", "-q", "-F", "-L", "lab"},
		TypeXFS:   {"mkfs.xfs", "-q", "-L", "lab"},
		TypeBtrfs: {"mkfs.btrfs", "-q", "-L", "lab"},
		TypeNTFS:  {"mkfs.ntfs", "-q", "-F", "-f"},
		TypeFAT:   {"mkfs.vfat", "-n", "LAB"},
		TypeSwap:  {"mkswap", "-L", "lab"},
	} {
		t.Run(name, func(t *testing.T) {
			need(t, mk[0], "blkid")
			path := sparse(t, 320<<20)
			tool(t, "", mk[0], append(mk[1:], path)...)
			l := readOne(t, load(t, path))
			require.Empty(t, l.Problems)
			require.Len(t, l.Volumes, 1)
			got := l.Volumes[0].FS
			require.Equal(t, name, got.Type)
			require.Equal(t, strings.TrimSpace(tool(t, "", "blkid", "-p", "-o", "value", "-s", "UUID", path)), got.UUID)
			if name != TypeNTFS {
				require.Equal(t, strings.TrimSpace(tool(t, "", "blkid", "-p", "-o", "value", "-s", "LABEL", path)), got.Label)
			}
		})
	}
	for _, m := range []image{nil, make(image, 1), make(image, 511), make(image, 100<<10)} {
		l := readOne(t, m)
		require.Len(t, l.Volumes, 1)
		require.Equal(t, FS{}, l.Volumes[0].FS)
	}
}

// lvm makes a group of two physical volumes, the second one in a partition of another disk: root stands on both, in three
// segments, data on the second one. It returns the disks, and what LVM says of the segments.
func lvm(t testing.TB) (disks map[string]Disk, segments []lvmSegment) {
	needRoot(t)
	need(t, "pvcreate", "losetup", "sfdisk")
	a, b := sparse(t, 96<<20), sparse(t, 96<<20)
	tool(t, "label: gpt\nsize=80MiB\n", "sfdisk", "-q", b)
	loop := func(args ...string) string {
		dev := strings.TrimSpace(tool(t, "", "losetup", append([]string{"-f", "--show"}, args...)...))
		t.Cleanup(func() { _ = exec.Command("losetup", "-d", dev).Run() })
		return dev
	}
	la, lb := loop(a), loop("-o", "1048576", "--sizelimit", "83886080", b)
	cfg := fmt.Sprintf(`devices { scan=["/dev"] filter=["a|^%s$|","a|^%s$|","r|.*|"] use_devicesfile=0 } backup { backup=0 archive=0 } global { use_lvmpolld=0 } activation { udev_sync=0 udev_rules=0 monitoring=0 }`, la, lb)
	run := func(name string, args ...string) string {
		return tool(t, "", name, append([]string{"--config", cfg, "--driverloaded", "n"}, args...)...)
	}
	create := func(args ...string) { run("lvcreate", append([]string{"-an", "-Zn", "-Wn", "-y"}, args...)...) }
	run("pvcreate", "-ff", "-y", la, lb)
	run("vgcreate", "-s", "1m", "vg0", la, lb)
	create("-l", "10", "-n", "root", "vg0", la+":5-14")
	create("-l", "7", "-n", "data", "vg0", lb+":20-26")
	run("lvextend", "-l", "+8", "vg0/root", lb+":3-10")
	run("lvextend", "-l", "+4", "vg0/root", la+":40-43")
	create("-l", "6", "-i", "2", "-n", "striped", "vg0")
	run("lvrename", "vg0", "data", "da-ta.1")
	var v struct {
		Report []struct {
			Seg []struct {
				LV    string `json:"lv_name"`
				Start string `json:"seg_start_pe"`
				PEs   string `json:"seg_pe_ranges"`
			}
		}
	}
	out := run("lvs", "--segments", "-o", "lv_name,seg_start_pe,seg_pe_ranges", "--reportformat", "json", "vg0")
	require.NoError(t, json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &v))
	for _, s := range v.Report[0].Seg {
		if s.LV == "striped" {
			continue
		}
		dev, pes, _ := strings.Cut(s.PEs, ":")
		var seg lvmSegment
		_, err := fmt.Sscanf(s.Start+" "+pes, "%d %d-%d", &seg.start, &seg.first, &seg.last)
		require.NoError(t, err, s.PEs)
		seg.lv, seg.disk = s.LV, map[string]string{la: "vda", lb: "vdb"}[dev]
		segments = append(segments, seg)
	}
	tool(t, "", "sync")
	return map[string]Disk{"vda": load(t, a), "vdb": load(t, b)}, segments
}

type lvmSegment struct {
	lv, disk           string
	start, first, last int64
}

func TestLogicalVolumes(t *testing.T) {
	disks, segments := lvm(t)
	require.Len(t, segments, 4)
	l, err := Read(disks)
	require.NoError(t, err)
	require.Len(t, l.Problems, 1)
	require.ErrorContains(t, l.Problems[0], "only linear volumes are shown")
	want := map[string][]Extent{}
	for _, s := range segments {
		e := Extent{s.disk, (1 + s.first) << 20, (s.last - s.first + 1) << 20} // extents begin at 1 MiB
		if s.disk == "vdb" {
			e.Off += 1 << 20 // of its partition
		}
		want["vg0/"+s.lv] = append(want["vg0/"+s.lv], e)
	}
	found := 0
	for _, v := range l.Volumes {
		if w, ok := want[v.Name]; ok {
			require.Equal(t, w, v.Extents, v.Name)
			found++
			// Read by way of the volume, each extent is where it is on the disks.
			d, err := v.Open(disks)
			require.NoError(t, err)
			for off := int64(0); off < v.Size; off += 1<<20 - 4096 {
				got := make([]byte, min(8192, v.Size-off))
				require.NoError(t, d.ReadAt(got, off))
			}
			require.Error(t, d.ReadAt(make([]byte, 2), v.Size-1))
		}
	}
	require.Equal(t, 2, found)
	delete(disks, "vdb")
	l, err = Read(disks)
	require.NoError(t, err)
	text := fmt.Sprint(l.Problems)
	require.Contains(t, text, "is on none of the disks")
	require.Contains(t, text, "which is missing")
}

// TestDamagedLayouts flips bits in tables and metadata, by the thousand: what is read is a layout, perhaps with problems, whose
// volumes lie within the disks; soon, and without a panic.
func TestDamagedLayouts(t *testing.T) {
	need(t, "sfdisk")
	disks, _ := lvm(t)
	gpt, mbr := sparse(t, 64<<20), sparse(t, 64<<20)
	tool(t, gptScript, "sfdisk", "-q", gpt)
	tool(t, mbrScript, "sfdisk", "-q", mbr)
	a, b := disks["vda"].(image), disks["vdb"].(image)
	places := []struct {
		in       image
		from, to int
	}{
		{load(t, gpt), 0, 4096}, {load(t, mbr), 0, 512}, {load(t, mbr), 9 << 20, 9<<20 + 512},
		{a, 512, 1024}, {a, 4096, 4608}, {a, 4608, 12 << 10}, {b, 1<<20 + 512, 1<<20 + 1024},
	}
	rng := rand.New(rand.NewPCG(1, 2))
	began := time.Now()
	for n := range 6000 {
		p := places[n%len(places)]
		was := map[int]byte{}
		for range 1 + rng.IntN(3) {
			at := p.from + rng.IntN(p.to-p.from)
			if _, ok := was[at]; !ok {
				was[at] = p.in[at]
			}
			p.in[at] ^= 1 << rng.IntN(8)
		}
		if n%2 == 0 {
			mend(p.in) // so that what the checksums cover is looked at too
		}
		all := map[string]Disk{"vda": p.in, "vdb": b}
		l, err := Read(all)
		require.NoError(t, err)
		for _, v := range l.Volumes {
			_, err := v.Open(all)
			require.NoError(t, err, "%+v", v)
		}
		for at, x := range was {
			p.in[at] = x
		}
		if n%2 == 0 {
			mend(p.in)
		}
	}
	require.Less(t, time.Since(began), 2*time.Minute)
}

// mend makes the checksums of LVM's label, header and text right.
func mend(m image) {
	if string(m[512:520]) != "LABELONE" {
		return
	}
	put := func(at int, v uint32) {
		m[at], m[at+1], m[at+2], m[at+3] = byte(v), byte(v>>8), byte(v>>16), byte(v>>24)
	}
	put(512+16, lvmSum(m[512+20:1024]))
	le := func(at int) int { return int(m[at]) | int(m[at+1])<<8 | int(m[at+2])<<16 }
	off, n := le(4096+40), le(4096+48)
	if end := 4096 + off + n; end < len(m) {
		put(4096+56, lvmSum(m[4096+off:end]))
	}
	put(4096, lvmSum(m[4096+4:4096+512]))
}

func TestConfText(t *testing.T) {
	s, err := parseConf([]byte("# c\na { b = [\"x\\\"\", 3] # d\n c = -4 e { } }\nf=\"\""))
	require.NoError(t, err)
	require.Equal(t, section{"a": section{"b": []any{`x"`, int64(3)}, "c": int64(-4), "e": section{}}, "f": ""}, s)
	for _, bad := range []string{"a", "a {", "a = ", "a = [", "a = \"", "a = x", "}", "a = [1", "= 3", "a = \"\\", strings.Repeat("a{", 20)} {
		_, err := parseConf([]byte(bad))
		require.ErrorIs(t, err, ErrLayout, bad)
	}
}

func TestMain(m *testing.M) {
	// Debian has the tools that make file systems where only root's path leads.
	if err := os.Setenv("PATH", os.Getenv("PATH")+string(filepath.ListSeparator)+"/usr/sbin:/sbin"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// TestACloneOfAPhysicalVolume: of two that say they are the same one neither is taken, nor of two groups of one name.
func TestACloneOfAPhysicalVolume(t *testing.T) {
	text := func(id, uuid string) []byte {
		return fmt.Appendf(nil, `vg0 {
id = "%s"
seqno = 3
extent_size = 8
physical_volumes {
pv0 {
id = "%s"
pe_start = 8
pe_count = 10
}
}
logical_volumes {
root {
status = ["READ", "WRITE", "VISIBLE"]
segment_count = 1
segment1 {
start_extent = 0
extent_count = 4
type = "striped"
stripe_count = 1
stripes = ["pv0", 0]
}
}
}
}
`, id, uuid)
	}
	pv := func(disk, id, uuid string) physical {
		return physical{v: Volume{Name: disk, Size: 1 << 20, Extents: []Extent{{disk, 0, 1 << 20}}}, uuid: uuid, text: text(id, uuid)}
	}
	found, problems := logical([]physical{pv("vda", "A", "u")})
	require.Len(t, found, 1)
	require.Empty(t, problems)
	found, problems = logical([]physical{pv("vda", "A", "u"), pv("vdb", "A", "u")})
	require.Empty(t, found)
	require.ErrorContains(t, errors.Join(problems...), "vda and on vdb")
	found, problems = logical([]physical{pv("vda", "A", "u"), pv("vdb", "B", "w")})
	require.Empty(t, found)
	require.Len(t, problems, 2)
}
