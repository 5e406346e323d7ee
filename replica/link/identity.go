package link

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// Fingerprint is the SHA-256 of a certificate's public key (its SubjectPublicKeyInfo): it stays when the certificate is made anew.
type Fingerprint [sha256.Size]byte

func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

// MarshalText implements encoding.TextMarshaler.
func (f Fingerprint) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (f *Fingerprint) UnmarshalText(b []byte) error {
	n, err := hex.Decode(f[:], b)
	if err != nil || n != len(f) {
		return fmt.Errorf("fingerprint %q: expected %d hexadecimal digits", b, 2*len(f))
	}
	return nil
}

func fingerprint(cert *x509.Certificate) Fingerprint {
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo)
}

// Identity is what a daemon proves to be with.
type Identity struct {
	Cert tls.Certificate
	// Fingerprint is what peers know it by.
	Fingerprint Fingerprint
}

const (
	keyFile = "key.pem"
	// certLife is how long a certificate is valid that a daemon makes for itself. It makes another one, for the same key, at each start.
	certLife = 20 * 365 * 24 * time.Hour
	// certSlack is how far a peer's clock may be behind when a certificate has just been made.
	certSlack = 24 * time.Hour
)

// LoadIdentity reads the key of a daemon from a directory, or draws one and has write make a file of it, durably, that nobody else
// may read. Its certificate is made for the occasion: peers know the key.
func LoadIdentity(dir, name string, write func(path string, b []byte) error) (*Identity, error) {
	path := filepath.Join(dir, keyFile)
	key, err := readKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, key, err = ed25519.GenerateKey(rand.Reader); err != nil {
			return nil, err
		}
		der, merr := x509.MarshalPKCS8PrivateKey(key)
		if merr != nil {
			return nil, merr
		}
		err = write(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
	if err != nil {
		return nil, fmt.Errorf("this daemon's key: %w", err)
	}
	now := time.Now()
	return newIdentity(key, name, now.Add(-certSlack), now.Add(certLife))
}

func readKey(path string) (ed25519.PrivateKey, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s holds no key", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s holds a %T, not an Ed25519 key", path, parsed)
	}
	return key, nil
}

func newIdentity(key ed25519.PrivateKey, name string, from, to time.Time) (*Identity, error) {
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: from, NotAfter: to,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate: %w", err)
	}
	return identityOf(tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})
}

func identityOf(cert tls.Certificate) (*Identity, error) {
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return nil, err
	}
	cert.Leaf = leaf
	return &Identity{Cert: cert, Fingerprint: fingerprint(leaf)}, nil
}

// ReadIdentity reads a certificate of one's own, with its chain, and its key, from PEM files.
func ReadIdentity(certFile, keyFile string) (*Identity, error) {
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("this daemon's certificate: %w", err)
	}
	return identityOf(cert)
}
