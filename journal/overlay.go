package journal

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"slices"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/disk"
	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/journal/segment"
)

// The overlays are saved with each checkpoint, so that recovery need not read
// the header of every record that the backings lack: those behind the file's last LSN are enough.
// The segments are the truth: a file that is missing, damaged or not of the
// last checkpoint costs time and nothing else.
const (
	overlayName    = "overlay"
	overlayTmpName = "overlay.tmp" // OpenSet removes it
)

// overlayHead is the head of the file.
//
//	offset size field
//	  0     8   magic, "TIDEOVL\n"
//	  8     4   format version, 2
//	 12     4   group
//	 16     8   applied: LSN of the checkpoint, must be the group's applied LSN
//	 24     8   last: every record behind applied up to here is in the file
//	 32     8   bytes of records that are not applied
//	 40     8   bytes of originals that those may cost
//	 48     8   time of the newest record, Unix nanoseconds
//	 56     4   number of disks, then each as [disk.Disk.Save] writes it
//	  …     4   CRC-32C of all before
//
// Integers are little-endian.
type overlayHead struct {
	group         uint32
	applied, last record.LSN
	unapplied     int64
	owed          int64
	time          int64
	disks         uint32
}

const (
	overlayMagic    = "TIDEOVL\n"
	overlayVersion  = 2
	overlayHeadSize = 60
)

func (h *overlayHead) append(b []byte) []byte {
	le := binary.LittleEndian
	b = append(b, overlayMagic...)
	b = le.AppendUint32(b, overlayVersion)
	b = le.AppendUint32(b, h.group)
	b = le.AppendUint64(b, uint64(h.applied))
	b = le.AppendUint64(b, uint64(h.last))
	b = le.AppendUint64(b, uint64(h.unapplied))
	b = le.AppendUint64(b, uint64(h.owed))
	b = le.AppendUint64(b, uint64(h.time))
	return le.AppendUint32(b, h.disks)
}

func (h *overlayHead) read(r io.Reader) error {
	var b [overlayHeadSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return err
	}
	le := binary.LittleEndian
	if v := le.Uint32(b[8:]); string(b[:8]) != overlayMagic || v != overlayVersion {
		return fmt.Errorf("magic %q, version %d: this program knows %q, %d", b[:8], v, overlayMagic, overlayVersion)
	}
	*h = overlayHead{
		group: le.Uint32(b[12:]), applied: record.LSN(le.Uint64(b[16:])), last: record.LSN(le.Uint64(b[24:])),
		unapplied: int64(le.Uint64(b[32:])), owed: int64(le.Uint64(b[40:])), time: int64(le.Uint64(b[48:])), disks: le.Uint32(b[56:]),
	}
	return nil
}

// saveOverlays saves what is not applied. The index has every record up to last, durably, and the backings
// those up to the applied LSN. Without room, or if the file can not be written, there is none. g.apply is held.
func (g *Group) saveOverlays(last record.LSN) error {
	if last <= g.Applied() {
		g.dropOverlays()
		g.apply.saved = last
		return nil
	}
	tmp := g.fs.PathJoin(g.dir, overlayTmpName)
	err := g.writeOverlays(tmp, last)
	if err == nil {
		// The file may show records up to here.
		if err := g.Sync(); err != nil {
			return err
		}
		err = g.fs.Rename(tmp, g.fs.PathJoin(g.dir, overlayName))
	}
	if err == nil {
		err = syncDirs(g.fs, g.dir)
	}
	if err != nil {
		g.log.Warn("what is not applied could not be saved: a recovery will take longer", zap.Error(err))
		_ = g.fs.Remove(tmp) // if it is there
		return nil
	}
	g.apply.saved = last
	return nil
}

func (g *Group) writeOverlays(path string, last record.LSN) (err error) {
	g.append.Lock()
	disks := g.disks.Load().all
	weight := g.append.weight
	h := overlayHead{
		group: g.id, applied: g.Applied(), last: last, unapplied: g.unapplied.Load(), owed: g.owed.Load(),
		time: g.recordTime.Load(), disks: uint32(len(disks)),
	}
	g.append.Unlock()
	if u, err := g.fs.GetDiskUsage(g.dir); err == nil && int64(u.AvailBytes) < g.o.keepApply()+int64(weight)*384 {
		return fmt.Errorf("%d bytes are free: %w", u.AvailBytes, segment.ErrFull)
	}
	f, err := g.fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	out := bufio.NewWriterSize(f, 256<<10)
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	w := io.MultiWriter(out, sum)
	if _, err := w.Write(h.append(nil)); err != nil {
		return err
	}
	for _, d := range disks {
		if err := d.Save(w); err != nil {
			return err
		}
	}
	if _, err := out.Write(binary.LittleEndian.AppendUint32(nil, sum.Sum32())); err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return err
	}
	return f.Sync()
}

// dropOverlays removes the file: everything is applied.
func (g *Group) dropOverlays() {
	err := g.fs.Remove(g.fs.PathJoin(g.dir, overlayName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		g.log.Warn("remove what was saved of the overlays", zap.Error(err)) // a recovery passes over it
	}
}

// overlays takes up what was saved with the last checkpoint. Without it, everything
// behind the applied LSN is replayed.
func (r *recovery) overlays() {
	r.overlaid = r.applied
	path := r.g.fs.PathJoin(r.g.dir, overlayName)
	h, saved, err := r.openOverlays(path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		r.g.log.Warn("what was saved of the overlays is not usable: replaying the log instead", zap.String("path", path), zap.Error(err))
		return
	}
	if h.group != r.g.id || h.applied != r.applied || h.last > r.mark.LSN || h.last <= r.applied || h.unapplied < 0 || h.owed < 0 {
		return // of an older checkpoint
	}
	for _, s := range saved {
		if d := r.g.disk(s.ID); d != nil && d.Attached() {
			r.g.append.weight += d.Load(s)
		} else if s.Places > 0 {
			r.absent = append(r.absent, s.ID)
		}
	}
	r.overlaid = h.last
	r.g.unapplied.Store(h.unapplied)
	r.g.owed.Store(h.owed)
	r.g.newestLocked(max(r.g.recordTime.Load(), h.time))
}

func (r *recovery) openOverlays(path string) (h overlayHead, saved []disk.Saved, err error) {
	f, err := r.g.fs.Open(path)
	if err != nil {
		return h, nil, err
	}
	h, saved, err = r.readOverlays(f)
	return h, saved, errors.Join(err, f.Close())
}

func (r *recovery) readOverlays(f io.Reader) (h overlayHead, saved []disk.Saved, err error) {
	in := bufio.NewReaderSize(f, 256<<10)
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	hashed := io.TeeReader(in, sum)
	if err := h.read(hashed); err != nil {
		return h, nil, err
	}
	var files []uint32
	for _, f := range r.logs {
		files = append(files, f.Number)
	}
	known := func(file uint32) bool {
		_, ok := slices.BinarySearch(files, file)
		return ok
	}
	for range h.disks {
		s, err := disk.ReadSaved(hashed, r.g.diskSize, known)
		if err != nil {
			return h, nil, err
		}
		saved = append(saved, s)
	}
	var end [4]byte
	if _, err := io.ReadFull(in, end[:]); err != nil {
		return h, nil, err
	}
	if got, want := sum.Sum32(), binary.LittleEndian.Uint32(end[:]); got != want {
		return h, nil, fmt.Errorf("%w: checksum %08x, recorded %08x", record.ErrCorrupt, got, want)
	}
	return h, saved, nil
}

// diskSize is a disk's size in bytes; of one that is not configured, the largest there is.
func (g *Group) diskSize(id record.DiskID) int64 {
	if d := g.disk(id); d != nil {
		return d.Size
	}
	return record.MaxDiskSize
}
