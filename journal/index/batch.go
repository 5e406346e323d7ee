package index

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Watermark says up to where the index is complete. It is committed with
// every batch.
//
//	offset size field
//	  0     8   LSN: every record at or below it is indexed
//	  8     4   originals file: those of earlier files are indexed whole
//	 12     4   offset in that file: what stands before it is indexed
//	 16     8   time of the newest entry of the time table, Unix nanoseconds
type Watermark struct {
	LSN      record.LSN
	OrigFile uint32
	OrigOff  uint32
	LastTime int64
}

// Entry is a version of a unit.
type Entry struct {
	Disk record.DiskID
	Unit Unit
	LSN  record.LSN
	Version
}

// entryKey says which version: the fields of its key in the database.
type entryKey struct {
	disk record.DiskID
	unit Unit
	lsn  record.LSN
}

func (a entryKey) compare(b entryKey) int {
	if c := cmp.Compare(a.disk, b.disk); c != 0 {
		return c
	}
	if c := cmp.Compare(a.unit.Class, b.unit.Class); c != 0 {
		return c
	}
	if c := cmp.Compare(a.unit.Index, b.unit.Index); c != 0 {
		return c
	}
	return cmp.Compare(b.lsn, a.lsn)
}

func (e *Entry) entryKey() entryKey { return entryKey{e.Disk, e.Unit, e.LSN} }

// Batch gathers changes to a group's index, those of versions until Commit.
type Batch struct {
	g       *Group
	b       *pebble.Batch
	deleted []entryKey
	entries []Entry
	key     []byte
	val     []byte
}

// NewBatch makes an empty batch.
func (g *Group) NewBatch() *Batch { return &Batch{g: g, b: g.db.NewBatch()} }

// Set adds versions, each once. They are kept, and may be sorted, until Commit.
func (b *Batch) Set(entries []Entry) {
	if len(b.entries) == 0 {
		b.entries = entries
		return
	}
	b.entries = append(b.entries, entries...)
}

// Delete removes a version, unless this batch sets it too.
func (b *Batch) Delete(disk record.DiskID, u Unit, lsn record.LSN) {
	b.deleted = append(b.deleted, entryKey{disk, u, lsn})
}

// Discard ends a batch that is not committed.
func (b *Batch) Discard() { _ = b.b.Close() }

// Commit applies the batch. It is durable after a later [DB.Flush]. The batch
// must not be used again.
func (b *Batch) Commit(w Watermark) error {
	defer b.b.Close()
	// Sorted keys go into Pebble's skip list without a search for each.
	slices.SortFunc(b.deleted, entryKey.compare)
	for _, k := range b.deleted {
		b.key = appendVersionKey(b.key[:0], b.g.id, k.disk, k.unit, k.lsn)
		if err := b.b.Delete(b.key, nil); err != nil {
			return err
		}
	}
	slices.SortFunc(b.entries, func(x, y Entry) int { return x.entryKey().compare(y.entryKey()) })
	if err := b.g.noteClasses(b); err != nil {
		return err
	}
	for i := range b.entries {
		e := &b.entries[i]
		b.key = appendVersionKey(b.key[:0], b.g.id, e.Disk, e.Unit, e.LSN)
		b.val = e.append(b.val[:0])
		if err := b.b.Set(b.key, b.val, nil); err != nil {
			return err
		}
	}
	b.val = binary.LittleEndian.AppendUint64(b.val[:0], uint64(w.LSN))
	b.val = binary.LittleEndian.AppendUint32(b.val, w.OrigFile)
	b.val = binary.LittleEndian.AppendUint32(b.val, w.OrigOff)
	b.val = binary.LittleEndian.AppendUint64(b.val, uint64(w.LastTime))
	if err := b.b.Set(appendTable(nil, b.g.id, tableWatermark), b.val, nil); err != nil {
		return err
	}
	if err := b.b.Commit(pebble.NoSync); err != nil {
		return fmt.Errorf("commit to the index: %w", err)
	}
	b.g.committed.Store(uint64(w.LSN))
	return nil
}

// Watermark reads the group's watermark; zero if nothing was ever committed.
func (g *Group) Watermark() (w Watermark, err error) {
	err = g.get(appendTable(nil, g.id, tableWatermark), func(b []byte) error {
		if len(b) != 24 {
			return fmt.Errorf("%w: watermark of %d bytes", record.ErrCorrupt, len(b))
		}
		le := binary.LittleEndian
		w = Watermark{
			LSN: record.LSN(le.Uint64(b)), OrigFile: le.Uint32(b[8:]), OrigOff: le.Uint32(b[12:]),
			LastTime: int64(le.Uint64(b[16:])),
		}
		return nil
	})
	return w, err
}

// get calls fn with a key's value, and not at all if there is none.
func (g *Group) get(key []byte, fn func([]byte) error) error {
	v, closer, err := g.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the index: %w", err)
	}
	return errors.Join(fn(v), closer.Close())
}

// scan calls fn with each key (without the table's prefix) and value from the table's
// key start on, until fn returns false. Slices are valid until fn returns.
func (g *Group) scan(table byte, start []byte, fn func(key, value []byte) (bool, error)) error {
	prefix := appendTable(nil, g.id, table)
	it, err := g.db.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: appendTable(nil, g.id, table+1)})
	if err != nil {
		return fmt.Errorf("read the index: %w", err)
	}
	more := true
	for ok := it.SeekGE(append(slices.Clone(prefix), start...)); ok && more && err == nil; ok = it.Next() {
		var v []byte
		if v, err = it.ValueAndErr(); err == nil {
			more, err = fn(it.Key()[len(prefix):], v)
		}
	}
	return errors.Join(err, it.Close())
}

func (g *Group) loadClasses() error {
	return g.scan(tableClasses, nil, func(k, v []byte) (bool, error) {
		if len(k) != 4 || len(v) != 1 {
			return false, fmt.Errorf("%w: class mask of %d bytes", record.ErrCorrupt, len(v))
		}
		g.classes.masks[binary.BigEndian.Uint32(k)] = v[0]
		return true, nil
	})
}

func (g *Group) classMask(disk record.DiskID) uint8 {
	g.classes.Lock()
	defer g.classes.Unlock()
	return g.classes.masks[uint32(disk)]
}

// noteClasses widens the masks by the batch's classes before its versions can be seen.
func (g *Group) noteClasses(b *Batch) error {
	g.classes.Lock()
	defer g.classes.Unlock()
	for i := range b.entries {
		e := &b.entries[i]
		old := g.classes.masks[uint32(e.Disk)]
		mask := old | 1<<e.Unit.Class
		if mask == old {
			continue
		}
		g.classes.masks[uint32(e.Disk)] = mask
		key := binary.BigEndian.AppendUint32(appendTable(nil, g.id, tableClasses), uint32(e.Disk))
		if err := b.b.Set(key, []byte{mask}, nil); err != nil {
			return err
		}
	}
	return nil
}

// AddTime notes that the record at lsn was written at a time, and where it stands.
func (b *Batch) AddTime(unixNano int64, lsn record.LSN, file, off uint32) error {
	b.key = appendTable(b.key[:0], b.g.id, tableTime)
	b.key = binary.BigEndian.AppendUint64(b.key, uint64(unixNano))
	b.key = binary.BigEndian.AppendUint64(b.key, uint64(lsn))
	b.val = binary.BigEndian.AppendUint32(b.val[:0], file)
	b.val = binary.BigEndian.AppendUint32(b.val, off)
	return b.b.Set(b.key, b.val, nil)
}

// TimeMark is an entry of the time table.
type TimeMark struct {
	Time      int64 // Unix nanoseconds
	LSN       record.LSN
	File, Off uint32
}

// TimeBefore finds the last entry of the time table at or before a time.
func (g *Group) TimeBefore(unixNano int64) (m TimeMark, ok bool, err error) {
	lower := appendTable(nil, g.id, tableTime)
	it, err := g.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: appendTable(nil, g.id, tableTime+1)})
	if err != nil {
		return m, false, fmt.Errorf("read the index: %w", err)
	}
	key := binary.BigEndian.AppendUint64(slices.Clone(lower), uint64(unixNano)+1)
	if it.SeekLT(key) {
		k := it.Key()[len(lower):]
		v, verr := it.ValueAndErr()
		switch {
		case verr != nil:
			err = verr
		case len(k) != 16 || len(v) != 8:
			err = fmt.Errorf("%w: time entry of %d+%d bytes", record.ErrCorrupt, len(k), len(v))
		default:
			be := binary.BigEndian
			m = TimeMark{Time: int64(be.Uint64(k)), LSN: record.LSN(be.Uint64(k[8:])), File: be.Uint32(v), Off: be.Uint32(v[4:])}
			ok = true
		}
	}
	return m, ok, errors.Join(err, it.Error(), it.Close())
}

// DropTimes removes the entries of the time table before an LSN's time.
func (b *Batch) DropTimes(unixNano int64) error {
	start := appendTable(nil, b.g.id, tableTime)
	end := binary.BigEndian.AppendUint64(slices.Clone(start), uint64(unixNano))
	return b.b.DeleteRange(start, end, nil)
}

// MarkerChange is what a record did to a marker.
type MarkerChange struct {
	record.Marker
	Deleted bool
}

// ChangeMarker adds a marker, puts it in the place of what it was, or removes it.
func (b *Batch) ChangeMarker(c MarkerChange) error {
	if c.Deleted {
		return b.DeleteMarker(c.Marker)
	}
	return b.setMarker(c.Marker)
}

func (b *Batch) setMarker(m record.Marker) error {
	b.key = binary.BigEndian.AppendUint64(appendTable(b.key[:0], b.g.id, tableMarker), uint64(m.LSN))
	b.val = binary.BigEndian.AppendUint64(b.val[:0], uint64(m.Time.UnixNano()))
	b.val = m.Append(b.val)
	return b.b.Set(b.key, b.val, nil)
}

// DeleteMarker removes a marker.
func (b *Batch) DeleteMarker(m record.Marker) error {
	b.key = binary.BigEndian.AppendUint64(appendTable(b.key[:0], b.g.id, tableMarker), uint64(m.LSN))
	return b.b.Delete(b.key, nil)
}

// Markers calls fn with the group's markers by ascending LSN, from one on.
func (g *Group) Markers(from record.LSN, fn func(record.Marker) (bool, error)) error {
	start := binary.BigEndian.AppendUint64(nil, uint64(from))
	return g.scan(tableMarker, start, func(k, v []byte) (bool, error) {
		if len(k) != 8 || len(v) < 8 {
			return false, fmt.Errorf("%w: marker entry of %d+%d bytes", record.ErrCorrupt, len(k), len(v))
		}
		m, err := record.DecodeMarker(record.LSN(binary.BigEndian.Uint64(k)), int64(binary.BigEndian.Uint64(v)), v[8:])
		if err != nil {
			return false, err
		}
		return fn(m)
	})
}

// Definition is a definition and the newest record that holds it.
type Definition struct {
	record.Definition
	At record.LSN
}

func appendDefinedKey(dst []byte, group uint32, name string, since record.LSN) []byte {
	dst = binary.BigEndian.AppendUint64(appendTable(dst, group, tableDefined), uint64(since))
	return append(dst, name...)
}

// SetDefinition adds a definition, or puts it in the place of the one with its name and LSN.
func (b *Batch) SetDefinition(d Definition) error {
	b.key = appendDefinedKey(b.key[:0], b.g.id, d.Name, d.Since)
	b.val = binary.BigEndian.AppendUint64(b.val[:0], uint64(d.At))
	b.val = d.Append(b.val)
	return b.b.Set(b.key, b.val, nil)
}

// DeleteDefinition removes a definition.
func (b *Batch) DeleteDefinition(name string, since record.LSN) error {
	b.key = appendDefinedKey(b.key[:0], b.g.id, name, since)
	return b.b.Delete(b.key, nil)
}

func decodeDefinition(v []byte) (Definition, error) {
	if len(v) < 8 {
		return Definition{}, fmt.Errorf("%w: definition entry of %d bytes", record.ErrCorrupt, len(v))
	}
	at := record.LSN(binary.BigEndian.Uint64(v))
	d, err := record.DecodeDefinition(at, v[8:])
	return Definition{Definition: d, At: at}, err
}

// Definitions calls fn with the group's definitions by ascending LSN and name.
func (g *Group) Definitions(fn func(Definition) error) error {
	return g.scan(tableDefined, nil, func(_, v []byte) (bool, error) {
		d, err := decodeDefinition(v)
		if err != nil {
			return false, err
		}
		return true, fn(d)
	})
}

// Definition reads the definition of that name in force from since on.
func (g *Group) Definition(name string, since record.LSN) (d record.Definition, err error) {
	found := false
	err = g.get(appendDefinedKey(nil, g.id, name, since), func(v []byte) error {
		found = true
		full, err := decodeDefinition(v)
		d = full.Definition
		return err
	})
	if err == nil && !found {
		err = fmt.Errorf("%w: the index lacks what LSN %d defines", record.ErrCorrupt, since)
	}
	return d, err
}

// SetCaptured stores a page of a disk's captured bitmap.
func (b *Batch) SetCaptured(disk record.DiskID, page int64, bits []byte) error {
	b.key = binary.BigEndian.AppendUint32(appendTable(b.key[:0], b.g.id, tableCaptured), uint32(disk))
	b.key = binary.BigEndian.AppendUint64(b.key, uint64(page))
	return b.b.Set(b.key, bits, nil)
}

// Captured calls fn with the stored pages of a disk's captured bitmap.
func (g *Group) Captured(disk record.DiskID, fn func(page int64, bits []byte) error) error {
	start := binary.BigEndian.AppendUint32(nil, uint32(disk))
	return g.scan(tableCaptured, start, func(k, v []byte) (bool, error) {
		if len(k) != 12 {
			return false, fmt.Errorf("%w: bitmap key of %d bytes", record.ErrCorrupt, len(k))
		}
		if record.DiskID(binary.BigEndian.Uint32(k)) != disk {
			return false, nil
		}
		return true, fn(int64(binary.BigEndian.Uint64(k[4:])), v)
	})
}

// SetState stores a value of the owner's under a name.
func (b *Batch) SetState(name string, value []byte) error {
	b.key = append(appendTable(b.key[:0], b.g.id, tableState), name...)
	return b.b.Set(b.key, value, nil)
}

// State reads a value stored by SetState; nil if there is none.
func (g *Group) State(name string) (value []byte, err error) {
	err = g.get(append(appendTable(nil, g.id, tableState), name...), func(b []byte) error {
		value = slices.Clone(b)
		return nil
	})
	return value, err
}

// Versions calls fn with every version of the group by disk, class, unit and
// descending LSN. It is for verification and people, not for look-ups.
func (g *Group) Versions(fn func(Entry) (bool, error)) error {
	return g.VersionsFrom(Entry{LSN: record.MaxLSN}, fn)
}

// VersionsFrom is Versions from the version of a disk, unit and LSN on, or the next one.
func (g *Group) VersionsFrom(from Entry, fn func(Entry) (bool, error)) error {
	prefix := len(appendTable(nil, g.id, tableVersion))
	start := appendVersionKey(nil, g.id, from.Disk, from.Unit, from.LSN)[prefix:]
	return g.scan(tableVersion, start, func(k, v []byte) (bool, error) {
		full := append(appendTable(nil, g.id, tableVersion), k...)
		if len(full) != versionKeyLen {
			return false, fmt.Errorf("%w: version key of %d bytes", record.ErrCorrupt, len(full))
		}
		e := Entry{Disk: record.DiskID(binary.BigEndian.Uint32(k)), Unit: Unit{Class: k[4]}}
		e.Unit.Index, e.LSN = splitVersionKey(full)
		var err error
		if e.Version, err = decodeVersion(v); err != nil {
			return false, err
		}
		return fn(e)
	})
}
