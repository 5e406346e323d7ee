package link

import (
	"bytes"
	"io"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// comparison is of a disk's backing with the sums of what the disk holds.
type comparison struct {
	disk      record.DiskID // 0: none was compared yet
	backing   Backing
	elsewhere []*other
	buf       []byte
}

// other is a place that may hold the same blocks as a disk.
type other struct {
	r          io.ReaderAt
	tried, had int64 // blocks
}

const (
	// After otherTried blocks, a place where fewer than one in otherWorth was found is not read any more.
	otherTried = 4 * sumBlocks
	otherWorth = 16
)

func (o *other) pays() bool { return o.tried < otherTried || o.had*otherWorth >= o.tried }

// compare finds which blocks of a backing are not what their sums say, makes those zeroes that are to be, and copies those that stand
// elsewhere.
func (x *follower) compare(m *wire.Sums) (*wire.Want, error) {
	if m.Disk != x.disk {
		backing, err := x.t.Backing(m.Disk)
		if err != nil {
			return nil, err
		}
		x.disk, x.backing, x.elsewhere = m.Disk, backing, nil
		for _, r := range x.t.Elsewhere(m.Disk) {
			x.elsewhere = append(x.elsewhere, &other{r: r})
		}
	}
	s, err := newSummer(&m.Key)
	if err != nil {
		return nil, err
	}
	n := int64(len(m.Sums) / wire.SumSize)
	want := &wire.Want{Disk: m.Disk, First: m.First, Bits: make([]byte, (n+7)/8)}
	for i := int64(0); i < n; i += sumBlocks {
		end := min(n, i+sumBlocks)
		off := (m.First + i) * record.BlockSize
		c := chunk{m: m, s: s, bits: want.Bits, from: i, end: end, bytes: min((end-i)*record.BlockSize, x.sizes[m.Disk]-off)}
		if err := x.compareChunk(&c); err != nil {
			return nil, err
		}
	}
	return want, nil
}

// chunk are blocks of a message's, from one to another, and what of them is wanted.
type chunk struct {
	m         *wire.Sums
	s         *summer
	bits      []byte
	from, end int64
	bytes     int64 // that they hold
	sum       []byte
}

func (p *chunk) wanted(i int64) bool { return p.bits[i/8]&(1<<(i%8)) != 0 }

// offset is where a block stands on its disk.
func (p *chunk) offset(i int64) int64 { return (p.m.First + i) * record.BlockSize }

// theirs is the sum that a block is to have; is reports whether what it holds has it.
func (p *chunk) theirs(i int64) []byte { return p.m.Sums[i*wire.SumSize:][:wire.SumSize] }

func (p *chunk) is(i int64, block []byte) bool {
	p.sum = p.s.append(p.sum[:0], block)
	return bytes.Equal(p.sum, p.theirs(i))
}

// compareChunk compares blocks, makes those zeroes that are to be, and sets the bits of those that are wanted.
func (c *comparison) compareChunk(p *chunk) error {
	if c.buf == nil {
		c.buf = make([]byte, sumBlocks*record.BlockSize)
	}
	all := c.buf[:p.bytes]
	if err := readData(c.backing, all, p.offset(p.from)); err != nil {
		return err
	}
	differ := false
	var zero record.Extent // adjacent blocks that are to be zeroes
	for i, b := p.from, all; i < p.end; i++ {
		block := b[:min(record.BlockSize, len(b))]
		b = b[len(block):]
		switch {
		case p.is(i, block):
		case bytes.Equal(p.theirs(i), zeroes[:wire.SumSize]):
			if zero.End() != p.offset(i) {
				if err := c.clear(zero); err != nil {
					return err
				}
				zero = record.Extent{Off: p.offset(i)}
			}
			zero.Len += int64(len(block))
		default:
			p.bits[i/8] |= 1 << (i % 8)
			differ = true
		}
	}
	if err := c.clear(zero); err != nil {
		return err
	}
	for _, o := range c.elsewhere {
		if !differ || !o.pays() {
			continue
		}
		if err := c.copyFrom(o, p); err != nil {
			return err
		}
	}
	return nil
}

func (c *comparison) clear(ext record.Extent) error {
	if ext.Len == 0 {
		return nil
	}
	return c.backing.Zero(ext.Off, ext.Len)
}

// copyFrom copies those blocks that are wanted and stand in another place.
func (c *comparison) copyFrom(o *other, p *chunk) error {
	for i := p.from; i < p.end; i++ {
		if !p.wanted(i) {
			continue
		}
		j := i + 1
		for j < p.end && p.wanted(j) {
			j++
		}
		b := c.buf[:min((j-i)*record.BlockSize, p.bytes-(i-p.from)*record.BlockSize)]
		n, _ := o.r.ReadAt(b, p.offset(i)) // what can not be read there is sent
		o.tried += j - i
		for k := i; k < j; k++ {
			at := (k - i) * record.BlockSize
			block := b[at:min(at+record.BlockSize, int64(len(b)))]
			if at+int64(len(block)) > int64(n) {
				break
			}
			if !p.is(k, block) {
				continue
			}
			if _, err := c.backing.WriteAt(block, p.offset(k)); err != nil {
				return err
			}
			o.had++
			p.bits[k/8] &^= 1 << (k % 8)
		}
		i = j - 1
	}
	return nil
}

// readData reads a backing, but for what is a hole.
func readData(backing Backing, b []byte, off int64) error {
	at := int64(0)
	var rerr error
	err := backing.Data(off, int64(len(b)), func(n int64, data bool) {
		part := b[at : at+n]
		at += n
		if !data {
			clear(part)
		} else if rerr == nil {
			_, rerr = backing.ReadAt(part, off+at-n)
		}
	})
	if err == nil {
		err = rerr
	}
	return err
}
