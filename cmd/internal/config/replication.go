package config

import (
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Replication says how groups are shipped to other daemons, and taken from them.
type Replication struct {
	Listen string `yaml:"listen"` // tcp:HOST:PORT for peers; empty: this daemon dials
	Name   string `yaml:"name"`   // of this daemon, for peers; the host's by default
	Dir    string `yaml:"dir"`    // where the disks of groups that come are kept; STATE_DIR/replicas by default
	// MostGroups is how many groups, about, a peer may send by its patterns; what is named to it comes on top.
	MostGroups int `yaml:"most_groups"`
	// Compression of what is sent, 0 (none) to 4 (most); 2 by default. It gives way to a link that waits for it.
	Compression *int   `yaml:"compression"`
	Limit       Size   `yaml:"limit"` // of what is sent, to all peers, bytes a second; 0: none
	Hours       []Hour `yaml:"hours"` // when there is another limit

	// A certificate of one's own, with its chain, its key, and the authority whose certificates are taken of peers.
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	CA   string `yaml:"ca"`
	// Peers beyond those that were paired.
	Peers map[string]Peer `yaml:"peers"`

	on bool
}

// Hour is a part of the day in which another limit holds; it may go over midnight. The first that holds counts.
type Hour struct {
	From  string `yaml:"from"` // 15:04, local time
	To    string `yaml:"to"`
	Limit Size   `yaml:"limit"` // bytes a second; 0: none
}

// Peer is another daemon.
type Peer struct {
	Address     string   `yaml:"address"`     // HOST:PORT; empty: it dials
	Fingerprint string   `yaml:"fingerprint"` // of its key; empty: its certificate is the authority's, and has its name
	MaySend     []string `yaml:"may_send"`    // patterns of groups
}

// On reports whether anything was said of it: then the daemon may wait for groups, and have none.
func (r *Replication) On() bool { return r.on }

const (
	defaultCompression = 2
	defaultMostGroups  = 1024
	// leastLimit keeps a message's part from taking longer than a peer waits.
	leastLimit = 64 << 10
)

// Level is the level of compression.
func (r *Replication) Level() int {
	if r.Compression == nil {
		return defaultCompression
	}
	return *r.Compression
}

// At is the limit at a time, in bytes a second; 0: none.
func (r *Replication) At(t time.Time) Size {
	now := t.Format("15:04")
	for _, h := range r.Hours {
		if h.From <= h.To && h.From <= now && now < h.To || h.From > h.To && (now >= h.From || now < h.To) {
			return h.Limit
		}
	}
	return r.Limit
}

func (r *Replication) setDefaults(stateDir string) {
	r.on = r.on || r.Listen != "" || len(r.Peers) > 0 || r.Name != ""
	if r.Name == "" {
		host, err := os.Hostname()
		if r.Name, _, _ = strings.Cut(host, "."); err != nil || record.CheckName(r.Name) != nil {
			r.Name = "tidemark"
		}
	}
	if r.MostGroups == 0 {
		r.MostGroups = defaultMostGroups
	}
	if r.Dir == "" {
		abs, err := filepath.Abs(stateDir)
		if err != nil {
			abs = stateDir // validate finds it
		}
		r.Dir = filepath.Join(abs, "replicas")
	}
}

func (r *Replication) validate() error {
	var errs []error
	add := func(place string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("replication.%s: %w", place, err))
		}
	}
	if r.Listen != "" {
		network, _, err := ParseListen(r.Listen)
		if err == nil && network != "tcp" {
			err = errors.New("give tcp:HOST:PORT")
		}
		add("listen", err)
	}
	if r.Name != "" {
		add("name", record.CheckName(r.Name))
	}
	if r.Dir != "" && !filepath.IsAbs(r.Dir) {
		add("dir", fmt.Errorf("%q: give the full path", r.Dir))
	}
	if r.MostGroups < 0 {
		add("most_groups", fmt.Errorf("%d: give a number above 0", r.MostGroups))
	}
	if n := r.Level(); n < 0 || n > 4 {
		add("compression", fmt.Errorf("%d: 0 to 4 are possible", n))
	}
	if r.Limit > 0 && r.Limit < leastLimit {
		add("limit", fmt.Errorf("%d bytes a second: at least %d are needed to keep connections alive", r.Limit, leastLimit))
	}
	for i, h := range r.Hours {
		if h.Limit > 0 && h.Limit < leastLimit || h.From == h.To {
			add(fmt.Sprintf("hours[%d]", i), fmt.Errorf("from %s to %s, %d bytes a second: it never holds, or is less than %d", h.From, h.To, h.Limit, leastLimit))
		}
		for _, at := range []string{h.From, h.To} {
			if t, err := time.Parse("15:04", at); err != nil || t.Format("15:04") != at {
				add(fmt.Sprintf("hours[%d]", i), fmt.Errorf("%q: expected a time as 08:00", at))
			}
		}
	}
	if (r.Cert == "") != (r.Key == "") {
		add("cert", errors.New("cert and key go together"))
	}
	for _, name := range slices.Sorted(maps.Keys(r.Peers)) {
		add("peers."+name, record.CheckName(name))
		if p := r.Peers[name]; p.Fingerprint == "" && r.CA == "" {
			add("peers."+name, errors.New("give its fingerprint (tidemark replica list prints it there), or the ca whose certificate it has"))
		}
	}
	return errors.Join(errs...)
}

// Roots are the authority's certificates; nil: there is none.
func (r *Replication) Roots() (*x509.CertPool, error) {
	if r.CA == "" {
		return nil, nil
	}
	pem, err := os.ReadFile(r.CA)
	if err != nil {
		return nil, fmt.Errorf("replication.ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("replication.ca: %s holds no certificate", r.CA)
	}
	return pool, nil
}
