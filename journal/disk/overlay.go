package disk

import (
	"maps"
	"slices"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// place is where a block's bytes stand. The zero place is nowhere: the layer
// does not hold the block.
type place struct {
	lsn  record.LSN // of the first record, of this layer and those below, that the block was changed by
	file uint32     // number of the segment; zeroes for a block of zeroes
	off  uint32     // of the block in the segment; of zeroes: 1 if its space may be freed
	sum  uint32     // checksum of the block
}

// zeroes is the file of a block without bytes.
const zeroes = ^uint32(0)

const (
	chunkBits   = 4
	chunkBlocks = 1 << chunkBits // blocks of a chunk: 64 KiB
	slabChunks  = 512

	nodeBits   = 8
	nodeChunks = 1 << (nodeBits - chunkBits) // chunks of a node: 1 MiB
	slabNodes  = 512

	unitBits   = 12
	unitBlocks = 1 << unitBits // blocks of an aligned run that may be zeroes as a whole: 16 MiB
	unitNodes  = 1 << (unitBits - nodeBits)
)

type (
	chunk [chunkBlocks]place
	// node has the positions of its chunks in the slabs plus one; 0: no such chunk.
	node [nodeChunks]uint32
)

// layer maps blocks to places, by a map of nodes, which is small enough to stay in the processor's
// cache, and chunks below them. Both stand in slabs without pointers, so that a large layer
// costs the garbage collector nothing.
//
// A trim may be of a whole disk. Units that it covers are kept as such: a unit in zero
// reads as zeroes where no chunk says otherwise.
type layer struct {
	nodes map[int64]uint32 // node number to its position in its slabs
	zero  map[int64]place  // unit number to the place of its blocks

	numbers []int64 // of the nodes, by position; a unit's that were dropped may stand twice

	nodeSlabs  []*[slabNodes]node
	chunkSlabs []*[slabChunks]chunk
	usedNodes  uint32
	usedChunks uint32
}

func newLayer() *layer { return &layer{nodes: map[int64]uint32{}, zero: map[int64]place{}} }

func (l *layer) nodeAt(pos uint32) *node   { return &l.nodeSlabs[pos/slabNodes][pos%slabNodes] }
func (l *layer) chunkAt(pos uint32) *chunk { return &l.chunkSlabs[pos/slabChunks][pos%slabChunks] }

// chunk returns the chunk with a number, nil if the layer has none.
func (l *layer) chunk(n int64) *chunk {
	if l == nil {
		return nil
	}
	pos, ok := l.nodes[n/nodeChunks]
	if !ok {
		return nil
	}
	if pos = l.nodeAt(pos)[n%nodeChunks]; pos == 0 {
		return nil
	}
	return l.chunkAt(pos - 1)
}

func (l *layer) grow(n int64) *chunk {
	pos, ok := l.nodes[n/nodeChunks]
	if !ok {
		if int(l.usedNodes) == len(l.nodeSlabs)*slabNodes {
			l.nodeSlabs = append(l.nodeSlabs, new([slabNodes]node))
		}
		pos = l.usedNodes
		l.nodes[n/nodeChunks] = pos
		l.numbers = append(l.numbers, n/nodeChunks)
		l.usedNodes++
	}
	at := &l.nodeAt(pos)[n%nodeChunks]
	if *at == 0 {
		if int(l.usedChunks) == len(l.chunkSlabs)*slabChunks {
			l.chunkSlabs = append(l.chunkSlabs, new([slabChunks]chunk))
		}
		l.usedChunks++
		*at = l.usedChunks
	}
	return l.chunkAt(*at - 1)
}

// insert sets the places of n blocks from first on. fn is called for each. Those that the layer has keep their LSN.
func (l *layer) insert(first, n int64, fn func(i int64) place) {
	for i := int64(0); i < n; {
		block := first + i
		c := l.grow(block >> chunkBits)
		below := l.zeroAt(block) // of all of the chunk
		for j := block & (chunkBlocks - 1); j < chunkBlocks && i < n; j++ {
			c[j] = fn(i).over(c[j].or(below))
			i++
		}
	}
}

// or is the place, or another one if it is nowhere.
func (p place) or(q place) place {
	if p.file == 0 {
		return q
	}
	return p
}

// over is the place of a block that had another one.
func (p place) over(old place) place {
	if old.file != 0 {
		p.lsn = old.lsn
	}
	return p
}

// insertZero makes n blocks from first on zeroes.
func (l *layer) insertZero(first, n int64, p place) {
	for n > 0 {
		k := min(n, unitBlocks-first&(unitBlocks-1))
		if k < unitBlocks {
			l.insert(first, k, func(int64) place { return p })
		} else {
			for n := first >> nodeBits; n < first>>nodeBits+unitNodes; n++ {
				l.zeroNode(n, p)
			}
			l.zero[first>>unitBits] = p.over(l.zero[first>>unitBits])
		}
		first, n = first+k, n-k
	}
}

// zeroNode makes the blocks zeroes that a node's chunks have.
func (l *layer) zeroNode(n int64, p place) {
	pos, ok := l.nodes[n]
	if !ok {
		return
	}
	for _, at := range l.nodeAt(pos) {
		if at == 0 {
			continue
		}
		c := l.chunkAt(at - 1)
		for j := range c {
			if c[j].file != 0 {
				c[j] = p.over(c[j])
			}
		}
	}
}

// weight is what the layer takes of memory, in units of some 400 bytes.
func (l *layer) weight() int { return int(l.usedChunks+l.usedNodes) + len(l.zero) }

func (l *layer) empty() bool { return len(l.nodes) == 0 && len(l.zero) == 0 }

// zeroAt is the place of a block by its unit alone.
func (l *layer) zeroAt(block int64) place {
	if l == nil || len(l.zero) == 0 {
		return place{}
	}
	return l.zero[block>>unitBits]
}

// chunkNumbers lists the layer's chunks in the order of the disk.
func (l *layer) chunkNumbers() []int64 {
	numbers := make([]int64, 0, l.usedChunks)
	for _, n := range slices.Sorted(maps.Keys(l.nodes)) {
		for i, pos := range l.nodeAt(l.nodes[n]) {
			if pos != 0 {
				numbers = append(numbers, n*nodeChunks+int64(i))
			}
		}
	}
	return numbers
}

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
			was, p := below, between
			if o != nil {
				was = o[j+k].or(below)
			}
			if n != nil {
				p = n[j+k].or(between)
			}
			if p.file != 0 {
				p = p.over(was)
			} else {
				p = was
			}
			places[i+k] = p
			any = any || p.file != 0
		}
		i += run
	}
	return any
}
