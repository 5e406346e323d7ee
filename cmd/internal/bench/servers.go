package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tidemark-cdp/tidemark/nbd/client"
)

type bench struct {
	ctx  context.Context
	dir  string
	disk string
	rss  int64 // the most that Tidemark took, bytes
}

// prefill makes the disk: n random bytes.
func (b *bench) prefill(n int64) error {
	f, err := os.Create(b.disk)
	if err != nil {
		return err
	}
	if _, err := io.CopyN(f, rand.Reader, n); err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(f.Sync(), f.Close())
}

// server is a running NBD server of the disk.
type server struct {
	name, sock, export, uri string
	cmd                     *exec.Cmd
}

func (b *bench) start(name string) (*server, error) {
	s := &server{name: name, sock: filepath.Join(b.dir, name+".sock")}
	if err := os.RemoveAll(s.sock); err != nil {
		return nil, err
	}
	switch name {
	case "tidemark":
		if err := os.RemoveAll(b.state()); err != nil {
			return nil, err
		}
		return s, b.startTidemark(s)
	case "qemu-nbd":
		s.cmd = exec.Command("qemu-nbd", "-f", "raw", "--cache=writeback", "-t", "-k", s.sock, b.disk)
	case "nbdkit":
		s.cmd = exec.Command("nbdkit", "-f", "-U", s.sock, "file", b.disk)
	}
	return s, b.ready(s)
}

func (b *bench) state() string { return filepath.Join(b.dir, "state") }

// startTidemark starts it on the state that is there.
func (b *bench) startTidemark(s *server) error {
	s.export = "bench/disk"
	s.cmd = exec.Command("bin/tidemarkd", "--state-dir", b.state(), "--nbd", "unix:"+s.sock, "--api", "unix:"+filepath.Join(b.dir, "api.sock"),
		"--disk", s.export+"="+b.disk, "--log-level", "warn")
	return b.ready(s)
}

func (b *bench) ready(s *server) error {
	s.uri = "nbd+unix:///" + s.export + "?socket=" + s.sock
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		return err
	}
	for range 3000 {
		if c, err := net.Dial("unix", s.sock); err == nil {
			return c.Close()
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("%s does not get ready", s.name)
}

func (s *server) stop() error {
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	err := s.cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && s.name != "tidemark" {
		return nil // a peer that ends by the signal
	}
	return err
}

// rss is the most memory that the server had resident, in bytes.
func (s *server) rss() int64 { return s.memory("VmHWM:") }

// resident is the memory that it has resident, in bytes.
func (s *server) resident() int64 { return s.memory("VmRSS:") }

func (s *server) memory(which string) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, which); ok {
			n, _ := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
			return n << 10
		}
	}
	return 0
}

// fio runs a job and returns requests a second. 0 seconds: once over the disk.
func (b *bench) fio(uri, rw, bs string, depth, seconds int, extra ...string) (float64, error) {
	args := []string{"--name=bench", "--ioengine=nbd", "--uri=" + uri, "--rw=" + rw, "--bs=" + bs, "--iodepth=" + strconv.Itoa(depth),
		"--size=4G", "--randrepeat=0", "--output-format=terse", "--terse-version=3"}
	if seconds > 0 {
		args = append(args, "--time_based", "--runtime="+strconv.Itoa(seconds))
	}
	out, err := exec.CommandContext(b.ctx, "fio", append(args, extra...)...).Output()
	if err != nil {
		return 0, fmt.Errorf("fio: %w: %s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Split(line, ";")
		if len(f) < 50 || f[0] != "3" {
			continue
		}
		// KiB and milliseconds of reads and writes; with the final flush in the time.
		kib, _ := strconv.ParseFloat(f[5], 64)
		ms, _ := strconv.ParseFloat(f[8], 64)
		wkib, _ := strconv.ParseFloat(f[46], 64)
		wms, _ := strconv.ParseFloat(f[49], 64)
		unit := map[string]float64{"4k": 4, "64k": 64, "1m": 1024}[bs]
		if kib+wkib > 0 {
			return (kib + wkib) / unit / ((ms + wms) / 1000), nil
		}
	}
	return 0, fmt.Errorf("fio printed no figures: %s", out)
}

// flushes writes 4 KiB at random and flushes after each, one at a time.
func (b *bench) flushes(s *server, seconds int) (float64, error) {
	c, err := client.Dial(b.ctx, "unix", s.sock, s.export, nil)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	buf := make([]byte, 4096)
	n, x := 0, uint64(88172645463325252)
	began := time.Now()
	for ; time.Since(began) < time.Duration(seconds)*time.Second; n++ {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		if err := errors.Join(c.WriteAt(buf, int64(x%(4<<30/4096))*4096, false), c.Flush()); err != nil {
			return 0, err
		}
	}
	return float64(n) / time.Since(began).Seconds(), nil
}

func machine() string {
	var model string
	if f, err := os.Open("/proc/cpuinfo"); err == nil {
		defer f.Close()
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if v, ok := strings.CutPrefix(sc.Text(), "model name"); ok {
				model = strings.TrimLeft(v, "\t :")
				break
			}
		}
	}
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return fmt.Sprintf("%d × %s, Linux %s, %s", runtime.NumCPU(), model, bytes.TrimSpace(release), runtime.Version())
}
