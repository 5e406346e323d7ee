package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/tidemark-cdp/tidemark/cmd/internal/api"
	"github.com/tidemark-cdp/tidemark/restore"
)

// restoredGroup is the verb's JSON for a group, and what stands in the directory as restore.json.
type restoredGroup struct {
	Group       string     `json:"group"`
	Point       string     `json:"point"`
	LSN         uint64     `json:"lsn"`
	Store       string     `json:"store"`
	Disks       []restored `json:"disks"`
	Definitions []string   `json:"definitions"` // files
	Complete    bool       `json:"complete"`
}

const manifestName = "restore.json"

// group restores all disks that the group had at the point, and the definitions, to a directory.
func (r *restoring) group() error {
	dir := r.f.to
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	was, err := readManifest(dir)
	if err != nil {
		return err
	}
	if was != nil && was.Complete && !r.f.force && r.f.since == "" {
		return fmt.Errorf("%s has group %s as of LSN %d: %w; --force replaces it, --changed-since brings it up to date", dir, was.Group, was.LSN, fs.ErrExist)
	}
	unfinished := was != nil && !was.Complete && was.Group == r.name.Group
	var left restore.Origin
	if unfinished {
		left = restore.Origin{Store: was.Store, Point: was.Point, LSN: was.LSN}
	}
	if err := r.at(left, unfinished); err != nil {
		return err
	}
	disks, err := r.disksAt()
	if err != nil {
		return err
	}
	out := restoredGroup{Group: r.name.Group, Point: r.name.Point.String(), LSN: r.lsn, Store: r.status.Store, Disks: []restored{}, Definitions: []string{}}
	if err := writeManifest(dir, out); err != nil {
		return err
	}
	for _, d := range disks {
		one, err := r.member(dir, d)
		if err != nil {
			return err
		}
		out.Disks = append(out.Disks, one)
	}
	if out.Definitions, err = r.definitions(dir); err != nil {
		return err
	}
	out.Complete = true
	if err := writeManifest(dir, out); err != nil {
		return err
	}
	if r.json {
		return printJSON(r.cmd, out)
	}
	for _, one := range out.Disks {
		if err := r.say(one); err != nil {
			return err
		}
	}
	for _, path := range out.Definitions {
		fmt.Fprintf(r.cmd.OutOrStdout(), "the definition is in %s\n", path)
	}
	return nil
}

// disksAt are the disks that a group had at the restore's LSN.
func (r *restoring) disksAt() ([]string, error) { return disksAt(r.status, r.name.Group, r.lsn) }

// disksAt are the disks that a group had at an LSN.
func disksAt(s api.Status, group string, lsn uint64) ([]string, error) {
	g, err := findGroup(s, group)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, d := range g.Disks {
		switch {
		case d.Added > lsn:
		case d.Removed == 0:
			names = append(names, d.Name)
		case d.Removed > lsn:
			return nil, fmt.Errorf("disk %s was in group %s at LSN %d and is not now: add it again to see its past, or restore the other disks one by one", d.Name, g.Name, lsn)
		}
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("group %s had no disk at LSN %d", g.Name, lsn)
	}
	return names, nil
}

// member restores one disk of the group; what an earlier call finished stays.
func (r *restoring) member(dir, disk string) (restored, error) {
	path := filepath.Join(dir, disk+"."+r.f.format)
	t := r.target(disk, path)
	_, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		t.copy = false // a disk that came since the copy was made
	}
	if err == nil && !r.f.restart {
		want := r.origin(disk)
		if was, serr := restore.StampedAt(path); serr == nil && was.Store == want.Store && was.Disk == want.Disk && was.LSN == want.LSN && !r.f.verify {
			info, err := os.Stat(path)
			if err != nil {
				return restored{}, err
			}
			return restored{Group: r.name.Group, Disk: disk, LSN: r.lsn, To: path, Format: r.f.format, Size: info.Size()}, nil
		}
	}
	return r.disk(t)
}

func (r *restoring) definitions(dir string) (paths []string, err error) {
	all, err := r.client.Definitions(r.cmd.Context(), r.name.Group, fmt.Sprintf("lsn:%d", r.lsn))
	if err != nil {
		var e *api.Error
		if errors.As(err, &e) && e.Code == api.CodeNotFound {
			return []string{}, nil
		}
		return nil, err
	}
	paths = []string{}
	for _, d := range all.Definitions {
		// Names are checked where they are journaled: no separators.
		path := filepath.Join(dir, filepath.Base(d.Name)+".definition")
		if err := os.WriteFile(path, d.Content, 0o600); err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	return paths, nil
}

func readManifest(dir string) (*restoredGroup, error) {
	b, err := os.ReadFile(filepath.Join(dir, manifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var m restoredGroup
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%s is not what a restore left there: %w", filepath.Join(dir, manifestName), err)
	}
	return &m, nil
}

func writeManifest(dir string, m restoredGroup) error {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, manifestName)
	return errors.Join(os.WriteFile(path+".new", append(b, '\n'), 0o600), os.Rename(path+".new", path))
}
