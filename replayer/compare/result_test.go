package compare

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/replayer/node"
)

func TestSeries(t *testing.T) {
	for name, tc := range map[string]struct {
		runs                  []float64
		median, p95, min, max float64
	}{
		"none":     {nil, 0, 0, 0, 0},
		"one":      {[]float64{3}, 3, 3, 3, 3},
		"even":     {[]float64{4, 1, 3, 2}, 2.5, 3.85, 1, 4},
		"unsorted": {[]float64{5, 1, 3}, 3, 4.8, 1, 5},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSeries(tc.runs)
			require.InDelta(t, tc.median, s.Median, 1e-9)
			require.InDelta(t, tc.p95, s.P95, 1e-9)
			require.InDelta(t, tc.min, s.Min, 1e-9)
			require.InDelta(t, tc.max, s.Max, 1e-9)
			require.Equal(t, tc.runs, s.Runs, "the order of the runs is kept")
		})
	}
}

func sampleStart(ready time.Duration, coverage float64) start {
	return start{
		Ready: ready, Stall: ready / 2, Requests: 40, Bytes: 20e6, Serial: 30 * time.Millisecond, Coverage: coverage, Accuracy: 0.9,
		Report: &node.Report{Workload: "python3-1234", Layers: 7, Phases: []node.Phase{{Name: "ready", At: ready}}},
	}
}

func sampleResult() *Result {
	variants, _ := fillVariants(nil, false)
	c := &comparison{o: Options{Ref: "registry.example.com/app:1", Runs: 3, Variants: variants}, starts: map[Mode][]start{}}
	for i := range 3 {
		d := time.Duration(i) * 100 * time.Millisecond
		c.starts[Lazy] = append(c.starts[Lazy], sampleStart(2*time.Second+d, 0))
		c.starts[Replay] = append(c.starts[Replay], sampleStart(time.Second+d, 0.97))
		c.starts[Warm] = append(c.starts[Warm], sampleStart(500*time.Millisecond, 0))
	}
	return c.result()
}

func TestResultForMachines(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, sampleResult().WriteJSON(&b))
	var got struct {
		Image, Workload string
		Modes           map[string]map[string]struct {
			Median, P95, Min, Max float64
			Runs                  []float64
		}
	}
	require.NoError(t, json.Unmarshal(b.Bytes(), &got))
	for _, mode := range []Mode{Lazy, Replay, Warm} {
		for _, key := range []string{"ready_seconds", "stall_seconds", "requests", "bytes", "coverage", "accuracy"} {
			require.Len(t, got.Modes[string(mode)][key].Runs, 3, "%s %s", mode, key)
		}
	}
	require.InDelta(t, 2.1, got.Modes["lazy"]["ready_seconds"].Median, 1e-9)
}

func TestResultForPeople(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, sampleResult().WriteTable(&b))
	lines := strings.Split(b.String(), "\n")
	require.Equal(t, "python3-1234, 7 layers, 3 cold starts a mode, medians", lines[1])
	require.Regexp(t, `start +ready +of lazy +waiting`, lines[3])
	require.Regexp(t, `replay +1\.10 s +0\.52 +0\.55 s +40 +20\.0 MB +0\.03 s +97\.0 %`, lines[5])
	for _, l := range lines {
		require.LessOrEqual(t, len(l), 120, "fits a terminal: %q", l)
	}
}

func TestOptions(t *testing.T) {
	for name, tc := range map[string]struct {
		o    Options
		want string
	}{
		"runs":  {Options{Runs: -1}, "not between"},
		"name":  {Options{Variants: []Variant{{}}}, "a name that no other has"},
		"twice": {Options{Variants: []Variant{{Name: Lazy}, {Name: Lazy}}}, `variant "lazy": a name that no other has`},
		"link":  {Options{Variants: []Variant{{Name: "bad", Fault: EverySecondPrefetch}}}, "faults need a link"},
		"room":  {Options{Variants: []Variant{{Name: Warm, Warm: true, Room: 1}}}, "share a directory"},
	} {
		_, err := tc.o.fill()
		require.ErrorContains(t, err, tc.want, name)
	}
}

func TestColdIsProven(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, proveCold(dir))
	write(t, dir, "left", "over")
	require.ErrorContains(t, proveCold(dir), "not a cold start")
}
