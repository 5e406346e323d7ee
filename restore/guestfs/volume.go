package guestfs

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
)

// Disk is a guest's disk, as it was.
type Disk interface {
	Size() int64
	// ReadAt fills p.
	ReadAt(p []byte, off int64) error
}

// Extent is a run of a disk, in bytes.
type Extent struct {
	Disk     string
	Off, Len int64
}

// Volume is what a file system may stand on: a disk, a partition or a logical volume.
type Volume struct {
	Name    string // vda, vda/p1, vg0/root
	Size    int64
	Extents []Extent // together the volume, in its order
	FS      FS

	PartUUID, PartLabel string // of a partition, if its table has them
}

// Layout is what the disks of a guest hold.
type Layout struct {
	Volumes  []Volume // by name
	Problems []error  // what could not be read; the rest is there
}

// ErrLayout is wrapped by what is wrong with a partition table or LVM metadata.
var ErrLayout = errors.New("malformed")

const (
	// sector is what partition tables and LVM count in, in bytes.
	sector = 512
	// maxVolumes bounds the volumes of a guest.
	maxVolumes = 4096
)

// Read finds the volumes of a guest's disks, by their names. It trusts nothing that it reads; an I/O error of a disk is its error.
func Read(disks map[string]Disk) (Layout, error) {
	var l Layout
	var pvs []physical
	names := make([]string, 0, len(disks))
	for name := range disks {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		parts, err := partitions(name, disks[name])
		if errors.Is(err, ErrLayout) {
			l.Problems = append(l.Problems, fmt.Errorf("disk %s: %w", name, err))
		} else if err != nil {
			return l, fmt.Errorf("disk %s: %w", name, err)
		}
		for _, v := range parts {
			s := &volumeReader{v, disks}
			if v.FS, err = identify(s); err != nil {
				return l, fmt.Errorf("%s: %w", v.Name, err)
			}
			if v.FS.Type == TypeLVM {
				pv, err := readPhysical(s)
				if errors.Is(err, ErrLayout) {
					l.Problems = append(l.Problems, fmt.Errorf("LVM on %s: %w", v.Name, err))
				} else if err != nil {
					return l, fmt.Errorf("%s: %w", v.Name, err)
				} else {
					pv.v = v
					pvs = append(pvs, pv)
				}
			}
			l.Volumes = append(l.Volumes, v)
		}
	}
	if err := l.addLogical(pvs, disks); err != nil {
		return l, err
	}
	if len(l.Volumes) > maxVolumes {
		l.Problems = append(l.Problems, fmt.Errorf("%w: %d volumes: the first %d are shown", ErrLayout, len(l.Volumes), maxVolumes))
		l.Volumes = l.Volumes[:maxVolumes]
	}
	sort.SliceStable(l.Volumes, func(i, j int) bool { return l.Volumes[i].Name < l.Volumes[j].Name })
	return l, nil
}

// addLogical adds the logical volumes that stand on physical ones.
func (l *Layout) addLogical(pvs []physical, disks map[string]Disk) error {
	volumes, problems := logical(pvs)
	l.Problems = append(l.Problems, problems...)
	taken := map[string]bool{}
	for name := range disks {
		taken[name] = true
	}
	for _, v := range volumes {
		if group, rest, _ := cutName(v.Name); taken[group] {
			v.Name = group + "~lvm/" + rest // a disk has the name
		}
		var err error
		if v.FS, err = identify(&volumeReader{v, disks}); err != nil {
			return fmt.Errorf("%s: %w", v.Name, err)
		}
		l.Volumes = append(l.Volumes, v)
	}
	return nil
}

// Divided reports whether a volume is there to have others on it: a disk with partitions, or a part of LVM.
func (l Layout) Divided(v Volume) bool {
	if v.FS.Type == TypeLVM {
		return true
	}
	return v.FS.Type == TypeNone && slices.ContainsFunc(l.Volumes, func(o Volume) bool { return strings.HasPrefix(o.Name, v.Name+"/") })
}

func cutName(name string) (first, rest string, ok bool) {
	for i := range name {
		if name[i] == '/' {
			return name[:i], name[i+1:], true
		}
	}
	return name, "", false
}

// Unsupported is why the files of a volume can not be shown; nil if they can.
func (v Volume) Unsupported() error {
	if v.FS.Readable() {
		return nil
	}
	what := v.FS.Type
	if what == TypeNone {
		what = "nothing that is known"
	}
	return fmt.Errorf("volume %s holds %s: %w: %s are; disk.raw has all of the disk", v.Name, what, ErrUnsupported, Supported)
}

// Open is a volume as a disk of its own.
func (v Volume) Open(disks map[string]Disk) (Disk, error) {
	var n int64
	for _, e := range v.Extents {
		d := disks[e.Disk]
		if d == nil || e.Off < 0 || e.Len < 0 || e.Off > d.Size()-e.Len {
			return nil, fmt.Errorf("volume %s: %w: an extent lies outside of disk %s", v.Name, ErrLayout, e.Disk)
		}
		n += e.Len
	}
	if n != v.Size {
		return nil, fmt.Errorf("volume %s: %w: its extents have %d bytes, it %d", v.Name, ErrLayout, n, v.Size)
	}
	return &volumeReader{v, disks}, nil
}

// volumeReader reads a volume by way of its extents.
type volumeReader struct {
	v     Volume
	disks map[string]Disk
}

func (r *volumeReader) Size() int64 { return r.v.Size }

// each calls fn with the parts of the disks that a range of the volume stands on.
func (r *volumeReader) each(off, n int64, fn func(d Disk, off, n int64) error) error {
	if off < 0 || n < 0 || off > r.v.Size-n {
		return fmt.Errorf("%d bytes at %d of volume %s: its size is %d: %w", n, off, r.v.Name, r.v.Size, io.ErrUnexpectedEOF)
	}
	for _, e := range r.v.Extents {
		if n == 0 {
			break
		}
		if off >= e.Len {
			off -= e.Len
			continue
		}
		k := min(n, e.Len-off)
		if err := fn(r.disks[e.Disk], e.Off+off, k); err != nil {
			return err
		}
		off, n = 0, n-k
	}
	return nil
}

func (r *volumeReader) ReadAt(p []byte, off int64) error {
	return r.each(off, int64(len(p)), func(d Disk, off, n int64) error {
		part := p[:n]
		p = p[n:]
		return d.ReadAt(part, off)
	})
}

// Sparse is what a Disk implements that knows its holes.
type Sparse interface {
	// Extents calls fn with runs that together fill the range, and whether
	// each is known to be zeroes.
	Extents(off, n int64, fn func(n int64, zero bool)) error
}

// Extents tells holes where the disks do.
func (r *volumeReader) Extents(off, n int64, fn func(n int64, zero bool)) error {
	return r.each(off, n, func(d Disk, off, n int64) error {
		if s, ok := d.(Sparse); ok {
			return s.Extents(off, n, fn)
		}
		fn(n, false)
		return nil
	})
}

// read reads n bytes at off; ErrLayout if the disk ends before.
func read(d Disk, off int64, n int) ([]byte, error) {
	if off < 0 || off > d.Size()-int64(n) {
		return nil, fmt.Errorf("%w: it leads behind the end, to %d of %d bytes", ErrLayout, off, d.Size())
	}
	b := make([]byte, n)
	return b, d.ReadAt(b, off)
}
