package recorder

import (
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

// BenchmarkObserveRead is what a read pays when the recorder keeps up. The
// limit is 200 ns and no allocation.
func BenchmarkObserveRead(b *testing.B) {
	var in inbox
	in.init()
	b.ReportAllocs()
	i := int64(0)
	for b.Loop() {
		if in.put(backstore.ReadEvent{Off: i, Len: 4096}) {
			in.take()
		}
		i++
	}
}

// BenchmarkObserveReadParallel has at least eight readers at once.
func BenchmarkObserveReadParallel(b *testing.B) {
	var in inbox
	in.init()
	b.ReportAllocs()
	b.SetParallelism(8)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if in.put(backstore.ReadEvent{Len: 4096}) {
				in.take()
			}
		}
	})
}

// BenchmarkRecord never pauses, far beyond what a device delivers, so that the
// writing goroutine takes a processor of its own and reads are dropped.
func BenchmarkRecord(b *testing.B) {
	r, err := New(io.Discard, tracefmt.Header{}, &Options{Quiet: -1, MaxDuration: -1})
	require.NoError(b, err)
	b.ReportAllocs()
	i := int64(0)
	for b.Loop() {
		r.ObserveRead(backstore.ReadEvent{Off: i % 8192 * 8192, Len: 4096})
		i++
	}
	r.Stop("benchmark")
	<-r.Done()
	s := r.Stats()
	b.ReportMetric(float64(s.Dropped)/float64(s.Reads), "dropped/op")
}
