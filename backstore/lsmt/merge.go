package lsmt

import "fmt"

// maxMerged bounds the index of a stack, to 256 MiB; Index.top has room for
// positions up to it. Stacks of real images are two orders of magnitude below.
const maxMerged = 16<<20 - 1

// Merge makes the index of a stack of at most MaxLayers layers, bottom first.
// Segment.Layer of its segments is the position in layers. No layers give an
// index that is all hole.
//
// Neighbours are merged two by two, then the results two by two, so that the
// work is n log k for n entries in k layers.
func Merge(layers []*Layer) (*Index, error) {
	if len(layers) > MaxLayers {
		return nil, fmt.Errorf("merge %d layers: more than the format's %d", len(layers), MaxLayers)
	}
	if len(layers) == 0 {
		return newIndex(nil), nil
	}
	lists := make([][]entry, len(layers))
	for i, l := range layers {
		lists[i] = withLayer(l.index.entries(), i)
	}
	for len(lists) > 1 {
		var total int
		next := make([][]entry, 0, (len(lists)+1)/2)
		for i := 0; i+1 < len(lists); i += 2 {
			m := overlay(lists[i], lists[i+1])
			if total += len(m); total > maxMerged {
				return nil, fmt.Errorf("merge %d layers: more than %d segments", len(layers), maxMerged)
			}
			next = append(next, m)
		}
		if len(lists)%2 == 1 {
			next = append(next, lists[len(lists)-1])
		}
		lists = next
	}
	return newIndex(lists[0]), nil
}

// VirtualSize is the size of the device that a stack makes, in bytes, layers
// bottom first: that of the topmost layer that has one.
func VirtualSize(layers []*Layer) int64 {
	for i := len(layers) - 1; i >= 0; i-- {
		if n := layers[i].VirtualSize(); n > 0 {
			return n
		}
	}
	return 0
}

// withLayer returns ents with the layer's position in each, in place if there
// is nothing to change.
func withLayer(ents []entry, layer int) []entry {
	if layer == 0 {
		return ents
	}
	out := make([]entry, len(ents))
	for i, e := range ents {
		e.val |= uint64(layer) << layerShift
		out[i] = e
	}
	return out
}

// overlay returns upper and what of lower shows through it.
func overlay(lower, upper []entry) []entry {
	// An entry of upper cuts at most one entry of lower in two.
	out := make([]entry, 0, len(lower)+len(upper)+min(len(lower), len(upper))/2)
	var i int
	var rest entry // what is still to be placed of lower[i]
	if len(lower) > 0 {
		rest = lower[0]
	}
	advance := func() {
		if i++; i < len(lower) {
			rest = lower[i]
		}
	}
	for _, u := range upper {
		for i < len(lower) && rest.end() <= u.off() {
			out = append(out, rest)
			advance()
		}
		if i < len(lower) && rest.off() < u.off() {
			out = append(out, rest.upTo(u.off()))
			rest = rest.from(u.off())
		}
		for i < len(lower) && rest.end() <= u.end() {
			advance()
		}
		if i < len(lower) && rest.off() < u.end() {
			rest = rest.from(u.end())
		}
		out = append(out, u)
	}
	if i < len(lower) {
		out = append(append(out, rest), lower[i+1:]...)
	}
	return out
}
