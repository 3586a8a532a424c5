package tracefmt

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// blocks are the ends of blocks of 4 KiB after compression, which makes them
// 1 to 4 KiB long.
func blocks(n int64) []int64 {
	rnd := rand.New(rand.NewPCG(7, 8))
	ends := make([]int64, n+1)
	for i := range n {
		ends[i+1] = ends[i] + 1024 + rnd.Int64N(3072)
	}
	return ends
}

// start looks like a first start: n reads in files of two of three layers.
func start(n int) *Trace {
	rnd := rand.New(rand.NewPCG(1, 2))
	t := &Trace{Header: sample().Header}
	ends := blocks(1 << 18)
	t.Layers = []Layer{{Size: ends[1<<18], Decoded: 1 << 30}, {Size: ends[1<<8], Decoded: 1 << 20}, {}}
	var off [3]int64
	for i := range n {
		l := rnd.IntN(2)
		if rnd.IntN(4) == 0 {
			off[l] = rnd.Int64N(1<<30>>(l*10)-1<<18) &^ 4095
		}
		size := int64(1+rnd.IntN(32)) << 12
		off[l] = min(off[l], 1<<30>>(l*10)-size)
		t.Events = append(t.Events, Event{
			At: time.Duration(i) * 700 * time.Microsecond, Wait: time.Duration(rnd.IntN(30000)) * time.Microsecond,
			Layer: l, Off: off[l], Len: size, Origin: uint8(rnd.IntN(5)),
			BlobOff: ends[off[l]>>12], BlobLen: ends[(off[l]+size)>>12] - ends[off[l]>>12],
		})
		off[l] += size
	}
	t.End = &End{Reason: "ready"}
	return t
}

func BenchmarkWriterAdd(b *testing.B) {
	tr := start(100_000)
	events := tr.Events
	b.ReportAllocs()
	i := 0
	w, err := NewWriter(io.Discard, tr.Header)
	require.NoError(b, err)
	for b.Loop() {
		if i == len(events) {
			w, err = NewWriter(io.Discard, tr.Header)
			require.NoError(b, err)
			i = 0
		}
		if err := w.Add(events[i]); err != nil {
			b.Fatal(err)
		}
		i++
	}
}

func BenchmarkRead(b *testing.B) {
	var file bytes.Buffer
	tr := start(100_000)
	require.NoError(b, writeAll(&file, tr))
	b.SetBytes(int64(file.Len()))
	b.ReportMetric(float64(file.Len())/float64(len(tr.Events)), "bytes/event")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Read(bytes.NewReader(file.Bytes())); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	tr := start(5000)
	b.ReportAllocs()
	var n int64
	for b.Loop() {
		var packed bytes.Buffer
		if err := Encode(&packed, tr); err != nil {
			b.Fatal(err)
		}
		n = int64(packed.Len())
	}
	b.ReportMetric(float64(n), "bytes")
}

// BenchmarkTouched adds a million extents that never join, in random order.
func BenchmarkTouched(b *testing.B) {
	const n = 1 << 20
	order := rand.New(rand.NewPCG(3, 4)).Perm(n)
	var dst []Event
	for b.Loop() {
		var touched Touched
		for _, i := range order {
			dst = touched.Add(dst[:0], Event{Off: int64(i) * 8192, Len: 4096})
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/extent")
}

// runsOf are recordings of one workload: most reads are the same, a few are of
// one run only, and times vary.
func runsOf(runs, events int) []*Trace {
	rnd := rand.New(rand.NewPCG(9, 10))
	base := start(events)
	var all []*Trace
	for range runs {
		tr := &Trace{Header: base.Header, End: base.End}
		for _, e := range base.Events {
			if rnd.IntN(20) == 0 {
				continue
			}
			if rnd.IntN(20) == 0 {
				e.Off = rnd.Int64N(tr.Layers[e.Layer].Decoded-e.Len) &^ 4095
			}
			e.At += time.Duration(rnd.IntN(50_000)) * time.Microsecond
			tr.Events = append(tr.Events, e)
		}
		all = append(all, tr)
	}
	return all
}

// scattered are recordings of events that never join, in random order, most of
// them the same.
func scattered(runs, events int) []*Trace {
	rnd := rand.New(rand.NewPCG(11, 12))
	base := rnd.Perm(events)
	var all []*Trace
	for range runs {
		tr := &Trace{Header: Header{Layers: []Layer{layerNamed("scattered", 1<<40)}}}
		for i, n := range base {
			e := Event{At: time.Duration(i*100+rnd.IntN(50_000)) * time.Microsecond, Off: int64(n) * 16384, Len: 4096}
			if rnd.IntN(20) == 0 {
				e.Off += 8192
			}
			tr.Events = append(tr.Events, e)
		}
		all = append(all, tr)
	}
	return all
}

func BenchmarkMerge(b *testing.B) {
	b.Run("start", func(b *testing.B) { benchmarkMerge(b, runsOf(10, 100_000)) })
	b.Run("scattered", func(b *testing.B) { benchmarkMerge(b, scattered(10, 100_000)) })
}

func benchmarkMerge(b *testing.B, traces []*Trace) {
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		got, _, err := Merge(traces, MergeUnion)
		if err != nil {
			b.Fatal(err)
		}
		n = len(got.Events)
	}
	b.ReportMetric(float64(n), "events")
}

func BenchmarkDiff(b *testing.B) {
	traces := scattered(2, 100_000)
	b.ReportAllocs()
	for b.Loop() {
		if d := Diff(traces[0], traces[1]); d.Both == 0 {
			b.Fatal("nothing in common")
		}
	}
}
