package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
)

const retained2s = `
journal: {segment: 1MiB, reserve: 16MiB}
groups:
  web01:
    disks: {vda: {backing: %DIR/vda.raw}}
    retain: {every_write: 2s, tiers: {1s: 10m}}
`

// expiryWait is how long an expiry may take to come: it waits for a checkpoint, of which there is one every half a minute.
const expiryWait = 2 * time.Minute

// openDisks are files of a mount: a disk as of some points, by their LSNs, and what was written to it before each.
type openDisks struct {
	t       *testing.T
	files   map[uint64]*os.File
	pattern map[uint64]byte
}

// mountedDisks opens a disk as of the moments right after some writes, which are too close to each other for all of them to be the last of a slot.
func (d *served) mountedDisks(write func(pattern int), patterns ...byte) openDisks {
	o := openDisks{d.t, map[uint64]*os.File{}, map[uint64]byte{}}
	mnt := d.path("mounted")
	d.mount(mnt, "web01", mnt, "--kernel", "--idle", "1s")
	for _, p := range patterns {
		write(int(p))
		o.pattern[d.group("web01").Head] = p
	}
	for lsn := range o.pattern {
		f, err := os.Open(fmt.Sprintf("%s/at/lsn:%d/vda/disk.raw", mnt, lsn))
		require.NoError(d.t, err)
		d.t.Cleanup(func() { _ = f.Close() })
		o.files[lsn] = f
	}
	return o
}

// stillRead requires all of them to be read as they were, though nothing else keeps one of them at least, and closes them.
func (o openDisks) stillRead(kept []api.Kept) {
	o.t.Helper()
	alone := 0
	for lsn, f := range o.files {
		i := slices.IndexFunc(kept, func(k api.Kept) bool { return k.LSN == lsn })
		require.GreaterOrEqual(o.t, i, 0, "LSN %d is in use", lsn)
		if len(kept[i].Why) == 0 {
			alone++
		}
		b := make([]byte, 3<<20)
		_, err := f.ReadAt(b, 0)
		require.NoError(o.t, err)
		require.Equal(o.t, bytes.Repeat([]byte{o.pattern[lsn]}, len(b)), b, "LSN %d", lsn)
		require.NoError(o.t, f.Close())
	}
	require.Positive(o.t, alone)
}

// TestRetention: the window moves on by time, what the policy keeps beyond it can be viewed, what it does not is an error that names what is around it, and a
// policy that keeps less lets the rest go. What is mounted stays as it is meanwhile.
func TestRetention(t *testing.T) {
	need(t, "qemu-io")
	d := &served{t: t, dir: t.TempDir()}
	d.raw("vda.raw", 16<<20)
	d.configure(retained2s)
	d.start()
	wrote := map[uint64]int{} // what was written, by the LSN of its last record
	write := func(pattern int) {
		tool(t, "qemu-io", "-f", "raw", "-c", fmt.Sprintf("write -P %d 0 3M", pattern), "-c", "flush", d.uri("web01/vda"))
		wrote[d.group("web01").Head] = pattern
	}
	write(1)
	d.ok("mark", "web01", "first", "--pin")
	began := d.group("web01").Head
	open := d.mountedDisks(write, 51, 52, 53)
	for pattern := 2; pattern < 8; pattern++ {
		write(pattern)
		time.Sleep(700 * time.Millisecond) // slots of the tier
	}
	var g api.Group
	require.Eventually(t, func() bool {
		write(9)
		g = d.group("web01")
		return g.Horizon > began && g.KeptPoints >= 6 // the pinned one, those that are mounted, and some of the tier
	}, expiryWait, 20*time.Millisecond)
	require.EqualValues(t, 2, g.Promised)
	require.Empty(t, g.Problems)
	read := func(point string, pattern int) {
		t.Helper()
		tool(t, "qemu-io", "-r", "-f", "raw", "-c", fmt.Sprintf("read -P %d 0 3M", pattern), d.uri("web01/vda@"+point))
	}
	read("first", 1)
	var p api.Points
	require.NoError(t, json.Unmarshal([]byte(d.ok("points", "web01", "--json")), &p))
	require.GreaterOrEqual(t, len(p.Kept), 6)
	open.stillRead(p.Kept)
	first := slices.IndexFunc(p.Kept, func(k api.Kept) bool { return k.LSN == began })
	require.GreaterOrEqual(t, first, 0)
	require.Contains(t, p.Kept[first].Why, "pinned")
	p.Kept = p.Kept[first:] // what was written before it may be the last of its slot
	i := slices.IndexFunc(p.Kept[1:], func(k api.Kept) bool { return wrote[k.LSN] > 0 && slices.Contains(k.Why, "each 1s") })
	require.GreaterOrEqual(t, i, 0)
	tiered := p.Kept[1+i]
	for _, at := range []string{fmt.Sprintf("lsn:%d", tiered.LSN), tiered.Time.Format(time.RFC3339Nano), tiered.Until.Add(-1).Format(time.RFC3339Nano)} {
		tool(t, "qemu-io", "-r", "-f", "raw", "-c", fmt.Sprintf("read -P %d 0 3M", wrote[tiered.LSN]), d.uri("web01/vda@"+at))
	}
	require.Contains(t, d.ok("points", "web01"), "kept: each 1s")
	gone := uint64(0)
	for i := range len(p.Kept) - 1 {
		if p.Kept[i+1].LSN > p.Kept[i].LSN+1 {
			gone = p.Kept[i].LSN + 1
			break
		}
	}
	out, code := d.tidemark("restore", fmt.Sprintf("web01/vda@lsn:%d", gone), "--to", d.path("copy.raw"))
	require.NotZero(t, code)
	require.Contains(t, out, "the kept points around it, lsn:")

	require.Contains(t, d.ok("hold", "web01", "first", "--until", "90d"), "is held")
	require.WithinDuration(t, time.Now().Add(90*24*time.Hour), d.marker("first").Held, time.Hour)
	for _, args := range [][]string{{"hold", "web01", "first", "--until", "1d"}, {"delete", "web01", "first"}} {
		d.ok("unpin", "web01", "first")
		out, code = d.tidemark(args...)
		require.Equal(t, 9, code, out)
		require.Contains(t, out, "marker is held until")
		d.ok("pin", "web01", "first")
	}
	_, code = d.tidemark("hold", "web01", "first", "--until", "tomorrow")
	require.Equal(t, 2, code)
	d.ok("mark", "web01", "kept", "--hold", "2100-01-01")
	require.Equal(t, 2100, d.marker("kept").Held.Year())
	out = d.ok("retain", "web01")
	require.Contains(t, out, "for 2s; since")
	_, err := api.NewClient(d.path("api.sock")).Retention(t.Context(), "web01", url.Values{"markers": {"3"}})
	require.ErrorContains(t, err, "plan=true only")
	require.Contains(t, out, "pinned")
	_, code = d.tidemark("retain", "web01", "--every-write", "1h")
	require.Equal(t, 2, code)
	out, code = d.tidemark("retain", "web01", "--dry-run", "--every-write", "1h")
	require.NotZero(t, code)
	require.Contains(t, out, "the tier keeps nothing")
	var r api.Retention
	require.NoError(t, json.Unmarshal([]byte(d.ok("retain", "web01", "--dry-run", "--tier", "1h=2h", "--json")), &r))
	require.NotEmpty(t, r.Would.Gone)
	require.Positive(t, r.Would.Frees)
	require.True(t, slices.ContainsFunc(r.Would.Kept, func(k api.Kept) bool { return k.LSN == began }))
	require.NoError(t, json.Unmarshal([]byte(d.ok("retain", "web01", "--dry-run", "--tier", "none", "--json")), &r))
	require.Empty(t, r.Tiers)
	require.LessOrEqual(t, len(r.Would.Kept), 2, "what is pinned or held")
	_, code = d.tidemark("retain", "web01", "--dry-run", "--tier", "1h=2h", "--tier", "1h=3h")
	require.NotZero(t, code)
	require.NoError(t, json.Unmarshal([]byte(d.ok("points", "web01", "--json", "--label", "first")), &p))
	require.Len(t, p.Kept, 1)
	metrics := d.metrics()
	require.Contains(t, metrics, `tidemark_group_window_promised_seconds{group="web01"} 2`)
	require.Contains(t, metrics, `tidemark_group_kept_points{group="web01"}`)

	used := d.group("web01").JournalBytes
	d.configure(strings.ReplaceAll(retained2s, ", tiers: {1s: 10m}", ""))
	require.Contains(t, d.ok("reload"), "retention as configured")
	require.Eventually(t, func() bool { return d.group("web01").KeptPoints <= 2 && d.group("web01").JournalBytes < used }, expiryWait, 20*time.Millisecond)
	d.stop()
	d.start()
	read("first", 1)
	d.stop()
}
