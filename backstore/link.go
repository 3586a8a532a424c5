package backstore

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// What the scheduler assumes of a link before it has measured it, and the
// bounds it keeps whatever it measures.
const (
	guessRTT       = 20 * time.Millisecond
	guessBandwidth = 25 << 20 // bytes a second

	minWindow      = 256 << 10
	maxWindow      = 16 << 20
	maxDemand      = 64                    // demand fetches in flight, a host
	quantum        = 64 << 10              // bytes a background stream reads between two looks at demand
	quantumPause   = 10 * time.Millisecond // the longest wait for demand before each of these
	bandwidthEvery = 20 * time.Millisecond // busy time over which bandwidth is measured
)

// link is what the process knows of one registry host: how far away it is, how
// fast, and what is in flight from it.
type link struct {
	host   string
	demand chan struct{} // a slot a demand fetch
	outage outage

	mu      sync.Mutex
	rtt     time.Duration // least time to first byte, forgetting upwards
	bw      float64       // bytes a second while busy
	streams int           // fetches in flight
	waiting int           // demand fetches in flight
	calm    chan struct{} // closed when waiting falls to 0
	bgOut   int64         // background bytes asked for and not yet received
	queue   []*admission  // background fetches that wait for a place, first come first

	busySince time.Time // start of the running measurement
	busyBytes int64
}

type admission struct {
	n  int64
	ok chan struct{}
}

func newLink(host string, log *slog.Logger) *link {
	return &link{
		host: host, demand: make(chan struct{}, maxDemand), calm: make(chan struct{}),
		outage: outage{host: host, log: log},
	}
}

// Estimate is what the process has measured of a registry host.
type Estimate struct {
	RTT       time.Duration // least time from a request to its first byte
	Bandwidth int64         // bytes a second; 0 while unknown
}

func (l *link) estimate() Estimate {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Estimate{RTT: l.rtt, Bandwidth: int64(l.bw)}
}

// bdp is bandwidth × delay in bytes, from guesses where nothing is measured.
// l.mu is held.
func (l *link) bdp() int64 {
	rtt, bw := l.rtt, l.bw
	if rtt == 0 {
		rtt = guessRTT
	}
	if bw == 0 {
		bw = guessBandwidth
	}
	return int64(rtt.Seconds() * bw)
}

// window is how many background bytes may be asked for and not yet received:
// what keeps the link busy for a round trip, and half of that again.
func (l *link) window() int64 {
	w := l.bdp() * 3 / 2
	if l.waiting > 0 {
		w /= 4
	}
	return min(max(w, minWindow), maxWindow)
}

// runLength is how much one demand miss is worth fetching: about what arrives
// in the time of a round trip.
func (l *link) runLength() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return min(max(l.bdp(), minRun), maxRun)
}

// admit waits until n background bytes may be asked for. A request larger than
// the window is admitted alone. Each admission is paid back through received.
func (l *link) admit(ctx context.Context, n int64) error {
	l.mu.Lock()
	if len(l.queue) == 0 && l.fits() {
		l.bgOut += n
		l.mu.Unlock()
		return nil
	}
	a := &admission{n: n, ok: make(chan struct{})}
	l.queue = append(l.queue, a)
	l.mu.Unlock()
	select {
	case <-a.ok:
		return nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, q := range l.queue {
		if q == a {
			l.queue = append(l.queue[:i], l.queue[i+1:]...)
			return ctx.Err()
		}
	}
	l.bgOut -= n // admitted at the same moment
	l.advance()
	return ctx.Err()
}

func (l *link) fits() bool { return l.bgOut < l.window() }

// advance lets waiting background fetches in. l.mu is held.
func (l *link) advance() {
	for len(l.queue) > 0 && l.fits() {
		a := l.queue[0]
		l.queue = l.queue[1:]
		l.bgOut += a.n
		close(a.ok)
	}
}

// started notes the start of a fetch.
func (l *link) started(lane Lane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.streams == 0 {
		l.busySince, l.busyBytes = time.Now(), 0
	}
	l.streams++
	if lane == Demand {
		l.waiting++
	}
}

// firstByte notes the time that a fetch took to answer.
func (l *link) firstByte(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rtt == 0 || d < l.rtt {
		l.rtt = d
	} else {
		l.rtt += (d - l.rtt) / 64
	}
}

// received notes n bytes of a stream; back of them were admitted background.
func (l *link) received(n, back int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.busyBytes += n
	if n == 0 {
		// Bytes of a request that was not sent after all.
	} else if d := time.Since(l.busySince); d >= bandwidthEvery {
		l.measured(float64(l.busyBytes) / d.Seconds())
		l.busySince, l.busyBytes = time.Now(), 0
	}
	if back != 0 {
		l.bgOut -= back
		l.advance()
	}
}

// measured takes one bandwidth sample: up at once, since a link is never
// faster than it is, down slowly, since it is often not asked for all it has.
func (l *link) measured(bw float64) {
	switch {
	case l.bw == 0 || bw > l.bw:
		l.bw = bw
	default:
		l.bw += (bw - l.bw) / 32
	}
}

// ended notes the end of a fetch.
func (l *link) ended(lane Lane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.streams--
	if lane == Demand {
		if l.waiting--; l.waiting == 0 {
			close(l.calm)
			l.calm = make(chan struct{})
		}
	}
	l.advance()
}

// giveWay makes a background stream wait, a bounded time, while demand is
// being fetched from the same host.
func (l *link) giveWay(ctx context.Context) {
	l.mu.Lock()
	busy, calm := l.waiting > 0, l.calm
	l.mu.Unlock()
	if !busy {
		return
	}
	t := time.NewTimer(quantumPause)
	defer t.Stop()
	select {
	case <-calm:
	case <-t.C:
	case <-ctx.Done():
	}
}
