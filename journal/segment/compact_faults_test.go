package segment

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// twoFiles is a set with two compact files, and what they were.
func twoFiles(t *testing.T, fs vfs.FS) (s *Set, files [2]*File, plain [2][]byte) {
	s = newSet(t, fs)
	w := NewWriter(s, Log, 4<<20, 0)
	require.NoError(t, w.Roll(head(1), 0))
	guestLike(t, w, rand.New(rand.NewPCG(1, 1)), 1<<20)
	guestLike(t, w, rand.New(rand.NewPCG(2, 1)), 1<<20)
	for i := range files {
		f := s.Files(Log)[i]
		end, err := f.Scan(f.Start(), func(int64, record.Header) error { return nil })
		require.NoError(t, err)
		plain[i] = make([]byte, end)
		require.NoError(t, f.ReadAt(plain[i], 0, false))
		compact(t, s, f)
		files[i] = f
	}
	require.NoError(t, w.Close())
	return s, files, plain
}

// TestTwoFilesAreRepairedAtOnce: each is what it was, after a start too.
func TestTwoFilesAreRepairedAtOnce(t *testing.T) {
	t.Chdir(t.TempDir())
	s, files, plain := twoFiles(t, vfs.Default)
	var wg sync.WaitGroup
	for i, f := range files {
		wg.Go(func() {
			h, _ := record.Decode(plain[i][f.Start():])
			err := s.Rewrite(f, f.Start(), plain[i][f.Start():f.Start()+h.Size()], 0)
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	s.Close()
	s, err := OpenSet(vfs.Default, "g", false)
	require.NoError(t, err)
	require.Empty(t, s.Broken())
	require.Len(t, s.Files(Log), 3)
	for i := range files {
		requireSame(t, s.Files(Log)[i], plain[i])
	}
}

// TestReadRunUpToDamage: what stands before a damaged record is read, of compact files too.
func TestReadRunUpToDamage(t *testing.T) {
	for _, mk := range []string{"plain", "compact"} {
		t.Run(mk, func(t *testing.T) {
			s := newSet(t, vfs.NewMem())
			w := NewWriter(s, Log, 1<<20, 0)
			require.NoError(t, w.Roll(head(1), 0))
			rnd := rand.New(rand.NewPCG(1, 1))
			var offs []int64
			for lsn := record.LSN(1); w.Fits(9000); lsn++ {
				offs = append(offs, w.Tail())
				addRecord(t, w, record.Header{LSN: lsn, Disk: 1, Kind: record.KindWrite, Extent: record.Extent{Off: int64(lsn) * 4096, Len: 4096}}, page(rnd, nil, 4096))
			}
			f := w.Current()
			require.NoError(t, w.Roll(head(1<<20), 0))
			at := offs[3] + 80 // in the payload of the fourth record
			if mk == "compact" {
				compact(t, s, f)
				dir, err := f.readDirectory(f.compact.head, false)
				require.NoError(t, err)
				p, err := f.readPiece(newScratch(), dir, 0)
				require.NoError(t, err)
				at = p.frames
				for i := range 3 {
					at += int64(p.lengths[2*i]) + int64(p.lengths[2*i+1])<<8
				}
				at += 2
			}
			var b [1]byte
			_, err := f.f.ReadAt(b[:], at)
			require.NoError(t, err)
			b[0] ^= 0xff
			_, err = f.f.WriteAt(b[:], at)
			require.NoError(t, err)
			run, next, err := f.ReadRun(make([]byte, 64<<10), f.Start(), 1, 1<<20)
			require.NoError(t, err, "records 1 to 3 are whole")
			require.EqualValues(t, 4, next)
			require.EqualValues(t, offs[3]-f.Start(), len(run))
		})
	}
}

// badSector fails reads that touch a byte of a file.
type badSector struct {
	vfs.FS
	from, to *int64
}

type badFile struct {
	vfs.File
	b badSector
}

func (b badSector) OpenReadWrite(name string, c vfs.DiskWriteCategory, o ...vfs.OpenOption) (vfs.File, error) {
	f, err := b.FS.OpenReadWrite(name, c, o...)
	if err != nil {
		return f, err
	}
	return badFile{f, b}, nil
}

func (f badFile) Fd() uintptr { return vfs.InvalidFd }
func (f badFile) ReadAt(p []byte, off int64) (int, error) {
	if off < *f.b.to && off+int64(len(p)) > *f.b.from {
		return 0, syscall.EIO
	}
	return f.File.ReadAt(p, off)
}

// TestASectorOfADirectoryThatCanNotBeRead: the other copy serves.
func TestASectorOfADirectoryThatCanNotBeRead(t *testing.T) {
	var from, to int64
	fs := badSector{vfs.NewMem(), &from, &to}
	s, f, plain := guestFile(t, fs, 1, 1<<20)
	compact(t, s, f)
	s.Close()
	s, err := OpenSet(fs, "g", false)
	require.NoError(t, err)
	f = s.Files(Log)[0]
	require.True(t, f.IsCompact())
	from, to = f.compact.head, f.compact.head+4096 // the sector of the first directory can not be read
	got := make([]byte, 4096)
	require.NoError(t, f.ReadAt(got, f.Start(), false), "one damaged sector does not cost the file")
	require.True(t, bytes.Equal(got, plain[f.Start():f.Start()+4096]))
}

// TestVerifyPiecesGoesOn: behind what can not be read.
func TestVerifyPiecesGoesOn(t *testing.T) {
	var from, to int64
	fs := badSector{vfs.NewMem(), &from, &to}
	s, f, _ := guestFile(t, fs, 1, 1<<20)
	compact(t, s, f)
	defer s.Close()
	dir, err := f.readDirectory(f.compact.head, false)
	require.NoError(t, err)
	from = int64(dir[2].at) + 500
	to = from + 10
	found, read := 0, int64(0)
	err = f.VerifyPieces(func(int64, error) error { found++; return nil }, func(n int64) error { read += n; return nil })
	require.NoError(t, err)
	require.Equal(t, 1, found)
	require.Greater(t, read, (f.Alloc()-to)/2, "it went on")
}

// TestACompactFileWithoutDirectories: the pieces themselves say where they are.
func TestACompactFileWithoutDirectories(t *testing.T) {
	s, f, plain := guestFile(t, vfs.NewMem(), 1, 1<<20)
	compact(t, s, f)
	for _, at := range []int64{f.compact.head + 20, f.compact.head + f.compact.room() + 20} {
		_, err := f.f.WriteAt([]byte{0x77, 0x66}, at)
		require.NoError(t, err)
	}
	s.Close()
	s, err := OpenSet(s.fs, "g", false)
	require.NoError(t, err)
	f = s.Files(Log)[0]
	requireRecords(t, f, plain)
	require.NoError(t, f.Resync(f.Start(), func(int64, record.Header) error { return nil }))
	n := 0
	require.NoError(t, f.VerifyPieces(func(int64, error) error { n++; return nil }, noPause))
	require.Equal(t, 2, n)

	// And without one of them, up to there.
	dir, err := f.directory(false)
	require.NoError(t, err)
	_, err = f.f.WriteAt([]byte{0x77}, int64(dir[3].at)+20)
	require.NoError(t, err)
	f.compact.dir = nil
	got := make([]byte, int64(dir[3].plain)-f.Start())
	require.NoError(t, f.ReadAt(got, f.Start(), false))
	require.True(t, bytes.Equal(plain[f.Start():dir[3].plain], got))
	require.ErrorIs(t, f.ReadAt(got, int64(dir[3].plain), false), record.ErrCorrupt)
	// Across the end of what is known, up to there.
	n64, err := f.readSome(make([]byte, 1<<20), f.Start())
	require.NoError(t, err)
	require.EqualValues(t, int64(dir[3].plain)-f.Start(), n64)
	around := make([]byte, int64(dir[3].plain)-f.Start()+5000)
	require.NoError(t, f.ReadDamaged(around, f.Start()))
	require.True(t, bytes.Equal(plain[f.Start():dir[3].plain], around[:len(around)-5000]))
	require.Equal(t, bytes.Repeat([]byte{0xff}, 5000), around[len(around)-5000:])
}

// TestACompactFileIsNotShortened: a writer that goes on to the next file has no say in what became of it.
func TestACompactFileIsNotShortened(t *testing.T) {
	t.Chdir(t.TempDir())
	s := newSet(t, vfs.Default)
	w := NewWriter(s, Originals, 8<<20, 0)
	require.NoError(t, w.Roll(head(1), 0))
	rnd := rand.New(rand.NewPCG(1, 1))
	for lsn := record.LSN(1); lsn < 200; lsn++ {
		addRecord(t, w, record.Header{LSN: lsn, Disk: 1, Kind: record.KindWrite, Extent: record.Extent{Off: int64(lsn) * 4096, Len: 4096}}, page(rnd, nil, 4096))
	}
	f, tail := w.Current(), w.Tail()
	plain := make([]byte, tail)
	require.NoError(t, f.ReadAt(plain, 0, false))
	compact(t, s, f)
	require.NoError(t, s.shorten(f, tail))
	requireSame(t, f, plain)
}

// TestADirectoryThatCanNotBeSynced: is told of, as what else was to be durable in it may not be.
func TestADirectoryThatCanNotBeSynced(t *testing.T) {
	mem := vfs.NewMem()
	fail := false
	fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if fail && op.Kind == errorfs.OpFileSync && op.Path == "g" {
			fail = false
			return syscall.EIO
		}
		return nil
	}))
	s, f, _ := guestFile(t, fs, 1, 1<<20)
	fail = true
	_, err := s.Compact(f, 0, noPause)
	require.ErrorIs(t, err, ErrUnsynced)
}

// TestResyncWhileAFileBecomesCompact: it finds every record.
func TestResyncWhileAFileBecomesCompact(t *testing.T) {
	t.Chdir(t.TempDir())
	s, f, _ := guestFile(t, vfs.Default, 6, 1<<20)
	defer s.Close()
	all := 0
	_, err := f.Scan(f.Start(), func(int64, record.Header) error { all++; return nil })
	require.NoError(t, err)
	n := 0
	err = f.Resync(f.Start(), func(at int64, h record.Header) error {
		if n++; n == 3 {
			compact(t, s, f)
		}
		return nil
	})
	require.NoError(t, err)
	require.Equal(t, all, n)
}

// TestHostileCompactFiles: whatever a file says, with checksums that hold, is read or refused, in bounds.
func TestHostileCompactFiles(t *testing.T) {
	fs := vfs.NewMem()
	s, f, plain := guestFile(t, fs, 9, 256<<10)
	compact(t, s, f)
	orig := make([]byte, f.Alloc())
	require.NoError(t, f.readRaw(orig, 0, false))
	path, c := f.Path, f.compact
	dir, err := f.readDirectory(c.head, false)
	require.NoError(t, err)
	s.Close()
	rnd := rand.New(rand.NewPCG(5, 5))
	le := binary.LittleEndian
	interesting := []uint32{0, 1, 2, 3, 7, 8, 31, 32, 63, 64, 4095, 4096, 4097, 8191, 65535, 1 << 16, 1 << 20, 1<<25 + 8192, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1<<32 - 4096}
	val := func(was uint32) uint32 {
		switch rnd.IntN(3) {
		case 0:
			return interesting[rnd.IntN(len(interesting))]
		case 1:
			return was + uint32(rnd.IntN(65)) - 32
		}
		return rnd.Uint32()
	}
	for range 4000 {
		b := append([]byte(nil), orig...)
		for range 1 + rnd.IntN(3) {
			switch rnd.IntN(5) {
			case 0: // file header
				at := 0
				for i := 88; i < 4000; i++ {
					if le.Uint32(b[i:]) == uint32(c.Pieces) && le.Uint32(b[i+4:]) == uint32(c.Start) && le.Uint32(b[i+8:]) == uint32(c.End) {
						at = i
					}
				}
				if at > 0 {
					at += 4 * rnd.IntN(3)
					le.PutUint32(b[at:], val(le.Uint32(b[at:])))
				}
				le.PutUint32(b[16:], record.Checksum(b[20:c.head]))
			case 1: // directory, both
				i := 4 + 4*rnd.IntN(2*c.Pieces)
				v := val(le.Uint32(b[c.head+int64(i):]))
				for _, d := range []int64{c.head, c.head + c.room()} {
					le.PutUint32(b[d+int64(i):], v)
					le.PutUint32(b[d:], record.Checksum(b[d+4:d+4+8*int64(c.Pieces)]))
				}
			case 2, 3: // a piece
				p := int64(dir[rnd.IntN(len(dir))].at)
				all := pieceFixed + int64(le.Uint32(b[p+24:])) + 2*int64(le.Uint32(b[p+28:]))
				if all < 32 || p+all > int64(len(b)) {
					continue
				}
				if rnd.IntN(2) == 0 {
					at := p + 12 + 4*rnd.Int64N(5)
					le.PutUint32(b[at:], val(le.Uint32(b[at:])))
				} else {
					at := p + 32 + rnd.Int64N(all-32-3)
					le.PutUint32(b[at:], val(le.Uint32(b[at:])))
				}
				le.PutUint32(b[p+4:], record.Checksum(b[p+8:p+all]))
			case 4: // frames
				at := int64(dir[0].at) + rnd.Int64N(int64(len(b))-int64(dir[0].at)-8)
				le.PutUint32(b[at:], val(le.Uint32(b[at:])))
			}
		}
		if rnd.IntN(20) == 0 {
			b = b[:rnd.IntN(len(b))]
		}
		vf, err := fs.Create(path, vfs.WriteCategoryUnspecified)
		require.NoError(t, err)
		_, err = vf.Write(b)
		require.NoError(t, err)
		require.NoError(t, vf.Close())
		func() {
			f, err := openFile(fs, path, false)
			if err != nil {
				return
			}
			defer f.Release()
			if !f.IsCompact() {
				return
			}
			_, _ = f.Scan(f.Start(), func(off int64, h record.Header) error {
				_, _ = f.VerifyRecord(off, h, nil)
				return nil
			})
			_ = f.Resync(f.Start(), func(int64, record.Header) error { return nil })
			_ = f.VerifyPieces(func(int64, error) error { return nil }, noPause)
			_ = f.VerifyHeader()
			for range 4 {
				off := f.Start() + rnd.Int64N(int64(len(plain)))
				p := make([]byte, rnd.IntN(70000))
				_ = f.ReadAt(p, off, rnd.IntN(2) == 0)
				_, _, _ = f.ReadRun(p[:min(len(p), 4096)], off, 1, 1<<20)
			}
		}()
	}
}

// TestAScanFromWithinARecord ends, of a compact file too.
func TestAScanFromWithinARecord(t *testing.T) {
	s, f, plain := guestFile(t, vfs.NewMem(), 1, 1<<20)
	defer s.Close()
	compact(t, s, f)
	for off := f.Start() + 8; off < int64(len(plain)); off += 4096 + 8 {
		begins := false
		_, err := f.Scan(f.Start(), func(at int64, _ record.Header) error {
			begins = begins || at == off
			return nil
		})
		require.NoError(t, err)
		if _, err = f.Scan(off, func(int64, record.Header) error { return nil }); !begins {
			require.ErrorIs(t, err, record.ErrCorrupt, "at %d", off)
		}
	}
	_, err := f.Scan(int64(len(plain))-8, func(int64, record.Header) error { return nil })
	require.ErrorIs(t, err, record.ErrCorrupt)
}
