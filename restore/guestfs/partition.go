package guestfs

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"strings"
	"unicode/utf16"
)

// maxParts bounds the partitions of a disk: Linux knows no more than 256.
const maxParts = 256

// partitions are the volumes of a disk: those of its table, or the disk itself. A malformed table is an ErrLayout,
// beside what could be read of it.
func partitions(name string, d Disk) ([]Volume, error) {
	whole := []Volume{{Name: name, Size: d.Size(), Extents: []Extent{{name, 0, d.Size()}}}}
	if d.Size() < 2*sector {
		return whole, nil
	}
	mbr, err := read(d, 0, sector)
	if err != nil {
		return nil, err
	}
	// Without its entry in the MBR, a GPT is what is left of another time.
	if protective(mbr) {
		if parts, found, err := gpt(name, d); found || err != nil {
			if !found && errors.Is(err, ErrLayout) {
				parts = whole
			}
			return parts, err
		}
	}
	if !hasTable(mbr) {
		return whole, nil
	}
	return mbrParts(name, d, mbr)
}

func part(disk string, n int, off, size int64) Volume {
	return Volume{Name: fmt.Sprintf("%s/p%d", disk, n), Size: size, Extents: []Extent{{disk, off, size}}}
}

// The master boot record: four entries of 16 bytes at 446, the signature 55 aa at 510. Of an entry: its type
// at 4, its first sector at 8, its sectors at 12, little-endian.

type mbrEntry struct {
	typ         byte
	first, size int64 // bytes
}

func mbrEntries(b []byte) (e [4]mbrEntry) {
	for i := range e {
		p := b[446+16*i:]
		e[i] = mbrEntry{p[4], int64(binary.LittleEndian.Uint32(p[8:])) * sector, int64(binary.LittleEndian.Uint32(p[12:])) * sector}
	}
	return e
}

func extended(typ byte) bool { return typ == 0x05 || typ == 0x0f || typ == 0x85 }

func protective(b []byte) bool {
	if b[510] != 0x55 || b[511] != 0xaa {
		return false
	}
	for _, e := range mbrEntries(b) {
		if e.typ == 0xee {
			return true
		}
	}
	return false
}

// hasTable tells a partition table from a boot sector, which has the same signature: a FAT or NTFS volume without partitions
// begins with a jump, and has what a table would be full of code or text.
func hasTable(b []byte) bool {
	if b[510] != 0x55 || b[511] != 0xaa {
		return false
	}
	used := false
	for i, e := range mbrEntries(b) {
		if boot := b[446+16*i]; boot != 0 && boot != 0x80 {
			return false
		}
		if e.typ != 0 && e.size != 0 {
			used = true
			if e.first == 0 {
				return false
			}
		}
	}
	return used
}

func mbrParts(name string, d Disk, b []byte) (parts []Volume, err error) {
	var errs []error
	for i, e := range mbrEntries(b) {
		switch {
		case e.typ == 0 || e.size == 0:
		case e.first >= d.Size():
			errs = append(errs, fmt.Errorf("%w: partition %d begins at %d, behind the disk's end at %d", ErrLayout, i+1, e.first, d.Size()))
		case extended(e.typ):
			logical, err := logicalParts(name, d, e)
			if err != nil && !errors.Is(err, ErrLayout) {
				return nil, err
			}
			parts, errs = append(parts, logical...), append(errs, err)
		default:
			parts = append(parts, part(name, i+1, e.first, min(e.size, d.Size()-e.first)))
		}
	}
	return parts, errors.Join(errs...)
}

// logicalParts follows the chain of boot records in an extended partition: in each, the first entry is a partition, relative to the record, and
// the second leads to the next record, relative to the extended partition.
func logicalParts(name string, d Disk, ext mbrEntry) (parts []Volume, err error) {
	seen := map[int64]bool{}
	for at := ext.first; ; {
		if seen[at] || len(seen) >= maxParts {
			return parts, fmt.Errorf("%w: the chain of logical partitions does not end", ErrLayout)
		}
		seen[at] = true
		b, err := read(d, at, sector)
		if err != nil {
			return parts, err
		}
		if b[510] != 0x55 || b[511] != 0xaa {
			return parts, fmt.Errorf("%w: no boot record of logical partition %d at %d", ErrLayout, 5+len(parts), at)
		}
		e := mbrEntries(b)
		if e[0].typ != 0 && e[0].size != 0 {
			first := at + e[0].first
			if first >= d.Size() {
				return parts, fmt.Errorf("%w: logical partition %d begins at %d, behind the disk's end", ErrLayout, 5+len(parts), first)
			}
			parts = append(parts, part(name, 5+len(parts), first, min(e[0].size, d.Size()-first)))
		}
		if !extended(e[1].typ) || e[1].size == 0 {
			return parts, nil
		}
		at = ext.first + e[1].first
	}
}

// GPT: UEFI Specification 2.10, chapter 5. The header stands in the second sector, whose size is found by looking, and again in the
// last one; checksums say which of them is whole.
const (
	gptSignature  = "EFI PART"
	gptHeaderSize = 92
	maxGPTEntries = 1024
	maxGPTEntry   = 4096 // bytes
)

// gpt reads a GUID partition table; found is false if there is none. It is an ErrLayout if there is one and no copy of it is whole.
func gpt(name string, d Disk) (parts []Volume, found bool, err error) {
	var errs []error
	for _, lba := range []int64{512, 4096} {
		for _, at := range []int64{lba, (d.Size()/lba - 1) * lba} {
			if at < lba || at+gptHeaderSize > d.Size() {
				continue
			}
			h, err := read(d, at, gptHeaderSize)
			if err != nil {
				return nil, false, err
			}
			if string(h[:8]) != gptSignature {
				continue
			}
			parts, err := gptAt(name, d, h, at, lba)
			if err == nil {
				return parts, true, nil
			}
			if !errors.Is(err, ErrLayout) {
				return nil, false, err
			}
			errs = append(errs, err)
		}
	}
	return nil, false, errors.Join(errs...)
}

func gptAt(name string, d Disk, h []byte, at, lba int64) (parts []Volume, err error) {
	le := binary.LittleEndian
	size := le.Uint32(h[12:])
	if size < gptHeaderSize || int64(size) > lba {
		return nil, fmt.Errorf("%w: GPT header of %d bytes", ErrLayout, size)
	}
	whole, err := read(d, at, int(size))
	if err != nil {
		return nil, err
	}
	sum := le.Uint32(whole[16:])
	clear(whole[16:20])
	if crc32.ChecksumIEEE(whole) != sum || int64(le.Uint64(h[24:])) != at/lba {
		return nil, fmt.Errorf("%w: the GPT header at %d is damaged", ErrLayout, at)
	}
	first, count, entry := le.Uint64(h[72:]), le.Uint32(h[80:]), le.Uint32(h[84:])
	if count > maxGPTEntries || entry < 128 || entry > maxGPTEntry || first > uint64(d.Size()/lba) {
		return nil, fmt.Errorf("%w: GPT of %d entries of %d bytes at sector %d", ErrLayout, count, entry, first)
	}
	table, err := read(d, int64(first)*lba, int(count*entry))
	if err != nil {
		return nil, err
	}
	if crc32.ChecksumIEEE(table) != le.Uint32(h[88:]) {
		return nil, fmt.Errorf("%w: the entries of the GPT at %d are damaged", ErrLayout, at)
	}
	sectors := uint64(d.Size() / lba)
	for i := range int(count) {
		e := table[i*int(entry):][:entry]
		if bytes.Equal(e[:16], make([]byte, 16)) {
			continue
		}
		from, to := le.Uint64(e[32:]), le.Uint64(e[40:])
		if from == 0 || from > to || to >= sectors {
			return nil, fmt.Errorf("%w: GPT partition %d from sector %d to %d of %d", ErrLayout, i+1, from, to, sectors)
		}
		v := part(name, i+1, int64(from)*lba, int64(to-from+1)*lba)
		v.PartUUID, v.PartLabel = guid(e[16:32]), utf16Name(e[56:128])
		if parts = append(parts, v); len(parts) == maxParts {
			break
		}
	}
	return parts, nil
}

// guid is a GUID as text: its first three fields are little-endian.
func guid(b []byte) string {
	g := []byte{b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6]}
	g = append(g, b[8:16]...)
	return dashed(g)
}

func dashed(b []byte) string {
	s := hex.EncodeToString(b)
	return strings.Join([]string{s[:8], s[8:12], s[12:16], s[16:20], s[20:]}, "-")
}

func utf16Name(b []byte) string {
	var u []uint16
	for ; len(b) >= 2; b = b[2:] {
		c := binary.LittleEndian.Uint16(b)
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u))
}
