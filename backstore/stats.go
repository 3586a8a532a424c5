package backstore

import (
	"sync"
	"sync/atomic"
	"time"
)

const origins = int(FromFetch) + 1

// counters add up demand by origin.
type counters struct {
	reads, bytes [origins]atomic.Int64
	wait         atomic.Int64
}

func (c *counters) add(e ReadEvent) {
	c.reads[e.Origin].Add(1)
	c.bytes[e.Origin].Add(e.Len)
	if e.Wait > 0 {
		c.wait.Add(int64(e.Wait))
	}
}

// stallClock measures the time during which at least one demand read waits.
type stallClock struct {
	mu    sync.Mutex // guards the fields below
	n     int
	since time.Time
	total time.Duration
}

// enter starts a wait; the function it returns ends it.
func (c *stallClock) enter() func() {
	c.mu.Lock()
	if c.n++; c.n == 1 {
		c.since = time.Now()
	}
	c.mu.Unlock()
	return c.leave
}

func (c *stallClock) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n--; c.n == 0 {
		c.total += time.Since(c.since)
	}
}

func (c *stallClock) read() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n > 0 {
		return c.total + time.Since(c.since)
	}
	return c.total
}

// OriginStats is the demand that came from one origin.
type OriginStats struct {
	Reads int64 `json:"reads"`
	Bytes int64 `json:"bytes"` // in layer space
}

// Stats is what an image has done since it was opened. Blob figures are of
// the blobs, which images of the process may share.
type Stats struct {
	Demand map[string]OriginStats `json:"demand"` // by Origin
	// Stall is the time during which at least one demand read waited for
	// bytes; Wait adds up the waits of all of them.
	Stall time.Duration `json:"stall_ns"`
	Wait  time.Duration `json:"wait_ns"`

	DemandRequests     int64 `json:"demand_requests"`
	DemandBytes        int64 `json:"demand_bytes"`
	BackgroundRequests int64 `json:"background_requests"`
	BackgroundBytes    int64 `json:"background_bytes"`
	// Used is how many of the chunks' bytes that background fetches brought
	// have been read by demand.
	Used    int64 `json:"background_bytes_used"`
	Corrupt int64 `json:"corrupt"`
}

// Coverage is the share of demand bytes of remote layers that a prefetch had
// brought, or was bringing, when they were asked for; 1 without demand.
func (s Stats) Coverage() float64 {
	var all, ahead int64
	for name, d := range s.Demand {
		switch name {
		case FromLocal.String():
			continue
		case FromPrefetch.String(), FromFlight.String():
			ahead += d.Bytes
		}
		all += d.Bytes
	}
	if all == 0 {
		return 1
	}
	return float64(ahead) / float64(all)
}

// Accuracy is the share of the bytes fetched in the background that demand
// has read since; 1 without such bytes.
func (s Stats) Accuracy() float64 {
	if s.BackgroundBytes == 0 {
		return 1
	}
	return min(1, float64(s.Used)/float64(s.BackgroundBytes))
}

// Stats returns the figures of the image so far.
func (im *Image) Stats() Stats {
	s := Stats{Demand: map[string]OriginStats{}, Stall: im.stall.read(), Wait: time.Duration(im.counts.wait.Load())}
	for o := range origins {
		if n := im.counts.reads[o].Load(); n > 0 {
			s.Demand[Origin(o).String()] = OriginStats{Reads: n, Bytes: im.counts.bytes[o].Load()}
		}
	}
	for _, l := range im.layers {
		if l.blob != nil {
			l.blob.addStats(&s)
		}
	}
	return s
}

func (b *Blob) addStats(s *Stats) {
	s.DemandRequests += b.stats.demandRequests.Load()
	s.DemandBytes += b.stats.demandBytes.Load()
	s.BackgroundRequests += b.stats.backgroundRequests.Load()
	s.BackgroundBytes += b.stats.backgroundBytes.Load()
	s.Used += b.ahead.countBoth(b.wanted, 0, b.chunks) * b.chunk
	s.Corrupt += b.stats.corrupt.Load()
}
