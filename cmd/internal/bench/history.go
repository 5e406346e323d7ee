package main

import (
	"errors"
	"fmt"
	"io/fs"
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
	"github.com/tidemark-cdp/tidemark/nbd/client"
)

// history measures what history takes, and what becomes of it.
func (b *bench) history(rounds, seconds int, only string) (rows []string, err error) {
	for _, part := range []struct {
		name string
		run  func(int, int) ([]string, error)
	}{
		{"space", b.space}, {"database", b.databaseHistory}, {"alike", b.alike}, {"reading", b.reading}, {"cleaning", b.cleaning}, {"dropping", b.dropping}, {"many groups", b.manyGroups},
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

// lone is a daemon by itself.
type lone struct {
	b   *bench
	dir string
	cmd *exec.Cmd
	api *api.Client
}

// lone makes a directory for a daemon, and starts it with a configuration behind what all have.
func (b *bench) lone(conf string) (*lone, error) {
	l := &lone{b: b, dir: filepath.Join(b.dir, "lone")}
	if err := errors.Join(os.RemoveAll(l.dir), os.MkdirAll(l.dir, 0o755)); err != nil {
		return nil, err
	}
	l.api = api.NewClient(l.path("api.sock"))
	return l, l.start(conf)
}

func (l *lone) path(name string) string { return filepath.Join(l.dir, name) }

// configure writes a configuration; %DIR in it is the daemon's directory.
func (l *lone) configure(conf string) error {
	conf = fmt.Sprintf("state_dir: %s\nnbd: ['unix:%s']\napi: unix:%s\nlog: {level: warn}\n", l.path("state"), l.path("nbd.sock"), l.path("api.sock")) + conf
	return os.WriteFile(l.path("tidemark.yaml"), []byte(strings.ReplaceAll(conf, "%DIR", l.dir)), 0o600)
}

// disk makes an empty disk.
func (l *lone) disk(name string, size int64) error {
	return errors.Join(os.WriteFile(l.path(name), nil, 0o600), os.Truncate(l.path(name), size))
}

// start starts the daemon with a configuration. It makes the disks, empty, that a comment in it names and that are not there: # disk NAME BYTES.
func (l *lone) start(conf string) error {
	for line := range strings.Lines(conf) {
		if _, name, ok := strings.Cut(line, "# disk "); ok {
			name, size, _ := strings.Cut(strings.TrimSpace(name), " ")
			n, err := strconv.ParseInt(size, 10, 64)
			if _, serr := os.Stat(l.path(name)); err == nil && errors.Is(serr, fs.ErrNotExist) {
				err = l.disk(name, n)
			}
			if err != nil {
				return err
			}
		}
	}
	if err := l.configure(conf); err != nil {
		return err
	}
	l.cmd = exec.Command("bin/tidemarkd", "--config", l.path("tidemark.yaml"))
	l.cmd.Stderr = os.Stderr
	if err := l.cmd.Start(); err != nil {
		return err
	}
	return l.wait(time.Minute, func() (bool, error) {
		_, err := l.api.Status(l.b.ctx)
		return err == nil, nil
	})
}

func (l *lone) stop() error {
	if err := l.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return l.cmd.Wait()
}

// end ends it, if it runs.
func (l *lone) end() {
	if l != nil && l.cmd != nil && l.cmd.ProcessState == nil {
		_ = l.cmd.Process.Kill()
		_ = l.cmd.Wait()
	}
}

func (l *lone) wait(within time.Duration, what func() (bool, error)) error {
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok, err := what(); ok || err != nil {
			return err
		}
	}
	return fmt.Errorf("not within %v", within)
}

func (l *lone) group() (api.Group, error) {
	s, err := l.api.Status(l.b.ctx)
	if err != nil || len(s.Groups) == 0 {
		return api.Group{}, errors.Join(err, errors.New("no group"))
	}
	return s.Groups[0], nil
}

func (l *lone) fio(size int64, args ...string) (load, error) {
	return fioOn(l.b.ctx, "nbd+unix:///g/d?socket="+l.path("nbd.sock"), size, args...)
}

// used is what files below a directory take up, in bytes.
func used(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			n += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	return n, err
}

const (
	historyDisk = int64(4 << 30)
	oneDisk     = "groups: {g: {disks: {d: {backing: %DIR/disk.raw}}}} # disk disk.raw 4294967296\n"
)

// space writes at random to an empty disk, everything kept, and measures what the state directory takes when the daemon has stopped.
func (b *bench) space(_, _ int) (rows []string, err error) {
	for _, one := range []struct {
		what, dir, aims string
		bytes           int64
		args            []string
	}{
		{"bytes on disk per guest byte, incompressible 64 KiB writes, everything kept", "state", "1.05 | 1.02", 4 << 30, []string{"--bs=64k", "--iodepth=8"}},
		{"… index alone, 4 KiB random writes", "state/index", "0.03 | 0.015", 2 << 30, []string{"--bs=4k", "--iodepth=32"}},
	} {
		l, err := b.lone(oneDisk)
		if err != nil {
			l.end()
			return rows, err
		}
		w, err := l.fio(historyDisk, append([]string{"--refill_buffers", "--io_size=" + strconv.FormatInt(one.bytes, 10)}, one.args...)...)
		if err = errors.Join(err, l.stop()); err != nil {
			return rows, err
		}
		n, err := used(l.path(one.dir))
		if err != nil {
			return rows, err
		}
		rows = append(rows, fmt.Sprintf("| %s | %.3f (%d MiB of %d MiB) | %s |", one.what, float64(n)/float64(w.bytes), n>>20, w.bytes>>20, one.aims))
	}
	return rows, nil
}

// plain and compact are configurations under which segments stay as they are, and become compact as fast as they can.
const (
	plain   = "compact: {rate: 0}\n"
	compact = "compact: {after: 0s, rate: 4GiB}\n"
)

// databaseHistory has a database work for 60 times as many seconds, and measures what its history takes, and what each part of compaction does to some segments of it.
func (b *bench) databaseHistory(_, seconds int) (rows []string, err error) {
	l, err := b.lone(plain + oneDisk)
	defer l.end()
	if err != nil {
		return nil, err
	}
	db, err := b.database("nbd+unix:///g/d?socket=" + l.path("nbd.sock"))
	defer func() { err = errors.Join(err, db.close()) }()
	if err != nil {
		return nil, err
	}
	_, err = db.pgbench(60 * seconds)
	if err = errors.Join(err, db.close()); err != nil {
		return nil, err
	}
	g, err := l.group()
	if err = errors.Join(err, l.stop()); err != nil {
		return nil, err
	}
	wrote := g.Bytes.Guest // the file system and the tables, too, as their history is kept with the rest
	before, err := used(l.path("state"))
	if err != nil {
		return nil, err
	}
	some, err := l.someSegments(8)
	if err != nil {
		return nil, err
	}
	if err := l.start(compact + oneDisk); err != nil {
		return nil, err
	}
	if err = errors.Join(l.compacted(), l.stop()); err != nil {
		return nil, err
	}
	after, err := used(l.path("state"))
	if err != nil {
		return nil, err
	}
	rows = append(rows, fmt.Sprintf("| … pgbench for %d s, and the making of its tables, after compaction, everything kept | %.3f (%d MiB of %d MiB; before it %d MiB) | 0.5 | 0.1 |", 60*seconds, float64(after)/float64(wrote), after>>20, wrote>>20, before>>20))
	more, err := segmentBenchmark("PartsOfCompaction", "-compact.dir", some)
	if rows = append(rows, more...); err != nil {
		return rows, err
	}
	return rows, os.RemoveAll(some)
}

// segmentBenchmark are the rows that a benchmark of the segments prints.
func segmentBenchmark(name string, args ...string) (rows []string, err error) {
	out, err := exec.Command("go", append([]string{"test", "./journal/segment", "-run", "^$", "-bench", name, "-benchtime", "1x"}, args...)...).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "|") {
			rows = append(rows, strings.TrimSpace(line))
		}
	}
	return rows, nil
}

// alike has a database of its own work in each of two guests, made and used alike, and counts what both of them wrote.
func (b *bench) alike(_, seconds int) (rows []string, err error) {
	l, err := b.lone(plain + "journal: {segment: 64MiB}\ngroups: {g1: {disks: {d: {backing: %DIR/1.raw}}}, g2: {disks: {d: {backing: %DIR/2.raw}}}} # disk 1.raw 4294967296\n # disk 2.raw 4294967296\n")
	defer l.end()
	if err != nil {
		return nil, err
	}
	for _, g := range []string{"g1", "g2"} {
		db, err := b.database("nbd+unix:///" + g + "/d?socket=" + l.path("nbd.sock"))
		if err == nil {
			_, err = db.pgbench(10 * seconds)
		}
		if err = errors.Join(err, db.close()); err != nil {
			return nil, err
		}
	}
	if err := l.stop(); err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob(l.path("state/groups/*"))
	if err != nil || len(dirs) != 2 {
		return nil, errors.Join(err, fmt.Errorf("%d groups", len(dirs)))
	}
	return segmentBenchmark("Alike", "-compact.dir", dirs[1], "-compact.beside", dirs[0])
}

// someSegments copies so many closed segments, of all of the history, to a directory.
func (l *lone) someSegments(n int) (dir string, err error) {
	logs, err := filepath.Glob(l.path("state/groups/*/log-*.seg"))
	if err != nil || len(logs) < n+1 {
		return "", errors.Join(err, fmt.Errorf("%d segments, and %d are to be looked at", len(logs), n))
	}
	dir = l.path("some")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	for i := range n {
		if err := tools("cp " + logs[i*(len(logs)-1)/n] + " " + dir); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// compacted waits until nothing becomes compact any more: the groups look every 15 s.
func (l *lone) compacted() error {
	saved, since := int64(-1), time.Now()
	return l.wait(time.Hour, func() (bool, error) {
		g, err := l.group()
		if err == nil && g.Bytes.Saved != saved {
			saved, since = g.Bytes.Saved, time.Now()
		}
		return saved > 0 && time.Since(since) > 40*time.Second, err
	})
}

// rowsOfATable changes some bytes of a page, or makes it anew.
func rowsOfATable(page []byte, anew bool) {
	for at := 0; anew && at < len(page)-40; at += 64 {
		copy(page[at:], fmt.Sprintf("%d|%x|row of a table", rand.Uint32(), rand.Uint32()))
	}
	for range 4 {
		page[rand.IntN(len(page))] = byte(rand.Uint32())
	}
}

// writeVersions writes pages of a table to the group's disk, again and again, each time all of them in another order.
func (l *lone) writeVersions(pages, versions int) error {
	c, err := client.Dial(l.b.ctx, "unix", l.path("nbd.sock"), "g/d", nil)
	if err != nil {
		return err
	}
	disk := make([]byte, pages*4096)
	for version := range versions {
		for _, i := range rand.Perm(pages) {
			page := disk[i*4096:][:4096]
			rowsOfATable(page, version == 0)
			if err := c.WriteAt(page, int64(i)*4096, false); err != nil {
				return errors.Join(err, c.Close())
			}
		}
	}
	return c.Close()
}

// reading compares reads of a view at random before and after what it reads was made compact: blocks of which each has several versions that differ little.
func (b *bench) reading(rounds, seconds int) (rows []string, err error) {
	const pages = 16 << 10 // a segment has four versions of each
	l, err := b.lone(plain + oneDisk)
	defer l.end()
	if err != nil {
		return nil, err
	}
	if err := l.writeVersions(pages, 5); err != nil {
		return nil, err
	}
	if err := l.stop(); err != nil {
		return nil, err
	}
	rates := map[string]map[int]float64{}
	for _, conf := range []string{plain, compact} {
		if err := l.start(conf + oneDisk); err != nil {
			return nil, err
		}
		if conf == compact {
			if err := l.compacted(); err != nil {
				return nil, err
			}
		}
		rates[conf] = map[int]float64{}
		for _, depth := range []int{1, 32} {
			var all []float64
			for range rounds {
				// In the midst of a version: what each block was stands in the log.
				uri := fmt.Sprintf("nbd+unix:///g/d%%40lsn:%d?socket=%s", pages*5/2, l.path("nbd.sock"))
				rate, err := b.fio(uri, "randread", "4k", depth, 2*seconds, "--size="+strconv.Itoa(pages*4096))
				if err != nil {
					return nil, err
				}
				all = append(all, rate)
			}
			rates[conf][depth] = median(all)
		}
		if err := l.stop(); err != nil {
			return nil, err
		}
	}
	was, is := rates[plain], rates[compact]
	return []string{fmt.Sprintf("| view's 4 KiB random read after compaction with differences, against before, depth 32 | %.2f (%.0f, %.0f a second); depth 1: %.2f (%.0f, %.0f) | 0.5 | 0.8 |",
		is[32]/was[32], is[32], was[32], is[1]/was[1], is[1], was[1])}, nil
}

// cleaning compares the latency of writes while history is expired, thinned and cleaned with that while all is kept. In turn, as machines drift.
func (b *bench) cleaning(rounds, seconds int) ([]string, error) {
	p99 := map[string][]float64{}
	for range rounds {
		for _, v := range []struct{ name, retain string }{{"kept", ""}, {"cleaned", "retain: {every_write: 5s, tiers: {1s: 10s, 4s: 30s}}, "}} {
			l, err := b.lone("journal: {segment: 64MiB}\ngroups: {g: {" + v.retain + "disks: {d: {backing: %DIR/disk.raw}}}} # disk disk.raw 4294967296\n")
			if err != nil {
				l.end()
				return nil, err
			}
			// Until something is cleaned, nothing is measured; and what is done every half a minute is, twice.
			_, err = l.fio(historyDisk, append(timed(max(seconds, 20)), "--iodepth=4", "--rate=20m")...)
			var w load
			if err == nil {
				w, err = l.fio(historyDisk, append(timed(max(6*seconds, 20)), "--iodepth=4", "--rate=20m")...)
			}
			if err == nil && v.retain != "" {
				var g api.Group
				if g, err = l.group(); err == nil && g.KeptPoints == 0 {
					err = errors.New("nothing was kept beyond the window")
				}
			}
			if err = errors.Join(err, l.stop()); err != nil {
				return nil, err
			}
			p99[v.name] = append(p99[v.name], w.p99.Seconds()*1000)
		}
	}
	with, without := median(p99["cleaned"]), median(p99["kept"])
	return []string{fmt.Sprintf("| a guest's 4 KiB write latency, 99th percentile, with cleaning at work, against without | %.2f × (%.2f ms, %.2f ms) | 1.3 × | 1.05 × |", with/without, with, without)}, nil
}

// dropping has a history of as many segments go as a day's 100 GiB have, of a 256th of the size.
func (b *bench) dropping(_, _ int) ([]string, error) {
	const files = 400
	conf := "journal: {segment: 1MiB}\ngroups: {g: {%sdisks: {d: {backing: %%DIR/disk.raw}}}} # disk disk.raw 4294967296\n"
	l, err := b.lone(fmt.Sprintf(conf, ""))
	defer l.end()
	if err != nil {
		return nil, err
	}
	if _, err := l.fio(historyDisk, "--refill_buffers", "--iodepth=32", "--io_size="+strconv.Itoa(files<<20)); err != nil {
		return nil, err
	}
	settled := func() (bool, error) {
		g, err := l.group()
		return g.Unapplied == 0, err
	}
	if err := l.wait(2*time.Minute, settled); err != nil {
		return nil, err
	}
	was, err := l.group()
	if err != nil {
		return nil, err
	}
	if err := l.configure(fmt.Sprintf(conf, "retain: {every_write: 1s}, ")); err != nil {
		return nil, err
	}
	if _, err := l.api.Reload(b.ctx); err != nil {
		return nil, err
	}
	// It begins with the next checkpoint.
	var g api.Group
	err = l.wait(2*time.Minute, func() (_ bool, err error) {
		g, err = l.group()
		return g.Horizon > was.Horizon, err
	})
	if err != nil {
		return nil, err
	}
	began := time.Now()
	err = l.wait(10*time.Minute, func() (_ bool, err error) {
		g, err = l.group()
		return g.Horizon+1024 >= was.Head, err
	})
	if err != nil {
		return nil, err
	}
	took := time.Since(began).Seconds()
	return []string{fmt.Sprintf("| dropping %d segments of 1 MiB of 4 KiB writes (a day's 100 GiB are as many of 256 MiB) | %.1f s (%d records; journal %d MiB, then %d MiB; 256 times as many: %.0f min) | minutes | seconds |",
		files, took, was.Head, was.JournalBytes>>20, g.JournalBytes>>20, 256*took/60)}, nil
}

const (
	manyGroups   = 200
	manySegments = 40 // of 256 MiB each
)

// groupsConf is of n groups of two disks.
func groupsConf(n int) string {
	c := "journal: {segment: 64KiB, reserve: 16MiB}\ngroups:\n"
	for i := range n {
		c += fmt.Sprintf("  g%d: {disks: {a: {backing: %%DIR/%d.a}, b: {backing: %%DIR/%d.b}}} # disk %d.a 1073741824\n # disk %d.b 1073741824\n", i, i, i, i, i)
	}
	return c
}

// idle is what a daemon takes with n groups that nobody writes: resident bytes, and of a processor.
func (b *bench) idle(n int) (rss, cpu float64, err error) {
	l, err := b.lone(groupsConf(n))
	defer l.end()
	if err != nil {
		return 0, 0, err
	}
	time.Sleep(10 * time.Second)
	was, err := cpuTime(l.cmd.Process.Pid)
	if err != nil {
		return 0, 0, err
	}
	time.Sleep(20 * time.Second)
	now, err := cpuTime(l.cmd.Process.Pid)
	return float64((&server{cmd: l.cmd}).resident()), (now - was).Seconds() / 20, errors.Join(err, l.stop())
}

// manyGroups measures what an idle group costs, and a start with many that have a long history.
func (b *bench) manyGroups(rounds, _ int) (rows []string, err error) {
	oneRSS, oneCPU, err := b.idle(1)
	if err != nil {
		return nil, err
	}
	manyRSS, manyCPU, err := b.idle(manyGroups)
	if err != nil {
		return nil, err
	}
	rows = append(rows, fmt.Sprintf("| an idle group of two disks, resident | %.0f KiB (and %.3f %% of a processor) | 1 MiB | 100 KiB |",
		(manyRSS-oneRSS)/1024/(manyGroups-1), 100*(manyCPU-oneCPU)/(manyGroups-1)))

	l, err := b.lone(groupsConf(manyGroups))
	defer l.end()
	if err != nil {
		return rows, err
	}
	if err := l.fillMany(); err != nil {
		return rows, err
	}
	if err := l.stop(); err != nil {
		return rows, err
	}
	logs, err := filepath.Glob(l.path("state/groups/*/log-*.seg"))
	if err != nil {
		return rows, err
	}
	for _, path := range logs {
		if err := os.Truncate(path, 256<<20); err != nil { // all but its head is a hole
			return rows, err
		}
	}
	var took []float64
	for range rounds {
		began := time.Now()
		if err := l.start(groupsConf(manyGroups)); err != nil {
			return rows, err
		}
		took = append(took, time.Since(began).Seconds())
		if err := l.stop(); err != nil {
			return rows, err
		}
	}
	return append(rows, fmt.Sprintf("| start with %d groups, 10 GiB each of history (%d files of 256 MiB, sparse, in all) | %.2f s | 5 s | 1 s |", manyGroups, len(logs), median(took))), nil
}

// fillMany gives each group a history of many segments.
func (l *lone) fillMany() error {
	buf := make([]byte, 4096)
	for i := range manyGroups {
		c, err := client.Dial(l.b.ctx, "unix", l.path("nbd.sock"), fmt.Sprintf("g%d/a", i), nil)
		if err != nil {
			return err
		}
		for n := range manySegments * 14 { // so many records fill a segment
			buf[n%len(buf)]++
			if err := c.WriteAt(buf, int64(n)*4096, false); err != nil {
				return errors.Join(err, c.Close())
			}
		}
		if err := c.Close(); err != nil {
			return err
		}
	}
	return nil
}

// cpuTime is the processor time that a process took.
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b[slices.Index(b, ')')+1:]))
	user, err := strconv.ParseInt(f[11], 10, 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * time.Second / 100, err
}

func historyPage(rows []string, rounds int) string {
	return historyHead + fmt.Sprintf(`
Made by `+"`make bench-history`"+` on %s: %s. Rounds: %d, and medians of them. What is written goes to an empty disk of 4 GiB, at random, in random bytes: on a disk that was there before, each block that is overwritten for the first
time takes its original beside. While cleaning is at work, guests write 20 MB/s of which 5 s are kept whole, a point a second for 10 s and one every 4 s for 30 s; what that costs varies from run to run. Segments of
1 MiB have a 256th of the records of full ones: a day's 100 GiB of 4 KiB writes take 256 times as long to drop, from the checkpoint on that it waits for. pgbench has four clients and tables of scale 20. The view that is read has 64 MiB, each block of which was written five times, a few bytes other each time: nearly all of
what it reads are differences. fio has one of the processors. Blocks that two guests have alike are kept in each group: no segment could go while another group's needs it, what is damaged would be damaged for all, and half a history is the most
that it would save, of guests that do the same.

| figure | Tidemark | at least | aim |
|---|---|---|---|
%s
`, time.Now().UTC().Format("2006-01-02"), machine(), rounds, strings.Join(rows, "\n"))
}
