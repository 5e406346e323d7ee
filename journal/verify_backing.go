package journal

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// backings compares what the backings have with the newest versions that are applied.
func (v *verifier) backings() error {
	for _, d := range v.g.disks.Load().all {
		blocks := (d.Size + record.BlockSize - 1) / record.BlockSize
		for first := int64(0); first < blocks && d.Attached(); first += viewStep {
			if err := v.backingStep(d, first, int(min(viewStep, blocks-first))); err != nil {
				return err
			}
		}
	}
	return nil
}

// backingStep compares n blocks. What seems wrong may have been written meanwhile: it is looked at again while nothing is applied.
func (v *verifier) backingStep(d *disk.Disk, first int64, n int) error {
	picks := make([]index.Pick, n)
	reader, err := v.g.ix.Reader(0)
	if err == nil {
		err = reader.Find(d.ID, first, record.MaxLSN, picks)
		reader.Release()
	}
	if err != nil {
		if v.over(err) {
			return err
		}
		v.found(fmt.Sprintf("index: disk %d from block %d on", d.ID, first), 0, err)
		return nil
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
		if err := v.suspect(d, block); err != nil {
			return err
		}
	}
	return v.step(read + int64(n)) // looking up takes time, too
}

// backingRun is how many blocks of a backing are read at once.
const backingRun = 256

// differing are those blocks of a run that are not what the versions say, or can not be read.
func (v *verifier) differing(d *disk.Disk, first int64, picks []index.Pick) (blocks []int64) {
	last := first + int64(len(picks)) - 1
	b := slices.Grow(v.buf[:0], len(picks)*record.BlockSize)[:(len(picks)-1)*record.BlockSize+d.BlockLen(last)]
	v.buf = b
	err := d.ReadBacking(b, first*record.BlockSize, false)
	for i := range picks {
		block := first + int64(i)
		if err != nil || v.differs(b[i*record.BlockSize:][:d.BlockLen(block)], &picks[i]) != nil {
			blocks = append(blocks, block)
		}
	}
	return blocks
}

// wrong is how the backing's block differs from a version, or why it can not be read; nil: it does not.
func (v *verifier) wrong(d *disk.Disk, block int64, p *index.Pick) error {
	var buf [record.BlockSize]byte
	b := buf[:d.BlockLen(block)]
	if err := d.ReadBacking(b, block*record.BlockSize, false); err != nil {
		if errors.Is(err, disk.ErrDetached) {
			return nil
		}
		return err
	}
	return v.differs(b, p)
}

// differs is how a block differs from a version. What the version's checksum is may be unreadable: that is found elsewhere.
func (v *verifier) differs(b []byte, p *index.Pick) error {
	if p.Zero {
		if !bytes.Equal(b, make([]byte, len(b))) {
			return fmt.Errorf("%w: it should be zeroes, by LSN %d", record.ErrCorrupt, p.LSN)
		}
		return nil
	}
	sum := p.Aux
	if p.Class > 0 {
		f, err := v.g.set.Acquire(p.File)
		if err != nil {
			return nil
		}
		defer f.Release()
		var at [4]byte
		if err := f.ReadAt(at[:], p.SumOff(), false); err != nil {
			return nil
		}
		sum = record.Sums(at[:]).At(0)
	}
	if got := record.Checksum(b); got != sum {
		return fmt.Errorf("%w: it has checksum %08x, and LSN %d left %08x", record.ErrCorrupt, got, p.LSN, sum)
	}
	return nil
}

// suspect looks at a block again, while nothing is applied to it, and has it written again if it is to be mended.
func (v *verifier) suspect(d *disk.Disk, block int64) error {
	g := v.g
	g.apply.Lock()
	defer g.apply.Unlock()
	if err := g.indexTo(g.Head()); err != nil {
		return nil // the group has failed: what its backings have is not known
	}
	reader, err := g.ix.FreshReader()
	if err != nil {
		return err
	}
	defer reader.Close()
	var p [1]index.Pick
	if err := reader.Find(d.ID, block, record.MaxLSN, p[:]); err != nil || !p[0].Found || p[0].LSN > g.Applied() || !d.Attached() {
		return err
	}
	cause := v.wrong(d, block, &p[0])
	if cause == nil {
		return nil
	}
	place := fmt.Sprintf("backing %s of disk %s/%s at %d", d.Path(), g.name, d.Name, block*record.BlockSize)
	v.found(place, 0, cause)
	if !v.o.Mend {
		return nil
	}
	if err := v.mend(d, block, p[:]); err != nil {
		g.log.Error("a block of a backing is not what the journal has, and can not be written again", zap.String("place", place), zap.Error(err))
		return nil
	}
	v.done.Mended++
	g.log.Warn("a block of a backing was written again, as the journal has it", zap.String("place", place), zap.Uint64("lsn", uint64(p[0].LSN)))
	return nil
}

// mend writes a block of a backing again. g.apply is held.
func (v *verifier) mend(d *disk.Disk, block int64, picks []index.Pick) error {
	var buf [record.BlockSize]byte
	b := buf[:d.BlockLen(block)]
	view := View{g: v.g, d: d, lsn: picks[0].LSN}
	s := viewPool.Get().(*viewScratch)
	defer viewPool.Put(s)
	if err := view.readPicks(s, b, block*record.BlockSize, block, picks, false); err != nil {
		return err
	}
	if err := errors.Join(d.Restore(b, block*record.BlockSize), d.SyncBacking()); err != nil {
		return err
	}
	return v.wrong(d, block, &picks[0])
}
