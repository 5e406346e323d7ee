package journal

import (
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Op is a change to a disk.
type Op struct {
	Kind record.Kind // KindWrite, KindZero or KindTrim
	Disk *disk.Disk
	Ext  record.Extent
	Data []byte // of KindWrite: Ext.Len bytes; not kept after Append

	flags uint8
	cost  int64 // of zeroes: the bytes that the backing has there, see appendZeroes
}

// timeMarkEvery is how far apart the entries of the time table are, in
// nanoseconds of record time.
const timeMarkEvery = int64(100 * time.Millisecond)

// Append journals the operations in their order. When it returns without an
// error, all of them are with the kernel and seen by every read that begins later.
// It waits while the backings are too far behind. On an error a prefix
// of ops may have been journaled: NBD allows that of writes that were not
// acknowledged. ErrNoSpace may pass; ErrFailed does not.
func (g *Group) Append(ops []Op) error {
	for _, op := range ops {
		if err := checkOp(op); err != nil {
			return err
		}
	}
	for len(ops) > 0 {
		if ops[0].Ext.Len == 0 {
			ops = ops[1:] // nothing to journal
			continue
		}
		aligned := func(op Op) bool { return op.Ext.Len > 0 && op.Ext.Aligned(op.Disk.Size) }
		n := 0
		for n < len(ops) && aligned(ops[n]) && ops[n].Kind == record.KindWrite {
			n++
		}
		var err error
		switch {
		case n > 0:
			err = g.appendAligned(ops[:n])
		case aligned(ops[0]):
			n, err = 1, g.appendZeroes(ops[0])
		default:
			n, err = 1, g.appendUnaligned(ops[0])
		}
		if err != nil {
			return err
		}
		ops = ops[n:]
	}
	return nil
}

func checkOp(op Op) error {
	if !op.Ext.In(op.Disk.Size) {
		return fmt.Errorf("%v of %v on disk %s: its size is %d", op.Kind, op.Ext, op.Disk.Name, op.Disk.Size)
	}
	if !op.Disk.Attached() {
		return fmt.Errorf("%v of %v on disk %s: %w", op.Kind, op.Ext, op.Disk.Name, ErrDetached)
	}
	switch op.Kind {
	case record.KindWrite:
		if int64(len(op.Data)) != op.Ext.Len || op.Ext.Len > record.MaxPayload-2*record.BlockSize {
			return fmt.Errorf("write of %v on disk %s: %d bytes given", op.Ext, op.Disk.Name, len(op.Data))
		}
	case record.KindZero, record.KindTrim:
	default:
		return fmt.Errorf("a disk takes no %v", op.Kind)
	}
	return nil
}

// appendUnaligned journals whole blocks for an operation that covers some only
// in part: the rest of them is read, under the lock that orders records, so that
// no write falls between. The read before it warms the cache outside the lock.
func (g *Group) appendUnaligned(op Op) error {
	d := op.Disk
	edges, middle := splitEdges(op.Ext, d.Size)
	if op.Kind == record.KindWrite {
		edges, middle = []record.Extent{op.Ext}, record.Extent{}
	}
	for _, e := range edges {
		ext := e.Align(d.Size)
		buf := make([]byte, ext.Len)
		if err := readEdges(d, buf, e); err != nil {
			return err
		}
		if err := g.appendEdge(op, e, buf); err != nil {
			return err
		}
	}
	if middle.Len == 0 {
		return nil
	}
	return g.appendZeroes(Op{Kind: op.Kind, Disk: d, Ext: middle})
}

// maxZeroes is how many bytes of a backing one record may make zeroes.
const maxZeroes = 64 << 20

// mostZeroes is how many it may at present.
func (g *Group) mostZeroes() int64 {
	g.append.Lock()
	defer g.append.Unlock()
	return min(max(g.append.mayOwe/16, record.BlockSize), maxZeroes)
}

// appendZeroes journals whole blocks of zeroes. A record of no bytes may cost an original for
// each block of its range: it is cut into pieces that the journal has room for, one after the
// other, and each is charged what it may cost. Where the backing has a hole it costs nothing.
func (g *Group) appendZeroes(op Op) error {
	for op.Ext.Len > 0 {
		n, cost := op.Disk.InBacking(op.Ext, g.mostZeroes())
		piece := Op{Kind: op.Kind, Disk: op.Disk, Ext: record.Extent{Off: op.Ext.Off, Len: n}, cost: cost}
		if err := g.appendAligned([]Op{piece}); err != nil {
			return err
		}
		op.Ext.Off, op.Ext.Len = op.Ext.Off+n, op.Ext.Len-n
	}
	return nil
}

// readEdges fills the first and the last block of buf, which is part's aligned
// extent, where part does not cover them.
func readEdges(d *disk.Disk, buf []byte, part record.Extent) error {
	ext := part.Align(d.Size)
	head := min(ext.Len, record.BlockSize)
	if part.Off != ext.Off {
		if err := d.ReadAt(buf[:head], ext.Off, false); err != nil {
			return err
		}
	}
	if part.End() != ext.End() {
		last := (ext.End() - 1) &^ (record.BlockSize - 1)
		return d.ReadAt(buf[last-ext.Off:], last, false)
	}
	return nil
}

// splitEdges divides an extent into its whole blocks and the parts of blocks at its ends.
func splitEdges(ext record.Extent, size int64) (edges []record.Extent, middle record.Extent) {
	start := (ext.Off + record.BlockSize - 1) &^ (record.BlockSize - 1)
	end := ext.End()
	if end != size {
		end &^= record.BlockSize - 1
	}
	if start >= end {
		return []record.Extent{ext}, record.Extent{}
	}
	if start > ext.Off {
		edges = append(edges, record.Extent{Off: ext.Off, Len: start - ext.Off})
	}
	if end < ext.End() {
		edges = append(edges, record.Extent{Off: end, Len: ext.End() - end})
	}
	return edges, record.Extent{Off: start, Len: end - start}
}

// appendEdge journals the blocks of an operation's part as a write of what they
// hold with the part changed. buf is scratch of their length.
func (g *Group) appendEdge(op Op, part record.Extent, buf []byte) error {
	d, ext := op.Disk, part.Align(op.Disk.Size)
	return g.admitted(func() error {
		if err := readEdges(d, buf, part); err != nil {
			return err
		}
		dst := buf[part.Off-ext.Off:][:part.Len]
		if op.Kind == record.KindWrite {
			copy(dst, op.Data)
		} else {
			clear(dst)
		}
		_, err := g.appendLocked([]Op{{Kind: record.KindWrite, Disk: d, Ext: ext, Data: buf}})
		return err
	})
}

func (g *Group) appendAligned(ops []Op) error {
	return g.admitted(func() error {
		for len(ops) > 0 {
			n, err := g.appendLocked(ops)
			if err != nil {
				return err
			}
			ops = ops[n:]
		}
		return nil
	})
}

// admitted calls fn with the append lock held, once there is room in memory
// for more unapplied records. If fn finds the journal full, history is expired
// and fn called once more.
func (g *Group) admitted(fn func() error) error {
	return g.admit(func() error { return g.waitRoomLocked(g.closedLocked) }, fn)
}

// admittedNote is admitted for what takes no memory to speak of: it waits for no room.
func (g *Group) admittedNote(fn func() error) error {
	return g.admit(g.closedLocked, fn)
}

func (g *Group) admit(wait, fn func() error) error {
	g.append.Lock()
	defer g.append.Unlock()
	for tries := 0; ; tries++ {
		err := wait()
		if err == nil {
			err = fn()
		}
		if !errors.Is(err, segment.ErrFull) || tries > 0 {
			return err
		}
		g.append.Unlock()
		freed, expireErr := g.expireForSpace()
		g.append.Lock()
		if !freed || expireErr != nil {
			return err
		}
	}
}

// waitRoomLocked waits until there is room, or closed says why there is no use.
func (g *Group) waitRoomLocked(closed func() error) error {
	for {
		switch err := closed(); {
		case err != nil:
			return err
		case g.roomLocked():
			return nil
		case g.append.full != nil:
			return g.append.full
		}
		kick(g.kickApply)
		kick(g.kickSync)
		g.append.room.Wait()
	}
}

// roomLocked reports whether memory and the file system have room for more
// unapplied records. While a round is under way, the room that it leaves is given out as
// it goes on: a guest that is faster than its disk is slowed down, not stopped.
func (g *Group) roomLocked() bool {
	a := &g.append
	share := int64(min(1, a.underWay.done+1./16) * 1024) // a limit may be the largest there is
	room := func(used, covered, limit int64) bool {
		if covered > 0 {
			limit = covered + (limit-covered)/1024*share
		}
		return used < limit
	}
	return room(g.unapplied.Load(), a.underWay.bytes, g.o.Unapplied) && room(g.owed.Load(), a.underWay.owed, a.mayOwe) &&
		room(int64(a.weight), int64(a.underWay.weight), maxWeight) && a.lag < indexLag
}

// appendLocked writes as many of the aligned operations as fit the current
// segment, in one call, and puts them over the backings. It returns how many.
func (g *Group) appendLocked(ops []Op) (int, error) {
	a := &g.append
	if a.err != nil {
		return 0, a.err
	}
	n, room, bytes := g.fitting(ops)
	if n == 0 {
		if err := g.rollLocked(bytes); err != nil {
			return 0, err
		}
		if n, room, _ = g.fitting(ops); n == 0 {
			return 0, g.failLocked(fmt.Errorf("a record of %d bytes does not fit a new segment", bytes))
		}
	}
	now := g.nowLocked()
	a.enc.Reset(room)
	if cap(a.sums) < room {
		a.sums = make(record.Sums, 0, room)
	}
	a.sums = a.sums[:0]
	a.headers = a.headers[:0]
	for i, op := range ops[:n] {
		a.headers = append(a.headers, g.headerLocked(op, a.next+record.LSN(i), now))
		a.enc.Add(&a.headers[i], op.Data)
	}
	off := a.log.Tail()
	if err := a.log.Append(a.enc.Vec, a.enc.Bytes); err != nil {
		return 0, g.failLocked(err)
	}
	var owed int64
	for i := range a.headers {
		g.noteLocked(&a.headers[i], ops[i].Disk, off)
		off += a.headers[i].Size()
		owed += max(a.headers[i].Size(), ops[i].cost)
	}
	g.advanceLocked(a.next+record.LSN(n)-1, n, a.enc.Bytes, owed)
	return n, nil
}

// fitting is how many operations fit the current segment, what their headers
// take, and how many bytes the first one takes.
func (g *Group) fitting(ops []Op) (n, room int, first int64) {
	var sum int64
	versions := 0
	for i, op := range ops {
		h := record.Header{Payload: len(op.Data)}
		if sum += h.Size(); i == 0 {
			first = sum
		}
		if versions += versionsOf(op.Ext); !g.fitsLocked(n, sum, versions) {
			return n, room, first
		}
		n, room = n+1, room+h.EncodedSize()
	}
	return n, room, first
}

// fitsLocked reports whether one more record fits the current segment behind n others, which with it have so many bytes and versions. One that alone has too many
// versions is alone in its file.
func (g *Group) fitsLocked(n int, bytes int64, versions int) bool {
	alone := n == 0 && g.append.versions == 0
	return g.append.log.Fits(bytes) && (alone || g.append.versions+versions <= g.o.fileVersions())
}

// versionsOf is how many versions a record of an extent has in the index.
func versionsOf(ext record.Extent) int {
	return index.Units(ext.Off/record.BlockSize, int64(record.Blocks(ext.Len)))
}

func (g *Group) rollLocked(n int64) error {
	if err := g.newLogLocked(n); err != nil {
		if errors.Is(err, segment.ErrFull) {
			g.append.noRoom = fmt.Errorf("the journal of group %s is full: %w", g.name, err)
			return g.append.noRoom
		}
		return g.failLocked(err)
	}
	g.append.noRoom = nil
	g.limitOwedLocked()
	return nil
}

// newLogLocked begins a file of the log. No record in it will be older than its head says that it is.
func (g *Group) newLogLocked(n int64) error {
	h := g.header(g.append.next)
	for _, gap := range g.gapsNow() {
		switch gap.Until {
		case record.MaxLSN:
			h.Bridge, h.BridgeAfter = true, gap.After
		case h.First - 1:
			h.Bridged, h.GapAfter = true, gap.After
		}
	}
	if err := g.append.log.Roll(h, n); err != nil {
		return err
	}
	g.append.versions = 0
	g.lastTime.Store(h.Created)
	return nil
}

// limitOwedLocked bounds the originals that may be owed by what the file system has room for.
// Each block may cost one before it is applied, and what is not applied can not be
// expired: a journal that took more than it has room to apply would be full for good.
func (g *Group) limitOwedLocked() {
	a := &g.append
	was := a.mayOwe
	a.mayOwe = math.MaxInt64
	if u, err := g.fs.GetDiskUsage(g.dir); err == nil {
		// Every group may fill its part. The log's next file and its spare take theirs meanwhile, and
		// another must find room then, or the present one can not go.
		room := (int64(u.AvailBytes)-g.o.keepLog())/max(1, g.store.open.count.Load()) - 2*g.o.SegmentSize
		a.mayOwe = max(room-room/8, g.o.SegmentSize/4)
	}
	if a.mayOwe > was {
		a.room.Broadcast()
	}
}

// muchUnappliedLocked reports whether so much is unapplied that a round is due
// whatever the guest does. The rest is for what it writes until the round ends.
func (g *Group) muchUnappliedLocked() bool {
	return g.unapplied.Load() > g.o.Unapplied/3*2 || g.owed.Load() > g.append.mayOwe/3*2 || g.append.weight > maxWeight/2
}

// nowLocked is the time of the next record: it never goes backwards.
func (g *Group) nowLocked() int64 {
	return max(g.o.Now().UnixNano(), g.lastTime.Load())
}

func (g *Group) headerLocked(op Op, lsn record.LSN, now int64) record.Header {
	a := &g.append
	at := len(a.sums)
	a.sums = record.AppendSums(a.sums, op.Data)
	return record.Header{
		LSN: lsn, Time: now, Durable: g.Durable(), Extent: op.Ext, Disk: op.Disk.ID, Kind: op.Kind, Flags: op.flags,
		Salt: a.log.Current().Salt, Payload: len(op.Data), Sums: a.sums[at:len(a.sums):len(a.sums)],
	}
}

// noteLocked puts a record that stands at off over the backing, and queues it for the index.
func (g *Group) noteLocked(h *record.Header, d *disk.Disk, off int64) {
	file := g.append.log.Current().Number
	g.append.weight += d.Insert(h, file, off+int64(h.EncodedSize()))
	g.append.guest += int64(h.Payload)
	p := g.append.pend
	before := len(p.entries)
	p.entries = appendEntries(p.entries, h, file, off)
	versions := len(p.entries) - before
	g.append.lag += versions
	g.append.versions += versions
	g.noteTimeLocked(h, file, off)
}

func (g *Group) noteTimeLocked(h *record.Header, file uint32, off int64) {
	if h.Time-g.lastTime.Load() >= timeMarkEvery || h.LSN%4096 == 1 {
		p := g.append.pend
		p.times = append(p.times, index.TimeMark{Time: h.Time, LSN: h.LSN, File: file, Off: uint32(off)})
	}
	g.newestLocked(h.Time)
}

// newestLocked notes the time of the newest record.
func (g *Group) newestLocked(t int64) {
	g.recordTime.Store(t)
	g.lastTime.Store(t)
}

// advanceLocked makes the last of n appended records the head. owed is what they may cost in originals.
func (g *Group) advanceLocked(head record.LSN, n int, bytes, owed int64) {
	a := &g.append
	if a.oldest.IsZero() {
		a.oldest = g.o.Now()
	}
	if a.resting {
		a.resting = false
		kick(g.kickSync)
		kick(g.kickApply)
	}
	a.next = head + 1
	a.bytes += bytes
	g.appended.Store(uint64(head))
	g.moved.ring()
	g.unapplied.Add(max(bytes, int64(n)*record.BlockSize))
	g.owed.Add(owed)
	if g.muchUnappliedLocked() {
		kick(g.kickApply)
	}
	if a.bytes-a.synced >= syncBytes {
		kick(g.kickSync)
	}
}

// appendEntries appends the index entries of the record at off in file.
func appendEntries(dst []index.Entry, h *record.Header, file uint32, off int64) []index.Entry {
	first := h.Extent.Off / record.BlockSize
	payload := off + int64(h.EncodedSize())
	index.Cut(first, int64(record.Blocks(h.Extent.Len)), func(u index.Unit) {
		e := index.Entry{Disk: h.Disk, Unit: u, LSN: h.LSN}
		if h.Kind == record.KindZero || h.Kind == record.KindTrim || h.Kind == record.KindHole {
			e.Zero = true
		} else {
			i := u.First() - first
			e.File, e.Payload = file, uint32(payload+i*record.BlockSize)
			e.Aux = uint32(off + record.HeaderSize + 4*i)
			if u.Class == 0 {
				e.Aux = h.Sums.At(int(i))
			}
		}
		dst = append(dst, e)
	})
	return dst
}
