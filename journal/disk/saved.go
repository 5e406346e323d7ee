package disk

import (
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"math/bits"
	"slices"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Save writes what is over the backing, as [Disk.Load] takes it. A record
// that is inserted meanwhile may be in it or not, in whole or in part.
//
//	size field
//	  4  disk id
//	  4  number of units
//	     for each unit, 16 MiB of zeroes: number (4), 1 if its space may be freed (4), LSN (8)
//	     for each chunk, 64 KiB: number (8), mask of its blocks, not 0 (2); for each block of the mask,
//	     the lowest first, its place: LSN (8); segment's number, 2^32-1 for zeroes (4); offset in the segment, of
//	     zeroes 1 if the space may be freed (4); CRC-32C, of zeroes 0 (4)
//	  8  2^64-1
//
// Integers are little-endian. A chunk says what its blocks are though their unit says otherwise.
func (d *Disk) Save(w io.Writer) error {
	le := binary.LittleEndian
	nodes, units := d.overlaid()
	b := le.AppendUint32(nil, uint32(d.ID))
	b = le.AppendUint32(b, uint32(len(units)))
	for _, u := range slices.Sorted(maps.Keys(units)) {
		b = le.AppendUint32(b, uint32(u))
		b = le.AppendUint32(b, units[u].off)
		b = le.AppendUint64(b, uint64(units[u].lsn))
	}
	for part := range slices.Chunk(nodes, savedNodes) {
		d.mu.RLock()
		for _, n := range part {
			b = appendNode(b, n, d.mu.active, d.mu.frozen)
		}
		d.mu.RUnlock()
		if _, err := w.Write(b); err != nil {
			return err
		}
		b = b[:0]
	}
	_, err := w.Write(le.AppendUint64(b, savedEnd))
	return err
}

const (
	// savedNodes is how many nodes are looked up at once: writes wait meanwhile.
	savedNodes = 16
	savedEnd   = ^uint64(0)
)

// overlaid lists the nodes and the units of zeroes that either layer has, in the order of the disk.
func (d *Disk) overlaid() (nodes []int64, units map[int64]place) {
	d.mu.RLock()
	numbers, frozen := d.mu.active.numbers, d.mu.frozen // both only grow, or change no more
	units = maps.Clone(d.mu.active.zero)
	d.mu.RUnlock()
	nodes = slices.Clone(numbers)
	if frozen != nil {
		nodes = append(nodes, frozen.numbers...)
		for u, p := range frozen.zero {
			if newer, ok := units[u]; ok {
				units[u] = newer.over(p)
			} else {
				units[u] = p
			}
		}
	}
	slices.Sort(nodes)
	return slices.Compact(nodes), units
}

// appendNode appends the chunks of a node that have places.
func appendNode(b []byte, node int64, newer, older *layer) []byte {
	var places [nodeChunks * chunkBlocks]place
	lookup(newer, older, node<<nodeBits, places[:])
	le := binary.LittleEndian
	for i := range int64(nodeChunks) {
		var mask uint16
		of := places[i<<chunkBits:][:chunkBlocks]
		for j, p := range of {
			if p.file != 0 {
				mask |= 1 << j
			}
		}
		if mask == 0 {
			continue
		}
		b = le.AppendUint64(b, uint64(node*nodeChunks+i))
		b = le.AppendUint16(b, mask)
		for _, p := range of {
			if p.file != 0 {
				b = le.AppendUint64(b, uint64(p.lsn))
				b = le.AppendUint32(b, p.file)
				b = le.AppendUint32(b, p.off)
				b = le.AppendUint32(b, p.sum)
			}
		}
	}
	return b
}

// Saved is what Save wrote of a disk, read back.
type Saved struct {
	ID     record.DiskID
	Places int // blocks and units
	l      *layer
}

// ReadSaved reads what Save wrote of a disk of a size. known tells whether there is a segment
// of a number. An error says where it is not what Save writes.
func ReadSaved(r io.Reader, size func(record.DiskID) int64, known func(file uint32) bool) (s Saved, err error) {
	le := binary.LittleEndian
	var b [20]byte
	if _, err := io.ReadFull(r, b[:8]); err != nil {
		return s, err
	}
	s = Saved{ID: record.DiskID(le.Uint32(b[:])), l: newLayer()}
	units := le.Uint32(b[4:])
	blocks := (size(s.ID) + record.BlockSize - 1) / record.BlockSize
	for range units {
		if _, err := io.ReadFull(r, b[:16]); err != nil {
			return s, err
		}
		u, free := int64(le.Uint32(b[:])), le.Uint32(b[4:])
		if u<<unitBits >= blocks || free > 1 {
			return s, fmt.Errorf("%w: zeroes at unit %d of disk %d", record.ErrCorrupt, u, s.ID)
		}
		s.l.zero[u] = place{lsn: record.LSN(le.Uint64(b[8:])), file: zeroes, off: free}
		s.Places++
	}
	for {
		if _, err := io.ReadFull(r, b[:8]); err != nil {
			return s, err
		}
		n := le.Uint64(b[:])
		if n == savedEnd {
			return s, nil
		}
		if _, err := io.ReadFull(r, b[:2]); err != nil {
			return s, err
		}
		mask := le.Uint16(b[:])
		if last := int64(bits.Len16(mask)) - 1; mask == 0 || n >= uint64(blocks) || int64(n)<<chunkBits+last >= blocks {
			return s, fmt.Errorf("%w: chunk %d of disk %d", record.ErrCorrupt, n, s.ID)
		}
		for c := s.l.grow(int64(n)); mask != 0; mask &= mask - 1 {
			if _, err := io.ReadFull(r, b[:]); err != nil {
				return s, err
			}
			p := place{lsn: record.LSN(le.Uint64(b[:])), file: le.Uint32(b[8:]), off: le.Uint32(b[12:]), sum: le.Uint32(b[16:])}
			if p.file == zeroes && p.off > 1 || p.file != zeroes && !known(p.file) {
				return s, fmt.Errorf("%w: block in segment %d, which is not there", record.ErrCorrupt, p.file)
			}
			c[bits.TrailingZeros16(mask)] = p
			s.Places++
		}
	}
}

// Load puts what was saved of the disk over its backing, before anything else is. It returns
// the overlay's weight, in the units of Insert.
func (d *Disk) Load(s Saved) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.active = s.l
	return s.l.weight()
}
