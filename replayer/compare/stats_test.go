package compare

import (
	"bytes"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/node"
)

func TestInterval(t *testing.T) {
	for name, tc := range map[string]struct {
		runs      []float64
		low, high float64
	}{
		"none":  {nil, 0, 0},
		"one":   {[]float64{2}, 2, 2},
		"equal": {[]float64{3, 3, 3, 3}, 3, 3},
		// A resample's median is 1 with a probability of 7/27, 3 likewise.
		"three": {[]float64{3, 1, 2}, 1, 3},
		// P(median ≤ x₂) = P(at least 5 of 9 draws among 2 of 9) = 3.0 %, and 0.1 % for x₁.
		"nine": {[]float64{9, 1, 8, 2, 7, 3, 6, 4, 5}, 2, 8},
	} {
		low, high := interval(tc.runs)
		require.InDelta(t, tc.low, low, 1e-9, name)
		require.InDelta(t, tc.high, high, 1e-9, name)
	}
}

// Of many samples, the interval holds the true median of some 95 %.
func TestIntervalCovers(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	held := 0
	const samples = 200
	for range samples {
		runs := make([]float64, 15)
		for i := range runs {
			runs[i] = 1 + rng.NormFloat64()/10
		}
		if low, high := interval(runs); low <= 1 && 1 <= high {
			held++
		}
	}
	require.Greater(t, held, samples*9/10)
}

func TestIntervalIsTheSameEachTime(t *testing.T) {
	runs := []float64{1.2, 0.9, 1.1, 1.0, 0.95}
	a, b := newRatio(runs), newRatio(slices.Clone(runs))
	require.Equal(t, a, b)
	require.InDelta(t, 1.0, a.Median, 1e-9)
	require.LessOrEqual(t, a.Low, a.Median)
	require.GreaterOrEqual(t, a.High, a.Median)
}

func TestDivide(t *testing.T) {
	require.Equal(t, []float64{2, 1, 0}, divide([]float64{4, 0, 0}, []float64{2, 0, 5, 7}))
	require.Equal(t, 2*time.Second, mean([]time.Duration{time.Second, 3 * time.Second}))
	require.Equal(t, 3*time.Second, longest([]time.Duration{time.Second, 3 * time.Second}))
	require.Zero(t, mean(nil))
}

func TestEverySecondPrefetch(t *testing.T) {
	fault := EverySecondPrefetch()
	var failed []bool
	for _, purpose := range []string{"prefetch", "", "prefetch", "prefetch", "", "prefetch"} {
		r := httptest.NewRequest(http.MethodGet, "/v2/a/blobs/sha256:0", nil)
		if purpose != "" {
			r.Header.Set("Purpose", purpose)
		}
		failed = append(failed, fault(r) != nil)
	}
	require.Equal(t, []bool{true, false, false, true, false, false}, failed)
}

func TestTruncate(t *testing.T) {
	dir := t.TempDir()
	from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
	require.NoError(t, os.WriteFile(from, []byte("0123456789"), 0o600))
	require.NoError(t, Truncate(from, to))
	p, err := os.ReadFile(to)
	require.NoError(t, err)
	require.Equal(t, "01234", string(p))
	require.Error(t, Truncate(filepath.Join(dir, "none"), to))
}

// A start of 250 ms with three requests: 0–100, 50–150 and one from 200 that is
// not over.
func TestTimeline(t *testing.T) {
	begin := time.Unix(1000, 0)
	at := func(ms int) time.Time { return begin.Add(time.Duration(ms) * time.Millisecond) }
	s := start{Begin: begin, Ready: 250 * time.Millisecond, Log: []regtest.Request{
		{Start: at(0), End: at(100), Bytes: 1000}, {Start: at(50), End: at(150), Bytes: 2000}, {Start: at(200), Bytes: 500},
	}}
	s.Report = &node.Report{Phases: []node.Phase{{Name: "mounted", At: 120 * time.Millisecond}, {Name: "ready", At: 250 * time.Millisecond}}}
	got := timeline(&s, 100*time.Millisecond)
	require.Len(t, got, 3)
	for i, want := range []slice{
		{begun: 2, inFlight: 1.5, bytes: 2000},
		{begun: 0, inFlight: 0.5, bytes: 1000, idle: 50 * time.Millisecond, phases: []string{"mounted"}},
		{begun: 1, inFlight: 1, bytes: 500, phases: []string{"ready"}},
	} {
		require.Equal(t, want.begun, got[i].begun, i)
		require.InDelta(t, want.inFlight, got[i].inFlight, 1e-9, i)
		require.InDelta(t, want.bytes, got[i].bytes, 1e-6, i)
		require.Equal(t, want.idle, got[i].idle, i)
		require.Equal(t, want.phases, got[i].phases, i)
	}
	var b bytes.Buffer
	writeTimeline(&b, s)
	require.Equal(t, 4, strings.Count(b.String(), "\n"), b.String())
}

func TestExplained(t *testing.T) {
	said := "hello\ntrace:    none was found\nreplay:   not used\nfetched:  nothing\n"
	require.Equal(t, []string{"trace: none was found", "replay: not used"}, explained(said))
}

func TestFleetResult(t *testing.T) {
	o := &FleetOptions{Refs: []string{"a", "b"}, Link: regtest.NewLink(regtest.LinkSpec{Delay: time.Millisecond, Rate: 1e9}, nil)}
	round := func(ready ...time.Duration) fleetRound { return fleetRound{ready: ready, requests: 10, bytes: 5e6} }
	r := fleetResult(o, map[Mode][]fleetRound{
		Lazy:   {round(2*time.Second, 4*time.Second), round(3*time.Second, 5*time.Second)},
		Replay: {round(time.Second, 2*time.Second), round(time.Second, 2*time.Second)},
	})
	require.InDelta(t, 0.45, r.Paired["last"].Median, 1e-9)
	require.InDelta(t, 1, r.Paired["p95"].Median, 1e-9, "no waits are no worse than no waits")
	var b bytes.Buffer
	require.NoError(t, r.WriteTable(&b))
	require.Contains(t, b.String(), "2 containers at once through one daemon, link 1ms,1gbit, 2 rounds")
}

func TestMatrixForPeople(t *testing.T) {
	r := sampleResult()
	var b bytes.Buffer
	require.NoError(t, writeMatrix(&b, []cell{{image: "java", link: "10ms,200mbit", codec: "lz4 in blocks of 4 KiB", Result: r, bound: time.Second}}))
	require.Regexp(t, `java +10ms,200mbit +replay +1\.10 s +0\.52\d +0\.50–0\.55 +1\.00 s +1\.10`, b.String())
	b.Reset()
	require.NoError(t, writeAdversarial(&b, "java", r))
	require.Contains(t, b.String(), "by its lazy start")
}
