// Command tidemark-guest asks, from inside a guest, for a marker of the guest's group.
//
// It promises that, when it ends with 0, the marker is durable, and that what the guest had written before
// lies before it: it has the kernel write what it holds (sync) first, unless told not to. It needs nothing but the virtio-serial port, and is
// built static. One program at a time can have the port open. Limits: Linux guests; markers are crash-consistent.
package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tidemark-cdp/tidemark/cmd/internal/build"
	"github.com/tidemark-cdp/tidemark/cmd/internal/port"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "tidemark-guest: %v\n", err)
		os.Exit(1)
	}
}

type flags struct {
	port, description string
	timeout           time.Duration
	noSync, json      bool
}

func command() *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:           "tidemark-guest LABEL",
		Short:         "Have Tidemark name this moment of the disks of this guest",
		Example:       "  tidemark-guest 'before-migration 42'",
		Args:          cobra.ExactArgs(1),
		Version:       build.Version(),
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), f.timeout)
			defer cancel()
			a, err := f.ask(ctx, args[0])
			if err != nil {
				return err
			}
			if f.json {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(a)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is LSN %d of %s\n", a.Label, a.LSN, a.Group)
			return err
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.port, "port", "/dev/virtio-ports/"+port.Name, "the guest's port to Tidemark")
	fl.StringVar(&f.description, "description", "", "a text for people")
	fl.DurationVar(&f.timeout, "timeout", 30*time.Second, "how long to wait for the answer")
	fl.BoolVar(&f.noSync, "no-sync", false, "leave out what the kernel has not written yet")
	fl.BoolVar(&f.json, "json", false, "print JSON")
	return cmd
}

// ask asks for a marker and waits for the answer.
func (f *flags) ask(ctx context.Context, label string) (a port.Answer, err error) {
	if !f.noSync {
		unix.Sync()
	}
	p, err := open(ctx, f.port)
	if err != nil {
		return a, err
	}
	defer p.Close()
	stop := context.AfterFunc(ctx, func() { _ = p.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var id [8]byte
	if _, err := rand.Read(id[:]); err != nil {
		return a, err
	}
	q := port.Question{ID: hex.EncodeToString(id[:]), Mark: label, Description: f.description}
	b, err := json.Marshal(q)
	if err != nil {
		return a, err
	}
	if len(b)+1 > port.MaxLine {
		return a, fmt.Errorf("label and description take %d bytes: %d are sent at most", len(b)+1, port.MaxLine)
	}
	// A line end first: whoever had the port before may have left half a line.
	if _, err := p.Write(append(append([]byte{'\n'}, b...), '\n')); err != nil {
		return a, fmt.Errorf("ask: %w", ended(ctx, err))
	}
	for in := bufio.NewReaderSize(p, port.MaxLine); ; {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return a, fmt.Errorf("no answer: %w: is tidemarkd running on the host, and this guest's port configured?", ended(ctx, err))
		}
		// What is not JSON, or of another id, was an answer to somebody before.
		if json.Unmarshal(line, &a) != nil || a.ID != q.ID {
			a = port.Answer{}
			continue
		}
		if a.Error != "" {
			return a, errors.New(a.Error)
		}
		return a, nil
	}
}

// open opens the port, which one program at a time can have.
func open(ctx context.Context, path string) (*os.File, error) {
	for {
		// Without O_NONBLOCK the runtime could not end a wait.
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("%w: does this guest have a virtio-serial port named %s?", err, port.Name)
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%s is busy: another program has it open", path)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
