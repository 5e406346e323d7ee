package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// joins has one daemon join another that listens, which may send it what fits a pattern.
func (d *served) joins(o *served, listen, may string) {
	d.t.Helper()
	token, _, _ := strings.Cut(o.ok("replica", "invite", "--may-send", may), "\n")
	d.ok("replica", "join", listen, token)
}

// addConf appends to a daemon's configuration.
func (d *served) addConf(text string) {
	d.t.Helper()
	f, err := os.OpenFile(d.path("tidemark.yaml"), os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(d.t, err)
	_, err = f.WriteString(text)
	require.NoError(d.t, err)
	require.NoError(d.t, f.Close())
	d.ok("reload")
}

// TestSeveralReplicas: a group has two, of which one takes it over as of an earlier point; the other and the old writer follow that. A second
// group of the same content is not sent.
func TestSeveralReplicas(t *testing.T) {
	const size = 32 << 20
	a, b := hostsOf(t, size)
	c := &served{t: t, dir: t.TempDir()}
	listen := freePort(t)
	c.configure(fmt.Sprintf("replication: {listen: 'tcp:%s', name: hostc}\n", listen))
	c.start()
	a.joins(c, listen, "*")
	b.joins(c, listen, "web01")
	rng := mathrand.NewChaCha8([32]byte{11})
	image := make([]byte, size)
	scribble(t, a, rng, image, 3000)
	a.stop() // so that its backing has everything
	require.NoError(t, os.WriteFile(a.path("like.raw"), mustRead(t, a.path("vda.raw")), 0o600))
	a.disk = ""
	groups := "replication: {name: hosta}\ngroups:\n  web01: {disks: {vda: {backing: %%DIR/vda.raw}}, replicas: [hostb, hostc]}\n%s"
	a.configure(fmt.Sprintf(groups, ""))
	a.start()
	eventually(t, func() bool {
		return a.replica("web01", "hostb").State == "streaming" && a.replica("web01", "hostc").State == "streaming"
	})
	a.ok("mark", "web01", "before", "--wait-replica")
	before := bytes.Clone(image)
	scribble(t, a, rng, image, 200)
	a.ok("mark", "web01", "after", "--wait-replica")
	for _, d := range []*served{b, c} {
		require.True(t, bytes.Equal(before, imageOf(t, d, "web01/vda@before", size)))
		require.True(t, bytes.Equal(image, imageOf(t, d, "web01/vda@after", size)))
	}
	c.kill()
	out, code := a.tidemark("mark", "web01", "without", "--wait-replica=5s")
	require.Equal(t, 10, code)
	require.Contains(t, out, "hostc")
	require.NotContains(t, out, "hostb")
	c.start()
	a.ok("mark", "web01", "both", "--wait-replica")

	// Clones of the disk.
	require.NoError(t, os.WriteFile(a.path("like2.raw"), mustRead(t, a.path("like.raw")), 0o600))
	a.configure(fmt.Sprintf(groups, "  web02: {disks: {vda: {backing: %DIR/like.raw}, vdb: {backing: %DIR/like2.raw}}, replicas: [hostb]}\n"))
	a.ok("reload")
	eventually(t, func() bool { return a.replica("web02", "hostb").State == "streaming" })
	a.ok("mark", "web02", "copied", "--wait-replica")
	for _, d := range []string{"vda", "vdb"} {
		require.True(t, bytes.Equal(before, imageOf(t, b, "web02/"+d+"@copied", size)))
	}
	require.Less(t, b.group("web02").Source.ReceivedBytes, int64(2<<20), "what web01 has is copied from there")

	a.kill()
	b.addConf("groups: {web01: {received: true, disks: {vda: {backing: " + b.path("state") + "/replicas/web01/vda.raw}}, replicas: [hostc]}}\n")
	require.Contains(t, b.ok("failover", "web01", "--to", "before"), "in epoch 2")
	require.True(t, bytes.Equal(before, imageOf(t, b, "web01/vda", size)))
	scribble(t, b, rng, before, 100)
	b.ok("mark", "web01", "on")
	eventually(t, func() bool { return c.group("web01").Head == b.group("web01").Head })
	require.True(t, bytes.Equal(before, imageOf(t, c, "web01/vda@on", size)))
	require.True(t, bytes.Equal(image, imageOf(t, c, "web01/vda@after", size)), "what was taken back is still to be seen")
	a.start()
	eventually(t, func() bool {
		g := a.group("web01")
		return g.Role == "follows" && g.Head == b.group("web01").Head
	})
	require.True(t, bytes.Equal(before, imageOf(t, a, "web01/vda", size)))
	require.Equal(t, "writes", a.group("web02").Role)
}

// TestWithoutAWrite: a disk that comes, one that leaves, and an epoch get to replicas though no guest writes anything.
func TestWithoutAWrite(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	a.raw("vdb.raw", size)
	rng := mathrand.NewChaCha8([32]byte{14})
	image := make([]byte, size)
	_, _ = rng.Read(image)
	require.NoError(t, os.WriteFile(a.path("vdb.raw"), image, 0o600))
	a.replicate("")
	a.ok("mark", "web01", "one", "--wait-replica")
	disks := func(d *served) (names []string) {
		for _, one := range d.group("web01").Disks {
			if one.Removed == 0 {
				names = append(names, one.Name)
			}
		}
		return names
	}
	conf := "replication: {name: hosta}\ngroups: {web01: {disks: {vda: {backing: %%DIR/vda.raw}%s}, replicas: [hostb]}}\n"
	a.configure(fmt.Sprintf(conf, ", vdb: {backing: %DIR/vdb.raw}"))
	a.ok("reload")
	eventually(t, func() bool { return slices.Equal(disks(b), []string{"vda", "vdb"}) })
	eventually(t, func() bool { return a.replica("web01", "hostb").Acked == a.group("web01").Head })
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vdb", size)))
	head := a.group("web01").Head
	a.stop()
	a.start()
	a.streams()
	require.Equal(t, head, a.group("web01").Head, "what replicas know is not said again")

	a.configure(fmt.Sprintf(conf, ""))
	a.ok("reload")
	eventually(t, func() bool { return slices.Equal(disks(b), []string{"vda"}) })
	b.ok("failback", "web01")
	eventually(t, func() bool {
		g := a.group("web01")
		return g.Role == "follows" && g.Epoch == 2 && g.Head == b.group("web01").Head
	})
}

// TestADiscontinuity: a follower is brought over what somebody else wrote to a backing of the writer's, and keeps the history that it has.
func TestADiscontinuity(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	rng := mathrand.NewChaCha8([32]byte{15})
	image := make([]byte, size)
	scribble(t, a, rng, image, 2000)
	a.replicate("")
	a.ok("mark", "web01", "one", "--wait-replica")
	a.stop()
	f, err := os.OpenFile(a.path("vda.raw"), os.O_RDWR, 0) // a guest without Tidemark
	require.NoError(t, err)
	for off := int64(0); off < size; off += 64 << 10 {
		_, err = f.WriteAt([]byte{7}, off)
		require.NoError(t, err)
		image[off] = 7
	}
	require.NoError(t, f.Close())
	was := imageOf(t, b, "web01/vda@one", size)
	a.start()
	eventually(t, func() bool { return strings.Contains(b.ok("points", "web01"), "before a gap") })
	a.ok("mark", "web01", "two", "--wait-replica")
	require.Contains(t, a.ok("replica", "compare", "web01", "--at", "two"), "the same")
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda", size)))
	require.True(t, bytes.Equal(was, imageOf(t, b, "web01/vda@one", size)))
	require.Contains(t, b.ok("points", "web01"), "before a gap")
	require.Less(t, b.group("web01").Source.ReceivedBytes, int64(3<<20), "only what differs was sent")

	// That it was, is no reason to be so again.
	b.ok("replica", "accept", "web01", "--anew")
	eventually(t, func() bool {
		out, code := b.tidemark("points", "web01")
		return code == 0 && !strings.Contains(out, "before a gap")
	})
	for _, label := range []string{"three", "four"} {
		b.stop()
		a.ok("mark", "web01", label)
		b.start()
		a.ok("mark", "web01", "behind-"+label, "--wait-replica")
		require.Contains(t, b.ok("points", "web01"), label)
	}
	require.NotContains(t, b.ok("points", "web01"), "before a gap")
}

// TestBegunAnew: a follower is seeded again if who runs it says so, and not before its writer is there.
func TestBegunAnew(t *testing.T) {
	const size = 16 << 20
	a, b := hostsOf(t, size)
	image := make([]byte, size)
	scribble(t, a, mathrand.NewChaCha8([32]byte{15}), image, 2000)
	a.replicate("")
	a.ok("mark", "web01", "one", "--wait-replica")
	a.kill()
	b.ok("replica", "accept", "web01", "--anew")
	require.Contains(t, b.ok("points", "web01"), "one", "nothing is dropped for nobody")
	a.start()
	a.streams()
	a.ok("mark", "web01", "two", "--wait-replica")
	require.Contains(t, a.ok("replica", "compare", "web01", "--at", "two"), "the same")
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda", size)))
	require.NotContains(t, b.ok("points", "web01"), "one")
	require.Less(t, b.group("web01").Source.ReceivedBytes, int64(3<<20), "only what differs was sent")
	b.stop()
	b.start()
	a.ok("mark", "web01", "three", "--wait-replica")
	_, code := a.tidemark("replica", "accept", "web01", "--anew")
	require.NotZero(t, code, "it is its own")
}

// TestAcceptAnewOfNothing does no more than succeed: the epoch that is known of the group, and whom it came from, stay.
func TestAcceptAnewOfNothing(t *testing.T) {
	const size = 8 << 20
	a, b := hostsOf(t, size)
	a.replicate("")
	a.ok("mark", "web01", "one", "--wait-replica")
	a.stop()
	b.stop() // as a seed that broke off leaves it
	require.NoError(t, os.RemoveAll(b.path("state/groups/web01")))
	require.NoError(t, os.Remove(b.path("state/promoted/web01.yaml")))
	path := b.path("state/replication/groups/web01.json")
	was := mustRead(t, path)
	b.start()
	b.ok("replica", "accept", "web01", "--anew")
	require.Equal(t, was, mustRead(t, path))
	_, code := b.tidemark("replica", "accept", "web0l", "--anew")
	require.Equal(t, 4, code)
	require.NoFileExists(t, b.path("state/replication/groups/web0l.json"))
	a.start()
	a.streams()
	a.ok("mark", "web01", "two", "--wait-replica")
}

// TestStaleConsent: what was allowed of one writer's history is not allowed of what this daemon wrote since, and nobody else has.
func TestStaleConsent(t *testing.T) {
	const size = 8 << 20
	a, b := hostsOf(t, size)
	rng := mathrand.NewChaCha8([32]byte{21})
	image := make([]byte, size)
	scribble(t, a, rng, image, 200)
	a.replicate("")
	a.ok("mark", "web01", "one", "--wait-replica")
	a.kill()
	b.ok("replica", "accept", "web01", "--anew")
	require.Contains(t, b.ok("status"), "that was asked for")
	b.ok("failover", "web01")
	scribble(t, b, rng, image, 100)
	a.start()
	eventually(t, func() bool {
		g := a.group("web01")
		return g.Role == "follows" && g.Head == b.group("web01").Head
	})
	a.kill()
	scribble(t, b, rng, image, 100) // nobody else has these
	b.ok("mark", "web01", "tail")
	require.NoError(t, b.cmd.Process.Signal(syscall.SIGSTOP)) // b's network is cut
	a.start()
	a.ok("failover", "web01")
	require.NoError(t, b.cmd.Process.Signal(syscall.SIGCONT))
	eventually(t, func() bool {
		return len(b.scratches()) == 1 && a.replica("web01", "hostb").Acked == a.group("web01").Head
	})
	require.True(t, bytes.Equal(image, imageOf(t, b, "scratch/"+b.scratches()[0].Name+"/vda", size)))
	require.Contains(t, b.ok("points", "web01"), "one")
}

// TestAWriterFromACopy: it goes on, under its old epoch, from where it was when the copy was made: its follower has records that it has not, and then others
// under the same LSNs. Who runs the follower says which counts.
func TestAWriterFromACopy(t *testing.T) {
	const size = 8 << 20
	a, b := hostsOf(t, size)
	rng := mathrand.NewChaCha8([32]byte{22})
	image := make([]byte, size)
	scribble(t, a, rng, image, 100)
	a.replicate("")
	a.ok("mark", "web01", "copied", "--wait-replica")
	copied := bytes.Clone(image)
	a.stop()
	tool(t, "cp", "-a", a.path("state"), a.path("copy"))
	tool(t, "cp", "-a", a.path("vda.raw"), a.path("copy.raw"))
	a.start()
	scribble(t, a, rng, image, 100)
	a.ok("mark", "web01", "lost", "--wait-replica")
	a.stop()
	require.NoError(t, os.RemoveAll(a.path("state")))
	require.NoError(t, os.Rename(a.path("copy"), a.path("state")))
	require.NoError(t, os.Rename(a.path("copy.raw"), a.path("vda.raw")))
	a.start()
	eventually(t, func() bool { return strings.Contains(b.ok("status"), "does not come any more") })
	scribble(t, a, rng, copied, 300)
	eventually(t, func() bool { return strings.Contains(b.ok("status"), "accept --anew") })
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@lost", size)))
	b.ok("replica", "accept", "web01", "--anew")
	a.streams()
	a.ok("mark", "web01", "counts", "--wait-replica")
	require.True(t, bytes.Equal(copied, imageOf(t, b, "web01/vda", size)))
}

// TestSharedStorage: a guest's disk and its daemon's state stand where two hosts reach them. It moves with its whole history, and of two
// daemons that would serve it the second does not start.
func TestSharedStorage(t *testing.T) {
	const size = 16 << 20
	a, b := &served{t: t, dir: t.TempDir()}, &served{t: t, dir: t.TempDir()}
	a.raw("vda.raw", size)
	a.disk, b.disk = a.path("vda.raw"), a.path("vda.raw")
	b.extra = []string{"--state-dir", a.path("state")}
	image := make([]byte, size)
	rng := mathrand.NewChaCha8([32]byte{16})
	a.start()
	for n, move := range []func(from *served){(*served).stop, (*served).kill, (*served).stop} {
		from, to := a, b
		if n%2 == 1 {
			from, to = b, a
		}
		scribble(t, from, rng, image, 200)
		from.ok("mark", "web01", fmt.Sprint("point-", n))
		out, err := exec.Command(filepath.Join(binDir, "tidemarkd"), to.args()...).CombinedOutput()
		require.Error(t, err)
		require.Contains(t, string(out), "is another tidemarkd using it?")
		move(from)
		to.start()
		require.True(t, bytes.Equal(image, imageOf(t, to, fmt.Sprintf("web01/vda@point-%d", n), size)))
		require.True(t, bytes.Equal(image, imageOf(t, to, "web01/vda", size)))
		require.Contains(t, to.ok("points", "web01"), "point-0")
	}
}

// TestAnAuthority: peers are known by certificates of an authority's, and by nothing else.
func TestAnAuthority(t *testing.T) {
	const size = 16 << 20
	ca := newAuthority(t)
	a, b := &served{t: t, dir: t.TempDir()}, &served{t: t, dir: t.TempDir()}
	listen := freePort(t)
	conf := func(d *served, name, rest string, until time.Time) {
		ca.write(t, d, name, until)
		d.configure(fmt.Sprintf("replication: {name: %s, cert: %%DIR/cert.pem, key: %%DIR/key.pem, ca: %%DIR/ca.pem, %s}\n", name, rest))
	}
	day := time.Now().Add(24 * time.Hour)
	conf(b, "hostb", fmt.Sprintf("listen: 'tcp:%s', peers: {hosta: {may_send: ['web*']}}", listen), day)
	b.start()
	a.raw("vda.raw", size)
	shipped := fmt.Sprintf("peers: {hostb: {address: '%s'}}}\ngroups: {web01: {disks: {vda: {backing: %%DIR/vda.raw}}, replicas: [hostb]}", listen)
	conf(a, "hosta", shipped, day)
	a.start()
	image := make([]byte, size)
	scribble(t, a, mathrand.NewChaCha8([32]byte{12}), image, 100)
	a.streams()
	a.ok("mark", "web01", "one", "--wait-replica")
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@one", size)))
	require.Contains(t, b.metrics(), "tidemark_replication_refused_total 0")

	// One that speaks other versions, with the peer's certificate.
	pair, err := tls.LoadX509KeyPair(a.path("cert.pem"), a.path("key.pem"))
	require.NoError(t, err)
	conn, err := tls.Dial("tcp", listen, &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true})
	require.NoError(t, err)
	w, err := wire.NewWriter(conn, 0)
	require.NoError(t, err)
	require.NoError(t, w.Write(&wire.Hello{Lowest: 7, Highest: 9, Role: wire.RoleOffers, Name: "hosta", Build: "v9"}))
	r, err := wire.NewReader(conn)
	require.NoError(t, err)
	m, err := r.Next()
	require.NoError(t, err)
	require.Equal(t, wire.ReasonVersion, m.(*wire.Refuse).Reason)
	require.Regexp(t, `hosta \(v9\) speaks versions 7 to 9 .*, and hostb .* 1 to 1`, m.(*wire.Refuse).Text)
	require.NoError(t, conn.Close())
	eventually(t, func() bool { return strings.Contains(b.metrics(), "tidemark_replication_refused_total 1") })

	// An expired one, one of another name, and one of another authority.
	a.stop()
	for i, x := range []struct {
		ca    *authority
		name  string
		until time.Time
		why   string
	}{
		{ca, "hosta", time.Now().Add(-time.Hour), "its certificate is valid from"},
		{ca, "hostz", day, "it is none of the peers here"},
		{newAuthority(t), "hosta", day, "it is none of the peers here"},
	} {
		x.ca.write(t, a, x.name, x.until)
		ca.writeRoot(t, a)
		a.start()
		eventually(t, func() bool { return strings.Contains(a.replica("web01", "hostb").Error, x.why) })
		_, code := a.tidemark("mark", "web01", fmt.Sprint("refused-", i), "--wait-replica=100ms")
		require.Equal(t, 10, code)
		a.stop()
	}
	require.NotContains(t, b.ok("points", "web01"), "refused-")
	ca.write(t, a, "hosta", day)
	a.start()
	a.ok("mark", "web01", "two", "--wait-replica")
}

// authority signs certificates.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	as := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, as, as, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return &authority{key, cert}
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

// write gives a daemon a certificate of a name.
func (ca *authority) write(t *testing.T, d *served, name string, until time.Time) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	as := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: until,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, as, ca.cert, key.Public(), ca.key)
	require.NoError(t, err)
	private, err := x509.MarshalECPrivateKey(key)
	require.NoError(t, err)
	writePEM(t, d.path("cert.pem"), "CERTIFICATE", der)
	writePEM(t, d.path("key.pem"), "EC PRIVATE KEY", private)
	ca.writeRoot(t, d)
}

func (ca *authority) writeRoot(t *testing.T, d *served) {
	t.Helper()
	writePEM(t, d.path("ca.pem"), "CERTIFICATE", ca.cert.Raw)
}

// TestALimit holds at the hours that it is of, for all groups together, and each has its share.
func TestALimit(t *testing.T) {
	const size, limit = 16 << 20, 512 << 10
	a, b := hostsOf(t, size)
	a.raw("other.raw", size)
	a.disk = ""
	a.configure(`replication: {name: hosta, limit: 100KiB, hours: [{from: "00:00", to: "23:59", limit: 512KiB}, {from: "23:59", to: "00:00", limit: 512KiB}]}
groups:
  web01: {disks: {vda: {backing: %DIR/vda.raw}}, replicas: [hostb]}
  web02: {disks: {vda: {backing: %DIR/other.raw}}, replicas: [hostb]}
`)
	a.stop()
	a.start()
	for _, g := range []string{"web01", "web02"} {
		eventually(t, func() bool { return a.replica(g, "hostb").State == "streaming" })
		a.ok("mark", g, "begun", "--wait-replica")
	}
	began := time.Now()
	rng := mathrand.NewChaCha8([32]byte{13})
	for _, export := range []string{"web01/vda", "web02/vda"} {
		c := a.dial(export)
		data := make([]byte, 2<<20)
		_, _ = rng.Read(data)
		require.NoError(t, c.WriteAt(data, 0, false))
		require.NoError(t, c.Flush())
		require.NoError(t, c.Close())
	}
	sent := func(g string) int64 { return a.replica(g, "hostb").SentBytes }
	was := [2]int64{sent("web01"), sent("web02")}
	eventually(t, func() bool { return sent("web01")+sent("web02")-was[0]-was[1] > 2<<20 })
	one, two := sent("web01")-was[0], sent("web02")-was[1]
	require.InDelta(t, 1, float64(one)/float64(two), 0.5, "%d and %d bytes", one, two)
	for _, g := range []string{"web01", "web02"} {
		a.ok("mark", g, "done", "--wait-replica")
	}
	rate := float64(4<<20) / time.Since(began).Seconds()
	require.Less(t, rate, 1.3*limit)
	require.Greater(t, rate, 0.25*limit, "it is not the limit of other hours")
	require.Equal(t, b.group("web01").Head, a.group("web01").Head)
}

// TestByConfiguration: peers are known by the fingerprints that the configuration has; one group comes to a block device, and another one to a directory of the
// operator's, and is mounted there.
func TestByConfiguration(t *testing.T) {
	needRoot(t)
	need(t, "losetup", "mkfs.ext4", "debugfs")
	const size = 16 << 20
	a, b := &served{t: t, dir: t.TempDir()}, &served{t: t, dir: t.TempDir()}
	listen := freePort(t)
	key := func(d *served, conf string) string {
		d.configure("replication: {" + conf + "}\n")
		d.start()
		defer d.stop()
		p, err := d.api().Peers(t.Context())
		require.NoError(t, err)
		return p.Fingerprint
	}
	keyA, keyB := key(a, "name: hosta"), key(b, "name: hostb")
	b.raw("device.raw", size)
	out, err := exec.Command("losetup", "--show", "-f", b.path("device.raw")).Output()
	require.NoError(t, err)
	device := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		_ = b.cmd.Process.Kill()
		_ = b.cmd.Wait()
		tool(t, "losetup", "-d", device)
	})
	b.configure(fmt.Sprintf("replication: {name: hostb, listen: 'tcp:%s', dir: %%DIR/elsewhere, peers: {hosta: {fingerprint: %s, may_send: [web01, files]}}}\ngroups: {web01: {received: true, disks: {vda: {backing: %s}}}}\n", listen, keyA, device))
	b.start()
	a.raw("vda.raw", size)
	a.raw("vdb.raw", size)
	tool(t, "mkfs.ext4", "-q", a.path("vdb.raw"))
	require.NoError(t, os.WriteFile(a.path("motd"), []byte("shipped\n"), 0o600))
	tool(t, "debugfs", "-w", "-R", "write "+a.path("motd")+" motd", a.path("vdb.raw"))
	a.configure(fmt.Sprintf("replication: {name: hosta, peers: {hostb: {address: '%s', fingerprint: %s, may_send: []}}}\ngroups: {web01: {disks: {vda: {backing: %%DIR/vda.raw}}, replicas: [hostb]}, files: {disks: {vda: {backing: %%DIR/vdb.raw}}, replicas: [hostb]}}\n", listen, keyB))
	a.start()
	for _, group := range []string{"web01", "files"} {
		eventually(t, func() bool { return a.replica(group, "hostb").State == "streaming" })
		a.ok("mark", group, "none", "--wait-replica")
	}
	image := make([]byte, size)
	scribble(t, a, mathrand.NewChaCha8([32]byte{33}), image, 300)
	a.ok("mark", "web01", "one", "--wait-replica")
	require.True(t, bytes.Equal(image, imageOf(t, b, "web01/vda@one", size)))
	mnt := b.path("mnt")
	require.NoError(t, os.Mkdir(mnt, 0o755))
	cmd, said := b.mount(mnt, "files@none", mnt, "--kernel")
	require.Equal(t, "shipped\n", read(t, mnt+"/vda/files/motd"), said.String())
	tool(t, "umount", mnt)
	require.NoError(t, cmd.Wait(), said.String())
	b.stop()
	require.True(t, bytes.Equal(image, mustRead(t, device)))
	require.FileExists(t, b.path("elsewhere/files/vda.raw"))
	require.NoDirExists(t, b.path("elsewhere/web01"))
}

// TestATokenEndsWithItsDaemon.
func TestATokenEndsWithItsDaemon(t *testing.T) {
	a, b := &served{t: t, dir: t.TempDir()}, &served{t: t, dir: t.TempDir()}
	listen := freePort(t)
	b.configure(fmt.Sprintf("replication: {listen: 'tcp:%s', name: hostb}\n", listen))
	b.start()
	token := strings.Split(strings.TrimSpace(b.ok("replica", "invite")), "\n")[0]
	b.stop()
	b.start()
	a.configure("replication: {name: hosta}\n")
	a.start()
	_, code := a.tidemark("replica", "join", listen, token)
	require.NotZero(t, code)
	require.NotContains(t, b.ok("replica", "list"), "hosta")
}
