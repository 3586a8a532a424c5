package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// get reads a URL, of a unix socket if one is named.
func get(t *testing.T, socket, url string) (status int, body string) {
	t.Helper()
	tr := &http.Transport{}
	if socket != "" {
		tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}
	}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: patience}).Get(url)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	p, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(p)
}

// metric is the value of a series; the series is there.
func metric(t *testing.T, text, series string) float64 {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)$`).FindStringSubmatch(text)
	require.NotNil(t, m, "%s is not in\n%s", series, text)
	v, err := strconv.ParseFloat(m[1], 64)
	require.NoError(t, err)
	return v
}

// TestDaemonMetrics reads the figures of a daemon while it serves an image, and
// finds them in its state when it is replaced.
func TestDaemonMetrics(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := b.command("supervise", "--", self, "daemon", "--root", b.root, "--metrics", "127.0.0.1:0")
	addr, serves := "", false
	said := b.start(cmd, func(line string) bool {
		if m := regexp.MustCompile(`msg=metrics address=(\S+)`).FindStringSubmatch(line); m != nil {
			addr = m[1]
		}
		serves = serves || strings.Contains(line, "the daemon serves")
		return serves && addr != ""
	})
	dir := b.mkdir("mnt")
	b.ok("mount", s.ref, dir)
	require.NoError(t, readThrough(dir+"/data/big", randomBytes(3, 3_000_000)))

	socket := filepath.Join(b.root, "reprise.sock")
	status, text := get(t, "", "http://"+addr+"/metrics")
	require.Equal(t, http.StatusOK, status, text)
	_, same := get(t, socket, "http://daemon/metrics")
	status, _ = get(t, "", "http://"+addr+"/v1/devices")
	require.Equal(t, http.StatusNotFound, status, "only figures are there for everybody")

	host, _, _ := strings.Cut(s.ref, "/")
	image := fmt.Sprintf("{image=%q}", s.ref)
	reads := metric(t, text, "reprise_demand_latency_seconds_count")
	require.Positive(t, reads)
	require.EqualValues(t, 1, metric(t, text, "reprise_image_devices"+image))
	require.EqualValues(t, 1, metric(t, same, "reprise_image_devices"+image))
	require.Positive(t, metric(t, text, fmt.Sprintf(`reprise_registry_requests_total{host=%q,lane="demand"}`, host)))
	require.Greater(t, metric(t, text, fmt.Sprintf(`reprise_registry_received_bytes_total{host=%q,lane="demand"}`, host)), 1e6)
	require.Positive(t, metric(t, text, "reprise_demand_stall_seconds_total"))
	require.Positive(t, metric(t, text, "go_goroutines"))

	require.NotContains(t, b.stateOf(dir), "before")
	b.ok("daemon", "upgrade", "--root", b.root)
	_, text = get(t, socket, "http://daemon/metrics")
	require.EqualValues(t, 1, metric(t, text, "reprise_image_devices"+image))
	require.Less(t, metric(t, text, "reprise_demand_latency_seconds_count"), reads, "another process counts anew")
	before := b.stateOf(dir)["before"].(map[string]any)
	require.GreaterOrEqual(t, before["latency"].(map[string]any)["count"].(float64), reads)

	b.ok("umount", dir)
	_, text = get(t, socket, "http://daemon/metrics")
	require.NotContains(t, text, "reprise_image_devices{")
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	require.NoError(t, cmd.Wait(), said())
	b.settled()
}

// TestServeMetrics waits for an address that is in use.
func TestServeMetrics(t *testing.T) {
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "figures") })
	log := slog.New(slog.DiscardHandler)
	serveMetrics("", h, log)()

	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := l.Addr().String()
	stop := serveMetrics(addr, h, log)
	require.NoError(t, l.Close())
	eventually(t, "figures", func() bool {
		status, body := get(t, "", "http://"+addr+"/metrics")
		return status == http.StatusOK && body == "figures\n"
	})
	stop()
	status, _ := get(t, "", "http://"+addr+"/metrics")
	require.Zero(t, status)

	l, err = net.Listen("tcp", addr)
	require.NoError(t, err)
	serveMetrics(addr, h, log)() // while it is in use
	require.NoError(t, l.Close())
	serveMetrics("256.0.0.1:x", h, log)()
}
