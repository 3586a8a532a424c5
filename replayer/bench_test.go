package replayer

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

// benchTrace has 100,000 reads of 40 layers, in runs as of files.
func benchTrace() (*tracefmt.Trace, Image) {
	const layers, size = 40, 1 << 30
	r := rand.New(rand.NewPCG(4, 2))
	tr := &tracefmt.Trace{Header: tracefmt.Header{Space: tracefmt.LayerSpace}}
	infos := make([]backstore.LayerInfo, layers)
	for i := range infos {
		infos[i] = backstore.LayerInfo{Digest: digest.FromString(string(rune(i))), Size: size / 2, Decoded: size}
		tr.Layers = append(tr.Layers, tracefmt.Layer{Digest: infos[i].Digest, Size: size / 2, Decoded: size})
	}
	for len(tr.Events) < 100_000 {
		layer, off := r.IntN(layers), r.Int64N(size/4096-1000)*4096
		for range 1 + r.IntN(8) {
			n := (1 + r.Int64N(16)) * 4096
			e := tracefmt.Event{At: time.Duration(len(tr.Events)), Layer: layer, Off: off, Len: n, BlobOff: off / 2, BlobLen: n / 2}
			tr.Events = append(tr.Events, e)
			off += n + r.Int64N(4)*8192
		}
	}
	return tr, Unopened(infos)
}

func BenchmarkNewPlan(b *testing.B) {
	tr, im := benchTrace()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := NewPlan(tr, im, nil); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(b.Elapsed().Seconds()*1e6/float64(b.N)/float64(len(tr.Events)/1000), "µs/1000-events")
}

// BenchmarkNext is one call, of a plan of 100,000 reads.
func BenchmarkNext(b *testing.B) {
	tr, im := benchTrace()
	e := backstore.Estimate{RTT: 30 * time.Millisecond, Bandwidth: 125e6}
	var p *Plan
	b.ReportAllocs()
	for b.Loop() {
		ok := false
		if p != nil {
			_, ok = p.Next(e)
		}
		if !ok {
			b.StopTimer()
			var err error
			p, err = NewPlan(tr, im, nil)
			require.NoError(b, err)
			b.StartTimer()
		}
	}
}

// BenchmarkAround is one miss, a half of them planned.
func BenchmarkAround(b *testing.B) {
	tr, im := benchTrace()
	e := backstore.Estimate{RTT: 30 * time.Millisecond, Bandwidth: 125e6}
	p, err := NewPlan(tr, im, nil)
	require.NoError(b, err)
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		w := p.Wants[i%len(p.Wants)]
		w.Len = min(w.Len, 4096)
		if i%2 == 0 {
			w.Off += 400 << 10
		}
		p.Around(w, e)
		i += 7919
	}
}
