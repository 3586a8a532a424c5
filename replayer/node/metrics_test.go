package node

import (
	"maps"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
)

// scrape reads a server's figures as Prometheus does: value by series.
func scrape(t *testing.T, s *Server) map[string]float64 {
	t.Helper()
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	require.Equal(t, 200, w.Code, w.Body.String())
	return parseMetrics(t, w.Body.String())
}

func parseMetrics(t *testing.T, text string) map[string]float64 {
	t.Helper()
	all := map[string]float64{}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(strings.TrimSpace(line[i:]), 64)
		require.NoError(t, err, line)
		all[line[:i]] = v
	}
	return all
}

// counters are the series that never fall while an image is open, or at all.
func counters(all map[string]float64, ofImages bool) map[string]float64 {
	c := maps.Clone(all)
	maps.DeleteFunc(c, func(name string, _ float64) bool {
		family, _, _ := strings.Cut(name, "{")
		counts := strings.HasSuffix(family, "_total") || strings.HasSuffix(family, "_bucket") ||
			strings.HasSuffix(family, "_sum") || strings.HasSuffix(family, "_count")
		return !strings.HasPrefix(name, "reprise_") || !counts || !ofImages && strings.HasPrefix(name, "reprise_image_")
	})
	return c
}

func notBelow(t *testing.T, before, now map[string]float64) {
	t.Helper()
	for name, v := range before {
		require.GreaterOrEqual(t, now[name], v, name)
	}
}

func TestMetricsLint(t *testing.T) {
	s := newSite(t)
	server := NewServer(s.n, nil)
	server.metrics.opened(s.open(t, ImageOptions{}))
	problems, err := testutil.CollectAndLint(server)
	require.NoError(t, err)
	require.Empty(t, problems)
	r := prometheus.NewPedanticRegistry()
	require.NoError(t, r.Register(server))
	_, err = r.Gather()
	require.NoError(t, err)
}

// TestMetrics opens and closes images; what is counted never falls.
func TestMetrics(t *testing.T) {
	s := newSite(t)
	server := NewServer(s.n, &ServerOptions{Version: "v1"})
	open := func() *Image {
		im, err := s.n.OpenImage(t.Context(), s.ref, nil)
		require.NoError(t, err)
		server.metrics.opened(im)
		return im
	}
	end := func(im *Image) {
		require.NoError(t, im.Close())
		server.metrics.closed(im)
		server.metrics.closed(im) // is nothing more
	}
	read := func(im *Image, off int64) {
		_, err := im.ReadAt(make([]byte, 4096), off)
		require.NoError(t, err)
	}
	host, _, _ := strings.Cut(s.ref, "/")
	of := func(family string, labels ...string) string {
		for i := range labels {
			k, v, _ := strings.Cut(labels[i], "=")
			labels[i] = k + `="` + v + `"`
		}
		return "reprise_" + family + "{" + strings.Join(labels, ",") + "}"
	}

	none := scrape(t, server)
	require.EqualValues(t, 1, none[of("build_info", "version=v1")])
	require.Contains(t, none, "reprise_demand_stall_seconds_total")
	require.Contains(t, none, "go_goroutines")
	require.Contains(t, none, "process_resident_memory_bytes")

	first := open()
	read(first, 8192)
	one := scrape(t, server)
	notBelow(t, counters(none, true), counters(one, true))
	require.EqualValues(t, 1, one["reprise_demand_latency_seconds_count"])
	require.EqualValues(t, 1, one[`reprise_demand_latency_seconds_bucket{le="+Inf"}`])
	require.EqualValues(t, 1, one[of("image_devices", "image="+s.ref)])
	require.EqualValues(t, 4096, one[of("image_demand_bytes_total", "image="+s.ref, "origin=prefetch")], "the layer came whole")
	require.EqualValues(t, 4096, one[of("demand_bytes_total", "origin=prefetch")])
	require.EqualValues(t, 1, one[of("registry_requests_total", "host="+host, "lane=demand")])
	require.EqualValues(t, 1, one[of("image_fetch_requests_total", "image="+s.ref, "lane=demand")])
	require.Positive(t, one[of("registry_rtt_seconds", "host="+host)])
	require.Zero(t, one[of("registry_away", "host="+host)])

	second := open()
	read(second, 12288)
	two := scrape(t, server)
	notBelow(t, counters(one, true), counters(two, true))
	require.EqualValues(t, 2, two["reprise_demand_latency_seconds_count"])
	require.EqualValues(t, 2, two[of("image_devices", "image="+s.ref)])
	require.EqualValues(t, 1, two[of("image_fetch_requests_total", "image="+s.ref, "lane=demand")], "they share the blob")

	end(first)
	closed := scrape(t, server)
	notBelow(t, counters(two, true), counters(closed, true))
	require.EqualValues(t, 1, closed[of("image_devices", "image="+s.ref)])
	end(second)
	last := scrape(t, server)
	notBelow(t, counters(closed, false), counters(last, false))
	require.EqualValues(t, 2, last["reprise_demand_latency_seconds_count"])
	for name := range last {
		require.NotContains(t, name, "reprise_image_")
	}

	third := open()
	again := scrape(t, server)
	notBelow(t, counters(last, false), counters(again, false))
	require.Zero(t, again[of("image_demand_bytes_total", "image="+s.ref, "origin=prefetch")], "it begins anew")
	end(third)
}

// TestMetricsOfABrokenServer has no node to ask.
func TestMetricsOfABrokenServer(t *testing.T) {
	require.Contains(t, scrape(t, NewBrokenServer(ErrNoDevice, nil)), "reprise_demand_stall_seconds_total")
}

func TestMetricsOddNames(t *testing.T) {
	server := NewBrokenServer(ErrNoDevice, nil)
	im := &Image{Ref: "a\xffb\"\n", Image: openLocal(t)}
	server.metrics.opened(im)
	require.Contains(t, scrape(t, server), `reprise_image_devices{image="a�b\"\n"}`)
	server.metrics.closed(im)
}

func openLocal(t *testing.T) *backstore.Image {
	t.Helper()
	n, _ := openNode(t)
	l := newLayout(t)
	l.index(tagged(l.image(ocispec.ImageConfig{}, l.converted(testLayer(t, 0, below))), "v1"))
	im, err := n.OpenImage(t.Context(), "oci:"+l.dir+":v1", nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, im.Close()) })
	return im.Image
}

// TestFiguresAreKept goes through three servers of a device.
func TestFiguresAreKept(t *testing.T) {
	of := func(n int64) *backstore.Stats {
		return &backstore.Stats{
			Demand: map[string]backstore.OriginStats{"fetch": {Reads: n, Bytes: n * 4096, Wait: time.Duration(n)}},
			Stall:  time.Duration(n), DemandRequests: n,
			Latency: backstore.Histogram{Count: n, Buckets: []backstore.Bucket{{From: 0, Count: n}}},
		}
	}
	root := t.TempDir()
	require.NoError(t, makeDevicesDir(root))
	st := &state{Version: stateVersion, Request: Request{ID: "dev-x"}, Figures: of(3)}
	for _, n := range []int64{5, 7} {
		require.NoError(t, st.write(root, false))
		var err error
		st, err = readState(filepath.Join(devicesDir(root), "dev-x.json"))
		require.NoError(t, err)
		st.succeed()
		require.Nil(t, st.Figures)
		st.succeed() // has not written any down
		st.Figures = of(n)
	}
	require.Equal(t, of(8), st.Before)
	all := (&Status{Before: st.Before, Now: Snapshot{Stats: *st.Figures}}).Total()
	require.Equal(t, *of(15), all)
	require.Equal(t, *of(7), (&Status{Now: Snapshot{Stats: *st.Figures}}).Total())
}
