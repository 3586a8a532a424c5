package backstore

import (
	"cmp"
	"math/bits"
	"slices"
	"sync/atomic"
	"time"
)

// Latencies fall into buckets, 32 an octave and equally wide within it, from
// 2^10 ns, about 1 µs, to 2^36 ns, 69 s: each is 3.1 % to 1.6 % wide. Shorter
// and longer ones have a bucket each.
const (
	latencyBits    = 5  // log2 of the buckets of an octave
	latencyFirst   = 10 // log2 of the nanoseconds at which they begin
	latencyLast    = 36 // and at which they end
	latencyBuckets = 2 + (latencyLast-latencyFirst)<<latencyBits
)

// latencies count waits. Adding is lock-free and allocates nothing.
type latencies struct {
	counts [latencyBuckets]atomic.Int64
	sum    atomic.Int64
}

func (l *latencies) add(d time.Duration) {
	l.counts[latencyBucket(d)].Add(1)
	l.sum.Add(int64(max(d, 0)))
}

func latencyBucket(d time.Duration) int {
	n := uint64(max(d, 0))
	octave := bits.Len64(n) - 1
	switch {
	case octave < latencyFirst:
		return 0
	case octave >= latencyLast:
		return latencyBuckets - 1
	}
	within := n >> (octave - latencyBits) & (1<<latencyBits - 1)
	return 1 + (octave-latencyFirst)<<latencyBits + int(within)
}

// latencyRange is what falls into bucket i: [from, to). The last one has no end,
// and is taken for one that has none but its beginning.
func latencyRange(i int) (from, to time.Duration) {
	switch i {
	case 0:
		return 0, 1 << latencyFirst
	case latencyBuckets - 1:
		return 1 << latencyLast, 1 << latencyLast
	}
	i--
	width := time.Duration(1) << (latencyFirst + i>>latencyBits - latencyBits)
	from = (1<<latencyBits + time.Duration(i&(1<<latencyBits-1))) * width
	return from, from + width
}

// A Histogram is how long reads have waited for bytes, from 1 µs to 69 s with a
// resolution of 3 %.
type Histogram struct {
	Count int64         `json:"count"`
	Sum   time.Duration `json:"sum_ns"`
	// Buckets are those that are not empty, shortest first.
	Buckets []Bucket `json:"buckets"`
}

// A Bucket counts waits of at least From and less than the next bucket's, which
// may be empty and left out.
type Bucket struct {
	From  time.Duration `json:"from_ns"`
	Count int64         `json:"count"`
}

func (l *latencies) read() Histogram {
	h := Histogram{Sum: time.Duration(l.sum.Load())}
	for i := range l.counts {
		if n := l.counts[i].Load(); n > 0 {
			from, _ := latencyRange(i)
			h.Buckets = append(h.Buckets, Bucket{from, n})
			h.Count += n
		}
	}
	return h
}

// Quantile returns the wait that the share q, 0 to 1, of all have not exceeded,
// interpolated within its bucket; 0 without any.
func (h Histogram) Quantile(q float64) time.Duration {
	rank := min(max(q, 0), 1) * float64(h.Count)
	var before int64
	for _, b := range h.Buckets {
		if before += b.Count; float64(before) < rank {
			continue
		}
		from, to := latencyRange(latencyBucket(b.From))
		within := (rank - float64(before-b.Count)) / float64(b.Count)
		return from + time.Duration(within*float64(to-from))
	}
	return 0
}

// Merge returns the waits of both.
func (h Histogram) Merge(o Histogram) Histogram {
	all := slices.Concat(h.Buckets, o.Buckets)
	slices.SortFunc(all, func(a, b Bucket) int { return cmp.Compare(a.From, b.From) })
	m := Histogram{Count: h.Count + o.Count, Sum: h.Sum + o.Sum}
	for _, b := range all {
		if n := len(m.Buckets); n > 0 && m.Buckets[n-1].From == b.From {
			m.Buckets[n-1].Count += b.Count
			continue
		}
		m.Buckets = append(m.Buckets, b)
	}
	return m
}

// Until returns how many have waited less than d, to the resolution of the
// buckets.
func (h Histogram) Until(d time.Duration) (n int64) {
	for _, b := range h.Buckets {
		if b.From >= d {
			break
		}
		n += b.Count
	}
	return n
}
