package backstore

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const origins = int(FromFetch) + 1

// counters add up demand by origin.
type counters struct {
	reads, bytes, wait [origins]atomic.Int64
	latency            latencies // of reads of the device that touch a remote layer
}

func (c *counters) add(e ReadEvent) {
	c.reads[e.Origin].Add(1)
	c.bytes[e.Origin].Add(e.Len)
	if e.Wait > 0 {
		c.wait[e.Origin].Add(int64(e.Wait))
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

// OriginStats is the demand that came from one origin. A read of the device that
// touches several layers, or places of a layer, counts as several.
type OriginStats struct {
	Reads int64         `json:"reads"`
	Bytes int64         `json:"bytes"` // in layer space
	Wait  time.Duration `json:"wait_ns"`
}

// Add adds o to s.
func (s OriginStats) Add(o OriginStats) OriginStats {
	return OriginStats{s.Reads + o.Reads, s.Bytes + o.Bytes, s.Wait + o.Wait}
}

// Stats is what an image has done since it was opened. Blob figures are of
// the blobs, which images of the process may share.
type Stats struct {
	Demand map[string]OriginStats `json:"demand"` // by Origin
	// Stall is the time during which at least one demand read waited for
	// bytes; Wait adds up the waits of all of them.
	Stall time.Duration `json:"stall_ns"`
	Wait  time.Duration `json:"wait_ns"`
	// Latency is how long reads of the device that touch a remote layer have
	// waited until their bytes were on the node; most not at all.
	Latency Histogram `json:"latency"`
	// Late is the part of Demand that came while a prefetch was bringing it:
	// in time to save a request, too late to save the wait.
	Late OriginStats `json:"late"`

	DemandRequests     int64 `json:"demand_requests"`
	DemandBytes        int64 `json:"demand_bytes"`
	BackgroundRequests int64 `json:"background_requests"`
	BackgroundBytes    int64 `json:"background_bytes"`
	// Used is how many of the bytes that background fetches brought belong to
	// blocks of the compression that demand has read, and Unused how many have
	// not so far.
	Used    int64 `json:"background_bytes_used"`
	Unused  int64 `json:"background_bytes_unused"`
	Corrupt int64 `json:"corrupt"`
}

// Add returns the figures of both together. They must not be of the same blobs.
func (s Stats) Add(o Stats) Stats {
	sum := Stats{
		Demand: map[string]OriginStats{},
		Stall:  s.Stall + o.Stall, Wait: s.Wait + o.Wait, Latency: s.Latency.Merge(o.Latency), Late: s.Late.Add(o.Late),
		DemandRequests: s.DemandRequests + o.DemandRequests, DemandBytes: s.DemandBytes + o.DemandBytes,
		BackgroundRequests: s.BackgroundRequests + o.BackgroundRequests, BackgroundBytes: s.BackgroundBytes + o.BackgroundBytes,
		Used: s.Used + o.Used, Unused: s.Unused + o.Unused, Corrupt: s.Corrupt + o.Corrupt,
	}
	maps.Copy(sum.Demand, s.Demand)
	for name, d := range o.Demand {
		sum.Demand[name] = sum.Demand[name].Add(d)
	}
	return sum
}

// Coverage is the share of demand bytes of remote layers that a prefetch, or
// the opening of the layers, had brought when they were asked for, or was
// bringing; 1 without demand.
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
	s := Stats{Demand: map[string]OriginStats{}, Stall: im.stall.read(), Latency: im.counts.latency.read()}
	for o := range origins {
		n := im.counts.reads[o].Load()
		if n == 0 {
			continue
		}
		d := OriginStats{n, im.counts.bytes[o].Load(), time.Duration(im.counts.wait[o].Load())}
		s.Demand[Origin(o).String()] = d
		s.Wait += d.Wait
	}
	s.Late = s.Demand[FromFlight.String()]
	for _, l := range im.layers {
		if l.blob != nil {
			l.blob.addStats(&s)
		}
	}
	return s
}

func (b *Blob) addStats(s *Stats) {
	h := b.hostStats()
	s.DemandRequests += h.DemandRequests
	s.DemandBytes += h.DemandBytes
	s.BackgroundRequests += h.BackgroundRequests
	s.BackgroundBytes += h.BackgroundBytes
	s.Used += h.Used
	s.Unused += max(0, h.BackgroundBytes-h.Used)
	s.Corrupt += h.Corrupt
}

// HostStats is what the process has done at one registry host, and knows of it.
type HostStats struct {
	Host     string
	Estimate Estimate

	DemandRequests, DemandBytes         int64
	BackgroundRequests, BackgroundBytes int64
	Used, Corrupt                       int64 // as in [Stats]

	Throttled int64 // answers that asked to be left alone for a while
	Outages   int64 // times that it could not be reached, or had but errors
	Away      bool  // it is so now
}

// hostStats are a blob's part in its host's.
func (b *Blob) hostStats() HostStats {
	return HostStats{
		DemandRequests:     b.stats.demandRequests.Load(),
		DemandBytes:        b.stats.demandBytes.Load(),
		BackgroundRequests: b.stats.backgroundRequests.Load(),
		BackgroundBytes:    b.stats.backgroundBytes.Load(),
		Used:               b.read.ahead.Load(),
		Corrupt:            b.stats.corrupt.Load(),
	}
}

func (h *HostStats) add(o HostStats) {
	h.DemandRequests += o.DemandRequests
	h.DemandBytes += o.DemandBytes
	h.BackgroundRequests += o.BackgroundRequests
	h.BackgroundBytes += o.BackgroundBytes
	h.Used += o.Used
	h.Corrupt += o.Corrupt
}

// Hosts are the hosts that blobs have been opened from, by name. Their counts
// never fall: those of blobs that were closed are in them.
func (c *Cache) Hosts() []HostStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := map[string]*HostStats{}
	for name := range c.links {
		all[name] = &HostStats{}
		all[name].add(c.past[name])
	}
	for _, b := range c.blobs {
		all[b.link.host].add(b.hostStats())
	}
	list := make([]HostStats, 0, len(all))
	for name, h := range all {
		l := c.links[name]
		h.Host, h.Estimate = name, l.estimate()
		h.Throttled, h.Outages, h.Away = l.outage.read()
		list = append(list, *h)
	}
	slices.SortFunc(list, func(a, b HostStats) int { return strings.Compare(a.Host, b.Host) })
	return list
}

// retire keeps the counts of a blob that is being closed. c.mu is held.
func (c *Cache) retire(b *Blob) {
	if c.past == nil {
		c.past = map[string]HostStats{}
	}
	h := c.past[b.link.host]
	h.add(b.hostStats())
	c.past[b.link.host] = h
}
