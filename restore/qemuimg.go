package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
)

// QCOW2 has qemu-img read the export at an NBD URI and write a qcow2 image at
// path. Its progress goes to progress, if not nil.
func QCOW2(ctx context.Context, uri, path string, force bool, progress io.Writer) error {
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		return errors.New("restore to qcow2 takes qemu-img: install it (apt-get install qemu-utils), or restore to raw")
	}
	args := []string{"convert", "-f", "raw", "-O", "qcow2"}
	if progress != nil {
		args = append(args, "-p")
	}
	return replace(path, force, func(f *os.File) error {
		cmd := exec.CommandContext(ctx, tool, append(args, uri, f.Name())...)
		cmd.Stdout = progress
		var stderr tail
		cmd.Stderr = &stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("qemu-img: %w: %s", err, stderr.b)
		}
		return nil
	})
}

// tail keeps the last bytes written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	t.b = t.b[max(0, len(t.b)-4096):]
	return len(p), nil
}
