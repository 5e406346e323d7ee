package guest

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Guest is a virtual machine whose file systems can be frozen.
type Guest interface {
	// Freeze runs the guest's own hooks and freezes its file systems, and returns how many. ErrNotAsked
	// says that the guest did not get to hear of it, because it can not be reached or somebody else has it
	// frozen; after any other error it may be frozen.
	Freeze(ctx context.Context) (int, error)
	// Thaw thaws what is frozen, and returns how many file systems that were.
	Thaw(ctx context.Context) (int, error)
	// Frozen asks whether the guest is frozen.
	Frozen(ctx context.Context) (bool, error)
	// Close lets go of the connection; the next call makes a new one.
	Close() error
}

// errFrozenAlready is why a guest is not asked to freeze: whoever froze it will thaw it.
var errFrozenAlready = errors.New("it is frozen already, by another program or by hand: see that it is thawed")

// ErrNotAsked is wrapped by a Freeze that ended before the guest was asked to freeze.
var ErrNotAsked = errors.New("the guest was not asked")

// Spec says how a guest is reached.
type Spec struct {
	Agent   string   `json:"agent,omitempty"`   // path of the socket of QEMU's guest agent
	Libvirt string   `json:"libvirt,omitempty"` // name of a domain
	Socket  string   `json:"socket,omitempty"`  // libvirt's; the system's by default
	Mounts  []string `json:"mounts,omitempty"`  // freeze these file systems only
}

// ParseSpec reads agent:PATH or libvirt:DOMAIN.
func ParseSpec(s string) (Spec, error) {
	kind, rest, ok := strings.Cut(s, ":")
	switch {
	case ok && rest != "" && kind == "agent":
		return Spec{Agent: rest}, nil
	case ok && rest != "" && kind == "libvirt":
		return Spec{Libvirt: rest}, nil
	}
	return Spec{}, fmt.Errorf("guest %q: expected agent:PATH or libvirt:DOMAIN", s)
}

// Validate reports a spec that names no guest, or two.
func (s Spec) Validate() error {
	if (s.Agent == "") == (s.Libvirt == "") {
		return errors.New("name either the agent's socket (agent) or a domain (libvirt)")
	}
	if s.Socket != "" && s.Libvirt == "" {
		return errors.New("socket is libvirt's: the agent's own is the value of agent")
	}
	return nil
}

func (s Spec) String() string {
	if s.Libvirt != "" {
		return "libvirt:" + s.Libvirt
	}
	return "agent:" + s.Agent
}

// New makes the guest. It is not reached before it is asked for something.
func (s Spec) New() Guest {
	if s.Libvirt != "" {
		return newLibvirt(s)
	}
	return newAgent(s)
}
