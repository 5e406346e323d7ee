package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/cmd/internal/wan"
)

// hosts are two daemons, of which the first ships a group to the second: each in a namespace at an end of a link, or both on this host.
type hosts struct {
	b    *bench
	link *wan.Link // nil: both are here
	ends [2]*end
	size int64
}

type end struct {
	dir string
	cmd *exec.Cmd
	api *api.Client
}

const (
	replicaDisk = 4 << 30
	replicaPort = "10900"
)

func (e *end) path(name string) string { return filepath.Join(e.dir, name) }

// hosts makes both, with an empty disk, or what fill makes of it, and, unless alone, has the group shipped.
func (b *bench) hosts(link *wan.Link, size int64, alone bool, fill func(h *hosts) error) (*hosts, error) {
	h := &hosts{b: b, link: link, size: size}
	for i, name := range []string{"a", "b"} {
		e := &end{dir: filepath.Join(b.dir, name)}
		h.ends[i] = e
		if err := errors.Join(os.RemoveAll(e.dir), os.MkdirAll(e.dir, 0o755)); err != nil {
			return h, err
		}
		e.api = api.NewClient(e.path("api.sock"))
	}
	disk := h.ends[0].path("disk.raw")
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, size)); err != nil {
		return h, err
	}
	if fill != nil {
		if err := fill(h); err != nil {
			return h, err
		}
	}
	at := "127.0.0.1"
	if link != nil {
		at = wan.AddressB
	}
	group := "groups: {g: {disks: {d: {backing: " + disk + "}}"
	if !alone {
		group += ", replicas: [b]"
	}
	confs := []string{group + "}}\nreplication: {name: a}\n", "replication: {name: b, listen: 'tcp:" + at + ":" + replicaPort + "'}\n"}
	for i, e := range h.ends {
		conf := fmt.Sprintf("state_dir: %s\nnbd: ['unix:%s']\napi: unix:%s\nlog: {level: error}\n%s", e.path("state"), e.path("nbd.sock"), e.path("api.sock"), confs[i])
		if err := os.WriteFile(e.path("conf.yaml"), []byte(conf), 0o600); err != nil {
			return h, err
		}
	}
	if alone {
		return h, h.start(0)
	}
	if err := errors.Join(h.start(1), h.start(0)); err != nil {
		return h, err
	}
	i, err := h.ends[1].api.Invite(b.ctx, api.InviteRequest{MaySend: []string{"*"}, Valid: 600})
	if err != nil {
		return h, err
	}
	_, err = h.ends[0].api.Join(b.ctx, api.JoinRequest{Address: at + ":" + replicaPort, Token: i.Token})
	return h, err
}

// shipped makes both with an empty disk, whose replica has everything.
func (b *bench) shipped(link *wan.Link, size int64) (*hosts, error) {
	h, err := b.hosts(link, size, false, nil)
	if err == nil {
		err = h.level(30 * time.Second)
	}
	return h, err
}

func (h *hosts) start(i int) error {
	e := h.ends[i]
	args := []string{"--config", e.path("conf.yaml")}
	if h.link != nil {
		e.cmd = h.link.Command(context.Background(), i, "bin/tidemarkd", args...)
	} else {
		e.cmd = exec.Command("bin/tidemarkd", args...)
	}
	e.cmd.Stderr = os.Stderr
	if err := e.cmd.Start(); err != nil {
		return err
	}
	return h.wait(30*time.Second, func() (bool, error) {
		_, err := e.api.Status(h.b.ctx)
		return err == nil, nil
	})
}

func (h *hosts) kill(i int) {
	if h.ends[i] == nil {
		return
	}
	if c := h.ends[i].cmd; c != nil {
		_ = c.Process.Kill()
		_ = c.Wait() // it was killed
		h.ends[i].cmd = nil
	}
}

func (h *hosts) signal(i int, s syscall.Signal) error { return h.ends[i].cmd.Process.Signal(s) }

func (h *hosts) close() {
	h.kill(0)
	h.kill(1)
}

func (h *hosts) uri(i int, export string) string {
	return "nbd+unix:///" + export + "?socket=" + h.ends[i].path("nbd.sock")
}

var errLate = errors.New("it did not come to that in time")

func (h *hosts) wait(within time.Duration, what func() (bool, error)) error {
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok, err := what(); ok || err != nil {
			return err
		}
	}
	return errLate
}

func (h *hosts) group(i int) (api.Group, error) {
	s, err := h.ends[i].api.Status(h.b.ctx)
	if err != nil || len(s.Groups) == 0 {
		return api.Group{}, err
	}
	return s.Groups[0], nil
}

// replica is what the writer says of it.
func (h *hosts) replica() (api.Replica, error) {
	g, err := h.group(0)
	if err != nil || len(g.Replicas) == 0 {
		return api.Replica{}, err
	}
	return g.Replicas[0], nil
}

// level waits until the replica has everything.
func (h *hosts) level(within time.Duration) error {
	return h.wait(within, func() (bool, error) {
		g, err := h.group(0)
		return err == nil && len(g.Replicas) > 0 && g.Replicas[0].State == "streaming" && g.Replicas[0].Acked == g.Head, err
	})
}

// load is what fio measured of a job.
type load struct {
	bytes   int64
	seconds float64
	p99     time.Duration
}

func (l load) rate() float64 { return float64(l.bytes) / l.seconds }

// fio writes at random to the group's disk.
func (h *hosts) fio(args ...string) (l load, err error) { return h.fioUntil(h.b.ctx, args...) }

func (h *hosts) fioUntil(ctx context.Context, args ...string) (l load, err error) {
	return fioOn(ctx, h.uri(0, "g/d"), h.size, args...)
}

// fioOn writes at random to a disk of a size.
func fioOn(ctx context.Context, uri string, size int64, args ...string) (l load, err error) {
	args = append([]string{"--name=w", "--ioengine=nbd", "--uri=" + uri, "--rw=randwrite", "--bs=4k", "--norandommap", "--randrepeat=0",
		"--size=" + strconv.FormatInt(size, 10), "--output-format=json"}, args...)
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.WaitDelay = time.Second // its jobs are processes of their own
	out, err := cmd.Output()
	if err != nil {
		return l, fmt.Errorf("fio: %w: %s", err, out)
	}
	var r struct {
		Jobs []struct {
			Write struct {
				Bytes   int64   `json:"io_bytes"`
				Runtime float64 `json:"runtime"`
				Clat    struct {
					Percentile map[string]float64 `json:"percentile"`
				} `json:"clat_ns"`
			} `json:"write"`
		} `json:"jobs"`
	}
	if at := bytes.IndexByte(out, '{'); at >= 0 {
		out = out[at:]
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return l, fmt.Errorf("fio's answer: %w", err)
	}
	if len(r.Jobs) != 1 {
		return l, fmt.Errorf("fio's answer is of %d jobs", len(r.Jobs))
	}
	w := r.Jobs[0].Write
	return load{w.Bytes, w.Runtime / 1000, time.Duration(w.Clat.Percentile["99.000000"])}, nil
}

func timed(seconds int) []string {
	return []string{"--time_based", "--runtime=" + strconv.Itoa(seconds), "--refill_buffers"}
}
