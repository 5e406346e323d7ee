package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"

	"github.com/tidemark-cdp/tidemark/nbd/client"
	"github.com/tidemark-cdp/tidemark/restore"
)

func isURI(s string) bool { return strings.HasPrefix(s, "nbd:") || strings.HasPrefix(s, "nbd+") }

// parseURI reads an NBD URI: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH, as doc/uri.md of
// github.com/NetworkBlockDevice/nbd has them.
func parseURI(s string) (network, addr, export string, err error) {
	u, err := url.Parse(s)
	if err != nil {
		return "", "", "", err
	}
	export = strings.TrimPrefix(u.Path, "/")
	switch u.Scheme {
	case "nbd":
		if u.Host == "" {
			return "", "", "", fmt.Errorf("%s names no host", s)
		}
		port := u.Port()
		if port == "" {
			port = "10809"
		}
		return "tcp", net.JoinHostPort(u.Hostname(), port), export, nil
	case "nbd+unix":
		socket := u.Query().Get("socket")
		if socket == "" {
			return "", "", "", fmt.Errorf("%s names no socket: nbd+unix:///EXPORT?socket=PATH", s)
		}
		return "unix", socket, export, nil
	}
	return "", "", "", fmt.Errorf("%s: nbd: and nbd+unix: are known, without TLS", s)
}

// nbdURI names an export for other programs.
func nbdURI(network, host, export string) string {
	path := "/" + url.PathEscape(export)
	if network == "unix" {
		return "nbd+unix://" + path + "?socket=" + url.QueryEscape(host)
	}
	return "nbd://" + host + path
}

// exported is an NBD export as a target.
type exported struct{ *client.Client }

func (e exported) WriteAt(p []byte, off int64) error { return e.Client.WriteAt(p, off, false) }

func (e exported) Sync() error {
	if !e.CanFlush() {
		return nil
	}
	return e.Flush()
}

func (e exported) Zero(off, n int64) error {
	for zeroes := make([]byte, min(n, 1<<20)); n > 0 && !e.CanZero(); {
		k := min(n, int64(len(zeroes)))
		if err := e.WriteAt(zeroes[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	for n > 0 {
		k := min(n, 1<<30)
		if err := e.Client.Zero(off, uint32(k), false); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

func (t *target) writeExport(ctx context.Context, src *client.Client, o restore.Options) error {
	network, addr, export, err := parseURI(t.to)
	if err != nil {
		return usage(fmt.Errorf("--to: %w", err))
	}
	if o.Format != restore.Raw {
		return usage(errors.New("an export is written as it is: --format qcow2 goes to a new file"))
	}
	dst, err := client.Dial(ctx, network, addr, export, nil)
	if err != nil {
		return fmt.Errorf("restore to %s: %w", t.to, err)
	}
	defer dst.Close()
	if dst.ReadOnly() {
		return fmt.Errorf("restore to %s: the export is read-only", t.to)
	}
	if t.copy && !o.Verify && !o.Force {
		return fmt.Errorf("%s does not say what it is a copy of: --verify compares all of it when the changes are written, --force believes that it is the disk as of LSN %d", t.to, t.r.since)
	}
	return restore.Onto(ctx, src, exported{dst}, t.to, noteDir(), o)
}
