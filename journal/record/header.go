package record

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// ErrCorrupt is wrapped by every error that says that bytes are not what was
// written: a bad magic, checksum, length or field.
var ErrCorrupt = errors.New("corrupt record")

// Kind says what a record does.
type Kind uint8

// The kinds of records. Values are on disk: never renumber.
const (
	KindWrite    Kind = 1  // payload replaces the extent
	KindZero     Kind = 2  // the extent reads as zeroes; its space is kept
	KindTrim     Kind = 3  // the extent reads as zeroes; its space may be freed
	KindMarker   Kind = 4  // payload is a Marker; no extent
	KindOriginal Kind = 5  // payload is what an extent held before; originals log only
	KindHole     Kind = 6  // an original that was all zeroes; no payload; originals log only
	KindAmend    Kind = 7  // payload is an Amendment; no extent
	KindDefine   Kind = 8  // payload is a Definition; no extent
	KindExpired  Kind = 9  // an expiry has come to its horizon; no extent, no payload; originals log only
	KindKept     Kind = 11 // payload is a part of the list of points that are kept beyond the horizon of the KindExpired behind it; no extent; originals log only
	KindStanding Kind = 10 // the group's reigns or disks are others from here on, see its file's head, or, of a bridge, that behind it; no extent, no payload
)

func (k Kind) String() string {
	switch k {
	case KindWrite:
		return "write"
	case KindZero:
		return "zero"
	case KindTrim:
		return "trim"
	case KindMarker:
		return "marker"
	case KindOriginal:
		return "original"
	case KindHole:
		return "hole"
	case KindAmend:
		return "amendment"
	case KindDefine:
		return "definition"
	case KindExpired:
		return "expiry"
	case KindStanding:
		return "standing"
	case KindKept:
		return "kept points"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Note reports whether records of the kind are the log's and change no disk: they have no extent.
func (k Kind) Note() bool {
	return k == KindMarker || k == KindAmend || k == KindDefine || k == KindStanding
}

// Flags of a record. Values are on disk: never renumber.
const (
	// FlagDiscontinuity marks a record that no guest wrote: the backing was
	// found changed and the journal took the change over.
	FlagDiscontinuity uint8 = 1 << 0
	// FlagCarried marks an original that is a version of an expired record. It
	// counts only once its version's LSN (Durable) is not above the horizon:
	// until then the expiry has not happened.
	FlagCarried uint8 = 1 << 1
	// FlagExact marks an original whose LSN is that of the first record that overwrote its blocks, each of them: from there on it is what
	// none of them holds. Of others it may be a later one's.
	FlagExact uint8 = 1 << 2
)

// Header is a record without its payload.
type Header struct {
	LSN     LSN    // of the record; of an original: views below it need the original, see FlagExact
	Time    int64  // Unix nanoseconds, never less than the record's before it
	Durable LSN    // durable when this was written; of an original: its version's LSN
	Extent  Extent // whole blocks of Disk; empty for notes
	Disk    DiskID
	Kind    Kind
	Flags   uint8
	Salt    uint32 // of the file that holds the record
	Payload int    // bytes
	// Sums is the checksum table: the CRC-32C of each block of the payload.
	// As decoded it is a view of the input.
	Sums Sums
}

const (
	headerMagic = 0x31524d54 // "TMR1"
	// HeaderSize is the length in bytes of a header without its table.
	HeaderSize = 64
	// Alignment of records within a file, in bytes.
	Alignment = 8
	// MaxHeaderSize is the length of the longest header, with its table.
	MaxHeaderSize = HeaderSize + 4*((MaxPayload+BlockSize-1)/BlockSize)
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC-32C that all of Tidemark's formats use.
func Checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// Sums is a checksum table in its encoded form, 4 bytes a block.
type Sums []byte

// AppendSums appends the table of payload, which starts at a block's start.
func AppendSums(dst Sums, payload []byte) Sums {
	for len(payload) > 0 {
		n := min(len(payload), BlockSize)
		dst = binary.LittleEndian.AppendUint32(dst, Checksum(payload[:n]))
		payload = payload[n:]
	}
	return dst
}

// At is the checksum of block i of the payload.
func (s Sums) At(i int) uint32 { return binary.LittleEndian.Uint32(s[4*i:]) }

// Len is the number of blocks in the table.
func (s Sums) Len() int { return len(s) / 4 }

// Verify compares payload with the table. The error names the first bad block.
func (s Sums) Verify(payload []byte) error {
	if Blocks(int64(len(payload))) != s.Len() {
		return fmt.Errorf("%w: %d bytes of payload, checksums for %d blocks", ErrCorrupt, len(payload), s.Len())
	}
	for i := 0; len(payload) > 0; i++ {
		n := min(len(payload), BlockSize)
		if got, want := Checksum(payload[:n]), s.At(i); got != want {
			return fmt.Errorf("%w: payload block %d has checksum %08x, recorded %08x", ErrCorrupt, i, got, want)
		}
		payload = payload[n:]
	}
	return nil
}

// EncodedSize is the length of the header with its table, in bytes.
func (h *Header) EncodedSize() int { return HeaderSize + 4*Blocks(int64(h.Payload)) }

// Size is the length of the whole record in its file: header, table, payload
// and the padding to Alignment.
func (h *Header) Size() int64 {
	return (int64(h.EncodedSize()) + int64(h.Payload) + Alignment - 1) &^ (Alignment - 1)
}

// Append encodes the header and its table to dst. The payload follows it in
// the file, and zeroes to the next multiple of 8 bytes. h.Sums must be the
// table of the payload.
//
//	 0       4       8              16              24              32
//	┌───────┬───────┬───────────────┬───────────────┬───────────────┐
//	│ magic │ crc   │ LSN           │ time          │ durable LSN   │
//	├───────┴───────┼───────┬───────┼───────┬─┬─┬───┼───────┬───────┘
//	│ extent offset │ extent length │ disk  │k│f│ 0 │       32…64
//	├───────────────┴───────────────┼───────┼─┴─┴───┤
//	│                               │payload│ salt  │
//	└───────────────────────────────┴───────┴───────┘
//	64: checksum table, 4 bytes for each 4096 of the payload or part of it
//
//	offset size field
//	  0     4   magic, "TMR1": the format and its version
//	  4     4   CRC-32C of bytes 8 to the table's end
//	  8     8   LSN
//	 16     8   time, Unix nanoseconds
//	 24     8   the LSN that was durable when this record was encoded: if a
//	            record at or below it is damaged, a valid record that says so
//	            tells damage from a torn tail
//	 32     8   extent's offset on the disk, bytes
//	 40     8   extent's length, bytes
//	 48     4   disk
//	 52     1   kind
//	 53     1   flags
//	 54     2   zero
//	 56     4   payload's length, bytes
//	 60     4   salt of the file: a record of another file, left over in
//	            reused space, is not taken for one of this
//
// The payload has a checksum a block, not one for all, so that a block in the
// middle of a long record can be read, and proved, alone.
func (h *Header) Append(dst []byte) []byte {
	at := len(dst)
	var b [HeaderSize]byte
	le := binary.LittleEndian
	le.PutUint32(b[0:], headerMagic)
	le.PutUint64(b[8:], uint64(h.LSN))
	le.PutUint64(b[16:], uint64(h.Time))
	le.PutUint64(b[24:], uint64(h.Durable))
	le.PutUint64(b[32:], uint64(h.Extent.Off))
	le.PutUint64(b[40:], uint64(h.Extent.Len))
	le.PutUint32(b[48:], uint32(h.Disk))
	b[52], b[53] = byte(h.Kind), h.Flags
	le.PutUint32(b[56:], uint32(h.Payload))
	le.PutUint32(b[60:], h.Salt)
	dst = append(dst, b[:]...)
	dst = append(dst, h.Sums...)
	le.PutUint32(dst[at+4:], Checksum(dst[at+8:]))
	return dst
}

// Digest tells a record from every other one, wherever it stands: the first bytes of the SHA-256 of its header and table, with zeroes
// for what differs from file to file.
func (h *Header) Digest() (d [16]byte) {
	same := *h
	same.Durable, same.Salt = 0, 0
	sum := sha256.Sum256(same.Append(nil))
	copy(d[:], sum[:])
	return d
}

// ErrShort is returned by Decode when b ends before the header does.
var ErrShort = errors.New("record header is cut short")

// Decode reads a header from the start of b, which may be longer. The table
// is a view of b. ErrShort says that b is a proper prefix of what may be a
// header; any other error wraps ErrCorrupt.
func Decode(b []byte) (h Header, err error) {
	if len(b) < HeaderSize {
		return h, ErrShort
	}
	le := binary.LittleEndian
	if m := le.Uint32(b); m != headerMagic {
		return h, fmt.Errorf("%w: magic %08x, expected %08x", ErrCorrupt, m, headerMagic)
	}
	payload := le.Uint32(b[56:])
	if payload > MaxPayload {
		return h, fmt.Errorf("%w: payload of %d bytes, at most %d are allowed", ErrCorrupt, payload, MaxPayload)
	}
	size := HeaderSize + 4*Blocks(int64(payload))
	if len(b) < size {
		return h, ErrShort
	}
	if got, want := Checksum(b[8:size]), le.Uint32(b[4:]); got != want {
		return h, fmt.Errorf("%w: header has checksum %08x, recorded %08x", ErrCorrupt, got, want)
	}
	h = Header{
		LSN:     LSN(le.Uint64(b[8:])),
		Time:    int64(le.Uint64(b[16:])),
		Durable: LSN(le.Uint64(b[24:])),
		Extent:  Extent{Off: int64(le.Uint64(b[32:])), Len: int64(le.Uint64(b[40:]))},
		Disk:    DiskID(le.Uint32(b[48:])),
		Kind:    Kind(b[52]),
		Flags:   b[53],
		Payload: int(payload),
		Salt:    le.Uint32(b[60:]),
		Sums:    Sums(b[HeaderSize:size]),
	}
	return h, h.check()
}

// check finds fields that no encoder writes, though their checksum holds.
func (h *Header) check() error {
	bad := func(what string) error {
		return fmt.Errorf("%w: %v record LSN %d: %s (extent %v, payload %d)", ErrCorrupt, h.Kind, h.LSN, what, h.Extent, h.Payload)
	}
	switch h.Kind {
	case KindWrite, KindOriginal:
		if int64(h.Payload) != h.Extent.Len || h.Payload == 0 {
			return bad("payload does not fill the extent")
		}
	case KindZero, KindTrim, KindHole:
		if h.Payload != 0 || h.Extent.Len == 0 {
			return bad("takes an extent and no payload")
		}
	case KindMarker, KindAmend, KindDefine, KindKept:
		if h.Extent != (Extent{}) || h.Payload == 0 {
			return bad("takes a payload and no extent")
		}
	case KindExpired, KindStanding:
		if h.Extent != (Extent{}) || h.Payload != 0 {
			return bad("takes no payload and no extent")
		}
	default:
		return bad("unknown kind")
	}
	if !h.Extent.In(MaxDiskSize) {
		return bad("extent out of bounds")
	}
	if h.Extent.Off%BlockSize != 0 {
		return bad("extent does not start at a block")
	}
	return nil
}
