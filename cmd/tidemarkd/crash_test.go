package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// kills is how often the daemon is killed; TIDEMARK_KILLS for more.
func kills(t *testing.T) int {
	t.Helper()
	s := os.Getenv("TIDEMARK_KILLS")
	if s == "" {
		return 8
	}
	n, err := strconv.Atoi(s)
	require.NoError(t, err)
	return n
}

// ledger is what a client knows of the blocks it writes: the newest version that was
// acknowledged, and the newest that was sent.
type ledger struct {
	mu          sync.Mutex
	acked, sent []uint32
}

const ledgerBlocks = 2048

func fillBlock(b []byte, block int64, version uint32) {
	binary.LittleEndian.PutUint64(b, uint64(block))
	binary.LittleEndian.PutUint32(b[8:], version)
	for i := 16; i < len(b); i += copy(b[i:], b[:min(i, len(b)-i)]) {
	}
	if version == 0 {
		clear(b)
	}
}

// load writes blocks of its own share until the connection breaks.
func (l *ledger) load(d *served, worker, workers int, rng *rand.Rand) {
	c := d.dial("web01/vda")
	defer func() { _ = c.Close() }()
	buf := make([]byte, 4096*4)
	for {
		n := 1 + rng.IntN(4)
		first := int64(worker + workers*4*rng.IntN(ledgerBlocks/workers/4))
		first -= first % 4
		first = (first/4/int64(workers)*int64(workers) + int64(worker)) * 4
		if first+int64(n) > ledgerBlocks {
			continue
		}
		l.mu.Lock()
		for i := range int64(n) {
			l.sent[first+i]++
			fillBlock(buf[i*4096:(i+1)*4096], first+i, l.sent[first+i])
		}
		l.mu.Unlock()
		if err := c.WriteAt(buf[:n*4096], first*4096, rng.IntN(50) == 0); err != nil {
			return
		}
		l.mu.Lock()
		for i := range int64(n) {
			l.acked[first+i] = l.sent[first+i]
		}
		l.mu.Unlock()
	}
}

// TestKillUnderLoad kills the daemon again and again while clients write:
// every acknowledged write is there (P2a), a block is never torn or anything
// that was not sent, and views at the markers taken on the way are what they were.
func TestKillUnderLoad(t *testing.T) {
	d := serve(t, ledgerBlocks*4096)
	l := &ledger{acked: make([]uint32, ledgerBlocks), sent: make([]uint32, ledgerBlocks)}
	rng := rand.New(rand.NewPCG(1, uint64(time.Now().UnixNano())))
	images := map[string][]byte{}
	for k := range kills(t) {
		var wg sync.WaitGroup
		const workers = 4
		for w := range workers {
			wrng := rand.New(rand.NewPCG(rng.Uint64(), uint64(w)))
			wg.Go(func() { l.load(d, w, workers, wrng) })
		}
		<-time.After(time.Duration(100+rng.IntN(900)) * time.Millisecond)
		d.kill()
		wg.Wait()
		d.start()
		images[fmt.Sprintf("kill-%d", k)] = l.check(d)
		d.ok("mark", "web01", fmt.Sprintf("kill-%d", k))
	}
	for label, want := range images {
		c := d.dial("web01/vda@" + label)
		got := make([]byte, len(want))
		require.NoError(t, c.ReadAt(got, 0))
		require.True(t, bytes.Equal(want, got), "the view at %s", label)
		require.NoError(t, c.Close())
	}
	require.Contains(t, d.ok("verify"), "no damage")
	d.stop()
	b, err := os.ReadFile(d.disk)
	require.NoError(t, err)
	require.True(t, bytes.Equal(images[fmt.Sprintf("kill-%d", kills(t)-1)], b), "the backing after a stop in order")
}

// check reads the live disk and compares it with the ledger, which then knows
// what is there.
func (l *ledger) check(d *served) []byte {
	d.t.Helper()
	c := d.dial("web01/vda")
	defer c.Close()
	img := make([]byte, ledgerBlocks*4096)
	require.NoError(d.t, c.ReadAt(img, 0))
	want := make([]byte, 4096)
	for b := range int64(ledgerBlocks) {
		got := img[b*4096 : (b+1)*4096]
		version := binary.LittleEndian.Uint32(got[8:])
		require.GreaterOrEqual(d.t, version, l.acked[b], "block %d lost an acknowledged write", b)
		require.LessOrEqual(d.t, version, l.sent[b], "block %d", b)
		fillBlock(want, b, version)
		require.True(d.t, bytes.Equal(want, got), "block %d is torn", b)
		l.acked[b], l.sent[b] = version, version
	}
	return img
}

// head asks the daemon for the group's newest LSN.
func (d *served) head() float64 {
	d.t.Helper()
	var p struct{ Head float64 }
	require.NoError(d.t, json.Unmarshal([]byte(d.ok("points", "web01", "--json")), &p))
	return p.Head
}

// TestQEMUGoesOnOverAKill has QEMU's own NBD client, told to reconnect, write
// while the daemon is killed and started: no request of it fails.
func TestQEMUGoesOnOverAKill(t *testing.T) {
	need(t, "qemu-io")
	d := serve(t, 64<<20)
	target := fmt.Sprintf(`json:{"driver":"raw","file":{"driver":"nbd","reconnect-delay":30,"export":"web01/vda","server":{"type":"unix","path":%q}}}`, d.sock())
	const writes = 600
	var script strings.Builder
	for i := range writes {
		fmt.Fprintf(&script, "write -P %d %dk 64k\n", i%250+1, i*64)
		if i%10 == 0 {
			script.WriteString("sleep 20\n") // so that the kills fall between
		}
	}
	script.WriteString("flush\nquit\n")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-io", target)
	cmd.Stdin = strings.NewReader(script.String())
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, cmd.Start())
	for _, head := range []float64{100, 300} {
		require.Eventually(t, func() bool { return d.head() >= head }, time.Minute, 5*time.Millisecond)
		d.kill()
		d.start()
	}
	require.NoError(t, cmd.Wait(), out.String())
	require.Equal(t, writes, strings.Count(out.String(), "wrote 65536/65536"), out.String())
	require.NotContains(t, out.String(), "failed")
	c := d.dial("web01/vda")
	defer c.Close()
	b := make([]byte, 64<<10)
	for i := range int64(writes) {
		require.NoError(t, c.ReadAt(b, i*(64<<10)))
		require.Equal(t, bytes.Repeat([]byte{byte(i%250 + 1)}, len(b)), b)
	}
}
