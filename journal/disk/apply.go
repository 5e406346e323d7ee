package disk

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

const (
	// stepBlocks is how many blocks go from journal to backing between two
	// commits of originals: 64 MiB.
	stepBlocks = 16384
	// bufBlocks is how many blocks are read or written at once: 1 MiB.
	bufBlocks = 256
	// toldBlocks is how often progress is told of.
	toldBlocks = 32
)

// Freeze moves what Insert has put over the backing so far to the frozen layer.
// It reports whether there is anything to apply.
func (d *Disk) Freeze() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mu.frozen == nil {
		if d.mu.active.empty() {
			return false
		}
		d.mu.frozen, d.mu.active = d.mu.active, newLayer()
	}
	return true
}

// FrozenWeight is what the frozen layer takes of memory, in the units of Insert;
// 0 if none waits for Apply.
func (d *Disk) FrozenWeight() int {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.mu.frozen == nil {
		return 0
	}
	return d.mu.frozen.weight()
}

// Apply writes the frozen layer to the backing. Every record in it must be
// durable. The layer stays until Drop; Apply may be called again, and must be after
// an error. The backing is not synced. progress is called now and then with how
// much of the layer is done, 0 to 1; its error ends Apply.
func (d *Disk) Apply(progress func(done float64) error) error {
	d.mu.RLock()
	l := d.mu.frozen
	d.mu.RUnlock()
	if l == nil {
		return errNoFrozen
	}
	b, err := d.attached()
	if err != nil {
		return err
	}
	a := applier{d: d, backing: b, l: l, buf: make([]byte, bufBlocks*record.BlockSize), progress: progress}
	defer a.release()
	if err := a.chunks(); err != nil {
		return err
	}
	if err := a.units(); err != nil {
		return err
	}
	return a.step()
}

// Drop lets go of the frozen layer: the backing has what was in it.
func (d *Disk) Drop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.frozen = nil
}

// applier takes blocks to the backing, a step at a time.
type applier struct {
	d       *Disk
	backing *backing
	l       *layer
	blocks  []int64 // of the step, ascending
	places  []place
	buf     []byte
	file    *segment.File // the last one read, with a reference

	progress func(done float64) error
	from, to float64 // the step's part of the layer
}

// did tells the progress when i of the n blocks of one half of a step are done.
func (a *applier) did(half, i, n int) error {
	return a.progress(a.from + (a.to-a.from)*(float64(half)+float64(i)/float64(n))/2)
}

// chunks takes what the layer's chunks hold, in the order of the disk.
func (a *applier) chunks() error {
	numbers := a.l.chunkNumbers()
	for k, n := range numbers {
		a.to = float64(k+1) / float64(len(numbers))
		for i, p := range a.l.chunk(n) {
			block := n<<chunkBits + int64(i)
			switch p.file {
			case 0:
			case zeroes:
				if err := a.addZeroes(block, 1, p); err != nil {
					return err
				}
			default:
				a.blocks, a.places = append(a.blocks, block), append(a.places, p)
			}
		}
		if err := a.stepIfFull(); err != nil {
			return err
		}
	}
	return a.step()
}

// units takes the units that are zeroes, but for the blocks that a chunk has.
func (a *applier) units() error {
	for _, unit := range slices.Sorted(maps.Keys(a.l.zero)) {
		p := a.l.zero[unit]
		for c := int64(0); c < unitBlocks/chunkBlocks; {
			first := unit<<unitBits + c<<chunkBits
			if ch := a.l.chunk(first >> chunkBits); ch != nil {
				for i := range ch {
					if ch[i].file == 0 {
						if err := a.addZeroes(first+int64(i), 1, p); err != nil {
							return err
						}
					}
				}
				c++
				continue
			}
			n := int64(1)
			for c+n < unitBlocks/chunkBlocks && a.l.chunk(first>>chunkBits+n) == nil {
				n++
			}
			if err := a.addZeroes(first, n<<chunkBits, p); err != nil {
				return err
			}
			c += n
		}
		if err := a.stepIfFull(); err != nil {
			return err
		}
	}
	return nil
}

// addZeroes adds the blocks of a run that are not zeroes in the backing yet.
// Where the backing is zeroes, it already is what the record says, and what it
// was before: nothing is lost that a view could need.
func (a *applier) addZeroes(first, n int64, p place) error {
	ext := record.Extent{Off: first * record.BlockSize}
	if ext.Len = min(n*record.BlockSize, a.d.Size-ext.Off); ext.Len <= 0 {
		return nil
	}
	for ext.Len > 0 {
		run, hole := osfile.Run(a.backing.File, ext.Off, ext.Len)
		if hole && run < ext.Len {
			run &^= record.BlockSize - 1
			if hole = run > 0; !hole {
				run = min(ext.Len, record.BlockSize)
			}
		}
		if !hole {
			run = min(ext.Len, int64(len(a.buf)))
			if err := a.addNonZero(record.Extent{Off: ext.Off, Len: run}, p); err != nil {
				return err
			}
		}
		ext.Off, ext.Len = ext.Off+run, ext.Len-run
	}
	return nil
}

func (a *applier) addNonZero(ext record.Extent, p place) error {
	buf := a.buf[:ext.Len]
	if err := a.d.readBacking(buf, ext.Off, false); err != nil {
		return err
	}
	for block := ext.Off / record.BlockSize; len(buf) > 0; block++ {
		b := buf[:min(len(buf), record.BlockSize)]
		if !isZero(b) {
			a.blocks, a.places = append(a.blocks, block), append(a.places, p)
		}
		buf = buf[len(b):]
	}
	return nil
}

func (a *applier) stepIfFull() error {
	if len(a.blocks) < stepBlocks {
		return nil
	}
	return a.step()
}

func (a *applier) release() {
	if a.file != nil {
		a.file.Release()
		a.file = nil
	}
}

func (a *applier) step() error {
	if err := a.capture(); err != nil {
		return err
	}
	for i, told := 0, 0; i < len(a.blocks); {
		if i >= told+toldBlocks {
			if err := a.did(1, i, len(a.blocks)); err != nil {
				return err
			}
			told = i
		}
		n := a.run(i)
		var err error
		if a.places[i].file == zeroes {
			err = a.zero(i, n)
		} else {
			err = a.write(i, n)
		}
		if err != nil {
			return err
		}
		i += n
	}
	a.blocks, a.places = a.blocks[:0], a.places[:0]
	a.from = a.to
	return nil
}

// run is how many blocks from i on follow each other on the disk and go to the
// backing in one call.
func (a *applier) run(i int) int {
	j := i + 1
	for j < len(a.blocks) && a.blocks[j] == a.blocks[j-1]+1 {
		p, q := a.places[i], a.places[j]
		if (p.file == zeroes) != (q.file == zeroes) || p.file == zeroes && p.off != q.off {
			break
		}
		if p.file != zeroes && j-i == bufBlocks {
			break
		}
		j++
	}
	return j - i
}

func (a *applier) extent(i, n int) record.Extent {
	off := a.blocks[i] * record.BlockSize
	return record.Extent{Off: off, Len: min(int64(n)*record.BlockSize, a.d.Size-off)}
}

// write copies n adjacent blocks from the segments to the backing. Blocks that
// stand together in a segment too are read together.
func (a *applier) write(i, n int) error {
	ext := a.extent(i, n)
	buf := a.buf[:ext.Len]
	for k := 0; k < n; {
		p, m := a.places[i+k], 1
		for k+m < n && a.places[i+k+m].file == p.file && a.places[i+k+m].off == p.off+uint32(m)*record.BlockSize {
			m++
		}
		part := buf[k*record.BlockSize : min(len(buf), (k+m)*record.BlockSize)]
		if err := a.read(part, i+k); err != nil {
			return err
		}
		k += m
	}
	if _, err := a.backing.WriteAt(buf, ext.Off); err != nil {
		return fmt.Errorf("write backing %s of disk %s at %d: %w", a.backing.path, a.d.Name, ext.Off, err)
	}
	return nil
}

// read reads and verifies the blocks from i on that stand together in a segment.
func (a *applier) read(dst []byte, i int) error {
	p := a.places[i]
	if a.file == nil || a.file.Number != p.file {
		a.release()
		f, err := a.d.journal.Acquire(p.file)
		if err != nil {
			return err
		}
		a.file = f
	}
	if err := a.file.ReadAt(dst, int64(p.off), false); err != nil {
		return fmt.Errorf("read %s: %w", a.file.Path, err)
	}
	for len(dst) > 0 {
		b := dst[:min(len(dst), record.BlockSize)]
		if got := record.Checksum(b); got != a.places[i].sum {
			return fmt.Errorf("%w: %s: block at %d has checksum %08x, recorded %08x",
				record.ErrCorrupt, a.file.Path, a.places[i].off, got, a.places[i].sum)
		}
		dst = dst[len(b):]
		i++
	}
	return nil
}

// zero makes n adjacent blocks of the backing read as zeroes; trimmed ones give
// their space back where the file can.
func (a *applier) zero(i, n int) error {
	ext := a.extent(i, n)
	if a.places[i].off == 1 {
		ok, err := osfile.PunchHole(a.backing.File, ext.Off, ext.Len)
		if err != nil {
			return fmt.Errorf("trim backing %s of disk %s at %d: %w", a.backing.path, a.d.Name, ext.Off, err)
		}
		if ok {
			return nil
		}
	}
	clear(a.buf)
	for ext.Len > 0 {
		part := a.buf[:min(ext.Len, int64(len(a.buf)))]
		if _, err := a.backing.WriteAt(part, ext.Off); err != nil {
			return fmt.Errorf("write backing %s of disk %s at %d: %w", a.backing.path, a.d.Name, ext.Off, err)
		}
		ext.Off, ext.Len = ext.Off+int64(len(part)), ext.Len-int64(len(part))
	}
	return nil
}

// capture gives the journal what the step's blocks hold, where it has not got
// that, and returns when it is durable and can be found.
func (a *applier) capture() error {
	var fresh []int64
	var until []record.LSN // of each, what overwrites it
	for i, b := range a.blocks {
		if !a.d.captured.get(b) {
			fresh, until = append(fresh, b), append(until, a.places[i].lsn)
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	hole := int64(0) // up to here the backing is one; nothing is written to it meanwhile
	for i, told := 0, 0; i < len(fresh); {
		if i >= told+toldBlocks {
			if err := a.did(0, i, len(fresh)); err != nil {
				return err
			}
			told = i
		}
		n := 1
		for i+n < len(fresh) && n < bufBlocks && fresh[i+n] == fresh[i]+int64(n) {
			n++
		}
		kept, err := a.originals(fresh[i], until[i:i+n], &hole)
		if errors.Is(err, segment.ErrFull) && i+kept > 0 {
			// What was kept so far is kept: with it done again and again, the
			// room that comes free would never be enough.
			if cerr := a.commit(fresh[:i+kept]); cerr != nil {
				return cerr
			}
		}
		if err != nil {
			return err
		}
		i += n
	}
	return a.commit(fresh)
}

// commit makes the originals of blocks durable, and the blocks captured.
func (a *applier) commit(fresh []int64) error {
	if err := a.d.journal.CommitOriginals(a.d, a.d.captured.changed(fresh, nil)); err != nil {
		return fmt.Errorf("commit originals of disk %s: %w", a.d.Name, err)
	}
	a.d.captured.change(fresh, true)
	return nil
}

// originals keeps what adjacent blocks hold, which begin behind the ones before them, and returns how many were kept. until says of each which record
// overwrites it. *hole is up to where the backing was found to be one: to
// read a block of it costs the kernel ten times as much as to ask.
func (a *applier) originals(first int64, until []record.LSN, hole *int64) (kept int, err error) {
	if err := a.backing.flushOnce(); err != nil {
		return 0, fmt.Errorf("sync backing %s of disk %s: %w", a.backing.path, a.d.Name, err)
	}
	off := first * record.BlockSize
	end := min(off+int64(len(until))*record.BlockSize, a.d.Size)
	if off >= *hole {
		*hole = osfile.Hole(a.backing.File, off)
	}
	var buf []byte
	if end > *hole {
		buf = a.buf[:end-off]
		if err := a.d.readBacking(buf, off, false); err != nil {
			return 0, err
		}
	}
	for kept < len(until) {
		n := 1
		for kept+n < len(until) && until[kept+n] == until[kept] {
			n++
		}
		ext := record.Extent{Off: off + int64(kept)*record.BlockSize}
		ext.Len = min(int64(n)*record.BlockSize, end-ext.Off)
		var content []byte
		if buf != nil {
			if content = buf[ext.Off-off:][:ext.Len]; isZero(content) {
				content = nil
			}
		}
		if err := a.d.journal.Original(a.d, ext, content, until[kept]); err != nil {
			return kept, fmt.Errorf("keep the original of disk %s at %v: %w", a.d.Name, ext, err)
		}
		kept += n
	}
	return kept, nil
}

var zeroBlock [record.BlockSize]byte

// isZero stops at the first block that is not zeroes, which is nearly always the first.
func isZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeroBlock))
		if !bytes.Equal(b[:n], zeroBlock[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}
