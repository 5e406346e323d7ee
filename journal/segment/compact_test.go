package segment

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

func noPause(int64) error { return nil }

// page is a block as a database writes it: some text, of which little changes from one version to the next.
func page(rnd *rand.Rand, was []byte, n int) []byte {
	b := make([]byte, n)
	if len(was) == n {
		copy(b, was)
	} else {
		for at := 0; at < n-40; at += 64 {
			copy(b[at:], fmt.Sprintf("%d|%x|row of a table", rnd.Uint32(), rnd.Uint32()))
		}
	}
	for range rnd.IntN(8) {
		b[rnd.IntN(n)] = byte(rnd.Uint32())
	}
	return b
}

// addRecord appends a record of a payload.
func addRecord(t *testing.T, w *Writer, h record.Header, payload []byte) {
	t.Helper()
	h.Salt, h.Payload, h.Sums = w.Current().Salt, len(payload), record.AppendSums(nil, payload)
	var e Encoder
	e.Reset(h.EncodedSize())
	e.Add(&h, payload)
	require.NoError(t, w.Append(e.Vec, e.Bytes))
}

// guestLike fills the current file with what guests write, and ends it.
func guestLike(t *testing.T, w *Writer, rnd *rand.Rand, size int64) {
	t.Helper()
	was := map[int][]byte{}
	for lsn := record.LSN(1); w.Fits(80 << 10); lsn++ {
		h := record.Header{LSN: lsn, Time: int64(lsn), Disk: 1, Kind: record.KindWrite}
		var payload []byte
		switch rnd.IntN(12) {
		case 0: // what can not be made smaller
			payload = make([]byte, (1+rnd.IntN(4))*record.BlockSize)
			for i := range payload {
				payload[i] = byte(rnd.Uint32())
			}
		case 1:
			payload = make([]byte, (1+rnd.IntN(3))*record.BlockSize)
		case 2:
			h.Kind = record.KindTrim
		case 3:
			h.Kind, h.Disk, payload = record.KindMarker, 0, []byte("a note of a length that is no multiple of eight")
		case 4: // the end of a disk
			h.Extent.Off = size
			payload = page(rnd, was[-1], 1024)
			was[-1] = payload
		case 5: // long
			for range 16 {
				payload = append(payload, page(rnd, nil, record.BlockSize)...)
			}
		case 6: // a block of another place
			payload = bytes.Clone(was[rnd.IntN(6)])
			h.Extent.Off = size / 2
		default:
			for i := range 1 + rnd.IntN(2) {
				b := rnd.IntN(6)
				h.Extent.Off = int64(b-i) * record.BlockSize
				was[b] = page(rnd, was[b], record.BlockSize)
				payload = append(payload, was[b]...)
			}
			h.Extent.Off = max(h.Extent.Off, 0)
		}
		if h.Extent.Len = int64(len(payload)); h.Kind == record.KindTrim {
			h.Extent.Len = record.BlockSize
		}
		if h.Kind == record.KindMarker {
			h.Extent = record.Extent{}
		} else if len(payload) == 0 {
			h.Kind, h.Extent.Len = record.KindZero, record.BlockSize
		}
		addRecord(t, w, h, payload)
	}
	require.NoError(t, w.Roll(head(1<<20), 0))
	require.NoError(t, w.Sync())
}

// guestFile is a set whose first file guests have filled, and what is in that.
func guestFile(t *testing.T, fs vfs.FS, seed uint64, size int64) (s *Set, f *File, plain []byte) {
	t.Helper()
	s = newSet(t, fs)
	w := NewWriter(s, Log, size, 0)
	require.NoError(t, w.Roll(head(1), 0))
	guestLike(t, w, rand.New(rand.NewPCG(seed, 1)), 1<<20)
	f = s.Files(Log)[0]
	end, err := f.Scan(f.Start(), func(int64, record.Header) error { return nil })
	require.NoError(t, err)
	plain = make([]byte, end)
	require.NoError(t, f.ReadAt(plain, 0, false))
	require.NoError(t, w.Close())
	return s, f, plain
}

func compact(t *testing.T, s *Set, f *File) {
	t.Helper()
	saved, err := s.Compact(f, 0, noPause)
	require.NoError(t, err)
	require.Positive(t, saved)
	require.True(t, f.IsCompact())
}

// requireSame requires a file to be read as the plain one that it was, and to be whole.
func requireSame(t *testing.T, f *File, plain []byte) {
	t.Helper()
	requireRecords(t, f, plain)
	require.NoError(t, f.VerifyHeader())
	require.NoError(t, f.VerifyPieces(func(at int64, err error) error { return err }, noPause))
}

func requireRecords(t *testing.T, f *File, plain []byte) {
	t.Helper()
	at, end := f.Start(), int64(len(plain))
	got, err := f.Scan(at, func(off int64, h record.Header) error {
		require.Equal(t, at, off)
		want, err := record.Decode(plain[off:])
		require.NoError(t, err)
		require.Equal(t, want, h)
		_, err = f.VerifyRecord(off, h, nil)
		require.NoError(t, err)
		at += h.Size()
		return nil
	})
	require.NoError(t, err)
	require.Equal(t, end, got)
	require.Equal(t, end, at)
	rnd := rand.New(rand.NewPCG(7, 7))
	for range 150 {
		off := f.Start() + rnd.Int64N(end-f.Start())
		p := make([]byte, 1+rnd.Int64N(min(end-off, []int64{100, 5000, 300000}[rnd.IntN(3)])))
		require.NoError(t, f.ReadAt(p, off, rnd.IntN(2) == 0))
		require.True(t, bytes.Equal(plain[off:off+int64(len(p))], p), "%d bytes at %d", len(p), off)
	}
	require.Error(t, f.ReadAt(make([]byte, 9), end-8, false))
	n := 0
	require.NoError(t, f.Resync(f.Start(), func(off int64, h record.Header) error {
		n++
		return nil
	}))
	require.Positive(t, n)
}

func TestCompact(t *testing.T) {
	for seed := range uint64(4) {
		fs := vfs.FS(vfs.NewMem())
		if seed == 0 {
			fs = vfs.Default
			t.Chdir(t.TempDir())
		}
		s, f, plain := guestFile(t, fs, seed, 2<<20)
		was := s.Size()
		compact(t, s, f)
		require.Less(t, s.Size(), was)
		requireSame(t, f, plain)
		saved, err := s.Compact(f, 0, noPause)
		require.NoError(t, err)
		require.Zero(t, saved)
		size := s.Size()
		s.Close()

		s, err = OpenSet(fs, "g", false)
		require.NoError(t, err)
		require.Equal(t, size, s.Size())
		f = s.Files(Log)[0]
		require.True(t, f.IsCompact())
		requireSame(t, f, plain)
		run, next, err := f.ReadRun(make([]byte, 64<<10), f.Start(), 1, 1<<20)
		require.NoError(t, err)
		require.Greater(t, next, record.LSN(1))
		require.True(t, bytes.Equal(plain[f.Start():f.Start()+int64(len(run))], run))

		// It is plain again when it is written to.
		cut := int64(len(plain)) / 2
		cut, err = f.Scan(f.Start(), func(off int64, _ record.Header) error {
			if off >= cut {
				return ErrStop
			}
			return nil
		})
		require.ErrorIs(t, err, ErrStop)
		require.NoError(t, s.Cut(f, cut))
		require.False(t, f.IsCompact())
		require.Equal(t, cut, f.Alloc())
		requireSame(t, f, plain[:cut])
		s.Close()
	}
}

func TestWhatIsNotMadeCompact(t *testing.T) {
	fs := vfs.NewMem()
	s := newSet(t, fs)
	defer s.Close()
	w := NewWriter(s, Log, 1<<20, 0)
	require.NoError(t, w.Roll(head(1), 0))
	rnd := rand.New(rand.NewPCG(1, 1))
	for lsn := record.LSN(1); w.Fits(9000); lsn++ {
		b := make([]byte, 8192)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		addRecord(t, w, record.Header{LSN: lsn, Kind: record.KindWrite, Extent: record.Extent{Len: 8192}}, b)
	}
	require.NoError(t, w.Roll(head(1<<20), 0))
	f := s.Files(Log)[0]
	saved, err := s.Compact(f, 0, noPause)
	require.NoError(t, err)
	require.Zero(t, saved, "nothing is saved")
	require.False(t, f.IsCompact())

	// Damage anywhere, and records behind what looks like the end.
	for _, at := range []int64{f.Start() + 2, f.Start() + 66, f.Start() + 2000} {
		s, f, plain := guestFile(t, vfs.NewMem(), 3, 1<<20)
		b := []byte{plain[at] ^ 1}
		_, err = f.f.WriteAt(b, at)
		require.NoError(t, err)
		_, err = s.Compact(f, 0, noPause)
		require.ErrorIs(t, err, record.ErrCorrupt)
		require.False(t, f.IsCompact())
		s.Close()
	}
	s2, f, _ := guestFile(t, vfs.NewMem(), 3, 1<<20)
	defer s2.Close()
	_, err = f.f.WriteAt(make([]byte, 64), f.Start())
	require.NoError(t, err)
	_, err = s2.Compact(f, 0, noPause)
	require.ErrorIs(t, err, record.ErrCorrupt)
}

func TestARepairedCompactFileIsPlain(t *testing.T) {
	s, f, plain := guestFile(t, vfs.NewMem(), 5, 1<<20)
	defer s.Close()
	compact(t, s, f)
	// A block of frames is damaged: some records can not be read, and one of them is written again.
	dir, err := f.readDirectory(f.compact.head, false)
	require.NoError(t, err)
	p, err := f.readPiece(newScratch(), dir, 1)
	require.NoError(t, err)
	b := make([]byte, p.size/2)
	require.NoError(t, f.readRaw(b, p.frames, false))
	for i := range b {
		b[i] ^= 0x55
	}
	_, err = f.f.WriteAt(b, p.frames)
	require.NoError(t, err)

	var damaged []int64
	_, err = f.Scan(f.Start(), func(off int64, h record.Header) error {
		if _, err := f.VerifyPayload(off, h, nil); err != nil {
			require.ErrorIs(t, err, record.ErrCorrupt)
			damaged = append(damaged, off)
		}
		return nil
	})
	require.NoError(t, err)
	require.Greater(t, len(damaged), 1)
	h, err := record.Decode(plain[damaged[0]:])
	require.NoError(t, err)
	require.NoError(t, s.Rewrite(f, damaged[0], plain[damaged[0]:damaged[0]+h.Size()], 0))
	require.False(t, f.IsCompact())
	var still []int64
	_, err = f.Scan(f.Start(), func(off int64, h record.Header) error {
		if _, err := f.VerifyPayload(off, h, nil); err != nil {
			require.ErrorIs(t, err, record.ErrCorrupt)
			still = append(still, off)
		} else {
			b := make([]byte, h.Size())
			require.NoError(t, f.ReadAt(b, off, false))
			require.True(t, bytes.Equal(plain[off:off+h.Size()], b))
		}
		return nil
	})
	require.NoError(t, err)
	require.Equal(t, damaged[1:], still)
	_, err = s.Compact(f, 0, noPause)
	require.ErrorIs(t, err, record.ErrCorrupt)
	for _, off := range still {
		h, err := record.Decode(plain[off:])
		require.NoError(t, err)
		require.NoError(t, s.Rewrite(f, off, plain[off:off+h.Size()], 0))
	}
	requireSame(t, f, plain)
	compact(t, s, f)
	requireSame(t, f, plain)
}

// Of each single bit: what is read is what was written, or record.ErrCorrupt, and it is found.
func TestFlippedBitsOfACompactFile(t *testing.T) {
	s, f, plain := guestFile(t, vfs.NewMem(), 9, 256<<10)
	defer s.Close()
	compact(t, s, f)
	rnd := rand.New(rand.NewPCG(2, 2))
	buf := make([]byte, 1)
	got := make([]byte, record.BlockSize)
	for n := range 1500 {
		at := rnd.Int64N(f.Alloc())
		if n%3 == 0 {
			at = rnd.Int64N(2*f.compact.room() + f.compact.head)
		}
		if at >= 8 && at < 12 {
			continue // another version is no damage
		}
		bit := byte(1) << rnd.IntN(8)
		_, err := f.f.ReadAt(buf, at)
		require.NoError(t, err)
		flip := func() {
			buf[0] ^= bit
			_, err := f.f.WriteAt(buf, at)
			require.NoError(t, err)
			f.compact.dir = nil // as after a start
		}
		flip()
		found := f.VerifyHeader()
		if found == nil {
			found = f.VerifyPieces(func(_ int64, err error) error { return err }, noPause)
		}
		require.ErrorIs(t, found, record.ErrCorrupt, "at %d of %d", at, f.Alloc())
		for range 2 {
			off := f.Start() + rnd.Int64N(int64(len(plain)-len(got))-f.Start())
			if err := f.ReadAt(got, off, false); err != nil {
				require.ErrorIs(t, err, record.ErrCorrupt)
				continue
			}
			// Undetected here, it is by the record's own checksums, which cover what it can be of.
			if !bytes.Equal(got, plain[off:off+int64(len(got))]) {
				require.Greater(t, at, f.compact.head+2*f.compact.room(), "of headers and directories nothing wrong is read")
			}
		}
		flip()
	}
	requireSame(t, f, plain)
}

// crashAtEachStep has a change of a file fail at each of its writes in turn, until it is done, and calls check with the file as crashes leave it then, and with
// what it held. The file is made ready before.
func crashAtEachStep(t *testing.T, ready func(*testing.T, *Set, *File), change func(s *Set, f *File, plain []byte) error, check func(f *File, plain []byte, done bool)) {
	for n := 0; ; n++ {
		mem := vfs.NewCrashableMem()
		var after int // operations until everything fails
		after = -1
		fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
			if after == 0 {
				return errorfs.ErrInjected
			}
			if after > 0 && op.Kind.ReadOrWrite() == errorfs.OpIsWrite {
				after--
			}
			return nil
		}))
		s, f, plain := guestFile(t, fs, 4, 512<<10)
		root, err := fs.OpenDir("")
		require.NoError(t, err)
		require.NoError(t, errors.Join(root.Sync(), root.Close()))
		ready(t, s, f)
		after = n
		done := change(s, f, plain) == nil
		for seed := range uint64(4) {
			crashed := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rand.New(rand.NewPCG(seed, 3))})
			again, err := OpenSet(crashed, "g", false)
			require.NoError(t, err)
			require.Len(t, again.Files(Log), 2)
			check(again.Files(Log)[0], plain, done)
			names, err := crashed.List("g")
			require.NoError(t, err)
			require.Len(t, names, 2, "nothing is left behind")
			again.Close()
		}
		if done {
			require.Greater(t, n, 4)
			return
		}
	}
}

// TestACrashWhileAFileBecomesCompact leaves the one or the other, whole.
func TestACrashWhileAFileBecomesCompact(t *testing.T) {
	crashAtEachStep(t, func(*testing.T, *Set, *File) {},
		func(s *Set, f *File, _ []byte) error {
			_, err := s.Compact(f, 0, noPause)
			return err
		},
		func(f *File, plain []byte, done bool) {
			requireSame(t, f, plain)
			if done {
				require.True(t, f.IsCompact())
			}
		})
}

// TestACrashWhileACompactFileIsChanged leaves what it was, or all that was to come of it.
func TestACrashWhileACompactFileIsChanged(t *testing.T) {
	third := func(f *File, plain []byte) (off, size int64) { // of the third record that has a payload
		off = f.Start()
		for n := 0; ; off += size {
			h, err := record.Decode(plain[off:])
			if err != nil {
				t.Fatal(err)
			}
			if size = h.Size(); h.Payload > 0 {
				n++
			}
			if n == 3 {
				return off, size
			}
		}
	}
	check := func(f *File, plain, changed []byte, done bool) {
		if f.IsCompact() {
			require.False(t, done)
			requireSame(t, f, plain)
			return
		}
		requireSame(t, f, changed)
	}
	t.Run("cut", func(t *testing.T) {
		crashAtEachStep(t, compact, func(s *Set, f *File, plain []byte) error {
			off, _ := third(f, plain)
			return s.Cut(f, off)
		}, func(f *File, plain []byte, done bool) {
			off, _ := third(f, plain)
			check(f, plain, plain[:off], done)
		})
	})
	t.Run("rewritten", func(t *testing.T) {
		other := func(f *File, plain []byte) (off int64, b []byte) {
			off, size := third(f, plain)
			h, err := record.Decode(plain[off:])
			require.NoError(t, err)
			payload := bytes.Repeat([]byte{7}, h.Payload)
			h.Sums = record.AppendSums(nil, payload)
			b = append(h.Append(nil), payload...)
			return off, append(b, make([]byte, size-int64(len(b)))...)
		}
		crashAtEachStep(t, compact, func(s *Set, f *File, plain []byte) error {
			off, b := other(f, plain)
			return s.Rewrite(f, off, b, 0)
		}, func(f *File, plain []byte, done bool) {
			off, b := other(f, plain)
			check(f, plain, slices.Concat(plain[:off], b, plain[off+int64(len(b)):]), done)
		})
	})
}

// TestAFileThatGoesWhileItBecomesCompact: it does not come back, and nothing is left of it.
func TestAFileThatGoesWhileItBecomesCompact(t *testing.T) {
	for n := 0; ; n++ {
		fs := vfs.NewMem()
		s, f, plain := guestFile(t, fs, 4, 4<<20)
		held, err := s.Acquire(f.Number)
		require.NoError(t, err)
		steps, gone := 0, false
		_, err = s.Compact(f, 0, func(int64) error {
			if steps++; steps-1 == n {
				gone = true
				return s.Remove(f)
			}
			return nil
		})
		if gone {
			require.ErrorIs(t, err, ErrGone)
			names, err := fs.List("g")
			require.NoError(t, err)
			require.Len(t, names, 1, "the file behind it")
			require.False(t, f.IsCompact())
			requireSame(t, f, plain)
		} else {
			require.NoError(t, err)
			require.Greater(t, n, 4, "as it is written, and as it is compared")
		}
		held.Release()
		s.Close()
		if !gone {
			return
		}
	}
}

func TestNoRoomForACompactFile(t *testing.T) {
	full := false
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if full && op.Kind == errorfs.OpFileWriteAt {
			return syscall.ENOSPC
		}
		return nil
	}))
	s, f, plain := guestFile(t, fs, 4, 512<<10)
	defer s.Close()
	full = true
	_, err := s.Compact(f, 0, noPause)
	require.ErrorIs(t, err, ErrFull)
	full = false
	names, err := fs.List("g")
	require.NoError(t, err)
	require.Len(t, names, 2)
	requireSame(t, f, plain)
	compact(t, s, f)
	requireSame(t, f, plain)

	s, f, _ = guestFile(t, vfs.NewMem(), 4, 4<<20)
	defer s.Close()
	ended := errors.New("ended")
	_, err = s.Compact(f, 0, func(int64) error { return ended })
	require.ErrorIs(t, err, ended)
	require.False(t, f.IsCompact())
}

// Readers find the same bytes while a file becomes compact and plain, and is removed.
func TestReadersWhileAFileBecomesCompact(t *testing.T) {
	t.Chdir(t.TempDir())
	s, f, plain := guestFile(t, vfs.Default, 6, 2<<20)
	defer s.Close()
	held, err := s.Acquire(f.Number)
	require.NoError(t, err)
	done := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			for {
				select {
				case <-done:
					return
				default:
				}
				off := f.Start() + rnd.Int64N(int64(len(plain))-f.Start()-8192)
				p := make([]byte, 1+rnd.Int64N(8192))
				if err := held.ReadAt(p, off, false); err != nil || !bytes.Equal(p, plain[off:off+int64(len(p))]) {
					t.Errorf("%d bytes at %d: %v", len(p), off, err)
					return
				}
				if i == 0 {
					end, err := held.Scan(held.Start(), func(int64, record.Header) error { return nil })
					if err != nil || end != int64(len(plain)) {
						t.Errorf("scan to %d: %v", end, err)
						return
					}
				}
			}
		})
	}
	first, err := record.Decode(plain[f.Start():])
	require.NoError(t, err)
	for range 4 {
		compact(t, s, f)
		require.NoError(t, s.Rewrite(f, f.Start(), plain[f.Start():f.Start()+first.Size()], 0))
	}
	compact(t, s, f)
	require.NoError(t, s.Remove(f))
	_, err = s.Compact(f, 0, noPause)
	require.NoError(t, err)
	close(done)
	wg.Wait()
	requireSame(t, held, plain)
	held.Release()
}

var (
	compactDir = flag.String("compact.dir", "", "a group's directory, for benchmarks of compaction")
	besideDir  = flag.String("compact.beside", "", "another group's, for BenchmarkAlike")
)

// BenchmarkPartsOfCompaction says what each way to keep a block in less space saves of a group's history, see make bench-history.
func BenchmarkPartsOfCompaction(b *testing.B) {
	if *compactDir == "" {
		b.Skip("no directory of a group is given")
	}
	for _, c := range []struct {
		with string
		compactor
	}{
		{"zstd alone", compactor{withoutDifferences: true}},
		{"zstd and differences", compactor{}},
	} {
		dir := b.TempDir()
		require.NoError(b, os.CopyFS(dir, os.DirFS(*compactDir)))
		s, err := OpenSet(vfs.Default, dir, false)
		require.NoError(b, err)
		var read int64
		began := time.Now()
		for _, f := range slices.Concat(s.Files(Log), s.Files(Originals)) {
			read += f.Alloc()
			c.pause = noPause
			_, err := s.compact(f, 0, c.compactor)
			require.NoError(b, err)
		}
		fmt.Printf("| closed segments of that with %s, against as they were | %.3f (%.0f MB/s) | | |\n", c.with, float64(s.Size())/float64(read), float64(read)/1e6/time.Since(began).Seconds())
		s.Close()
		require.NoError(b, os.RemoveAll(dir))
	}
}

// BenchmarkAlike counts what of a group's blocks another group has too, and what those take once the files are compact.
func BenchmarkAlike(b *testing.B) {
	if *compactDir == "" || *besideDir == "" {
		b.Skip("no directories of two groups are given")
	}
	beside := map[[sha256.Size]byte]bool{}
	there, err := OpenSet(vfs.Default, *besideDir, true)
	require.NoError(b, err)
	defer there.Close()
	var buf []byte
	for _, f := range slices.Concat(there.Files(Log), there.Files(Originals)) {
		_, err := f.Scan(f.Start(), func(off int64, h record.Header) (err error) {
			if buf, err = f.VerifyPayload(off, h, buf); err == nil {
				for block := range slices.Chunk(buf, record.BlockSize) {
					beside[sha256.Sum256(block)] = true
				}
			}
			return err
		})
		require.NoError(b, err)
	}
	dir := b.TempDir()
	require.NoError(b, os.CopyFS(dir, os.DirFS(*compactDir)))
	s, err := OpenSet(vfs.Default, dir, false)
	require.NoError(b, err)
	defer s.Close()
	var blocks, alike, bytes, alikeBytes int64
	for _, f := range slices.Concat(s.Files(Log), s.Files(Originals)) {
		_, err := s.Compact(f, 0, noPause)
		require.NoError(b, err)
		if !f.IsCompact() {
			continue
		}
		require.NoError(b, f.eachFrame(func(block []byte, frame int64) {
			if frame == 0 {
				return // zeroes
			}
			blocks, bytes = blocks+1, bytes+frame
			if beside[sha256.Sum256(block)] {
				alike, alikeBytes = alike+1, alikeBytes+frame
			}
		}))
	}
	fmt.Printf("| … of the blocks of a guest, those that another one, made and used alike, wrote too | %.3f of the blocks, %.3f of what they take when compact | | |\n", float64(alike)/float64(blocks), float64(alikeBytes)/float64(bytes))
}

// eachFrame calls fn with the blocks of a compact file, and the length of each one's frame.
func (f *File) eachFrame(fn func(block []byte, frame int64)) error {
	_, dir, err := f.pieces()
	if err != nil {
		return err
	}
	s := newScratch()
	defer s.done()
	block := make([]byte, record.BlockSize)
	for i := range dir {
		p, err := f.readPiece(s, dir, i)
		if err != nil {
			return err
		}
		err = f.each(&p, func(_ []byte, _ int64, b body) (bool, error) {
			for i := range int64(record.Blocks(b.n)) {
				part := block[:min(b.n-i*record.BlockSize, record.BlockSize)]
				if err := f.ReadAt(part, b.off+i*record.BlockSize, false); err != nil {
					return false, err
				}
				fn(part, p.frameLen(b, i))
			}
			return true, nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkReadCompact reads single blocks, most of which are kept as differences.
func BenchmarkReadCompact(b *testing.B) {
	for _, name := range []string{"plain", "compact"} {
		b.Run(name, func(b *testing.B) {
			b.Chdir(b.TempDir())
			s, err := OpenSet(vfs.Default, ".", false)
			require.NoError(b, err)
			defer s.Close()
			w := NewWriter(s, Log, 32<<20, 0)
			require.NoError(b, w.Roll(head(1), 0))
			rnd := rand.New(rand.NewPCG(1, 1))
			was := map[int64][]byte{}
			var at []int64
			for lsn := record.LSN(1); w.Fits(8 << 10); lsn++ {
				block := rnd.Int64N(2000)
				was[block] = page(rnd, was[block], record.BlockSize)
				h := record.Header{LSN: lsn, Disk: 1, Kind: record.KindWrite, Extent: record.Extent{Off: block * record.BlockSize, Len: record.BlockSize},
					Salt: w.Current().Salt, Payload: record.BlockSize, Sums: record.AppendSums(nil, was[block])}
				at = append(at, w.Tail()+int64(h.EncodedSize()))
				var e Encoder
				e.Reset(h.EncodedSize())
				e.Add(&h, was[block])
				require.NoError(b, w.Append(e.Vec, e.Bytes))
			}
			f := w.Current()
			require.NoError(b, w.Roll(head(1<<20), 0))
			if name == "compact" {
				_, err := s.Compact(f, 0, noPause)
				require.NoError(b, err)
				b.ReportMetric(float64(f.Alloc())/(32<<20), "ratio")
			}
			p := make([]byte, record.BlockSize)
			for b.Loop() {
				if err := f.ReadAt(p, at[rnd.IntN(len(at))], false); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
