package replayer

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/tracefmt"
)

// TestSimulate runs the scripts in testdata/simulate. A trace is a read a line,
// AT[+WAIT] LAYER:OFF+LEN…, times in milliseconds, ranges in KiB of the blob,
// and "ready AT". The link has a round trip of 10 ms and sends 1 KiB a
// millisecond unless told; layers have 1 MiB; computing costs nothing.
func TestSimulate(t *testing.T) {
	datadriven.Walk(t, "testdata/simulate", func(t *testing.T, path string) {
		var trace, think *tracefmt.Trace
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			switch d.Cmd {
			case "trace":
				trace, think = parseReads(t, d.Input), nil
				return ""
			case "think":
				think = parseReads(t, d.Input)
				return ""
			}
			w, err := NewWorkload(trace, think)
			if err != nil {
				return err.Error() + "\n"
			}
			o, mode := parseSim(t, d)
			if d.Cmd == "bound" {
				at, err := LowerBound([]*Workload{w}, &o)
				require.NoError(t, err)
				return fmt.Sprintf("ready %v\n", at)
			}
			return simulateScript(t, w, mode, &o)
		})
	})
}

// simulateScript prints the requests for blobs and the result.
func simulateScript(t *testing.T, w *Workload, mode SimMode, o *SimOptions) string {
	s, err := newSimulation([]*Workload{w}, mode, o)
	require.NoError(t, err)
	var b strings.Builder
	s.h.sent = func(f *simFlight) {
		lane := "demand"
		if f.lane != 0 {
			lane = "prefetch"
		}
		for i, blob := range s.starts[0].blobs {
			if blob == f.b {
				fmt.Fprintf(&b, "%v: %s %d:%s+%s\n", s.c.now, lane, i, kib(f.off), kib(f.end-f.off))
			}
		}
	}
	for _, st := range s.starts {
		s.c.after(0, st.begin)
	}
	s.c.run()
	r := s.result()
	fmt.Fprintf(&b, "ready %v, stall %v, %d requests, %s KiB", r.Ready, r.Stall, r.Requests, kib(r.Bytes))
	if mode == SimReplay {
		fmt.Fprintf(&b, ", coverage %.2f, accuracy %.2f, late %v", r.Coverage, r.Accuracy, r.Late)
	}
	return b.String() + "\n"
}

func parseSim(t *testing.T, d *datadriven.TestData) (SimOptions, SimMode) {
	o := SimOptions{Link: Link{Delay: 10 * time.Millisecond, Rate: 1000 << 13}, StartCPU: -1, RequestCPU: -1}
	for _, a := range d.CmdArgs {
		n, _ := strconv.Atoi(a.FirstVal(t))
		switch a.Key {
		case "delay":
			o.Link.Delay = time.Duration(n) * time.Millisecond
		case "rate": // KiB a millisecond
			o.Link.Rate = int64(n) * 1000 << 13
		case "trips":
			o.RoundTrips = n
		case "lookup":
			o.Lookup = n
		case "copies":
			o.Copies = n
		case "gap":
			o.Plan = &Options{Gap: int64(n) << 10}
		case "piece":
			o.Scheduler.Piece = int64(n) << 10
		case "mode":
		default:
			t.Fatalf("unknown argument %q", a.Key)
		}
	}
	mode := "lazy"
	d.MaybeScanArgs(t, "mode", &mode)
	return o, SimMode(mode)
}

func parseReads(t *testing.T, script string) *tracefmt.Trace {
	tr := &tracefmt.Trace{End: &tracefmt.End{}}
	for line := range strings.Lines(script) {
		f := strings.Fields(line)
		at, wait, _ := strings.Cut(f[0], "+")
		if at == "ready" {
			tr.End.Ready = millis(t, f[1])
			continue
		}
		for _, part := range f[1:] {
			e := tracefmt.Event{At: millis(t, at), Wait: millis(t, "0"+wait)}
			_, err := fmt.Sscanf(part, "%d:%d+%d", &e.Layer, &e.BlobOff, &e.BlobLen)
			require.NoError(t, err, line)
			e.BlobOff, e.BlobLen = e.BlobOff<<10, e.BlobLen<<10
			e.Off, e.Len = 2*e.BlobOff, 2*e.BlobLen
			tr.Events = append(tr.Events, e)
			for len(tr.Layers) <= e.Layer {
				tr.Layers = append(tr.Layers, tracefmt.Layer{Digest: digest.FromString(fmt.Sprint(len(tr.Layers))), Size: 1 << 20})
			}
		}
	}
	return tr
}

func millis(t *testing.T, s string) time.Duration {
	n, err := strconv.Atoi(s)
	require.NoError(t, err)
	return time.Duration(n) * time.Millisecond
}

// randomStart is a recording of n reads in layers of some MiB, cold or warm.
func randomStart(r *rand.Rand, n int, cold bool) *tracefmt.Trace {
	return randomStartOf(r, n, cold, 8<<20)
}

// randomStartOf is one of layers of that size.
func randomStartOf(r *rand.Rand, n int, cold bool, size int64) *tracefmt.Trace {
	tr := &tracefmt.Trace{}
	for i := range 1 + r.IntN(4) {
		tr.Layers = append(tr.Layers, tracefmt.Layer{Digest: digest.FromString(fmt.Sprint(i)), Size: size, Decoded: 2 * size})
	}
	at := time.Duration(0)
	for range n {
		at += time.Duration(r.Int64N(int64(2 * time.Millisecond)))
		e := tracefmt.Event{At: at, Layer: r.IntN(len(tr.Layers)), BlobOff: r.Int64N(size), BlobLen: 1 + r.Int64N(100<<10)}
		e.BlobLen = min(e.BlobLen, size-e.BlobOff)
		e.Off, e.Len = 2*e.BlobOff, 2*e.BlobLen
		if cold {
			e.Wait = time.Duration(r.Int64N(int64(6 * time.Millisecond)))
		}
		tr.Events = append(tr.Events, e)
	}
	tr.End = &tracefmt.End{Ready: at + 10*time.Millisecond}
	return tr
}

func randomLink(r *rand.Rand) Link {
	return Link{
		Delay: time.Duration(r.Int64N(int64(60 * time.Millisecond))),
		Rate:  10_000_000 + r.Int64N(2_000_000_000),
	}
}

// Whatever the trace and the link, nothing is faster than the lower bound, and a
// replay of everything is not slower than none.
func TestSimulateBounds(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 7))
	for i := range 300 {
		w, err := NewWorkload(randomStart(r, 1+r.IntN(150), i%2 == 0), nil)
		require.NoError(t, err)
		o := SimOptions{Link: randomLink(r), Copies: 1 + r.IntN(2), Plan: &Options{Gap: r.Int64N(100_000) - 1}}
		ws := []*Workload{w}
		bound, err := LowerBound(ws, &o)
		require.NoError(t, err)
		lazy, err := Simulate(ws, SimLazy, &o)
		require.NoError(t, err)
		replay, err := Simulate(ws, SimReplay, &o)
		require.NoError(t, err)
		require.LessOrEqual(t, bound, replay.Ready, "trace %d on %+v", i, o.Link)
		require.LessOrEqual(t, bound, lazy.Ready, "trace %d on %+v", i, o.Link)
		require.LessOrEqual(t, replay.Ready, lazy.Ready*51/50, "trace %d on %+v", i, o.Link)
		again, err := Simulate(ws, SimReplay, &o)
		require.NoError(t, err)
		require.Equal(t, replay, again)

		faster := o
		faster.Link.Rate = o.Link.Rate + r.Int64N(1_000_000_000)
		sooner, err := LowerBound(ws, &faster)
		require.NoError(t, err)
		require.LessOrEqual(t, sooner, bound)
	}
}

// Without thinking the lower bound is the round trips and the bytes.
func TestLowerBoundWithoutThinking(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	for range 50 {
		tr := randomStart(r, 100, false)
		tr.End = nil
		for i := range tr.Events {
			tr.Events[i].At = time.Duration(i) // one read each, and nothing between
		}
		w, err := NewWorkload(tr, nil)
		require.NoError(t, err)
		need := newDistinct()
		for i := range w.reads {
			need.add(w, 0, &w.reads[i])
		}
		o := SimOptions{Link: randomLink(r), RoundTrips: 1 + r.IntN(5), StartCPU: -1}
		got, err := LowerBound([]*Workload{w}, &o)
		require.NoError(t, err)
		want := time.Duration(o.RoundTrips)*o.Link.Delay + o.Link.wireTime(need.bytes)
		require.InDelta(t, want, got, 200) // ns
	}
}

func TestSimulateLargeTrace(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	w, err := NewWorkload(randomStartOf(r, 10_000, false, 1<<30), nil)
	require.NoError(t, err)
	for _, m := range []SimMode{SimLazy, SimReplay, SimWarm} {
		got, err := Simulate([]*Workload{w}, m, &SimOptions{Link: Link{10 * time.Millisecond, 200_000_000}})
		require.NoError(t, err)
		require.Positive(t, got.Ready)
	}
}

func TestSimulateRefuses(t *testing.T) {
	good := func() *tracefmt.Trace { return parseReads(t, "0 0:0+4\n5 1:8+4\nready 9") }
	_, err := NewWorkload(good(), nil)
	require.NoError(t, err)
	for want, change := range map[string]func(*tracefmt.Trace){
		"has no reads":           func(tr *tracefmt.Trace) { tr.Events = nil },
		"device space":           func(tr *tracefmt.Trace) { tr.Space = tracefmt.DeviceSpace },
		"record it again":        func(tr *tracefmt.Trace) { tr.Events[1].BlobLen = 0 },
		"of the blob of layer 1": func(tr *tracefmt.Trace) { tr.Events[1].BlobLen = 1 << 20 },
		"more than can be":       func(tr *tracefmt.Trace) { tr.Events[1].BlobOff = 1 << 60 },
		"larger than can be":     func(tr *tracefmt.Trace) { tr.Layers[0].Size, tr.Layers[1].Size = 1<<62, 1<<62 },
	} {
		tr := good()
		change(tr)
		_, err := NewWorkload(tr, nil)
		require.ErrorContains(t, err, want)
	}
	_, err = NewWorkload(good(), parseReads(t, "0 0:100+4"))
	require.ErrorContains(t, err, "of another start")
	w, err := NewWorkload(good(), nil)
	require.NoError(t, err)
	for _, o := range []SimOptions{{Link: Link{Delay: -1}}, {Copies: 1001}, {RoundTrips: -1}, {Scheduler: Scheduler{Piece: 1}}} {
		_, err := Simulate([]*Workload{w}, SimLazy, &o)
		require.Error(t, err)
	}
}

func BenchmarkSimulate(b *testing.B) {
	w, err := NewWorkload(randomStartOf(rand.New(rand.NewPCG(1, 1)), 10_000, false, 1<<30), nil)
	require.NoError(b, err)
	for _, m := range []SimMode{SimLazy, SimReplay} {
		b.Run(string(m), func(b *testing.B) {
			for b.Loop() {
				_, err := Simulate([]*Workload{w}, m, &SimOptions{Link: Link{10 * time.Millisecond, 200_000_000}})
				require.NoError(b, err)
			}
		})
	}
}
