package segment

import (
	"bytes"
	"encoding/binary"
	"errors"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

func head(first record.LSN) Header {
	return Header{Group: 2, First: first, Horizon: 3, Applied: 4, Created: 5, Name: "web01", Follows: true, Reigns: record.Reigns{{Epoch: 1, First: 1, ID: [16]byte{1}}, {Epoch: 7, First: 4, ID: [16]byte{3}}},
		Disks: []record.Disk{{ID: 1, Name: "vda", Size: 1 << 30}, {ID: 2, Name: "vdb", Size: 512}}}
}

func newSet(t *testing.T, fs vfs.FS) *Set {
	t.Helper()
	require.NoError(t, fs.MkdirAll("g", 0o700))
	s, err := OpenSet(fs, "g", false)
	require.NoError(t, err)
	return s
}

// add appends a write of n bytes.
func add(t *testing.T, w *Writer, lsn record.LSN, n int) {
	t.Helper()
	payload := bytes.Repeat([]byte{byte(lsn)}, n)
	h := record.Header{LSN: lsn, Extent: record.Extent{Len: int64(n)}, Kind: record.KindWrite, Salt: w.Current().Salt,
		Payload: n, Sums: record.AppendSums(nil, payload)}
	var e Encoder
	e.Reset(h.EncodedSize())
	e.Add(&h, payload)
	require.NoError(t, w.Append(e.Vec, e.Bytes))
}

func scan(t *testing.T, files []*File) (lsns []record.LSN, err error) {
	t.Helper()
	err = ScanLog(files, files[0].Start(), func(f *File, off int64, h record.Header) error {
		_, err := f.VerifyPayload(off, h, nil)
		lsns = append(lsns, h.LSN)
		return err
	})
	return lsns, err
}

func TestHeaderOfAFile(t *testing.T) {
	h := head(9)
	h.Kind, h.Number, h.Salt = Originals, 4, 77
	got, err := DecodeHeader(h.encode())
	require.NoError(t, err)
	require.Equal(t, h, got)
	for _, gaps := range []Header{{Bridge: true, BridgeAfter: 8}, {Bridged: true, GapAfter: 7}, {Bridge: true, BridgeAfter: 8, Bridged: true, GapAfter: 0}} {
		of := h
		of.Bridge, of.BridgeAfter, of.Bridged, of.GapAfter = gaps.Bridge, gaps.BridgeAfter, gaps.Bridged, gaps.GapAfter
		got, err := DecodeHeader(of.encode())
		require.NoError(t, err)
		require.Equal(t, of, got)
		of.BridgeAfter, of.GapAfter = 9, 9
		_, err = DecodeHeader(of.encode())
		require.ErrorIs(t, err, record.ErrCorrupt)
	}
	of := h
	of.Compact = CompactHead{Pieces: 3, Start: 4096, End: 70000}
	got, err = DecodeHeader(of.encode())
	require.NoError(t, err)
	require.Equal(t, of, got)
	for _, bad := range []CompactHead{{3, 0, 70000}, {3, 4097, 70000}, {3, 8 << 20, 9 << 20}, {3, 4096, 4096}, {20, 4096, 70000}} {
		of.Compact = bad
		_, err = DecodeHeader(of.encode())
		require.ErrorIs(t, err, record.ErrCorrupt)
	}
	b := h.encode()
	b[81] |= 16
	binary.LittleEndian.PutUint32(b[16:], record.Checksum(b[20:]))
	_, err = DecodeHeader(b)
	require.ErrorIs(t, err, ErrVersion)
	b = h.encode()
	b[8] = 4
	_, err = DecodeHeader(b)
	require.ErrorIs(t, err, ErrVersion)
	require.NotErrorIs(t, err, record.ErrCorrupt)
	for i := range b {
		if i >= 8 && i < 12 {
			continue
		}
		b := h.encode()
		b[i] ^= 4
		_, err := DecodeHeader(b)
		require.ErrorIs(t, err, record.ErrCorrupt, "byte %d", i)
	}
}

func TestRecordsAreFoundAgain(t *testing.T) {
	fs := vfs.NewMem()
	s := newSet(t, fs)
	w := NewWriter(s, Log, MinSize, 0)
	require.NoError(t, w.Roll(head(1), 0))
	for lsn := record.LSN(1); lsn <= 60; lsn++ {
		if !w.Fits(9000) {
			require.NoError(t, w.Roll(head(lsn), 0))
		}
		add(t, w, lsn, 100*int(lsn))
	}
	require.NoError(t, w.Close())
	s.Close()
	s, err := OpenSet(fs, "g", false)
	require.NoError(t, err)
	defer s.Close()
	lsns, err := scan(t, s.Files(Log))
	require.NoError(t, err)
	require.Len(t, lsns, 60)
	require.Greater(t, len(s.Files(Log)), 2)
	require.Equal(t, head(1).Disks, s.Files(Log)[0].Disks)
}

// TestSupersededRecordsArePassedOver: a torn tail that a later file took the
// place of is no damage, whatever is in it.
func TestSupersededRecordsArePassedOver(t *testing.T) {
	s := newSet(t, vfs.NewMem())
	defer s.Close()
	w := NewWriter(s, Log, MinSize, 0)
	require.NoError(t, w.Roll(head(1), 0))
	for lsn := record.LSN(1); lsn <= 5; lsn++ {
		add(t, w, lsn, 10)
	}
	require.NoError(t, w.Roll(head(4), 0))
	add(t, w, 4, 11)
	lsns, err := scan(t, s.Files(Log))
	require.NoError(t, err)
	require.Equal(t, []record.LSN{1, 2, 3, 4}, lsns)
}

func TestDamageIsTheScansError(t *testing.T) {
	s := newSet(t, vfs.NewMem())
	defer s.Close()
	w := NewWriter(s, Log, MinSize, 0)
	require.NoError(t, w.Roll(head(1), 0))
	var second int64
	for lsn := record.LSN(1); lsn <= 3; lsn++ {
		if lsn == 2 {
			second = w.Tail()
		}
		add(t, w, lsn, 5000)
	}
	f := s.Files(Log)[0]
	_, err := f.f.WriteAt([]byte{0xff}, second+20)
	require.NoError(t, err)
	lsns, err := scan(t, s.Files(Log))
	require.ErrorIs(t, err, record.ErrCorrupt)
	require.Equal(t, []record.LSN{1}, lsns)
	lsns = nil
	require.NoError(t, f.Resync(second, func(at int64, h record.Header) error {
		require.Greater(t, at, second)
		lsns = append(lsns, h.LSN)
		return nil
	}))
	require.NotEmpty(t, lsns)
	require.EqualValues(t, 3, lsns[0])
}

func TestAFileWithoutHeaderIsSetAside(t *testing.T) {
	fs := vfs.NewMem()
	s := newSet(t, fs)
	w := NewWriter(s, Log, MinSize, 0)
	require.NoError(t, w.Roll(head(1), 0))
	add(t, w, 1, 10)
	require.NoError(t, w.Close())
	s.Close()
	f, err := fs.Create("g/"+fileName(Log, 2, 7), vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	s, err = OpenSet(fs, "g", false)
	require.NoError(t, err)
	defer s.Close()
	require.Len(t, s.Broken(), 1)
	require.Equal(t, record.LSN(2), s.Broken()[0].First)
	require.NoError(t, s.RemoveBroken(false))
	require.Equal(t, uint32(8), s.nextNumber(), "its number is not used again")
}

func TestRemovedFilesStayReadable(t *testing.T) {
	s := newSet(t, vfs.NewMem())
	defer s.Close()
	w := NewWriter(s, Log, MinSize, 0)
	require.NoError(t, w.Roll(head(1), 0))
	add(t, w, 1, 10)
	require.NoError(t, w.Sync())
	f, err := s.Acquire(w.Current().Number)
	require.NoError(t, err)
	require.NoError(t, s.Remove(f))
	_, err = scan(t, []*File{f})
	require.NoError(t, err)
	_, err = s.Acquire(f.Number)
	require.ErrorIs(t, err, ErrGone)
	f.Release()
	require.Zero(t, s.Size())
}

// TestRollWithoutSpace: the writer is as it was, and a later roll succeeds.
func TestRollWithoutSpace(t *testing.T) {
	full, fired := true, 0
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if full && op.Kind == errorfs.OpCreate {
			fired++
			return syscall.ENOSPC
		}
		return nil
	}))
	s := newSet(t, fs)
	defer s.Close()
	w := NewWriter(s, Log, MinSize, 0)
	err := w.Roll(head(1), 0)
	require.True(t, errors.Is(err, syscall.ENOSPC), "%v", err)
	require.Equal(t, 1, fired)
	full = false
	require.NoError(t, w.Roll(head(1), 0))
	add(t, w, 1, 10)
}

// TestSyncBesideAppend: an append that is under way while a sync runs is
// synced by the next one.
func TestSyncBesideAppend(t *testing.T) {
	var w *Writer
	syncs, during := 0, false
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		switch {
		case op.Kind == errorfs.OpFileSyncData:
			syncs++
		case op.Kind == errorfs.OpFileWriteAt && during:
			during = false
			return w.Sync() // before the bytes are written
		}
		return nil
	}))
	s := newSet(t, fs)
	defer s.Close()
	w = NewWriter(s, Log, MinSize, 0)
	require.NoError(t, w.Roll(head(1), 0))
	require.NoError(t, w.Sync())
	during = true
	add(t, w, 1, 10)
	require.False(t, during, "the sync ran within the append")
	before := syncs
	require.NoError(t, w.Sync())
	require.Equal(t, before+1, syncs)
}
