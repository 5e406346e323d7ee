package guestfs

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// endTime is how long a program that is asked to end may take before it is killed.
const endTime = 15 * time.Second

// program is a program that runs beside this one and shows files by FUSE. It ends with this one, whatever ends this one.
type program struct {
	cmd    *exec.Cmd
	stderr lastBytes
	ended  chan struct{} // closed when it has
	err    error         // how it ended; written before that
}

// start starts a program. What is typed at the terminal does not reach it.
func start(cmd *exec.Cmd) (*program, error) {
	p := &program{cmd: cmd, ended: make(chan struct{})}
	cmd.Stderr = &p.stderr
	cmd.WaitDelay = endTime // a process of its own may keep its output open
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		// The kernel sends the signal when the thread ends that started it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.ended)
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return p, nil
}

// kill ends it at once: who waits for its files gets errors.
func (p *program) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.ended
}

// unmount ends it by unmounting what it shows. Whoever is still in there keeps it for a while.
func (p *program) unmount(dir string) error {
	if !mounted(dir) {
		p.kill()
		return nil
	}
	if exec.Command("fusermount3", "-u", dir).Run() != nil {
		if out, err := exec.Command("fusermount3", "-u", "-z", dir).CombinedOutput(); err != nil {
			p.kill()
			return fmt.Errorf("unmount %s: %w: %s", dir, err, bytes.TrimSpace(out))
		}
	}
	select {
	case <-p.ended:
	case <-time.After(endTime):
		p.kill()
	}
	return nil
}

// mounted reports whether something is mounted on a directory, and asks nothing of what is: it may hang.
func mounted(dir string) bool {
	// The kernel has the path without links; its last part is not to be asked.
	if above, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
		dir = filepath.Join(above, filepath.Base(dir))
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	defer f.Close()
	escaped := strings.NewReplacer("\\", `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`).Replace(dir)
	s := bufio.NewScanner(f)
	for s.Buffer(nil, 1<<20); s.Scan(); {
		// ID PARENT MAJOR:MINOR ROOT MOUNTPOINT …
		if fields := strings.Fields(s.Text()); len(fields) > 4 && fields[4] == escaped {
			return true
		}
	}
	return false
}

// lastBytes keeps the last bytes written to it.
type lastBytes struct {
	mu sync.Mutex
	b  []byte
}

func (t *lastBytes) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-8192):]
	return len(p), nil
}

func (t *lastBytes) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(string(t.b))
}
