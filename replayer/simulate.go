package replayer

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

// A SimMode is how a simulated start gets its bytes.
type SimMode string

const (
	SimLazy   SimMode = "lazy"   // nothing on the node, no trace
	SimReplay SimMode = "replay" // nothing on the node, with the trace
	SimWarm   SimMode = "warm"   // all bytes on the node
)

// SimOptions are the settings of [Simulate] and [LowerBound]. A zero field means
// its default.
type SimOptions struct {
	Link Link
	// RoundTrips are those that must follow one another before a start can have
	// bytes of its layers: the connection, the manifest, and the requests for the
	// layers' indexes, with which those for data can leave where the trace is
	// known by then. 3 by default, for plain HTTP; they are only in the bound.
	RoundTrips int
	// StartCPU is what a start computes from the command until the image is
	// open: 20 ms by default, which is a warm start's time until then less its
	// two round trips; none if negative. Three quarters of it are before the
	// first request.
	StartCPU time.Duration
	// Lookup is how many round trips follow the manifest until the trace is
	// known: 1 by default, none if negative, as with a trace on the node.
	Lookup int
	// Ahead is how many connections of each lane, for demand and for prefetch,
	// are opened while the manifest is waited for: 16 by default, none if
	// negative.
	Ahead int
	// RequestCPU is what a request costs beside the link, 500 µs by default,
	// nothing if negative.
	RequestCPU time.Duration
	// Copies is how many containers of each workload start at once, on one node;
	// 1 by default.
	Copies int
	// Trace is replayed instead of each workload's own, if not nil.
	Trace *tracefmt.Trace
	// Plan has the planner's settings.
	Plan *Options
	// Scheduler has the backstore's.
	Scheduler Scheduler
}

const maxCopies = 1000

func (o *SimOptions) fill() (SimOptions, error) {
	var f SimOptions
	if o != nil {
		f = *o
	}
	f.RoundTrips = cmp.Or(f.RoundTrips, 3)
	f.StartCPU = max(0, cmp.Or(f.StartCPU, 20*time.Millisecond))
	f.RequestCPU = max(0, cmp.Or(f.RequestCPU, 500*time.Microsecond))
	f.Lookup = max(0, cmp.Or(f.Lookup, 1))
	f.Ahead = max(0, cmp.Or(f.Ahead, 16))
	f.Copies = cmp.Or(f.Copies, 1)
	f.Scheduler = f.Scheduler.fill()
	switch {
	case f.Link.Delay < 0 || f.Link.Rate < 0:
		return f, errors.New("a link with a negative delay or rate")
	case f.RoundTrips < 0 || f.RoundTrips > 1000 || f.Lookup > 1000:
		return f, errors.New("round trips: not from 0 to 1000")
	case f.Copies < 0 || f.Copies > maxCopies:
		return f, fmt.Errorf("%d copies: not from 1 to %d", f.Copies, maxCopies)
	case f.Scheduler.Chunk < 512, f.Scheduler.Piece != 0 && f.Scheduler.Piece < f.Scheduler.Chunk:
		return f, fmt.Errorf("chunks of %d bytes in pieces of %d: at least 512, and one in a piece", f.Scheduler.Chunk, f.Scheduler.Piece)
	}
	return f, nil
}

// planOptions are the planner's, for the model's cache.
func (o *SimOptions) planOptions() *Options {
	var p Options
	if o.Plan != nil {
		p = *o.Plan
	}
	p.Chunk = o.Scheduler.Chunk
	return &p
}

// A Simulated is what a simulation found. Times are from the command on.
type Simulated struct {
	Ready    time.Duration   // of the last start
	Starts   []time.Duration // ready times, the copies of a workload together
	Stall    time.Duration   // during which a start's reads waited, on average
	Idle     time.Duration   // during which reads waited and the link sent nothing
	WaitP95  time.Duration   // of the reads' waits for bytes, those of 0 included
	Requests int64           // until the last start was ready
	Bytes    int64           // likewise, of responses' bodies
	Coverage float64         // share of the demand, in layer space, that a prefetch served or was bringing
	Accuracy float64         // share of the prefetched bytes, of blobs, that was read
	Late     time.Duration   // that reads waited for a prefetch under way, in all
	Sent     int64           // prefetch requests, until the replay's end
	Fetched  int64           // bytes prefetched, until the replay's end
}

// Simulate starts all workloads at once, on one node behind one link, on a
// virtual clock: nothing is fetched, and the same input gives the same result.
//
// The plan and its judge are the real ones. The scheduler is a model of the
// backstore's, which a test compares with it. Left out are failures, limits and
// everything that takes the node's processors, except for the thinking times,
// the costs in the options, and the waits that these and the link bring about:
// on a busy node a start is slower. A link is one of regtest's: HTTP/1, no TLS,
// responses take turns by 16 KiB.
func Simulate(ws []*Workload, mode SimMode, options *SimOptions) (*Simulated, error) {
	s, err := newSimulation(ws, mode, options)
	if err != nil {
		return nil, fmt.Errorf("simulate: %w", err)
	}
	for _, st := range s.starts {
		s.c.after(s.o.StartCPU*3/4, st.begin)
	}
	s.c.run()
	for _, st := range s.starts {
		if !st.over {
			return nil, fmt.Errorf("simulate: read %d never ended", st.ended)
		}
	}
	return s.result(), nil
}

// simulation is one run of a model.
type simulation struct {
	o      SimOptions
	mode   SimMode
	c      *simClock
	h      *simHost
	blobs  map[digest.Digest]*simBlob
	starts []*simStart

	requests, bytes int64 // when the last start was ready
	waits           []time.Duration
	late            time.Duration
	demand, ahead   int64 // bytes of layer space
}

// simStart is one start while it lasts.
type simStart struct {
	s       *simulation
	w       *Workload
	plan    *Plan // nil without a replay
	blobs   []*simBlob
	waiting int // of what has to be there before the image is open

	next    int // read to begin
	planned bool
	done    []bool // of the reads
	ended   int    // the first so many of w.ended have
	stall   simStall
	over    bool
	ready   time.Duration
}

func newSimulation(ws []*Workload, mode SimMode, options *SimOptions) (*simulation, error) {
	o, err := options.fill()
	if err != nil {
		return nil, err
	}
	c := &simClock{}
	s := &simulation{
		o: o, mode: mode, c: c, blobs: map[digest.Digest]*simBlob{},
		h: newSimHost(c, o.Link, o.Scheduler, o.RequestCPU),
	}
	for range o.Copies {
		for i, w := range ws {
			if err := s.add(i, w); err != nil {
				return nil, err
			}
		}
	}
	return s, nil
}

func (s *simulation) add(number int, w *Workload) error {
	st := &simStart{s: s, w: w, done: make([]bool, len(w.reads))}
	for i, l := range w.layers {
		d := l.Digest
		if d == "" { // a layer of its own
			d = digest.Digest(fmt.Sprintf("%d:%d", number, i))
		}
		if s.blobs[d] == nil {
			s.blobs[d] = newSimBlob(s.h, l.Size)
			if s.mode == SimWarm {
				s.blobs[d].present.add(0, s.blobs[d].chunks(l.Size))
			}
		}
		if s.blobs[d].size < l.Size {
			return fmt.Errorf("the traces tell different sizes of layer %s", d)
		}
		st.blobs = append(st.blobs, s.blobs[d])
	}
	if s.mode == SimReplay {
		var err error
		if st.plan, err = NewPlan(cmp.Or(s.o.Trace, w.trace), Unopened(w.layers), s.o.planOptions()); err != nil {
			return err
		}
	}
	s.starts = append(s.starts, st)
	return nil
}

// What the requests before the layers' answer with, in bytes: some, and some
// more for each layer or event.
const (
	manifestBase  = 2 << 10
	manifestLayer = 600
	traceEvent    = 6
)

// begin resolves the image.
func (st *simStart) begin() {
	st.s.h.ask(manifestBase+manifestLayer*int64(len(st.w.layers)), func() {
		for lane := range st.s.h.idle {
			st.s.h.idle[lane] += st.s.o.Ahead
		}
		st.open()
		if st.plan != nil {
			st.lookup(st.s.o.Lookup)
		}
	})
}

// lookup starts the replay after so many round trips.
func (st *simStart) lookup(trips int) {
	switch {
	case trips > 1:
		st.s.h.ask(1, func() { st.lookup(trips - 1) })
	case trips == 1:
		st.s.h.ask(traceEvent*int64(len(st.w.trace.Events)), func() { st.lookup(0) })
	default:
		st.replay()
	}
}

func (st *simStart) replay() {
	for i, b := range st.blobs {
		b.plans = append(b.plans, simPlanned{st.plan, i})
	}
	h := st.s.h
	p := &simPrefetch{h: h, plan: st.plan, blobs: st.blobs}
	h.planned = append(h.planned, p)
	h.pump()
	h.c.after(judgeEvery, p.look)
}

// open asks for the layers' indexes, and begins to read when they are here.
func (st *simStart) open() {
	arrived := func() {
		if st.waiting--; st.waiting == 0 {
			st.s.c.after(st.s.o.StartCPU/4, st.advance)
		}
	}
	st.waiting = 1
	for i, b := range st.blobs {
		n := indexSize(st.w.layers[i])
		flights, _ := b.demand(b.size-n, n, true, arrived)
		st.waiting += flights
	}
	arrived()
}

// indexSize is about what opening a layer fetches of its end: the index of a
// ZFile with blocks of 4 KiB, and the layer's own. Small blobs come whole.
func indexSize(l backstore.LayerInfo) int64 {
	const whole, base = 384 << 10, 8 << 10
	if l.Size <= whole {
		return l.Size
	}
	return min(l.Size, base+l.Decoded/1024)
}

// advance has the next read begin, if what it comes after has happened.
func (st *simStart) advance() {
	if st.planned {
		return
	}
	if st.next == len(st.w.reads) {
		if st.ended >= st.w.readyAfter {
			st.planned = true
			st.s.c.after(st.w.readyThink, st.isReady)
		}
		return
	}
	if r := &st.w.reads[st.next]; st.ended >= r.after {
		st.planned = true
		st.s.c.after(r.think, st.read)
	}
}

func (st *simStart) isReady() {
	st.over, st.ready = true, st.s.c.now
	st.s.requests, st.s.bytes = st.s.h.requests, st.s.h.bytes
}

// read begins the next read.
func (st *simStart) read() {
	s, i := st.s, st.next
	st.next, st.planned = st.next+1, false
	begun, pending, waits, late := s.c.now, 1, false, false
	arrived := func() {
		if pending--; pending > 0 {
			return
		}
		wait := s.c.now - begun
		s.waits = append(s.waits, wait)
		if late {
			s.late += wait
		}
		if waits {
			st.stall.leave(s.c.now)
			s.h.stalls(-1)
		}
		st.end(i)
	}
	slowest := backstore.FromLocal
	for _, p := range st.w.reads[i].parts {
		flights, from := st.blobs[p.layer].demand(p.off, p.n, false, arrived)
		pending += flights
		slowest = max(slowest, from)
		s.demand += p.bytes
		if from == backstore.FromPrefetch || from == backstore.FromFlight {
			s.ahead += p.bytes
		}
	}
	late = slowest == backstore.FromFlight
	if waits = pending > 1; waits {
		st.stall.enter(begun)
		s.h.stalls(1)
	}
	arrived()
	st.advance()
}

// end notes that a read has its bytes.
func (st *simStart) end(i int) {
	st.done[i] = true
	before := st.ended
	for st.ended < len(st.w.ended) && st.done[st.w.ended[st.ended]] {
		st.ended++
	}
	if st.ended > before {
		st.advance()
	}
}

func (s *simulation) result() *Simulated {
	r := &Simulated{Requests: s.requests, Bytes: s.bytes, Idle: s.h.idled, Late: s.late, Coverage: 1, Accuracy: 1}
	for _, st := range s.starts {
		r.Starts = append(r.Starts, st.ready)
		r.Ready = max(r.Ready, st.ready)
		r.Stall += st.stall.total / time.Duration(len(s.starts))
	}
	if s.demand > 0 {
		r.Coverage = float64(s.ahead) / float64(s.demand)
	}
	if len(s.waits) > 0 {
		slices.Sort(s.waits)
		r.WaitP95 = s.waits[(len(s.waits)*95+99)/100-1]
	}
	for _, b := range s.blobs {
		r.Sent += b.backRequests
		r.Fetched += b.backed
	}
	if r.Fetched > 0 {
		r.Accuracy = min(1, float64(s.used())/float64(r.Fetched))
	}
	return r
}

// used is how many of the bytes that were prefetched have been read.
func (s *simulation) used() (n int64) {
	touched := map[*simBlob]*tracefmt.Touched{}
	for _, st := range s.starts {
		for _, r := range st.w.reads {
			for _, p := range r.parts {
				b := st.blobs[p.layer]
				if touched[b] == nil {
					touched[b] = &tracefmt.Touched{}
				}
				for _, e := range touched[b].Add(nil, tracefmt.Event{Off: p.off, Len: p.n}) {
					n += b.aheadOf(e.Off, e.Len)
				}
			}
		}
	}
	return n
}

// aheadOf is how many bytes of [off, off+n) a prefetch has brought.
func (b *simBlob) aheadOf(off, n int64) (sum int64) {
	for end := off + n; off < end; {
		next := min((off/b.chunk+1)*b.chunk, end)
		if b.ahead.has(off / b.chunk) {
			sum += next - off
		}
		off = next
	}
	return sum
}

// LowerBound is the earliest time at which the last of the workloads can be
// ready on the link, whatever fetches their bytes: each read ends no earlier
// than it begins, and no earlier than all bytes that have been read by its end
// can have arrived, at the link's rate from the end of the serial round trips
// on. Computing before the first read and between reads comes on top of the
// round trips, not of the bytes. With several workloads none can be ready before
// it would be alone, nor the last before the bytes of all have arrived.
func LowerBound(ws []*Workload, options *SimOptions) (time.Duration, error) {
	o, err := options.fill()
	if err != nil {
		return 0, fmt.Errorf("lower bound: %w", err)
	}
	var last time.Duration
	all := newDistinct()
	for i, w := range ws {
		last = max(last, w.lowerBound(o))
		for _, k := range w.ended[:w.readyAfter] {
			all.add(w, i, &w.reads[k])
		}
	}
	return max(last, o.firstBytes()+o.Link.wireTime(all.bytes)), nil
}

// firstBytes is when bytes of layers can begin to arrive.
func (o *SimOptions) firstBytes() time.Duration { return time.Duration(o.RoundTrips) * o.Link.Delay }

func (w *Workload) lowerBound(o SimOptions) time.Duration {
	begun := make([]time.Duration, len(w.reads))
	last := o.firstBytes() + o.StartCPU // begin of the read before, and end of all that have ended
	ended, need := 0, newDistinct()
	upTo := func(k int) {
		for ; ended < k; ended++ {
			i := w.ended[ended]
			need.add(w, 0, &w.reads[i])
			last = max(last, begun[i], o.firstBytes()+o.Link.wireTime(need.bytes))
		}
	}
	for i, r := range w.reads {
		upTo(r.after)
		last += r.think
		begun[i] = last
	}
	upTo(w.readyAfter)
	return last + w.readyThink
}

// distinct counts the bytes of blobs that reads touch.
type distinct struct {
	touched map[digest.Digest]*tracefmt.Touched
	bytes   int64
}

func newDistinct() *distinct { return &distinct{touched: map[digest.Digest]*tracefmt.Touched{}} }

func (d *distinct) add(w *Workload, number int, r *simRead) {
	for _, p := range r.parts {
		key := w.layers[p.layer].Digest
		if key == "" {
			key = digest.Digest(fmt.Sprintf("%d:%d", number, p.layer))
		}
		if d.touched[key] == nil {
			d.touched[key] = &tracefmt.Touched{}
		}
		for _, e := range d.touched[key].Add(nil, tracefmt.Event{Off: p.off, Len: p.n}) {
			d.bytes += e.Len
		}
	}
}
