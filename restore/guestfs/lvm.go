package guestfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"sort"
)

// LVM2 as lib/format_text/layout.h and lib/label/label.h of LVM2 have it: a label in one of the first four sectors leads to a header,
// which lists areas of data and of metadata. A metadata area is a ring with a header, which leads to the text of the volume group.
const (
	labelSize   = 32
	mdaHeader   = 512
	mdaMagic    = " LVM2 x[5A%r0N*>"
	maxMetadata = 16 << 20 // bytes of text
	maxAreas    = 16
	maxSegments = 65536 // of a logical volume
	maxExtents  = 1 << 20
)

// lvmSum is LVM's checksum: CRC-32 without the last inversion, from a value of its own.
func lvmSum(b []byte) uint32 {
	const initial = 0xf597a6cf
	return ^crc32.Update(^uint32(initial), crc32.IEEETable, b)
}

// physical is a physical volume with the metadata that stands on it.
type physical struct {
	v    Volume
	uuid string
	text []byte // of the volume group; nil if it has none
}

// readPhysical reads the label and the metadata of a physical volume.
func readPhysical(d Disk) (p physical, err error) {
	at, b, err := findLabel(d)
	if err != nil {
		return p, err
	}
	le := binary.LittleEndian
	off := int(le.Uint32(b[20:]))
	if off < labelSize || off > sector-40 {
		return p, fmt.Errorf("%w: label at %d leads to %d", ErrLayout, at, off)
	}
	p.uuid = string(b[off : off+32])
	areas := b[off+40:]
	// The areas of data, then those of metadata; each list ends with zeroes.
	for list := 0; list < 2; list++ {
		for n := 0; ; n++ {
			if len(areas) < 16 || n > maxAreas {
				return p, fmt.Errorf("%w: the areas of the label at %d do not end", ErrLayout, at)
			}
			start, size := le.Uint64(areas), le.Uint64(areas[8:])
			areas = areas[16:]
			if start == 0 {
				break
			}
			if list == 1 && p.text == nil {
				if p.text, err = readMetadata(d, start, size); err != nil {
					return p, err
				}
			}
		}
	}
	return p, nil
}

func findLabel(d Disk) (at int64, b []byte, err error) {
	for i := range int64(4) {
		if b, err = read(d, i*sector, sector); err != nil {
			return 0, nil, err
		}
		if string(b[:8]) != "LABELONE" || string(b[24:32]) != "LVM2 001" {
			continue
		}
		le := binary.LittleEndian
		if le.Uint64(b[8:]) != uint64(i) || lvmSum(b[20:]) != le.Uint32(b[16:]) {
			return 0, nil, fmt.Errorf("%w: the label at %d is damaged", ErrLayout, i*sector)
		}
		return i * sector, b, nil
	}
	return 0, nil, fmt.Errorf("%w: no label", ErrLayout)
}

// readMetadata reads the text of a metadata area; nil if it has none.
func readMetadata(d Disk, start, size uint64) ([]byte, error) {
	if start > uint64(d.Size()) || size < mdaHeader || size > uint64(d.Size())-start {
		return nil, fmt.Errorf("%w: metadata area of %d bytes at %d", ErrLayout, size, start)
	}
	h, err := read(d, int64(start), mdaHeader)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if lvmSum(h[4:]) != le.Uint32(h) || string(h[4:20]) != mdaMagic || le.Uint64(h[24:]) != start {
		return nil, fmt.Errorf("%w: the header of the metadata at %d is damaged", ErrLayout, start)
	}
	off, n, sum := le.Uint64(h[40:]), le.Uint64(h[48:]), le.Uint32(h[56:])
	if off == 0 || n == 0 || le.Uint32(h[60:])&1 != 0 {
		return nil, nil // no volume group, or one that says so elsewhere
	}
	if off < mdaHeader || off >= size || n > size-mdaHeader || n > maxMetadata {
		return nil, fmt.Errorf("%w: metadata of %d bytes at %d in an area of %d", ErrLayout, n, off, size)
	}
	// A ring: what does not fit goes on behind the header.
	k := min(n, size-off)
	text, err := read(d, int64(start+off), int(k))
	if err != nil {
		return nil, err
	}
	if k < n {
		rest, err := read(d, int64(start)+mdaHeader, int(n-k))
		if err != nil {
			return nil, err
		}
		text = append(text, rest...)
	}
	if lvmSum(text) != sum {
		return nil, fmt.Errorf("%w: the metadata at %d is damaged", ErrLayout, start+off)
	}
	return bytes.TrimRight(text, "\x00"), nil
}

// group is a volume group as its newest text has it.
type volumeGroup struct {
	name  string
	seqno int64
	conf  section
}

// logical finds the logical volumes that stand on physical ones. What can not be shown is a problem, and the others are there.
func logical(pvs []physical) (volumes []Volume, problems []error) {
	newest := map[string]volumeGroup{} // by the group's id
	byUUID := map[string]Volume{}
	twice := map[string]bool{}
	for _, p := range pvs {
		if was, ok := byUUID[p.uuid]; ok {
			// The disk of a clone that is attached: which of them is the guest's, nobody can say.
			problems = append(problems, fmt.Errorf("LVM on %s and on %s: both are the physical volume %s, and none is taken", was.Name, p.v.Name, p.uuid))
			twice[p.uuid] = true
		}
		byUUID[p.uuid] = p.v
		if p.text == nil {
			continue
		}
		g, id, err := parseGroup(p.text)
		if err != nil {
			problems = append(problems, fmt.Errorf("LVM on %s: %w", p.v.Name, err))
			continue
		}
		if was, ok := newest[id]; !ok || g.seqno > was.seqno {
			newest[id] = g
		}
	}
	for uuid := range twice {
		delete(byUUID, uuid)
	}
	ids := make([]string, 0, len(newest))
	named := map[string]int{}
	for id, g := range newest {
		ids = append(ids, id)
		named[g.name]++
	}
	sort.Strings(ids)
	for _, id := range ids {
		g := newest[id]
		if named[g.name] > 1 {
			problems = append(problems, fmt.Errorf("volume group %s (%s): another has its name, and none is taken", g.name, id))
			continue
		}
		found, err := g.volumes(byUUID)
		volumes = append(volumes, found...)
		if err != nil {
			problems = append(problems, fmt.Errorf("volume group %s: %w", g.name, err))
		}
	}
	return volumes, problems
}

func parseGroup(text []byte) (g volumeGroup, id string, err error) {
	top, err := parseConf(text)
	if err != nil {
		return g, "", err
	}
	for name, v := range top {
		s, ok := v.(section)
		if !ok {
			continue
		}
		if g.name != "" {
			return g, "", fmt.Errorf("%w: metadata of two groups", ErrLayout)
		}
		g.name, g.conf = name, s
	}
	if !lvmName(g.name) {
		return g, "", fmt.Errorf("%w: group name %q", ErrLayout, g.name)
	}
	id, _ = g.conf["id"].(string)
	g.seqno, _ = g.conf["seqno"].(int64)
	return g, id, nil
}

// lvmName tells whether LVM allows a name: it becomes a directory.
func lvmName(s string) bool {
	if s == "" || len(s) > 127 || s == "." || s == ".." || s[0] == '-' {
		return false
	}
	for _, r := range s {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '.' || r == '-' || r == '+') {
			return false
		}
	}
	return true
}

// pvPlace is where the extents of a physical volume are.
type pvPlace struct {
	v     Volume
	start int64 // bytes
	count int64 // extents
}

func (g *volumeGroup) volumes(pvs map[string]Volume) (volumes []Volume, err error) {
	size, _ := g.conf["extent_size"].(int64)
	if size <= 0 || size > 1<<32 {
		return nil, fmt.Errorf("%w: extents of %d sectors", ErrLayout, size)
	}
	size *= sector
	places, errs := g.places(pvs)
	lvs, _ := g.conf["logical_volumes"].(section)
	names := make([]string, 0, len(lvs))
	for name := range lvs {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		lv, ok := lvs[name].(section)
		if !ok || !lvmName(name) {
			errs = append(errs, fmt.Errorf("%w: logical volume %q", ErrLayout, name))
			continue
		}
		if !visible(lv) {
			continue
		}
		v, err := linear(lv, size, places)
		if err != nil {
			errs = append(errs, fmt.Errorf("logical volume %s: %w", name, err))
			continue
		}
		v.Name = g.name + "/" + name
		if volumes = append(volumes, v); len(volumes) > maxVolumes {
			break
		}
	}
	return volumes, errors.Join(errs...)
}

func visible(lv section) bool {
	status, _ := lv["status"].([]any)
	for _, s := range status {
		if s == "VISIBLE" {
			return true
		}
	}
	return false
}

// places finds the physical volumes that the group stands on, by the names its text has for them.
func (g *volumeGroup) places(pvs map[string]Volume) (places map[string]pvPlace, errs []error) {
	places = map[string]pvPlace{}
	conf, _ := g.conf["physical_volumes"].(section)
	for name, v := range conf {
		pv, _ := v.(section)
		id, _ := pv["id"].(string)
		start, _ := pv["pe_start"].(int64)
		count, _ := pv["pe_count"].(int64)
		on, ok := pvs[undash(id)]
		if !ok {
			errs = append(errs, fmt.Errorf("physical volume %s (%s) is on none of the disks", name, id))
			continue
		}
		if start < 0 || start > on.Size/sector || count < 0 {
			errs = append(errs, fmt.Errorf("%w: physical volume %s: %d extents from sector %d", ErrLayout, name, count, start))
			continue
		}
		places[name] = pvPlace{on, start * sector, count}
	}
	return places, errs
}

func undash(id string) string {
	b := make([]byte, 0, len(id))
	for i := range len(id) {
		if id[i] != '-' {
			b = append(b, id[i])
		}
	}
	return string(b)
}

// linear puts a logical volume together from its segments.
func linear(lv section, size int64, places map[string]pvPlace) (v Volume, err error) {
	count, _ := lv["segment_count"].(int64)
	if count <= 0 || count > maxSegments {
		return v, fmt.Errorf("%w: %d segments", ErrLayout, count)
	}
	var next int64 // extent
	for i := range count {
		s, ok := lv[fmt.Sprintf("segment%d", i+1)].(section)
		if !ok {
			return v, fmt.Errorf("%w: segment %d of %d is missing", ErrLayout, i+1, count)
		}
		start, _ := s["start_extent"].(int64)
		n, _ := s["extent_count"].(int64)
		if start != next || n <= 0 || n > (1<<62)/size || next > (1<<62)/size-n {
			return v, fmt.Errorf("%w: segment %d has %d extents from %d on, expected from %d", ErrLayout, i+1, n, start, next)
		}
		next += n
		on, err := segment(s, n, size, places)
		if err != nil {
			return v, err
		}
		if v.Extents = append(v.Extents, on...); len(v.Extents) > maxExtents {
			return v, fmt.Errorf("%w: too many extents", ErrLayout)
		}
	}
	v.Size = next * size
	return v, nil
}

// segment is where the extents of a linear segment are: LVM calls it striped, with one stripe.
func segment(s section, n, size int64, places map[string]pvPlace) ([]Extent, error) {
	typ, _ := s["type"].(string)
	stripes, _ := s["stripes"].([]any)
	count, _ := s["stripe_count"].(int64)
	if typ != "striped" || count != 1 || len(stripes) != 2 {
		return nil, fmt.Errorf("a segment of type %q with %d stripes: only linear volumes are shown (disk.raw has everything)", typ, count)
	}
	name, _ := stripes[0].(string)
	first, _ := stripes[1].(int64)
	pv, ok := places[name]
	if !ok {
		return nil, fmt.Errorf("it stands on physical volume %q, which is missing", name)
	}
	if first < 0 || n > pv.count || first > pv.count-n || pv.start > pv.v.Size || (first+n) > (pv.v.Size-pv.start)/size {
		return nil, fmt.Errorf("%w: %d extents from %d on of physical volume %s, which has %d", ErrLayout, n, first, name, pv.count)
	}
	return cut(pv.v.Extents, pv.start+first*size, n*size), nil
}

// cut is a part of a run of extents.
func cut(all []Extent, off, n int64) (part []Extent) {
	for _, e := range all {
		if n == 0 {
			break
		}
		if off >= e.Len {
			off -= e.Len
			continue
		}
		k := min(n, e.Len-off)
		part = append(part, Extent{e.Disk, e.Off + off, k})
		off, n = 0, n-k
	}
	return part
}
