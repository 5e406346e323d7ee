package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Hook is a pair of programs run on the host, by their arguments and without a shell.
type Hook struct {
	Before  []string      `json:"before,omitempty"` // before guests are frozen
	After   []string      `json:"after,omitempty"`  // after they are thawed, whatever happened
	Timeout time.Duration `json:"timeout"`          // of each, in JSON in nanoseconds; 0: 30 s
}

// HookTimeout is a hook's time limit unless it has its own.
const HookTimeout = 30 * time.Second

// Validate reports programs that can not be run.
func (h Hook) Validate() error {
	var errs []error
	if len(h.Before) == 0 && len(h.After) == 0 {
		errs = append(errs, errors.New("neither before nor after is given"))
	}
	if h.Timeout < 0 {
		errs = append(errs, fmt.Errorf("timeout of %v: it must not be negative", h.Timeout))
	}
	for _, argv := range [][]string{h.Before, h.After} {
		if len(argv) > 0 {
			errs = append(errs, runnable(argv[0]))
		}
	}
	return errors.Join(errs...)
}

func runnable(path string) error {
	if !filepath.IsAbs(path) {
		return fmt.Errorf("hook %q: give the program's full path", path)
	}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("hook %s does not exist", path)
	case err != nil:
		return fmt.Errorf("hook: %w", err)
	case info.IsDir() || info.Mode()&0o111 == 0:
		return fmt.Errorf("hook %s is not executable: chmod +x %s", path, path)
	}
	return nil
}

// The phases of a hook, as TIDEMARK_PHASE has them.
const (
	phaseBefore = "before"
	phaseAfter  = "after"
)

// maxHookOutput bounds what of a hook's output an error quotes, in bytes.
const maxHookOutput = 1 << 10

// tail keeps the end of what is written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p[max(0, len(p)-maxHookOutput):]...)
	t.b = t.b[max(0, len(t.b)-maxHookOutput):]
	return len(p), nil
}

// runHook runs a program until it ends or its time is over: then it is killed, with what it began.
func runHook(ctx context.Context, argv []string, limit time.Duration, env []string) error {
	if limit == 0 {
		limit = HookTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second // a descendant may hold its output open
	var out tail
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil && errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("hook %s: killed after %v%s", argv[0], limit, quoted(out.b))
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("hook %s is not executable: chmod +x %s", argv[0], argv[0])
	}
	return fmt.Errorf("hook %s: %w%s", argv[0], err, quoted(out.b))
}

func quoted(out []byte) string {
	if out = bytes.TrimSpace(out); len(out) == 0 {
		return ""
	}
	return fmt.Sprintf(": it said %q", out)
}

// hookEnv is what a hook finds in its environment.
func hookEnv(group, label, phase string, lsn record.LSN) []string {
	env := []string{"TIDEMARK_GROUP=" + group, "TIDEMARK_LABEL=" + label, "TIDEMARK_PHASE=" + phase}
	if lsn != 0 {
		env = append(env, "TIDEMARK_LSN="+strconv.FormatUint(uint64(lsn), 10))
	}
	return env
}
