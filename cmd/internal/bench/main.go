// Command bench compares Tidemark with qemu-nbd and nbdkit in one run: the same
// jobs on the same 4 GiB disk, in turn and repeated, over unix sockets. It prints ratios
// of medians and writes the table to a file, with the machine it ran on.
//
// It promises nothing about absolute times, which are the machine's. The disk
// is written through beforehand with random bytes, past Tidemark, so that every first overwrite costs
// Tidemark an original, as on a disk that was there before. It takes root's rights on nothing, but fio,
// qemu-nbd, nbdkit and nbdcopy on the path (make deps), and some 40 GiB of disk.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// job is a row of the table.
type job struct {
	name    string
	peers   []string // to compare with; the best of them counts
	atLeast float64
	aim     float64
	run     func(b *bench, s *server) (float64, error) // larger is better
}

func fioJob(rw, bs string, depth int, seconds int, extra ...string) func(*bench, *server) (float64, error) {
	return func(b *bench, s *server) (float64, error) { return b.fio(s.uri, rw, bs, depth, seconds, extra...) }
}

func jobs(minute int) []job {
	q := []string{"qemu-nbd"}
	both := []string{"qemu-nbd", "nbdkit"}
	short := max(minute/6, 3)
	return []job{
		{"4 KiB random write, depth 32", q, 2, 4, fioJob("randwrite", "4k", 32, minute)},
		{"4 KiB random write, depth 1", q, 3, 6, fioJob("randwrite", "4k", 1, short)},
		{"4 KiB random write, a flush after each", q, 1, 1.5, func(b *bench, s *server) (float64, error) { return b.flushes(s, short) }},
		{"64 KiB sequential write, depth 16", q, 0.6, 0.9, fioJob("write", "64k", 16, 0)},
		{"1 MiB sequential write, depth 8, with the final flush", q, 0.6, 0.9, fioJob("write", "1m", 8, 0, "--end_fsync=1")},
		{"4 KiB random read, depth 32", both, 1, 1.3, fioJob("randread", "4k", 32, short)},
		{"1 MiB sequential read, depth 8", both, 0.9, 1.1, fioJob("read", "1m", 8, 0)},
	}
}

func main() {
	out := flag.String("out", "", "file to write the table to")
	dir := flag.String("dir", "", "scratch directory (default: a temporary one)")
	rounds := flag.Int("rounds", 3, "how often each job is run")
	minute := flag.Int("minute", 60, "seconds of the long job; others take a sixth")
	markers := flag.Bool("markers", false, "the figures of markers only")
	back := flag.Bool("back", false, "the figures of getting things back only")
	replica := flag.Bool("replica", false, "the figures of replication only")
	history := flag.Bool("history", false, "the figures of history only")
	only := flag.String("only", "", "with -replica or -history: that part only")
	isolated := flag.Bool("isolated", true, "with -back: also those that take a VM of libguestfs")
	overwrites := flag.Int("overwrites", 1_000_000, "random overwrites behind the view")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, options{*dir, *out, *markers, *back, *replica, *history, *isolated, *only, *rounds, *minute, *overwrites}); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	dir, out                   string
	markers, back              bool
	replica, history, isolated bool
	only                       string
	rounds, minute, overwrites int
}

func run(ctx context.Context, o options) error {
	dir, out, rounds, minute, overwrites := o.dir, o.out, o.rounds, o.minute, o.overwrites
	if dir == "" {
		tmp, err := os.MkdirTemp("", "tidemark-bench")
		if err != nil {
			return err
		}
		defer os.RemoveAll(tmp)
		dir = tmp
	}
	b := &bench{ctx: ctx, dir: dir, disk: filepath.Join(dir, "disk.raw")}
	if o.back {
		rows, err := b.back(rounds, o.isolated)
		if err != nil {
			return fmt.Errorf("getting things back: %w", err)
		}
		wide, err := b.wide(rounds)
		if err != nil {
			return fmt.Errorf("a wide disk: %w", err)
		}
		fmt.Println(wide)
		return write(out, backHead, backPage(append(rows, wide), rounds))
	}
	if o.replica {
		seconds := max(minute/6, 5)
		rows, err := b.replicas(rounds, seconds, o.only)
		if err != nil {
			return fmt.Errorf("replication: %w", err)
		}
		return write(out, replicasHead, replicasPage(rows, rounds, seconds))
	}
	if o.history {
		rows, err := b.history(rounds, max(minute/6, 5), o.only)
		if err != nil {
			return fmt.Errorf("history: %w", err)
		}
		return write(out, historyHead, historyPage(rows, rounds))
	}
	if o.markers {
		rows, err := b.markers(rounds, max(minute/6, 1))
		if err != nil {
			return fmt.Errorf("markers: %w", err)
		}
		return write(out, markersHead, markersPage(rows, rounds))
	}
	if err := b.prefill(4 << 30); err != nil {
		return err
	}
	var rows []string
	add := func(format string, args ...any) {
		row := fmt.Sprintf(format, args...)
		fmt.Println(row)
		rows = append(rows, row)
	}
	add("| job | Tidemark | qemu-nbd | nbdkit | ratio | at least | aim |")
	add("|---|---|---|---|---|---|---|")
	for _, j := range jobs(minute) {
		med, err := b.compare(j, rounds)
		if err != nil {
			return fmt.Errorf("%s: %w", j.name, err)
		}
		best := 0.0
		for _, p := range j.peers {
			best = max(best, med[p])
		}
		add("| %s | %s | %s | %s | %.2f | %g | %g |", j.name, num(med["tidemark"]), num(med["qemu-nbd"]), num(med["nbdkit"]), med["tidemark"]/best, j.atLeast, j.aim)
	}
	add("| memory, resident at most under the first job | %d MiB | | | | 600 MiB | 300 MiB |", b.rss>>20)
	extra, err := b.views(overwrites, rounds)
	if err != nil {
		return fmt.Errorf("views: %w", err)
	}
	for _, r := range extra {
		add("%s", r)
	}
	return write(out, mainHead, page(rows, rounds, minute, overwrites))
}

// The parts of the page in their order, each made by a run of its own.
const (
	mainHead    = "# Benchmarks\n"
	markersHead = "## Markers\n"
	backHead    = "## Getting it back\n"

	replicasHead = "## Replication\n"
	historyHead  = "## History\n"
)

// write puts a part in the place of what the page has of it.
func write(out, head, part string) error {
	if out == "" {
		return nil
	}
	page, err := os.ReadFile(out)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	heads := []string{mainHead, markersHead, backHead, replicasHead, historyHead}
	parts := make([]string, len(heads))
	rest := string(page)
	for i := len(heads) - 1; i >= 0; i-- {
		if at := strings.Index(rest, heads[i]); at >= 0 {
			rest, parts[i] = rest[:at], rest[at:]
		}
		if heads[i] == head {
			parts[i] = part
		}
	}
	var text []string
	for _, p := range parts {
		if p != "" {
			text = append(text, strings.TrimSpace(p)+"\n")
		}
	}
	return os.WriteFile(out, []byte(strings.Join(text, "\n")), 0o644)
}

func backPage(rows []string, rounds int) string {
	return backHead + fmt.Sprintf(`
Made by `+"`make bench-back`"+` on %s: %s. %d rounds, medians; each from a cold cache, and with memory that the host, where there is one, has not taken back. The disks have an ext4 with random bytes: 1 GiB in large files, 20,000 files of 4 KiB, the rest in files of
256 MiB. After the point 2 GiB were written over the disk at random, 64 KiB each, and are applied: a quarter of what the point shows comes from the journal's originals. Files are copied with `+"`cp -r`"+` to memory. The time of the
isolated ways does not include the start of the VM, on either side.

| job | against | Tidemark | the other | ratio | at least | aim |
|---|---|---|---|---|---|---|
%s
`, time.Now().UTC().Format("2006-01-02"), machine(), rounds, strings.Join(rows, "\n"))
}

func markersPage(rows []string, rounds int) string {
	return markersHead + fmt.Sprintf(`
Made by `+"`make bench-markers`"+` on %s: %s. %d rounds. Each disk is written at random, 4 KiB, 8 requests in flight. The guest agent is one that
stops the writers and flushes the disk, as a freeze does, and answers at once, so that what is left is Tidemark's own: from the agent's answer that it is frozen, over the record that is durable and the question whether it is still frozen, to its
answer that it is thawed. What a real guest's freeze and thaw take comes on top: in a Debian guest under software emulation it is about a second. In the first table a
marker comes every 100 ms.

%s
`, time.Now().UTC().Format("2006-01-02"), machine(), rounds, strings.Join(rows, "\n"))
}

func num(v float64) string {
	if v == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f", v)
}

// compare runs a job on every server in turn, so that a machine that drifts drifts for all.
func (b *bench) compare(j job, rounds int) (map[string]float64, error) {
	all := map[string][]float64{}
	for range rounds {
		for _, name := range append([]string{"tidemark"}, j.peers...) {
			s, err := b.start(name)
			if err != nil {
				return nil, err
			}
			v, err := j.run(b, s)
			if name == "tidemark" {
				b.rss = max(b.rss, s.rss())
			}
			if serr := s.stop(); err == nil {
				err = serr
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			all[name] = append(all[name], v)
		}
	}
	med := map[string]float64{}
	for name, vs := range all {
		med[name] = median(vs)
	}
	return med, nil
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

func page(rows []string, rounds, minute, overwrites int) string {
	return fmt.Sprintf(`# Benchmarks

Made by `+"`make bench`"+` on %s: %s. %d rounds, the long job %d s, %d random overwrites behind the view.
Figures are medians in requests a second, or as the row says; ratios are what compares, absolute figures are the machine's.

What is compared: Tidemark journals every write and keeps every version; qemu-nbd (`+"`-f raw --cache=writeback`"+`) and
nbdkit (file plugin) protect nothing. All serve the same 4 GiB raw disk, filled with random bytes beforehand past Tidemark, over a unix
socket. Views are read when what was written is applied: the live disk then is the backing alone. Each run of Tidemark begins with an empty journal, so that each first overwrite of a block costs it an original. The sequential
writes go over the disk once: on a machine with 16 GiB of memory or more they fit what Tidemark lets its backing be behind before it catches up. A stream that is longer goes at the pace of three writes (journal,
original, backing) for one.

The first row is the disk's as much as the servers': qemu-nbd writes at random through the page cache, and falls to a third once the disk does not
take in what the cache must give up. Where it does, and in shorter runs (-minute 30), the ratio is lower: 1.3 to 1.8 has been seen on the same machine.

%s
`, time.Now().UTC().Format("2006-01-02"), machine(), rounds, minute, overwrites, strings.Join(rows, "\n"))
}
