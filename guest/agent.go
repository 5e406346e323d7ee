package guest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// agent is a guest by the socket of its QEMU guest agent. The protocol is JSON lines, see
// QEMU's docs/interop/qemu-ga.rst and qga/qapi-schema.json.
type agent struct {
	path   string
	mounts []string
	dial   func(context.Context) (net.Conn, error)

	conn net.Conn // nil: none, or not to be trusted any more
	in   *bufio.Reader
}

const (
	// syncWait is how long an agent may take to answer at all: it is up, and not busy with something else.
	syncWait = 5 * time.Second
	// maxLine bounds a line of the agent's, in bytes.
	maxLine = 64 << 10
	// maxStale bounds what is read over while an answer is looked for, in bytes.
	maxStale = 1 << 20
	// delimiter precedes the answer to guest-sync-delimited; it is in no other answer.
	delimiter = 0xff
)

func newAgent(s Spec) *agent {
	return &agent{path: s.Agent, mounts: s.Mounts, dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.Agent)
	}}
}

func (a *agent) Close() error {
	if a.conn == nil {
		return nil
	}
	conn := a.conn
	a.conn, a.in = nil, nil
	return conn.Close()
}

// failed gives up the connection: what comes over it can belong to any question.
func (a *agent) failed(err error) error { return errors.Join(err, a.Close()) }

// connect makes a connection on which the next answer is to the next question.
func (a *agent) connect(ctx context.Context) error {
	if a.conn != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, syncWait)
	defer cancel()
	conn, err := a.dial(ctx)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("guest agent: no socket at %s: is the guest running, and is this where its QEMU has the agent's channel?", a.path)
		}
		return fmt.Errorf("guest agent at %s: %w", a.path, err)
	}
	a.conn, a.in = conn, bufio.NewReaderSize(conn, maxLine)
	if err := a.sync(ctx); err != nil {
		err = fmt.Errorf("guest agent at %s: %w%s", a.path, err, a.busy())
		return a.failed(err)
	}
	return nil
}

// busy explains an agent that does not answer.
func (a *agent) busy() string {
	if waiting(a.path) {
		return "; another program is connected to this socket, and the agent talks to one at a time: end it, or let Tidemark go through libvirt (libvirt:DOMAIN) if it is libvirt"
	}
	return "; is qemu-guest-agent running in the guest? Only one program at a time can talk to it: if libvirt manages the guest, use libvirt:DOMAIN"
}

// waiting reports whether a connection to a unix socket waits to be accepted, from /proc/net/unix: QEMU
// accepts one at a time.
func waiting(path string) bool {
	b, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		// Num RefCount Protocol Flags Type St Inode Path; state 2 is connecting
		if f := strings.Fields(line); len(f) == 8 && f[7] == path && f[5] == "02" {
			return true
		}
	}
	return false
}

// sync has the agent forget what it was asked before, and reads over what it has said of that.
func (a *agent) sync(ctx context.Context) error {
	defer a.deadline(ctx)()
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return err
	}
	id := int64(binary.LittleEndian.Uint64(b[:]) >> 12) // exact in JSON's numbers
	// A delimiter on the way there has the agent drop half a question.
	q := fmt.Sprintf("\xff{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":%d}}\n", id)
	if _, err := a.conn.Write([]byte(q)); err != nil {
		return fmt.Errorf("ask it to synchronise: %w", err)
	}
	for read := 0; read < maxStale; {
		n, err := a.discard()
		if read += n; err != nil {
			return fmt.Errorf("it does not synchronise: %w", err)
		}
		line, err := a.line()
		if read += len(line); err != nil {
			return fmt.Errorf("it does not synchronise: %w", err)
		}
		var answer struct {
			Return *int64 `json:"return"`
		}
		if json.Unmarshal(line, &answer) == nil && answer.Return != nil && *answer.Return == id {
			return nil
		}
	}
	return fmt.Errorf("it does not synchronise: %d bytes without the answer", maxStale)
}

// discard reads up to and with the next delimiter.
func (a *agent) discard() (n int, err error) {
	for n < maxStale {
		part, err := a.in.ReadSlice(delimiter)
		n += len(part)
		if !errors.Is(err, bufio.ErrBufferFull) {
			return n, err
		}
	}
	return n, fmt.Errorf("%d bytes without a delimiter", n)
}

func (a *agent) line() ([]byte, error) {
	line, err := a.in.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return line, fmt.Errorf("a line of more than %d bytes", maxLine)
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("it hung up")
	}
	return line, err
}

// deadline ends what waits for the connection with the context.
func (a *agent) deadline(ctx context.Context) (stop func()) {
	conn := a.conn
	end := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return func() { end() }
}

// AgentError is what the agent answers when it does not do what it was asked.
type AgentError struct {
	Command string
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *AgentError) Error() string {
	return fmt.Sprintf("the guest agent answers %s with %s: %q", e.Command, e.Class, e.Desc)
}

// ask sends a command on a connection that is synchronised, and reads the answer.
func (a *agent) ask(ctx context.Context, command string, args, answer any) error {
	defer a.deadline(ctx)()
	q, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return err
	}
	if _, err := a.conn.Write(append(q, '\n')); err != nil {
		return a.failed(fmt.Errorf("ask for %s: %w", command, ended(ctx, err)))
	}
	line, err := a.line()
	if err != nil {
		return a.failed(fmt.Errorf("answer to %s: %w", command, ended(ctx, err)))
	}
	var reply struct {
		Return json.RawMessage `json:"return"`
		Error  *AgentError     `json:"error"`
	}
	if err := json.Unmarshal(bytes.TrimLeft(line, "\xff"), &reply); err != nil || (reply.Return == nil) == (reply.Error == nil) {
		return a.failed(fmt.Errorf("answer to %s: %.100q is none", command, line))
	}
	if reply.Error != nil {
		reply.Error.Command = command
		return reply.Error
	}
	if err := json.Unmarshal(reply.Return, answer); err != nil {
		return a.failed(fmt.Errorf("answer to %s: %.100q: %w", command, line, err))
	}
	return nil
}

// ended tells the end of a context in the stead of the deadline that it set.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		return context.Cause(ctx)
	}
	return err
}

// notFrozen is an ErrNotAsked unless a guest says that it is not frozen.
func notFrozen(ctx context.Context, g Guest) error {
	frozen, err := g.Frozen(ctx)
	if err == nil && frozen {
		err = errFrozenAlready
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotAsked, err)
	}
	return nil
}

func (a *agent) Freeze(ctx context.Context) (n int, err error) {
	if err := notFrozen(ctx, a); err != nil {
		return 0, err
	}
	if len(a.mounts) > 0 {
		err = a.ask(ctx, "guest-fsfreeze-freeze-list", map[string]any{"mountpoints": a.mounts}, &n)
	} else {
		err = a.ask(ctx, "guest-fsfreeze-freeze", nil, &n)
	}
	return n, err
}

func (a *agent) Thaw(ctx context.Context) (n int, err error) {
	if err := a.connect(ctx); err != nil {
		return 0, err
	}
	err = a.ask(ctx, "guest-fsfreeze-thaw", nil, &n)
	return n, err
}

func (a *agent) Frozen(ctx context.Context) (bool, error) {
	if err := a.connect(ctx); err != nil {
		return false, err
	}
	var status string
	if err := a.ask(ctx, "guest-fsfreeze-status", nil, &status); err != nil {
		return false, err
	}
	switch status {
	case "frozen":
		return true, nil
	case "thawed":
		return false, nil
	}
	return false, a.failed(fmt.Errorf("the guest agent's status is %.100q: frozen or thawed was expected", status))
}
