package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/tidemark-cdp/tidemark/cmd/internal/port"
	"github.com/tidemark-cdp/tidemark/journal/record"
)

const (
	// portRate and portBurst bound the markers that a guest may ask for.
	portRate  = rate.Limit(0.2) // a second
	portBurst = 10
	// portClients bounds the connections to a port: QEMU makes one.
	portClients = 4
	// portWait is how long a guest may take to take an answer.
	portWait = 10 * time.Second
)

// portRetry is how long a port that can not be served is left alone.
const portRetry = 5 * time.Second

// servePort takes markers from inside a guest until ctx ends: QEMU connects the guest's virtio-serial
// port to the socket. Who reaches it reaches this group and nothing else.
func (k *keeper) servePort(ctx context.Context, name, path string) {
	limiter := rate.NewLimiter(portRate, portBurst)
	what := "port of guest " + name
	for ctx.Err() == nil {
		l, err := listenOn("unix:"+path, k.socketGroup)
		if err == nil {
			k.problem(what, nil)
			err = k.acceptPort(ctx, l, name, limiter)
		}
		if ctx.Err() != nil {
			return
		}
		k.problem(what, err)
		select {
		case <-ctx.Done():
		case <-time.After(portRetry):
		}
	}
}

// acceptPort serves the connections to a port until it can accept no more.
func (k *keeper) acceptPort(ctx context.Context, l net.Listener, name string, limiter *rate.Limiter) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	defer l.Close()
	var wg sync.WaitGroup
	defer wg.Wait()
	free := make(chan struct{}, portClients)
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		select {
		case free <- struct{}{}:
		default:
			_ = c.Close()
			continue
		}
		wg.Go(func() {
			defer func() { <-free }()
			k.servePortClient(ctx, c, name, limiter)
		})
	}
}

// servePortClient answers a connection's lines until it ends. Nothing in them is trusted.
func (k *keeper) servePortClient(ctx context.Context, c net.Conn, name string, limiter *rate.Limiter) {
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	defer c.Close()
	in := bufio.NewReaderSize(c, port.MaxLine)
	for {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			// The rest of it is read over with what follows.
			if err = discardLine(in); err == nil {
				err = k.answerPort(c, port.Answer{Error: fmt.Sprintf("a line of more than %d bytes", port.MaxLine)})
			}
		} else if err == nil && len(bytes.TrimSpace(line)) > 0 {
			err = k.answerPort(c, k.portMark(line, name, limiter))
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				k.log.Info("port of guest", zap.String("guest", name), zap.Error(err))
			}
			return
		}
	}
}

func discardLine(in *bufio.Reader) error {
	for {
		if _, err := in.ReadSlice('\n'); !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
}

func (k *keeper) answerPort(c net.Conn, a port.Answer) error {
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	if err := c.SetWriteDeadline(time.Now().Add(portWait)); err != nil {
		return err
	}
	_, err = c.Write(append(b, '\n'))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("the guest does not take its answers: %w", err)
	}
	return err
}

// portMark does what a line asks for.
func (k *keeper) portMark(line []byte, name string, limiter *rate.Limiter) port.Answer {
	var q port.Question
	if err := json.Unmarshal(line, &q); err != nil {
		return port.Answer{Error: "not a question: " + err.Error()}
	}
	if len(q.ID) > port.MaxID {
		return port.Answer{Error: fmt.Sprintf("an id of more than %d bytes", port.MaxID)}
	}
	refuse := func(err error) port.Answer { return port.Answer{ID: q.ID, Error: err.Error()} }
	for _, taken := range []string{k.conf.Markers.Label + "-", "discontinuity-"} {
		if strings.HasPrefix(q.Mark, taken) {
			return refuse(fmt.Errorf("label %q: %s… is what the host calls its own: choose another", q.Mark, taken))
		}
	}
	if !limiter.Allow() {
		return refuse(fmt.Errorf("too many markers: %d at once, then one every %v", portBurst, time.Duration(float64(time.Second)/float64(portRate))))
	}
	m, err := k.mark(context.Background(), record.Marker{Label: q.Mark, Description: q.Description, By: "guest:" + name, Asked: record.Crash})
	if err != nil {
		return refuse(err)
	}
	return port.Answer{ID: q.ID, Group: k.g.Name(), LSN: uint64(m.LSN), Label: m.Label, Time: m.Time}
}
