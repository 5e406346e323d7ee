package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/nbd/client"
	"github.com/tidemark-cdp/tidemark/nbd/internal/proto"
)

// memory is a device in memory.
type memory struct {
	mu       sync.RWMutex
	b        []byte
	readOnly bool
	slow     bool // every read would block at first
	flushes  int
	fail     error // of changes
}

func (m *memory) Size() int64    { return int64(len(m.b)) }
func (m *memory) ReadOnly() bool { return m.readOnly }
func (m *memory) Close() error   { return nil }

func (m *memory) ReadAt(p []byte, off int64, nowait bool) error {
	if m.slow && nowait {
		return ErrWouldBlock
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	copy(p, m.b[off:])
	return nil
}

func (m *memory) Change(changes []Change) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return m.fail
	}
	for _, c := range changes {
		if c.Op == OpWrite {
			copy(m.b[c.Off:c.Off+c.Len], c.Buf)
		} else {
			clear(m.b[c.Off : c.Off+c.Len])
		}
	}
	return nil
}

func (m *memory) Flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.flushes++
	return nil
}

func (m *memory) Extents(off, n int64, fn func(int64, bool)) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for n > 0 {
		k := min(n, 4096-off%4096)
		fn(k, isZero(m.b[off:off+k]))
		off, n = off+k, n-k
	}
	return nil
}

type one struct{ dev Device }

func (o one) List() []string { return []string{"disk"} }

func (o one) Open(name string) (Device, error) {
	if name != "disk" {
		return nil, errors.New("no such export")
	}
	return o.dev, nil
}

// start serves dev on a unix socket until the test ends.
func start(t *testing.T, s *Server) string {
	t.Helper()
	if s.Log == nil {
		s.Log = zap.NewNop()
	}
	path := filepath.Join(t.TempDir(), "nbd.sock")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
	})
	return path
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestClientAndServer compares a device under many requests side by side with
// a copy: reads of all sizes, written ranges, zeroes, extents.
func TestClientAndServer(t *testing.T) {
	for _, slow := range []bool{false, true} {
		dev := &memory{b: make([]byte, 8<<20+512), slow: slow}
		path := start(t, &Server{Exports: one{dev}})
		c, err := client.Dial(context.Background(), "unix", path, "disk", nil)
		require.NoError(t, err)
		require.EqualValues(t, len(dev.b), c.Size())
		want := make([]byte, len(dev.b))
		var wg sync.WaitGroup
		const workers = 8
		for w := range workers {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(w), 7))
				lo := len(want) / workers * w
				hi := lo + len(want)/workers
				for range 60 {
					off := lo + rng.IntN(hi-lo)
					n := 1 + rng.IntN(min(hi-off, 1+rng.IntN(700<<10)))
					part := want[off : off+n]
					switch rng.IntN(6) {
					case 0:
						clear(part)
						require.NoError(t, c.Zero(int64(off), uint32(n), rng.IntN(2) == 0))
					case 1:
						clear(part)
						require.NoError(t, c.Trim(int64(off), uint32(n)))
					case 2, 3:
						for i := range part {
							part[i] = byte(rng.Uint32())
						}
						require.NoError(t, c.WriteAt(part, int64(off), rng.IntN(4) == 0))
					case 4:
						require.NoError(t, c.Flush())
					default:
						got := bytes.Repeat([]byte{0xee}, n)
						require.NoError(t, c.ReadAt(got, int64(off)))
						require.True(t, bytes.Equal(part, got), "read of %d at %d", n, off)
					}
				}
			})
		}
		wg.Wait()
		require.True(t, bytes.Equal(want, dev.b))
		off := int64(0)
		require.NoError(t, c.Extents(0, c.Size(), func(n int64, zero bool) {
			require.True(t, !zero || isZero(want[off:off+n]))
			off += n
		}))
		require.EqualValues(t, len(want), off)
		require.NoError(t, c.Close())
	}
}

func TestWriteErrorsReachTheClient(t *testing.T) {
	dev := &memory{b: make([]byte, 1<<20), fail: io.ErrShortWrite}
	c, err := client.Dial(context.Background(), "unix", start(t, &Server{Exports: one{dev}}), "disk", nil)
	require.NoError(t, err)
	defer c.Close()
	require.ErrorContains(t, c.WriteAt(make([]byte, 4096), 0, false), "input/output error")
	require.NoError(t, c.ReadAt(make([]byte, 4096), 0))
}

func TestDurableServerFlushesBeforeItAnswers(t *testing.T) {
	dev := &memory{b: make([]byte, 1<<20)}
	c, err := client.Dial(context.Background(), "unix", start(t, &Server{Exports: one{dev}, Durable: true}), "disk", nil)
	require.NoError(t, err)
	defer c.Close()
	for i := range 3 {
		require.NoError(t, c.WriteAt(make([]byte, 4096), 0, false))
		dev.mu.Lock()
		require.Equal(t, i+1, dev.flushes)
		dev.mu.Unlock()
	}
}

// raw speaks the protocol byte by byte.
type raw struct {
	t *testing.T
	net.Conn
}

func dialRaw(t *testing.T, path string) raw {
	t.Helper()
	c, err := net.Dial("unix", path)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	r := raw{t, c}
	r.read(18)
	r.write(uint32(3))
	return r
}

func (r raw) write(v ...any) {
	r.t.Helper()
	var b bytes.Buffer
	for _, x := range v {
		require.NoError(r.t, binary.Write(&b, binary.BigEndian, x))
	}
	_, err := r.Write(b.Bytes())
	require.NoError(r.t, err)
}

func (r raw) read(n int) []byte {
	r.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	require.NoError(r.t, err)
	return b
}

// option sends an option and returns the type of the first reply.
func (r raw) option(opt uint32, data []byte) uint32 {
	r.t.Helper()
	r.write(protocol.NEGOTIATION_MAGIC_OPTION, opt, uint32(len(data)), data)
	h := r.read(20)
	require.Equal(r.t, opt, binary.BigEndian.Uint32(h[8:]))
	r.read(int(binary.BigEndian.Uint32(h[16:])))
	return binary.BigEndian.Uint32(h[12:])
}

func (r raw) begin() { r.beginOn("disk") }

func (r raw) beginOn(name string) {
	r.t.Helper()
	r.write(protocol.NEGOTIATION_MAGIC_OPTION, proto.OptExportName, uint32(len(name)), []byte(name))
	r.read(10)
}

// request sends a request and returns the error of its simple reply.
func (r raw) request(flags, typ uint16, off uint64, n uint32, payload []byte) uint32 {
	r.t.Helper()
	r.write(protocol.TRANSMISSION_MAGIC_REQUEST, flags, typ, uint64(99), off, n, payload)
	h := r.read(16)
	require.Equal(r.t, protocol.TRANSMISSION_MAGIC_REPLY, binary.BigEndian.Uint32(h))
	require.EqualValues(r.t, 99, binary.BigEndian.Uint64(h[8:]))
	return binary.BigEndian.Uint32(h[4:])
}

// TestStrangeOptionsKeepTheStreamInStep sends what no client should and ends
// with an option that must still be understood.
func TestStrangeOptionsKeepTheStreamInStep(t *testing.T) {
	path := start(t, &Server{Exports: one{&memory{b: make([]byte, 1<<20)}}})
	r := dialRaw(t, path)
	require.Equal(t, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED, r.option(77, []byte("what")))
	require.Equal(t, proto.RepErrTooBig, r.option(77, make([]byte, maxOptionLen+1)))
	require.Equal(t, proto.RepErrTooBig, r.option(protocol.NEGOTIATION_ID_OPTION_GO, make([]byte, 300<<10)))
	require.Equal(t, proto.RepErrInvalid, r.option(protocol.NEGOTIATION_ID_OPTION_GO, []byte{0xff, 0xff, 0xff, 0xff, 'x'}))
	require.Equal(t, proto.RepErrInvalid, r.option(protocol.NEGOTIATION_ID_OPTION_GO, nil))
	require.Equal(t, proto.RepErrInvalid, r.option(protocol.NEGOTIATION_ID_OPTION_LIST, []byte("x")))
	require.Equal(t, proto.RepErrInvalid, r.option(proto.OptStructuredReply, []byte("x")))
	require.Equal(t, proto.RepErrPolicy, r.option(proto.OptStartTLS, nil))
	require.Equal(t, proto.RepErrInvalid, r.option(proto.OptSetMeta, []byte{0, 0, 0, 4, 'd', 'i', 's', 'k', 0, 0, 0, 1}), "before structured replies")
	require.Equal(t, protocol.NEGOTIATION_TYPE_REPLY_ACK, r.option(proto.OptStructuredReply, nil))
	require.Equal(t, proto.RepErrInvalid, r.option(proto.OptSetMeta, []byte{0, 0, 0, 4, 'd', 'i', 's', 'k', 0xff, 0xff, 0xff, 0xff}))
	require.Equal(t, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN, r.option(protocol.NEGOTIATION_ID_OPTION_GO, []byte{0, 0, 0, 2, 'n', 'o', 0, 0}))
	require.Equal(t, protocol.NEGOTIATION_TYPE_REPLY_SERVER, r.option(protocol.NEGOTIATION_ID_OPTION_LIST, nil))
	r.read(20) // its ACK
	require.Equal(t, protocol.NEGOTIATION_TYPE_REPLY_ACK, r.option(protocol.NEGOTIATION_ID_OPTION_ABORT, nil))
	_, err := r.Read(make([]byte, 1))
	require.Error(t, err)
}

func TestStrangeRequestsKeepTheStreamInStep(t *testing.T) {
	const size = 1 << 20
	path := start(t, &Server{Exports: one{&memory{b: make([]byte, size)}}})
	r := dialRaw(t, path)
	r.begin()
	require.Equal(t, proto.ErrEINVAL, r.request(0, 42, 0, 0, nil), "unknown command")
	require.Equal(t, proto.ErrEINVAL, r.request(1<<9, proto.CmdRead, 0, 1, nil), "unknown flag")
	require.Equal(t, proto.ErrEINVAL, r.request(proto.CmdFlagDF, proto.CmdRead, 0, 1, nil), "DF without structured replies")
	require.Equal(t, proto.ErrEINVAL, r.request(0, proto.CmdRead, size, 1, nil), "past the end")
	require.Equal(t, proto.ErrEINVAL, r.request(0, proto.CmdRead, 1<<63, 1, nil), "offset overflows")
	require.Equal(t, proto.ErrEINVAL, r.request(0, proto.CmdRead, 0, 1<<31, nil), "longer than anything")
	require.Equal(t, proto.ErrENOSPC, r.request(0, proto.CmdWrite, size-1, 2, []byte("ab")), "write past the end")
	require.Equal(t, proto.ErrENOSPC, r.request(0, proto.CmdWrite, ^uint64(0), 600<<10, make([]byte, 600<<10)), "its payload is drained")
	require.Equal(t, proto.ErrENOSPC, r.request(0, proto.CmdWriteZeroes, size, 1, nil))
	require.Equal(t, proto.ErrEINVAL, r.request(0, proto.CmdTrim, size, 1, nil))
	require.Equal(t, proto.ErrEINVAL, r.request(0, proto.CmdBlockStatus, 0, 4096, nil), "no context was agreed on")
	require.Zero(t, r.request(0, proto.CmdWrite, 5, 3, []byte("abc")))
	require.Zero(t, r.request(0, proto.CmdRead, 4, 5, nil))
	require.Equal(t, []byte("\x00abc\x00"), r.read(5))
	require.Zero(t, r.request(0, proto.CmdRead, 0, 0, nil), "nothing is a length")
	require.Zero(t, r.request(0, proto.CmdCache, 0, size, nil))
	r.write(uint32(0xbad), make([]byte, 24))
	_, err := io.ReadAll(r)
	require.NoError(t, err, "a bad magic ends the connection")
}

func TestReadOnlyExport(t *testing.T) {
	path := start(t, &Server{Exports: one{&memory{b: make([]byte, 1<<20), readOnly: true}}})
	r := dialRaw(t, path)
	r.begin()
	for _, cmd := range []uint16{proto.CmdTrim, proto.CmdWriteZeroes} {
		require.Equal(t, proto.ErrEPERM, r.request(0, cmd, 0, 4096, nil))
	}
	require.Equal(t, proto.ErrEPERM, r.request(0, proto.CmdWrite, 0, 3, []byte("abc")))
	require.Zero(t, r.request(0, proto.CmdFlush, 0, 0, nil))
}

// TestStopFinishesWhatIsInHand cancels the server while a client writes: each
// write that was answered is in the device.
func TestStopFinishesWhatIsInHand(t *testing.T) {
	dev := &memory{b: make([]byte, 1<<20)}
	s := &Server{Exports: one{dev}, Log: zap.NewNop()}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	c, err := client.Dial(ctx, "unix", l.Addr().String(), "disk", nil)
	require.NoError(t, err)
	answered := 0
	for i := range 256 {
		if i == 100 {
			cancel()
		}
		if err := c.WriteAt(bytes.Repeat([]byte{byte(i + 1)}, 4096), int64(i)*4096, false); err != nil {
			break
		}
		answered = i + 1
	}
	require.NoError(t, <-done)
	require.GreaterOrEqual(t, answered, 100)
	for i := range answered {
		require.Equal(t, byte(i+1), dev.b[i*4096])
	}
	require.NoError(t, c.Close())
}

// TestNobodyHoldsUpAWrite: clients that do not take what they asked for, and others that do not send what they
// announced, are none of a guest's business (P8).
func TestNobodyHoldsUpAWrite(t *testing.T) {
	disk := &memory{b: make([]byte, 64<<20)}
	past := &memory{b: make([]byte, 64<<20), readOnly: true}
	for i := range past.b {
		past.b[i] = byte(i>>12) | 1
	}
	path := start(t, &Server{Exports: two{disk, past}})
	for range 16 {
		reader := dialRaw(t, path)
		reader.beginOn("past")
		for i := range uint64(5) {
			reader.write(protocol.TRANSMISSION_MAGIC_REQUEST, uint16(0), proto.CmdRead, i, uint64(0), uint32(32<<20))
		}
		writer := dialRaw(t, path)
		writer.begin()
		writer.write(protocol.TRANSMISSION_MAGIC_REQUEST, uint16(0), proto.CmdWrite, uint64(1), uint64(0), uint32(32<<20))
	}
	guest, err := client.Dial(context.Background(), "unix", path, "d", nil)
	require.NoError(t, err)
	defer guest.Close()
	for n := 1; n <= MaxRequest; n = n*3 + 7 {
		want := make([]byte, n)
		for i := range want {
			want[i] = byte(i*7>>4) | byte(n)
		}
		clear(want[n/3 : n/2])
		done := make(chan error, 1)
		got := make([]byte, n)
		go func() {
			done <- errors.Join(guest.WriteAt(want, 4097, n%2 == 0), guest.ReadAt(got, 4097))
		}()
		select {
		case err := <-done:
			require.NoError(t, err)
		case <-time.After(30 * time.Second):
			require.FailNow(t, "a guest is held up", "%d bytes", n)
		}
		require.True(t, bytes.Equal(want, got), "%d bytes", n)
	}
}

// two are exports by name: d, and past.
type two struct{ d, past Device }

func (e two) List() []string { return []string{"d", "past"} }

func (e two) Open(name string) (Device, error) {
	if name == "past" {
		return e.past, nil
	}
	return e.d, nil
}

// mapped is a device with a metadata context that tells in which blocks of 64 KiB the first byte is odd.
type mapped struct {
	*memory
	open atomic.Int32 // maps
}

func (m *mapped) Map(context string) (Map, error) {
	switch context {
	case "test:odd":
		m.open.Add(1)
		return oddMap{m}, nil
	case "test:broken":
		return nil, errors.New("it is broken")
	}
	return nil, nil
}

type oddMap struct{ m *mapped }

func (o oddMap) Close() error {
	o.m.open.Add(-1)
	return nil
}

func (o oddMap) Extents(off, n int64, fn func(int64, uint32)) error {
	for n > 0 {
		k := min(n, 65536-off%65536)
		fn(k, uint32(o.m.b[off&^65535]&1))
		off, n = off+k, n-k
	}
	return nil
}

// TestContextsOfADevice asks for holes and for a context of the device's own on one connection.
func TestContextsOfADevice(t *testing.T) {
	dev := &mapped{memory: &memory{b: make([]byte, 1<<20+5)}}
	for _, block := range []int{1, 2, 7, 16} {
		dev.b[block<<16] = byte(block)
	}
	path := start(t, &Server{Exports: one{dev}})
	_, err := client.Dial(context.Background(), "unix", path, "disk", nil, "test:none")
	require.ErrorContains(t, err, `no metadata context "test:none"`)
	_, err = client.Dial(context.Background(), "unix", path, "disk", nil, "test:broken")
	require.ErrorContains(t, err, "it is broken")
	c, err := client.Dial(context.Background(), "unix", path, "disk", nil, "test:odd")
	require.NoError(t, err)
	var odd []int64
	off := int64(0)
	require.NoError(t, c.Status("test:odd", off, c.Size(), func(n int64, flags uint32) {
		if flags == 1 {
			odd = append(odd, off>>16)
		}
		off += n
	}))
	require.Equal(t, []int64{1, 7}, odd)
	require.Equal(t, c.Size(), off)
	var data int64
	require.NoError(t, c.Extents(0, c.Size(), func(n int64, zero bool) {
		if !zero {
			data += n
		}
	}))
	require.EqualValues(t, 3*4096+5, data)
	require.ErrorContains(t, c.Status("test:even", 0, 1, nil), "was not asked for")
	require.NoError(t, c.Close())
	require.Eventually(t, func() bool { return dev.open.Load() == 0 }, 10*time.Second, time.Millisecond, "maps are closed")
}

func TestContextsAreBounded(t *testing.T) {
	r := dialRaw(t, start(t, &Server{Exports: one{&memory{b: make([]byte, 1<<20)}}}))
	require.Equal(t, protocol.NEGOTIATION_TYPE_REPLY_ACK, r.option(proto.OptStructuredReply, nil))
	q := binary.BigEndian.AppendUint32([]byte{0, 0, 0, 4, 'd', 'i', 's', 'k'}, maxContexts+1)
	for i := range maxContexts + 1 {
		q = append(q, 0, 0, 0, 1, byte('a'+i))
	}
	require.Equal(t, proto.RepErrTooBig, r.option(proto.OptSetMeta, q))
}
