package tracefmt

import (
	"cmp"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Shares are numbers of distinct bytes.
type Shares struct {
	OnlyA int64 `json:"only_a"`
	OnlyB int64 `json:"only_b"`
	Both  int64 `json:"both"`
}

// A Difference tells how two traces, a and b, differ.
type Difference struct {
	Shares
	Layers []LayerDifference `json:"layers"` // that either trace touches
	Paths  []PathDifference  `json:"paths"`  // likewise; those that differ most come first

	// Order compares the orders in which the bytes in both were first touched:
	// it is Kendall's rank correlation. 1 is the same order, 0 has nothing to
	// do with it, -1 is reversed. Of two bytes of which both traces have read
	// one with the other it says nothing. It is 1 if there is nothing to
	// compare.
	Order float64 `json:"order"`

	// Displacement is how far apart the places of a byte in the two orders are,
	// in bytes: the median over the bytes in both.
	Displacement int64 `json:"displacement"`
}

// A LayerDifference is that of one layer.
type LayerDifference struct {
	Digest digest.Digest `json:"digest,omitempty"` // empty unknown
	A      int           `json:"a"`                // its number in a; -1 if a has no such layer
	B      int           `json:"b"`                // in b
	Shares
}

// A PathDifference is that of one file of the image.
type PathDifference struct {
	Path string `json:"path"` // empty unknown; for bytes in both, the path in a, or else in b
	Shares
}

// Diff compares the bytes that two traces touch, and the order of their first
// touches. Layers are matched by digest, one without a digest by its place and
// length; if one of the traces does not list its layers, all are matched by
// place. A trace of a device has nothing in common with one of layers, nor with
// that of another image's device. The traces are not changed.
func Diff(a, b *Trace) *Difference {
	d := newDiffer(a, b)
	overlay(d.lanes, d.part)
	out := &Difference{Shares: d.all, Layers: []LayerDifference{}, Paths: []PathDifference{}}
	for _, l := range d.layers {
		out.Layers = append(out.Layers, *l)
	}
	slices.SortFunc(out.Layers, func(x, y LayerDifference) int {
		// Those that only b has come last: -1 is the largest of all.
		return cmp.Or(cmp.Compare(uint(x.A), uint(y.A)), cmp.Compare(x.B, y.B))
	})
	for path, s := range d.paths {
		out.Paths = append(out.Paths, PathDifference{path, *s})
	}
	slices.SortFunc(out.Paths, func(x, y PathDifference) int {
		return cmp.Or(cmp.Compare(y.differs(), x.differs()), cmp.Compare(x.Path, y.Path))
	})
	d.rank()
	out.Order, out.Displacement = d.order(), d.displacement()
	return out
}

// differs is how many bytes are not in both.
func (s *Shares) differs() int64 {
	n := s.OnlyA
	addUp(&n, s.OnlyB)
	return n
}

// add adds a range that is in the first trace, the second, or both.
func (s *Shares) add(inA, inB bool, n int64) {
	switch {
	case !inB:
		addUp(&s.OnlyA, n)
	case !inA:
		addUp(&s.OnlyB, n)
	default:
		addUp(&s.Both, n)
	}
}

// A differ lays two traces over each other. Layers have their numbers in a;
// those that only b has follow, from MaxLayers on.
type differ struct {
	a, b   *Header
	inB    map[int]int // numbers in b
	lanes  []*lane
	all    Shares
	layers map[int]*LayerDifference
	paths  map[string]*Shares
	common []commonPart
}

// A commonPart is a range of bytes that are in one event of either trace.
type commonPart struct {
	a, b  int32 // the events
	seq   int32 // place among the parts by layer and offset
	rank  int32 // place among them in the order of b
	n     int64
	moved int64 // bytes between the places in the two orders
}

func newDiffer(a, b *Trace) *differ {
	d := &differ{
		a: &a.Header, b: &b.Header, inB: make(map[int]int),
		layers: make(map[int]*LayerDifference), paths: make(map[string]*Shares),
	}
	ids := d.match()
	for n, id := range slices.Backward(ids) {
		d.inB[id] = n
	}
	d.lanes = []*lane{newLane(a, nil), newLane(b, ids)}
	return d
}

// match numbers b's layers.
func (d *differ) match() []int {
	ids := make([]int, MaxLayers)
	device := d.a.Space == DeviceSpace
	other := device != (d.b.Space == DeviceSpace) || device && !sameStack(d.a, d.b)
	byPlace := device || len(d.a.Layers) == 0 || len(d.b.Layers) == 0
	inA := make(map[layerKey]int)
	for n := range slices.Backward(d.a.Layers) {
		inA[d.a.layerKey(n)] = n
	}
	for n := range ids {
		id, known := inA[d.b.layerKey(n)]
		switch {
		case other || !byPlace && !known:
			ids[n] = MaxLayers + n
		case byPlace:
			ids[n] = n
		default:
			ids[n] = id
		}
	}
	return ids
}

func (d *differ) part(p *part) {
	inA, inB := p.of[0] >= 0, p.of[1] >= 0
	d.all.add(inA, inB, p.n)
	d.layer(p.layer).add(inA, inB, p.n)
	path := ""
	for i, e := range p.of {
		if e >= 0 && path == "" {
			path = d.lanes[i].events[e].Path
		}
	}
	s := d.paths[path]
	if s == nil {
		s = new(Shares)
		d.paths[path] = s
	}
	s.add(inA, inB, p.n)
	if inA && inB {
		d.common = append(d.common, commonPart{a: p.of[0], b: p.of[1], seq: int32(len(d.common)), n: p.n})
	}
}

// layer gives the row of a layer.
func (d *differ) layer(id int) *LayerDifference {
	l := d.layers[id]
	if l != nil {
		return l
	}
	l = &LayerDifference{A: id, B: -1}
	if n, ok := d.inB[id]; ok && (n < len(d.b.Layers) || len(d.b.Layers) == 0) {
		l.B = n
	}
	if id >= MaxLayers || id >= len(d.a.Layers) && len(d.a.Layers) > 0 {
		l.A = -1
	}
	if l.A >= 0 {
		l.Digest = d.a.layerDigest(l.A)
	}
	if l.B >= 0 && l.Digest == "" {
		l.Digest = d.b.layerDigest(l.B)
	}
	d.layers[id] = l
	return l
}

func (h *Header) layerDigest(n int) digest.Digest {
	if h.Space == DeviceSpace || n >= len(h.Layers) {
		return ""
	}
	return h.Layers[n].Digest
}

// rank puts the common parts into the order of a, and tells each its place in
// that of b. Parts are in the order of offsets where one event has several.
func (d *differ) rank() {
	parts := d.common
	slices.SortFunc(parts, func(x, y commonPart) int { return cmp.Or(cmp.Compare(x.a, y.a), cmp.Compare(x.seq, y.seq)) })
	byB := make([]int32, len(parts))
	var sum int64
	for i := range parts {
		byB[i] = int32(i)
		parts[i].moved = sum
		addUp(&sum, parts[i].n)
	}
	slices.SortFunc(byB, func(x, y int32) int {
		return cmp.Or(cmp.Compare(parts[x].b, parts[y].b), cmp.Compare(parts[x].seq, parts[y].seq))
	})
	sum = 0
	for rank, i := range byB {
		p := &parts[i]
		p.rank = int32(rank)
		p.moved = max(p.moved, sum) - min(p.moved, sum)
		addUp(&sum, p.n)
	}
}

// order is Kendall's rank correlation of ranked parts, each of which weighs its
// bytes: 1 less twice the share of pairs that b has the other way round. The
// pairs are counted in a Fenwick tree over the ranks.
func (d *differ) order() float64 {
	tree := make([]float64, len(d.common)+1)
	var sum, pairs, reversed float64
	for i := range d.common {
		p, n := &d.common[i], float64(d.common[i].n)
		before := 0.0 // bytes of parts so far that come before this one in b
		for k := int(p.rank); k > 0; k &= k - 1 {
			before += tree[k]
		}
		reversed += n * (sum - before)
		for k := int(p.rank) + 1; k < len(tree); k += k & -k {
			tree[k] += n
		}
		pairs += n * sum
		sum += n
	}
	if pairs == 0 {
		return 1
	}
	return min(max(1-2*reversed/pairs, -1), 1)
}

// displacement is the median of how far ranked parts have moved.
func (d *differ) displacement() int64 {
	parts := slices.Clone(d.common)
	slices.SortFunc(parts, func(x, y commonPart) int { return cmp.Compare(x.moved, y.moved) })
	var sum int64
	for i := range parts {
		if addUp(&sum, parts[i].n); sum >= d.all.Both-d.all.Both/2 {
			return parts[i].moved
		}
	}
	return 0
}
