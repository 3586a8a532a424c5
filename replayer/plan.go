// Package replayer turns a recorded trace into a plan, the ranges of an
// image's blobs in the order in which a start first needs them, and replays
// the plan: it has the backstore bring those ranges onto the node ahead of
// demand, watches whether that helps, and stops when it does not.
//
// A [Plan] is exact: whole compressed blocks, rounded to the chunks of the
// cache. What is fetched in one request is decided when the link has room for
// it, by what the link was measured to be by then.
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

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

// Options are the settings of [NewPlan]. A zero field means its default.
type Options struct {
	// Gap in bytes joins neighbours whose distance is at most that, whatever
	// the link. Negative: only ranges that touch. By default a gap is worth
	// what another request would cost, see [Plan.Next].
	Gap int64
	// Horizon in bytes is how far ahead in the plan a range may be pulled to
	// be joined with an earlier one, whatever the link. By default that is
	// weighed against the cost of a request too.
	Horizon int64
	// Requests is how many the replay should get by with, as far as
	// accuracy allows: [DefaultRequests] by default, any number if negative.
	Requests int
	// Trial is for a trace that may be of another workload: it is believed, for
	// the time being, only as far as demand has met it, and a little further.
	Trial bool
	// Chunk is the cache's chunk size in bytes, to which ranges are rounded:
	// [backstore.DefaultChunkSize] by default.
	Chunk int64
}

func (o *Options) fill() Options {
	var f Options
	if o != nil {
		f = *o
	}
	f.Requests = cmp.Or(f.Requests, DefaultRequests)
	f.Chunk = max(1, cmp.Or(f.Chunk, backstore.DefaultChunkSize))
	return f
}

const (
	// maxAtom bounds a range of a plan in bytes. Longer ones are joined of several.
	maxAtom = 256 << 10
	// maxPlan bounds the bytes of a plan. What a trace asks for beyond is left
	// to demand.
	maxPlan = 16 << 30
)

// A Plan is what a replay fetches, first demand first. It is a
// [backstore.Plan], to be used once. Its methods are safe for concurrent use.
type Plan struct {
	Wants []backstore.Want // exactly what the trace asks for, in order of first demand
	Need  int64            // bytes of blobs that the trace asks for, in whole blocks
	Bytes int64            // of Wants: rounded to chunks

	TraceBytes int64 // bytes of layer space that the trace touches
	Matched    int64 // of these, in layers that the image has
	Missing    int   // layers of the trace that the image does not have
	Dropped    int   // events whose recorded place is not in their blob

	o    Options
	gaps []int64 // between neighbours that do not touch, ascending
	runs int     // of neighbours that touch
	cap  int64   // the largest gap that accuracy allows

	mu      sync.Mutex // guards the fields below
	layers  [][]*atom  // of each layer, by offset, not overlapping
	atoms   []atom     // in the order of Wants
	next    int        // atoms before it were taken
	left    int64      // bytes of atoms that were not taken
	given   int64      // bytes that Next has given out
	pieces  int        // that Next has given out
	seen    meeting    // of demand with the plan
	trial   bool       // not proven yet
	held    bool       // Next gives out nothing
	broke   bool       // it has given out nothing for that
	skipped int64      // bytes of atoms that were left to demand, which had passed them
	renewed bool       // what demand took and did not bring was put back
}

// An atom is a range of the plan, the least that is taken at once.
type atom struct {
	off, end int64
	cut      bool  // demand has taken what was behind end
	before   int64 // bytes of the plan before it
	layer    int32
	at       int32 // in its layer
	turn     int32 // in the plan
	piece    int32 // that it was taken with, from 1; 0 while it is to be fetched
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

// NewPlan plans the replay of t on im, which is an open image or one made by
// [Unopened]. Events beyond the image's layers are left out and counted. With
// an unopened image and a trace that does not say where its bytes are in the
// blobs the error is [ErrNotLocated].
func NewPlan(t *tracefmt.Trace, im Image, o *Options) (*Plan, error) {
	if t.Space == tracefmt.DeviceSpace {
		return nil, errors.New("plan: the trace is in device space, and has to be mapped to layers first")
	}
	p := &Plan{o: o.fill()}
	p.trial = p.o.Trial
	if err := p.addTrace(t, im); err != nil {
		return nil, fmt.Errorf("plan: %w", err)
	}
	p.index(len(im.Layers()))
	return p, nil
}

func (p *Plan) addTrace(t *tracefmt.Trace, im Image) error {
	layers := im.Layers()
	var place func(int) int
	place, p.Missing = match(t, layers)
	events := t.FirstTouch()
	p.atoms = make([]atom, 0, len(events))
	var exact, rounded tracefmt.Touched
	var parts []tracefmt.Event
	for _, e := range events {
		p.TraceBytes += e.Len
		i := place(e.Layer)
		if i < 0 {
			continue
		}
		off, n, err := locate(im, layers[i], i, e)
		if err != nil {
			return err
		}
		if n == 0 || n > maxPlan-p.Bytes {
			p.Dropped++
			continue
		}
		p.Matched += inLayer(layers[i], e)
		parts = exact.Add(parts[:0], tracefmt.Event{Layer: i, Off: off, Len: n})
		for _, part := range parts {
			p.Need += part.Len
		}
		off, n = round(off, n, p.o.Chunk, layers[i].Size)
		parts = rounded.Add(parts[:0], tracefmt.Event{Layer: i, Off: off, Len: n})
		for _, part := range parts {
			p.add(i, part.Off, part.Off+part.Len)
		}
	}
	switch {
	case p.Matched > 0 || p.TraceBytes == 0:
		return nil
	case p.Missing < len(t.Layers) && p.Dropped > 0:
		return errors.New("the trace's ranges are not in the image's layers")
	}
	return ErrNoMatch
}

// inLayer is how many bytes of an event are in its layer.
func inLayer(l backstore.LayerInfo, e tracefmt.Event) int64 {
	if l.Decoded == 0 {
		return e.Len
	}
	return min(e.Len, l.Decoded-e.Off)
}

// round extends a range to whole chunks, within size.
func round(off, n, chunk, size int64) (int64, int64) {
	begin, end := off-off%chunk, off+n
	if over := end % chunk; over > 0 {
		end += min(chunk-over, size-end)
	}
	return begin, end - begin
}

// add takes the range [off, end), which overlaps none before it.
func (p *Plan) add(layer int, off, end int64) {
	p.Bytes += end - off
	if n := len(p.atoms); n > 0 { // a reader that goes on forward
		a := &p.atoms[n-1]
		if int(a.layer) == layer && a.end == off {
			grown := min(end, a.off+maxAtom)
			a.end, off = max(a.end, grown), max(off, grown)
		}
	}
	for off < end {
		stop := min(end, off+maxAtom)
		p.atoms = append(p.atoms, atom{layer: int32(layer), off: off, end: stop})
		off = stop
	}
}

// index makes what Next and Around look things up in.
func (p *Plan) index(layers int) {
	p.Wants = make([]backstore.Want, len(p.atoms))
	p.layers = make([][]*atom, layers)
	counts := make([]int, layers)
	for i := range p.atoms {
		counts[p.atoms[i].layer]++
	}
	for i, n := range counts {
		p.layers[i] = make([]*atom, 0, n)
	}
	for i := range p.atoms {
		a := &p.atoms[i]
		a.turn, a.before = int32(i), p.left
		p.left += a.end - a.off
		p.Wants[i] = backstore.Want{Layer: int(a.layer), Off: a.off, Len: a.end - a.off}
		p.layers[a.layer] = append(p.layers[a.layer], a)
	}
	for _, l := range p.layers {
		slices.SortFunc(l, func(a, b *atom) int { return cmp.Compare(a.off, b.off) })
		for i, a := range l {
			a.at = int32(i)
			if i > 0 && a.off > l[i-1].end {
				p.gaps = append(p.gaps, a.off-l[i-1].end)
			}
		}
		p.runs += min(len(l), 1)
	}
	p.runs += len(p.gaps)
	slices.Sort(p.gaps)
	p.cap = affordable(p.gaps, p.Need, p.Bytes)
}
