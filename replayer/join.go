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
	// registries allow 1,000 reads a minute, and a node has more to start. Fewer
	// cost time on a slow link: the demo's start at 10 ms and 200 Mbit/s, as
	// simulated, takes 1.18 times the lower bound with the 175 that a replay has
	// there without a limit, and 1.29 with 128.
	DefaultRequests = 256

	// At the beginning, when the first bytes matter most, a piece is no longer
	// than all before it, or than this part of the longest on the link.
	firstPiece = 16

	// minAccuracy is the share of the planned bytes that has to be what the
	// trace asks for: gaps that would make it less are not fetched.
	minAccuracy = 0.75
)

// What is assumed of a link and a registry: how many requests are under way at
// once, what one costs both sides in time whatever the link, and its headers.
const (
	guessRTT       = 20 * time.Millisecond
	guessBandwidth = 25 << 20 // bytes a second
	parallel       = 12
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
// brought instead. With as many under way as parallel says each takes its part
// of a round trip; the rest is work that does not depend on the distance.
func cost(e backstore.Estimate) (cost, window int64) {
	rtt, bw := cmp.Or(e.RTT, guessRTT).Seconds(), float64(cmp.Or(e.Bandwidth, guessBandwidth))
	bytes := requestBytes + bw*(rtt/parallel+requestTime.Seconds())
	return int64(min(bytes, math.MaxInt32)), int64(min(bw*rtt*3/2, math.MaxInt32))
}

// terms decides by what is known now. p.mu is held.
func (p *Plan) terms(e backstore.Estimate) terms {
	c, window := cost(e)
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
// 512 B), as TestGapTable prints them. They ask for 96.1 MB; pieces of 256 KiB
// would be 680 requests, 55.0 % of use. In any order and of any length, 204
// requests would be the least with 75 %.
//
//	gap      any order     10ms,200mbit  30ms,1gbit    2ms,2gbit
//	0        1531  98.9 %  1698  98.9 %  1517  98.9 %  1558  98.9 %
//	16 KiB    646  95.5 %   855  95.7 %   620  95.5 %   684  95.5 %
//	32 KiB    509  92.4 %   748  93.3 %   478  92.3 %   548  92.5 %
//	64 KiB    405  87.9 %   677  90.4 %   350  87.4 %   452  88.4 %
//	128 KiB   338  82.4 %   623  86.3 %   271  81.5 %   403  84.5 %
//	192 KiB   315  79.5 %   606  84.1 %   240  78.3 %   386  82.2 %
//	256 KiB   297  75.8 %   593  81.8 %   216  74.4 %   373  79.9 %
//	by link   440  89.7 %   649  92.5 %   225  75.9 %   402  87.0 %
//
// On a short and slow link a request costs 25 KiB and each byte more delays the
// start; on a long and fast one it costs 324 KiB, and all that accuracy allows
// is joined, which takes a third of the requests of 256 KiB pieces. There the
// simulated starts are as fast, within 1 %, as with a cap at 78 % and 235
// requests, or with a quarter of the cost. Without gaps, what is not of use are
// the ends of chunks: with chunks of 4 KiB 95 % are.

// Next returns what is to be fetched next: the first range that nobody has
// fetched, joined with its neighbours in the blob where that is cheaper than
// another request. In bytes,
//
//	a request costs   bandwidth × (round trip / 12 + 150 µs) + 1 KiB
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
