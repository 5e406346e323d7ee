package journal

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// backings compares what the backings have with the newest versions that are applied. Of a group that has failed, nobody knows how far that went.
func (v *verifier) backings() error {
	for _, d := range v.g.Disks() {
		blocks := (d.Size + record.BlockSize - 1) / record.BlockSize
		for first := int64(0); first < blocks && v.g.owns(d); first += viewStep {
			if err := v.backingStep(d, first, int(min(viewStep, blocks-first))); err != nil {
				return err
			}
		}
	}
	return nil
}

// owns reports whether a disk is the group's at present, and its backing what the group makes of it.
func (g *Group) owns(d *disk.Disk) bool {
	return g.ended() == nil && d.Attached() && slices.Contains(g.Disks(), d)
}

// backingRun is how many blocks of a backing are read at once.
const backingRun = 256

// backingStep compares n blocks. What seems wrong may have been written meanwhile: it is looked at again while nothing is applied.
func (v *verifier) backingStep(d *disk.Disk, first int64, n int) error {
	picks := make([]index.Pick, n)
	reader, err := v.reader()
	if err == nil {
		err = reader.Find(d.ID, first, record.MaxLSN, picks)
	}
	if err != nil {
		return v.failed(Finding{Where: fmt.Sprintf("index: disk %d from block %d on", d.ID, first)}, err)
	}
	var read int64
	var suspect []int64
	for i := 0; i < n; {
		j := i
		for j < min(n, i+backingRun) && picks[j].Found && picks[j].LSN <= v.g.Applied() {
			j++
		}
		if j == i {
			i++
			continue
		}
		v.done.Blocks += int64(j - i)
		read += int64(j-i) * record.BlockSize
		suspect = append(suspect, v.differing(d, first+int64(i), picks[i:j])...)
		i = j
	}
	for _, block := range suspect {
		if err := v.ctx.Err(); err != nil {
			return err
		}
		why, err := v.suspect(d, block)
		if err != nil {
			err = v.failed(Finding{Where: fmt.Sprintf("index: disk %d block %d", d.ID, block)}, err)
		} else if why != nil {
			where := fmt.Sprintf("backing %s of disk %s/%s at %d", d.Path(), v.g.name, d.Name, block*record.BlockSize)
			f := Finding{Where: where}
			if !v.doubt {
				f.backing, f.block = d, block
			}
			err = v.failed(f, why)
		}
		if err != nil {
			return err
		}
	}
	return v.step(read + int64(n)) // looking up takes time, too
}

// differing are those blocks of a run that seem to be other than the versions say, or can not be read.
func (v *verifier) differing(d *disk.Disk, first int64, picks []index.Pick) (blocks []int64) {
	last := first + int64(len(picks)) - 1
	b := slices.Grow(v.buf[:0], len(picks)*record.BlockSize)[:(len(picks)-1)*record.BlockSize+d.BlockLen(last)]
	v.buf = b
	err := d.ReadBacking(b, first*record.BlockSize, false)
	for i := range picks {
		block := first + int64(i)
		if err != nil || !v.agrees(b[i*record.BlockSize:][:d.BlockLen(block)], &picks[i]) {
			blocks = append(blocks, block)
		}
	}
	return blocks
}

// agrees reports whether a block has a version's checksum.
func (v *verifier) agrees(b []byte, p *index.Pick) bool {
	if p.Zero {
		return bytes.Equal(b, make([]byte, len(b)))
	}
	sum := p.Aux
	if p.Class > 0 {
		f, err := v.g.set.Acquire(p.File)
		if err != nil {
			return false
		}
		defer f.Release()
		var at [4]byte
		if err := f.ReadAt(at[:], p.SumOff(), false); err != nil {
			return false
		}
		sum = record.Sums(at[:]).At(0)
	}
	return record.Checksum(b) == sum
}

// suspect is checkBlock while nothing is applied.
func (v *verifier) suspect(d *disk.Disk, block int64) (why, err error) {
	v.g.apply.Lock()
	defer v.g.apply.Unlock()
	_, _, why, err = v.g.checkBlock(d, block)
	return why, err
}

// checkBlock compares a block of a backing with what the record at an LSN left there, the newest that is applied. why says how they differ, or why the backing can
// not be read; it is nil if the block is as it should be, or the journal does not say what it should be: what of that can not be read is found elsewhere. err is the
// index's. g.apply is held.
func (g *Group) checkBlock(d *disk.Disk, block int64) (want []byte, lsn record.LSN, why, err error) {
	// Whoever closes the group, or takes it back, says so and applies before it touches a backing.
	if !g.owns(d) || g.indexTo(g.Head()) != nil {
		return nil, 0, nil, nil
	}
	reader, err := g.ix.FreshReader()
	if err != nil {
		return nil, 0, nil, err
	}
	defer reader.Close()
	var p [1]index.Pick
	if err := reader.Find(d.ID, block, record.MaxLSN, p[:]); err != nil || !p[0].Found || p[0].LSN > g.Applied() {
		return nil, 0, nil, err
	}
	n, off := d.BlockLen(block), block*record.BlockSize
	want, lsn = make([]byte, n), p[0].LSN
	view := View{g: g, d: d, lsn: lsn}
	s := viewPool.Get().(*viewScratch)
	defer viewPool.Put(s)
	if view.readPicks(s, want, off, block, p[:], false) != nil {
		return nil, 0, nil, nil
	}
	has := make([]byte, n)
	if why = d.ReadBacking(has, off, false); why == nil && !bytes.Equal(has, want) {
		why = fmt.Errorf("%w: it is not what the record at LSN %d left there", record.ErrCorrupt, lsn)
	}
	if !g.owns(d) {
		why = nil // it has left meanwhile
	}
	return want, lsn, why, nil
}
