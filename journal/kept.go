package journal

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/index"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/retain"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// KeptPoint is a point that is kept though every write around it was forgotten.
type KeptPoint struct {
	LSN  record.LSN
	Time int64 // of its record, Unix nanoseconds
	// Until is the time of the next record, or earlier: between the two the disks were what they are at the point.
	Until int64
}

func (k *KeptPoint) String() string {
	return fmt.Sprintf("lsn:%d of %s", k.LSN, time.Unix(0, k.Time).UTC().Format(time.RFC3339))
}

// KeptPoints are those beyond the continuous window, by ascending LSN. The slice must not be changed.
func (g *Group) KeptPoints() []KeptPoint {
	if p := g.kept.Load(); p != nil {
		return *p
	}
	return nil
}

// isKept reports whether an LSN is kept beyond the window.
func (g *Group) isKept(lsn record.LSN) bool {
	_, ok := findKept(g.KeptPoints(), lsn)
	return ok
}

// keptLSNs are the LSNs of the kept points.
func (g *Group) keptLSNs() (lsns []record.LSN) {
	for _, k := range g.KeptPoints() {
		lsns = append(lsns, k.LSN)
	}
	return lsns
}

func findKept(kept []KeptPoint, lsn record.LSN) (int, bool) {
	return slices.BinarySearchFunc(kept, lsn, func(k KeptPoint, lsn record.LSN) int { return cmp.Compare(k.LSN, lsn) })
}

// everKept reports whether any point was ever kept beyond the window: then originals may be findable that nobody looks for.
func (g *Group) everKept() bool { return g.hadKept.Load() }

// setKept has the index know what is kept, with a batch.
func (g *Group) setKept(b *index.Batch) error {
	if !g.hadKept.Load() {
		return nil
	}
	list, _ := appendKept(nil, 0, nil, g.KeptPoints(), nil)
	return b.SetState(stateKept, list)
}

// Window says since when every write can be viewed, and whether that is later than the policy promises, for lack of space. It is where the oldest file of the log
// begins: nothing in it is older.
func (g *Group) Window() (since time.Time, eaten bool) {
	expired := g.expiredTo()
	files, release := g.set.Hold(segment.Log)
	defer release()
	for len(files) > 1 && files[1].First-1 <= expired {
		files = files[1:]
	}
	now, window := g.o.Now(), g.Policy().EveryWrite
	if len(files) == 0 {
		return now, false
	}
	return time.Unix(0, files[0].Created).UTC(), window > 0 && g.eaten.Load() > now.UnixNano()-int64(window)
}

// foreseeAfter is how much of a window must have been written before its end is foreseen: the first minutes say little.
const foreseeAfter = 10 * time.Minute

// Foresee says how many bytes of log the window that is promised will take if guests go on to write as they have since it began, and how many there is room for,
// by the group's limit and the file system. ok is false while that can not be said: nothing is promised, it is all there, or too little was written yet.
func (g *Group) Foresee() (need, room int64, ok bool) {
	since, _ := g.Window()
	window, so := g.Policy().EveryWrite, g.o.Now().Sub(since)
	if window == 0 || so >= window || so < min(foreseeAfter, window/4) {
		return 0, 0, false
	}
	var logs, written int64
	g.append.Lock()
	for _, f := range g.set.Files(segment.Log) {
		logs += f.Alloc()
		if f == g.append.log.Current() {
			written += g.append.log.Tail() // the rest of it is allocated ahead
		} else {
			written += f.Alloc()
		}
	}
	g.append.Unlock()
	rest := g.set.Size() - logs
	room = math.MaxInt64
	if limit := g.Limit(); limit > 0 {
		room = limit - rest
	}
	if u, err := g.fs.GetDiskUsage(g.dir); err == nil {
		room = min(room, logs+int64(u.AvailBytes)-g.o.keepLog())
	}
	need = int64(float64(written) * float64(window) / float64(so))
	return need, max(room, 0), true
}

// Kept are the points beyond the window, by ascending LSN, and why each is kept: an open view is no reason.
func (g *Group) Kept() ([]KeptPoint, []retain.Reason) {
	kept := g.KeptPoints()
	_, why := g.judge(g.Policy(), kept, g.expiredTo())
	return kept, why
}

// PinnedAlone reports whether nothing but pins, open views and the newest log file keeps anything any more: a limit below that can not be kept.
func (g *Group) PinnedAlone() bool {
	_, why := g.Kept()
	return !g.logCanGo() && !slices.ContainsFunc(why, func(r retain.Reason) bool { return r.Kept() && !r.Pinned && !r.Held })
}

// Bound is how many bytes of what is kept beyond the window, as of the last [Group.Clean], are kept for points that are pinned or held: for a smaller limit, all
// else would go, and in vain.
func (g *Group) Bound() int64 {
	all := g.keptBytes.Load()
	if all == nil {
		return 0
	}
	var points []record.LSN
	kept, why := g.Kept()
	for i := range kept {
		if why[i].Pinned || why[i].Held {
			points = append(points, kept[i].LSN)
		}
	}
	return all.needed(points)
}

// SetPolicy changes which points are kept from now on, and how large the group's segments may grow, in bytes (0: as Options say). What an older policy has
// let go of does not come back. Nothing changes if the limit is smaller than it was, and than [Group.Bound].
func (g *Group) SetPolicy(p retain.Policy, limit int64) error {
	if err := p.Validate(); err != nil {
		return fmt.Errorf("retention of group %s: %w", g.name, err)
	}
	limit = cmp.Or(limit, g.o.Limit)
	if was, bound := g.Limit(), g.Bound(); limit > 0 && limit < bound && (was == 0 || limit < was) {
		return fmt.Errorf("retention of group %s: a limit of %d bytes: pinned and held points alone keep %d: unpin some, or raise it", g.name, limit, bound)
	}
	g.policy.Store(&p)
	g.limit.Store(limit)
	return nil
}

// Limit is how large the group's segments may grow, in bytes; 0: as far as the file system has room.
func (g *Group) Limit() int64 { return g.limit.Load() }

// Policy says which points are kept.
func (g *Group) Policy() retain.Policy { return *g.policy.Load() }

// needed are the points whose views an expiry to a horizon must leave as they are: those that are kept from then on, of old ones and of new, and the
// horizon.
func (g *Group) needed(policy retain.Policy, horizon record.LSN, fresh []KeptPoint, early bool) (points []record.LSN, kept []KeptPoint) {
	all := slices.Clone(g.KeptPoints())
	for _, k := range fresh {
		if len(all) == 0 || k.LSN > all[len(all)-1].LSN { // the horizon may be kept already
			all = append(all, k)
		}
	}
	kept = g.chosen(policy, all, horizon, early)
	for _, k := range kept {
		points = append(points, k.LSN)
	}
	if n := len(points); n == 0 || points[n-1] != horizon {
		points = append(points, horizon)
	}
	return points, kept
}

// viewed are the LSNs that somebody has a view of.
func (g *Group) viewed() map[record.LSN]bool {
	all := map[record.LSN]bool{}
	g.pins.Lock()
	defer g.pins.Unlock()
	for lsn := range g.pins.points {
		all[lsn] = true
	}
	return all
}

// early reports whether who had a view open before a start has yet to come back.
func (g *Group) early() bool { return g.o.Now().UnixNano() < g.settled.Load() }

// chosen are those points, given by ascending LSN, that a policy, pins and open views keep beyond a horizon; early, all that were kept so far too.
func (g *Group) chosen(policy retain.Policy, all []KeptPoint, horizon record.LSN, early bool) (kept []KeptPoint) {
	_, why := g.judge(policy, all, horizon)
	viewed := g.viewed()
	for i := range all {
		if why[i].Kept() || viewed[all[i].LSN] || early && g.isKept(all[i].LSN) {
			kept = append(kept, all[i])
		}
	}
	return kept
}

// judge says why each of some points, given by ascending LSN, is kept beyond a horizon, but for open views, and what the policy knows of it. Holds that have ended pin their markers no
// longer.
func (g *Group) judge(policy retain.Policy, all []KeptPoint, horizon record.LSN) ([]retain.Point, []retain.Reason) {
	markers := map[record.LSN]record.Marker{}
	var points, behind []retain.Point
	now := g.o.Now()
	held := func(m record.Marker) int64 {
		if m.Held.IsZero() {
			return 0
		}
		return m.Held.UnixNano()
	}
	g.append.Lock()
	for _, m := range g.append.markers.all {
		if m.Pending {
			continue
		}
		if !m.Pinned && !m.Held.IsZero() && !m.IsHeld(now) {
			g.unpinMarker(m.LSN) // its hold has ended
		}
		markers[m.LSN] = m
		if m.LSN > horizon { // of slots that end behind it
			behind = append(behind, retain.Point{LSN: m.LSN, Time: m.Time.UnixNano(), Consistency: m.Consistency, Pinned: m.Pinned, Held: held(m)})
		}
	}
	g.append.Unlock()
	for _, k := range all {
		p := retain.Point{LSN: k.LSN, Time: k.Time}
		if m, ok := markers[k.LSN]; ok {
			p.Consistency, p.Pinned, p.Held = m.Consistency, m.Pinned, held(m)
		}
		points = append(points, p)
	}
	why := policy.Keep(now.UnixNano(), slices.Concat(points, behind))
	return points, why[:len(all)]
}

// keptVersion is the format of a list of kept points:
//
//	offset size field
//	  0     1   format version, 1
//	  1     4   which part of the list this is, 0, 1, …
//	  5     4   number of points
//	  9     4   number of disks that had a discontinuity, of the first part; then each:
//	        4   disk
//	        8   LSN of the last one
//	            then each point:
//	        8   LSN
//	        8   time, Unix nanoseconds
//	        8   until, Unix nanoseconds
//	        2   length of the marker that is there, 0: none; then the marker, as [record.Marker.Append] writes it
//
// Integers are little-endian. The list in the index has one part, and neither disks nor markers.
const (
	keptVersion = 1
	keptHead    = 13
	keptDisk    = 12
	keptFixed   = 26
	keptBytes   = 1 << 20 // of a part, about
)

// keptPart is a part of a list of kept points.
type keptPart struct {
	number  int
	since   map[record.DiskID]record.LSN
	kept    []KeptPoint
	markers []record.Marker
}

// appendKept encodes points from the first on, to a part of a list, and returns the rest.
func appendKept(b []byte, part int, since map[record.DiskID]record.LSN, kept []KeptPoint, marker func(record.LSN) (record.Marker, bool)) (_ []byte, rest []KeptPoint) {
	le := binary.LittleEndian
	at := len(b)
	b = le.AppendUint32(append(b, keptVersion), uint32(part))
	b = le.AppendUint32(le.AppendUint32(b, 0), uint32(len(since)))
	for _, id := range slices.Sorted(maps.Keys(since)) {
		b = le.AppendUint64(le.AppendUint32(b, uint32(id)), uint64(since[id]))
	}
	n := 0
	for ; n < len(kept) && (marker == nil || len(b)-at < keptBytes); n++ {
		k := kept[n]
		b = le.AppendUint64(le.AppendUint64(le.AppendUint64(b, uint64(k.LSN)), uint64(k.Time)), uint64(k.Until))
		var payload []byte
		if marker != nil {
			if m, ok := marker(k.LSN); ok {
				payload = m.Append(nil)
			}
		}
		b = append(le.AppendUint16(b, uint16(len(payload))), payload...)
	}
	le.PutUint32(b[at+5:], uint32(n))
	return b, kept[n:]
}

// decodeKept reads a part of a list.
func decodeKept(b []byte) (p keptPart, err error) {
	bad := func(format string, args ...any) (keptPart, error) {
		return keptPart{}, fmt.Errorf("list of kept points: "+format, args...)
	}
	le := binary.LittleEndian
	if len(b) < keptHead {
		return bad("%w: %d bytes", record.ErrCorrupt, len(b))
	}
	if b[0] != keptVersion {
		return bad("format version %d, this program knows %d: use a newer one", b[0], keptVersion)
	}
	n, disks := int64(le.Uint32(b[5:])), int64(le.Uint32(b[9:]))
	p = keptPart{number: int(le.Uint32(b[1:])), since: map[record.DiskID]record.LSN{}}
	b = b[keptHead:]
	if disks*keptDisk+n*keptFixed > int64(len(b)) {
		return bad("%w: %d disks and %d points in %d bytes", record.ErrCorrupt, disks, n, len(b))
	}
	for ; disks > 0; disks-- {
		p.since[record.DiskID(le.Uint32(b))] = record.LSN(le.Uint64(b[4:]))
		b = b[keptDisk:]
	}
	for ; n > 0; n-- {
		if len(b) < keptFixed {
			return bad("%w: it is cut short", record.ErrCorrupt)
		}
		k := KeptPoint{record.LSN(le.Uint64(b)), int64(le.Uint64(b[8:])), int64(le.Uint64(b[16:]))}
		size := int(le.Uint16(b[24:]))
		b = b[keptFixed:]
		if size > len(b) || len(p.kept) > 0 && k.LSN <= p.kept[len(p.kept)-1].LSN {
			return bad("%w: the point at LSN %d", record.ErrCorrupt, k.LSN)
		}
		if size > 0 {
			m, err := record.DecodeMarker(k.LSN, k.Time, b[:size])
			if err != nil {
				return bad("the marker at LSN %d: %w", k.LSN, err)
			}
			p.markers = append(p.markers, m)
		}
		p.kept, b = append(p.kept, k), b[size:]
	}
	if len(b) > 0 {
		return bad("%w: %d bytes too many", record.ErrCorrupt, len(b))
	}
	return p, nil
}

// noteExpired notes among the originals that the index has come to a horizon, and what is kept beyond it, durably: without an index nothing else
// says so once some of the files are gone, and what was carried over would count for nothing. g.apply is held.
func (g *Group) noteExpired(horizon record.LSN, kept []KeptPoint, marker func(record.LSN) (record.Marker, bool)) error {
	g.apply.orig.Keep(0) // what it takes is little, and the files that go are much
	defer g.apply.orig.Keep(g.o.keepApply())
	note := record.Header{Flags: record.FlagCarried, LSN: horizon + 1, Durable: horizon}
	since := map[record.DiskID]record.LSN{}
	for _, d := range g.disks.Load().all {
		if lsn := d.KnownSince(); lsn > 0 {
			since[d.ID] = lsn
		}
	}
	var err error
	for part, rest := 0, kept; err == nil && len(rest) > 0; part++ {
		var b []byte
		b, rest = appendKept(nil, part, since, rest, marker)
		since = nil
		note.Kind = record.KindKept
		err = g.keep(note, b)
	}
	if err == nil {
		note.Kind = record.KindExpired
		err = g.keep(note, nil)
	}
	if err == nil {
		_, err = g.syncKept()
	}
	if err != nil {
		return fmt.Errorf("note that history has expired up to LSN %d: %w", horizon, err)
	}
	return nil
}

// currentMarker is the marker at an LSN.
func (g *Group) currentMarker(lsn record.LSN) (record.Marker, bool) {
	g.append.Lock()
	defer g.append.Unlock()
	i, ok := g.append.markers.find(lsn)
	if !ok {
		return record.Marker{}, false
	}
	return g.append.markers.all[i], true
}

// readKept reads the newest list of kept points among the originals, and up to where history had expired by the newest note. ever is false if there
// never was a list.
func (g *Group) readKept() (l keptList, horizon record.LSN, ever bool, err error) {
	var list keptReader
	for _, f := range g.set.Files(segment.Originals) {
		take := func(off int64, h record.Header) error {
			switch h.Kind {
			case record.KindExpired:
				horizon = max(horizon, h.Durable)
				list.end()
			case record.KindKept:
				list.add(f.VerifyPayload(off, h, nil))
				ever = true
			}
			return nil
		}
		end, cause := f.Scan(f.Start(), take)
		if cause == nil {
			cause = fmt.Errorf("%w: %s: nothing at %d, and originals behind it", record.ErrCorrupt, f.Path, end)
		} else if !errors.Is(cause, record.ErrCorrupt) {
			return l, 0, false, fmt.Errorf("find what has expired: %w", cause)
		}
		// What stands behind damage is newer, and a part of it may be what is damaged.
		behind := false
		err := f.Resync(end, func(off int64, h record.Header) error {
			if !behind {
				behind, list.next.err = true, cause
			}
			return take(off, h)
		})
		if err != nil {
			return l, 0, false, fmt.Errorf("find what has expired: %w", err)
		}
	}
	return list.last, horizon, ever, nil
}

// keptReader gathers the lists of kept points among the originals, in the order in which they were written: the last one counts of which all is there.
type keptReader struct {
	last, next keptList
}

type keptList struct {
	keptPart       // of all its parts; number is how many there are
	err      error // why it can not be read
}

// add takes a part of a list up, or why it can not be read.
func (r *keptReader) add(payload []byte, err error) {
	var p keptPart
	if err == nil {
		p, err = decodeKept(payload)
	}
	if err == nil && p.number == 0 {
		r.next = keptList{} // what was before is of a list that a crash cut off
		r.next.since = p.since
	}
	if err == nil && p.number != r.next.number {
		err = fmt.Errorf("%w: list of kept points: part %d behind %d others", record.ErrCorrupt, p.number, r.next.number)
	}
	n := &r.next
	n.number++
	n.kept, n.markers = append(n.kept, p.kept...), append(n.markers, p.markers...)
	n.err = cmp.Or(n.err, err)
}

// end is the end of a list. One without parts is empty.
func (r *keptReader) end() { r.last, r.next = r.next, keptList{} }
