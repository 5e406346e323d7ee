// Package config is tidemarkd's configuration: from a YAML file, from flags, or both.
//
// It promises that unknown keys are errors, that Validate reports every fault at once with
// its place, and that the zero value with one disk is enough for root to run. The caller must
// call Validate before use. Values are not safe for concurrent change. The format
// is documented in docs/operating.md. Limits: none.
package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Where things are if nothing else is said.
const (
	DefaultFile     = "/etc/tidemark/tidemark.yaml"
	DefaultStateDir = "/var/lib/tidemark"
	DefaultNBD      = "unix:/run/tidemark/nbd.sock"
	DefaultAPI      = "unix:/run/tidemark/api.sock"
)

// Config is the daemon's configuration.
type Config struct {
	StateDir string           `yaml:"state_dir"`
	NBD      []string         `yaml:"nbd"`
	API      string           `yaml:"api"`
	Log      Log              `yaml:"log"`
	TLS      TLS              `yaml:"tls"`
	Journal  Journal          `yaml:"journal"`
	Groups   map[string]Group `yaml:"groups"`
}

// Log says how to log.
type Log struct {
	Format string `yaml:"format"` // json (default) or console
	Level  string `yaml:"level"`  // debug, info (default), warn, error
}

// TLS makes the NBD listeners on TCP require TLS.
type TLS struct {
	Cert     string `yaml:"cert"`
	Key      string `yaml:"key"`
	ClientCA string `yaml:"client_ca"` // if set, clients need a certificate of it
}

// Journal says how much each group's journal may take.
type Journal struct {
	Limit      Size `yaml:"limit"`       // 0: as far as the file system has room
	Segment    Size `yaml:"segment"`     // of a segment file
	Reserve    Size `yaml:"reserve"`     // left free on the file system
	Unapplied  Size `yaml:"unapplied"`   // how far backings may be behind
	IndexCache Size `yaml:"index_cache"` // memory
}

// Group is a consistency group's disks by name.
type Group struct {
	Disks map[string]Disk `yaml:"disks"`
}

// Disk is a disk's backing.
type Disk struct {
	Backing string `yaml:"backing"`
}

// Size is a number of bytes; in text it may end in KiB, MiB, GiB or TiB.
type Size int64

// UnmarshalYAML reads a size.
func (s *Size) UnmarshalYAML(b []byte) error {
	v, err := ParseSize(strings.Trim(strings.TrimSpace(string(b)), `"'`))
	*s = v
	return err
}

// ParseSize reads a size: 1048576, 1024KiB, 1MiB.
func ParseSize(text string) (Size, error) {
	num, shift := text, 0
	for i, unit := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if n, ok := strings.CutSuffix(text, unit); ok {
			num, shift = strings.TrimSpace(n), 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(num, 10, 64)
	if err != nil || n < 0 || n<<shift>>shift != n {
		return 0, fmt.Errorf("size %q: expected bytes, or a number with KiB, MiB, GiB or TiB", text)
	}
	return Size(n << shift), nil
}

// Load reads a configuration file.
func Load(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	c, err := Parse(b)
	if err != nil {
		return Config{}, fmt.Errorf("configuration %s: %w", path, err)
	}
	return c, nil
}

// Parse reads a configuration. Keys that are not known are errors.
func Parse(b []byte) (Config, error) {
	var c Config
	err := yaml.NewDecoder(bytes.NewReader(b), yaml.Strict()).Decode(&c)
	if err != nil && !errors.Is(err, io.EOF) {
		return Config{}, err
	}
	return c, nil
}

// AddDisk adds a disk given as GROUP/DISK=BACKING.
func (c *Config) AddDisk(spec string) error {
	name, backing, ok := strings.Cut(spec, "=")
	group, disk, ok2 := strings.Cut(name, "/")
	if !ok || !ok2 || backing == "" {
		return fmt.Errorf("disk %q: expected GROUP/DISK=BACKING, as web01/vda=/images/vda.raw", spec)
	}
	if c.Groups == nil {
		c.Groups = map[string]Group{}
	}
	g := c.Groups[group]
	if g.Disks == nil {
		g.Disks = map[string]Disk{}
	}
	if _, ok := g.Disks[disk]; ok {
		return fmt.Errorf("disk %s/%s is given twice", group, disk)
	}
	g.Disks[disk] = Disk{Backing: backing}
	c.Groups[group] = g
	return nil
}

// Default fills in what was left out.
func (c *Config) Default() {
	def := func(s *string, d string) {
		if *s == "" {
			*s = d
		}
	}
	def(&c.StateDir, DefaultStateDir)
	def(&c.API, DefaultAPI)
	def(&c.Log.Format, "json")
	def(&c.Log.Level, "info")
	if len(c.NBD) == 0 {
		c.NBD = []string{DefaultNBD}
	}
}

// Validate reports every fault at once, but for those of the journal's sizes, which the journal knows.
func (c *Config) Validate() error {
	var errs []error
	add := func(place string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", place, err))
		}
	}
	for i, l := range c.NBD {
		_, _, err := ParseListen(l)
		add(fmt.Sprintf("nbd[%d]", i), err)
	}
	network, _, err := ParseListen(c.API)
	if err == nil && network != "unix" {
		err = errors.New("the API is served on a unix socket only, as unix:/run/tidemark/api.sock")
	}
	add("api", err)
	if !slices.Contains([]string{"json", "console"}, c.Log.Format) {
		add("log.format", fmt.Errorf("%q: json or console", c.Log.Format))
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.Log.Level) {
		add("log.level", fmt.Errorf("%q: debug, info, warn or error", c.Log.Level))
	}
	if (c.TLS.Cert == "") != (c.TLS.Key == "") || c.TLS.ClientCA != "" && c.TLS.Cert == "" {
		add("tls", errors.New("cert and key go together, client_ca needs both"))
	}
	if len(c.Groups) == 0 {
		add("groups", errors.New("no disk is given: use --disk GROUP/DISK=BACKING or a configuration file"))
	}
	for _, name := range slices.Sorted(maps.Keys(c.Groups)) {
		g := c.Groups[name]
		add("groups."+name, record.CheckName(name))
		if len(g.Disks) == 0 {
			add("groups."+name, errors.New("it has no disks"))
		}
		for _, disk := range slices.Sorted(maps.Keys(g.Disks)) {
			d := g.Disks[disk]
			place := fmt.Sprintf("groups.%s.disks.%s", name, disk)
			add(place, record.CheckName(disk))
			if d.Backing == "" {
				add(place, errors.New("backing is missing"))
			}
		}
	}
	return errors.Join(errs...)
}

// ParseListen reads unix:PATH or tcp:HOST:PORT.
func ParseListen(s string) (network, addr string, err error) {
	network, addr, ok := strings.Cut(s, ":")
	switch {
	case ok && network == "unix" && addr != "":
		return network, addr, nil
	case ok && network == "tcp":
		if _, _, err := net.SplitHostPort(addr); err == nil {
			return network, addr, nil
		}
	}
	return "", "", fmt.Errorf("address %q: expected unix:PATH or tcp:HOST:PORT", s)
}

// Server makes the server's TLS configuration; nil if none is set.
func (t TLS) Server() (*tls.Config, error) {
	if t.Cert == "" {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, fmt.Errorf("tls: %w", err)
	}
	conf := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	if t.ClientCA != "" {
		pem, err := os.ReadFile(t.ClientCA)
		if err != nil {
			return nil, fmt.Errorf("tls.client_ca: %w", err)
		}
		conf.ClientCAs = x509.NewCertPool()
		if !conf.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("tls.client_ca: %s holds no certificate", t.ClientCA)
		}
		conf.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return conf, nil
}
