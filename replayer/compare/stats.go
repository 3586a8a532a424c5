package compare

import (
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"time"
)

// A Ratio is a figure of one variant divided by that of another, run by run.
type Ratio struct {
	Series
	// Low and High are the 95 % confidence interval of the median: percentile
	// bootstrap, the same in each run.
	Low  float64 `json:"low"`
	High float64 `json:"high"`
}

func newRatio(runs []float64) *Ratio {
	r := &Ratio{Series: *newSeries(runs)}
	r.Low, r.High = interval(runs)
	return r
}

const resamples = 10_000

// interval is the 95 % confidence interval of the median of runs, by the
// percentile bootstrap (Efron 1979); zero without runs.
func interval(runs []float64) (low, high float64) {
	if len(runs) == 0 {
		return 0, 0
	}
	rng := rand.New(rand.NewPCG(1, uint64(len(runs))))
	medians := make([]float64, resamples)
	sample := make([]float64, len(runs))
	for i := range medians {
		for j := range sample {
			sample[j] = runs[rng.IntN(len(runs))]
		}
		slices.Sort(sample)
		medians[i] = quantile(sample, 0.5)
	}
	slices.Sort(medians)
	return quantile(medians, 0.025), quantile(medians, 0.975)
}

// mean and longest are those of durations, 0 of none.
func mean(ds []time.Duration) (m time.Duration) {
	for _, d := range ds {
		m += d / time.Duration(len(ds))
	}
	return m
}

func longest(ds []time.Duration) (l time.Duration) {
	for _, d := range ds {
		l = max(l, d)
	}
	return l
}

// divide pairs values; a pair of nothings is 1.
func divide(a, b []float64) []float64 {
	var rs []float64
	for i := range min(len(a), len(b)) {
		if a[i] == b[i] {
			rs = append(rs, 1)
			continue
		}
		rs = append(rs, a[i]/b[i])
	}
	return rs
}

// counter numbers what happens concurrently, from 0.
type counter struct{ n atomic.Int64 }

func (c *counter) next() int64 { return c.n.Add(1) - 1 }
