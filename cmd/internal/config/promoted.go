package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/goccy/go-yaml"
)

// Groups that came to be while the daemon ran stand in files of their own, GROUP.yaml in this directory of the state
// directory, until the operator takes them into the configuration. There they count for more.
const promotedDir = "promoted"

type promoted struct {
	Groups map[string]promotedGroup `yaml:"groups"`
}

type promotedGroup struct {
	Disks    map[string]Disk `yaml:"disks"`
	Received bool            `yaml:"received,omitempty"`
}

// WritePromoted writes the file of a group that came to be while the daemon ran, by a function that makes it, and the directory
// that it is in, durable.
func WritePromoted(stateDir, name string, g Group, write func(path string, b []byte) error) (path string, err error) {
	b, err := yaml.Marshal(promoted{map[string]promotedGroup{name: {g.Disks, g.Received}}})
	if err != nil {
		return "", err
	}
	b = append([]byte("# Made by tidemarkd. Move the group to the daemon's configuration, remove this file, then: tidemark reload\n"), b...)
	path = filepath.Join(stateDir, promotedDir, name+".yaml")
	return path, write(path, b)
}

// AddPromoted adds the groups of such files that the configuration has not got.
func (c *Config) AddPromoted() error {
	dir := filepath.Join(c.stateDir(), promotedDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".yaml") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		p, err := Parse(b)
		if err != nil {
			return fmt.Errorf("configuration %s: %w", path, err)
		}
		for name, g := range p.Groups {
			if _, ok := c.Groups[name]; ok {
				continue
			}
			if c.Groups == nil {
				c.Groups = map[string]Group{}
			}
			c.Groups[name] = g
		}
	}
	return nil
}

func (c *Config) stateDir() string {
	if c.StateDir == "" {
		return DefaultStateDir
	}
	return c.StateDir
}
