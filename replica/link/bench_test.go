package link

import (
	"context"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/tidemark-cdp/tidemark/journal/record"
	"github.com/tidemark-cdp/tidemark/replica"
	"github.com/tidemark-cdp/tidemark/replica/wire"
)

// endless has as many records as are asked for, and keeps none.
type endless struct {
	*memory
	run  []byte
	runs record.LSN
	done chan struct{}
}

func (e *endless) Feed(from record.LSN) (Feed, error) { return &endlessFeed{e, from}, nil }
func (e *endless) Local() (replica.Local, error) {
	return replica.Local{Known: true, Leads: e.leads, Reigns: e.reigns, Disks: e.disks()}, nil
}
func (e *endless) Sync() (record.LSN, error) { return e.Durable(), nil }
func (e *endless) Receive(run record.Run) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.head = run.Last; e.head == e.runs {
		close(e.done)
	}
	return nil
}

type endlessFeed struct {
	*endless
	next record.LSN
}

func (f *endlessFeed) Close() {}
func (f *endlessFeed) Next(ctx context.Context, _ int) (record.Run, error) {
	if f.next > f.runs {
		<-ctx.Done()
		return record.Run{}, ctx.Err()
	}
	f.next++
	return record.Run{First: f.next - 1, Last: f.next - 1, Bytes: f.run, Disks: f.disks(), Reigns: f.reigns}, nil
}

// BenchmarkStream carries records that can not be compressed over the loopback. cpu-ns/B is of both sides, and the kernel's part.
func BenchmarkStream(b *testing.B) {
	source, sink := newHost(b, "a"), newHost(b, "b")
	token, err := sink.Invite(Peer{MaySend: []string{"*"}}, time.Now().Add(time.Minute))
	require.NoError(b, err)
	_, err = source.Join(b.Context(), sink.addr, token, Peer{})
	require.NoError(b, err)
	from := &endless{memory: source.g, run: make([]byte, runBytes), runs: record.LSN(b.N)}
	_, _ = rand.NewChaCha8([32]byte{}).Read(from.run) // it never fails
	from.begin()
	to := &endless{memory: sink.g, runs: from.runs, done: make(chan struct{})}
	to.begin()
	to.leads = false
	sink.Offered = func(ctx context.Context, c *Conn, m *wire.Offer) { _ = Follow(ctx, c, m, to) } // it ends with the source
	ctx, cancel := context.WithCancel(b.Context())
	c, err := source.Open(ctx, "b", wire.RoleOffers)
	require.NoError(b, err)
	b.SetBytes(runBytes)
	began := cpu(b)
	b.ResetTimer()
	ended := make(chan error, 1)
	go func() { ended <- Ship(ctx, c, "web01", from, DefaultLevel) }()
	select {
	case <-to.done:
	case err := <-ended:
		b.Fatal(err)
	}
	b.StopTimer()
	b.ReportMetric(float64(cpu(b)-began)/float64(b.N*runBytes), "cpu-ns/B")
	cancel()
	<-ended
}

func cpu(b *testing.B) time.Duration {
	var r syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &r))
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
