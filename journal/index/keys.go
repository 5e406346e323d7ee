package index

import (
	"bytes"
	"encoding/binary"

	"github.com/cockroachdb/pebble/v2"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Every key of a group begins with the group's number (4 bytes, big-endian)
// and a table's letter. All integers in keys are big-endian, so that they sort.
//
//	table      rest of the key                                value
//	v version  disk (4) class (1) unit (8) inverted LSN (8)   Version
//	k classes  disk (4)                                       mask of the classes in use (1)
//	m marker   LSN (8)                                        time (8), marker payload as amended
//	d defined  since, LSN (8), name                           LSN of the newest record (8), definition payload
//	t time     time (8) LSN (8)                               file (4) offset (4)
//	w watermark                                               Watermark
//	c captured disk (4) page (8)                              bitmap page
//	s state    name                                           the owner's
//
// A version's prefix ends before its inverted LSN: Pebble's Bloom filters are
// over prefixes, so that a table without any version of a unit is not read.
const (
	tableVersion   = 'v'
	tableClasses   = 'k'
	tableMarker    = 'm'
	tableDefined   = 'd'
	tableTime      = 't'
	tableWatermark = 'w'
	tableCaptured  = 'c'
	tableState     = 's'

	prefixLen     = 4 + 1 + 4 + 1 + 8
	versionKeyLen = prefixLen + 8
)

// Classes is the number of size classes. A unit of class c is 16^c blocks:
// 4 KiB, 64 KiB, 1 MiB, 16 MiB. An extent is cut into the largest aligned
// units that fill it, so that a long write costs few keys and a block is in
// exactly one unit of each class.
const Classes = 4

// classShift is the number of bits of a block number within a unit of class c.
func classShift(c int) uint { return uint(4 * c) }

// Unit is an aligned run of 16^Class blocks.
type Unit struct {
	Class uint8
	Index int64 // the unit's first block, divided by 16^Class
}

// First is the unit's first block.
func (u Unit) First() int64 { return u.Index << classShift(int(u.Class)) }

// Blocks is the unit's length in blocks.
func (u Unit) Blocks() int64 { return 1 << classShift(int(u.Class)) }

// Cut calls fn with the units that fill the run of n blocks from first on.
func Cut(first, n int64, fn func(Unit)) {
	for n > 0 {
		c := Classes - 1
		for ; c > 0; c-- {
			if size := int64(1) << classShift(c); n >= size && first&(size-1) == 0 {
				break
			}
		}
		fn(Unit{Class: uint8(c), Index: first >> classShift(c)})
		first += 1 << classShift(c)
		n -= 1 << classShift(c)
	}
}

// Units is how many units fill the run of n blocks from first on.
func Units(first, n int64) (units int) {
	Cut(first, n, func(Unit) { units++ })
	return units
}

func appendTable(dst []byte, group uint32, table byte) []byte {
	return append(binary.BigEndian.AppendUint32(dst, group), table)
}

func appendVersionKey(dst []byte, group uint32, disk record.DiskID, u Unit, lsn record.LSN) []byte {
	dst = appendTable(dst, group, tableVersion)
	dst = binary.BigEndian.AppendUint32(dst, uint32(disk))
	dst = append(dst, u.Class)
	dst = binary.BigEndian.AppendUint64(dst, uint64(u.Index))
	return binary.BigEndian.AppendUint64(dst, ^uint64(lsn))
}

// splitVersionKey reads unit and LSN of a key that has the prefix of disk and class.
func splitVersionKey(k []byte) (unit int64, lsn record.LSN) {
	return int64(binary.BigEndian.Uint64(k[10:])), record.LSN(^binary.BigEndian.Uint64(k[prefixLen:]))
}

func split(k []byte) int {
	if len(k) == versionKeyLen && k[4] == tableVersion {
		return prefixLen
	}
	return len(k)
}

// comparer orders keys bytewise and tells Pebble where a version's prefix
// ends. Separators are not shortened: a shortened key would have another prefix.
var comparer = func() *pebble.Comparer {
	c := *pebble.DefaultComparer
	c.Name = "tidemark.1"
	c.Split = split
	c.Compare = bytes.Compare
	c.Separator = func(dst, a, _ []byte) []byte { return append(dst, a...) }
	c.Successor = func(dst, a []byte) []byte { return append(dst, a...) }
	return &c
}()
