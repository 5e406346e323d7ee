package fuzz

import (
	"errors"
	"testing"

	"github.com/tidemark-cdp/tidemark/restore/guestfs"
)

// sparseDisk is a guest's disk: its beginning, its end, and zeroes between them.
type sparseDisk struct{ head, tail []byte }

func (d sparseDisk) Size() int64 { return 64 << 20 }

func (d sparseDisk) ReadAt(p []byte, off int64) error {
	if off < 0 || off > d.Size()-int64(len(p)) {
		return errors.New("read outside of the disk")
	}
	clear(p)
	if off < int64(len(d.head)) {
		copy(p, d.head[off:])
	}
	if from := d.Size() - int64(len(d.tail)); off+int64(len(p)) > from {
		if off >= from {
			copy(p, d.tail[off-from:])
		} else {
			copy(p[from-off:], d.tail)
		}
	}
	return nil
}

// FuzzLayout reads partition tables and LVM metadata: no panic, and nothing that lies outside of the disk.
func FuzzLayout(f *testing.F) {
	mbr := make([]byte, 1024)
	copy(mbr[446:], "\x80\x00\x00\x00\x83\x00\x00\x00\x00\x08\x00\x00\x00\x10\x00\x00")
	mbr[510], mbr[511] = 0x55, 0xaa
	f.Add(mbr, []byte{})
	f.Add(append(make([]byte, 512), "EFI PART\x00\x00\x01\x00\x5c\x00\x00\x00"...), []byte("EFI PART"))
	f.Add(append(make([]byte, 512), "LABELONE\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x20\x00\x00\x00LVM2 001"...), []byte{})
	f.Fuzz(func(t *testing.T, head, tail []byte) {
		disks := map[string]guestfs.Disk{"vda": sparseDisk{head, tail}}
		l, err := guestfs.Read(disks)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range l.Volumes {
			if _, err := v.Open(disks); err != nil {
				t.Fatalf("%+v: %v", v, err)
			}
		}
	})
}
