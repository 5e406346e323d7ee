package journal

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

// A group that follows may be so far behind that its writer has the next records no more, or be unable to take them. It is then brought from
// the last LSN it has to a later one by a bridge: records, in its log, of the blocks that differ between the two, under LSNs of the gap between. They are
// applied like any others, so that what was before keeps its history, and whatever a crash leaves of them is gone on with, or rewound. None of their LSNs
// but the last can be viewed. The package comment has the crash argument.

// Gap is a run of LSNs that a group never had: those between After and Until, which it has.
type Gap struct {
	After, Until record.LSN // Until is record.MaxLSN while the group is being brought over it
}

// Range is the LSNs from First to Last.
type Range struct{ First, Last record.LSN }

// Gaps are those in what the group holds, in their order.
func (g *Group) Gaps() []Gap { return slices.Clone(g.gapsNow()) }

func (g *Group) gapsNow() []Gap {
	if p := g.gaps.Load(); p != nil {
		return *p
	}
	return nil
}

// Horizon is where the continuous window begins: every LSN from it to the newest can be viewed, and every record behind it read.
func (g *Group) Horizon() record.LSN {
	h := g.expiredTo()
	for _, gap := range g.gapsNow() {
		if gap.Until != record.MaxLSN {
			h = max(h, gap.Until)
		}
	}
	return h
}

// expiredTo is the LSN up to which history has expired: the oldest that can be viewed, unless it lies in a gap.
func (g *Group) expiredTo() record.LSN { return record.LSN(g.horizon.Load()) }

// Newest is the newest LSN that can be viewed: the head, or, while the group is brought over a gap, the last before that.
func (g *Group) Newest() record.LSN {
	newest, ok := g.NewestUpTo(record.MaxLSN)
	if !ok {
		return g.Head() // a gap has ended since it was read
	}
	return newest
}

// NewestUpTo is the newest LSN that can be viewed, with all of the history from there on, and is not above another one; ok is false if there is none.
func (g *Group) NewestUpTo(lsn record.LSN) (newest record.LSN, ok bool) {
	for _, r := range g.Windows() {
		if r.First <= lsn {
			newest, ok = min(r.Last, lsn), true
		}
	}
	return newest, ok
}

// Bridging reports whether the group is being brought over a gap, and the last LSN before it. Its disks are a mix then: nobody may
// read them but by views.
func (g *Group) Bridging() (after record.LSN, ok bool) {
	gaps := g.gapsNow()
	if n := len(gaps); n > 0 && gaps[n-1].Until == record.MaxLSN {
		return gaps[n-1].After, true
	}
	return 0, false
}

// Viewable are the LSNs that can be viewed, in their order: kept points, and those of windows.
func (g *Group) Viewable() (all []Range) {
	windows := g.Windows()
	for _, k := range g.KeptPoints() {
		if len(windows) > 0 && k.LSN < windows[0].First {
			all = append(all, Range{k.LSN, k.LSN})
		}
	}
	return append(all, windows...)
}

// Windows are the LSNs that can be viewed and that the log has, or has just lost, the records of. There are several if there are gaps.
func (g *Group) Windows() (all []Range) {
	// The head first: a bridge that begins after it was read does not move it into its gap.
	first, head := g.expiredTo(), g.Head()
	for _, gap := range g.gapsNow() {
		if first <= gap.After {
			all = append(all, Range{first, gap.After})
		}
		first = max(first, gap.Until)
	}
	if first <= head {
		all = append(all, Range{first, head})
	}
	return all
}

func (g *Group) viewable(lsn record.LSN) bool {
	// The windows first: what leaves them is kept before.
	return slices.ContainsFunc(g.Windows(), func(r Range) bool { return r.First <= lsn && lsn <= r.Last }) || g.isKept(lsn)
}

// noPoint says why a point can not be viewed.
func (g *Group) noPoint(point, why string) *PointError {
	return &PointError{Group: g.name, Point: point, Why: why, Viewable: g.Windows(), Kept: len(g.KeptPoints())}
}

// noneThere is a noPoint with the kept points around, of which before is how many lie before it.
func (g *Group) noneThere(point, why string, kept []KeptPoint, before int) *PointError {
	e := g.noPoint(point, why)
	if before > 0 {
		e.Before = &kept[before-1]
	}
	if before < len(kept) {
		e.After = &kept[before]
	}
	return e
}

// notViewable says why an LSN can not be viewed.
func (g *Group) notViewable(lsn record.LSN) *PointError {
	why := "its record never came here"
	switch {
	case lsn < g.expiredTo():
		why = "it is older than the horizon, and not kept"
	case lsn > g.Newest():
		why = "it is newer than the head"
	}
	kept := g.KeptPoints()
	before, _ := findKept(kept, lsn)
	if lsn >= g.expiredTo() {
		return g.noPoint(fmt.Sprintf("lsn:%d", lsn), why)
	}
	return g.noneThere(fmt.Sprintf("lsn:%d", lsn), why, kept, before)
}

// MaxBridgeBytes is how many bytes of blocks one Bridge may be of.
const MaxBridgeBytes = 16 << 20

// BeginBridge begins to bring a group that follows over a gap, from its head to an LSN at which its writer's is what a beginning says, or
// goes on with that. Then the disks have to be made what they were there, by Bridge, and EndBridge ends it; or a Rewind to
// where it was before the gap. Until then the group takes no records, and can not lead; the history that it has is kept. It is
// durable when BeginBridge returns.
//
// ErrDetached says that a disk of the writer's is not what it was here: the group has to begin anew.
func (g *Group) BeginBridge(b record.Beginning) error {
	g.receiving.Lock()
	defer g.receiving.Unlock()
	g.joining.Lock()
	defer g.joining.Unlock()
	if err := g.beginBridge(b); err != nil {
		return fmt.Errorf("bring group %s from LSN %d to LSN %d: %w", g.name, g.Newest(), b.At, err)
	}
	return nil
}

func (g *Group) beginBridge(b record.Beginning) error {
	if !g.Follows() {
		return fmt.Errorf("the group is this daemon's, in epoch %d: have it follow first", g.Reigns().Epoch())
	}
	if _, _, err := g.behindGap(b); err != nil {
		return err
	}
	head := g.Head()
	_, open := g.Bridging()
	if b.At <= head {
		return fmt.Errorf("%w: LSN %d is here, or, if a bridge to elsewhere was begun, taken: rewind the group to LSN %d", ErrDiverged, head, g.Newest())
	}
	if !open {
		err := g.rollWith(true, func() (undo func(), err error) {
			was := g.gaps.Load()
			now := append(g.Gaps(), Gap{After: head, Until: record.MaxLSN})
			g.gaps.Store(&now)
			return func() { g.gaps.Store(was) }, nil
		})
		if err != nil {
			return err
		}
		g.pinBeforeGap()
		g.log.Info("the group is being brought over a gap: the records behind its head can not be had, or taken", zap.Uint64("after", uint64(head)), zap.Uint64("to", uint64(b.At)))
	}
	g.bridge = &b
	return nil
}

// pinBeforeGap keeps the last LSN before a gap that the group is being brought over from expiring: until it is, there is nothing newer.
func (g *Group) pinBeforeGap() {
	after, _ := g.Bridging()
	g.pins.Lock()
	defer g.pins.Unlock()
	g.pins.from[after]++
}

// behindGap is the group's standing, and its disks, behind a gap, or an error if it can not come to be what a beginning says. Disks that are not
// here yet come with the bridge's end, or later, see Adopt.
func (g *Group) behindGap(b record.Beginning) (*standing, *members, error) {
	if err := b.Check(); err != nil {
		return nil, nil, err
	}
	run := record.Run{First: b.At + 1, Last: b.At, Reigns: b.Reigns} // of no records, as if they came next
	if err := checkSuccession(g.Reigns(), g.Newest(), run); err != nil {
		return nil, nil, err
	}
	for _, t := range b.Disks {
		d := g.disk(t.ID)
		if d == nil {
			continue
		}
		if t.Removed == 0 && !d.Attached() {
			return nil, nil, fmt.Errorf("disk %s: %w", t.Name, ErrDetached)
		}
		run.Disks = append(run.Disks, t)
	}
	table, err := g.tableOf(run)
	return &standing{slices.Clone(b.Reigns), true}, &members{all: g.disks.Load().all, table: table}, err
}

// Bridge journals what runs of the group's disks, of whole blocks, hold behind the gap, under one LSN: they must not overlap, as a block has one version at an LSN,
// and be of no more than MaxBridgeBytes. None is no error. When it returns without an error, they are with the kernel. It waits while the backings are too far behind.
func (g *Group) Bridge(ops []Op) error {
	g.receiving.Lock()
	defer g.receiving.Unlock()
	if err := g.bridgeOps(ops); err != nil {
		return fmt.Errorf("bring group %s over a gap: %w", g.name, err)
	}
	return nil
}

func (g *Group) bridgeOps(ops []Op) error {
	if _, open := g.Bridging(); !open || g.bridge == nil {
		return errors.New("none was begun")
	}
	if err := checkBridge(ops); err != nil {
		return err
	}
	for _, some := range g.cutBridge(ops) {
		if err := g.bridgeSome(some); err != nil {
			return err
		}
	}
	return nil
}

// cutBridge cuts operations into lots that are admitted one after the other: what few zeroes cost in originals may be much.
func (g *Group) cutBridge(ops []Op) (lots [][]Op) {
	most := g.mostZeroes()
	var lot []Op
	var cost int64
	for _, op := range ops {
		for op.Ext.Len > 0 {
			part := op
			if op.Kind != record.KindWrite {
				part.Ext.Len, part.cost = op.Disk.InBacking(op.Ext, most)
			}
			op.Ext.Off, op.Ext.Len = part.Ext.End(), op.Ext.Len-part.Ext.Len
			if len(lot) > 0 && cost+part.cost > most {
				lots, lot, cost = append(lots, lot), nil, 0
			}
			lot, cost = append(lot, part), cost+part.cost
		}
	}
	if len(lot) > 0 {
		lots = append(lots, lot)
	}
	return lots
}

// ofBridge are the records of operations, as of a time.
func ofBridge(ops []Op, at int64) (recs []received) {
	for _, op := range ops {
		h := record.Header{Kind: op.Kind, Disk: op.Disk.ID, Extent: op.Ext, Time: at, Payload: len(op.Data), Sums: record.AppendSums(nil, op.Data)}
		recs = append(recs, received{h, op.Data, op.Disk})
	}
	return recs
}

// bridgeSome journals a lot, with the time of the last record before the gap: what was when between is not known.
func (g *Group) bridgeSome(ops []Op) error {
	if err := g.bridgeFits(ops); err != nil {
		return err
	}
	recs := ofBridge(ops, g.recordTime.Load())
	return g.admit(func() error { return g.waitRoomLocked(g.endedLocked) }, func() error {
		next := g.append.next
		if next >= g.bridge.At {
			return fmt.Errorf("the bridge takes more records than the writer has journaled since LSN %d: it can be gone on with when there are more of them, be they markers (tidemark mark)", g.Newest())
		}
		return g.bridgeLocked(recs, next)
	})
}

// bridgeFits says whether there is room for a lot, and then still for going back to before the gap: nothing else can be failed over to.
func (g *Group) bridgeFits(ops []Op) error {
	need := g.owed.Load() + g.o.keepLog() + 4*g.o.SegmentSize
	for _, op := range ops {
		need += 2*(int64(len(op.Data))+record.BlockSize) + op.cost // with the original
	}
	for tried := false; ; tried = true {
		u, err := g.fs.GetDiskUsage(g.dir)
		if err != nil || int64(u.AvailBytes) >= need {
			return nil // what is not known is found out
		}
		if tried {
			return fmt.Errorf("%w: %d bytes are free for the journal, and %d are needed, with what it takes to go back to before the gap", ErrNoSpace, u.AvailBytes, need)
		}
		if _, err := g.expireForSpace(); err != nil {
			return err
		}
	}
}

// checkBridge says whether operations may stand under one LSN.
func checkBridge(ops []Op) error {
	sorted := slices.SortedFunc(slices.Values(ops), func(a, b Op) int {
		return cmp.Or(cmp.Compare(a.Disk.ID, b.Disk.ID), cmp.Compare(a.Ext.Off, b.Ext.Off))
	})
	bytes := 0
	for i, op := range sorted {
		if err := checkOp(op); err != nil {
			return err
		}
		if bytes += len(op.Data); bytes > MaxBridgeBytes {
			return fmt.Errorf("more than %d bytes at once", MaxBridgeBytes)
		}
		if op.Ext.Len == 0 || !op.Ext.Aligned(op.Disk.Size) {
			return fmt.Errorf("%v of disk %s: not whole blocks", op.Ext, op.Disk.Name)
		}
		if i > 0 && sorted[i-1].Disk == op.Disk && sorted[i-1].Ext.End() > op.Ext.Off {
			return fmt.Errorf("%v and %v of disk %s overlap", sorted[i-1].Ext, op.Ext, op.Disk.Name)
		}
	}
	return nil
}

// bridgeLocked appends records that stand under one LSN: into one file, and at once, so that the head is behind all of them or none.
func (g *Group) bridgeLocked(recs []received, lsn record.LSN) error {
	if err := g.endedLocked(); err != nil {
		return err
	}
	room, bytes := 0, int64(0)
	for i := range recs {
		recs[i].LSN = lsn
		room, bytes = room+recs[i].EncodedSize(), bytes+recs[i].Size()
	}
	if !g.append.log.Fits(bytes) {
		if err := g.rollLocked(bytes); err != nil {
			return err
		}
	}
	return g.receiveSomeLocked(recs, room)
}

// BridgeRoom is how many more LSNs a bridge has, each for what a Bridge, or a part of it, is of.
func (g *Group) BridgeRoom() uint64 {
	g.receiving.Lock()
	defer g.receiving.Unlock()
	if head := g.Head(); g.bridge != nil && g.bridge.At > head+1 {
		return uint64(g.bridge.At - head - 1)
	}
	return 0
}

// EndBridge says that, with the last operations, as Bridge takes them, the disks are what they were where the bridge leads to. The group goes on from
// there, with those disks that came to it in the gap whose backings are given: they must hold, durably, what the disks held there. It is durable when EndBridge
// returns, with all of the bridge before it.
func (g *Group) EndBridge(last []Op, came []DiskConfig) error {
	g.receiving.Lock()
	defer g.receiving.Unlock()
	g.joining.Lock()
	defer g.joining.Unlock()
	if err := g.endBridge(last, came); err != nil {
		return fmt.Errorf("bring group %s over a gap: %w", g.name, err)
	}
	return nil
}

func (g *Group) endBridge(last []Op, came []DiskConfig) (err error) {
	after, open := g.Bridging()
	if !open || g.bridge == nil {
		return errors.New("none was begun")
	}
	b := *g.bridge
	now, m, err := g.behindGap(b)
	if err == nil {
		err = checkBridge(last)
	}
	if err != nil {
		return err
	}
	newcomers, err := g.openNewcomers(&b, came)
	defer func() {
		for _, d := range newcomers {
			if err != nil {
				err = errors.Join(err, g.detach(d))
			}
		}
	}()
	if err == nil {
		err = g.bridgeLast(last, b)
	}
	if err != nil {
		return err
	}
	for _, d := range newcomers {
		m = m.with(d, record.Disk{ID: d.ID, Name: d.Name, Size: d.Size, Added: d.Added})
	}
	err = g.rollWith(true, func() (undo func(), err error) {
		gaps, standing, disks := g.gaps.Load(), g.standing.Load(), g.disks.Load()
		over := g.Gaps()
		over[len(over)-1].Until = b.At
		g.gaps.Store(&over)
		g.standing.Store(now)
		g.disks.Store(m)
		return func() {
			g.gaps.Store(gaps)
			g.standing.Store(standing)
			g.disks.Store(disks)
		}, nil
	})
	if err != nil {
		return err
	}
	g.unpinFrom(after)
	g.bridge = nil
	g.log.Info("the group was brought over a gap", zap.Uint64("after", uint64(after)), zap.Uint64("to", uint64(b.At)))
	return nil
}

// bridgeLast journals the last records of a bridge. Of their lots, all but the last have LSNs of their own, if there are any.
func (g *Group) bridgeLast(last []Op, b record.Beginning) error {
	lots := g.cutBridge(last)
	for ; len(lots) > 1; lots = lots[1:] {
		if err := g.bridgeSome(lots[0]); err != nil {
			return err
		}
	}
	var ops []Op
	if len(lots) > 0 {
		ops = lots[0]
	}
	if err := g.bridgeFits(ops); err != nil {
		return err
	}
	return g.admit(func() error { return g.waitRoomLocked(g.endedLocked) }, func() error {
		recs := g.bridgeNotesLocked(b)
		return g.bridgeLocked(append(recs, ofBridge(ops, recs[0].Time)...), b.At)
	})
}

// openNewcomers opens the backings of disks that came in a gap; those that it returns are open, whatever its error.
func (g *Group) openNewcomers(b *record.Beginning, came []DiskConfig) (all []*disk.Disk, err error) {
	table := slices.Clone(g.disks.Load().table)
	for _, c := range came {
		i := slices.IndexFunc(b.Disks, func(t record.Disk) bool { return t.Name == c.Name && t.Removed == 0 && g.disk(t.ID) == nil })
		if i < 0 {
			return all, fmt.Errorf("disk %s did not come in the gap", c.Name)
		}
		t := b.Disks[i]
		t.Added = b.At
		table = append(table, t)
		if err := record.CheckDisks(table, b.At); err != nil {
			return all, fmt.Errorf("disk %s: %w", c.Name, err)
		}
		d := disk.New(t.ID, t.Name, t.Size, t.Added, g)
		if _, err := g.open(c, d); err != nil {
			return all, err
		}
		all = append(all, d)
	}
	return all, nil
}

// bridgeNotesLocked are the last records of a bridge: one that says where it leads to, the definitions that are others there, and that
// markers are not pinned which the writer has no more, or has not pinned: nobody could let go of them here. g.append is held.
func (g *Group) bridgeNotesLocked(b record.Beginning) []received {
	at := max(b.Time, g.recordTime.Load())
	var recs []received
	note := func(k record.Kind, payload []byte) {
		recs = append(recs, received{record.Header{Kind: k, Time: at, Payload: len(payload), Sums: record.AppendSums(nil, payload)}, payload, nil})
	}
	define := func(d record.Definition) { note(record.KindDefine, d.Append(nil)) }
	note(record.KindStanding, nil)
	have := g.append.definitions.inForce(record.MaxLSN)
	for _, d := range b.Definitions {
		was, ok := have[d.Name]
		delete(have, d.Name)
		if !ok || was.gone || was.since != d.Since || was.sum != sha256.Sum256(d.Content) {
			define(d)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(have)) {
		was := have[name]
		if !was.gone {
			define(record.Definition{Name: was.name, Gone: true, Time: time.Unix(0, at).UTC()})
		}
	}
	for _, m := range g.append.markers.all {
		if m.Pinned && !m.Pending && !slices.Contains(b.Pinned, m.LSN) {
			m.Pinned = false
			am := record.Amendment{Target: m.LSN, Marker: m}
			note(record.KindAmend, am.Append(nil))
		}
	}
	return recs
}

// findGaps reads the gaps from the heads of the log's files.
func (r *recovery) findGaps() {
	var all []Gap
	// A bridge of several files is one gap, of which the first file behind it says the end: with none, it is open.
	set := func(after, until record.LSN) {
		i := slices.IndexFunc(all, func(gap Gap) bool { return gap.After == after })
		if i < 0 {
			i, all = len(all), append(all, Gap{After: after, Until: record.MaxLSN})
		}
		all[i].Until = min(all[i].Until, until)
	}
	for _, f := range r.logs {
		if f.Bridged {
			set(f.GapAfter, f.First-1)
			r.durable = max(r.durable, f.First-1) // see rollWith
		}
		if f.Bridge {
			set(f.BridgeAfter, record.MaxLSN)
		}
	}
	r.g.gaps.Store(&all)
	r.g.passGaps()
	if _, open := r.g.Bridging(); open {
		r.g.pinBeforeGap()
	}
}

// passGaps forgets gaps that history has expired beyond.
func (g *Group) passGaps() {
	left := slices.DeleteFunc(g.Gaps(), func(gap Gap) bool { return gap.Until <= g.expiredTo() })
	g.gaps.Store(&left)
}

// bridged reports whether what the log has under some of the LSNs from one to another, if anything, is of a bridge, and not the writer's.
func (g *Group) bridged(first, last record.LSN) bool {
	return slices.ContainsFunc(g.gapsNow(), func(gap Gap) bool { return gap.After < last && first <= gap.Until })
}
