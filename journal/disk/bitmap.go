package disk

import (
	"math"
	"sync"
)

const (
	// PageBlocks is the number of blocks of a page of the captured bitmap.
	PageBlocks = 1024
	pageBytes  = PageBlocks / 8
)

// bitmap is the set of captured blocks: those whose original, or a later
// carried-over version, the journal holds. The backing is overwritten only
// where the bit is set.
type bitmap struct {
	mu    sync.RWMutex
	pages map[int64]*[pageBytes]byte
}

func (b *bitmap) get(block int64) bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	p := b.pages[block/PageBlocks]
	return p != nil && p[block%PageBlocks/8]&(1<<(block%8)) != 0
}

// next is the first block at or after block that may be set, or a large number.
func (b *bitmap) next(block int64) int64 {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if len(b.pages) == 0 {
		return math.MaxInt64
	}
	if b.pages[block/PageBlocks] != nil {
		return block
	}
	return (block/PageBlocks + 1) * PageBlocks
}

// change sets or clears the bits of blocks.
func (b *bitmap) change(blocks []int64, set bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, block := range blocks {
		p := b.pages[block/PageBlocks]
		if p == nil {
			p = new([pageBytes]byte)
			b.pages[block/PageBlocks] = p
		}
		setBit(p[:], block, set)
	}
}

func setBit(page []byte, block int64, set bool) {
	if set {
		page[block%PageBlocks/8] |= 1 << (block % 8)
	} else {
		page[block%PageBlocks/8] &^= 1 << (block % 8)
	}
}

// changed returns copies of the pages as they are with some blocks set and others cleared.
func (b *bitmap) changed(set, cleared []int64) map[int64][]byte {
	b.mu.RLock()
	defer b.mu.RUnlock()
	out := map[int64][]byte{}
	change := func(blocks []int64, to bool) {
		for _, block := range blocks {
			n := block / PageBlocks
			page := out[n]
			if page == nil {
				page = make([]byte, pageBytes)
				if p := b.pages[n]; p != nil {
					copy(page, p[:])
				}
				out[n] = page
			}
			setBit(page, block, to)
		}
	}
	change(set, true)
	change(cleared, false)
	return out
}

func (b *bitmap) load(n int64, bits []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := new([pageBytes]byte)
	copy(p[:], bits)
	b.pages[n] = p
}
