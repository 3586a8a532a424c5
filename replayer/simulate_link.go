package replayer

import (
	"cmp"
	"slices"
	"time"

	"github.com/reprise-project/reprise/backstore"
)

// A Link is a modelled link to a registry.
type Link struct {
	Delay time.Duration // a round trip; a fresh connection costs another one
	Rate  int64         // bits a second, shared by all requests; 0 is no limit
}

// wireQuantum is how many bytes of a response the link sends before it turns to
// the next one.
const wireQuantum = 16 << 10

func (l Link) wireTime(n int64) time.Duration {
	if l.Rate == 0 {
		return 0
	}
	return time.Duration(float64(n) * 8 / float64(l.Rate) * float64(time.Second))
}

// A Scheduler is the settings of the backstore's scheduler that a simulation
// can change. A zero field means what the backstore has.
type Scheduler struct {
	Window float64 // prefetch under way, in bandwidth × delay; 1.5
	Piece  int64   // the most bytes of a prefetch request; [backstore.Estimate.Piece]
	Pieces int     // prefetch requests of one image under way; 48
	MinRun int64   // the least that a demand miss fetches; 64 KiB
	MaxRun int64   // the most, before a stream is recognised; 1 MiB
	Chunk  int64   // the unit of the cache; backstore.DefaultChunkSize
}

// The rest of what backstore's link.go has.
const (
	simMaxPulled      = 1 << 20
	simGuessRTT       = 10 * time.Millisecond
	simGuessBandwidth = 128e6
	simModest         = 64e6
	simSlack          = 5 * time.Millisecond
	simAbreast        = 750e3
	simLeeway         = 30 * time.Millisecond
	simMinWindow      = 256 << 10
	simMaxWindow      = 16 << 20
	simMaxDemand      = 64
	simMaxBackground  = 64
	simQuantum        = 64 << 10
	simPause          = 10 * time.Millisecond
	simLongPause      = 200 * time.Millisecond
	simBandwidthEvery = 20 * time.Millisecond
	simBandwidthBytes = 4 * simQuantum
	simFlowGap        = time.Millisecond
	simRecently       = 500 * time.Millisecond
)

func (s Scheduler) fill() Scheduler {
	if s.Window <= 0 {
		s.Window = 1.5
	}
	if s.Pieces <= 0 {
		s.Pieces = 48
	}
	if s.MinRun <= 0 {
		s.MinRun = 64 << 10
	}
	if s.MaxRun <= 0 {
		s.MaxRun = max(1<<20, s.MinRun)
	}
	if s.Chunk <= 0 {
		s.Chunk = backstore.DefaultChunkSize
	}
	return s
}

// simHost is the model of a registry host: the wire, the connections, and what
// the backstore's scheduler knows of it.
type simHost struct {
	c    *simClock
	link Link
	o    Scheduler
	cost time.Duration // of a request, beside the link

	wire    []*simStream // responses that have bytes to send, in turn
	sending bool
	idle    [2]int // open connections without a request, by lane

	rtt       time.Duration
	bw, guess float64
	flowing   int // streams between their first byte and their end
	ebbed     time.Duration
	flowSince time.Duration
	flowBytes int64

	demanding int // demand streams that are waited for
	joined    int // background streams that are
	slots     int // demand requests sent
	held      []*simStream
	giving    []*simStream // readers that give way
	back      int64        // background bytes on their way
	under     int          // background requests
	planned   []*simPrefetch
	turn      float64 // of the prefetch admitted last
	pumping   bool

	stalled   int           // reads that wait
	idled     time.Duration // during which some did and the link sent nothing
	idleSince time.Duration // where that is so; negative where not

	requests, bytes int64            // all of them
	sent            func(*simFlight) // for tests; may be nil
}

func newSimHost(c *simClock, link Link, o Scheduler, cost time.Duration) *simHost {
	return &simHost{c: c, link: link, o: o, cost: cost, guess: simGuessBandwidth, idleSince: -1}
}

// stalls notes that so many more reads wait.
func (h *simHost) stalls(by int) {
	h.stalled += by
	h.mark()
}

// mark measures idled.
func (h *simHost) mark() {
	if h.idleSince >= 0 {
		h.idled += h.c.now - h.idleSince
	}
	if h.idleSince = -1; h.stalled > 0 && !h.sending {
		h.idleSince = h.c.now
	}
}

// simStream is a request and its response.
type simStream struct {
	h       *simHost
	lane    backstore.Lane
	f       *simFlight // nil for what is not of a blob: the scheduler does not see it
	begun   time.Duration
	alone   bool  // nothing was coming then
	left    int64 // not sent yet
	here    int64 // received and not read
	unread  int64
	heard   bool // something was received
	read1   bool // something was read
	reading bool // in a read that waits for bytes
	pause   int  // counts pauses
	paused  bool
	then    func() // at the end
}

// ask sends a request that is not of a blob: for a manifest, a trace.
func (h *simHost) ask(n int64, then func()) {
	n = max(n, 1)
	h.send(&simStream{h: h, left: n, unread: n, then: then})
}

// start sends a request of a blob, behind other demand if need be.
func (h *simHost) start(s *simStream) {
	if s.lane == backstore.Demand {
		if h.slots == simMaxDemand {
			h.held = append(h.held, s)
			return
		}
		h.slots++
	}
	s.f.asking = true
	s.f.weigh()
	h.send(s)
}

func (h *simHost) send(s *simStream) {
	s.begun, s.alone = h.c.now, h.flowing == 0
	h.requests++
	wait := h.link.Delay + h.cost
	if h.idle[s.lane] > 0 {
		h.idle[s.lane]--
	} else {
		wait += h.link.Delay
	}
	h.c.after(wait, func() {
		h.wire = append(h.wire, s)
		h.transmit()
	})
}

// transmit sends the next quantum.
func (h *simHost) transmit() {
	if h.sending || len(h.wire) == 0 {
		return
	}
	s := h.wire[0]
	h.wire = h.wire[1:]
	n := min(s.left, wireQuantum)
	h.sending = true
	h.mark()
	h.c.after(h.link.wireTime(n), func() {
		h.sending = false
		h.mark()
		h.bytes += n
		if s.left -= n; s.left > 0 {
			h.wire = append(h.wire, s)
		}
		s.receive(n)
		h.transmit()
	})
}

func (s *simStream) receive(n int64) {
	s.here += n
	if !s.heard {
		s.heard = true
		s.turn()
		return
	}
	s.read()
}

// turn comes before each read: a stream that nobody waits for gives way to those
// that somebody does.
func (s *simStream) turn() {
	h := s.h
	if s.f == nil || s.f.wanted > 0 || h.demanding+h.joined == 0 || s.f.hurried() {
		s.reading = true
		s.read()
		return
	}
	s.paused = true
	s.pause++
	n := s.pause
	h.giving = append(h.giving, s)
	h.restart()
	h.c.after(h.pauseLength(), func() {
		if s.pause == n {
			s.resume()
		}
	})
}

// resume ends a pause, if it has not ended.
func (s *simStream) resume() {
	if !s.paused {
		return
	}
	s.paused, s.reading = false, true
	s.h.giving = slices.DeleteFunc(s.h.giving, func(g *simStream) bool { return g == s })
	s.h.restart()
	s.read()
}

func (s *simStream) read() {
	if !s.reading || s.here == 0 {
		return
	}
	n := min(s.here, simQuantum)
	s.reading = false
	s.here -= n
	s.unread -= n
	if s.f != nil {
		s.arrived(n)
	}
	if s.unread > 0 {
		s.turn()
		return
	}
	s.end()
}

// arrived is bytes of a blob.
func (s *simStream) arrived(n int64) {
	if !s.read1 {
		s.h.flows(s)
	}
	s.h.received(n, !s.read1)
	s.read1 = true
	s.f.got(n)
	if s.lane == backstore.Background {
		s.h.back -= n
		s.h.pump()
	}
}

func (s *simStream) end() {
	h := s.h
	h.idle[s.lane]++
	if s.f == nil {
		s.then()
		return
	}
	if h.flowing--; h.flowing == 0 {
		h.ebbed = h.c.now
	}
	s.f.ended()
	if s.lane == backstore.Background {
		h.under--
	} else if h.slots--; len(h.held) > 0 {
		next := h.held[0]
		h.held = h.held[1:]
		h.start(next)
	}
	h.pump()
}

// demands notes that a stream begins to be waited for, or ends to be.
func (h *simHost) demands(lane backstore.Lane, by int) {
	if lane == backstore.Demand {
		h.demanding += by
	} else {
		h.joined += by
	}
	if by > 0 {
		return
	}
	if h.demanding+h.joined == 0 {
		for _, s := range h.giving {
			h.c.after(0, s.resume)
		}
	}
	h.c.after(0, h.pump)
}

func (h *simHost) estimate() backstore.Estimate {
	return backstore.Estimate{RTT: h.rtt, Bandwidth: int64(h.bw)}
}

// piece is the most that a prefetch request asks for.
func (h *simHost) piece() int64 { return cmp.Or(h.o.Piece, h.estimate().Piece()) }

func (h *simHost) bdp() int64 { return int64(h.delay().Seconds() * max(h.bw, h.guess)) }

func (h *simHost) delay() time.Duration { return cmp.Or(h.rtt, simGuessRTT) }

// fits tells whether more background bytes may be asked for.
func (h *simHost) fits() bool {
	bw := max(h.bw, h.guess)
	w := int64(float64(h.bdp())*h.o.Window) + int64(simSlack.Seconds()*bw)
	w = max(w, int64(min(simAbreast, simLeeway.Seconds()*bw)))
	return h.back < min(max(w, simMinWindow), simMaxWindow) && h.under < simMaxBackground
}

func (h *simHost) runLength() int64 {
	n := int64(2 * h.delay().Seconds() * cmp.Or(h.bw, simModest))
	return min(max(n, h.o.MinRun), h.o.MaxRun)
}

// pauseLength is how long a stream that nobody waits for gives way at most.
func (h *simHost) pauseLength() time.Duration {
	if h.demanding == 0 || h.bw == 0 {
		return simPause
	}
	d := time.Duration(4 * simQuantum * float64(h.flowing) / h.bw * float64(time.Second))
	return min(max(d, simPause), simLongPause)
}

// flows notes the first byte of a stream.
func (h *simHost) flows(s *simStream) {
	d := h.c.now - s.begun
	switch {
	case h.rtt == 0 || d < h.rtt:
		h.rtt = d
	case s.alone:
		h.rtt += (d - h.rtt) / 16
	}
	if h.flowing++; h.flowing > 1 {
		return
	}
	if gap := h.c.now - h.ebbed; gap < simFlowGap {
		h.flowSince += gap
	} else {
		h.restart()
	}
}

// restart begins to measure bandwidth anew.
func (h *simHost) restart() {
	h.flowSince, h.flowBytes = h.c.now, 0
}

func (h *simHost) received(n int64, first bool) {
	if !first {
		h.flowBytes += n
	}
	d := h.c.now - h.flowSince
	if len(h.giving) > 0 || d < simBandwidthEvery || h.flowBytes < simBandwidthBytes {
		return
	}
	bw := float64(h.flowBytes) / d.Seconds()
	h.guess /= 2
	switch {
	case h.bw == 0:
		h.bw = bw
	case bw > h.bw:
		h.bw += (bw - h.bw) / 2
	default:
		h.bw += (bw - h.bw) / 8
	}
	h.restart()
}

// pump lets prefetches in, those first that have had the fewest bytes.
func (h *simHost) pump() {
	if h.pumping {
		return
	}
	h.pumping = true
	defer func() { h.pumping = false }()
	for h.fits() {
		byTurn := slices.Clone(h.planned)
		slices.SortStableFunc(byTurn, func(p, q *simPrefetch) int { return cmp.Compare(p.turn, q.turn) })
		if !slices.ContainsFunc(byTurn, (*simPrefetch).piece) {
			return
		}
	}
}
