package journal

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// Options of a store. The zero value of each field stands for its default.
type Options struct {
	// FS is where the state directory and the backings are; the operating
	// system's by default. Tests simulate crashes with it.
	FS vfs.FS
	// Log is told of what an operator should know; nothing by default.
	Log *zap.Logger
	// Now is the clock of record times; time.Now by default.
	Now func() time.Time
	// SegmentSize of new files, bytes; 256 MiB by default.
	SegmentSize int64
	// Reserve is what new segments leave free on the file system for the
	// index, bytes, beside room for a few segments; 128 MiB by default.
	Reserve int64
	// Limit is how large a group's segments may grow before its oldest history
	// is expired, bytes; 0: as far as the file system has room.
	Limit int64
	// Total is how large the segments of all groups together may grow before the oldest history of the largest is expired, bytes; 0: as
	// far as the file system has room.
	Total int64
	// Unapplied is how many bytes of records a group's backings may be
	// behind before writes wait. A round of applying begins at two thirds of it. A record
	// counts as a block at least. By default it is the group's part of half the memory, 1 GiB
	// at least and 16 GiB at most: what is applied is read from the log, and should come from
	// the page cache. Writes wait too while the file system has no room for the originals that they may cost.
	Unapplied int64
	// IndexCache is the memory for blocks of the index, bytes; 64 MiB by default.
	IndexCache int64
	// CompactPace is called with how many bytes of closed segments were read, each of which is read twice, to make them smaller in the background, and may wait; its error ends that.
	// nil: none are made smaller. See [Group.Compact].
	CompactPace func(ctx context.Context, bytes int64) error
	// CompactAfter is how long a segment was closed before: a follower, and who applies, may still read it.
	CompactAfter time.Duration
	// ReadOnly opens a store at rest and changes nothing in it: for Verify and
	// Dump. A view of what the index does not have yet is an error.
	ReadOnly bool

	checkpointBytes int64 // appended between two checkpoints, see there; tests have it small
}

const (
	// syncBytes and syncAge bound what a host's death can take of a guest
	// that never flushes.
	syncBytes = 32 << 20
	syncAge   = time.Second
	// maxWeight bounds the memory of a group's overlays, in units of some 400
	// bytes: a chunk of 64 KiB of a disk is one.
	maxWeight = 1 << 18
	// applyAge is how long a record waits for the backing, so that overwrites
	// of hot blocks meet in the overlay. While the guest writes busyBytes or more
	// between two looks, and busyHold after, it waits longer, up to busyAge, and until two thirds of what
	// may be unapplied are: a burst has the disk for itself, and a stall does not end it. A group that
	// follows is written at the pace of what its writer gets across, which is less where it applies meanwhile.
	applyAge     = 2 * time.Second
	busyAge      = 30 * time.Second
	busyHold     = time.Second
	busyBytes    = 8 << 20
	busyFollower = 1 << 20
	// checkpointBytes and checkpointAge bound what recovery replays, but for what
	// is appended while a checkpoint is made.
	checkpointBytes = 1 << 30
	checkpointAge   = 30 * time.Second
	// expireRetry is how long an expiry that failed is left alone. A write that
	// finds the journal full tries at once.
	expireRetry = time.Minute
	// indexLag is how many versions may wait for the index before writes do.
	indexLag = 1 << 20
	// indexBatch is how many versions are worth a commit of their own before
	// the oldest is of indexAge.
	indexBatch = 1 << 16
	indexAge   = time.Second
)

func (o Options) withDefaults(groups int) Options {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	if o.FS == nil {
		o.FS = vfs.Default
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	def(&o.SegmentSize, segment.DefaultSize)
	def(&o.Reserve, 128<<20)
	def(&o.Unapplied, min(max(memory()/2/int64(max(1, groups)), 1<<30), 16<<30))
	def(&o.IndexCache, 64<<20)
	def(&o.checkpointBytes, checkpointBytes)
	return o
}

// memory is what the machine has, in bytes; 8 GiB if it does not tell.
func memory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 8 << 30
	}
	return int64(info.Totalram) * int64(info.Unit)
}

// What new files leave free. Who would help a full journal has more room than
// who filled it: the log stops first, then the originals of Apply; what an expiry carries
// over, which is at most what the open log file has newer versions of, still fits.
func (o *Options) keepLog() int64    { return o.Reserve + 2*o.SegmentSize }
func (o *Options) keepApply() int64  { return o.Reserve/2 + o.SegmentSize }
func (o *Options) keepExpire() int64 { return o.Reserve / 4 }

// keepCompact is what compaction leaves, so that no history goes for it.
func (o *Options) keepCompact() int64 { return o.keepLog() + 2*o.SegmentSize }

// fileVersions bounds the versions that the records of one log file may have: as many as it has room for writes of 512 bytes. A trim of 4 GiB takes 64 bytes, and has
// some hundred; an expiry decides about all versions of some files at once.
func (o *Options) fileVersions() int { return int(max(o.SegmentSize/512, 1<<16)) }

// Validate reports every fault of the options at once.
func (o Options) Validate() error {
	var errs []error
	if o.SegmentSize != 0 && (o.SegmentSize < segment.MinSize || o.SegmentSize > segment.MaxSize) {
		errs = append(errs, fmt.Errorf("segment size of %d bytes: %d to %d are allowed", o.SegmentSize, segment.MinSize, segment.MaxSize))
	}
	for _, f := range []struct {
		name string
		v    int64
	}{{"reserve", o.Reserve}, {"limit", o.Limit}, {"total", o.Total}, {"unapplied", o.Unapplied}, {"index cache", o.IndexCache}} {
		if f.v < 0 {
			errs = append(errs, fmt.Errorf("%s of %d bytes: it must not be negative", f.name, f.v))
		}
	}
	if o.CompactAfter < 0 {
		errs = append(errs, fmt.Errorf("compact after %v: it must not be negative", o.CompactAfter))
	}
	return errors.Join(errs...)
}
