package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/tidemark-cdp/tidemark/nbd/client"
)

// The disks of the figures about getting things back.
const (
	restoreDisk = 8 << 30   // half full
	wideDisk    = 100 << 30 // with 8 GiB of files
	smallFiles  = 20000     // of 4 KiB
)

// makeDisk makes an ext4 on a sparse disk: large files of a GiB together, small ones, and fill files of 256 MiB beside them.
func (b *bench) makeDisk(size int64, fill int) error {
	if err := os.RemoveAll(b.disk); err != nil {
		return err
	}
	return b.sh(fmt.Sprintf(`truncate -s %d '%s'; mkfs.ext4 -q '%s'; m=$(mktemp -d); mount -o loop '%s' $m
		mkdir $m/large $m/small $m/fill; for i in 1 2 3 4; do head -c 256M /dev/urandom >$m/large/$i; done
		python3 -c "import os; [open('$m/small/%%d' %% i, 'wb').write(os.urandom(4096)) for i in range(%d)]"
		for i in $(seq %d); do head -c 256M /dev/urandom >$m/fill/$i; done
		umount $m; rmdir $m; sync`, size, b.disk, b.disk, b.disk, smallFiles, fill))
}

func (b *bench) sh(script string) error {
	out, err := exec.CommandContext(b.ctx, "sh", "-ec", script).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// cold has the kernel forget what it has read. Of a guest's free memory the host may have taken some back, for which the first to use
// it would pay: it is used before.
func (b *bench) cold() error {
	return b.sh("sync; echo 3 >/proc/sys/vm/drop_caches; t=$(mktemp /dev/shm/tidemark-bench-XXXX); trap 'rm $t' EXIT; head -c 4G /dev/zero >$t || :")
}

// timed is how long fn takes, from a cold cache on.
func (b *bench) timed(fn func() error) (float64, error) {
	if err := b.cold(); err != nil {
		return 0, err
	}
	began := time.Now()
	err := fn()
	return time.Since(began).Seconds(), err
}

// pair times two things in turn, and returns their medians.
func (b *bench) pair(rounds int, ours, theirs func() (float64, error)) (a, o float64, err error) {
	var all [2][]float64
	for range rounds {
		for i, fn := range []func() (float64, error){ours, theirs} {
			v, err := fn()
			if err != nil {
				return 0, 0, err
			}
			all[i] = append(all[i], v)
		}
	}
	return median(all[0]), median(all[1]), nil
}

func row(job, against string, ours, theirs float64, atLeast, aim string) string {
	return fmt.Sprintf("| %s | %s | %.3f s | %.3f s | %.2f | %s | %s |", job, against, ours, theirs, theirs/ours, atLeast, aim)
}

// back measures the ways of getting things back.
func (b *bench) back(rounds int, isolated bool) (rows []string, err error) {
	add := func(r string, err error) error {
		if err == nil {
			fmt.Println(r)
			rows = append(rows, r)
		}
		return err
	}
	if err := b.makeDisk(restoreDisk, 12); err != nil {
		return nil, err
	}
	s, err := b.start("tidemark")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := b.call("mark", "bench", "then"); err != nil {
		return nil, err
	}
	image := filepath.Join(b.dir, "image.raw")
	if err := add(b.changedSince(s, rounds)); err != nil {
		return rows, fmt.Errorf("changes: %w", err)
	}
	if _, err := b.fio(s.uri, "randwrite", "64k", 16, 0, "--size=8G", "--io_size=2G", "--end_fsync=1"); err != nil {
		return nil, err
	}
	if err := b.settled(); err != nil {
		return nil, err
	}
	if err := add(b.wholeDisk(image, rounds)); err != nil {
		return rows, fmt.Errorf("restore: %w", err)
	}
	if err := add(b.firstBlock(s, rounds)); err != nil {
		return rows, fmt.Errorf("first block: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(image)) }()
	files, err := b.files(image, rounds, isolated)
	for _, r := range files {
		if err := add(r, nil); err != nil {
			return rows, err
		}
	}
	return rows, err
}

func (b *bench) call(args ...string) error {
	out, err := b.tidemark(args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("tidemark %v: %w: %s", args, err, out)
	}
	return nil
}

// wholeDisk restores the disk as of the marker, against a copy of the backing.
func (b *bench) wholeDisk(image string, rounds int) (string, error) {
	copied := image + ".copy"
	ours, theirs, err := b.pair(rounds, func() (float64, error) {
		if err := os.RemoveAll(image); err != nil {
			return 0, err
		}
		return b.timed(func() error { return b.call("restore", "bench/disk@then", "--to", image) })
	}, func() (float64, error) {
		if err := os.RemoveAll(copied); err != nil {
			return 0, err
		}
		// Tidemark's image is durable when the command returns; a copy is made so.
		return b.timed(func() error {
			return b.sh(fmt.Sprintf("qemu-img convert -f raw -O raw '%s' '%s'; sync '%s'", b.disk, copied, copied))
		})
	})
	return row("restore a 8 GiB disk half full, 2 GiB of history behind the point", "`qemu-img convert` of the raw backing, and sync", ours, theirs, "0.8", "1"), errors.Join(err, os.RemoveAll(copied))
}

// changedSince brings a copy up to date after a hundredth of the disk has changed, against a full restore.
func (b *bench) changedSince(s *server, rounds int) (string, error) {
	image := filepath.Join(b.dir, "nightly.raw")
	n := 0
	last := "then"
	if err := b.call("restore", "bench/disk@then", "--to", image); err != nil {
		return "", err
	}
	ours, theirs, err := b.pair(rounds, func() (float64, error) {
		n++
		label := "change-" + strconv.Itoa(n)
		if _, err := b.fio(s.uri, "randwrite", "64k", 16, 0, "--size=8G", "--io_size="+strconv.Itoa(restoreDisk/100), "--end_fsync=1"); err != nil {
			return 0, err
		}
		if err := errors.Join(b.settled(), b.call("mark", "bench", label)); err != nil {
			return 0, err
		}
		v, err := b.timed(func() error { return b.call("restore", "bench/disk@"+label, "--to", image, "--changed-since", last) })
		last = label
		return v, err
	}, func() (float64, error) {
		full := image + ".full"
		if err := os.RemoveAll(full); err != nil {
			return 0, err
		}
		v, err := b.timed(func() error { return b.call("restore", "bench/disk@"+last, "--to", full) })
		return v, errors.Join(err, os.RemoveAll(full))
	})
	return row("`--changed-since` with 1 % changed, 64 KiB writes", "a full restore", ours, theirs, "20", "50"), errors.Join(err, os.RemoveAll(image))
}

// firstBlock is from the command that makes a scratch export to the first block that is read from it.
func (b *bench) firstBlock(s *server, rounds int) (string, error) {
	var all []float64
	for n := range 3 * rounds {
		name := "first-" + strconv.Itoa(n)
		v, err := b.timed(func() error {
			if err := b.call("export", "bench@then", "--scratch", "--name", name); err != nil {
				return err
			}
			c, err := client.Dial(b.ctx, "unix", s.sock, "scratch/"+name+"/disk", nil)
			if err != nil {
				return err
			}
			return errors.Join(c.ReadAt(make([]byte, 4096), 0), c.Close())
		})
		if err := errors.Join(err, b.call("unexport", name, "--force")); err != nil {
			return "", err
		}
		all = append(all, v)
	}
	return fmt.Sprintf("| a VM's first block from `export --scratch` | – | %.0f ms | | | 1 s | 50 ms |", median(all)*1000), nil
}

// mounted is a mount by one of the programs.
type mounted struct {
	cmd *exec.Cmd
	dir string
}

// mount has tidemark mount the group; it is there when this returns.
func (b *bench) mount(args ...string) (*mounted, error) {
	dir, err := os.MkdirTemp(b.dir, "mnt")
	if err != nil {
		return nil, err
	}
	m := &mounted{cmd: b.tidemark(append([]string{"mount", "bench", dir}, args...)...), dir: dir}
	m.cmd.Cancel = func() error { return m.cmd.Process.Signal(syscall.SIGTERM) }
	m.cmd.Stderr = os.Stderr
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return nil, errors.Join(fmt.Errorf("tidemark mount says %q: %w", line, err), m.cmd.Wait())
	}
	return m, nil
}

func (m *mounted) end() error {
	return errors.Join(m.cmd.Process.Signal(syscall.SIGTERM), m.cmd.Wait(), os.Remove(m.dir))
}

// copyOut times a copy of a directory to memory.
func (b *bench) copyOut(from string) (float64, error) {
	to, err := os.MkdirTemp("/dev/shm", "tidemark-bench")
	if err != nil {
		return 0, err
	}
	v, err := b.timed(func() error { return b.sh(fmt.Sprintf("cp -r '%s' '%s/out'", from, to)) })
	return v, errors.Join(err, os.RemoveAll(to))
}

// fileWay is a way of showing files, and what it is compared with: another mount of a restored image.
type fileWay struct {
	name, against  string
	args           []string // of tidemark mount
	mount, unmount string   // the other's commands: of image and directory, and of the directory
	atLeast, aim   [2]string
}

var fileWays = []fileWay{
	{"`--kernel`", "the kernel's loop mount of the restored image", []string{"--kernel"},
		"mount -o loop,ro '%s' '%s'", "umount '%s'", [2]string{"0.5", "0.3"}, [2]string{"0.8", "0.7"}},
	{"isolated", "guestmount of the restored image", nil,
		"LIBGUESTFS_BACKEND=direct guestmount --ro --format=raw -a '%s' -m /dev/sda '%s'", "guestunmount '%s'", [2]string{"0.8", "0.8"}, [2]string{"1", "1"}},
}

// files copies files out of mounts, against mounts of a restored image.
func (b *bench) files(image string, rounds int, isolated bool) (rows []string, err error) {
	jobs := []struct{ name, dir string }{{"copying 1 GiB in large files out of a mount", "large"}, {"copying 20,000 small files out", "small"}}
	for _, w := range fileWays {
		if w.args == nil && !isolated {
			continue
		}
		for i, j := range jobs {
			ours, theirs, err := b.pair(rounds, func() (float64, error) { return b.copyOurs(w, j.dir) }, func() (float64, error) { return b.copyTheirs(w, image, j.dir) })
			if err != nil {
				return rows, fmt.Errorf("%s, %s: %w", j.name, w.name, err)
			}
			rows = append(rows, row(j.name+", "+w.name, w.against, ours, theirs, w.atLeast[i], w.aim[i]))
		}
	}
	return rows, nil
}

func (b *bench) copyOurs(w fileWay, dir string) (v float64, err error) {
	m, err := b.mount(w.args...)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	files := filepath.Join(m.dir, "at/then/disk/files")
	if _, err := os.ReadDir(files); err != nil {
		return 0, err
	}
	return b.copyOut(filepath.Join(files, dir))
}

func (b *bench) copyTheirs(w fileWay, image, dir string) (v float64, err error) {
	at, err := os.MkdirTemp(b.dir, "other")
	if err != nil {
		return 0, err
	}
	if err := b.sh(fmt.Sprintf(w.mount, image, at)); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, b.sh(fmt.Sprintf(w.unmount, at)), os.Remove(at)) }()
	return b.copyOut(filepath.Join(at, dir))
}

// wide mounts a disk of 100 GiB until its first directory is listed, against a restore and a loop mount.
func (b *bench) wide(rounds int) (r string, err error) {
	if err := b.makeDisk(wideDisk, 28); err != nil {
		return "", err
	}
	s, err := b.start("tidemark")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := b.call("mark", "bench", "then"); err != nil {
		return "", err
	}
	image := filepath.Join(b.dir, "wide.raw")
	ours, theirs, err := b.pair(rounds, func() (float64, error) {
		var m *mounted
		v, err := b.timed(func() (err error) {
			if m, err = b.mount("--kernel"); err != nil {
				return err
			}
			_, err = os.ReadDir(filepath.Join(m.dir, "at/then/disk/files"))
			return err
		})
		if m != nil {
			err = errors.Join(err, m.end())
		}
		return v, err
	}, func() (float64, error) {
		dir, err := os.MkdirTemp(b.dir, "loop")
		if err != nil {
			return 0, err
		}
		v, err := b.timed(func() error {
			return errors.Join(b.call("restore", "bench/disk@then", "--to", image), b.sh(fmt.Sprintf("mount -o loop,ro '%s' '%s'; ls '%s' >/dev/null", image, dir, dir)))
		})
		return v, errors.Join(err, b.sh("umount '"+dir+"'"), os.Remove(dir), os.RemoveAll(image))
	})
	return row("`mount --kernel` to first `ls`, a 100 GiB disk with 8 GiB of files", "restore, and loop mount of the image", ours, theirs, "100", "1000"), err
}
