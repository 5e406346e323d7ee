package link

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/tidemark-cdp/tidemark/journal/record"
)

// Peer is another daemon, and what it may do here.
type Peer struct {
	Name string `json:"name"`
	// Fingerprint is its key's; zeroes: it is known by a certificate of the authority, in which Name stands.
	Fingerprint Fingerprint `json:"fingerprint,omitzero"`
	// Address is where it is reached, HOST:PORT; empty: it dials.
	Address string `json:"address,omitempty"`
	// MaySend are patterns (path.Match) of groups that it may send here.
	MaySend []string  `json:"may_send,omitempty"`
	Since   time.Time `json:"since,omitzero"`
}

// Check is an error if no peer can be so.
func (p *Peer) Check() error {
	if err := record.CheckName(p.Name); err != nil {
		return fmt.Errorf("peer: %w", err)
	}
	for _, pattern := range p.MaySend {
		if _, err := path.Match(pattern, ""); err != nil {
			return fmt.Errorf("peer %s: groups %q: %w", p.Name, pattern, err)
		}
	}
	return nil
}

// Sends reports whether the peer may send a group here, and whether a pattern names exactly that group.
func (p *Peer) Sends(group string) (may, named bool) {
	for _, pattern := range p.MaySend {
		if ok, _ := path.Match(pattern, group); ok { // Check has seen the pattern
			may, named = true, named || pattern == group
		}
	}
	return may, named
}

var (
	// ErrUnknownPeer is wrapped if a daemon is none of the peers.
	ErrUnknownPeer = errors.New("it is none of the peers here: invite it, or join it")
	errNoPeer      = errors.New("no such peer")
)

// Peers are those that a daemon trusts: those that were paired, which stand in a file, and those of the configuration. It is safe for
// concurrent use.
type Peers struct {
	file  string
	write func(path string, b []byte) error
	roots *x509.CertPool // of those without a fingerprint; nil: there is no authority
	now   func() time.Time

	mu      sync.Mutex
	paired  map[string]Peer
	given   map[string]Peer   // by the configuration; they count for more
	dropped func(name string) // called when one was revoked
	changes bell
}

// LoadPeers reads the file, if there is one. write makes a file, durably. Roots are of the authority whose certificates are taken, or nil.
func LoadPeers(file string, given []Peer, roots *x509.CertPool, write func(path string, b []byte) error) (*Peers, error) {
	p := &Peers{file: file, write: write, roots: roots, now: time.Now, paired: map[string]Peer{}, given: map[string]Peer{}}
	b, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("peers: %w", err)
	}
	var all []Peer
	if err == nil {
		if err := json.Unmarshal(b, &all); err != nil {
			return nil, fmt.Errorf("peers: %s: %w", file, err)
		}
	}
	for _, one := range all {
		if err := one.Check(); err != nil {
			return nil, fmt.Errorf("peers: %s: %w", file, err)
		}
		p.paired[one.Name] = one
	}
	for _, one := range given {
		if err := one.Check(); err != nil {
			return nil, err
		}
		p.given[one.Name] = one
	}
	return p, nil
}

// All are the peers by name.
func (p *Peers) All() []Peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := maps.Clone(p.paired)
	maps.Copy(all, p.given)
	names := slices.Sorted(maps.Keys(all))
	out := make([]Peer, 0, len(names))
	for _, name := range names {
		out = append(out, all[name])
	}
	return out
}

// Get finds a peer by name.
func (p *Peers) Get(name string) (Peer, error) {
	for _, one := range p.All() {
		if one.Name == name {
			return one, nil
		}
	}
	return Peer{}, fmt.Errorf("peer %q: %w", name, errNoPeer)
}

// Put adds a peer that was paired, durably. One of the same key is replaced; one of the same name and another key is in the way.
func (p *Peers) Put(one Peer) error {
	if err := one.Check(); err != nil {
		return err
	}
	p.mu.Lock()
	if _, ok := p.given[one.Name]; ok {
		p.mu.Unlock()
		return fmt.Errorf("the configuration has a peer %s", one.Name)
	}
	if was, ok := p.paired[one.Name]; ok && was.Fingerprint != one.Fingerprint {
		p.mu.Unlock()
		return fmt.Errorf("there is a peer %s with another key: revoke it first, or give this one another name", one.Name)
	}
	next := maps.Clone(p.paired)
	var replaced []string
	maps.DeleteFunc(next, func(name string, o Peer) bool {
		if o.Fingerprint == one.Fingerprint {
			replaced = append(replaced, name)
		}
		return o.Fingerprint == one.Fingerprint
	})
	next[one.Name] = one
	err := p.saveLocked(next)
	dropped := p.dropped
	p.mu.Unlock()
	if err == nil && dropped != nil {
		for _, name := range replaced {
			dropped(name) // what it may do has changed
		}
	}
	return err
}

// Remove revokes a peer that was paired, durably. Its connections end.
func (p *Peers) Remove(name string) error {
	p.mu.Lock()
	if _, ok := p.given[name]; ok {
		p.mu.Unlock()
		return fmt.Errorf("peer %s is of the configuration: take it out there", name)
	}
	if _, ok := p.paired[name]; !ok {
		p.mu.Unlock()
		return fmt.Errorf("peer %q: %w", name, errNoPeer)
	}
	next := maps.Clone(p.paired)
	delete(next, name)
	err := p.saveLocked(next)
	dropped := p.dropped
	p.mu.Unlock()
	if err == nil && dropped != nil {
		dropped(name)
	}
	return err
}

// Changed is closed when the peers are others than when it was called.
func (p *Peers) Changed() <-chan struct{} { return p.changes.wait() }

func (p *Peers) saveLocked(next map[string]Peer) error {
	all := make([]Peer, 0, len(next))
	for _, name := range slices.Sorted(maps.Keys(next)) {
		all = append(all, next[name])
	}
	b, err := json.MarshalIndent(all, "", "  ")
	if err == nil {
		err = p.write(p.file, append(b, '\n'))
	}
	if err != nil {
		return fmt.Errorf("peers: %w", err)
	}
	p.paired = next
	p.changes.ring()
	return nil
}

// identify says which peer the other end of a connection is.
func (p *Peers) identify(s tls.ConnectionState) (Peer, error) {
	if len(s.PeerCertificates) == 0 {
		return Peer{}, errors.New("it shows no certificate")
	}
	leaf := s.PeerCertificates[0]
	if now := p.now(); now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return Peer{}, fmt.Errorf("its certificate is valid from %s to %s, and it is %s here: do the clocks agree?",
			leaf.NotBefore.Format(time.RFC3339), leaf.NotAfter.Format(time.RFC3339), now.Format(time.RFC3339))
	}
	print := fingerprint(leaf)
	all := p.All()
	for _, one := range all {
		if one.Fingerprint == print {
			return one, nil
		}
	}
	for _, one := range all {
		if one.Fingerprint == (Fingerprint{}) && p.signed(s.PeerCertificates, one.Name) {
			return one, nil
		}
	}
	return Peer{}, fmt.Errorf("%w (its key is %v)", ErrUnknownPeer, print)
}

// signed reports whether the authority says that a chain of certificates is that of a name.
func (p *Peers) signed(chain []*x509.Certificate, name string) bool {
	if p.roots == nil {
		return false
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{DNSName: name, Roots: p.roots, Intermediates: between, CurrentTime: p.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err == nil
}
