package replayer

import (
	"cmp"
	"math"
	"sort"
	"time"

	"github.com/reprise-project/reprise/backstore"
)

const (
	// DefaultRequests is how many requests a replay should get by with: some
	// registries allow 1,000 reads a minute. Fewer cost time on a slow link: a start
	// of a Python stack at 10 ms and 200 Mbit/s, as simulated, takes 1.17 times the
	// lower bound with the 450 requests that the link makes worth while, and 1.32
	// times with the 290 that keep to 256.
	DefaultRequests = 512

	// At the beginning, when the first bytes matter most, a piece is no longer
	// than all before it, or than this part of the longest on the link.
	firstPiece = 16

	// minAccuracy is the share of the planned bytes that has to be what the
	// trace asks for: gaps that would make it less are not fetched.
	minAccuracy = 0.75
)

// What is assumed of a link and a registry: how many requests are under way at
// once, what one costs both sides in time whatever the link, and its headers.
// Where the whole plan takes only some round trips of the link, bytes hardly cost
// time, and a request counts as if fewer were under way: at 30 ms and 1 Gbit/s the
// starts of three images, as simulated with 12 instead of 32, take the same time
// within 1.3 % in a seventh to a quarter fewer requests. Elsewhere bytes are what
// takes time: at 10 ms and 200 Mbit/s they take 1.16, 1.21 and 1.12 times the lower
// bound with 32, and 1.32, 1.27 and 1.16 with 12.
const (
	guessRTT       = 20 * time.Millisecond
	guessBandwidth = 25 << 20 // bytes a second
	parallel       = 32
	fewParallel    = 4
	someTrips      = 20
	requestTime    = 150 * time.Microsecond
	requestBytes   = 1 << 10
	soon           = 2 << 20 // bytes that come about together at the least
	throttledCost  = 1 << 20 // of a request where the host has had too many
)

// terms are what ranges are joined by.
type terms struct {
	gap  int64 // bytes between two ranges that may be fetched along
	cost int64 // of a request, in bytes
	near int64 // bytes of the plan whose order does not matter: they are under way together
	late int64 // a byte that comes too early costs 1/late
}

// cost is what a request costs on a link, in bytes that the link could have
// brought instead, for a plan of so many bytes. With as many under way as parallel
// says each takes its part of a round trip; the rest is work that does not depend on
// the distance.
func cost(e backstore.Estimate, plan int64) (cost, window int64) {
	rtt, bw := cmp.Or(e.RTT, guessRTT).Seconds(), float64(cmp.Or(e.Bandwidth, guessBandwidth))
	under := float64(parallel)
	if float64(plan) < someTrips*rtt*bw {
		under = fewParallel
	}
	bytes := requestBytes + bw*(rtt/under+requestTime.Seconds())
	return int64(min(bytes, math.MaxInt32)), int64(min(bw*rtt*3/2, math.MaxInt32))
}

// terms decides by what is known now. p.mu is held.
func (p *Plan) terms(e backstore.Estimate) terms {
	c, window := cost(e, p.Bytes)
	t := terms{gap: min(c, p.cap), cost: c, near: max(window, soon), late: 2}
	if p.o.Requests > 0 && p.o.Gap == 0 {
		if gap, tight := p.budgetGap(); tight {
			t.gap, t.late = max(t.gap, min(gap, p.cap)), 4
		}
	}
	if e.Throttled { // each request may be the last for a minute
		t.gap, t.cost = p.cap, max(t.cost, throttledCost)
	}
	if p.o.Gap != 0 {
		t.gap = max(0, p.o.Gap)
	}
	if p.o.Horizon > 0 {
		t.near, t.cost = p.o.Horizon, 0
	}
	return t
}

// budgetGap is the gap with which the rest of the plan would fit into the
// requests that are left, and whether it needs one for that. p.mu is held.
func (p *Plan) budgetGap() (gap int64, tight bool) {
	// Of the ranges that longer gaps separate, so many are left. Some end at
	// the longest piece, or where the order parts them: half as many again.
	rest := func(joined int) float64 {
		return 1.5 * float64(p.runs-joined) * float64(p.left) / float64(max(p.Bytes, 1))
	}
	have := float64(p.o.Requests - p.pieces)
	if rest(0) <= have {
		return 0, false
	}
	i := sort.Search(len(p.gaps), func(i int) bool { return rest(i+1) <= have })
	if i == len(p.gaps) {
		return p.cap, true
	}
	return p.gaps[i], true
}

// affordable is the largest of the gaps, ascending, that can be fetched along
// with all smaller ones before less than minAccuracy is of use.
func affordable(gaps []int64, need, bytes int64) (gap int64) {
	limit := int64(float64(need) / minAccuracy)
	for _, g := range gaps {
		if g > limit-bytes {
			break
		}
		bytes, gap = bytes+g, g
	}
	return gap
}

// What gaps cost and save: requests and accuracy, which is the share of the
// fetched bytes in compressed blocks that the trace asks for, of the traces of
// three images of Debian and npm packages together (a JVM, 3,000 modules of
// Node.js, Python with numpy, scipy and pandas; lz4 blocks of 4 KiB, chunks of
// 512 B), as TestGapTable prints them. They ask for 71.5 MB; pieces of 256 KiB
// would be 663 requests, 41.9 % of use. In any order and of any length, 428
// requests would be the least with 75 %.
//
//	gap      any order     10ms,200mbit  30ms,1gbit    2ms,2gbit
//	0        2264  98.0 %  2347  98.0 %  2255  98.0 %  2270  98.0 %
//	16 KiB    901  90.3 %  1104  91.6 %   888  90.3 %   910  90.3 %
//	32 KiB    654  84.0 %   947  87.5 %   634  83.9 %   666  84.1 %
//	64 KiB    466  75.6 %   819  81.4 %   427  75.3 %   507  77.3 %
//	128 KiB   352  67.4 %   743  75.3 %   305  66.8 %   441  72.5 %
//	192 KiB   316  63.1 %   709  71.1 %   254  62.0 %   411  68.7 %
//	256 KiB   303  60.3 %   696  68.8 %   227  58.9 %   396  66.4 %
//	by link   795  88.0 %  1056  91.9 %   436  75.1 %   527  78.5 %
//
// On a short and slow link a request costs 13 KiB and each byte more delays the
// start; on a long and fast one, or of a small plan, it costs much more, and all that
// accuracy allows is joined. Without gaps, what is not of use are the ends of chunks: with chunks of
// 4 KiB 95 % were.
//
// Recorded with a read-ahead of 128 KiB instead of 16 the same starts ask for
// 96.1 MB in 680 pieces of 256 KiB, and on the long and fast link 225 requests, a
// third, have 75.9 %: what is between two reads is then part of the trace.

// Next returns what is to be fetched next: the first range that nobody has
// fetched, joined with its neighbours in the blob where that is cheaper than
// another request. In bytes,
//
//	a request costs   bandwidth × (round trip / 32 + 150 µs) + 1 KiB; / 4 where
//	                  the plan takes less than 20 round trips
//	a gap costs       what it is long
//	a later range     half of what it is long, since so much is what all
//	                  between wait for it; nothing if it would be under way
//	                  at the same time anyway
//
// with the link as it is measured by then. Gaps end where less than 75 % of
// the plan's bytes would be of use. When there are more ranges than
// [Options].Requests allows for, longer gaps are joined, up to there, and a
// later range costs a quarter. Where the host has answered 429 of late a request
// costs a megabyte at least.
func (p *Plan) Next(e backstore.Estimate) (backstore.Want, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = p.held || p.untried()
	if p.held || !p.advance() {
		p.broke = p.held
		return backstore.Want{}, false
	}
	a := &p.atoms[p.next]
	longest := e.Piece()
	limit := min(max(p.given, longest/firstPiece), longest)
	p.pieces++
	w := p.take(a, p.terms(e), limit, true)
	p.given += w.Len
	return w, true
}

// advance moves next to the first atom that is to be fetched, and tells whether
// there is one. p.mu is held.
func (p *Plan) advance() bool {
	for p.next < len(p.atoms) && p.atoms[p.next].piece != 0 {
		p.next++
	}
	return p.next < len(p.atoms)
}

// take takes an atom and what is joined with it. p.mu is held.
func (p *Plan) take(a *atom, t terms, limit int64, backwards bool) backstore.Want {
	p.tag(a)
	l := p.layers[a.layer]
	off, end := a.off, a.end
	for i := int(a.at) + 1; i < len(l) && !l[i-1].cut; i++ {
		b := l[i]
		if b.piece != 0 || b.end-off > limit || !p.joins(t, b.off-end, b, t.late) {
			break
		}
		p.tag(b)
		end = b.end
	}
	for i := int(a.at) - 1; backwards && i >= 0; i-- {
		b := l[i]
		// What is before it delays the head itself.
		if b.piece != 0 || b.cut || end-b.off > limit || !p.joins(t, off-b.end, b, t.late/2) {
			break
		}
		p.tag(b)
		off = b.off
	}
	return backstore.Want{Layer: int(a.layer), Off: off, Len: end - off}
}

// tag marks an atom as taken. p.mu is held.
func (p *Plan) tag(a *atom) {
	a.piece = int32(max(p.pieces, 1))
	p.left -= a.end - a.off
}

// joins tells whether b, a gap away, is to be fetched along, where a byte that
// comes too early costs 1/late. p.mu is held.
func (p *Plan) joins(t terms, gap int64, b *atom, late int64) bool {
	if gap > t.gap {
		return false
	}
	ahead := b.before
	if p.next < len(p.atoms) {
		ahead -= p.atoms[p.next].before
	}
	return ahead <= t.near || gap+(b.end-b.off)/late <= t.cost
}

// Around returns what a demand miss of w is to fetch: what the plan has of it,
// joined with what follows as [Plan.Next] does it, or w if the plan has nothing
// or demand is mostly elsewhere, where misses had better be read ahead of as they
// are without a plan. What it returns is not returned by Next any more.
func (p *Plan) Around(w backstore.Want, e backstore.Estimate) backstore.Want {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w.Layer < 0 || w.Layer >= len(p.layers) || w.Len <= 0 {
		return w
	}
	l, end := p.layers[w.Layer], w.Off+w.Len
	i := sort.Search(len(l), func(i int) bool { return l[i].end > w.Off })
	if i == len(l) || l[i].off >= end {
		p.seen.outside(w.Len)
		return w
	}
	last := i // that w touches
	for last+1 < len(l) && l[last+1].off < end {
		last++
	}
	p.advance()
	p.meet(l[i:last+1], w)
	if p.doubtful() { // more than w may come or not: what is not of it stays in the plan
		for _, a := range l[i : last+1] {
			if a.end <= end {
				p.cut(a, w)
			}
		}
		p.advance()
		return w
	}
	if a := l[last]; a.piece == 0 {
		p.pieces++
		end = max(end, p.pull(a, w, e))
	} else {
		end = max(end, p.rest(a, w))
	}
	for _, a := range l[i:last] {
		p.cut(a, w)
	}
	p.advance()
	w.Len = end - w.Off
	return w
}

// pull takes an atom for a miss that touches it, and returns how far to fetch.
// What of the atom is before the miss stays in the plan. p.mu is held.
func (p *Plan) pull(a *atom, w backstore.Want, e backstore.Estimate) int64 {
	got := p.take(a, p.terms(e), maxAtom, false)
	p.keepHead(a, w)
	return got.Off + got.Len
}

// cut takes an atom that a miss fetches the end of. p.mu is held.
func (p *Plan) cut(a *atom, w backstore.Want) {
	if a.piece == 0 {
		p.tag(a)
		p.keepHead(a, w)
	}
}

// keepHead gives back what of a taken atom is before w. p.mu is held.
func (p *Plan) keepHead(a *atom, w backstore.Want) {
	if a.off < w.Off {
		a.end, a.piece, a.cut = w.Off, 0, true
		p.left += a.end - a.off
		p.next = min(p.next, int(a.turn))
	}
}

// rest is the end of the piece of a taken atom, which waits to be sent: it is
// the miss's now. p.mu is held.
func (p *Plan) rest(a *atom, w backstore.Want) int64 {
	l, end := p.layers[a.layer], a.end
	for _, b := range l[a.at+1:] {
		if b.piece != a.piece || b.end-w.Off > maxAtom {
			break
		}
		end = b.end
	}
	return end
}

// drop takes what here says is on the node already, and returns its bytes.
func (p *Plan) drop(here func(backstore.Want) bool) (n int64) {
	present := make([]bool, len(p.Wants))
	for i, w := range p.Wants {
		present[i] = here(w)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.atoms {
		if a := &p.atoms[i]; a.piece == 0 && present[i] {
			n += a.end - a.off
			p.tag(a)
		}
	}
	return n
}

// again puts back what was taken and is not on the node, and tells whether there
// is something. A demand miss takes a piece of the plan, and its fetch may be cut
// short: by what is under way in the middle of that, or by a reader who reads
// elsewhere. It is put back once; never what was left to demand on purpose.
func (p *Plan) again(here func(backstore.Want) bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.renewed || p.skipped > 0 {
		return false
	}
	p.renewed = true
	for i := range p.atoms {
		a := &p.atoms[i]
		w := p.Wants[i]
		if a.piece == 0 || here(w) {
			continue
		}
		a.off, a.end, a.piece, a.cut = w.Off, w.Off+w.Len, 0, false
		p.left += w.Len
		p.next = min(p.next, i)
	}
	return p.left > 0
}
