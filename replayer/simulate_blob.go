package replayer

import (
	"slices"
	"time"

	"github.com/reprise-project/reprise/backstore"
)

// simBlob is the model of a blob: what of it is here, and under way.
type simBlob struct {
	h                    *simHost
	size, chunk          int64
	present, ahead       simSet
	touched              simSet // by demand
	flights              []*simFlight
	runs                 simRuns
	plans                []simPlanned
	missed               time.Duration // when demand missed last; negative never
	backRequests, backed int64
	arrived, used        int64 // of the prefetched bytes, in whole chunks
}

// simPlanned is a blob's part in a prefetch.
type simPlanned struct {
	plan  *Plan
	layer int
}

func newSimBlob(h *simHost, size int64) *simBlob {
	b := &simBlob{h: h, size: size, chunk: h.o.Chunk, missed: -time.Hour}
	n := b.chunks(size)
	b.present, b.ahead, b.touched = newSimSet(n), newSimSet(n), newSimSet(n)
	return b
}

// chunks is the first chunk at or behind off.
func (b *simBlob) chunks(off int64) int64 { return (off + b.chunk - 1) / b.chunk }

// simFlight is bytes [off, end) on their way.
type simFlight struct {
	b        *simBlob
	s        *simStream
	off, end int64
	pos      int64 // readable up to here
	read     int64
	lane     backstore.Lane
	wanted   int
	hurry    bool // it is waited for since it last gave way
	asking   bool // the request is under way
	weighs   bool // counted by simHost.demands
	waits    []simWait
}

type simWait struct {
	need int64
	then func()
}

// want calls then once the flight has passed need.
func (f *simFlight) want(need int64, then func()) {
	f.waits = append(f.waits, simWait{need, then})
	if f.wanted++; f.wanted > 1 {
		return
	}
	f.weigh()
	f.hurry = true
	if f.s.paused {
		f.hurry = false
		f.b.h.c.after(0, f.s.resume)
	}
}

// hurried tells, once, that somebody has begun to wait for the flight.
func (f *simFlight) hurried() bool {
	yes := f.hurry
	f.hurry = false
	return yes
}

// weigh tells the host whether somebody waits for the bytes.
func (f *simFlight) weigh() {
	if w := f.asking && f.wanted > 0; w != f.weighs {
		f.weighs = w
		by := -1
		if w {
			by = 1
		}
		f.b.h.demands(f.lane, by)
	}
}

// start sends a request for [off, end), for a reader that waits up to need if
// that is not 0.
func (b *simBlob) start(off, end int64, lane backstore.Lane, need int64, then func()) *simFlight {
	f := &simFlight{b: b, off: off, end: end, pos: off, read: off, lane: lane}
	f.s = &simStream{h: b.h, lane: lane, f: f, left: end - off, unread: end - off}
	b.flights = append(b.flights, f)
	if b.h.sent != nil {
		b.h.sent(f)
	}
	if lane == backstore.Background {
		b.h.back += end - off
		b.h.under++
		b.backRequests++
		b.backed += end - off
	}
	if need > 0 {
		f.want(need, then)
	}
	b.h.start(f.s)
	return f
}

// got makes what was read readable, in whole chunks.
func (f *simFlight) got(n int64) {
	b := f.b
	f.read += n
	pos := f.read
	if pos < b.size {
		pos = pos / b.chunk * b.chunk
	}
	if pos <= f.pos {
		return
	}
	from, to := f.pos/b.chunk, b.chunks(pos)
	b.present.add(from, to)
	if f.lane == backstore.Background {
		b.ahead.add(from, to)
		b.arrived += (to - from) * b.chunk
		b.used += b.touched.count(from, to) * b.chunk
	}
	f.pos = pos
	f.waits = slices.DeleteFunc(f.waits, func(w simWait) bool {
		if w.need > pos {
			return false
		}
		f.wanted--
		b.h.c.after(0, w.then)
		return true
	})
	f.weigh()
}

func (f *simFlight) ended() {
	f.asking = false
	f.weigh()
	f.b.flights = slices.DeleteFunc(f.b.flights, func(g *simFlight) bool { return g == f })
}

// touch notes the demand for chunks.
func (b *simBlob) touch(from, to int64) {
	for c := from; c < to; c++ {
		if !b.touched.has(c) {
			b.touched.add(c, c+1)
			if b.ahead.has(c) {
				b.used += b.chunk
			}
		}
	}
}

func (b *simBlob) flightAt(off int64) *simFlight {
	for _, f := range b.flights {
		if f.off <= off && off < f.end {
			return f
		}
	}
	return nil
}

// clip cuts [off, end) where chunks are here or under way, and at the end.
func (b *simBlob) clip(off, end int64) int64 {
	end = b.present.next(off/b.chunk, b.chunks(min(end, b.size)), true) * b.chunk
	for _, f := range b.flights {
		if off < f.off {
			end = min(end, f.off)
		}
	}
	return min(end, b.size)
}

// demand makes sure that [off, off+n) is under way, and calls then for each
// flight that is waited for; it returns how many, and where the bytes are from.
// Exact fetches nothing beside.
func (b *simBlob) demand(off, n int64, exact bool, then func()) (flights int, from backstore.Origin) {
	at, to := off/b.chunk, b.chunks(off+n)
	if !exact {
		b.touch(at, to)
	}
	if b.present.next(at, to, false) == to {
		if b.ahead.next(at, to, true) < to {
			return 0, backstore.FromPrefetch
		}
		return 0, backstore.FromCache
	}
	from = backstore.FromFlight
	for {
		if at = b.present.next(at, to, false); at >= to {
			return flights, from
		}
		b.missed = b.h.c.now
		pos, need := at*b.chunk, min(to*b.chunk, b.size)
		f := b.flightAt(pos)
		if f != nil {
			need = min(f.end, need)
			f.want(need, then)
		} else {
			end := need
			if !exact {
				end = b.missEnd(pos, need)
			}
			end = b.clip(pos, end)
			need = min(end, need)
			f = b.start(pos, end, backstore.Demand, need, then)
		}
		if f.lane == backstore.Demand {
			from = backstore.FromFetch
		}
		flights++
		at = b.chunks(need)
	}
}

// missEnd is where the fetch of a miss that needs [off, need) ends.
func (b *simBlob) missEnd(off, need int64) int64 {
	end := max(need, off+b.runs.next(off, need, b.h.runLength()))
	planned := int64(0)
	for _, p := range b.plans {
		w := backstore.Want{Layer: p.layer, Off: off, Len: need - off}
		if around := p.plan.Around(w, b.h.estimate()); around != w {
			planned = max(planned, min(around.Off+around.Len, off+simMaxPulled))
		}
	}
	if planned > 0 {
		return max(need, planned)
	}
	return end
}

// missing is the first piece of [off, end) that is neither here nor under way.
func (b *simBlob) missing(off, end int64) (from, to int64, ok bool) {
	at, stop := off/b.chunk, min(b.chunks(end), b.chunks(b.size))
	for at < stop {
		if at = b.present.next(at, stop, false); at >= stop {
			break
		}
		f := b.flightAt(at * b.chunk)
		if f == nil {
			piece := b.h.piece()
			limit := min(stop, at+piece/b.chunk)
			if stop-limit < piece/2/b.chunk {
				limit = stop // rather than a short piece
			}
			return at * b.chunk, b.clip(at*b.chunk, limit*b.chunk), true
		}
		at = b.chunks(f.end)
	}
	return 0, 0, false
}

// simRuns recognises forward readers as the backstore's readahead does.
type simRuns struct {
	recent [8]struct{ end, length int64 }
	turn   int
}

const simMaxStream = 2 << 20

func (r *simRuns) next(off, need, base int64) int64 {
	for i := range r.recent {
		p := &r.recent[i]
		if p.length > 0 && off >= p.end && off-p.end <= base/4 {
			p.length = min(2*p.length, simMaxStream)
			p.end = max(off+p.length, need)
			return p.length
		}
	}
	p := &r.recent[r.turn]
	p.end, p.length = max(off+base, need), base
	r.turn = (r.turn + 1) % len(r.recent)
	return base
}

// simPrefetch is one replay.
type simPrefetch struct {
	h     *simHost
	plan  *Plan
	blobs []*simBlob
	want  backstore.Want // what is left of the last
	turn  float64
	under []*simFlight
	judge judge
	over  bool
}

// piece starts the next piece, and tells whether there was one and a place for
// it.
func (p *simPrefetch) piece() bool {
	p.under = slices.DeleteFunc(p.under, func(f *simFlight) bool { return f.read == f.end })
	if len(p.under) >= p.h.o.Pieces {
		return false
	}
	b, from, to := p.next()
	if b == nil {
		return false
	}
	end := p.want.Off + p.want.Len
	p.want.Off, p.want.Len = to, end-to
	p.takeTurn(to - from)
	p.under = append(p.under, b.start(from, to, backstore.Background, 0, nil))
	return true
}

// next is the range to ask for next, no blob if there is none.
func (p *simPrefetch) next() (b *simBlob, from, to int64) {
	for !p.over {
		if p.want.Len <= 0 {
			w, ok := p.plan.Next(p.h.estimate())
			if !ok {
				p.over = !p.plan.wasHeld()
				break
			}
			p.want = w
		}
		b = p.blobs[p.want.Layer]
		from, to, ok := b.missing(p.want.Off, p.want.Off+p.want.Len)
		if ok {
			return b, from, to
		}
		p.want.Len = 0
	}
	return nil, 0, 0
}

// takeTurn accounts for n bytes; those whose readers have waited of late have
// more turns.
func (p *simPrefetch) takeTurn(n int64) {
	weight := 1.0
	if slices.ContainsFunc(p.blobs, func(b *simBlob) bool { return b.missed >= p.h.c.now-simRecently }) {
		weight = 4
	}
	p.turn = max(p.turn, p.h.turn)
	p.h.turn = p.turn
	p.turn += float64(n) / weight
}

// look is the judge's, every so often until the replay is over.
func (p *simPrefetch) look() {
	if p.over {
		return
	}
	var used, arrived int64
	for _, b := range p.blobs {
		used, arrived = used+b.used, arrived+b.arrived
	}
	switch p.plan.judge(&p.judge, used, arrived) {
	case endWrong, endLate:
		p.over = true
		return
	}
	p.h.pump()
	p.h.c.after(judgeEvery, p.look)
}

// simStall measures the time during which at least one read waits.
type simStall struct {
	n     int
	since time.Duration
	total time.Duration
}

func (s *simStall) enter(now time.Duration) {
	if s.n++; s.n == 1 {
		s.since = now
	}
}

func (s *simStall) leave(now time.Duration) {
	if s.n--; s.n == 0 {
		s.total += now - s.since
	}
}
