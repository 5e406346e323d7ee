package nbd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/protocol"
	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/nbd/client"
	"github.com/tidemark-cdp/tidemark/nbd/internal/proto"
)

func selfSigned(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"host"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

func TestTLSIsRequiredAndWorks(t *testing.T) {
	cert, pool := selfSigned(t)
	dev := &memory{b: make([]byte, 1<<20)}
	path := start(t, &Server{Exports: one{dev}, TLS: &tls.Config{Certificates: []tls.Certificate{cert}}})
	_, err := client.Dial(context.Background(), "unix", path, "disk", nil)
	require.ErrorContains(t, err, "requires TLS")
	c, err := client.Dial(context.Background(), "unix", path, "disk", &tls.Config{RootCAs: pool, ServerName: "host"})
	require.NoError(t, err)
	require.NoError(t, c.WriteAt([]byte("secret"), 10, false))
	got := make([]byte, 6)
	require.NoError(t, c.ReadAt(got, 10))
	require.Equal(t, "secret", string(got))
	require.NoError(t, c.Close())

	r := dialRaw(t, path)
	require.Equal(t, proto.RepErrTLSReqd, r.option(protocol.NEGOTIATION_ID_OPTION_LIST, nil))
	require.Equal(t, proto.RepErrInvalid, r.option(proto.OptStartTLS, []byte("x")))
}
