package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/nbd/client"
)

// soakFor is how long TestSoak goes on; SOAK for longer, see make soak.
func soakFor(t *testing.T) time.Duration {
	t.Helper()
	s := os.Getenv("SOAK")
	if s == "" {
		return 30 * time.Second
	}
	d, err := time.ParseDuration(s)
	require.NoError(t, err)
	return d
}

const (
	soakBlocks = 2 << 10 // of a disk
	soakPace   = 3 * time.Millisecond
	soakPages  = 64
)

// soakDisk is what is known of a disk that one writer writes, one request after the other, numbered from 1 on: what it holds behind each of them.
type soakDisk struct {
	name string
	id   byte

	mu       sync.Mutex
	versions [soakBlocks][]uint32 // of each block: the requests that it was written by; trims have soakTrim
	requests uint32               // that were sent
	acked    uint32               // what was answered; the next one may have been taken too
}

const soakTrim = 1 << 31

// soakPage is what blocks begin as: text, of which each request changes some bytes.
var soakPage = sync.OnceValue(func() *[soakPages][4096]byte {
	pages := new([soakPages][4096]byte)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range pages {
		for at := 0; at < len(pages[i])-40; at += 64 {
			copy(pages[i][at:], fmt.Sprintf("%d|%x|row of a table", rng.Uint32(), rng.Uint32()))
		}
	}
	return pages
})

// fill makes b the block that a request writes.
func (d *soakDisk) fill(b []byte, block int64, request uint32) {
	pages := soakPage()
	copy(b, pages[block%soakPages][:])
	rng := rand.NewPCG(uint64(request)<<8|uint64(d.id), uint64(block))
	n := 8
	if block%16 == 0 {
		n = 512 // nothing like what was there
	}
	for range n {
		r := rng.Uint64()
		binary.LittleEndian.PutUint64(b[16+(r>>32)%4000/8*8:], r)
	}
	binary.LittleEndian.PutUint64(b, uint64(block)<<8|uint64(d.id))
	binary.LittleEndian.PutUint32(b[8:], request)
}

// begin notes a request before it is sent.
func (d *soakDisk) begin(first, n int64, trim bool) (request uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.requests++
	request = d.requests
	for block := first; block < first+n; block++ {
		v := request
		if trim {
			v |= soakTrim
		}
		d.versions[block] = append(d.versions[block], v)
	}
	return request
}

func (d *soakDisk) answered() (acked, sent uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.acked, d.requests
}

// load writes as a guest does until ctx ends: mostly where it wrote before, in pieces of many lengths, with trims and flushes. A request that a kill cut off is sent again.
func (d *soakDisk) load(ctx context.Context, s *served, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, uint64(d.id)))
	var c *client.Client
	defer func() {
		if c != nil {
			_ = c.Close()
		}
	}()
	buf := make([]byte, 32*4096)
	for ctx.Err() == nil {
		n := int64(1 + rng.IntN(4))
		trim := false
		switch rng.IntN(20) {
		case 0:
			n = 32
		case 1:
			trim, n = true, 1+rng.Int64N(64)
		}
		first := rng.Int64N(soakBlocks - n)
		if rng.IntN(4) > 0 {
			first = rng.Int64N(soakBlocks/32) * 8 % (soakBlocks - n)
		}
		request := d.begin(first, n, trim)
		for i := range n {
			if !trim {
				d.fill(buf[i*4096:(i+1)*4096], first+i, request)
			}
		}
		for {
			err := error(nil)
			if c == nil {
				c, err = client.Dial(ctx, "unix", s.sock(), d.name, nil)
			}
			if err == nil && trim {
				err = c.Trim(first*4096, uint32(n*4096))
			} else if err == nil {
				err = c.WriteAt(buf[:n*4096], first*4096, false)
			}
			if err == nil && rng.IntN(30) == 0 {
				err = c.Flush()
			}
			if err == nil {
				break
			}
			if c != nil {
				_, c = c.Close(), nil
			}
			if ctx.Err() != nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		d.mu.Lock()
		d.acked = request
		d.mu.Unlock()
		time.Sleep(time.Duration(rng.ExpFloat64() * float64(soakPace)))
	}
}

// at is the newest version of a block that requests up to one made; 0: none, or zeroes.
func (d *soakDisk) at(block int64, request uint32) uint32 {
	all := d.versions[block]
	i, _ := slices.BinarySearchFunc(all, request+1, func(v, r uint32) int { return cmp.Compare(v&^soakTrim, r) })
	if i == 0 || all[i-1]&soakTrim != 0 {
		return 0
	}
	return all[i-1]
}

// check reads a disk as of a point. It returns the first request after which the disk was exactly that, and the first such one that is not before least: there must be
// one that is not after most.
func (d *soakDisk) check(s *served, point string, least, most uint32) (first, request uint32) {
	s.t.Helper()
	image := imageOf(s.t, s, d.name+point, soakBlocks*4096)
	d.mu.Lock()
	defer d.mu.Unlock()
	var has [soakBlocks]uint32
	want, zero := make([]byte, 4096), make([]byte, 4096)
	newest := uint32(0)
	for block := range int64(soakBlocks) {
		b := image[block*4096:][:4096]
		if bytes.Equal(b, zero) {
			continue
		}
		has[block] = binary.LittleEndian.Uint32(b[8:])
		d.fill(want, block, has[block])
		require.True(s.t, bytes.Equal(want, b), "block %d of %s%s is nothing that was written there: request %d", block, d.name, point, has[block])
		newest = max(newest, has[block])
	}
	from := func(request uint32) uint32 {
		for {
			bad := slices.IndexFunc(d.blocks(), func(block int64) bool { return d.at(block, request) != has[block] })
			if bad < 0 {
				return request
			}
			if request >= most {
				require.Failf(s.t, "a mix", "%s%s has request %d as the newest, and block %d is of request %d", d.name, point, newest, bad, has[bad])
			}
			request++ // what trims made zeroes says nothing of itself, nor of writes that it was made of
		}
	}
	require.LessOrEqual(s.t, newest, most, "%s%s", d.name, point)
	return from(newest), from(max(newest, least))
}

// blocks are the disk's.
func (d *soakDisk) blocks() []int64 {
	all := make([]int64, soakBlocks)
	for i := range all {
		all[i] = int64(i)
	}
	return all
}

// soakMark is a marker, and between which requests of each disk it was taken.
type soakMark struct {
	label       string
	least, most [2]uint32
}

type soak struct {
	t     *testing.T
	a, b  *served
	disks [2]*soakDisk
	marks []soakMark
	rng   *rand.Rand
	did   map[string]int
	due   []int // what is to be done next

	listen string // the replica's address
	// shown is what was seen of a disk at an LSN, at either daemon: it is that for ever.
	shown map[soakShown]uint32
}

type soakShown struct {
	disk byte
	lsn  uint64
}

// look checks a disk as of an LSN.
func (s *soak) look(d *served, disk *soakDisk, lsn uint64, least, most uint32) uint32 {
	s.t.Helper()
	first, request := disk.check(d, fmt.Sprintf("@lsn:%d", lsn), least, most)
	key := soakShown{disk.id, lsn}
	if was, seen := s.shown[key]; seen {
		require.Equal(s.t, was, first, "%s at LSN %d is another one than before", disk.name, lsn)
		s.did["seen again"]++
	}
	s.shown[key] = first
	return request
}

// soakConf is what both daemons have, and soakScrub beside the load.
const (
	soakConf  = "journal: {segment: 2MiB, reserve: 16MiB}\ncompact: {after: 1s, rate: 64MiB}\n"
	soakScrub = "scrub: {every: 10s, rate: 64MiB}\n"
)

// TestSoak has guests' load, markers, retention with compaction and verification, and a replica with a policy of its own at work for long, kills either daemon again and again, has the
// replica away at times, and reads all the while. In the end every point that either keeps is what it was.
func TestSoak(t *testing.T) {
	long := soakFor(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	s := &soak{t: t, rng: rand.New(rand.NewPCG(seed, 5)), did: map[string]int{}, shown: map[soakShown]uint32{}}
	s.a, s.b = &served{t: t, dir: t.TempDir()}, &served{t: t, dir: t.TempDir()}
	s.begin()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	for i, d := range s.disks {
		seed := s.rng.Uint64() + uint64(i)
		wg.Go(func() { d.load(ctx, s.a, seed) })
	}
	for end := time.Now().Add(long); time.Now().Before(end) && !t.Failed(); {
		time.Sleep(time.Duration(s.rng.Int64N(int64(time.Second))))
		s.step(long)
	}
	cancel()
	wg.Wait()
	s.a.ok("mark", "web01", "end", "--wait-replica=120s")
	var sent [2]uint32
	for i, d := range s.disks {
		_, sent[i] = d.answered()
	}
	t.Logf("the load is over: %v", s.did)
	for _, d := range []*served{s.a, s.b} {
		g := d.group("web01")
		require.Zero(t, g.Scrub.Damaged)
		// What was damaged may have been mended since: nothing was to be.
		log, err := os.ReadFile(d.path("log"))
		require.NoError(t, err)
		require.NotContains(t, string(log), "\tdamage\t")
		require.NotContains(t, string(log), "was written again")
		if long >= 10*time.Minute {
			require.Positive(t, g.KeptPoints, "nothing expired beside the load")
			require.Contains(t, string(log), "verified the group")
		}
		d.kill()
	}
	s.configure("scrub: {every: 0s}\n") // verification would have half of the daemons' time, and there is much to read
	s.b.start()
	s.a.start()
	atWriter, atReplica := s.all(s.a), s.all(s.b)
	for _, what := range []string{"writer killed", "replica killed", "both killed", "replica away", "marker", "read", "read at the replica", "seen again"} {
		require.Positive(t, s.did[what], "%s: %v", what, s.did)
	}
	t.Logf("%v; %d and %d requests; writer: %s; replica: %s", s.did, sent[0], sent[1], atWriter, atReplica)
	s.a.kill()
	s.a.start()
	s.all(s.a)
	t.Log("compared")
	for _, d := range []*served{s.a, s.b} {
		require.Contains(t, d.ok("verify", "web01"), "no damage")
		require.Eventually(t, func() bool {
			g := d.group("web01")
			return g.Horizon > 0 && g.KeptPoints > 0 && g.Bytes.Saved > 0
		}, expiryWait, time.Second, "nothing expired, was kept, or became compact")
	}
}

// configure writes what both daemons have from their next start on, with a policy each.
func (s *soak) configure(scrub string) {
	s.b.configure(soakConf + scrub + fmt.Sprintf("replication: {listen: 'tcp:%s', name: hostb}\ngroups: {web01: {received: true, retain: {every_write: 15s, tiers: {5s: 1h}}, disks: {d0: {backing: %%DIR/d0.raw}, d1: {backing: %%DIR/d1.raw}}}}\n", s.listen))
	s.a.configure(soakConf + scrub + "replication: {name: hosta}\ngroups: {web01: {disks: {d0: {backing: %DIR/d0.raw}, d1: {backing: %DIR/d1.raw}}, replicas: [hostb], retain: {every_write: 8s, tiers: {1s: 20s, 10s: 2h}, markers: 20}}}\n")
}

// begin starts both daemons.
func (s *soak) begin() {
	s.listen = freePort(s.t)
	s.configure(soakScrub)
	for i := range s.disks {
		s.disks[i] = &soakDisk{name: fmt.Sprintf("web01/d%d", i), id: byte(i)}
		for _, d := range []*served{s.a, s.b} {
			d.raw(fmt.Sprintf("d%d.raw", i), soakBlocks*4096)
		}
	}
	s.b.start()
	token, _, _ := bytes.Cut([]byte(s.b.ok("replica", "invite")), []byte("\n"))
	s.a.start()
	s.a.ok("replica", "join", s.listen, string(token))
	s.a.streams()
}

// step does something to either daemon.
func (s *soak) step(long time.Duration) {
	if len(s.due) == 0 {
		s.due = s.rng.Perm(12) // each comes up
		// A daemon that never lives for longer than from one checkpoint to the next has nothing expire.
		time.Sleep(min(40*time.Second, long/20))
	}
	what, now := "", s.due[0]
	s.due = s.due[1:]
	switch now {
	case 0:
		what = "writer killed"
		s.a.kill()
		s.a.start()
	case 1:
		what = "replica killed"
		s.b.kill()
		s.b.start()
	case 2:
		what = "replica away"
		s.b.stop()
		time.Sleep(time.Duration(s.rng.Int64N(int64(8 * time.Second))))
		s.b.start()
	case 3, 4, 5, 6:
		what = "marker"
		m := soakMark{label: fmt.Sprintf("m%d", len(s.marks))}
		args := []string{"mark", "web01", m.label}
		if s.rng.IntN(8) == 0 {
			args = append(args, "--pin")
		}
		for i, d := range s.disks {
			m.least[i], _ = d.answered()
		}
		s.a.ok(args...)
		for i, d := range s.disks {
			_, m.most[i] = d.answered()
		}
		s.marks = append(s.marks, m)
	case 7, 8:
		what = "read"
		s.some(s.a)
	case 9, 10:
		what = "read at the replica"
		s.some(s.b)
	default:
		what = "both killed"
		s.a.kill()
		s.b.kill()
		s.b.start()
		s.a.start()
	}
	s.did[what]++
}

// hold opens a disk as of a point, so that it stays; nil if the point has gone since it was listed, as it may.
func (s *soak) hold(d *served, disk *soakDisk, lsn uint64) *client.Client {
	s.t.Helper()
	c, err := client.Dial(s.t.Context(), "unix", d.sock(), fmt.Sprintf("%s@lsn:%d", disk.name, lsn), nil)
	if err == nil {
		return c
	}
	p, perr := d.api().Points(s.t.Context(), "web01", api.Filter{})
	require.NoError(s.t, perr)
	require.False(s.t, lsn >= p.Horizon || slices.ContainsFunc(p.Kept, func(k api.Kept) bool { return k.LSN == lsn }), "%s at LSN %d is kept, and can not be opened: %v", disk.name, lsn, err)
	s.did["gone meanwhile"]++
	return nil
}

// some reads a point that can be viewed, of the window or beyond.
func (s *soak) some(d *served) {
	p, err := d.api().Points(s.t.Context(), "web01", api.Filter{})
	require.NoError(s.t, err)
	lsn := min(max(p.Horizon, 1)+s.rng.Uint64N(p.Head-p.Horizon+1), p.Head)
	if len(p.Kept) > 0 && s.rng.IntN(2) == 0 {
		lsn = p.Kept[s.rng.IntN(len(p.Kept))].LSN
	}
	disk := s.disks[s.rng.IntN(2)]
	if c := s.hold(d, disk, lsn); c != nil {
		_, sent := disk.answered()
		s.look(d, disk, lsn, 0, sent)
		require.NoError(s.t, c.Close())
	}
}

// all compares every kept point, and some of the window, at a daemon: each is what it was, and none is older than one of a lower LSN.
func (s *soak) all(d *served) string {
	s.t.Helper()
	p, err := d.api().Points(s.t.Context(), "web01", api.Filter{})
	require.NoError(s.t, err)
	var sent, last [2]uint32
	for i, disk := range s.disks {
		_, sent[i] = disk.answered()
	}
	var lsns []uint64
	for _, k := range p.Kept {
		lsns = append(lsns, k.LSN)
	}
	for range 5 {
		lsns = append(lsns, min(max(p.Horizon, 1)+s.rng.Uint64N(p.Head-p.Horizon+1), p.Head))
	}
	slices.Sort(lsns)
	for _, lsn := range slices.Compact(lsns) {
		for i, disk := range s.disks {
			if c := s.hold(d, disk, lsn); c != nil {
				last[i] = s.look(d, disk, lsn, last[i], sent[i])
				require.NoError(s.t, c.Close())
			}
		}
	}
	marks := 0
	for _, m := range p.Markers {
		j := slices.IndexFunc(s.marks, func(s soakMark) bool { return s.label == m.Label })
		if j < 0 {
			continue
		}
		for i, disk := range s.disks {
			if c := s.hold(d, disk, m.LSN); c != nil {
				s.look(d, disk, m.LSN, s.marks[j].least[i], s.marks[j].most[i])
				require.NoError(s.t, c.Close())
			}
		}
		marks++
	}
	for _, disk := range s.disks {
		acked, sent := disk.answered()
		disk.check(d, "", acked, sent)
	}
	return fmt.Sprintf("%d kept points, %d markers, horizon %d of %d", len(p.Kept), marks, p.Horizon, p.Head)
}
