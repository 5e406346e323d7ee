package wire

import (
	"encoding/binary"
	"fmt"
	"unicode/utf8"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

var le = binary.LittleEndian

func appendText(b []byte, s string) []byte {
	return append(le.AppendUint16(b, uint16(len(s))), s...)
}

func appendReigns(b []byte, r record.Reigns) []byte {
	b = le.AppendUint16(b, uint16(len(r)))
	for _, x := range r {
		b = le.AppendUint64(b, x.Epoch)
		b = le.AppendUint64(b, uint64(x.First))
		b = append(b, x.ID[:]...)
	}
	return b
}

func appendDisk(b []byte, d record.Disk) []byte {
	b = le.AppendUint32(b, uint32(d.ID))
	b = le.AppendUint64(b, uint64(d.Size))
	b = le.AppendUint64(b, uint64(d.Added))
	b = le.AppendUint64(b, uint64(d.Removed))
	return appendText(b, d.Name)
}

func appendDisks(b []byte, disks []record.Disk) []byte {
	b = le.AppendUint16(b, uint16(len(disks)))
	for _, d := range disks {
		b = appendDisk(b, d)
	}
	return b
}

// reader takes fields off a payload. After the first that is not there, all are zero, and err says which.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(what string) {
	if r.err == nil {
		r.err = fmt.Errorf("%w: %s", record.ErrCorrupt, what)
	}
	r.b = nil
}

// take takes n bytes off; nil if there are fewer.
func (r *reader) take(n int, what string) []byte {
	if r.err != nil || n > len(r.b) {
		r.fail(what + " is cut short")
		return nil
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) u8(what string) uint8 {
	if b := r.take(1, what); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u16(what string) uint16 {
	if b := r.take(2, what); b != nil {
		return le.Uint16(b)
	}
	return 0
}

func (r *reader) u32(what string) uint32 {
	if b := r.take(4, what); b != nil {
		return le.Uint32(b)
	}
	return 0
}

func (r *reader) u64(what string) uint64 {
	if b := r.take(8, what); b != nil {
		return le.Uint64(b)
	}
	return 0
}

func (r *reader) lsn(what string) record.LSN { return record.LSN(r.u64(what)) }

// flag is a byte that is 0 or 1.
func (r *reader) flag(what string) bool {
	v := r.u8(what)
	if v > 1 {
		r.fail(what + " is neither 0 nor 1")
	}
	return v == 1
}

func (r *reader) id(what string) (id [16]byte) {
	copy(id[:], r.take(len(id), what))
	return id
}

func (r *reader) text(what string) string {
	s := string(r.take(int(r.u16(what)), what))
	if !utf8.ValidString(s) {
		r.fail(what + " is not UTF-8")
	}
	return s
}

// rest is what is left of the payload.
func (r *reader) rest() []byte {
	b := r.b
	r.b = nil
	return b
}

// reigns reads a list of reigns, which may be empty.
func (r *reader) reigns() (all record.Reigns) {
	for n := r.u16("reigns"); n > 0 && r.err == nil; n-- {
		all = append(all, record.Reign{Epoch: r.u64("epoch"), First: r.lsn("a reign's first LSN"), ID: r.id("a reign's id")})
	}
	if r.err == nil && len(all) > 0 {
		if err := all.Check(); err != nil {
			r.err = err
		}
	}
	return all
}

func (r *reader) disk() record.Disk {
	d := record.Disk{ID: record.DiskID(r.u32("disk")), Size: int64(r.u64("a disk's size")), Added: r.lsn("added"), Removed: r.lsn("removed")}
	d.Name = r.text("a disk's name")
	return d
}

func (r *reader) disks() (all []record.Disk) {
	for n := r.u16("disks"); n > 0 && r.err == nil; n-- {
		all = append(all, r.disk())
	}
	return all
}
