package index

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/tidemark-cdp/tidemark/journal/internal/osfile"
)

// formatVersion of the key space. Another one in the database is an error.
const formatVersion = "1"

// memTable is how many bytes of new keys are gathered before they are written:
// some 300 000. Random overwrites are spread over all of the index, so that each compaction
// rewrites most of it: fewer and larger ones cost a burst less, and a look-up asks a few
// more filters until it is over.
const memTable = 32 << 20

// tableSize is how large the tables on disk become, in bytes. A look-up keeps one
// of each level open: to find the next key in it again costs a third of opening another.
const tableSize = 32 << 20

var versionKey = []byte("version")

// Options of a database.
type Options struct {
	FS       vfs.FS
	Cache    int64 // bytes of blocks kept in memory; 0: 64 MiB
	ReadOnly bool  // change nothing, not even what a crash left
	// Logger is told what Pebble does. Fatalf is called when the database
	// can not go on; it must not return.
	Logger pebble.Logger
}

// DB is the index of one daemon.
type DB struct {
	db   *pebble.DB
	dir  string
	opts *pebble.Options
}

// Open opens the database in dir, or makes it.
func Open(dir string, o Options) (*DB, error) {
	if o.Cache == 0 {
		o.Cache = 64 << 20
	}
	if o.ReadOnly {
		o.FS = osfile.ReadOnly(o.FS)
	}
	// Pebble takes the memory of its tables of new keys out of the cache.
	cache := pebble.NewCache(o.Cache + 2*memTable)
	defer cache.Unref()
	opts := &pebble.Options{
		FS:                          o.FS,
		Cache:                       cache,
		Comparer:                    comparer,
		DisableWAL:                  true, // the segments are the log
		ErrorIfNotExists:            o.ReadOnly,
		FormatMajorVersion:          pebble.FormatTableFormatV6,
		L0CompactionThreshold:       8,
		LBaseMaxBytes:               512 << 20,
		L0StopWritesThreshold:       64,
		Logger:                      o.Logger,
		MaxOpenFiles:                4096,
		MemTableSize:                memTable,
		MemTableStopWritesThreshold: 4,
		ReadOnly:                    o.ReadOnly,
	}
	// The values are short: apart from their keys, they take more space than among them, and another block to read.
	opts.Experimental.SpanPolicyFunc = func([]byte) (pebble.SpanPolicy, []byte, error) {
		return pebble.SpanPolicy{DisableValueSeparationBySuffix: true}, nil, nil
	}
	for i := range opts.Levels {
		opts.TargetFileSizes[i] = tableSize
		opts.Levels[i].IndexBlockSize = tableSize // one index for a table
		opts.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
		opts.Levels[i].FilterType = pebble.TableFilter
	}
	opts.EnsureDefaults()
	db, err := pebble.Open(dir, opts)
	if err != nil {
		return nil, fmt.Errorf("open the index in %s: %w", dir, err)
	}
	d := &DB{db: db, dir: dir, opts: opts}
	if err := d.checkVersion(o.ReadOnly); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return d, nil
}

func (d *DB) checkVersion(readOnly bool) error {
	v, closer, err := d.db.Get(versionKey)
	if errors.Is(err, pebble.ErrNotFound) {
		if readOnly {
			return nil
		}
		return d.db.Set(versionKey, []byte(formatVersion), pebble.NoSync)
	}
	if err != nil {
		return fmt.Errorf("read the index's version: %w", err)
	}
	defer closer.Close()
	if string(v) != formatVersion {
		return fmt.Errorf("the index has format version %q, this program knows %q: use a newer one", v, formatVersion)
	}
	return nil
}

// Flush makes everything committed durable.
func (d *DB) Flush() error {
	if err := d.db.Flush(); err != nil {
		return fmt.Errorf("flush the index: %w", err)
	}
	return nil
}

// Close closes the database. No Reader may be in use. It does not flush: what
// Flush has not covered is gone.
func (d *DB) Close() error {
	return d.db.Close()
}

// Size is what the database takes up, in bytes.
func (d *DB) Size() int64 { return int64(d.db.Metrics().DiskSpaceUsage()) }

// Group is one group's part of the key space.
type Group struct {
	db *pebble.DB
	id uint32

	committed atomic.Uint64 // LSN of the last batch's watermark since open
	forgotten atomic.Uint64 // see Forgetting

	classes struct {
		sync.Mutex
		masks map[uint32]uint8 // by disk: the classes that have, or had, versions
	}
	pool struct {
		sync.Mutex
		readers []*Reader // idle
	}
}

// Group opens a group's part. Group numbers are the caller's; one Group at a time is open for each.
func (d *DB) Group(id uint32) (*Group, error) {
	g := &Group{db: d.db, id: id}
	g.classes.masks = map[uint32]uint8{}
	if err := g.loadClasses(); err != nil {
		return nil, err
	}
	return g, nil
}

// Size is about what the group's part takes up on disk, in bytes. What was not flushed yet takes none.
func (g *Group) Size() (int64, error) {
	n, err := g.db.EstimateDiskUsage(appendTable(nil, g.id, 0), appendTable(nil, g.id, 0xff))
	if err != nil {
		return 0, fmt.Errorf("measure the index: %w", err)
	}
	return int64(n), nil
}

// LastGroup is the highest number of a group that the database knows; 0: none.
func (d *DB) LastGroup() (uint32, error) {
	it, err := d.db.NewIter(&pebble.IterOptions{UpperBound: versionKey})
	if err != nil {
		return 0, fmt.Errorf("read the index: %w", err)
	}
	var last uint32
	if it.Last() && len(it.Key()) > 4 {
		last = binary.BigEndian.Uint32(it.Key())
	}
	return last, errors.Join(it.Error(), it.Close())
}

// RetireReaders closes the idle readers that are older than age, so that they
// pin no files that are done with. 0 closes them all.
func (g *Group) RetireReaders(now time.Time, age time.Duration) error {
	g.pool.Lock()
	defer g.pool.Unlock()
	keep := g.pool.readers[:0]
	var errs []error
	for _, r := range g.pool.readers {
		if age > 0 && now.Sub(r.born) < age {
			keep = append(keep, r)
		} else {
			errs = append(errs, r.it.Close())
		}
	}
	clear(g.pool.readers[len(keep):])
	g.pool.readers = keep
	return errors.Join(errs...)
}

// DeleteAll removes everything of the group, in order to build it again.
func (g *Group) DeleteAll() error {
	start := appendTable(nil, g.id, 0)
	end := appendTable(nil, g.id, 0xff)
	if err := g.db.DeleteRange(start, end, pebble.NoSync); err != nil {
		return fmt.Errorf("clear the index of group %d: %w", g.id, err)
	}
	g.classes.Lock()
	clear(g.classes.masks)
	g.classes.Unlock()
	return g.RetireReaders(time.Time{}, 0)
}
