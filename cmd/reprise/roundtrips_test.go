package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/node"
)

// TestRoundTrips counts the round trips that a cold start waits for one after
// the other, from the command to the container's first process, by what really
// went over a link that is so long that nothing else counts. What stands on one
// line of the list that it prints (go test -v) was under way at once:
//
//	with a trace                                without one
//	1  connections                              1  connections
//	2  manifest by tag                          2  manifest by tag
//	3  trace, tails of the layers               3  tails of the layers
//	4  data until the first process runs        4  superblock, root directory
//	                                            5  … what runc and the kernel read, one after the other
//
// The config comes with the manifest, and the trace with its own: inline.
func TestRoundTrips(t *testing.T) {
	skipWithoutRunc(t)
	const layers, withTrace = 12, 4
	b := newBench(t)
	image, config := manyLayers(t, layers)
	writeLayout(t, b.path("source"), image, config)
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry")})
	require.NoError(t, err)
	near, far := b.site("0s,unlimited", g), b.site("250ms,unlimited", g)
	ref := near.addr + "/tests/trips:obd"
	b.ok("convert", "oci:"+b.path("source"), ref)
	b.ok("record", "--root", b.mkdir("recorded"), "--attach", "-o", b.path("trace"), ref)

	trips := map[string]int{}
	for _, trace := range []string{"none", "auto"} {
		far.Reset()
		started := b.startedAt(b.mkdir("root-"+trace), trace, far.addr+"/tests/trips:obd")
		before := slices.DeleteFunc(far.Stats().Log, func(r regtest.Request) bool { return r.Start.After(started) })
		list := roundTrips(before, far.Spec().Delay)
		trips[trace] = len(list)
		for _, r := range before {
			t.Logf("%8.1f ms  %-16s %s %s", r.Start.Sub(before[0].Start).Seconds()*1000, purpose(r), r.Path[max(0, len(r.Path)-12):], r.Range)
		}
		t.Logf("--trace %s: %d round trips until the first process\n%s", trace, len(list), strings.Join(list, "\n"))
	}
	require.Equal(t, withTrace, trips["auto"])
	require.Greater(t, trips["none"], withTrace)
}

// startedAt starts a container and tells when its first process ran.
func (b *bench) startedAt(root, trace, ref string) time.Time {
	b.t.Helper()
	r, w, err := os.Pipe()
	require.NoError(b.t, err)
	defer r.Close()
	cmd := b.command("run", "--root", root, "--trace", trace, "--report-fd", "3", "--ready-exit", ref)
	cmd.ExtraFiles = []*os.File{w}
	done := b.finish(cmd)
	require.NoError(b.t, w.Close())
	require.Zero(b.t, done.code, done.stderr)
	var report node.Report
	require.NoError(b.t, json.NewDecoder(r).Decode(&report))
	at := map[string]time.Duration{}
	for _, p := range report.Phases {
		at[p.Name] = p.At
	}
	require.Contains(b.t, at, "process started")
	return report.ReadyAt.Add(at["process started"] - at["ready"])
}

// roundTrips sorts requests by how many round trips there were before they were
// answered, and names those of each. A request follows another one if it was
// sent when that could have been answered.
func roundTrips(log []regtest.Request, delay time.Duration) []string {
	depth := make([]int, len(log))
	of := map[int][]string{}
	for i, r := range log {
		sent := 0
		for j, q := range log {
			if j != i && !r.Start.Before(q.Start.Add(q.Waited+delay)) {
				sent = max(sent, depth[j])
			}
		}
		if r.Waited > delay/2 {
			sent++
			of[sent] = append(of[sent], "connection")
		}
		depth[i] = sent + 1
		of[depth[i]] = append(of[depth[i]], purpose(r))
	}
	list := make([]string, 0, len(of))
	for n := 1; len(of[n]) > 0; n++ {
		list = append(list, fmt.Sprintf("  %2d  %s", n, counted(of[n])))
	}
	return list
}

// purpose names what a request was for.
func purpose(r regtest.Request) string {
	name := filepath.Base(r.Path)
	switch {
	case r.Kind == "tag" && strings.Contains(name, ".reprise-"):
		return "trace"
	case r.Kind == "tag":
		return "manifest by tag"
	case r.Kind == "blob" && r.Prefetch:
		return "replay"
	case r.Kind == "blob" && r.Range == "":
		return "small layer"
	case r.Kind == "blob":
		return "range of a layer"
	}
	return r.Kind
}

// counted is a list whose equal parts are counted.
func counted(parts []string) string {
	n := map[string]int{}
	for _, p := range parts {
		n[p]++
	}
	var out []string
	for _, p := range slices.Compact(slices.Sorted(slices.Values(parts))) {
		if n[p] > 1 {
			p = strconv.Itoa(n[p]) + " × " + p
		}
		out = append(out, p)
	}
	return strings.Join(out, ", ")
}
