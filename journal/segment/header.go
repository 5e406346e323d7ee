package segment

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// ErrVersion is wrapped when a file was written by a newer Tidemark.
var ErrVersion = errors.New("unknown format version")

// Kind says what a file holds.
type Kind uint32

// The kinds of files. Values are on disk: never renumber.
const (
	Log       Kind = 1
	Originals Kind = 2
)

func (k Kind) String() string {
	if k == Originals {
		return "originals"
	}
	return "log"
}

// Header is the head of a file: what must be known to replay it alone.
type Header struct {
	Kind    Kind
	Number  uint32        // unique in the group, ascending
	Salt    uint32        // repeated in each record of the file
	Group   uint32        // the group's number in the index
	First   record.LSN    // the first record's LSN; of originals: the newest LSN when it was begun
	Horizon record.LSN    // when the file was begun
	Applied record.LSN    // when the file was begun: the backings held every record up to it, durably
	Created int64         // Unix nanoseconds
	Name    string        // the group's name
	Disks   []record.Disk // the group's disks when the file was begun
	Reigns  record.Reigns // and its reigns
	Follows bool          // its records are another daemon's, under their LSNs
	// Bridge says that its records lead over a gap: over LSNs that the group never had, from After on. They are not the writer's.
	// Several may have one LSN. Those of the last have that at which the gap ends, a KindStanding first.
	Bridge      bool
	BridgeAfter record.LSN // of a Bridge: the last before its gap
	// Bridged says that it begins right behind a gap: without it, the bridge before it is not done.
	Bridged  bool
	GapAfter record.LSN // if it is Bridged: the last before that gap
	// Compact says how a compact file's records are found. A [File] has none: it says itself whether it is compact.
	Compact CompactHead
}

const (
	fileMagic      = "TIDESEG\n"
	version        = 3
	headerUnit     = 4096
	headerFixed    = 88
	maxHeaderSize  = 1 << 20
	diskFixedBytes = 4 + 8 + 8 + 8 + 1
	reignBytes     = 8 + 8 + 16

	flagFollows = 1 << 0
	flagBridge  = 1 << 1
	flagBridged = 1 << 2
	flagCompact = 1 << 3
)

// encode makes the head of a file, a multiple of 4096 bytes:
//
//	offset size field
//	  0     8   magic, "TIDESEG\n"
//	  8     4   format version, 3
//	 12     4   length of the header, bytes
//	 16     4   CRC-32C of byte 20 to the header's end
//	 20     4   kind
//	 24     4   number
//	 28     4   salt
//	 32     4   group
//	 36     4   number of disks
//	 40     8   first LSN
//	 48     8   epoch of the last reign
//	 56     8   horizon
//	 64     8   created, Unix nanoseconds
//	 72     8   applied LSN
//	 80     1   length of the group's name
//	 81     1   flags: 1, the records are another daemon's; 2, a bridge; 4, the first behind one; 8, it is compact
//	 82     2   number of reigns, then 4 zeroes
//	 88     …   group's name; then for each disk: id (4), size (8), added LSN (8),
//	            removed LSN (8), length of its name (1), name
//	  …     …   for each reign: epoch (8), first LSN (8), id (16)
//	  …     8   of a bridge: the last LSN before its gap
//	  …     8   of the first behind a bridge: the last LSN before the gap
//	  …    12   of a compact file: number of its pieces, where the records begin in the plain file, and where they end there, 4 each
//	  …     …   zeroes
//
// Version 3 came with reigns' ids, the flags, records of standing, and definitions and expiries among the originals. In version 2 there was
// one reign, from LSN 1 on and without an id. The flag of compact files came later: who does not know a flag refuses the file. In
// version 1 disks had no added and removed LSN, and the log no amendments and definitions.
//
// Magic, version and length stand before the checksum so that a newer
// version is known for what it is, however the rest of it looks.
func (h *Header) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, headerFixed)
	copy(b, fileMagic)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[20:], uint32(h.Kind))
	le.PutUint32(b[24:], h.Number)
	le.PutUint32(b[28:], h.Salt)
	le.PutUint32(b[32:], h.Group)
	le.PutUint32(b[36:], uint32(len(h.Disks)))
	le.PutUint64(b[40:], uint64(h.First))
	le.PutUint64(b[48:], h.Reigns.Epoch())
	le.PutUint64(b[56:], uint64(h.Horizon))
	le.PutUint64(b[64:], uint64(h.Created))
	le.PutUint64(b[72:], uint64(h.Applied))
	b[80] = byte(len(h.Name))
	if h.Follows {
		b[81] |= flagFollows
	}
	if h.Bridge {
		b[81] |= flagBridge
	}
	if h.Bridged {
		b[81] |= flagBridged
	}
	if h.Compact.Pieces > 0 {
		b[81] |= flagCompact
	}
	le.PutUint16(b[82:], uint16(len(h.Reigns)))
	b = append(b, h.Name...)
	for _, d := range h.Disks {
		b = le.AppendUint32(b, uint32(d.ID))
		b = le.AppendUint64(b, uint64(d.Size))
		b = le.AppendUint64(b, uint64(d.Added))
		b = le.AppendUint64(b, uint64(d.Removed))
		b = append(b, byte(len(d.Name)))
		b = append(b, d.Name...)
	}
	for _, r := range h.Reigns {
		b = le.AppendUint64(b, r.Epoch)
		b = le.AppendUint64(b, uint64(r.First))
		b = append(b, r.ID[:]...)
	}
	if h.Bridge {
		b = le.AppendUint64(b, uint64(h.BridgeAfter))
	}
	if h.Bridged {
		b = le.AppendUint64(b, uint64(h.GapAfter))
	}
	if c := h.Compact; c.Pieces > 0 {
		b = le.AppendUint32(le.AppendUint32(le.AppendUint32(b, uint32(c.Pieces)), uint32(c.Start)), uint32(c.End))
	}
	b = append(b, make([]byte, (headerUnit-len(b)%headerUnit)%headerUnit)...)
	le.PutUint32(b[12:], uint32(len(b)))
	le.PutUint32(b[16:], record.Checksum(b[20:]))
	return b
}

// headerLen reads the length of the header from its first 16 bytes.
func headerLen(b []byte) (int, error) {
	le := binary.LittleEndian
	if len(b) < 16 || string(b[:8]) != fileMagic {
		return 0, fmt.Errorf("%w: not a Tidemark segment", record.ErrCorrupt)
	}
	if v := le.Uint32(b[8:]); v < 1 || v > version {
		return 0, fmt.Errorf("segment: %w %d: this program knows %d; use a newer one", ErrVersion, v, version)
	}
	n := le.Uint32(b[12:])
	if n == 0 || n%headerUnit != 0 || n > maxHeaderSize {
		return 0, fmt.Errorf("%w: segment header of %d bytes", record.ErrCorrupt, n)
	}
	return int(n), nil
}

// DecodeHeader reads the head of a file; b holds at least all of it.
func DecodeHeader(b []byte) (Header, error) {
	n, err := headerLen(b)
	if err != nil {
		return Header{}, err
	}
	if len(b) < n {
		return Header{}, fmt.Errorf("%w: segment header cut short: %d of %d bytes", record.ErrCorrupt, len(b), n)
	}
	b = b[:n]
	le := binary.LittleEndian
	if got, want := record.Checksum(b[20:]), le.Uint32(b[16:]); got != want {
		return Header{}, fmt.Errorf("%w: segment header has checksum %08x, recorded %08x", record.ErrCorrupt, got, want)
	}
	h := Header{
		Kind:    Kind(le.Uint32(b[20:])),
		Number:  le.Uint32(b[24:]),
		Salt:    le.Uint32(b[28:]),
		Group:   le.Uint32(b[32:]),
		First:   record.LSN(le.Uint64(b[40:])),
		Follows: b[81]&flagFollows != 0,
		Bridge:  b[81]&flagBridge != 0,
		Bridged: b[81]&flagBridged != 0,
		Horizon: record.LSN(le.Uint64(b[56:])),
		Created: int64(le.Uint64(b[64:])),
		Applied: record.LSN(le.Uint64(b[72:])),
	}
	disks := le.Uint32(b[36:])
	if h.Kind != Log && h.Kind != Originals || h.Number == 0 || disks > record.MaxDisks {
		return Header{}, fmt.Errorf("%w: segment header: kind %d, number %d, %d disks", record.ErrCorrupt, h.Kind, h.Number, disks)
	}
	rest, nameLen := b[headerFixed:], int(b[80])
	if nameLen > len(rest) {
		return Header{}, fmt.Errorf("%w: segment header: group's name of %d bytes", record.ErrCorrupt, nameLen)
	}
	h.Name, rest = string(rest[:nameLen]), rest[nameLen:]
	h.Disks, rest, err = decodeDisks(rest, int(disks), le.Uint32(b[8:]))
	if err != nil {
		return h, err
	}
	if unknown := b[81] &^ (flagFollows | flagBridge | flagBridged | flagCompact); unknown != 0 {
		return h, fmt.Errorf("segment header: %w: it has flags %#x, and what they make of its records is not known; use a newer program", ErrVersion, unknown)
	}
	if v := le.Uint32(b[8:]); v < 3 {
		if b[81] != 0 || le.Uint16(b[82:]) != 0 {
			return h, fmt.Errorf("%w: segment header: version %d, and it has reigns", record.ErrCorrupt, v) // the version is before what the checksum is of
		}
		h.Reigns = record.Reigns{{Epoch: max(le.Uint64(b[48:]), 1), First: 1}}
		return h, nil
	}
	reigns := int(le.Uint16(b[82:]))
	if h.Reigns, err = decodeReigns(rest, reigns); err != nil {
		return h, err
	}
	if rest, err = h.decodeGaps(rest[reigns*reignBytes:]); err != nil || b[81]&flagCompact == 0 {
		return h, err
	}
	return h, h.Compact.decode(rest)
}

// decodeGaps reads what bridges say, and returns what stands behind it.
func (h *Header) decodeGaps(b []byte) ([]byte, error) {
	for _, of := range []struct {
		has  bool
		last *record.LSN // before it
	}{{h.Bridge, &h.BridgeAfter}, {h.Bridged, &h.GapAfter}} {
		if !of.has {
			continue
		}
		if len(b) < 8 {
			return nil, fmt.Errorf("%w: segment header: cut short before its gaps", record.ErrCorrupt)
		}
		if *of.last, b = record.LSN(binary.LittleEndian.Uint64(b)), b[8:]; *of.last >= h.First {
			return nil, fmt.Errorf("%w: segment header: a gap behind LSN %d, and records from LSN %d on", record.ErrCorrupt, *of.last, h.First)
		}
	}
	return b, nil
}

func (c *CompactHead) decode(b []byte) error {
	if len(b) < 12 {
		return fmt.Errorf("%w: segment header: cut short before its pieces", record.ErrCorrupt)
	}
	le := binary.LittleEndian
	c.Pieces, c.Start, c.End = int(le.Uint32(b)), int64(le.Uint32(b[4:])), int64(le.Uint32(b[8:]))
	if c.Start == 0 || c.Start%headerUnit != 0 || c.Start > maxHeaderSize || c.End <= c.Start || c.Pieces < 1 || int64(c.Pieces) > (c.End-c.Start)/headerUnit+1 {
		return fmt.Errorf("%w: segment header: %d pieces of records from %d to %d", record.ErrCorrupt, c.Pieces, c.Start, c.End)
	}
	return nil
}

func decodeReigns(b []byte, n int) (record.Reigns, error) {
	if len(b) < n*reignBytes {
		return nil, fmt.Errorf("%w: segment header: %d reigns in %d bytes", record.ErrCorrupt, n, len(b))
	}
	le := binary.LittleEndian
	var reigns record.Reigns
	for ; n > 0; n, b = n-1, b[reignBytes:] {
		reigns = append(reigns, record.Reign{Epoch: le.Uint64(b), First: record.LSN(le.Uint64(b[8:])), ID: [16]byte(b[16:reignBytes])})
	}
	if err := reigns.Check(); err != nil {
		return nil, fmt.Errorf("segment header: %w", err)
	}
	return reigns, nil
}

func decodeDisks(b []byte, n int, version uint32) ([]record.Disk, []byte, error) {
	le := binary.LittleEndian
	fixed := diskFixedBytes
	if version == 1 {
		fixed -= 16
	}
	var disks []record.Disk
	for i := range n {
		if len(b) < fixed || len(b) < fixed+int(b[fixed-1]) {
			return nil, nil, fmt.Errorf("%w: segment header: disk table ends in entry %d of %d", record.ErrCorrupt, i, n)
		}
		end := fixed + int(b[fixed-1])
		d := record.Disk{ID: record.DiskID(le.Uint32(b)), Size: int64(le.Uint64(b[4:])), Name: string(b[fixed:end])}
		if version > 1 {
			d.Added, d.Removed = record.LSN(le.Uint64(b[12:])), record.LSN(le.Uint64(b[20:]))
		}
		if d.Size < 0 || d.Size > record.MaxDiskSize {
			return nil, nil, fmt.Errorf("%w: segment header: disk %q of %d bytes", record.ErrCorrupt, d.Name, d.Size)
		}
		disks, b = append(disks, d), b[end:]
	}
	return disks, b, nil
}
