package main

import (
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/compare"
)

// workload reads most of the small image, says that it is ready, and ends with
// status 7 when it is told to.
var workload = []string{"/bin/sh", "-c", "trap 'exit 7' TERM; cat /data/a /data/big /data/more /data/sub/new page-* > /dev/null; echo ready; sleep 1000 & wait"}

// recordFor records the workload, or another command, on an image.
func (b *bench) recordFor(ref, name string, command ...string) string {
	b.t.Helper()
	file := b.path(name)
	args := []string{"record", "--root", b.mkdir(name + ".root"), "-o", file, "--ready-log", "^ready$", ref, "--"}
	r := b.run(append(args, command...)...)
	require.Zero(b.t, r.code, r.stderr)
	return file
}

// otherImage has nothing in common with the small image.
func (b *bench) otherImage(s *site) string {
	layer := append(programs(b.t, "bin/sh", "bin/cat", "bin/sleep"), dirs("tmp", "proc", "dev", "sys", "other")...)
	layer = append(layer, testFile{name: "other/file", body: randomBytes(77, 4_000_000)})
	writeLayout(b.t, b.mkdir("other"), []testLayer{layer}, v1.ImageConfig{Env: smallConfig.Env})
	ref := s.addr + "/tests/other:obd"
	b.ok("convert", "oci:"+b.path("other"), ref)
	return ref
}

// counting counts the faults.
func counting(fault func(*http.Request) *regtest.Fault, n *atomic.Int64) func(*http.Request) *regtest.Fault {
	return func(r *http.Request) *regtest.Fault {
		f := fault(r)
		if f != nil {
			n.Add(1)
		}
		return f
	}
}

// TestAdversaries replays traces that do not fit, with a registry that fails,
// and with no room for what is fetched: all containers get ready and end as they
// would, and the reason is said.
func TestAdversaries(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.ownSite(false)
	own := b.recordFor(s.ref, "own.trace", workload...)
	traces := compare.Traces{
		Workload:  b.recordFor(s.ref, "workload.trace", "/bin/sh", "-c", "cat /bin/cat /bin/sleep hostname page-7 > /dev/null; echo ready"),
		Image:     b.recordFor(b.otherImage(s), "image.trace", "/bin/sh", "-c", "cat /other/file > /dev/null; echo ready"),
		Truncated: b.path("truncated.trace"),
	}
	require.NoError(t, compare.Truncate(own, traces.Truncated))
	b.ok("attach", s.ref, own)

	variants := slices.Concat(compare.Adversaries(traces, 3<<20), compare.Standard()[1:2])
	var failed atomic.Int64
	for i := range variants {
		if choose := variants[i].Fault; choose != nil {
			variants[i].Fault = func() func(*http.Request) *regtest.Fault { return counting(choose(), &failed) }
		}
	}
	const pairs = 1
	r, err := compare.Run(t.Context(), compare.Options{
		Program: b.executable(), Env: b.env, Ref: s.ref, Args: workload, Flags: []string{"--net", "own", "--ready-log", "^ready$"},
		Variants: variants, Runs: pairs, Dir: b.dir, Link: s.Link, Timeout: patience,
	})
	require.NoError(t, err)
	require.Positive(t, failed.Load(), "the registry has seen prefetches")
	for mode, f := range r.Modes {
		require.Equal(t, []int{7}, r.Exits[mode], "%s: status of the container", mode)
		require.Len(t, f.Ready.Runs, pairs)
		t.Logf("%s: %.0f requests: %q", mode, f.Requests.Median, r.Said[mode])
	}
	for mode, want := range map[compare.Mode]string{
		compare.Lazy:       "no trace was asked for",
		compare.Replay:     "trace sha256:.* replayed",
		"other workload":   "workload.trace",
		"other image":      "no layer",
		"truncated":        "cut off|truncated.trace",
		"failing prefetch": "trace sha256:",
		"cache full":       "partly used: .*(does not fit|room|full|space)",
		"disk full":        "(does not fit|room|full|space)",
	} {
		require.Regexp(t, want, strings.Join(r.Said[mode], " "), mode)
	}
	left, err := filepath.Glob(b.path("reprise-compare-*"))
	require.NoError(t, err)
	require.Empty(t, left)
	b.settled()
}

// TestFleet starts containers at once through one daemon, with and without
// traces; all get ready.
func TestFleet(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.ownSite(false)
	b.ok("attach", s.ref, b.recordFor(s.ref, "own.trace", workload...))
	r, err := compare.Fleet(t.Context(), compare.FleetOptions{
		Program: b.executable(), Env: b.env, Refs: []string{s.ref, s.ref, s.ref}, Args: workload,
		Flags: []string{"--net", "own", "--ready-log", "^ready$"}, Rounds: 1, Dir: b.dir, Link: s.Link, Timeout: patience,
	})
	require.NoError(t, err)
	for _, m := range []compare.Mode{compare.Lazy, compare.Replay} {
		require.Positive(t, r.Modes[m].Requests.Median, m)
		require.Positive(t, r.Modes[m].Last.Median, m)
	}
	require.Len(t, r.Paired["p95"].Runs, 1)
	left, err := filepath.Glob(b.path("fleet-*"))
	require.NoError(t, err)
	require.Empty(t, left)
	b.settled()
}
