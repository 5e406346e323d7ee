// Package config is tidemarkd's configuration: from a YAML file, from flags, or both.
//
// It promises that unknown keys are errors, that Validate reports every fault at once with
// its place, and that the zero value with one disk is enough for root to run. The caller must
// call Validate before use. Values are not safe for concurrent change. The format
// is documented in docs/operating.md. Limits: none.
package config

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"

	"github.com/tidemark-cdp/tidemark/guest"
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
	StateDir string   `yaml:"state_dir"`
	NBD      []string `yaml:"nbd"`
	API      string   `yaml:"api"`
	Log      Log      `yaml:"log"`
	TLS      TLS      `yaml:"tls"`
	Journal  Journal  `yaml:"journal"`
	// SocketGroup may connect to the unix sockets of NBD and of guests' ports; root's own group by default.
	SocketGroup string `yaml:"socket_group"`

	Metrics string           `yaml:"metrics"` // tcp:HOST:PORT; they are on the control socket too
	Guests  Guests           `yaml:"guests"`
	Groups  map[string]Group `yaml:"groups"`

	Replication Replication `yaml:"replication"`
	Scrub       Scrub       `yaml:"scrub"`
	Compact     Compact     `yaml:"compact"`
}

// Guests is what holds of the guests of all groups.
type Guests struct {
	MaxFrozen int `yaml:"max_frozen"` // how many may be frozen at once; 4 by default
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

// Journal says how much the groups' journals may take.
type Journal struct {
	Limit      Size `yaml:"limit"`       // of each group; 0: as far as the file system has room
	Total      Size `yaml:"total"`       // of all groups; 0: as far as the file system has room
	Segment    Size `yaml:"segment"`     // of a segment file
	Reserve    Size `yaml:"reserve"`     // left free on the file system
	Unapplied  Size `yaml:"unapplied"`   // how far backings may be behind
	IndexCache Size `yaml:"index_cache"` // memory
}

// Scrub says how everything is verified in the background.
type Scrub struct {
	Every *Span `yaml:"every"` // how long after the last time a group is verified again; 30d by default, 0: never
	Rate  *Size `yaml:"rate"`  // how many bytes a second are read; 16 MiB by default, 0: none
}

// ScrubEvery and ScrubRate are what Scrub has by default.
const (
	ScrubEvery = Span(30 * 24 * time.Hour)
	ScrubRate  = Size(16 << 20)
)

// Compact says how history is made smaller in the background.
type Compact struct {
	After *Span `yaml:"after"` // how long a segment was closed before; 1m by default
	Rate  *Size `yaml:"rate"`  // how many bytes a second are read, each twice, of all groups; 32 MiB by default, 0: none
}

// CompactAfter and CompactRate are what Compact has by default.
const (
	CompactAfter = Span(time.Minute)
	CompactRate  = Size(32 << 20)
)

func (c *Compact) setDefaults() {
	setDefault(&c.After, CompactAfter)
	setDefault(&c.Rate, CompactRate)
}

func (s *Scrub) setDefaults() {
	setDefault(&s.Every, ScrubEvery)
	setDefault(&s.Rate, ScrubRate)
}

// setDefault sets what was not given. Zero can be given.
func setDefault[T any](p **T, value T) {
	if *p == nil {
		*p = &value
	}
}

// Group is a consistency group's disks by name, and the guests that write them.
type Group struct {
	Disks       map[string]Disk       `yaml:"disks"`
	Guests      map[string]Guest      `yaml:"guests"`
	Hooks       []Hook                `yaml:"hooks"`
	FreezeWait  time.Duration         `yaml:"freeze_wait"`  // how long guests may take to come to rest, with their own hooks; 30s by default
	FreezeLimit time.Duration         `yaml:"freeze_limit"` // how long they may be frozen then; 2s by default
	Markers     Markers               `yaml:"markers"`
	Definitions map[string]Definition `yaml:"definitions"`
	// Trusted lets the host's kernel read the guests' file systems: fast, and what is in them is believed not to attack it.
	Trusted bool `yaml:"trusted"`
	// Replicas are peers that the group is shipped to while this daemon writes it.
	Replicas []string `yaml:"replicas"`
	// Retain says which points are kept.
	Retain Retain `yaml:"retain"`
	// RPO is how far a replica may be behind before that is a problem; 0: as far as it likes.
	RPO time.Duration `yaml:"rpo"`
	// Received says that the group's journal came from another daemon: it is never begun here.
	Received bool `yaml:"received"`
}

// Guest says how a guest is reached.
type Guest struct {
	Agent   string   `yaml:"agent"`   // the socket of its QEMU guest agent; or
	Libvirt string   `yaml:"libvirt"` // its domain, which is its definition too
	Socket  string   `yaml:"socket"`  // libvirt's; /run/libvirt/libvirt-sock by default
	Mounts  []string `yaml:"mounts"`  // freeze these only
	Port    string   `yaml:"port"`    // socket to listen on for markers from inside
}

// Spec is how the guest is frozen.
func (g Guest) Spec() guest.Spec {
	return guest.Spec{Agent: g.Agent, Libvirt: g.Libvirt, Socket: g.Socket, Mounts: g.Mounts}
}

// Freezes reports whether the guest can be frozen, or has a port only.
func (g Guest) Freezes() bool { return g.Agent != "" || g.Libvirt != "" }

// Hook is a pair of programs of the host, by their arguments.
type Hook struct {
	Before  []string      `yaml:"before"`
	After   []string      `yaml:"after"`
	Timeout time.Duration `yaml:"timeout"` // of each; 30s by default
}

// Markers says which markers come by themselves.
type Markers struct {
	Every       time.Duration `yaml:"every"`       // 0: none do
	Consistency string        `yaml:"consistency"` // crash by default
	Jitter      time.Duration `yaml:"jitter"`      // at most this much later, each
	OrCrash     bool          `yaml:"or_crash"`    // a crash-consistent one rather than none
	Label       string        `yaml:"label"`       // before the time; auto by default
}

// Definition is a file that defines a guest.
type Definition struct {
	File string `yaml:"file"`
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

// AddGuest adds a guest given as GROUP=SPEC or GROUP/GUEST=SPEC.
func (c *Config) AddGuest(text string) error {
	name, rest, ok := strings.Cut(text, "=")
	if !ok {
		return fmt.Errorf("guest %q: expected GROUP=agent:PATH or GROUP=libvirt:DOMAIN", text)
	}
	spec, err := guest.ParseSpec(rest)
	if err != nil {
		return err
	}
	group, named, ok := strings.Cut(name, "/")
	if !ok {
		named = group
	}
	g, ok := c.Groups[group]
	if !ok {
		return fmt.Errorf("guest %q: there is no group %s: give its disks too", text, group)
	}
	if g.Guests == nil {
		g.Guests = map[string]Guest{}
	}
	if _, ok := g.Guests[named]; ok {
		return fmt.Errorf("guest %s of group %s is given twice", named, group)
	}
	g.Guests[named] = Guest{Agent: spec.Agent, Libvirt: spec.Libvirt}
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
	if c.Guests.MaxFrozen == 0 {
		c.Guests.MaxFrozen = 4
	}
	c.Replication.setDefaults(c.StateDir)
	c.Scrub.setDefaults()
	c.Compact.setDefaults()
	for name, g := range c.Groups {
		def(&g.Markers.Consistency, record.Crash.String())
		def(&g.Markers.Label, "auto")
		g.FreezeWait = cmp.Or(g.FreezeWait, guest.DefaultWait)
		g.FreezeLimit = cmp.Or(g.FreezeLimit, guest.DefaultLimit)
		c.Groups[name] = g
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
	errs = append(errs, c.Replication.validate())
	if len(c.Groups) == 0 && !c.Replication.On() {
		add("groups", errors.New("no disk is given: use --disk GROUP/DISK=BACKING or a configuration file"))
	}
	c.validateGroups(add)
	if c.Metrics != "" {
		network, _, err := ParseListen(c.Metrics)
		if err == nil && network != "tcp" {
			err = errors.New("metrics are on the control socket anyway: give tcp:HOST:PORT, or nothing")
		}
		add("metrics", err)
	}
	if c.Guests.MaxFrozen < 1 {
		add("guests.max_frozen", fmt.Errorf("%d: it must be at least 1", c.Guests.MaxFrozen))
	}
	return errors.Join(errs...)
}

// validateGroups calls add with each fault of a group, and where it is.
func (c *Config) validateGroups(add func(place string, err error)) {
	ports := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(c.Groups)) {
		g := c.Groups[name]
		for _, one := range slices.Sorted(maps.Keys(g.Guests)) {
			place, port := fmt.Sprintf("groups.%s.guests.%s", name, one), g.Guests[one].Port
			if other, ok := ports[port]; ok && port != "" {
				add(place, fmt.Errorf("its port %s is that of %s too", port, other))
			}
			if port != "" && !filepath.IsAbs(port) {
				add(place, fmt.Errorf("port %q: give the socket's full path", port))
			}
			ports[port] = place
		}
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
		add("groups."+name, g.validate())
	}
}

// validate reports every fault of what a group has beside its disks.
func (g *Group) validate() error {
	var errs []error
	add := func(place string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", place, err))
		}
	}
	freezes := false
	for _, name := range slices.Sorted(maps.Keys(g.Guests)) {
		one := g.Guests[name]
		place := "guests." + name
		add(place, record.CheckName(name))
		if one.Freezes() || one.Port == "" {
			add(place, one.Spec().Validate())
		}
		freezes = freezes || one.Freezes()
		if _, ok := g.Definitions[name]; ok && one.Libvirt != "" {
			add("definitions."+name, errors.New("the domain of the guest with this name is its definition: leave out one of the two"))
		}
	}
	for i, h := range g.Hooks {
		add(fmt.Sprintf("hooks[%d]", i), guest.Hook(h).Validate())
	}
	for key, v := range map[string]time.Duration{"freeze_wait": g.FreezeWait, "freeze_limit": g.FreezeLimit} {
		if v < 0 {
			add(key, fmt.Errorf("%v: it must not be negative", v))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(g.Definitions)) {
		add("definitions."+name, record.CheckName(name))
		if g.Definitions[name].File == "" {
			add("definitions."+name, errors.New("file is missing"))
		}
	}
	add("markers", g.Markers.validate(freezes, len(g.Hooks) > 0))
	for i, peer := range g.Replicas {
		add(fmt.Sprintf("replicas[%d]", i), record.CheckName(peer))
		if slices.Contains(g.Replicas[:i], peer) {
			add(fmt.Sprintf("replicas[%d]", i), fmt.Errorf("%s is given twice", peer))
		}
	}
	_, err := g.Retain.Policy()
	add("retain", err)
	if g.RPO < 0 {
		add("rpo", fmt.Errorf("%v: it must not be negative", g.RPO))
	}
	return errors.Join(errs...)
}

func (m Markers) validate(freezes, hooks bool) error {
	var errs []error
	c, err := record.ParseConsistency(m.Consistency)
	errs = append(errs, err)
	switch {
	case m.Every < 0 || m.Every > 0 && m.Every < time.Second:
		errs = append(errs, fmt.Errorf("every %v: at least 1s is needed", m.Every))
	case m.Jitter < 0 || m.Every > 0 && m.Jitter >= m.Every:
		errs = append(errs, fmt.Errorf("jitter of %v: less than every (%v) is needed", m.Jitter, m.Every))
	}
	if err == nil && m.Every > 0 && (c == record.Filesystem && !freezes || c == record.Application && !freezes && !hooks) {
		errs = append(errs, fmt.Errorf("%v markers need guests that can be frozen (agent or libvirt)", c))
	}
	if err := record.CheckLabel(m.Label + "-20060102T150405Z"); err != nil {
		errs = append(errs, err)
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
