package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// database is PostgreSQL on a file system on an exported disk.
type database struct {
	dev  string // the block device that the disk is here
	data string // PostgreSQL's directory
	bin  string
	at   string // arguments of its clients
	undo []func() error
}

// database makes one, with pgbench's tables, on a disk that is served here. Its close must be called whatever the error.
func (b *bench) database(uri string) (d *database, err error) {
	d = &database{}
	mnt, fuse := filepath.Join(b.dir, "mnt"), filepath.Join(b.dir, "fuse")
	if err := errors.Join(os.MkdirAll(mnt, 0o755), os.MkdirAll(fuse, 0o755)); err != nil {
		return d, err
	}
	if err := d.attach(uri, fuse); err != nil {
		return d, err
	}
	if err := tools("mkfs.ext4 -q "+d.dev, "mount "+d.dev+" "+mnt); err != nil {
		return d, err
	}
	d.undo = append(d.undo, func() error { return tools("umount " + mnt) })
	bin, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(bin) == 0 {
		return d, errors.New("no PostgreSQL: run make guest-deps")
	}
	d.bin, d.data = bin[len(bin)-1], mnt+"/data"
	d.at = " -h " + mnt + "/sock -U postgres postgres"
	if err := tools("mkdir "+d.data+" "+mnt+"/sock", "chown postgres "+d.data+" "+mnt+"/sock", d.pg("initdb -D "+d.data+" -A trust"),
		d.pg("pg_ctl -w -D "+d.data+" -l "+d.data+"/log -o \"-k "+mnt+"/sock -c listen_addresses=\" start")); err != nil {
		return d, err
	}
	d.undo = append(d.undo, func() error { return tools(d.pg("pg_ctl -w -m fast -D " + d.data + " stop")) })
	return d, tools(d.pg("pgbench -q -i -s 20"+d.at), "sync")
}

// attach makes the disk a block device here.
func (d *database) attach(uri, fuse string) error {
	nbdfuse := exec.Command("nbdfuse", fuse, uri)
	if err := nbdfuse.Start(); err != nil {
		return err
	}
	d.undo = append(d.undo, func() error {
		_ = exec.Command("fusermount3", "-u", fuse).Run() // it ends with that
		return nbdfuse.Wait()
	})
	file := filepath.Join(fuse, "nbd")
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			break
		} else if time.Now().After(end) {
			return fmt.Errorf("nbdfuse shows no disk: %w", err)
		}
	}
	loop, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		return fmt.Errorf("losetup: %w", err)
	}
	d.dev = strings.TrimSpace(string(loop))
	d.undo = append(d.undo, func() error { return tools("losetup -d " + d.dev) })
	return nil
}

func (d *database) pg(cmd string) string { return "runuser -u postgres -- " + d.bin + "/" + cmd }

// pgbench runs for some seconds, and returns how many bytes it and what it left in caches wrote to the disk.
func (d *database) pgbench(seconds int) (int64, error) {
	from, err := d.written()
	if err != nil {
		return 0, err
	}
	if err := tools(d.pg(fmt.Sprintf("pgbench -c 4 -T %d%s", seconds, d.at)), "sync"); err != nil {
		return 0, err
	}
	to, err := d.written()
	return to - from, err
}

// written is how many bytes were written to the disk.
func (d *database) written() (int64, error) {
	b, err := os.ReadFile("/sys/block/" + filepath.Base(d.dev) + "/stat")
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(b))
	if len(f) < 7 {
		return 0, fmt.Errorf("/sys/block: %q", b)
	}
	n, err := strconv.ParseInt(f[6], 10, 64)
	return n * 512, err
}

// close takes it down, and the device with it.
func (d *database) close() (err error) {
	for _, undo := range slices.Backward(d.undo) {
		err = errors.Join(err, undo())
	}
	d.undo = nil
	return err
}

// tools runs commands of a shell.
func tools(lines ...string) error {
	for _, line := range lines {
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", line, err, out)
		}
	}
	return nil
}
