package record

import (
	"fmt"
	"math"
)

// BlockSize is the unit of the journal, in bytes: every write is journaled
// as whole blocks (the last block of a disk may be short), checksummed and
// looked up by block.
const BlockSize = 4096

// MaxPayload bounds the payload of one record in bytes: the largest NBD
// request plus the blocks that an unaligned one touches at both its ends.
const MaxPayload = 32<<20 + 2*BlockSize

// MaxDiskSize bounds a disk's size in bytes, so that sums of offsets and
// lengths never overflow and a block number fits 40 bits.
const MaxDiskSize = int64(1) << 52

// LSN is a log sequence number: the place of a record in its group's order,
// 1, 2, 3 … Zero is the state before the first record.
type LSN uint64

// MaxLSN is larger than any LSN in use.
const MaxLSN = LSN(math.MaxUint64)

// DiskID numbers a disk within its group; it is never used again for another.
type DiskID uint32

// MaxDisks is how many disks a group can ever have had.
const MaxDisks = 4096

// Disk is an entry of a group's disk table, which has every disk that the group ever had.
type Disk struct {
	ID   DiskID
	Name string
	Size int64 // bytes
	// Added is the head when the disk came to the group: it has no past before.
	Added LSN
	// Removed is the head when the disk left the group; 0 while it is in it. Its history stays.
	Removed LSN
}

// Extent is a run of bytes on a disk.
type Extent struct {
	Off int64 // bytes from the disk's start
	Len int64 // bytes
}

// End is the first byte after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// In reports whether the extent is well formed and within a disk of size bytes.
func (e Extent) In(size int64) bool {
	return e.Off >= 0 && e.Len >= 0 && e.Off <= size && e.Len <= size-e.Off
}

func (e Extent) String() string { return fmt.Sprintf("%d+%d", e.Off, e.Len) }

// Align widens the extent to whole blocks, the last one cut at size.
func (e Extent) Align(size int64) Extent {
	start := e.Off &^ (BlockSize - 1)
	end := min((e.End()+BlockSize-1)&^(BlockSize-1), size)
	return Extent{Off: start, Len: end - start}
}

// Aligned reports whether the extent is whole blocks of a disk of size bytes.
func (e Extent) Aligned(size int64) bool { return e.Align(size) == e }

// Blocks is the number of blocks that n bytes from a block's start touch.
func Blocks(n int64) int { return int((n + BlockSize - 1) / BlockSize) }
