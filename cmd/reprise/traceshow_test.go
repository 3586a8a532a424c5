package main

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/tracefmt"
)

// shownTrace is a trace that knows all there is to know.
func shownTrace() *tracefmt.Trace {
	const ms = time.Millisecond
	return &tracefmt.Trace{
		Header: tracefmt.Header{
			Version: tracefmt.Version, Space: tracefmt.LayerSpace, Image: "example.com/shop:7", Manifest: digest.FromString("m"),
			Workload: "shop", Args: []string{"shop", "-v"}, Tool: "reprise 1", Start: time.Unix(1, 0),
			Layers: []tracefmt.Layer{{Digest: digest.FromString("0"), Decoded: 1 << 20}, {Digest: digest.FromString("1"), Decoded: 1 << 30}},
		},
		Events: []tracefmt.Event{
			{At: 1 * ms, Wait: 5 * ms, Off: 0, Len: 4096, Process: "runc", Pid: 1},
			{At: 2 * ms, Wait: 10 * ms, Off: 8192, Len: 4096, Path: "/usr/lib/a", Process: "sh\x1b[31m", Pid: 2, Container: "c"},
			{At: 3 * ms, Wait: 20 * ms, Off: 4096, Len: 4096, Path: "/usr/lib/b\n", FileOff: 4096, Process: "sh\x1b[31m", Pid: 2, Container: "c"},
			{At: 100 * ms, Layer: 1, Off: 1 << 20, Len: 1 << 20, Path: "/etc/x", Process: "shop", Pid: 3, Container: "c"},
		},
		End: &tracefmt.End{Reason: "ready: port 80", Ready: 110 * ms, Events: 4, Bytes: 12288 + 1<<20, Duration: 120 * ms},
	}
}

func writeTrace(t *testing.T, path string, trace *tracefmt.Trace) string {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, tracefmt.Encode(f, trace))
	return path
}

func TestTraceShow(t *testing.T) {
	b := newBench(t)
	file := writeTrace(t, b.path("shop.trace"), shownTrace())
	zero, one := digest.FromString("0").String(), digest.FromString("1").String()
	tests := []struct {
		args string
		want string
	}{
		{"--by file", `
  BYTES  PIECES  READS  FIRST AT  WAIT  FILE
  1 MiB       1      1     100ms    0s  /etc/x
  4 KiB       1      1       1ms   5ms  (no file)
  4 KiB       1      1       2ms  10ms  /usr/lib/a
  4 KiB       1      1       3ms  20ms  /usr/lib/b\n
`},
		{"--by file --sort wait --top 1", `
  BYTES  PIECES  READS  FIRST AT  WAIT  FILE
  4 KiB       1      1       3ms  20ms  /usr/lib/b\n
… and 3 more, 1.008 MiB
`},
		{"--by dir --depth 1", `
  BYTES  PIECES  READS  FIRST AT  WAIT  DIR
  1 MiB       1      1     100ms    0s  /etc
  8 KiB       1      2       2ms  30ms  /usr
  4 KiB       1      1       1ms   5ms  (no file)
`},
		{"--by process --sort first", `
  BYTES  PIECES  READS  FIRST AT  WAIT  PROCESS
  4 KiB       1      1       1ms   5ms  runc [1]
  8 KiB       1      2       2ms  30ms  sh\x1b[31m [2] in c
  1 MiB       1      1     100ms    0s  shop [3] in c
`},
		{"--by layer", `
   BYTES     OF  PIECES  READS  FIRST AT  WAIT  LAYER
  12 KiB  1 MiB       1      3       1ms  35ms  0 ` + zero + `
   1 MiB  1 GiB       1      1     100ms    0s  1 ` + one + `
`},
		{"--by time --sort bytes --top 2", `
   BYTES  PIECES  READS  FIRST AT  WAIT  TIME
   1 MiB       1      1     100ms    0s  100ms to 105ms
  12 KiB       1      3       1ms  35ms  0s to 5ms
… and 19 more, 0 B
`},
	}
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			require.Equal(t, strings.TrimPrefix(tt.want, "\n"), b.ok(append([]string{"trace", "show", file}, strings.Fields(tt.args)...)...))
		})
	}
	all := b.ok("trace", "show", file)
	for _, want := range []string{"image     example.com/shop:7\n", "ready after 110ms\n", "  LAYER\n", "  DIR\n", "  FILE\n", "  PROCESS\n", "reads     4, of 1060864 bytes"} {
		require.Contains(t, all, want)
	}
	require.NotContains(t, all, "\x1b")
}

// JSON has names as they are, and times in microseconds.
func TestTraceShowJSON(t *testing.T) {
	b := newBench(t)
	trace := shownTrace()
	trace.Runs = 4
	trace.Events[1].Hits = 3
	file := writeTrace(t, b.path("shop.trace"), trace)
	var shown showJSON
	require.NoError(t, json.Unmarshal([]byte(b.ok("trace", "show", file, "--by", "file", "--top", "2", "--sort", "wait", "--json")), &shown))
	require.Equal(t, "file", shown.By)
	require.Equal(t, 4, shown.Runs)
	require.Equal(t, []shareRow{
		{Name: "/usr/lib/b\n", Bytes: 4096, Extents: 1, Reads: 1, Files: 1, First: 3000, Last: 3000, Wait: 20000, Seen: 0.25},
		{Name: "/usr/lib/a", Bytes: 4096, Extents: 1, Reads: 1, Files: 1, First: 2000, Last: 2000, Wait: 10000, Seen: 0.75},
	}, shown.Rows)
	require.Equal(t, int64(12288+1<<20), shown.Total.Bytes)

	out := b.ok("trace", "show", file, "--by", "time", "--json")
	decode(t, out, "by", "runs", "rows.from_us", "rows.to_us", "rows.bytes", "rows.extents", "rows.reads", "rows.first_us", "rows.last_us", "rows.wait_us", "total.bytes")
	decode(t, b.ok("trace", "show", file, "--by", "layer", "--json"), "rows.layer", "rows.digest", "rows.of_bytes")
	require.Contains(t, b.ok("trace", "show", file, "--by", "file"), "RUNS")
	require.Contains(t, b.ok("trace", "show", file), "merged    from 4 recordings")
}

// A trace without files and processes says how to get them.
func TestTraceShowMissing(t *testing.T) {
	b := newBench(t)
	trace := shownTrace()
	for i := range trace.Events {
		e := &trace.Events[i]
		*e = tracefmt.Event{At: e.At, Layer: e.Layer, Off: e.Off, Len: e.Len}
	}
	file := writeTrace(t, b.path("old.trace"), trace)
	all := b.ok("trace", "show", file)
	require.Equal(t, 1, strings.Count(all, "which files"))
	require.Contains(t, all, "which processes")
	for by, want := range map[string]string{"file": "reprise attach", "dir": "reprise attach", "process": "reprise doctor"} {
		require.Contains(t, b.ok("trace", "show", file, "--by", by), want)
		var shown showJSON
		require.NoError(t, json.Unmarshal([]byte(b.ok("trace", "show", file, "--by", by, "--json")), &shown))
		require.Contains(t, shown.Missing, want)
	}
}

func TestTraceShowHTML(t *testing.T) {
	b := newBench(t)
	file := writeTrace(t, b.path("shop.trace"), shownTrace())
	page := b.path("page.html")
	require.Empty(t, b.ok("trace", "show", file, "--html", page))
	html, err := os.ReadFile(page)
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(string(html), "<!DOCTYPE html>"))
	require.True(t, strings.Contains(string(html), `/usr/lib/b\n</td>`))
	require.Equal(t, string(html), b.ok("trace", "show", file, "--html", "-"))
	b.fails(exitFailed, []string{"trace", "show", file, "--html", page}, "page.html exists: name a new file")
	b.fails(exitFailed, []string{"trace", "show", b.write("x", "no trace"), "--html", b.path("none")}, "x")
	require.NoFileExists(t, b.path("none"))
}

// A trace beside an image shows without being pulled to a file first.
func TestTraceShowBesideImage(t *testing.T) {
	b := newBench(t)
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry")})
	require.NoError(t, err)
	s := b.shelf(b.site("0s,unlimited", g).addr)
	s.ok("attach", s.ref, s.trace("web", 20))
	s.ok("attach", s.ref, s.trace("batch", 5))
	s.ok("trace", "pull", s.ref, s.path("web.trace"), "--workload", "web")
	require.Equal(t, s.ok("trace", "show", s.path("web.trace")), s.ok("trace", "show", s.ref+"#web"))
	require.Equal(t, s.ok("trace", "show", s.path("web.trace"), "--html", "-"), s.ok("trace", "show", s.ref+"#web", "--html", "-"))
	s.fails(exitFailed, []string{"trace", "show", s.ref + "#"}, "it has 2 traces")
	s.fails(exitFailed, []string{"trace", "show", s.ref}, s.ref)
}
