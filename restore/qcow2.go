package restore

import (
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"os"
	"sync"
)

// The layout of a qcow2 image, version 3: docs/interop/qcow2.txt of QEMU. Integers are big-endian. The first
// cluster has the header, the L1 table follows. Data and L2 tables come behind as they are needed, reference
// counts last: every cluster of the file is used once.
const (
	clusterBits = 16
	cluster     = 1 << clusterBits
	perL2       = cluster / 8 // entries of an L2 table: 512 MiB
	perRefs     = cluster / 2 // entries of a block of reference counts
	copied      = uint64(1) << 63
	// maxTables bounds the L2 tables that stay in memory though they are written.
	maxTables = 64
)

// qcow2 is a Target: an image that is written for the first time.
type qcow2 struct {
	f    *os.File
	size int64

	mu     sync.Mutex
	next   int64            // the first cluster of the file that is free
	l1     []uint64         // as in the file; 0: no table yet
	tables map[int]*l2Table // by their place in l1
}

type l2Table struct {
	entries [perL2]uint64 // where each cluster of the disk is in the file; 0: zeroes
	dirty   bool
}

// newQCOW2 begins an image, or goes on with one whose clusters up to next are in use.
func newQCOW2(f *os.File, size, next int64) (*qcow2, error) {
	q := &qcow2{f: f, size: size, tables: map[int]*l2Table{}}
	q.l1 = make([]uint64, (size+perL2*cluster-1)/(perL2*cluster))
	first := 1 + clusters(int64(len(q.l1))*8)
	if q.next = max(next, first); next == 0 {
		return q, f.Truncate(first * cluster)
	}
	b := make([]byte, len(q.l1)*8)
	if _, err := f.ReadAt(b, cluster); err != nil {
		return nil, fmt.Errorf("read the L1 table: %w", err)
	}
	for i := range q.l1 {
		if e := binary.BigEndian.Uint64(b[8*i:]); q.known(e) {
			q.l1[i] = e
		}
	}
	if err := q.scrub(); err != nil {
		return nil, err
	}
	// What stands behind is of no table: clusters are zeroes when they are taken.
	return q, f.Truncate(q.next * cluster)
}

// known reports whether an entry names a cluster that was taken when it was last noted how far the image is. Tables may have
// been written since.
func (q *qcow2) known(e uint64) bool {
	at := e &^ copied
	return at%cluster == 0 && at < uint64(q.next)*cluster
}

// scrub forgets what the tables name beyond what was noted: those clusters are taken anew.
func (q *qcow2) scrub() error {
	for i := range q.l1 {
		if q.l1[i] == 0 {
			continue
		}
		t, err := q.table(i)
		if err != nil {
			return err
		}
		for k, e := range t.entries {
			if !q.known(e) {
				t.entries[k], t.dirty = 0, true
			}
		}
		if _, err := q.flush(); err != nil {
			return err
		}
	}
	_, err := q.flush()
	return err
}

func clusters(bytes int64) int64 { return (bytes + cluster - 1) / cluster }

func (q *qcow2) Size() int64 { return q.size }
func (q *qcow2) Sync() error { return q.f.Sync() }

// Zero is never needed: the image is zeroes where nothing was written.
func (q *qcow2) Zero(int64, int64) error { return nil }

// table is the L2 table of a part of the disk. mu is held.
func (q *qcow2) table(i int) (*l2Table, error) {
	if t := q.tables[i]; t != nil {
		return t, nil
	}
	if len(q.tables) >= maxTables {
		maps.DeleteFunc(q.tables, func(_ int, t *l2Table) bool { return !t.dirty })
	}
	t := &l2Table{}
	if at := q.l1[i] &^ copied; at != 0 {
		b := make([]byte, cluster)
		if _, err := q.f.ReadAt(b, int64(at)); err != nil {
			return nil, fmt.Errorf("read an L2 table: %w", err)
		}
		for k := range t.entries {
			t.entries[k] = binary.BigEndian.Uint64(b[8*k:])
		}
	}
	q.tables[i] = t
	return t, nil
}

// place finds where n bytes at off are to be in the file, as far as they stand together there.
func (q *qcow2) place(off, n int64, take bool) (at, run int64, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for run < n {
		c := (off + run) / cluster
		t, err := q.table(int(c / perL2))
		if err != nil {
			return 0, 0, err
		}
		e := &t.entries[c%perL2]
		if *e == 0 && take {
			*e, t.dirty = uint64(q.next)*cluster|copied, true
			q.next++
		}
		here := int64(*e &^ copied)
		if here != 0 {
			here += (off + run) % cluster
		}
		switch {
		case run == 0:
			at = here
		case at == 0 && here != 0, at != 0 && here != at+run:
			return at, run, nil
		}
		run = min(n, run+cluster-(off+run)%cluster)
	}
	return at, run, nil
}

func (q *qcow2) WriteAt(p []byte, off int64) error {
	for len(p) > 0 {
		at, n, err := q.place(off, int64(len(p)), true)
		if err != nil {
			return err
		}
		if _, err := q.f.WriteAt(p[:n], at); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (q *qcow2) ReadAt(p []byte, off int64) error {
	for len(p) > 0 {
		at, n, err := q.place(off, int64(len(p)), false)
		if err != nil {
			return err
		}
		if at == 0 {
			clear(p[:n])
		} else if k, err := q.f.ReadAt(p[:n], at); err == io.EOF {
			clear(p[k:n]) // the rest of the last cluster
		} else if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// flush writes the tables, and returns which cluster is free: none that they name is beyond it.
func (q *qcow2) flush() (next int64, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	b := make([]byte, cluster)
	for i, t := range q.tables {
		if !t.dirty {
			continue
		}
		if q.l1[i] == 0 {
			q.l1[i] = uint64(q.next)*cluster | copied
			q.next++
		}
		for k, e := range t.entries {
			binary.BigEndian.PutUint64(b[8*k:], e)
		}
		if _, err := q.f.WriteAt(b, int64(q.l1[i]&^copied)); err != nil {
			return 0, err
		}
		t.dirty = false
	}
	l1 := make([]byte, 8*len(q.l1))
	for i, e := range q.l1 {
		binary.BigEndian.PutUint64(l1[8*i:], e)
	}
	_, err = q.f.WriteAt(l1, cluster)
	return q.next, err
}

// finish writes tables, reference counts and header.
func (q *qcow2) finish() error {
	used, err := q.flush()
	if err != nil {
		return err
	}
	// The counts count themselves.
	var blocks, tableClusters int64
	for {
		b := (used + blocks + tableClusters + perRefs - 1) / perRefs
		t := clusters(8 * b)
		if b == blocks && t == tableClusters {
			break
		}
		blocks, tableClusters = b, t
	}
	total := used + tableClusters + blocks
	if err := q.f.Truncate(total * cluster); err != nil {
		return err
	}
	table := make([]byte, 8*blocks)
	counts := make([]byte, cluster)
	for i := range blocks {
		at := (used + tableClusters + i) * cluster
		binary.BigEndian.PutUint64(table[8*i:], uint64(at))
		clear(counts)
		for k := range min(perRefs, total-i*perRefs) {
			binary.BigEndian.PutUint16(counts[2*k:], 1)
		}
		if _, err := q.f.WriteAt(counts, at); err != nil {
			return err
		}
	}
	if _, err := q.f.WriteAt(table, used*cluster); err != nil {
		return err
	}
	// The header last: without it, this is no image.
	_, err = q.f.WriteAt(q.header(used, tableClusters), 0)
	return err
}

func (q *qcow2) header(refs, refClusters int64) []byte {
	be := binary.BigEndian
	b := append(make([]byte, 0, 104+8), "QFI\xfb"...)
	b = be.AppendUint32(b, 3)
	b = append(b, make([]byte, 12)...) // no backing file
	b = be.AppendUint32(b, clusterBits)
	b = be.AppendUint64(b, uint64(q.size+511)&^511) // of whole sectors
	b = be.AppendUint32(b, 0)                       // not encrypted
	b = be.AppendUint32(b, uint32(len(q.l1)))
	b = be.AppendUint64(b, cluster) // of the L1 table
	b = be.AppendUint64(b, uint64(refs)*cluster)
	b = be.AppendUint32(b, uint32(refClusters))
	b = append(b, make([]byte, 4+8)...)  // no snapshots
	b = append(b, make([]byte, 3*8)...)  // no feature bits
	b = be.AppendUint32(b, 4)            // reference counts of 16 bits
	b = be.AppendUint32(b, 104)          // header length
	return append(b, make([]byte, 8)...) // no extensions
}

func (q *qcow2) forget() { (&File{f: q.f}).forget() }
