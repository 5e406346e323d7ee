package export

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strings"
	"sync/atomic"

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
	// failedBoot stands in the place of a boot's identity in a live map that is not to be believed any more.
	failedBoot = "failed"
)

// blockMap is the set of blocks that stand in the overlay's file: in memory, and in two files. The kernel has the live one before a write is
// answered, so that it is true whatever becomes of the process. The flushed one is true after a crash of the
// host, because bits get there when their blocks are durable.
type blockMap struct {
	blocks  int64
	live    *os.File
	flushed *os.File
	words   []uint64      // a bit for each block; set under the lock of its part of the disk
	dirty   []atomic.Bool // pages whose bits are not in the flushed file
}

func mapBytes(blocks int64) int64 { return (blocks + pageBits - 1) / pageBits * 4096 }

// newMap makes the maps of an overlay, or opens them.
func newMap(path, boot string, size int64, create bool) (*blockMap, error) {
	m := &blockMap{blocks: (size + Block - 1) / Block}
	if err := m.open(path, boot, size, create); err != nil {
		return nil, errors.Join(err, m.close())
	}
	return m, nil
}

func (m *blockMap) open(path, boot string, size int64, create bool) (err error) {
	if m.flushed, err = openMapFile(path+".flushed", size, "", create); err != nil {
		return err
	}
	if m.live, err = openMapFile(path+".map", size, boot, create); err != nil {
		return err
	}
	m.words = make([]uint64, mapBytes(m.blocks)/8)
	m.dirty = make([]atomic.Bool, mapBytes(m.blocks)/4096)
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
		return m.read(m.live, nil)
	}
	// The bits first: they are not this boot's until its name stands before them.
	if err := m.read(m.flushed, m.live); err != nil {
		return err
	}
	if err := m.live.Sync(); err != nil {
		return err
	}
	return writeMapHeader(m.live, boot, head)
}

// read reads the bits of one file, and writes them to the other, if there is one.
func (m *blockMap) read(from, to *os.File) error {
	b := make([]byte, 64<<10)
	for off := 0; off < 8*len(m.words); off += len(b) {
		b = b[:min(len(b), 8*len(m.words)-off)]
		if _, err := from.ReadAt(b, mapHeader+int64(off)); err != nil {
			return fmt.Errorf("read %s: %w", from.Name(), err)
		}
		for i := 0; i < len(b); i += 8 {
			m.words[(off+i)/8] = binary.LittleEndian.Uint64(b[i:])
		}
		if to != nil {
			if _, err := to.WriteAt(b, mapHeader+int64(off)); err != nil {
				return fmt.Errorf("write %s: %w", to.Name(), err)
			}
		}
	}
	return nil
}

// disown has the next open take what was flushed: a sync failed, and nobody knows what the kernel has dropped.
func (m *blockMap) disown() error {
	head := make([]byte, mapHeader)
	if _, err := m.live.ReadAt(head, 0); err != nil {
		return err
	}
	return writeMapHeader(m.live, failedBoot, head)
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

// openMapFile opens a map's file, or makes it with all of its room.
func openMapFile(path string, size int64, boot string, create bool) (*os.File, error) {
	flags := os.O_RDWR
	if create {
		flags |= os.O_CREATE | os.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, err
	}
	if create {
		err = makeMapFile(f, size, boot)
	} else {
		err = checkMapFile(f, size)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	return f, nil
}

func mapFileHead(size int64) []byte {
	le := binary.LittleEndian
	b := append(make([]byte, 0, mapHeader), mapMagic...)
	b = le.AppendUint32(le.AppendUint32(b, mapVersion), Block)
	return le.AppendUint64(b, uint64(size))
}

func mapFileSize(size int64) int64 { return mapHeader + mapBytes((size+Block-1)/Block) }

func checkMapFile(f *os.File, size int64) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != mapFileSize(size) {
		return fmt.Errorf("it has %d bytes: %d are expected", info.Size(), mapFileSize(size))
	}
	want := mapFileHead(size)
	head := make([]byte, len(want))
	if _, err := f.ReadAt(head, 0); err != nil {
		return err
	}
	if string(head) != string(want) {
		return errors.New("it is no map of this disk, or of another version")
	}
	return nil
}

func makeMapFile(f *os.File, size int64, boot string) error {
	// Room for all of it: on most file systems a bit never lacks it.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, mapFileSize(size)); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return err
	}
	if err := f.Truncate(mapFileSize(size)); err != nil {
		return err
	}
	head := make([]byte, mapHeader)
	copy(head, mapFileHead(size))
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

// set is called when the blocks stand in the file, with their part of the disk locked. When it returns, the kernel knows. Parts
// are whole words.
func (m *blockMap) set(first, n int64) error {
	if k, present := m.run(first, n); present && k == n {
		return nil
	}
	from, to := first/64, (first+n-1)/64
	b := make([]byte, 0, 8*(to-from+1))
	for w := from; w <= to; w++ {
		b = binary.LittleEndian.AppendUint64(b, atomic.LoadUint64(&m.words[w])|wordMask(w, first, n))
	}
	if _, err := m.live.WriteAt(b, mapHeader+8*from); err != nil {
		return fmt.Errorf("write %s: %w", m.live.Name(), err)
	}
	for w := from; w <= to; w++ {
		atomic.OrUint64(&m.words[w], wordMask(w, first, n))
	}
	for p := first / pageBits; p <= (first+n-1)/pageBits; p++ {
		m.dirty[p].Store(true)
	}
	return nil
}

// wordMask is the bits of a word that are of n blocks from first on.
func wordMask(w, first, n int64) uint64 {
	lo, hi := max(first-64*w, 0), min(first+n-64*w, 64)
	return ^uint64(0) >> (64 - (hi - lo)) << lo
}

// count is how many blocks stand in the file.
func (m *blockMap) count() (n int64) {
	for i := range m.words {
		n += int64(bits.OnesCount64(atomic.LoadUint64(&m.words[i])))
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
	for _, f := range []*os.File{m.live, m.flushed} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}
