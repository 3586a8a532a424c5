package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/replayer"
	"github.com/reprise-project/reprise/tracefmt"
)

// writeStart writes the trace of a start that reads one megabyte in ten reads.
func writeStart(t *testing.T, name string, located bool) string {
	tr := &tracefmt.Trace{Header: tracefmt.Header{
		Version: tracefmt.Version, Space: tracefmt.LayerSpace,
		Layers: []tracefmt.Layer{{Digest: digest.FromString("layer"), Size: 32 << 20, Decoded: 64 << 20}},
	}}
	for i := range int64(10) {
		e := tracefmt.Event{At: time.Duration(i) * time.Millisecond, Off: i * 4 << 20, Len: 200 << 10}
		if located {
			e.BlobOff, e.BlobLen = i*2<<20, 100<<10
		}
		tr.Events = append(tr.Events, e)
	}
	tr.End = &tracefmt.End{Reason: "ready", Ready: 20 * time.Millisecond}
	path := filepath.Join(t.TempDir(), name)
	f, err := os.Create(path)
	require.NoError(t, err)
	require.NoError(t, tracefmt.Encode(f, tr))
	require.NoError(t, f.Close())
	return path
}

func TestSimulate(t *testing.T) {
	b := newBench(t)
	trace := writeStart(t, "a.trace", true)
	var got []simulated
	out := b.ok("simulate", trace, trace, "--think", trace, "--gap", "0,64K", "--link", "10ms,200mbit", "--link", "1ms,1gbit", "--copies", "2", "--json")
	require.NoError(t, json.Unmarshal([]byte(out), &got))
	require.Len(t, got, 2)
	for _, l := range got {
		require.Len(t, l.Starts, 4) // warm, two replays, lazy
		for _, s := range l.Starts[1:] {
			require.GreaterOrEqual(t, s.OfBound, 1.0)
			require.Len(t, s.Each, 4)
		}
		require.Less(t, l.Starts[1].Ready, l.Starts[3].Ready)
	}
	require.Equal(t, out, b.ok("simulate", trace, trace, "--think", trace, "--gap", "0,64K", "--link", "10ms,200mbit", "--link", "1ms,1gbit", "--copies", "2", "--json"))

	require.NoError(t, json.Unmarshal([]byte(b.ok("simulate", trace, "--trace", trace, "--link", "10ms,200mbit", "--json")), &got))
	require.Equal(t, replayer.SimReplay, got[0].Starts[1].Mode)
	require.InDelta(t, 1.0, got[0].Starts[1].Accuracy, 0.1)

	out = b.ok("simulate", trace, "--start-cpu", "0s", "--lookup", "0")
	for _, line := range []string{"link 10ms,200mbit, 1 start", "link 30ms,1gbit, 1 start", "link 2ms,2gbit, 1 start", "lower bound", "warm", "replay", "lazy"} {
		require.Contains(t, out, line)
	}
}

func TestSimulateRefuses(t *testing.T) {
	b := newBench(t)
	r := b.run("simulate", writeStart(t, "old.trace", false))
	require.Equal(t, exitFailed, r.code)
	require.Contains(t, r.stderr, "old.trace: the trace does not say where its reads lie")
	require.Contains(t, r.stderr, "record it again")
	r = b.run("simulate", filepath.Join(t.TempDir(), "none"))
	require.Equal(t, exitFailed, r.code)
}
