package disk

import (
	"maps"
	"slices"
)

// place is where a block's bytes stand. The zero place is nowhere: the layer
// does not hold the block.
type place struct {
	file uint32 // number of the segment; zeroes for a block of zeroes
	off  uint32 // of the block in the segment; of zeroes: 1 if its space may be freed
	sum  uint32 // checksum of the block
}

// zeroes is the file of a block without bytes.
const zeroes = ^uint32(0)

const (
	chunkBits   = 4
	chunkBlocks = 1 << chunkBits // blocks of one map entry: 64 KiB
	slabChunks  = 512

	unitBits   = 12
	unitBlocks = 1 << unitBits // blocks of an aligned run that may be zeroes as a whole: 16 MiB
)

type chunk [chunkBlocks]place

// layer maps blocks to places. Chunks stand in slabs without pointers, so that
// a large layer costs the garbage collector nothing.
//
// A trim may be of a whole disk. Units that it covers are kept as such: a unit in zero
// reads as zeroes where no chunk says otherwise.
type layer struct {
	index map[int64]uint32 // chunk number to its position in the slabs
	zero  map[int64]place  // unit number to the place of its blocks
	slabs []*[slabChunks]chunk
	used  uint32
}

func newLayer() *layer { return &layer{index: map[int64]uint32{}, zero: map[int64]place{}} }

func (l *layer) at(pos uint32) *chunk { return &l.slabs[pos/slabChunks][pos%slabChunks] }

// chunk returns the chunk with a number, nil if the layer has none.
func (l *layer) chunk(n int64) *chunk {
	if l == nil {
		return nil
	}
	pos, ok := l.index[n]
	if !ok {
		return nil
	}
	return l.at(pos)
}

func (l *layer) grow(n int64) *chunk {
	if c := l.chunk(n); c != nil {
		return c
	}
	if int(l.used) == len(l.slabs)*slabChunks {
		l.slabs = append(l.slabs, new([slabChunks]chunk))
	}
	l.index[n] = l.used
	l.used++
	return l.at(l.used - 1)
}

// insert sets the places of n blocks from first on. place is called for each.
func (l *layer) insert(first, n int64, fn func(i int64) place) {
	for i := int64(0); i < n; {
		block := first + i
		c := l.grow(block >> chunkBits)
		for j := block & (chunkBlocks - 1); j < chunkBlocks && i < n; j++ {
			c[j] = fn(i)
			i++
		}
	}
}

// insertZero makes n blocks from first on zeroes.
func (l *layer) insertZero(first, n int64, p place) {
	for n > 0 {
		k := min(n, unitBlocks-first&(unitBlocks-1))
		if k < unitBlocks {
			l.insert(first, k, func(int64) place { return p })
		} else {
			for c := first >> chunkBits; c < (first+k)>>chunkBits; c++ {
				delete(l.index, c) // its slot is lost until the layer is dropped
			}
			l.zero[first>>unitBits] = p
		}
		first, n = first+k, n-k
	}
}

// cost is about how many map entries a record of n blocks adds.
func cost(first, n int64, zero bool) int {
	if zero && n >= 2*unitBlocks {
		return int(n>>unitBits) + 2*unitBlocks/chunkBlocks
	}
	return int((first+n-1)>>chunkBits-first>>chunkBits) + 1
}

func (l *layer) empty() bool { return len(l.index) == 0 && len(l.zero) == 0 }

// zeroAt is the place of a block by its unit alone.
func (l *layer) zeroAt(block int64) place {
	if l == nil || len(l.zero) == 0 {
		return place{}
	}
	return l.zero[block>>unitBits]
}

// chunkNumbers lists the layer's chunks in the order of the disk.
func (l *layer) chunkNumbers() []int64 { return slices.Sorted(maps.Keys(l.index)) }

// lookup sets places[i] to that of block first+i, from the newer layer if both
// have it; it reports whether any was found.
func lookup(newer, older *layer, first int64, places []place) (any bool) {
	clear(places)
	if newer == nil && older == nil {
		return false
	}
	for i := 0; i < len(places); {
		block := first + int64(i)
		n, o := newer.chunk(block>>chunkBits), older.chunk(block>>chunkBits)
		below := older.zeroAt(block)
		between := newer.zeroAt(block)
		j := int(block & (chunkBlocks - 1))
		run := min(chunkBlocks-j, len(places)-i)
		for k := range run {
			p := below
			if o != nil && o[j+k].file != 0 {
				p = o[j+k]
			}
			if between.file != 0 {
				p = between
			}
			if n != nil && n[j+k].file != 0 {
				p = n[j+k]
			}
			places[i+k] = p
			any = any || p.file != 0
		}
		i += run
	}
	return any
}
