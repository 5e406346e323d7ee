package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/nbd/client"
)

// The figures of markers: how long a guest is frozen by Tidemark's own work, under load on all disks of
// its group, and what a guest's writes notice of a marker every five seconds.

const markerDiskSize = 256 << 20

// instantAgent is a guest agent that stops the load in the stead of a file system, flushes the disk as
// a freeze does in the end, and answers at once: what is left is Tidemark's own.
type instantAgent struct {
	l    net.Listener
	disk atomic.Pointer[client.Client]
	wg   sync.WaitGroup
	load atomic.Int64 // the process group that writes; 0: none
}

func (a *instantAgent) signal(s syscall.Signal) {
	if pgid := a.load.Load(); pgid != 0 {
		_ = syscall.Kill(-int(pgid), s) // it may have ended
	}
}

func listenInstant(path string) (*instantAgent, error) {
	_ = os.Remove(path) // of the run before
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	a := &instantAgent{l: l}
	a.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			a.serve(c)
		}
	})
	return a, nil
}

func (a *instantAgent) close() error {
	err := a.l.Close()
	a.wg.Wait()
	return err
}

func (a *instantAgent) serve(c net.Conn) {
	defer c.Close()
	frozen := false
	for in := bufio.NewReader(c); ; {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		var q struct {
			Execute   string
			Arguments struct{ ID int64 }
		}
		if json.Unmarshal(line[bytes.LastIndexByte(line, 0xff)+1:], &q) != nil {
			continue
		}
		answer := `{"return": 1}`
		switch q.Execute {
		case "guest-sync-delimited":
			answer = fmt.Sprintf("\xff{\"return\": %d}", q.Arguments.ID)
		case "guest-fsfreeze-freeze":
			frozen = true
			a.signal(syscall.SIGSTOP)
			if disk := a.disk.Load(); disk != nil {
				_ = disk.Flush() // a failed group refuses the marker too
			}
		case "guest-fsfreeze-thaw":
			frozen = false
			a.signal(syscall.SIGCONT)
		case "guest-fsfreeze-status":
			answer = map[bool]string{true: `{"return": "frozen"}`, false: `{"return": "thawed"}`}[frozen]
		}
		if _, err := fmt.Fprintln(c, answer); err != nil {
			return
		}
	}
}

// startGroup serves a group of n disks with an instant guest.
func (b *bench) startGroup(n int) (s *server, uris []string, err error) {
	if err := os.RemoveAll(b.state()); err != nil {
		return nil, nil, err
	}
	s = &server{name: "tidemark", sock: filepath.Join(b.dir, "tidemark.sock")}
	args := []string{"--state-dir", b.state(), "--nbd", "unix:" + s.sock, "--api", "unix:" + b.api(), "--log-level", "warn",
		"--guest", "bench=agent:" + filepath.Join(b.dir, "agent")}
	for i := range n {
		path := filepath.Join(b.dir, fmt.Sprintf("disk%d.raw", i))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			return nil, nil, err
		}
		if err := os.Truncate(path, markerDiskSize); err != nil {
			return nil, nil, err
		}
		args = append(args, "--disk", fmt.Sprintf("bench/d%d=%s", i, path))
		uris = append(uris, fmt.Sprintf("nbd+unix:///bench/d%d?socket=%s", i, s.sock))
	}
	s.cmd = exec.Command("bin/tidemarkd", args...)
	return s, uris, b.ready(s)
}

func (b *bench) api() string { return filepath.Join(b.dir, "api.sock") }

// load writes 4 KiB at random to all disks, 8 requests in flight on each, for some seconds; it returns the
// latencies of the writes that fio measures, by percentile, in milliseconds.
func (b *bench) load(a *instantAgent, uris []string, seconds int) (map[string]float64, error) {
	args := []string{"--ioengine=nbd", "--rw=randwrite", "--thread", "--bs=4k", "--iodepth=8", "--size=" + strconv.Itoa(markerDiskSize), "--time_based",
		"--runtime=" + strconv.Itoa(seconds), "--randrepeat=0", "--group_reporting", "--output-format=json", "--percentile_list=50:99:99.9"}
	for i, uri := range uris {
		args = append(args, fmt.Sprintf("--name=d%d", i), "--uri="+uri)
	}
	var out bytes.Buffer
	fio := exec.CommandContext(b.ctx, "fio", args...)
	fio.Stdout = &out
	fio.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := fio.Start(); err != nil {
		return nil, fmt.Errorf("fio: %w", err)
	}
	a.load.Store(int64(fio.Process.Pid))
	if err := fio.Wait(); err != nil {
		return nil, fmt.Errorf("fio: %w: %s", err, out.Bytes())
	}
	var result struct {
		Jobs []struct {
			Write struct {
				Clat struct {
					Percentile map[string]float64 `json:"percentile"`
					Max        float64            `json:"max"`
				} `json:"clat_ns"`
			} `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out.Bytes()[max(0, bytes.IndexByte(out.Bytes(), '{')):], &result); err != nil || len(result.Jobs) != 1 {
		return nil, fmt.Errorf("fio printed no figures: %.200s", out.Bytes())
	}
	clat := result.Jobs[0].Write.Clat
	return map[string]float64{
		"median": clat.Percentile["50.000000"] / 1e6, "p99": clat.Percentile["99.000000"] / 1e6,
		"p99.9": clat.Percentile["99.900000"] / 1e6, "max": clat.Max / 1e6,
	}, nil
}

// markEvery takes application markers until done is closed, and returns how long each had the guest frozen, in seconds.
func (b *bench) markEvery(every time.Duration, done <-chan struct{}) (frozen []float64, err error) {
	c := api.NewClient(b.api())
	t := time.NewTicker(every)
	defer t.Stop()
	for n := 0; ; n++ {
		select {
		case <-done:
			return frozen, nil
		case <-t.C:
		}
		m, err := c.Mark(b.ctx, "bench", api.MarkRequest{Label: fmt.Sprintf("m-%d", n), Consistency: "application"})
		if err != nil {
			return frozen, err
		}
		frozen = append(frozen, m.Frozen)
	}
}

// marked runs the load with a marker every so often; 0: none.
func (b *bench) marked(disks, seconds int, every time.Duration) (frozen []float64, latency map[string]float64, err error) {
	agent, err := listenInstant(filepath.Join(b.dir, "agent"))
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, agent.close()) }()
	s, uris, err := b.startGroup(disks)
	if err != nil {
		return nil, nil, err
	}
	disk, err := client.Dial(b.ctx, "unix", s.sock, "bench/d0", nil)
	if err != nil {
		return nil, nil, errors.Join(err, s.stop())
	}
	agent.disk.Store(disk)
	done := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		var merr error
		if every > 0 {
			frozen, merr = b.markEvery(every, done)
		}
		ended <- merr
	}()
	latency, err = b.load(agent, uris, seconds)
	close(done)
	err = errors.Join(err, <-ended, disk.Close(), s.stop())
	return frozen, latency, err
}

func quantile(v []float64, q float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[min(len(v)-1, int(q*float64(len(v))))]
}

// markers makes the rows about markers.
func (b *bench) markers(rounds, seconds int) (rows []string, err error) {
	rows = append(rows, "| disks of the group, all under load | markers | frozen, median | frozen, p99 | aim for the p99 |", "|---|---|---|---|---|")
	for _, disks := range []int{1, 4, 16} {
		var all []float64
		for range rounds {
			frozen, _, err := b.marked(disks, seconds, 100*time.Millisecond)
			if err != nil {
				return nil, err
			}
			all = append(all, frozen...)
		}
		rows = append(rows, fmt.Sprintf("| %d | %d | %.1f ms | %.1f ms | 20 ms |", disks, len(all), quantile(all, 0.5)*1000, quantile(all, 0.99)*1000))
		fmt.Println(rows[len(rows)-1])
	}
	rows = append(rows, "", "| write latency, one disk | without markers | one every 5 s | ratio |", "|---|---|---|---|")
	with, without := map[string][]float64{}, map[string][]float64{}
	for range rounds {
		for every, into := range map[time.Duration]map[string][]float64{0: without, 5 * time.Second: with} {
			_, latency, err := b.marked(1, 2*seconds, every)
			if err != nil {
				return nil, err
			}
			for k, v := range latency {
				into[k] = append(into[k], v)
			}
		}
	}
	for _, k := range []string{"median", "p99", "p99.9", "max"} {
		w, wo := median(with[k]), median(without[k])
		rows = append(rows, fmt.Sprintf("| %s | %.2f ms | %.2f ms | %.2f |", k, wo, w, w/wo))
		fmt.Println(rows[len(rows)-1])
	}
	return rows, nil
}
