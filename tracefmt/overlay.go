package tracefmt

import (
	"fmt"
	"math"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Traces are laid over each other byte by byte. Each is a lane: its first
// touches, of layers that have numbers in common. The layers of images are the
// same if they have the same digest, wherever they are in the stack.

// A layerKey tells layers apart: by digest, or by what is known of a layer that
// has none.
type layerKey struct {
	digest digest.Digest
	place  int // from the bottom
	size   int64
}

func (h *Header) layerKey(i int) layerKey {
	if i >= len(h.Layers) {
		return layerKey{place: i}
	}
	if l := h.Layers[i]; l.Digest != "" {
		return layerKey{digest: l.Digest}
	}
	return layerKey{place: i, size: h.Layers[i].Decoded}
}

// A stack numbers the layers of several traces.
type stack struct {
	ids    map[layerKey]int
	layers []Layer
}

// enter gives the layers of h numbers: an equal layer has the number that it
// has already. It is an error if one digest has two sizes.
func (s *stack) enter(h *Header) ([]int, error) {
	if s.ids == nil {
		s.ids = make(map[layerKey]int)
	}
	first := len(s.layers) == 0 // its list is kept as it is, layers that are in it twice included
	ids := make([]int, len(h.Layers))
	for i, l := range h.Layers {
		key := h.layerKey(i)
		id, known := s.ids[key]
		if !known {
			id = len(s.layers)
			s.ids[key] = id
		}
		if !known || first {
			s.layers = append(s.layers, l)
		}
		ids[i] = id
		if err := s.layers[id].learn(l); err != nil {
			return nil, err
		}
	}
	return ids, nil
}

// learn takes the sizes that another trace knows.
func (l *Layer) learn(of Layer) error {
	if l.Size == 0 {
		l.Size = of.Size
	}
	if l.Decoded == 0 {
		l.Decoded = of.Decoded
	}
	if of.Size != 0 && of.Size != l.Size || of.Decoded != 0 && of.Decoded != l.Decoded {
		return fmt.Errorf("layer %s has %d bytes (%d decoded), elsewhere %d (%d decoded)",
			l.Digest, of.Size, of.Decoded, l.Size, l.Decoded)
	}
	return nil
}

// A lane is the first touches of a trace, in order of time, and their order by
// layer and offset. Their layers have the numbers of the stack.
type lane struct {
	events []Event
	order  []place
	next   int // in order
}

// newLane makes a lane of a trace. ids numbers its layers; nil leaves them.
func newLane(t *Trace, ids []int) *lane {
	events := t.Events
	if twice := t.sameLayers(); twice != nil {
		events = slices.Clone(events)
		renumber(events, twice)
	}
	l := &lane{events: (&Trace{Events: events}).FirstTouch()}
	renumber(l.events, ids)
	l.order = byOffset(l.events)
	return l
}

// sameLayers gives, of each layer, the first of the same trace that is equal to
// it; nil if all differ.
func (h *Header) sameLayers() []int {
	first := make(map[layerKey]int, len(h.Layers))
	ids := make([]int, len(h.Layers))
	for i := range h.Layers {
		key := h.layerKey(i)
		if _, ok := first[key]; !ok {
			first[key] = i
		}
		ids[i] = first[key]
	}
	if len(first) == len(ids) {
		return nil
	}
	return ids
}

func renumber(events []Event, ids []int) {
	for i := range events {
		if n := events[i].Layer; n >= 0 && n < len(ids) {
			events[i].Layer = ids[n]
		}
	}
}

// at tells whether the lane has the byte at off of a layer, and which event
// that is, and how far this goes on.
func (l *lane) at(layer int32, off int64) (event int32, end int64) {
	if l.next == len(l.order) || l.order[l.next].layer != layer {
		return -1, math.MaxInt64
	}
	p := l.order[l.next]
	if p.off > off {
		return -1, p.off
	}
	return p.i, p.off + l.events[p.i].Len
}

// pass moves the lane past off.
func (l *lane) pass(off int64) {
	if p := l.order[l.next]; p.off+l.events[p.i].Len <= off {
		l.next++
	}
}

// A part is a range of a layer that is in the same events of all lanes.
type part struct {
	layer int
	off   int64
	n     int64
	of    []int32 // the event of each lane, or -1; valid until the next part
}

// overlay calls f with all parts that some lane has, by layer and offset. It
// takes time in proportion to the number of lanes and that of all events.
func overlay(lanes []*lane, f func(p *part)) {
	p := part{of: make([]int32, len(lanes))}
	for _, l := range lanes {
		l.next = 0
	}
	for {
		layer := int32(math.MaxInt32)
		for _, l := range lanes {
			if l.next < len(l.order) {
				layer = min(layer, l.order[l.next].layer)
			}
		}
		if layer == math.MaxInt32 {
			return
		}
		p.layer, p.off = int(layer), 0
		overlayLayer(lanes, layer, &p, f)
	}
}

func overlayLayer(lanes []*lane, layer int32, p *part, f func(p *part)) {
	for {
		end, any := int64(math.MaxInt64), false
		for i, l := range lanes {
			e, until := l.at(layer, p.off)
			p.of[i] = e
			any = any || e >= 0
			end = min(end, until)
		}
		if !any && end == math.MaxInt64 {
			return
		}
		if any {
			p.n = end - p.off
			f(p)
		}
		for i, l := range lanes {
			if p.of[i] >= 0 {
				l.pass(end)
			}
		}
		p.off = end
	}
}

// addUp adds numbers of bytes, and stops at the largest.
func addUp(sum *int64, n int64) {
	*sum += min(n, math.MaxInt64-*sum)
}
