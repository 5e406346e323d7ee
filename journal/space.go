package journal

import (
	"errors"
	"fmt"
	"math"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// expireDue drops what is older than the window, then the oldest history that the limits or a file system
// that is nearly full ask for: a pass of each. It returns how many bytes came free.
func (g *Group) expireDue() (freed int64, err error) {
	if freed, err = g.expireAged(); err != nil {
		return freed, err
	}
	if g.excess() > 0 {
		n, err := g.expire(expiring{excess: g.excess, held: g.oldestHold(), upTo: record.MaxLSN})
		if freed += n; err != nil {
			return freed, err
		}
	}
	if g.lacking() > 0 {
		n, err := g.expire(expiring{excess: g.lacking, held: record.MaxLSN, upTo: record.MaxLSN})
		return freed + n, err
	}
	return freed, nil
}

// lacking is how many bytes the file system lacks of room for the next files, so that no write has to wait for an expiry. What files take that are to come in
// the place of others is as good as free.
func (g *Group) lacking() int64 {
	u, err := g.fs.GetDiskUsage(g.dir)
	if err != nil {
		return 0
	}
	free := int64(u.AvailBytes)
	for _, o := range g.store.Groups() {
		free += o.set.Temporary()
	}
	return min(g.o.keepLog()+4*g.o.SegmentSize-free, 2*g.o.SegmentSize)
}

// logCanGo reports whether there is a file of the window yet that may expire, if not at present: before it, no kept point goes.
func (g *Group) logCanGo() bool { return len(closedFiles(g.set.Files(segment.Log))) > 0 }

// excess is by how many bytes the group's segments are too large.
func (g *Group) excess() (excess int64) {
	if limit := g.limit.Load(); limit > 0 {
		excess = g.set.Size() - limit
	}
	if total := g.o.Total; total > 0 {
		var sum, largest int64
		for _, o := range g.store.Groups() {
			size := o.set.Size()
			sum, largest = sum+size, max(largest, size)
		}
		if g.set.Size() == largest {
			excess = max(excess, sum-total)
		}
	}
	return excess
}

// expireAged drops what is older than the window that is promised, a pass of it.
func (g *Group) expireAged() (freed int64, err error) {
	window := g.Policy().EveryWrite
	if window == 0 {
		return 0, nil
	}
	now := g.o.Now().UnixNano()
	files := g.set.Files(segment.Log)
	if last := g.Policy().Passed(now, closedFiles(files)); last > 0 {
		// Only up to the last checkpoint: nobody waits for it, and it makes none of its own.
		freed, err := g.expire(expiring{excess: everything, held: g.oldestHold(), upTo: min(last, record.LSN(g.checkpointed.Load()))})
		if freed > 0 || err != nil {
			return freed, err
		}
	}
	// A file that is written slowly would keep the oldest of it for long.
	if n := len(files); n > 0 && now-files[n-1].Created > int64(max(window/8, time.Minute)) {
		return 0, g.closeLog()
	}
	return 0, nil
}

// expireForSpace is called when no file can be begun. It reports whether any space came free.
func (g *Group) expireForSpace() (bool, error) {
	n, err := g.expireNeeded(g.o.SegmentSize)
	if n == 0 && err == nil && g.unapplied.Load() > 0 {
		// What is not applied can not go.
		if err = g.Apply(); err == nil {
			n, err = g.expireNeeded(g.o.SegmentSize)
		}
	}
	g.hurry.Add(1)
	defer g.hurry.Add(-1)
	for n == 0 && err == nil && !g.logCanGo() {
		var more bool
		if more, err = g.giveUp(); err != nil || !more {
			break
		}
		if err = g.closeOriginals(0); err == nil {
			n, err = g.Clean()
		}
	}
	if err != nil {
		g.log.Error("the journal is full and its oldest history can not be expired", zap.Error(err))
	}
	return n > 0, err
}

// Expire drops the group's oldest log files, and the originals that nothing
// needs without them, until at least excess bytes are free, as far as who reads all from an LSN on, holds
// and unapplied records allow. It returns how many bytes came free. The horizon moves to
// the last record dropped.
func (g *Group) Expire(excess int64) (freed int64, err error) {
	return g.expire(expiring{excess: func() int64 { return excess }, held: g.oldestHold(), upTo: record.MaxLSN})
}

// expireNeeded is Expire for one that must have the space: no hold keeps anything from it.
func (g *Group) expireNeeded(excess int64) (freed int64, err error) {
	return g.expire(expiring{excess: func() int64 { return excess }, held: record.MaxLSN, upTo: record.MaxLSN})
}

// expiring says which of the oldest files expire.
type expiring struct {
	excess     func() int64 // how many bytes are to come free; asked when it begins, as files become smaller meanwhile
	held, upTo record.LSN   // nothing expires after what holds let go of, or after upTo
}

// everything is more than any files have.
func everything() int64 { return math.MaxInt64 }

// expireFiles bounds the files that go in one pass, and with them its memory, unless there is no room to copy what points need of so few.
const expireFiles = 8

// expire is one pass, as far as e allows.
func (g *Group) expire(e expiring) (freed int64, err error) {
	g.apply.Lock()
	defer g.apply.Unlock()
	for range 3 {
		if freed, err = g.expireLocked(e); !errors.Is(err, errNeeded) {
			return freed, err
		}
	}
	return 0, nil // somebody comes to need what was to go each time: the next pass finds out
}

// expireLocked is errNeeded if somebody came to need what was to go. g.apply is held.
func (g *Group) expireLocked(e expiring) (freed int64, err error) {
	files := g.set.Files(segment.Log)
	closed := closedFiles(files)
	excess := e.excess()
	n := min(g.mayGo(closed, excess, e), expireFiles)
	if n == 0 {
		if excess > 0 && len(closed) == 0 {
			return 0, g.closeLog()
		}
		return 0, nil
	}
	before := g.set.Size()
	err = g.expireFirst(n, files, closed)
	// There is no room to carry over what views behind a near horizon need. Behind the farthest one, they need next to nothing.
	for most := g.mayGo(closed, everything(), e); errors.Is(err, segment.ErrFull) && n < most; {
		n = min(2*n, most)
		g.log.Warn("no room to expire the oldest history alone: expiring more of it", zap.Int("segments", n), zap.Error(err))
		err = g.expireFirst(n, files, closed)
	}
	if err != nil {
		err = fmt.Errorf("expire history up to LSN %d: %w", closed[n-1].Last, err)
	}
	return before - g.set.Size(), err
}

// expireFirst drops the first n log files. g.apply is held.
func (g *Group) expireFirst(n int, files []*segment.File, closed []retain.File) error {
	// Blocks that fall to the backing must be there durably.
	if closed[n-1].Last > record.LSN(g.checkpointed.Load()) {
		if err := g.checkpointLocked(); err != nil {
			return err
		}
	}
	return g.expireUpTo(closed[n-1].Last, files[:n], files[n])
}

// mayGo is how many of the oldest closed files may go for some bytes, as far as pins, and what else must stay, allow.
func (g *Group) mayGo(closed []retain.File, excess int64, e expiring) int {
	return retain.Expire(closed, excess, min(g.oldestPin(), e.held), min(g.Applied(), g.Durable(), e.upTo))
}

// closedFiles are the log files that no record is added to.
func closedFiles(files []*segment.File) (closed []retain.File) {
	for i := range files[:max(len(files)-1, 0)] {
		closed = append(closed, retain.File{Last: files[i+1].First - 1, Time: files[i+1].Created, Size: files[i].Alloc()})
	}
	return closed
}

// closeLog begins a new log file, so that a later expiry can drop the only one. Few
// records can have many originals: those of a trim.
func (g *Group) closeLog() error {
	g.append.Lock()
	defer g.append.Unlock()
	log := g.append.log
	if err := g.endedLocked(); err != nil || log.Current() == nil || log.Tail() == log.Current().Start() {
		return err
	}
	err := g.newLogLocked(0)
	if errors.Is(err, segment.ErrFull) {
		return nil // there is room when something is applied, or never
	}
	if err != nil {
		return g.failLocked(err)
	}
	return nil
}

// oldestPin is the oldest LSN from which on somebody needs all of the history.
func (g *Group) oldestPin() record.LSN {
	g.pins.Lock()
	defer g.pins.Unlock()
	pin := record.MaxLSN
	for lsn := range g.pins.from {
		pin = min(pin, lsn)
	}
	return pin
}
