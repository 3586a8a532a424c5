package main

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/replayer/node"
)

func TestFetched(t *testing.T) {
	require.False(t, fetched(&node.Report{}))
	require.True(t, fetched(&node.Report{End: node.Snapshot{Stats: backstore.Stats{BackgroundRequests: 1}}}))
	require.True(t, fetched(&node.Report{Before: &backstore.Stats{}}))
}

func TestFigures(t *testing.T) {
	lazy := backstore.Stats{
		Demand:         map[string]backstore.OriginStats{"fetch": {Reads: 3, Bytes: 1 << 20}},
		DemandRequests: 3, DemandBytes: 3 << 20, Stall: 1234567 * time.Microsecond,
		Latency: backstore.Histogram{Count: 1, Buckets: []backstore.Bucket{{From: 32 << 20, Count: 1}}},
	}
	replay := lazy
	replay.Demand = map[string]backstore.OriginStats{"fetch": {Bytes: 1 << 20}, "prefetch": {Bytes: 2 << 20}, "flight": {Bytes: 1 << 20}}
	replay.BackgroundRequests, replay.BackgroundBytes = 7, 4<<20
	replay.Used, replay.Unused = 3<<20, 1<<20
	replay.Late = backstore.OriginStats{Reads: 12, Bytes: 1 << 20, Wait: 80_123 * time.Microsecond}
	lines := func(r *node.Report) []string {
		var b strings.Builder
		figures(&b, r)
		return strings.Split(strings.TrimSuffix(b.String(), "\n"), "\n")
	}
	require.Equal(t, []string{
		"reprise: at the end: 3 MiB in 3 requests; reads waited 1.235s, 95 of 100 no longer than 34.6ms",
	}, lines(&node.Report{End: node.Snapshot{Stats: lazy}}))
	require.Equal(t, []string{
		"reprise: ready after 1.03s: 7 MiB in 10 requests; reads waited 1.235s, 95 of 100 no longer than 34.6ms; " +
			"75.0 % of the bytes read were prefetched; 12 reads of 1 MiB met theirs on the way and waited 80.1ms; " +
			"75.0 % of the bytes prefetched were read, 1 MiB were not",
		"reprise: at the end: 10 MiB in 13 requests; reads waited 2.469s, 95 of 100 no longer than 34.6ms; " +
			"60.0 % of the bytes read were prefetched; 12 reads of 1 MiB met theirs on the way and waited 80.1ms; " +
			"75.0 % of the bytes prefetched were read, 1 MiB were not",
	}, lines(&node.Report{
		Ready: true, Phases: []node.Phase{{Name: "ready", At: 1030 * time.Millisecond}},
		Start: node.Snapshot{Stats: replay}, End: node.Snapshot{Stats: replay}, Before: &lazy,
	}))
}
