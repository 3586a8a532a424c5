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
	guessRTT = 10 * time.Millisecond
	// guessBandwidth, in bytes a second, is rather too much than too little: a
	// start's bytes come in a few round trips, which a window that had to grow
	// first would let pass. Each measurement takes some of the excess away.
	guessBandwidth = 128e6
	// modestBandwidth is the guess for what a reader who misses may want next.
	modestBandwidth = 64e6

	// slack is how long a node may take to notice that bytes have come and to
	// ask for more, without the link running dry.
	slack = 5 * time.Millisecond

	// abreast is how far readers side by side are ahead of each other in a plan, in
	// bytes, and leeway what of it may be asked for ahead, in time on the link.
	// More delays demand for longer; a start of Node.js, as simulated at
	// 10ms,200mbit, finds two in a hundred bytes more in time than without it.
	abreast = 750e3
	leeway  = 30 * time.Millisecond

	minWindow      = 256 << 10
	straying       = 4 // round trips after a miss that no plan has in which another one is expected
	maxWindow      = 16 << 20
	resentful      = 10 * time.Minute       // for which a 429 is remembered
	maxDemand      = 64                     // demand fetches in flight, a host
	maxBackground  = 64                     // background fetches in flight, a host
	quantum        = 64 << 10               // bytes a stream that nobody waits for reads between two looks at demand
	quantumPause   = 10 * time.Millisecond  // the longest wait for demand before each of these, or
	longPause      = 200 * time.Millisecond // so long, where that keeps them from taking more than a quarter of the link
	bandwidthEvery = 20 * time.Millisecond  // of streaming, over which bandwidth is measured
	bandwidthBytes = 4 * quantum            // the least that is measured
	flowGap        = time.Millisecond       // between two streams, in which nothing is measured
)

// node is what the links of a process share.
type node struct {
	mu    sync.Mutex // guards everything in links, their budgets and shares
	all   budget     // of background fetches, all hosts together
	links []*link
	wake  *time.Timer // when a waiting background fetch may be let in; may be nil
}

func newNode(l Limits) *node {
	l.PerMinute = 0 // that is for each link
	return &node{all: newBudget(l)}
}

// link is what the process knows of one registry host: how far away it is, how
// fast, and what is in flight from it. All but what is constant is guarded by
// node.mu.
type link struct {
	host   string
	node   *node
	demand chan struct{} // a slot a demand fetch
	// outage is what readers have found out about the host, and behind what
	// background fetches have: these must not hold up readers.
	outage, behind outage

	rtt   time.Duration // least time to first byte, forgetting upwards
	bw    float64       // bytes a second while bytes come; 0 while unknown
	guess float64       // what is left of guessBandwidth

	demanding int           // demand fetches that are waited for
	joined    int           // background fetches that are waited for
	calm      chan struct{} // closed when nothing is waited for any more
	strayed   time.Time     // when a read last missed what no plan has
	throttled time.Time     // when the host last asked to be left alone

	bgOut int64        // background bytes asked for and not yet received
	under int          // background requests under way
	sent  minute       // requests, demand included
	queue []*admission // background fetches that wait for a place
	turn  float64      // of the one admitted last; see share

	flowing   int       // streams between their first byte and their end
	pausing   int       // of these, which give way
	ebbed     time.Time // when flowing fell to 0
	flowSince time.Time // start of the running measurement
	flowBytes int64
}

func newLink(host string, n *node, log *slog.Logger, perMinute int) *link {
	l := &link{
		host: host, node: n, demand: make(chan struct{}, maxDemand), calm: make(chan struct{}), guess: guessBandwidth,
		outage: outage{host: host, log: log},
		behind: outage{host: host, log: slog.New(slog.DiscardHandler)},
		sent:   minute{limit: perMinute},
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.links = append(n.links, l)
	return l
}

// Estimate is what the process has measured of a registry host.
type Estimate struct {
	RTT       time.Duration // least time from a request to its first byte
	Bandwidth int64         // bytes a second while bytes come; 0 while unknown
	PerMinute int           // requests a minute that [CacheOptions].Background allows, 0 where any number is
	Throttled bool          // the host has asked to be left alone of late: requests are what it has too few of
}

// Piece is the longest background request on such a link in bytes: about what
// arrives in a round trip, so that few requests fill a long and fast one; at
// least 1 MiB and at most 4.
func (e Estimate) Piece() int64 {
	return min(max(int64(e.RTT.Seconds()*float64(e.Bandwidth)), maxPiece), longPiece)
}

func (l *link) estimate() Estimate {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	return l.measures()
}

// measures is estimate with node.mu held.
func (l *link) measures() Estimate {
	return Estimate{
		RTT: l.rtt, Bandwidth: int64(l.bw), PerMinute: l.sent.limit,
		Throttled: !l.throttled.IsZero() && time.Since(l.throttled) < resentful,
	}
}

// bdp is bandwidth × delay in bytes, from guesses where nothing is measured.
// node.mu is held.
func (l *link) bdp() int64 { return int64(l.delay().Seconds() * max(l.bw, l.guess)) }

// window is how many background bytes may be asked for and not yet received:
// what keeps the link busy for a round trip, half of that again, and what comes
// while the node is slow; on a link that is near and slow at once so much more that
// readers side by side, who are some hundred KB ahead of each other, find it all
// asked for. Where readers miss what no plan has it is a quarter.
// Demand that a plan has is no reason: of many starts at once there is always
// one that waits, and all replays would starve. node.mu is held.
func (l *link) window() int64 {
	bw := max(l.bw, l.guess)
	w := max(l.bdp()*3/2+int64(slack.Seconds()*bw), int64(min(abreast, leeway.Seconds()*bw)))
	if l.shy() {
		w /= 4
	}
	return min(max(w, minWindow), maxWindow)
}

// shy reports whether background fetches keep back: where readers miss what no
// plan has, since they will again. node.mu is held.
func (l *link) shy() bool { return time.Since(l.strayed) < straying*l.delay() }

// stray notes a miss of what no plan has.
func (l *link) stray() {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	l.strayed = time.Now()
}

// throttle notes that the host has asked to be left alone.
func (l *link) throttle() {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	l.throttled = time.Now()
}

// piece is the longest background request at the moment.
func (l *link) piece() int64 {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	if l.shy() {
		return min(l.window(), maxPiece)
	}
	return l.measures().Piece()
}

// runLength is how much one demand miss is worth fetching: about what arrives
// in the time of two round trips. As much as in one makes lazy starts of real
// images, as simulated at 10ms,200mbit and 2ms,2gbit, 16 to 28 % slower, and
// as in three no faster; it is 12 to 20 % fewer bytes.
func (l *link) runLength() int64 {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	bw := l.bw
	if bw == 0 {
		bw = modestBandwidth
	}
	return min(max(int64(2*l.delay().Seconds()*bw), minRun), maxRun)
}

// delay is the round trip, guessed where nothing is measured. node.mu is held.
func (l *link) delay() time.Duration {
	if l.rtt == 0 {
		return guessRTT
	}
	return l.rtt
}

// requested notes a request that no grant was taken for.
func (l *link) requested() {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	l.sent.add(time.Now())
}

// isFar reports whether n bytes of one of the streams that are coming take
// longer than two round trips, a new connection's first byte.
func (l *link) isFar(n int64) bool {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	return l.bw > 0 && float64(n)*float64(l.flowing)/l.bw > 2*l.delay().Seconds()
}

// demands notes that a fetch begins to be waited for, or ends to be.
func (l *link) demands(lane Lane, waited bool) {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	n := &l.demanding
	if lane == Background {
		n = &l.joined
	}
	if waited {
		*n++
		return
	}
	*n--
	if l.demanding+l.joined == 0 {
		close(l.calm)
		l.calm = make(chan struct{})
	}
	l.node.advance()
}

// flows notes the first byte of a stream, n bytes with it, of a request begun at
// that time; alone says that nothing was coming when it was begun.
func (l *link) flows(begun time.Time, alone bool) {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	d := max(time.Since(begun), time.Microsecond) // 0 is unknown
	switch {
	case l.rtt == 0 || d < l.rtt:
		l.rtt = d
	case alone: // else it may have queued behind other bytes
		l.rtt += (d - l.rtt) / 16
	}
	if l.flowing++; l.flowing > 1 {
		return
	}
	if gap := time.Since(l.ebbed); gap < flowGap {
		l.flowSince = l.flowSince.Add(gap)
	} else {
		l.restart()
	}
}

// restart begins to measure bandwidth anew. node.mu is held.
func (l *link) restart() { l.flowSince, l.flowBytes = time.Now(), 0 }

// pauses notes that a stream begins to give way, or ends to: what comes
// meanwhile says nothing of the link.
func (l *link) pauses(by int) {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	l.pausing += by
	l.restart()
}

// quiet reports whether nothing is coming.
func (l *link) quiet() bool {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	return l.flowing == 0
}

// received notes n bytes of a stream, the first ones left out.
func (l *link) received(n int64, g *grant, first bool) {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	if !first {
		l.flowBytes += n
	}
	if d := time.Since(l.flowSince); l.pausing == 0 && d >= bandwidthEvery && l.flowBytes >= bandwidthBytes {
		l.measured(float64(l.flowBytes) / d.Seconds())
		l.restart()
	}
	if g != nil {
		g.got(n)
		l.node.advance()
	}
}

// measured takes one bandwidth sample: up soon, since a link is never faster
// than it is, down slowly, since it may be shared.
func (l *link) measured(bw float64) {
	l.guess /= 2
	switch {
	case l.bw == 0:
		l.bw = bw
	case bw > l.bw:
		l.bw += (bw - l.bw) / 2
	default:
		l.bw += (bw - l.bw) / 8
	}
}

// ebbs notes the end of a stream.
func (l *link) ebbs() {
	l.node.mu.Lock()
	defer l.node.mu.Unlock()
	if l.flowing--; l.flowing == 0 {
		l.ebbed = time.Now()
	}
}

// pause is how long a stream waits at most before it goes on beside others.
// node.mu is held.
func (l *link) pause() time.Duration {
	if l.demanding == 0 || l.bw == 0 {
		return quantumPause
	}
	d := time.Duration(4 * quantum * float64(l.flowing) / l.bw * float64(time.Second))
	return min(max(d, quantumPause), longPause)
}

// giveWay makes a stream that nobody waits for wait, a bounded time, while
// something else is waited for from the same host; until wanted says that this
// one is, too.
func (l *link) giveWay(ctx context.Context, wanted <-chan struct{}) {
	l.node.mu.Lock()
	busy, calm := l.demanding+l.joined > 0, l.calm
	pause := l.pause()
	l.node.mu.Unlock()
	if !busy {
		return
	}
	l.pauses(1)
	defer l.pauses(-1)
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-calm:
	case <-wanted:
	case <-t.C:
	case <-ctx.Done():
	}
}
