package guestfs

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
)

// Types of what a volume holds.
const (
	TypeExt   = "ext" // ext2, ext3 or ext4: one driver has them all
	TypeXFS   = "xfs"
	TypeBtrfs = "btrfs"
	TypeNTFS  = "ntfs"
	TypeFAT   = "vfat"
	TypeSwap  = "swap"
	TypeLVM   = "LVM2"
	TypeLUKS  = "LUKS"
	TypeNone  = "" // nothing that is known
)

// FS says what stands on a volume.
type FS struct {
	Type        string
	UUID, Label string // as blkid and fstab write them; empty if there is none
}

// Readable reports whether files of it can be shown.
func (f FS) Readable() bool {
	switch f.Type {
	case TypeExt, TypeXFS, TypeBtrfs, TypeNTFS, TypeFAT:
		return true
	}
	return false
}

// Numbered reports whether a file's number is its own in the whole volume, and the same each time: Btrfs numbers by subvolume, FAT as
// files are looked at.
func (f FS) Numbered() bool {
	switch f.Type {
	case TypeExt, TypeXFS, TypeNTFS:
		return true
	}
	return false
}

// Supported names the file systems that can be shown.
const Supported = "ext2, ext3, ext4, XFS, Btrfs, NTFS and FAT"

// identify tells what a volume holds by its magic numbers. What they lead to is checked by who reads it.
func identify(d Disk) (FS, error) {
	const headLen = 0x10040 + 1024 // up to Btrfs' superblock
	head := make([]byte, headLen)
	n := min(int64(len(head)), d.Size())
	if err := d.ReadAt(head[:n], 0); err != nil {
		return FS{}, err
	}
	le := binary.LittleEndian
	switch {
	case string(head[:4]) == "XFSB":
		return FS{TypeXFS, dashed(head[32:48]), text(head[108:120])}, nil
	case string(head[0x10040:0x10048]) == "_BHRfS_M":
		return FS{TypeBtrfs, dashed(head[0x10020:0x10030]), text(head[0x1012b : 0x1012b+256])}, nil
	case le.Uint16(head[1024+56:]) == 0xef53:
		return FS{TypeExt, dashed(head[1024+104 : 1024+120]), text(head[1024+120 : 1024+136])}, nil
	case string(head[:6]) == "LUKS\xba\xbe":
		return FS{Type: TypeLUKS}, nil
	case string(head[4086:4096]) == "SWAPSPACE2":
		return FS{TypeSwap, dashed(head[1024+12 : 1024+28]), text(head[1024+28 : 1024+44])}, nil
	case string(head[3:11]) == "NTFS    ":
		return FS{Type: TypeNTFS, UUID: strings.ToUpper(fmt.Sprintf("%016x", le.Uint64(head[72:])))}, nil
	}
	for i := range 4 {
		if string(head[i*sector:][:8]) == "LABELONE" {
			return FS{Type: TypeLVM}, nil
		}
	}
	return fat(head), nil
}

// fat tells FAT by its boot sector: the signature, and a name where FAT12 and 16, or FAT32, have it.
func fat(head []byte) FS {
	if head[510] != 0x55 || head[511] != 0xaa || head[0] != 0xeb && head[0] != 0xe9 {
		return FS{}
	}
	at := 0
	switch {
	case bytes.HasPrefix(head[82:], []byte("FAT32")):
		at = 67
	case bytes.HasPrefix(head[54:], []byte("FAT")):
		at = 39
	default:
		return FS{}
	}
	serial := binary.LittleEndian.Uint32(head[at:])
	label := strings.TrimRight(text(head[at+4:at+15]), " ")
	if label == "NO NAME" {
		label = ""
	}
	return FS{TypeFAT, fmt.Sprintf("%04X-%04X", serial>>16, serial&0xffff), label}
}

// text is a string up to its zero byte.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return strings.ToValidUTF8(string(b), "?")
}
