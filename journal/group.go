package journal

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Group is a consistency group: disks whose writes share one order and one journal.
type Group struct {
	name  string
	id    uint32
	fs    vfs.FS
	dir   string
	o     Options
	log   *zap.Logger
	store *Store
	set   *segment.Set
	ix    *index.Group
	// disks changes with joining held and, but at open, g.append; who reads it may have one that is older.
	disks atomic.Pointer[members]
	// standing changes with joining held and, but at open, g.append.
	standing atomic.Pointer[standing]
	// receiving serialises Receives, and what brings the group over a gap.
	receiving sync.Mutex
	bridge    *record.Beginning // what the bridge leads to that is made; nil: none, or none since the group was opened. Guarded by receiving
	// gaps changes with g.append held, but at open.
	gaps atomic.Pointer[[]Gap]
	// joining serialises what adds and removes disks, and changes who writes.
	joining sync.Mutex

	// apply is held by a round of Apply, by Checkpoint and by Expire: by all
	// that changes backings, originals and the captured bitmaps.
	apply struct {
		sync.Mutex
		orig     *segment.Writer
		sums     record.Sums   // scratch
		gathered []byte        // originals that are not written yet
		pending  []index.Entry // of originals that no index commit covers yet
		kept     *index.Reader // of the round under way, for originals of before it; nil: none was asked for
		round    record.LSN    // the round under way covers records up to here; 0: none
		saved    record.LSN    // what the last checkpoint saved covers records up to here
		logBytes int64         // appended at the last checkpoint
		last     time.Time     // of the last checkpoint
	}

	// syncing serialises syncs of the log.
	syncing sync.Mutex

	expireNext time.Time // background's: no expiry before

	// index is held while a batch is made and committed.
	index struct {
		sync.Mutex
		mark index.Watermark
	}

	// append guards the order of records.
	append struct {
		sync.Mutex
		room     sync.Cond // on append: signalled when a round gets on or ends, or an index commit ends
		log      *segment.Writer
		enc      segment.Encoder
		sums     record.Sums
		headers  []record.Header // scratch
		next     record.LSN
		pend     *pending   // versions of records that no sync covers yet
		ready    []*pending // synced, not indexed; ascending
		lag      int        // versions that are not indexed
		versions int        // of what was appended to the log's current file since open, see fileVersions
		bytes    int64      // appended since open
		guest    int64      // of bytes: what was written to the disks
		synced   int64      // of bytes
		weight   int        // of the overlays, see maxWeight
		oldest   time.Time  // when the first unapplied record was appended; zero: none
		err      error      // sticky; wraps ErrFailed
		closed   error      // why nothing is taken any more though the group has not failed; nil: it is
		busyAt   time.Time  // when the guest had written much between two looks of applyDue, last
		lastLook int64      // of bytes
		lookedAt time.Time
		underWay round
		resting  bool  // the loops look less often, see rest
		mayOwe   int64 // how many bytes of originals may be owed, see limitOwedLocked
		full     error // why applying makes no progress; nil if it does
		noRoom   error // why the last write that took a new segment got none; nil if it did

		markers     markers
		definitions definitions
	}

	appended atomic.Uint64 // LSN of the last record that is with the kernel
	durable  atomic.Uint64
	syncTook atomic.Int64 // how long the last sync of the log took, nanoseconds
	indexed  atomic.Uint64
	applied  atomic.Uint64
	// checkpointed is the LSN up to which the backings hold the records durably.
	checkpointed atomic.Uint64
	horizon      atomic.Uint64 // see expiredTo
	// kept changes with the apply lock and pins held, but at open.
	kept    atomic.Pointer[[]KeptPoint]
	policy  atomic.Pointer[retain.Policy]
	hadKept atomic.Bool  // any point was ever kept, or viewed, beyond the horizon
	eaten   atomic.Int64 // see Window
	// rearranged counts what moves or forgets originals in the index, twice each: it is odd while one is under way. Changed with the apply lock held.
	rearranged atomic.Uint64
	originals  atomic.Int64             // bytes added to them since open
	verified   atomic.Pointer[verified] // nil: never, as far as is known
	limit      atomic.Int64             // of the segments, bytes; 0: none
	hurry      atomic.Int32             // how many wait for the space that a Clean brings
	settled    atomic.Int64             // until then, Unix nanoseconds, what was kept stays so, see chosen; 0: background work was never begun
	// cleaning serialises Cleans.
	cleaning struct {
		sync.Mutex
		needs  needs
		mended sync.Map // numbers of files, uint32, of which something was mended: what needs has of them is from when they were damaged
	}
	keptBytes  atomic.Pointer[fileNeeds] // as of the last Clean: see Bound; nil: there was none
	compacting struct {
		sync.Mutex
		plain map[uint32]bool // numbers of files that are not to become compact
	}
	unapplied  atomic.Int64 // bytes of records, each counted as a block at least
	owed       atomic.Int64 // bytes of originals that applying may cost, at most
	recordTime atomic.Int64 // of the newest record, Unix nanoseconds; set with g.append held
	// lastTime is what no record will be older than: the newest one's, or that of the head of a segment behind it, if this
	// daemon writes the group.
	lastTime atomic.Int64

	moved, synced bell // rung when appended and when durable rise, and when the group fails

	pins struct {
		sync.Mutex
		holds   map[*Hold]record.LSN // what others have yet to read
		points  map[record.LSN]int   // by LSN: open views, and what else needs the disks as they were there
		from    map[record.LSN]int   // by LSN: what needs all of the history from there on
		markers map[record.LSN]bool  // pinned ones
		users   map[*disk.Disk]int   // who has a disk open, as it is or as it was; -1: it is leaving
	}

	kickSync, kickApply chan struct{}

	loops loops
}

// round is what a round of Apply covers of what is unapplied, and how much of that is
// done, 0 to 1. The zero round is none.
type round struct {
	bytes  int64
	owed   int64
	weight int
	done   float64
}

// pending gathers what the index must learn of a run of records.
type pending struct {
	entries []index.Entry
	times   []index.TimeMark
	markers []index.MarkerChange
	last    record.LSN

	definitions []index.Definition
}

// Name is the group's name.
func (g *Group) Name() string { return g.name }

// Head is the newest LSN.
func (g *Group) Head() record.LSN { return record.LSN(g.appended.Load()) }

// Durable is the LSN up to which the journal survives the host.
func (g *Group) Durable() record.LSN { return record.LSN(g.durable.Load()) }

// Applied is the LSN up to which the backings hold the records.
func (g *Group) Applied() record.LSN { return record.LSN(g.applied.Load()) }

// JournalBytes is what the group's segments take up.
func (g *Group) JournalBytes() int64 { return g.set.Size() }

// Appended is how many bytes of records were appended since the group was opened.
func (g *Group) Appended() int64 {
	g.append.Lock()
	defer g.append.Unlock()
	return g.append.bytes
}

// Bytes is what a group's history takes, in bytes.
type Bytes struct {
	// Guest is what was written to the disks since the group was opened, Log what that took as records, and Originals what was kept, carried over and copied
	// beside.
	Guest, Log, Originals int64
	// Segments is what the files of both take up now, Saved what they would take more if none was compact, and Index, about, the group's part of the index.
	Segments, Saved, Index int64
}

// Bytes says what the group's history takes.
func (g *Group) Bytes() (b Bytes, err error) {
	g.append.Lock()
	b.Guest, b.Log = g.append.guest, g.append.bytes
	g.append.Unlock()
	b.Originals, b.Segments, b.Saved = g.originals.Load(), g.set.Size(), g.saved()
	b.Index, err = g.ix.Size()
	return b, err
}

// Unapplied is how many bytes of records the backings are behind, each counted as
// [Options.Unapplied] does.
func (g *Group) Unapplied() int64 { return g.unapplied.Load() }

// State is "active", "full" or "failed", and why.
func (g *Group) State() (string, error) {
	g.append.Lock()
	defer g.append.Unlock()
	switch {
	case g.append.err != nil:
		return "failed", g.append.err
	case g.append.full != nil:
		return "full", g.append.full
	case g.append.noRoom != nil:
		return "full", g.append.noRoom
	}
	return "active", nil
}

// alive reports whether the group has not failed.
func (g *Group) alive() bool {
	g.append.Lock()
	defer g.append.Unlock()
	return g.append.err == nil
}

// ended is why the group takes no records; nil: it does.
func (g *Group) ended() error {
	g.append.Lock()
	defer g.append.Unlock()
	return g.endedLocked()
}

// fail makes the group refuse everything but reads, for good.
func (g *Group) fail(err error) error {
	g.append.Lock()
	defer g.append.Unlock()
	return g.failLocked(err)
}

func (g *Group) failLocked(err error) error {
	if g.append.err == nil {
		g.append.err = fmt.Errorf("%w: group %s: %w", ErrFailed, g.name, err)
		g.log.Error("group has failed: it takes no more writes until the daemon is started again", zap.Error(err))
		g.append.room.Broadcast()
		g.moved.ring()
		g.synced.ring()
	}
	return g.append.err
}

// endedLocked is why the group takes no records.
func (g *Group) endedLocked() error {
	if g.append.err != nil {
		return g.append.err
	}
	return g.append.closed
}

// closedLocked is why the group takes no records of this daemon's.
func (g *Group) closedLocked() error {
	if err := g.endedLocked(); err != nil {
		return err
	}
	if g.Follows() {
		return fmt.Errorf("group %s: %w", g.name, ErrFollows)
	}
	return nil
}

// setClosed has the group take no records for a reason, or take them again.
func (g *Group) setClosed(why error) {
	g.append.Lock()
	defer g.append.Unlock()
	g.append.closed = why
	g.append.room.Broadcast()
	g.moved.ring()
	g.synced.ring()
}

// Acquire implements disk.Journal.
func (g *Group) Acquire(number uint32) (*segment.File, error) { return g.set.Acquire(number) }

// header is the head of a new segment.
func (g *Group) header(first record.LSN) segment.Header {
	s := g.standing.Load()
	created := g.lastTime.Load()
	if !s.follows {
		created = max(created, g.o.Now().UnixNano()) // the clock of its records is another's
	}
	return segment.Header{
		Group: g.id, First: first, Horizon: g.expiredTo(), Applied: record.LSN(g.checkpointed.Load()),
		Created: created, Name: g.name, Disks: g.disks.Load().table, Reigns: s.reigns, Follows: s.follows,
	}
}

// Sync makes every record durable whose Append returned before the call. A
// failed sync fails the group: the kernel may have dropped what it could not write.
func (g *Group) Sync() error { return g.syncTo(g.Head()) }

func (g *Group) syncTo(lsn record.LSN) error {
	for g.Durable() < lsn {
		g.syncing.Lock()
		if g.Durable() >= lsn {
			g.syncing.Unlock()
			break // whoever held the lock has covered it
		}
		err := g.syncLocked()
		g.syncing.Unlock()
		if err != nil {
			return err
		}
	}
	// A failed sync does not raise Durable, so getting here means success
	// even if the group failed since.
	return nil
}

// syncLog makes the log's files durable, one that no record stands in yet too: its name and its head.
func (g *Group) syncLog() error {
	g.syncing.Lock() // whoever finds nothing to sync must not pass one who is at it
	defer g.syncing.Unlock()
	if err := g.append.log.Sync(); err != nil {
		return g.fail(err)
	}
	return nil
}

func (g *Group) syncLocked() error {
	g.append.Lock()
	if err := g.append.err; err != nil {
		g.append.Unlock()
		return err
	}
	p := g.append.pend
	head, bytes := record.LSN(g.appended.Load()), g.append.bytes
	p.last = head
	g.append.pend = &pending{}
	g.append.Unlock()

	began := time.Now()
	if err := g.append.log.Sync(); err != nil {
		return g.fail(err)
	}
	g.syncTook.Store(int64(time.Since(began)))

	g.append.Lock()
	g.append.synced = bytes
	g.append.ready = append(g.append.ready, p)
	many := g.append.lag >= indexBatch
	g.append.Unlock()
	g.durable.Store(uint64(head))
	g.synced.ring()
	if many {
		kick(g.kickSync)
	}
	return nil
}

// kick wakes a loop without waiting for it.
func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// closeFiles gives up everything that open took. Background work has ended, but for a compaction, which holds its file and finds the set closed.
func (g *Group) closeFiles() error {
	var errs []error
	for _, d := range g.disks.Load().all {
		errs = append(errs, d.Detach())
	}
	errs = append(errs, g.ix.RetireReaders(time.Time{}, 0))
	g.set.Close()
	return errors.Join(errs...)
}
