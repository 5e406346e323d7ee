package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/digitalocean/go-libvirt"
)

// DefaultLibvirt is the socket of the system's libvirtd.
const DefaultLibvirt = "/run/libvirt/libvirt-sock"

// agentSeconds is how long libvirt waits for an agent's answer to a question that takes it no time.
const agentSeconds = 5

// domain is a guest that libvirt runs. libvirt holds the agent's socket of a running domain, so that
// it must be asked.
type domain struct {
	name, socket string
	mounts       []string

	conn net.Conn // nil: none, or not to be trusted any more
	l    *libvirt.Libvirt
	dom  libvirt.Domain
}

func newLibvirt(s Spec) *domain {
	d := &domain{name: s.Libvirt, socket: s.Socket, mounts: s.Mounts}
	if d.socket == "" {
		d.socket = DefaultLibvirt
	}
	return d
}

func (d *domain) Close() error {
	if d.conn == nil {
		return nil
	}
	conn := d.conn
	d.conn, d.l = nil, nil
	return conn.Close()
}

// call calls fn, which talks to libvirt and knows no context, until it returns or ctx ends: then the
// connection is given up, which makes fn return.
func (d *domain) call(ctx context.Context, what string, fn func() error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("libvirt domain %s: %s: %w", d.name, what, context.Cause(ctx))
	}
	done := make(chan error, 1)
	go func() { done <- fn() }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		conn := d.conn
		_ = conn.Close()
		<-done
		d.conn, d.l = nil, nil
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("libvirt domain %s: %s: %w", d.name, what, err)
	}
	return nil
}

func (d *domain) connect(ctx context.Context) error {
	if d.conn != nil {
		return nil
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", d.socket)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("libvirt domain %s: no socket at %s: is libvirtd running?", d.name, d.socket)
	}
	if err != nil {
		return fmt.Errorf("libvirt domain %s: %w", d.name, err)
	}
	d.conn, d.l = conn, libvirt.New(conn)
	l := d.l
	err = d.call(ctx, "connect", func() error { return l.Connect() })
	if err == nil {
		err = d.call(ctx, "look it up", func() (err error) {
			d.dom, err = l.DomainLookupByName(d.name)
			return err
		})
	}
	if err != nil {
		return errors.Join(err, d.Close())
	}
	return nil
}

// ask asks the guest's agent by way of libvirt.
func (d *domain) ask(ctx context.Context, command string, answer any) error {
	if err := d.connect(ctx); err != nil {
		return err
	}
	l := d.l
	return d.call(ctx, command, func() error {
		out, err := l.QEMUDomainAgentCommand(d.dom, fmt.Sprintf(`{"execute":%q}`, command), agentSeconds, 0)
		if err != nil {
			return err
		}
		if len(out) != 1 || len(out[0]) > maxLine {
			return fmt.Errorf("%d answers", len(out))
		}
		var reply struct {
			Return json.RawMessage `json:"return"`
		}
		if err := json.Unmarshal([]byte(out[0]), &reply); err != nil {
			return err
		}
		return json.Unmarshal(reply.Return, answer)
	})
}

func (d *domain) Freeze(ctx context.Context) (int, error) {
	// An agent that does not answer would keep libvirt waiting for its freeze for ever.
	if err := notFrozen(ctx, d); err != nil {
		return 0, err
	}
	l := d.l
	var n int32
	err := d.call(ctx, "freeze", func() (err error) {
		n, err = l.DomainFsfreeze(d.dom, d.mounts, 0)
		return err
	})
	return int(n), err
}

func (d *domain) Thaw(ctx context.Context) (int, error) {
	if err := d.connect(ctx); err != nil {
		return 0, err
	}
	l := d.l
	var n int32
	err := d.call(ctx, "thaw", func() (err error) {
		n, err = l.DomainFsthaw(d.dom, nil, 0)
		return err
	})
	return int(n), err
}

func (d *domain) Frozen(ctx context.Context) (bool, error) {
	var status string
	if err := d.ask(ctx, "guest-fsfreeze-status", &status); err != nil {
		return false, err
	}
	if status != "frozen" && status != "thawed" {
		return false, fmt.Errorf("the guest agent's status is %.100q: frozen or thawed was expected", status)
	}
	return status == "frozen", nil
}

// Definition asks libvirt for the XML that a domain is defined with, without its secrets.
func (s Spec) Definition(ctx context.Context) ([]byte, error) {
	d := newLibvirt(s)
	if err := d.connect(ctx); err != nil {
		return nil, err
	}
	var xml string
	l := d.l
	err := d.call(ctx, "read its definition", func() (err error) {
		xml, err = l.DomainGetXMLDesc(d.dom, libvirt.DomainXMLInactive)
		return err
	})
	return []byte(xml), errors.Join(err, d.Close())
}
