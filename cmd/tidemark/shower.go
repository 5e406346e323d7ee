package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/tidemark-cdp/tidemark/restore/guestfs"
	"github.com/tidemark-cdp/tidemark/restore/mount"
)

// The kernel's way mounts files that a FUSE server has. That server is a process of its own, the shower, which is this program
// with a verb that is not listed: who reads the mount may be killed in the middle of a read that only the server can
// answer, and a process can not end that waits for itself. The shower ends when the pipe from its parent does.

// showRequest is what the shower reads from its input: first where the disks are, then volumes, one at a time. It answers each.
type showRequest struct {
	place
	Dir string `json:",omitempty"`

	Volume *guestfs.Volume `json:",omitempty"`
}

// shower is the parent's side.
type shower struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has
	err   error         // how it ended; written before that

	killed atomic.Bool

	mu  sync.Mutex // one request at a time
	in  io.WriteCloser
	out *os.File
	at  string // where it shows the volumes
	enc *json.Encoder
	dec *json.Decoder
}

// startShower starts one; it shows volumes in a directory of its own below dir.
func startShower(p place, dir string) (*shower, error) {
	at := filepath.Join(dir, "volumes")
	if err := os.Mkdir(at, 0o700); err != nil {
		return nil, err
	}
	// What is typed at the terminal is not for it.
	s := &shower{cmd: exec.Command("/proc/self/exe", "show-volumes"), ended: make(chan struct{})}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	s.cmd.Stderr = os.Stderr
	in, err := s.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, answers, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	s.cmd.Stdout, s.out, s.at = answers, out, at
	s.in, s.enc, s.dec = in, json.NewEncoder(in), json.NewDecoder(out)
	err = s.cmd.Start()
	if err := errors.Join(err, answers.Close()); err != nil {
		return nil, errors.Join(fmt.Errorf("serve volumes to the kernel: %w", err), out.Close())
	}
	go func() {
		s.err = s.cmd.Wait()
		close(s.ended)
	}()
	if _, err := s.ask(showRequest{place: p, Dir: at}); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	return s, nil
}

func (s *shower) ask(r showRequest) (path string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var a answer
	if err := errors.Join(s.enc.Encode(r), s.dec.Decode(&a)); err != nil {
		return "", fmt.Errorf("serve volumes to the kernel: %w", err)
	}
	if a.Error != "" {
		return "", errors.New(a.Error)
	}
	return a.Path, nil
}

// attach implements guestfs.Kernel's Attach. What is shown goes when the shower does.
func (s *shower) attach(v guestfs.Volume) (path string, detach func(), err error) {
	path, err = s.ask(showRequest{Volume: &v})
	return path, func() {}, err
}

// stop ends it. What stands on its files must be gone.
func (s *shower) stop() error {
	_ = s.in.Close() // it may have ended
	<-s.ended
	err := s.out.Close()
	if s.err != nil {
		_ = syscall.Unmount(s.at, syscall.MNT_DETACH) // it could not
	}
	if s.err != nil && !s.killed.Load() {
		err = errors.Join(err, fmt.Errorf("serve volumes to the kernel: %w", s.err))
	}
	return err
}

// kill ends it at once: who waits for its files gets errors, as everybody does from then on.
func (s *shower) kill() {
	s.killed.Store(true)
	_ = s.cmd.Process.Kill() // it may have ended
}

// Err is why it serves nothing any more; nil if it does.
func (s *shower) Err() error {
	select {
	case <-s.ended:
		return fmt.Errorf("what serves volumes to the kernel has ended: %w", errors.Join(s.err, guestfs.ErrEnded))
	default:
		return nil
	}
}

// showVolumes is the shower's verb.
func (a *app) showVolumes() *cobra.Command {
	return &cobra.Command{
		Use:    "show-volumes",
		Short:  "Serve volumes to the kernel, for this program itself",
		Hidden: true,
		Args:   args(cobra.NoArgs),
		RunE:   func(cmd *cobra.Command, _ []string) error { return showAll(cmd.InOrStdin(), cmd.OutOrStdout()) },
	}
}

func showAll(in io.Reader, out io.Writer) (err error) {
	dec, enc := json.NewDecoder(in), json.NewEncoder(out)
	var r showRequest
	if err := dec.Decode(&r); err != nil {
		return err
	}
	var stop stops
	defer func() { err = errors.Join(err, stop.run()) }()
	clients, err := dialDisks(context.Background(), r.place, &stop)
	if err != nil {
		return enc.Encode(answer{Error: err.Error()})
	}
	// Without the daemon it is of no use: with it go its files, which then give errors, and the parent makes another.
	var stopping atomic.Bool
	for _, c := range clients {
		go func() {
			<-c.Done()
			if !stopping.Load() {
				fmt.Fprintf(os.Stderr, "tidemark: volumes are not served to the kernel any more: %v\n", c.Err())
				os.Exit(exitError)
			}
		}()
	}
	// If the parent is gone the directories are removed by nobody else.
	stop.add(func() error {
		err := os.Remove(r.Dir)
		_ = os.Remove(filepath.Dir(r.Dir)) // the parent may have more in it
		return err
	})
	fuse, err := mount.ServeDevices(r.Dir)
	if err != nil {
		return enc.Encode(answer{Error: err.Error()})
	}
	var devices stops
	stop.add(func() error { return errors.Join(fuse.Close(), devices.run()) })
	defer stopping.Store(true) // before everything else is undone
	for a := (answer{}); ; {
		var next showRequest
		if enc.Encode(a) != nil || dec.Decode(&next) != nil {
			return nil // the parent is done, or gone
		}
		a = answer{}
		if a.Path, err = showOne(fuse, next.Volume, asDisks(clients), filepath.Dir(r.Dir), &devices); err != nil {
			a.Error = err.Error()
		}
	}
}

func showOne(fuse *mount.Devices, v *guestfs.Volume, disks map[string]guestfs.Disk, dir string, devices *stops) (string, error) {
	if v == nil {
		return "", errors.New("no volume is named")
	}
	d, err := guestfs.NewDevice(*v, disks, dir)
	if err != nil {
		return "", err
	}
	path, detach, err := fuse.Add(d)
	if err != nil {
		return "", errors.Join(err, d.Close())
	}
	devices.add(func() error {
		detach()
		return d.Close()
	})
	return path, nil
}
