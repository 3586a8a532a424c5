// Package replayer turns a recorded trace into a plan, the ranges of an
// image's blobs in the order in which a start first needs them, and replays
// the plan: it has the backstore bring those ranges onto the node ahead of
// demand, watches whether that helps, and stops when it does not.
//
// [Replay] drives one image and returns when it is done, so that its caller
// decides what else runs beside it.
package replayer

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

const (
	// DefaultGap is how many bytes that a trace does not ask for are fetched
	// rather than sending another request. The demo's trace until ready, one
	// run each (what had not arrived by then is not in it):
	//
	//	gap      requests   bytes      of them read
	//	0        254        18.6 MiB   100 %
	//	16 KiB   159        20.3 MiB   99.1 %
	//	32 KiB   133        20.3 MiB   96.6 %
	//	64 KiB   117        19.6 MiB   93.5 %
	//	128 KiB   97        23.0 MiB   87.1 %
	//	256 KiB   94        25.3 MiB   77.8 %
	DefaultGap = 64 << 10
	// DefaultHorizon bounds how far ahead, in bytes of the plan, a range may
	// be pulled to be joined with an earlier one.
	DefaultHorizon = 8 << 20
)

// Options are the settings of [NewPlan].
type Options struct {
	// Gap in bytes joins neighbours whose distance is at most that. 0 means
	// [DefaultGap], negative none but ranges that touch.
	Gap int64
	// Horizon in bytes, 0 means [DefaultHorizon].
	Horizon int64
}

// An Image is what a plan has to know of an open image; [*backstore.Image] is
// one.
type Image interface {
	Layers() []backstore.LayerInfo
	BlobRange(layer int, off, n int64) (blobOff, blobLen int64)
}

// A Plan is what a replay fetches, first demand first. It is a
// [backstore.Plan], to be used once.
type Plan struct {
	Wants []backstore.Want
	Need  int64 // bytes of blobs that the trace asks for
	Bytes int64 // with the gaps that are fetched along

	TraceBytes int64 // bytes of layer space that the trace touches
	Matched    int64 // of these, in layers that the image has
	Missing    int   // layers of the trace that the image does not have

	mu   sync.Mutex // guards next
	next int        // of Wants
}

// Next returns the next of the plan's ranges.
func (p *Plan) Next(backstore.Estimate) (backstore.Want, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.next == len(p.Wants) {
		return backstore.Want{}, false
	}
	p.next++
	return p.Wants[p.next-1], true
}

// Around extends a demand miss to the end of the range of the plan that it is
// in.
func (p *Plan) Around(w backstore.Want, _ backstore.Estimate) backstore.Want {
	for _, q := range p.Wants {
		if q.Layer == w.Layer && q.Off <= w.Off && w.Off < q.Off+q.Len {
			w.Len = max(w.Len, q.Off+q.Len-w.Off)
		}
	}
	return w
}

// Coverage is the share of the trace that applies to the image.
func (p *Plan) Coverage() float64 {
	if p.TraceBytes == 0 {
		return 0
	}
	return float64(p.Matched) / float64(p.TraceBytes)
}

// ErrNoMatch is a trace that has nothing in common with the image.
var ErrNoMatch = errors.New("the trace shares no layer with the image")

// NewPlan plans the replay of t on im. Events beyond the image's layers are
// left out and counted.
func NewPlan(t *tracefmt.Trace, im Image, o *Options) (*Plan, error) {
	if t.Space == tracefmt.DeviceSpace {
		return nil, errors.New("plan: the trace is in device space, and has to be mapped to layers first")
	}
	var opts Options
	if o != nil {
		opts = *o
	}
	opts.Gap = max(0, cmp.Or(opts.Gap, DefaultGap))
	opts.Horizon = cmp.Or(opts.Horizon, DefaultHorizon)
	layers := im.Layers()
	place, missing := match(t, layers)
	p := &Plan{Missing: missing}
	b := builder{o: opts, layers: make([][]*piece, len(layers))}
	var seen tracefmt.Touched
	for _, e := range t.FirstTouch() {
		p.TraceBytes += e.Len
		i := place(e.Layer)
		if i < 0 || e.Off >= layers[i].Decoded {
			continue
		}
		n := min(e.Len, layers[i].Decoded-e.Off)
		p.Matched += n
		off, n := im.BlobRange(i, e.Off, n)
		for _, part := range seen.Add(nil, tracefmt.Event{Layer: i, Off: off, Len: n}) {
			p.Need += part.Len
			b.add(i, part.Off, part.Off+part.Len)
		}
	}
	if p.Matched == 0 && p.TraceBytes > 0 {
		return nil, fmt.Errorf("plan: %w", ErrNoMatch)
	}
	p.Wants, p.Bytes = b.wants()
	return p, nil
}

// match maps the trace's layer numbers to the image's: by digest, or by
// position where the trace does not know digests.
func match(t *tracefmt.Trace, layers []backstore.LayerInfo) (place func(int) int, missing int) {
	byDigest := map[digest.Digest]int{}
	for i, l := range layers {
		if l.Digest != "" {
			byDigest[l.Digest] = i
		}
	}
	to := make([]int, len(t.Layers))
	for i, l := range t.Layers {
		to[i] = -1
		if j, ok := byDigest[l.Digest]; ok && l.Digest != "" {
			to[i] = j
		} else if l.Digest == "" && i < len(layers) && (l.Decoded == 0 || l.Decoded == layers[i].Decoded) {
			to[i] = i
		}
		if to[i] < 0 {
			missing++
		}
	}
	return func(i int) int {
		switch {
		case i < len(to):
			return to[i]
		case len(to) == 0 && i < len(layers):
			return i
		}
		return -1
	}, missing
}

// piece is a range of the plan while it is made.
type piece struct {
	layer    int
	off, end int64
	turn     int   // order of first demand
	before   int64 // bytes of the plan before it was begun
}

// builder joins ranges that come in order of demand.
type builder struct {
	o      Options
	layers [][]*piece // of each layer, by offset, not overlapping
	turns  int
	bytes  int64
}

// add takes the range [off, end), which overlaps none before it.
func (b *builder) add(layer int, off, end int64) {
	ps := b.layers[layer]
	at, _ := slices.BinarySearchFunc(ps, off, func(p *piece, off int64) int { return cmp.Compare(p.off, off) })
	if at < len(ps) && off < ps[at].off && end > ps[at].off {
		end = ps[at].off // gaps that were joined are covered already
	}
	if at > 0 && off < ps[at-1].end {
		off = ps[at-1].end
	}
	if off >= end {
		return
	}
	if at > 0 && b.joins(ps[at-1], off-ps[at-1].end) {
		p := ps[at-1]
		b.bytes += end - p.end
		p.end = end
		b.joinNext(layer, at-1)
		return
	}
	if at < len(ps) && b.joins(ps[at], ps[at].off-end) {
		b.bytes += ps[at].off - off
		ps[at].off = off
		return
	}
	b.layers[layer] = slices.Insert(ps, at, &piece{layer: layer, off: off, end: end, turn: b.turns, before: b.bytes})
	b.turns++
	b.bytes += end - off
}

// joins tells whether a range that is demanded now may be fetched with p, gap
// bytes away.
func (b *builder) joins(p *piece, gap int64) bool {
	return gap <= b.o.Gap && b.bytes-p.before <= b.o.Horizon
}

// joinNext joins the piece at i with its successor where they have come near.
func (b *builder) joinNext(layer, i int) {
	ps := b.layers[layer]
	if i+1 == len(ps) {
		return
	}
	p, q := ps[i], ps[i+1]
	first, second := p, q
	if q.turn < p.turn {
		first, second = q, p
	}
	gap := q.off - p.end
	if gap > b.o.Gap || second.before-first.before > b.o.Horizon {
		return
	}
	b.bytes += gap
	p.end, p.turn, p.before = q.end, first.turn, first.before
	b.layers[layer] = slices.Delete(ps, i+1, i+2)
}

func (b *builder) wants() ([]backstore.Want, int64) {
	var all []*piece
	for _, ps := range b.layers {
		all = append(all, ps...)
	}
	slices.SortFunc(all, func(p, q *piece) int { return cmp.Compare(p.turn, q.turn) })
	wants := make([]backstore.Want, len(all))
	var n int64
	for i, p := range all {
		wants[i] = backstore.Want{Layer: p.layer, Off: p.off, Len: p.end - p.off}
		n += p.end - p.off
	}
	return wants, n
}
