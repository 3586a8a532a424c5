package node

import (
	"maps"
	"math"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/replayer"
)

// metrics are a server's figures for Prometheus: those of the process, which
// never fall; those of the images that are open, by reference; and those of the
// registry hosts. An image that has no device any more has no series.
type metrics struct {
	mu     sync.Mutex // guards what follows
	past   backstore.Stats
	images map[string]*imageFigures // by reference
}

// imageFigures are those of the devices of one reference.
type imageFigures struct {
	open map[*Image]bool
	past backstore.Stats // of those that were closed since there was none open
}

// opened begins to count what an image does.
func (m *metrics) opened(im *Image) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.images == nil {
		m.images = map[string]*imageFigures{}
	}
	f := m.images[im.Ref]
	if f == nil {
		f = &imageFigures{open: map[*Image]bool{}}
		m.images[im.Ref] = f
	}
	f.open[im] = true
}

// closed keeps what an image has done. It need not have been opened.
func (m *metrics) closed(im *Image) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.images[im.Ref]
	if f == nil || !f.open[im] {
		return
	}
	delete(f.open, im)
	demand := demandOf(im)
	m.past = m.past.Add(demand)
	f.past = f.past.Add(demand).Add(blobsOf(f.open, im).Stats())
	if len(f.open) == 0 {
		delete(m.images, im.Ref)
	}
}

// demandOf are an image's own figures, without those of its blobs.
func demandOf(im *Image) backstore.Stats {
	s := im.Stats()
	return backstore.Stats{Demand: s.Demand, Stall: s.Stall, Wait: s.Wait, Latency: s.Latency, Late: s.Late}
}

// blobsOf are the blobs of some images, once each, without those of others.
func blobsOf(others map[*Image]bool, images ...*Image) (s backstore.Stack) {
	seen := map[*backstore.Blob]bool{nil: true}
	for im := range others {
		for _, b := range im.Blobs() {
			seen[b] = true
		}
	}
	for _, im := range images {
		for _, b := range im.Blobs() {
			if !seen[b] {
				seen[b] = true
				s = append(s, b)
			}
		}
	}
	return s
}

// figures are all of one moment.
type figures struct {
	process backstore.Stats // demand only
	images  map[string]backstore.Stats
	devices map[string]int
}

func (m *metrics) read() figures {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := figures{process: m.past, images: map[string]backstore.Stats{}, devices: map[string]int{}}
	for ref, f := range m.images {
		sum := f.past
		var open []*Image
		for im := range f.open {
			demand := demandOf(im)
			all.process = all.process.Add(demand)
			sum = sum.Add(demand)
			open = append(open, im)
		}
		all.images[ref] = sum.Add(blobsOf(nil, open...).Stats())
		all.devices[ref] = len(open)
	}
	return all
}

// outcomes counts how replays have ended.
type outcomes struct {
	mu sync.Mutex // guards n
	n  map[string]int64
}

// The values of the label outcome.
const (
	replayComplete = "complete"
	replayStopped  = "stopped"
	replayFailed   = "failed"
	replayUnused   = "unused"
	replayNone     = "none"
)

func (o *outcomes) add(outcome string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.n == nil {
		o.n = map[string]int64{}
	}
	o.n[outcome]++
}

// read gives all outcomes, also those that were not seen.
func (o *outcomes) read() map[string]int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := map[string]int64{replayComplete: 0, replayStopped: 0, replayFailed: 0, replayUnused: 0, replayNone: 0}
	maps.Copy(all, o.n)
	return all
}

// outcome is how an image's replay has ended.
func (r *replaying) outcome() string {
	switch {
	case r.trace == nil:
		return replayNone
	case r.plan == nil:
		return replayUnused
	case r.result.Reason == replayer.Complete:
		return replayComplete
	case r.result.Failed > 0:
		return replayFailed
	}
	return replayStopped
}

// Labels. Those of origin are the values of [backstore.Origin].
const (
	labelOrigin = "origin"
	labelImage  = "image"
	labelHost   = "host"
	labelLane   = "lane"

	labelOutcome = "outcome"
)

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("reprise_"+name, help, labels, nil)
}

// The families of the process.
var (
	descBuild = describe("build_info", "The program's version; always 1.", "version")

	descReads   = describe("demand_reads_total", "Reads of places of layers that processes have asked for, by where the bytes came from.", labelOrigin)
	descBytes   = describe("demand_bytes_total", "Bytes, uncompressed, that processes have asked for, by where they came from.", labelOrigin)
	descWait    = describe("demand_wait_seconds_total", "Time that reads have waited for bytes, added up over all of them, by where the bytes came from.", labelOrigin)
	descStall   = describe("demand_stall_seconds_total", "Time during which at least one read of an image waited for bytes, added up over images.")
	descReplays = describe("replays_total", "Replays that have ended: complete, stopped (it did no good, or the container ended first), failed (some requests did), unused (a trace that does not fit) or none (no trace).", labelOutcome)
	descLatency = describe("demand_latency_seconds", "How long reads of devices that touch remote layers waited until their bytes were on the node.")
)

// The families of open images.
var (
	descImageDevices  = describe("image_devices", "Devices of the image that are served.", labelImage)
	descImageReads    = describe("image_demand_reads_total", "As reprise_demand_reads_total, of one image.", labelImage, labelOrigin)
	descImageBytes    = describe("image_demand_bytes_total", "As reprise_demand_bytes_total, of one image.", labelImage, labelOrigin)
	descImageWait     = describe("image_demand_wait_seconds_total", "As reprise_demand_wait_seconds_total, of one image.", labelImage, labelOrigin)
	descImageStall    = describe("image_demand_stall_seconds_total", "As reprise_demand_stall_seconds_total, of one image.", labelImage)
	descImageRequests = describe("image_fetch_requests_total", "Requests for the image's blobs, which other images may share; background is ahead of demand.", labelImage, labelLane)
	descImageFetched  = describe("image_fetched_bytes_total", "Bytes received of the image's blobs, which other images may share; background is ahead of demand.", labelImage, labelLane)
	descImageUnused   = describe("image_prefetch_unused_bytes", "Bytes fetched in the background that no read has wanted so far.", labelImage)
	descImageCoverage = describe("image_prefetch_coverage_ratio", "Share of the demand bytes of remote layers that were there, or on their way, ahead of demand.", labelImage)
	descImageAccuracy = describe("image_prefetch_accuracy_ratio", "Share of the bytes fetched in the background that reads have wanted since.", labelImage)
)

// The families of registry hosts.
var (
	descHostRequests  = describe("registry_requests_total", "Requests for parts of blobs; background is ahead of demand.", labelHost, labelLane)
	descHostBytes     = describe("registry_received_bytes_total", "Bytes received of blobs; background is ahead of demand.", labelHost, labelLane)
	descHostUsed      = describe("registry_prefetch_used_bytes_total", "Bytes received in the background that reads have wanted since.", labelHost)
	descHostCorrupt   = describe("registry_corrupt_blocks_total", "Blocks that were bad, and fetched again.", labelHost)
	descHostThrottled = describe("registry_throttled_total", "Answers that asked to be left alone for a while (Retry-After, as with status 429).", labelHost)
	descHostOutages   = describe("registry_outages_total", "Times that the host could not be reached, or answered with nothing but errors.", labelHost)
	descHostAway      = describe("registry_away", "Whether the host is in such an outage now.", labelHost)
	descHostRTT       = describe("registry_rtt_seconds", "Measured least time from a request to its first byte; 0 while unknown.", labelHost)
	descHostBandwidth = describe("registry_bandwidth_bytes_per_second", "Measured bandwidth of the link to the host; 0 while unknown.", labelHost)
)

// latencyBounds are the bounds of the buckets of demand_latency_seconds: reads
// that find their bytes here are in the first, a round trip and more have three
// an octave.
var latencyBounds = []float64{
	1e-5, 1e-4, 1e-3, 0.002, 0.005, 0.01, 0.0125, 0.016, 0.02, 0.025, 0.032, 0.04, 0.05, 0.063, 0.08, 0.1,
	0.125, 0.16, 0.2, 0.25, 0.32, 0.4, 0.5, 0.63, 0.8, 1, 1.25, 1.6, 2, 2.5, 5, 10, 30, 60,
}

// Collect implements [prometheus.Collector].
func (s *Server) Collect(ch chan<- prometheus.Metric) {
	c := collection{ch}
	c.gauge(descBuild, 1, s.o.Version)
	all := s.metrics.read()
	c.demand(&all.process, descReads, descBytes, descWait)
	c.counter(descStall, all.process.Stall.Seconds())
	c.latency(all.process.Latency)
	for ref, st := range all.images {
		c.image(ref, all.devices[ref], &st)
	}
	if s.n == nil {
		return
	}
	for o, n := range s.n.outcomes.read() {
		c.counter(descReplays, float64(n), o)
	}
	for _, h := range s.n.cache.Hosts() {
		c.host(&h)
	}
}

// Describe implements [prometheus.Collector].
func (s *Server) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		descBuild, descReads, descBytes, descWait, descStall, descLatency, descReplays,
		descImageDevices, descImageReads, descImageBytes, descImageWait, descImageStall, descImageRequests, descImageFetched,
		descImageUnused, descImageCoverage, descImageAccuracy,
		descHostRequests, descHostBytes, descHostUsed, descHostCorrupt, descHostThrottled, descHostOutages, descHostAway,
		descHostRTT, descHostBandwidth,
	} {
		ch <- d
	}
}

// MetricsHandler answers with the server's figures, and those of its process, as
// Prometheus reads them.
func (s *Server) MetricsHandler() http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(s.o.Collectors...)
	r.MustRegister(s, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{})
}

// A collection is one round of collecting.
type collection struct{ ch chan<- prometheus.Metric }

func (c collection) send(d *prometheus.Desc, t prometheus.ValueType, v float64, labels []string) {
	for i, l := range labels {
		labels[i] = strings.ToValidUTF8(l, "�") // a path can be anything
	}
	c.ch <- prometheus.MustNewConstMetric(d, t, v, labels...)
}

func (c collection) counter(d *prometheus.Desc, v float64, labels ...string) {
	c.send(d, prometheus.CounterValue, v, labels)
}

func (c collection) gauge(d *prometheus.Desc, v float64, labels ...string) {
	c.send(d, prometheus.GaugeValue, v, labels)
}

// demand sends what there was of each origin, 0 too; under labels, if any.
func (c collection) demand(s *backstore.Stats, reads, bytes, wait *prometheus.Desc, labels ...string) {
	for _, o := range backstore.Origins() {
		d := s.Demand[o.String()]
		with := func() []string { return append(append([]string(nil), labels...), o.String()) }
		c.counter(reads, float64(d.Reads), with()...)
		c.counter(bytes, float64(d.Bytes), with()...)
		c.counter(wait, d.Wait.Seconds(), with()...)
	}
}

func (c collection) latency(h backstore.Histogram) {
	buckets := make(map[float64]uint64, len(latencyBounds))
	for _, le := range latencyBounds {
		buckets[le] = uint64(h.Until(time.Duration(math.Round(le * 1e9))))
	}
	c.ch <- prometheus.MustNewConstHistogram(descLatency, uint64(h.Count), h.Sum.Seconds(), buckets)
}

func (c collection) image(ref string, devices int, s *backstore.Stats) {
	c.gauge(descImageDevices, float64(devices), ref)
	c.demand(s, descImageReads, descImageBytes, descImageWait, ref)
	c.counter(descImageStall, s.Stall.Seconds(), ref)
	c.lanes(descImageRequests, s.DemandRequests, s.BackgroundRequests, ref)
	c.lanes(descImageFetched, s.DemandBytes, s.BackgroundBytes, ref)
	c.gauge(descImageUnused, float64(s.Unused), ref)
	c.gauge(descImageCoverage, s.Coverage(), ref)
	c.gauge(descImageAccuracy, s.Accuracy(), ref)
}

func (c collection) host(h *backstore.HostStats) {
	c.lanes(descHostRequests, h.DemandRequests, h.BackgroundRequests, h.Host)
	c.lanes(descHostBytes, h.DemandBytes, h.BackgroundBytes, h.Host)
	c.counter(descHostUsed, float64(h.Used), h.Host)
	c.counter(descHostCorrupt, float64(h.Corrupt), h.Host)
	c.counter(descHostThrottled, float64(h.Throttled), h.Host)
	c.counter(descHostOutages, float64(h.Outages), h.Host)
	away := 0.0
	if h.Away {
		away = 1
	}
	c.gauge(descHostAway, away, h.Host)
	c.gauge(descHostRTT, h.Estimate.RTT.Seconds(), h.Host)
	c.gauge(descHostBandwidth, float64(h.Estimate.Bandwidth), h.Host)
}

// lanes sends what demand and background fetches have of something.
func (c collection) lanes(d *prometheus.Desc, demand, background int64, label string) {
	c.counter(d, float64(demand), label, "demand")
	c.counter(d, float64(background), label, "background")
}
