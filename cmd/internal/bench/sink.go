package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/link"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// sink is a replica that keeps nothing: what a real one does with its disks and processors is another host's. What it gets is decrypted
// and acknowledged here all the same.
type sink struct {
	*link.Endpoint
	addr   string
	cancel context.CancelFunc
	served chan struct{}

	last  atomic.Uint64
	begun *record.Beginning
}

func newSink(dir string) (*sink, error) {
	write := func(path string, b []byte) error { return os.WriteFile(path, b, 0o600) }
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	id, err := link.LoadIdentity(dir, "sink", write)
	if err != nil {
		return nil, err
	}
	peers, err := link.LoadPeers(filepath.Join(dir, "peers.json"), nil, nil, write)
	if err != nil {
		return nil, err
	}
	s := &sink{served: make(chan struct{})}
	s.Endpoint = &link.Endpoint{Identity: id, Peers: peers, Name: "b", Build: "sink", Log: zap.NewNop(), Offered: func(ctx context.Context, c *link.Conn, m *wire.Offer) {
		_ = link.Follow(ctx, c, m, s) // it ends with the load
	}}
	s.Init()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s.addr = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go func() {
		defer close(s.served)
		_ = s.Serve(ctx, l) // it returns nil
	}()
	return s, nil
}

func (s *sink) close() {
	s.cancel()
	s.Shut()
	<-s.served
}

// What follows is link.Target.

func (s *sink) Local() (replica.Local, error) { return replica.Local{}, nil }

func (s *sink) Receive(run record.Run) error {
	s.last.Store(uint64(run.Last))
	return nil
}

func (s *sink) Sync() (record.LSN, error) { return record.LSN(s.last.Load()), nil }

func (s *sink) Begin(b record.Beginning) error {
	s.begun = &b
	return nil
}

func (s *sink) Bridge(record.Beginning) error               { return errors.New("a sink has no history") }
func (s *sink) Adopt(record.Disk) error                     { return nil }
func (s *sink) Backing(record.DiskID) (link.Backing, error) { return nothing{}, nil }
func (s *sink) Elsewhere(record.DiskID) []io.ReaderAt       { return nil }
func (s *sink) Finish(record.DiskID) error                  { return nil }
func (s *sink) Note(record.Reigns) error                    { return nil }
func (s *sink) Depose(record.Reigns) error                  { return nil }
func (s *sink) Rewind(record.LSN) error                     { return errSink }
func (s *sink) Take() (record.Reigns, error)                { return nil, errSink }
func (s *sink) Heard(record.LSN, time.Time)                 {}
func (s *sink) Handover() <-chan struct{}                   { return nil }

var errSink = errors.New("a sink keeps nothing")

// nothing is a disk of zeroes.
type nothing struct{}

func (nothing) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

func (nothing) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (nothing) Zero(int64, int64) error                { return nil }

func (nothing) Data(_, n int64, fn func(int64, bool)) error {
	fn(n, false)
	return nil
}
