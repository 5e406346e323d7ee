package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/tidemark-cdp/tidemark/nbd/client"
)

// views measures the rows about the past, on one journal with many overwrites behind its head.
func (b *bench) views(overwrites, rounds int) (rows []string, err error) {
	s, err := b.start("tidemark")
	if err != nil {
		return nil, err
	}
	stopped := false
	defer func() {
		if !stopped {
			_ = s.cmd.Process.Kill()
			_ = s.cmd.Wait()
		}
	}()
	if _, err := b.fio(s.uri, "randwrite", "4k", 32, 0, "--norandommap=1", "--number_ios="+strconv.Itoa(overwrites)); err != nil {
		return nil, err
	}
	if err := b.settled(); err != nil {
		return nil, err
	}
	past := fmt.Sprintf("%s@lsn:%d", s.export, overwrites/2)
	pastURI := fmt.Sprintf("nbd+unix:///bench/disk%%40lsn:%d?socket=%s", overwrites/2, s.sock)
	var first, old, live []float64
	for range rounds {
		d, err := b.firstByte(s, past)
		if err != nil {
			return nil, err
		}
		first = append(first, d.Seconds()*1000)
		v, err := b.fio(pastURI, "randread", "4k", 32, 10)
		if err != nil {
			return nil, err
		}
		l, err := b.fio(s.uri, "randread", "4k", 32, 10)
		if err != nil {
			return nil, err
		}
		old, live = append(old, v), append(live, l)
	}
	rows = append(rows,
		fmt.Sprintf("| 4 KiB random read of a view, depth 32, against the live disk | %.0f (live: %.0f) | | | %.2f | 0.5 | 0.8 |", median(old), median(live), median(old)/median(live)),
		fmt.Sprintf("| first byte of a view, connection and all | %.1f ms | | | | 10 ms | 1 ms |", median(first)))
	restore, err := b.restore(s, past, rounds)
	if err != nil {
		return nil, err
	}
	rows = append(rows, restore)
	ready, err := b.killed(s)
	stopped = err == nil
	return append(rows, ready), err
}

// settled waits until everything written is applied: the live disk then is the backing alone, and
// views and live reads have the machine for themselves.
func (b *bench) settled() error {
	for range 600 {
		out, err := b.tidemark("status", "--json").Output()
		if err != nil {
			return fmt.Errorf("tidemark status: %w", err)
		}
		var status struct {
			Groups []struct{ Head, Applied uint64 }
		}
		if err := json.Unmarshal(out, &status); err != nil {
			return fmt.Errorf("tidemark status: %w", err)
		}
		if g := status.Groups[0]; g.Applied == g.Head {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return errors.New("what was written is not applied after a minute")
}

// tidemark is a call of the client.
func (b *bench) tidemark(args ...string) *exec.Cmd {
	return exec.CommandContext(b.ctx, "bin/tidemark", append(args, "--api", "unix:"+filepath.Join(b.dir, "api.sock"))...)
}

// firstByte is the time from the decision to look to the first byte.
func (b *bench) firstByte(s *server, export string) (time.Duration, error) {
	began := time.Now()
	c, err := client.Dial(b.ctx, "unix", s.sock, export, nil)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	err = c.ReadAt(make([]byte, 1), 4096*12345)
	return time.Since(began), err
}

// restore compares a restore with nbdcopy of the live disk from qemu-nbd.
func (b *bench) restore(s *server, past string, rounds int) (string, error) {
	var ours, theirs []float64
	to := filepath.Join(b.dir, "restored.raw")
	timed := func(cmd *exec.Cmd) (float64, error) {
		if err := os.RemoveAll(to); err != nil {
			return 0, err
		}
		began := time.Now()
		out, err := cmd.CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("%v: %w: %s", cmd.Args, err, out)
		}
		return time.Since(began).Seconds(), nil
	}
	for range rounds {
		v, err := timed(b.tidemark("restore", past, "--to", to))
		if err != nil {
			return "", err
		}
		q, err := b.start("qemu-nbd")
		if err != nil {
			return "", err
		}
		w, err := timed(exec.CommandContext(b.ctx, "nbdcopy", "--flush", q.uri, to))
		if serr := q.stop(); err == nil {
			err = serr
		}
		if err != nil {
			return "", err
		}
		ours, theirs = append(ours, v), append(theirs, w)
	}
	return fmt.Sprintf("| restore of a 4 GiB view to raw, against nbdcopy --flush from qemu-nbd | %.1f s | %.1f s | | %.2f | 0.7 | 1 |",
		median(ours), median(theirs), median(theirs)/median(ours)), os.RemoveAll(to)
}

// killed fills the journal to 20 GiB, kills the daemon under load, and times the next start.
func (b *bench) killed(s *server) (string, error) {
	if _, err := b.fio(s.uri, "write", "1m", 8, 0, "--loops=4"); err != nil {
		return "", err
	}
	load := exec.Command("fio", "--name=load", "--ioengine=nbd", "--uri="+s.uri, "--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=4G", "--time_based", "--runtime=60")
	if err := load.Start(); err != nil {
		return "", err
	}
	time.Sleep(8 * time.Second)
	if err := s.cmd.Process.Kill(); err != nil {
		return "", err
	}
	_ = s.cmd.Wait() // it was killed
	_ = load.Wait()  // its server is gone
	var journal int64
	files, err := filepath.Glob(filepath.Join(b.state(), "groups", "bench", "*.seg"))
	if err != nil {
		return "", err
	}
	for _, f := range files {
		if info, err := os.Stat(f); err == nil {
			journal += info.Size()
		}
	}
	if err := os.RemoveAll(s.sock); err != nil {
		return "", err
	}
	began := time.Now()
	if err := b.startTidemark(s); err != nil {
		return "", err
	}
	if _, err := b.firstByte(s, s.export); err != nil {
		return "", err
	}
	took := time.Since(began)
	return fmt.Sprintf("| ready again after kill -9, with a %d GiB journal | %.2f s | | | | 2 s | 0.5 s |", journal>>30, took.Seconds()), s.stop()
}
