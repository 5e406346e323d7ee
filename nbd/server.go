package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/semaphore"
)

const (
	// handshakeTime bounds the negotiation of a connection.
	handshakeTime = 30 * time.Second
	// maxLong bounds the memory of READs longer than inlineRead, of all connections of a server to
	// exports that can be written, and as much again to those that can not: who reads the
	// past, and does not take the replies, holds up nobody's disk. In bytes.
	maxLong = 128 << 20
	// maxConns bounds the connections of a server.
	maxConns = 1024
	// sockBuf is the socket buffer that a server asks for, in bytes.
	sockBuf = 1 << 20
)

// Server serves exports to the connections of any number of listeners.
type Server struct {
	Exports Exports
	// TLS, if set, is required of every client.
	TLS *tls.Config
	// Durable makes a write be acknowledged only when it is durable, for
	// clients that outlive this host.
	Durable bool
	// Log is told of connections; it must be set.
	Log *zap.Logger

	once  sync.Once
	live  *semaphore.Weighted // of maxLong
	past  *semaphore.Weighted // of maxLong
	conns *semaphore.Weighted
}

func (s *Server) init() {
	s.once.Do(func() {
		s.live = semaphore.NewWeighted(maxLong)
		s.past = semaphore.NewWeighted(maxLong)
		s.conns = semaphore.NewWeighted(maxConns)
	})
}

// Serve takes connections from l until ctx ends, then closes l, lets the
// requests in hand finish, and returns nil. Any other end of l is an error.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	s.init()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		nc, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				continue
			}
			return fmt.Errorf("accept on %v: %w", l.Addr(), err)
		}
		if !s.conns.TryAcquire(1) {
			s.Log.Warn("too many connections: one was refused", zap.Int("limit", maxConns))
			_ = nc.Close()
			continue
		}
		wg.Go(func() {
			defer s.conns.Release(1)
			s.ServeConn(ctx, nc)
		})
	}
}

// ServeConn serves one connection and closes it. When ctx ends, requests in
// hand are finished and no more are taken.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) {
	s.init()
	if b, ok := nc.(interface {
		SetReadBuffer(int) error
		SetWriteBuffer(int) error
	}); ok {
		// Best effort: a smaller buffer is slower, not wrong.
		_, _ = b.SetReadBuffer(sockBuf), b.SetWriteBuffer(sockBuf)
	}
	log := s.Log.With(zap.Stringer("client", nc.RemoteAddr()))
	defer nc.Close()
	_ = nc.SetDeadline(time.Now().Add(handshakeTime))
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	h := handshake{s: s, c: nc}
	sess, err := h.run(ctx)
	stop()
	if err != nil {
		if !errors.Is(err, errAbort) && !errors.Is(err, io.EOF) {
			log.Info("negotiation failed", zap.Error(err))
		}
		return
	}
	log = log.With(zap.String("export", sess.name))
	_ = h.c.SetDeadline(time.Time{})
	log.Info("client attached", zap.Bool("tls", h.tls), zap.Bool("structured", sess.structured))
	err = newConn(s, h.c, sess, log).serve(ctx)
	if cerr := sess.close(); cerr != nil {
		log.Error("close the export", zap.Error(cerr))
	}
	if err != nil && !errors.Is(err, errNoDisc) {
		log.Warn("client lost", zap.Error(err))
		return
	}
	log.Info("client detached", zap.Bool("disc", err == nil))
}
