package export

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// Block is the unit in which an overlay keeps what was written, in bytes.
	Block = 4096
	// mapHeader is what stands before the bits in a map's file.
	mapHeader  = 4096
	mapMagic   = "TMOVLMAP"
	mapVersion = 1
	// pageBits is how many blocks a page of a map tells of: 128 MiB of the disk.
	pageBits = 8 * 4096
)

// blockMap is the set of blocks that stand in the overlay's file, in two files: one that the kernel has as soon as a bit is set, and
// one that is true after a crash of the host, because bits get there when their blocks are durable.
type blockMap struct {
	blocks  int64
	live    *os.File
	flushed *os.File
	mem     []byte // the live file
	words   []uint64
	dirty   []atomic.Bool // pages whose bits are not in the flushed file
}

func mapBytes(blocks int64) int64 { return (blocks + pageBits - 1) / pageBits * 4096 }

// openMap opens the maps of an overlay, or makes them.
func openMap(path, boot string, size int64) (*blockMap, error) {
	m := &blockMap{blocks: (size + Block - 1) / Block}
	if err := m.open(path, boot, size); err != nil {
		return nil, errors.Join(err, m.close())
	}
	return m, nil
}

func (m *blockMap) open(path, boot string, size int64) (err error) {
	if m.flushed, err = openMapFile(path+".flushed", size, ""); err != nil {
		return err
	}
	if m.live, err = openMapFile(path+".map", size, boot); err != nil {
		return err
	}
	m.mem, err = unix.Mmap(int(m.live.Fd()), mapHeader, int(mapBytes(m.blocks)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %s: %w", m.live.Name(), err)
	}
	// The kernel maps whole pages: the words are aligned.
	m.words = unsafe.Slice((*uint64)(unsafe.Pointer(&m.mem[0])), len(m.mem)/8)
	m.dirty = make([]atomic.Bool, len(m.mem)/4096)
	return m.load(boot)
}

// load takes from the live file what this boot left there, and else what was flushed.
func (m *blockMap) load(boot string) error {
	head := make([]byte, mapHeader)
	if _, err := m.live.ReadAt(head, 0); err != nil {
		return err
	}
	if was := strings.TrimRight(string(head[24:]), "\x00"); was == boot {
		for i := range m.dirty {
			m.dirty[i].Store(true) // it is not known which are flushed
		}
		return nil
	}
	b := make([]byte, 1<<20)
	for off := 0; off < len(m.mem); off += len(b) {
		b = b[:min(len(b), len(m.mem)-off)]
		if _, err := m.flushed.ReadAt(b, mapHeader+int64(off)); err != nil {
			return fmt.Errorf("read %s: %w", m.flushed.Name(), err)
		}
		copy(m.mem[off:], b)
	}
	// The bits first: they are not this boot's until its name stands before them.
	if err := unix.Msync(m.mem, unix.MS_SYNC); err != nil {
		return err
	}
	return writeMapHeader(m.live, boot, head)
}

// writeMapHeader writes a header with a boot's identity.
func writeMapHeader(f *os.File, boot string, head []byte) error {
	clear(head[24:])
	copy(head[24:], boot)
	if _, err := f.WriteAt(head, 0); err != nil {
		return err
	}
	return f.Sync()
}

// openMapFile opens a map's file with all of its room, or makes it.
func openMapFile(path string, size int64, boot string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := initMapFile(f, size, boot); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	return f, nil
}

func initMapFile(f *os.File, size int64, boot string) error {
	le := binary.LittleEndian
	want := append(make([]byte, 0, mapHeader), mapMagic...)
	want = le.AppendUint32(le.AppendUint32(want, mapVersion), Block)
	want = le.AppendUint64(want, uint64(size))
	whole := mapHeader + mapBytes((size+Block-1)/Block)
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() == whole {
		head := make([]byte, len(want))
		if _, err := f.ReadAt(head, 0); err != nil {
			return err
		}
		switch {
		case string(head) == string(want):
			return nil
		case string(head) != string(make([]byte, len(head))): // zeroes: a crash while it was made, and nothing is in it
			return errors.New("it is no map of this disk, or of another version")
		}
	} else if info.Size() != 0 {
		return fmt.Errorf("it has %d bytes: %d are expected", info.Size(), whole)
	}
	// Room for all of it, so that a bit never lacks it. Its size comes last: a crash before leaves a file that is made anew.
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, whole); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	if err := f.Truncate(whole); err != nil {
		return err
	}
	head := make([]byte, mapHeader)
	copy(head, want)
	return writeMapHeader(f, boot, head)
}

// bootID tells this start of the host from every other one.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

func (m *blockMap) get(block int64) bool {
	return atomic.LoadUint64(&m.words[block/64])&(1<<(block%64)) != 0
}

// run is how many blocks from first on, at most n, all stand in the file or all do not, and which.
func (m *blockMap) run(first, n int64) (k int64, present bool) {
	present = m.get(first)
	for k = 1; k < n && m.get(first+k) == present; k++ {
		if b := first + k; b%64 == 0 && n-k >= 64 {
			// A word at a time where it is all the same.
			full := ^uint64(0)
			if !present {
				full = 0
			}
			for n-k >= 64 && atomic.LoadUint64(&m.words[(first+k)/64]) == full {
				k += 64
			}
			if k == n || m.get(first+k) != present {
				return k, present
			}
		}
	}
	return k, present
}

// set is called when the blocks stand in the file.
func (m *blockMap) set(first, n int64) {
	for b := first; b < first+n; b++ {
		atomic.OrUint64(&m.words[b/64], 1<<(b%64))
	}
	for p := first / pageBits; p <= (first+n-1)/pageBits; p++ {
		m.dirty[p].Store(true)
	}
}

// count is how many blocks stand in the file.
func (m *blockMap) count() (n int64) {
	for b := int64(0); b < m.blocks; {
		k, present := m.run(b, m.blocks-b)
		if present {
			n += k
		}
		b += k
	}
	return n
}

// changed is the pages that are not in the flushed file, as they are now. What is set later is the next flush's.
func (m *blockMap) changed() map[int][]byte {
	pages := map[int][]byte{}
	for i := range m.dirty {
		if !m.dirty[i].Swap(false) {
			continue
		}
		page := make([]byte, 4096)
		for k := range 512 {
			binary.LittleEndian.PutUint64(page[8*k:], atomic.LoadUint64(&m.words[512*i+k]))
		}
		pages[i] = page
	}
	return pages
}

// save makes pages durable in the flushed file; their blocks are.
func (m *blockMap) save(pages map[int][]byte) error {
	if len(pages) == 0 {
		return nil
	}
	for i, page := range pages {
		if _, err := m.flushed.WriteAt(page, mapHeader+int64(i)*4096); err != nil {
			return err
		}
	}
	return unix.Fdatasync(int(m.flushed.Fd()))
}

func (m *blockMap) close() error {
	var errs []error
	if m.mem != nil {
		errs = append(errs, unix.Munmap(m.mem))
		m.mem, m.words = nil, nil
	}
	for _, f := range []*os.File{m.live, m.flushed} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}
