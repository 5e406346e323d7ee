package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// fakeAgent is a guest agent on a unix socket, as QEMU has one: one connection at a time. What it is
// asked to freeze is a flag.
type fakeAgent struct {
	l  net.Listener
	wg sync.WaitGroup

	mu      sync.Mutex
	frozen  bool
	freezes int
	during  func()                   // called when it is frozen, before it says so
	instead map[string]func() string // answers in the stead of a command's
}

func listenAgent(t *testing.T, path string) *fakeAgent {
	t.Helper()
	_ = os.Remove(path)
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	a := &fakeAgent{l: l, instead: map[string]func() string{}}
	a.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			a.serve(c)
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		a.wg.Wait()
	})
	return a
}

func (a *fakeAgent) serve(c net.Conn) {
	defer c.Close()
	for in := bufio.NewReader(c); ; {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		line = line[bytes.LastIndexByte(line, 0xff)+1:]
		var q struct {
			Execute   string
			Arguments struct{ ID int64 }
		}
		if json.Unmarshal(line, &q) != nil {
			continue
		}
		if answer := a.answer(q.Execute, q.Arguments.ID); answer != "" {
			_, _ = fmt.Fprintln(c, answer) // the daemon may be gone
		}
	}
}

func (a *fakeAgent) answer(command string, id int64) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if fn := a.instead[command]; fn != nil {
		return fn()
	}
	n := 0
	switch command {
	case "guest-sync-delimited":
		return fmt.Sprintf("\xff{\"return\": %d}", id)
	case "guest-fsfreeze-freeze":
		n, a.frozen = 1, true
		a.freezes++
		if a.during != nil {
			a.during()
		}
	case "guest-fsfreeze-thaw":
		if a.frozen {
			n, a.frozen = 1, false
		}
	case "guest-fsfreeze-status":
		if a.frozen {
			return `{"return": "frozen"}`
		}
		return `{"return": "thawed"}`
	}
	return fmt.Sprintf(`{"return": %d}`, n)
}

func (a *fakeAgent) isFrozen() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.frozen
}

func (a *fakeAgent) set(fn func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fn()
}

// frozenTimes is how often it was asked to freeze.
func (a *fakeAgent) frozenTimes() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.freezes
}
