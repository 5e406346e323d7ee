package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/wan"
	"github.com/tidemark-cdp/tidemark/nbd/client"
	"github.com/tidemark-cdp/tidemark/replica/link"
)

// replicas measures replication. It takes root, as it makes network namespaces.
func (b *bench) replicas(rounds, seconds int, only string) (rows []string, err error) {
	for _, part := range []struct {
		name string
		run  func(int, int) ([]string, error)
	}{
		{"lag", b.lag}, {"cost for guests", b.cost}, {"latency", b.latency}, {"a long way", b.longWay}, {"catching up", b.catchUp},
		{"bytes", b.pgbench}, {"seeding", b.seeding}, {"failover", b.failover}, {"failback", b.failback},
	} {
		if only != "" && only != part.name {
			continue
		}
		got, err := part.run(rounds, seconds)
		if err != nil {
			return rows, fmt.Errorf("%s: %w", part.name, err)
		}
		for _, row := range got {
			fmt.Println(row)
		}
		rows = append(rows, got...)
	}
	return rows, nil
}

func (b *bench) lag(_, seconds int) ([]string, error) {
	h, err := b.shipped(nil, replicaDisk)
	defer h.close()
	if err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	var l load
	go func() {
		var err error
		l, err = h.fio(append(timed(seconds), "--iodepth=16", "--rate=50m")...)
		ended <- err
	}()
	var lags []float64
	for {
		select {
		case err := <-ended:
			if err != nil {
				return nil, err
			}
			slices.Sort(lags)
			return []string{fmt.Sprintf("| lag on a local link under %.0f MB/s of 4 KiB random writes, 99th percentile | %.0f ms (median %.0f ms) | 1 s | 100 ms |",
				l.rate()/1e6, 1000*lags[len(lags)*99/100], 1000*lags[len(lags)/2])}, nil
		case <-time.After(20 * time.Millisecond):
			r, err := h.replica()
			if err != nil {
				return nil, err
			}
			lags = append(lags, r.Lag)
		}
	}
}

// variant is one way of a comparison.
type variant struct {
	name  string
	alone bool
	sink  bool       // the replica keeps nothing
	slow  *wan.Shape // of the link
	stop  bool       // the replica
}

// measure runs a load once for each variant.
func (b *bench) measure(vs []variant, fio ...string) (map[string]load, error) {
	got := map[string]load{}
	for _, v := range vs {
		l, err := b.measureOne(v, fio...)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", v.name, err)
		}
		got[v.name] = l
	}
	return got, nil
}

func (b *bench) measureOne(v variant, fio ...string) (l load, err error) {
	var link *wan.Link
	if v.slow != nil {
		if link, err = wan.New("tmbench", wan.Shape{}); err != nil {
			return l, err
		}
		defer func() { err = errors.Join(err, link.Close()) }()
	}
	h, err := b.hosts(link, replicaDisk, v.alone || v.sink, nil)
	defer h.close()
	if err != nil {
		return l, err
	}
	if v.sink {
		s, err := h.toSink()
		if err != nil {
			return l, err
		}
		defer s.close()
	}
	if !v.alone {
		if err := h.level(30 * time.Second); err != nil {
			return l, err
		}
	}
	if v.stop {
		if err := h.signal(1, syscall.SIGSTOP); err != nil {
			return l, err
		}
	}
	if link != nil {
		link.Shape(*v.slow)
	}
	return h.fio(fio...)
}

// toSink has the group shipped to a replica that keeps nothing.
func (h *hosts) toSink() (*sink, error) {
	s, err := newSink(h.ends[1].path("sink"))
	if err != nil {
		return nil, err
	}
	t, err := s.Invite(link.Peer{MaySend: []string{"*"}}, time.Now().Add(time.Minute))
	if err == nil {
		_, err = h.ends[0].api.Join(h.b.ctx, api.JoinRequest{Address: s.addr, Token: t.String()})
	}
	conf := h.ends[0].path("conf.yaml")
	var text []byte
	if err == nil {
		text, err = os.ReadFile(conf)
	}
	if err == nil {
		err = os.WriteFile(conf, bytes.Replace(text, []byte("}}}}"), []byte("}}, replicas: [b]}}"), 1), 0o600)
	}
	if err == nil {
		_, err = h.ends[0].api.Reload(h.b.ctx)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (b *bench) cost(rounds, seconds int) (rows []string, err error) {
	all := map[string][]float64{}
	for range rounds {
		got, err := b.measure([]variant{{name: "without", alone: true}, {name: "sink", sink: true}, {name: "here"}}, append(timed(seconds), "--iodepth=32")...)
		if err != nil {
			return nil, err
		}
		for name, l := range got {
			all[name] = append(all[name], l.rate())
		}
	}
	without := median(all["without"])
	row := func(what, name, least, aim string) {
		rows = append(rows, fmt.Sprintf("| %s: throughput, against without | %.2f (%.0f, %.0f MB/s) | %s | %s |", what, median(all[name])/without, median(all[name])/1e6, without/1e6, least, aim))
	}
	row("a guest's writes with a replica whose disks and journal are another host's (one that keeps nothing)", "sink", "0.8", "0.95")
	row("… and with all of the replica on the same two processors and the same disk", "here", "", "")
	return rows, nil
}

func (b *bench) latency(rounds, seconds int) ([]string, error) {
	all := map[string][]float64{}
	for range 2*rounds + 1 { // what is at the edge of a distribution varies
		got, err := b.measure([]variant{{name: "without", alone: true}, {name: "stopped", stop: true}, {name: "slow", slow: &wan.Shape{Rate: 1_000_000}}},
			append(timed(seconds), "--iodepth=4", "--rate_iops=3000")...)
		if err != nil {
			return nil, err
		}
		for name, l := range got {
			all[name] = append(all[name], float64(l.p99)/1e3)
		}
	}
	row := func(what, name string) string {
		return fmt.Sprintf("| … and %s: 99th percentile of latency, at 3000 writes a second | %.2f × (%.0f, %.0f µs) | 1.1 × | 1.0 × |", what, median(all[name])/median(all["without"]), median(all[name]), median(all["without"]))
	}
	return []string{row("with the replica stopped", "stopped"), row("the link at 1 Mbit/s", "slow")}, nil
}

// longWay looks at how much of a link is used while there is much to send.
func (b *bench) longWay(_, seconds int) (rows []string, err error) {
	const rate = 200_000_000
	shape := wan.Shape{Rate: rate, Delay: 75 * time.Millisecond, Loss: 0.001}
	link, err := wan.New("tmbench", wan.Shape{})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, link.Close()) }()
	h, err := b.shipped(link, replicaDisk)
	defer h.close()
	if err != nil {
		return nil, err
	}
	h.kill(1)
	link.Shape(shape)
	if _, err := h.fio("--iodepth=16", "--bs=64k", "--refill_buffers", "--io_size="+strconv.Itoa((seconds+15)*rate/8)); err != nil {
		return nil, err
	}
	if err := h.start(1); err != nil {
		return nil, err
	}
	before, err := h.replica()
	if err != nil {
		return nil, err
	}
	if err := h.wait(30*time.Second, func() (bool, error) {
		r, err := h.replica()
		return r.Acked > before.Acked, err
	}); err != nil {
		return nil, err
	}
	time.Sleep(5 * time.Second)
	from, began := link.Carried(1), time.Now()
	time.Sleep(time.Duration(seconds) * time.Second)
	used := float64(link.Carried(1)-from) * 8 / time.Since(began).Seconds()
	return []string{fmt.Sprintf("| share of a shaped link used, 200 Mbit/s, 150 ms round trip, 0.1 %% loss | %.2f | 0.7 | 0.9 |", used/rate)}, nil
}

// catchUp measures an outage under the lag's load, and under a guest that
// writes as fast as it can: then the rate is that of the same processors.
func (b *bench) catchUp(_, seconds int) (rows []string, err error) {
	for _, o := range []struct {
		job string
		fio []string
	}{
		{"under the load of the first row", []string{"--iodepth=16", "--rate=50m"}},
		{"under all that a guest can write", []string{"--iodepth=32"}},
	} {
		rate, written, err := b.outage(append(timed(seconds), o.fio...)...)
		if err != nil {
			return rows, fmt.Errorf("%s: %w", o.job, err)
		}
		rows = append(rows, fmt.Sprintf("| catching up after an outage %s, against the rate at which it was written | %.1f × (%.0f, %.0f MB/s) | 2 × | limit of link or disk |",
			o.job, rate/written, rate/1e6, written/1e6))
	}
	return rows, nil
}

// outage has the load written while the replica is gone, and gives the
// rates, in bytes a second, at which it caught up and the load was written.
func (b *bench) outage(fio ...string) (rate, written float64, err error) {
	h, err := b.shipped(nil, replicaDisk)
	defer h.close()
	if err != nil {
		return 0, 0, err
	}
	h.kill(1)
	l, err := h.fio(fio...)
	if err != nil {
		return 0, 0, err
	}
	// What the writer does behind the guest's back is another host's.
	if err := h.wait(5*time.Minute, func() (bool, error) {
		g, err := h.group(0)
		return g.Unapplied == 0, err
	}); err != nil {
		return 0, 0, err
	}
	if err := h.start(1); err != nil {
		return 0, 0, err
	}
	was, err := h.replica()
	if err != nil {
		return 0, 0, err
	}
	if err := h.wait(time.Minute, func() (bool, error) {
		r, err := h.replica()
		return r.Acked > was.Acked, err
	}); err != nil {
		return 0, 0, err
	}
	began := time.Now()
	if err := h.level(10 * time.Minute); err != nil {
		return 0, 0, err
	}
	return float64(l.bytes) / time.Since(began).Seconds(), l.rate(), nil
}

func (b *bench) pgbench(_, seconds int) (rows []string, err error) {
	h, err := b.shipped(nil, 2<<30)
	defer h.close()
	if err != nil {
		return nil, err
	}
	db, err := b.database(h.uri(0, "g/d"))
	defer func() { err = errors.Join(err, db.close()) }()
	if err == nil {
		err = h.level(time.Minute)
	}
	if err != nil {
		return nil, err
	}
	was, err := h.replica()
	if err != nil {
		return nil, err
	}
	wrote, err := db.pgbench(3 * seconds)
	if err == nil {
		err = h.level(time.Minute)
	}
	if err != nil {
		return nil, err
	}
	r, err := h.replica()
	if err != nil {
		return nil, err
	}
	sent := r.SentBytes - was.SentBytes
	return []string{fmt.Sprintf("| bytes sent per guest byte, pgbench for %d s | %.2f (%d of %d MB) | 0.5 | 0.2 |", 3*seconds, float64(sent)/float64(wrote), sent>>20, wrote>>20)}, nil
}

// seeding sends a disk to a replica that has a copy of it, of which a hundredth differs, and to one that has nothing.
func (b *bench) seeding(_, _ int) (rows []string, err error) {
	shape := wan.Shape{Rate: 200_000_000, Delay: 5 * time.Millisecond}
	var took [2]time.Duration
	for i, seeded := range []bool{false, true} {
		if took[i], err = b.seedOnce(shape, seeded); err != nil {
			return nil, err
		}
	}
	return []string{fmt.Sprintf("| seeding a 4 GiB disk that the replica has pre-seeded, 1 %% different, over 200 Mbit/s, against sending it | %.0f × (%.1f, %.0f s) | 10 × faster | 30 × |",
		took[0].Seconds()/took[1].Seconds(), took[1].Seconds(), took[0].Seconds())}, nil
}

func (b *bench) seedOnce(shape wan.Shape, seeded bool) (took time.Duration, err error) {
	link, err := wan.New("tmbench", shape)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, link.Close()) }()
	var began time.Time
	h, err := b.hosts(link, replicaDisk, false, func(h *hosts) error {
		defer func() { began = time.Now() }()
		if err := b.prefill(replicaDisk); err != nil {
			return err
		}
		disk := h.ends[0].path("disk.raw")
		if err := os.Rename(b.disk, disk); err != nil || !seeded {
			return err
		}
		return copyAnd(disk, filepath.Join(h.ends[1].path("state"), "replicas/g/d.raw"), 100)
	})
	defer h.close()
	if err != nil {
		return 0, err
	}
	err = h.level(20 * time.Minute)
	return time.Since(began), err
}

// copyAnd copies a file, and makes one in so many of its blocks another.
func copyAnd(from, to string, in int64) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	if err := tools("cp --sparse=never " + from + " " + to); err != nil {
		return err
	}
	f, err := os.OpenFile(to, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	block := make([]byte, 4096)
	for n := range replicaDisk / 4096 / in {
		block[0] = byte(n)
		if _, err := f.WriteAt(block, rand.Int64N(replicaDisk/4096)*4096); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

func (b *bench) failover(rounds, _ int) ([]string, error) {
	var took []float64
	for range max(rounds, 5) {
		t, err := b.failoverOnce()
		if err != nil {
			return nil, err
		}
		took = append(took, t.Seconds())
	}
	return []string{fmt.Sprintf("| failover: command to first write served | %.0f ms | 2 s | 0.3 s |", 1000*median(took))}, nil
}

func (b *bench) failoverOnce() (took time.Duration, err error) {
	h, err := b.shipped(nil, replicaDisk)
	defer h.close()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := h.fioUntil(ctx, append(timed(60), "--iodepth=16", "--rate=50m")...)
		ended <- err
	}()
	time.Sleep(3 * time.Second)
	h.kill(0) // the guest goes with its host
	cancel()
	began := time.Now()
	cmd := exec.Command("bin/tidemark", "failover", "g")
	cmd.Env = append(os.Environ(), "TIDEMARK_API=unix:"+h.ends[1].path("api.sock"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("failover: %w: %s", err, out)
	}
	c, err := client.Dial(b.ctx, "unix", h.ends[1].path("nbd.sock"), "g/d", nil)
	if err != nil {
		return 0, err
	}
	err = errors.Join(c.WriteAt(make([]byte, 4096), 0, false), c.Flush())
	took = time.Since(began)
	<-ended // its errors are the killed host's
	return took, errors.Join(err, c.Close())
}

// failback has the old writer, which wrote a GiB that nobody else has, follow the new one.
func (b *bench) failback(_, _ int) ([]string, error) {
	h, err := b.shipped(nil, replicaDisk)
	defer h.close()
	if err != nil {
		return nil, err
	}
	h.kill(1)
	if _, err := h.fio("--iodepth=32", "--bs=64k", "--refill_buffers", "--io_size=1G"); err != nil {
		return nil, err
	}
	theirs, err := sums(b.ctx, h, 0)
	if err != nil {
		return nil, err
	}
	if err := h.signal(0, syscall.SIGSTOP); err != nil {
		return nil, err
	}
	if err := h.start(1); err != nil {
		return nil, err
	}
	if _, err := h.ends[1].api.Failover(b.ctx, "g", api.FailoverRequest{}); err != nil {
		return nil, err
	}
	h.ends[0], h.ends[1] = h.ends[1], h.ends[0] // fio writes to the first
	if _, err := h.fio("--iodepth=32", "--bs=64k", "--refill_buffers", "--io_size=256M"); err != nil {
		return nil, err
	}
	ours, err := sums(b.ctx, h, 0)
	if err != nil {
		return nil, err
	}
	differs := int64(0)
	for i := range ours {
		if ours[i] != theirs[i] {
			differs += 4096
		}
	}
	began := time.Now()
	if err := h.signal(1, syscall.SIGCONT); err != nil {
		return nil, err
	}
	if err := h.level(10 * time.Minute); err != nil {
		return nil, err
	}
	took := time.Since(began)
	r, err := h.replica()
	if err != nil {
		return nil, err
	}
	return []string{fmt.Sprintf("| failback after 1 GiB of divergence, and 256 MiB of the new writer's: bytes moved | %.2f × what differs (%d of %d MB, %.1f s) | 1.2 × | 1.0 × |",
		float64(r.SentBytes)/float64(differs), r.SentBytes>>20, differs>>20, took.Seconds())}, nil
}

// sums are of the blocks of the group's disk.
func sums(ctx context.Context, h *hosts, i int) (all []uint64, err error) {
	c, err := client.Dial(ctx, "unix", h.ends[i].path("nbd.sock"), "g/d", nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < h.size; off += int64(len(buf)) {
		if err := c.ReadAt(buf, off); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		for b := buf; len(b) > 0; b = b[4096:] {
			all = append(all, maphash.Bytes(sumSeed, b[:4096]))
		}
	}
	return all, nil
}

var sumSeed = maphash.MakeSeed()

func replicasPage(rows []string, rounds, seconds int) string {
	return replicasHead + fmt.Sprintf(`
Made by `+"`make bench-replica`"+` on %s: %s. Writer, replica, fio and, where there is one, the link share these processors. %d rounds of %d s where rounds are compared, medians. The disk has 4 GiB, and is written at random. A local link is the loopback; the others
are made by cmd/internal/wan, which carries packets between two network namespaces.

| job | Tidemark | at least | aim |
|---|---|---|---|
%s
`, time.Now().UTC().Format("2006-01-02"), machine(), rounds, seconds, strings.Join(rows, "\n"))
}
