package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"
)

// fakeAgent answers as QEMU's agent does: one connection at a time, one command after the other. What a
// test wants otherwise is in its fields.
type fakeAgent struct {
	t      *testing.T
	accept chan net.Conn
	done   chan struct{}

	mu     sync.Mutex
	frozen bool
	asked  []string // commands, but for synchronisation

	systems int // that a freeze freezes
	// instead is done in the stead of a command, the first so many times.
	instead map[string]func(c net.Conn, times int) (handled bool)
	times   map[string]int
}

func newFake(t *testing.T) *fakeAgent {
	f := &fakeAgent{t: t, accept: make(chan net.Conn), done: make(chan struct{}), systems: 2,
		instead: map[string]func(net.Conn, int) bool{}, times: map[string]int{}}
	go f.run()
	return f
}

func (f *fakeAgent) stop() {
	close(f.accept)
	<-f.done
}

// dial is the host's side.
func (f *fakeAgent) dial(ctx context.Context) (net.Conn, error) {
	host, guest := net.Pipe()
	select {
	case f.accept <- guest:
		return host, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (f *fakeAgent) guest() *agent { return &agent{path: "/nowhere", dial: f.dial} }

func (f *fakeAgent) run() {
	defer close(f.done)
	for c := range f.accept {
		in := bufio.NewReader(c)
		for {
			line, err := in.ReadBytes('\n')
			if err != nil {
				break
			}
			if i := bytes.LastIndexByte(line, delimiter); i >= 0 {
				line = line[i+1:]
			}
			var q struct {
				Execute   string
				Arguments struct{ ID int64 }
			}
			if json.Unmarshal(line, &q) != nil {
				continue
			}
			f.command(c, q.Execute, q.Arguments.ID)
		}
		_ = c.Close()
	}
}

func (f *fakeAgent) command(c net.Conn, command string, id int64) {
	f.times[command]++
	if fn := f.instead[command]; fn != nil && fn(c, f.times[command]) {
		return
	}
	if command == "guest-sync-delimited" {
		f.say(c, "\xff{\"return\": %d}\n", id)
		return
	}
	f.say(c, "%s\n", f.do(command))
}

// do does a command, and returns the answer.
func (f *fakeAgent) do(command string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, command)
	n := 0
	switch command {
	case "guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list":
		n, f.frozen = f.systems, true
	case "guest-fsfreeze-thaw":
		if f.frozen {
			n, f.frozen = f.systems, false
		}
	case "guest-fsfreeze-status":
		if f.frozen {
			return `{"return": "frozen"}`
		}
		return `{"return": "thawed"}`
	}
	return fmt.Sprintf(`{"return": %d}`, n)
}

func (f *fakeAgent) say(c net.Conn, format string, args ...any) {
	_, _ = fmt.Fprintf(c, format, args...) // the host may have hung up
}

func (f *fakeAgent) isFrozen() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.frozen
}

// hang waits until the host gives up.
func (f *fakeAgent) hang(c net.Conn) {
	b := make([]byte, 1)
	for {
		if _, err := c.Read(b); err != nil {
			return
		}
	}
}

func (f *fakeAgent) sleep(d time.Duration) { time.Sleep(d) }
