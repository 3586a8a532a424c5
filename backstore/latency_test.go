package backstore

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestLatencyBuckets goes through all buckets: each begins where the one before
// ends, and is narrow.
func TestLatencyBuckets(t *testing.T) {
	var end time.Duration
	for i := range latencyBuckets {
		from, to := latencyRange(i)
		require.Equal(t, end, from, "bucket %d", i)
		require.Equal(t, i, latencyBucket(from), "bucket %d", i)
		if i == latencyBuckets-1 {
			break
		}
		require.Equal(t, i, latencyBucket(to-1), "bucket %d", i)
		if i > 0 {
			require.LessOrEqual(t, float64(to-from)/float64(from), 1.0/32)
		}
		end = to
	}
	require.LessOrEqual(t, 1<<latencyFirst, int(1100*time.Nanosecond))
	require.GreaterOrEqual(t, end, time.Minute)
	for d, want := range map[time.Duration]int{-5: 0, 0: 0, math.MaxInt64: latencyBuckets - 1, math.MinInt64: 0} {
		require.Equal(t, want, latencyBucket(d))
	}
}

// TestLatencyQuantiles compares with a sorted list.
func TestLatencyQuantiles(t *testing.T) {
	for seed := range uint64(10) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var l latencies
		var all []time.Duration
		var sum time.Duration
		for range 5000 {
			d := time.Duration(math.Exp(rnd.NormFloat64()*2) * 1e6) // about 1 ms
			all = append(all, d)
			sum += d
			l.add(d)
		}
		slices.Sort(all)
		h := l.read()
		require.EqualValues(t, len(all), h.Count)
		require.Equal(t, sum, h.Sum)
		for _, q := range []float64{0.01, 0.5, 0.9, 0.95, 0.99, 0.999} {
			want := all[int(math.Ceil(q*float64(len(all))))-1]
			require.InEpsilon(t, float64(want), float64(h.Quantile(q)), 0.04, "seed %d, quantile %v", seed, q)
		}
		require.LessOrEqual(t, h.Quantile(0), all[0])
		require.InEpsilon(t, float64(all[len(all)-1]), float64(h.Quantile(1)), 0.04)
	}
}

func TestLatencyInterpolates(t *testing.T) {
	var l latencies
	require.Zero(t, l.read().Quantile(0.5))
	for range 4 {
		l.add(100 * time.Millisecond)
	}
	h := l.read()
	from, to := latencyRange(latencyBucket(100 * time.Millisecond))
	require.Equal(t, from+(to-from)/4, h.Quantile(0.25))
	require.Equal(t, to, h.Quantile(1))
	require.Equal(t, to, h.Quantile(7))
	for range 96 {
		l.add(0)
	}
	require.Less(t, l.read().Quantile(0.95), 2*time.Microsecond, "most reads do not wait")
	require.InEpsilon(t, float64(100*time.Millisecond), float64(l.read().Quantile(0.97)), 0.04)
}

func TestLatencyMerge(t *testing.T) {
	var a, b, both latencies
	rnd := rand.New(rand.NewPCG(3, 4))
	for i := range 2000 {
		d := time.Duration(rnd.Int64N(int64(time.Second)) >> rnd.IntN(30))
		both.add(d)
		[]*latencies{&a, &b}[i%2].add(d)
	}
	require.Equal(t, both.read(), a.read().Merge(b.read()))
	require.Equal(t, a.read(), a.read().Merge(Histogram{}))
	var none Histogram
	require.Equal(t, a.read(), none.Merge(a.read()))
}

func TestLatencyUntil(t *testing.T) {
	var l latencies
	for _, d := range []time.Duration{0, time.Millisecond, time.Second, time.Hour} {
		l.add(d)
	}
	h := l.read()
	for d, want := range map[time.Duration]int64{0: 0, 1: 1, 2 * time.Millisecond: 2, time.Minute: 3, math.MaxInt64: 4} {
		require.Equal(t, want, h.Until(d), "%v", d)
	}
}

func TestLatencyJSON(t *testing.T) {
	var l latencies
	l.add(0)
	l.add(time.Millisecond)
	p, err := json.Marshal(l.read())
	require.NoError(t, err)
	require.JSONEq(t, `{"count":2,"sum_ns":1000000,"buckets":[{"from_ns":0,"count":1},{"from_ns":999424,"count":1}]}`, string(p))
	var h Histogram
	require.NoError(t, json.Unmarshal(p, &h))
	require.Equal(t, l.read(), h)
}

func TestLatencyAdd(t *testing.T) {
	var l latencies
	require.Zero(t, testing.AllocsPerRun(100, func() { l.add(time.Millisecond) }))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 1000 {
				l.add(time.Duration(i) * time.Microsecond)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 8101, l.read().Count)
}

func BenchmarkLatencyAdd(b *testing.B) {
	var l latencies
	b.ReportAllocs()
	for b.Loop() {
		l.add(time.Millisecond)
	}
}
