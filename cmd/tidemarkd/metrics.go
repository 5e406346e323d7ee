package main

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/tidemark-cdp/tidemark/cmd/internal/build"
	"github.com/tidemark-cdp/tidemark/guest"
	"github.com/tidemark-cdp/tidemark/journal"
)

// metrics are what the daemon exports to Prometheus; docs/operating.md has the list.
type metrics struct {
	registry *prometheus.Registry
	rested   *prometheus.HistogramVec
	frozen   *prometheus.HistogramVec
	own      *prometheus.HistogramVec
	markers  *prometheus.CounterVec
	refused  *prometheus.CounterVec
	missed   *prometheus.CounterVec
	// notThawed is how many guests are not known to be thawed.
	notThawed *prometheus.GaugeVec
}

func newMetrics(store *journal.Store) *metrics {
	seconds := []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		rested: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "tidemark_guest_rested_seconds", Buckets: seconds,
			Help: "How long the guests of a group took to come to rest, with their own hooks."}, []string{"group"}),
		frozen: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "tidemark_guest_frozen_seconds", Buckets: seconds,
			Help: "How long the guests of a group stood still for a marker."}, []string{"group"}),
		own: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "tidemark_guest_frozen_own_seconds", Buckets: seconds,
			Help: "The part of it that is Tidemark's own work: from the answer that all are frozen until they are asked to thaw."}, []string{"group"}),
		markers: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tidemark_markers_total",
			Help: "Markers taken, by the consistency that they reached."}, []string{"group", "consistency"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tidemark_markers_refused_total",
			Help: "Markers that were asked for and not taken."}, []string{"group"}),
		missed: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "tidemark_markers_missed_total",
			Help: "Markers of the schedule that were not taken, or were less than was asked for."}, []string{"group"}),
		notThawed: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "tidemark_guests_not_thawed",
			Help: "Guests that were asked to freeze and are not known to be thawed."}, []string{"group"}),
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{Name: "tidemark_build_info", Help: "1.", ConstLabels: prometheus.Labels{"version": build.Version()}})
	info.Set(1)
	m.registry.MustRegister(m.rested, m.frozen, m.own, m.markers, m.refused, m.missed, m.notThawed, info, groupCollector{store},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// marked counts a marker that was asked for.
func (m *metrics) marked(group string, got marked, err error) {
	if err != nil {
		m.refused.WithLabelValues(group).Inc()
		return
	}
	m.markers.WithLabelValues(group, got.Consistency.String()).Inc()
}

// cut notes how long guests stood still.
func (m *metrics) cut(group string, r guest.Report) {
	if r.Rested > 0 { // all of them came to rest
		m.rested.WithLabelValues(group).Observe(r.Rested.Seconds())
		m.own.WithLabelValues(group).Observe(r.Own.Seconds())
	}
	if r.Frozen > 0 {
		m.frozen.WithLabelValues(group).Observe(r.Frozen.Seconds())
	}
}

// forget drops what was counted of a group that is gone.
func (m *metrics) forget(group string) {
	of := prometheus.Labels{"group": group}
	for _, h := range []*prometheus.HistogramVec{m.rested, m.frozen, m.own} {
		h.DeletePartialMatch(of)
	}
	for _, c := range []*prometheus.CounterVec{m.markers, m.refused, m.missed} {
		c.DeletePartialMatch(of)
	}
	m.notThawed.DeletePartialMatch(of)
}

// replicaCollector reads how far replicas are, when it is asked.
type replicaCollector struct{ r *replication }

func replicaDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, []string{"group", "replica"}, nil)
}

var (
	replicaLag       = replicaDesc("tidemark_replica_lag_seconds", "The age of what the replica has of the group.")
	replicaLagBytes  = replicaDesc("tidemark_replica_lag_bytes", "Bytes of records that the replica has not, since the daemon started.")
	replicaAcked     = replicaDesc("tidemark_replica_acked_lsn", "The LSN up to which the replica has come, durably.")
	replicaConnected = replicaDesc("tidemark_replica_connected", "1 if the replica is connected.")
	replicaSent      = replicaDesc("tidemark_replica_sent_bytes", "Bytes that were sent to the replica on the present connection.")
	groupEpoch       = desc("tidemark_group_epoch", "The epoch of the group.")
	groupFollows     = desc("tidemark_group_follows", "1 if another daemon writes the group.")
	peersRefused     = prometheus.NewDesc("tidemark_replication_refused_total", "Connections and groups of peers that were refused.", nil, nil)
)

func (c replicaCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{replicaLag, replicaLagBytes, replicaAcked, replicaConnected, replicaSent, groupEpoch, groupFollows, peersRefused} {
		ch <- d
	}
}

func (c replicaCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	is := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	for _, g := range c.r.store.Groups() {
		gauge(groupEpoch, float64(g.Reigns().Epoch()), g.Name())
		gauge(groupFollows, is(g.Follows()), g.Name())
		for _, s := range c.r.group(g.Name()).shipped() {
			gauge(replicaLag, s.Lag, g.Name(), s.Peer)
			gauge(replicaLagBytes, float64(s.LagBytes), g.Name(), s.Peer)
			gauge(replicaAcked, float64(s.Acked), g.Name(), s.Peer)
			gauge(replicaConnected, is(s.State != notConnected), g.Name(), s.Peer)
			gauge(replicaSent, float64(s.SentBytes), g.Name(), s.Peer)
		}
	}
	ch <- prometheus.MustNewConstMetric(peersRefused, prometheus.CounterValue, float64(c.r.e.Refused.Load()))
}

// groupCollector reads the groups' state when it is asked.
type groupCollector struct{ store *journal.Store }

var groupGauges = []struct {
	desc *prometheus.Desc
	read func(*journal.Group) float64
}{
	{desc("tidemark_group_head_lsn", "The newest LSN; of a group that is being brought over a gap, how far that is."), func(g *journal.Group) float64 { return float64(g.Head()) }},
	{desc("tidemark_group_durable_lsn", "The LSN up to which the journal survives the host."), func(g *journal.Group) float64 { return float64(g.Durable()) }},
	{desc("tidemark_group_applied_lsn", "The LSN up to which the backings hold the records."), func(g *journal.Group) float64 { return float64(g.Applied()) }},
	{desc("tidemark_group_horizon_lsn", "The LSN where the continuous window begins."), func(g *journal.Group) float64 { return float64(g.Horizon()) }},
	{desc("tidemark_group_bridging", "1 while the group is being brought over a gap: what was before is the newest that can be viewed."), func(g *journal.Group) float64 {
		if _, open := g.Bridging(); open {
			return 1
		}
		return 0
	}},
	{desc("tidemark_group_window_seconds", "How long every write is kept at present."), func(g *journal.Group) float64 {
		since, _ := g.Window()
		return time.Since(since).Seconds()
	}},
	{desc("tidemark_group_window_promised_seconds", "How long every write is to be kept; 0: as long as there is room."), func(g *journal.Group) float64 { return g.Policy().EveryWrite.Seconds() }},
	{desc("tidemark_group_window_short", "1 if less is kept than is to be, for lack of space."), func(g *journal.Group) float64 {
		if _, short := g.Window(); short {
			return 1
		}
		return 0
	}},
	{desc("tidemark_group_kept_points", "How many points are kept beyond the continuous window."), func(g *journal.Group) float64 { return float64(len(g.KeptPoints())) }},
	{desc("tidemark_group_window_needs_bytes", "What the window that is promised will take if guests go on to write as they do; 0: that can not be said yet."), func(g *journal.Group) float64 {
		need, _, _ := g.Foresee()
		return float64(need)
	}},
	{desc("tidemark_group_window_room_bytes", "What there is room for of that."), func(g *journal.Group) float64 {
		_, room, _ := g.Foresee()
		return float64(room)
	}},
	{desc("tidemark_group_limit_bytes", "How large the group's segments may grow; 0: as far as the file system has room."), func(g *journal.Group) float64 { return float64(g.Limit()) }},
	{desc("tidemark_group_guest_bytes", "How many bytes were written to the group's disks since the daemon was started."), bytesOf(func(b *journal.Bytes) int64 { return b.Guest })},
	{desc("tidemark_group_journaled_bytes", "How many bytes of records that took."), bytesOf(func(b *journal.Bytes) int64 { return b.Log })},
	{desc("tidemark_group_originals_bytes", "How many bytes of originals were kept, carried over and copied beside, since the daemon was started."), bytesOf(func(b *journal.Bytes) int64 { return b.Originals })},
	{desc("tidemark_group_index_bytes", "What the group's part of the index takes up, about."), bytesOf(func(b *journal.Bytes) int64 { return b.Index })},
	{desc("tidemark_group_saved_bytes", "How much more the group's segments would take up if none was compact."), bytesOf(func(b *journal.Bytes) int64 { return b.Saved })},
	{desc("tidemark_group_journal_bytes", "What the group's segments take up."), func(g *journal.Group) float64 { return float64(g.JournalBytes()) }},
	{desc("tidemark_group_unapplied_bytes", "How far the backings are behind."), func(g *journal.Group) float64 { return float64(g.Unapplied()) }},
	{desc("tidemark_group_verified_timestamp_seconds", "When the last verification in the background was begun, Unix seconds; 0: there was none."), func(g *journal.Group) float64 {
		at, _ := g.Verified()
		if at.IsZero() {
			return 0
		}
		return float64(at.UnixNano()) / float64(time.Second)
	}},
	{desc("tidemark_group_damaged", "How many places it found damaged that could not be mended."), func(g *journal.Group) float64 {
		_, damaged := g.Verified()
		return float64(damaged)
	}},
	{desc("tidemark_group_active", "1 if the group takes writes."), func(g *journal.Group) float64 {
		if state, _ := g.State(); state == "active" {
			return 1
		}
		return 0
	}},
	{desc("tidemark_group_last_marker_timestamp_seconds", "When the newest marker was taken, Unix seconds; 0: there is none."), func(g *journal.Group) float64 {
		m, ok := g.LastMarker()
		if !ok {
			return 0
		}
		return float64(m.Time.UnixNano()) / float64(time.Second)
	}},
}

// bytesOf reads one of the figures of what a history takes; 0 if the index can not be measured.
func bytesOf(one func(*journal.Bytes) int64) func(*journal.Group) float64 {
	return func(g *journal.Group) float64 {
		b, _ := g.Bytes()
		return float64(one(&b))
	}
}

func desc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, []string{"group"}, nil)
}

func (c groupCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, g := range groupGauges {
		ch <- g.desc
	}
}

func (c groupCollector) Collect(ch chan<- prometheus.Metric) {
	for _, g := range c.store.Groups() {
		for _, m := range groupGauges {
			ch <- prometheus.MustNewConstMetric(m.desc, prometheus.GaugeValue, m.read(g), g.Name())
		}
	}
}
