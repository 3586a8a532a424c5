package tracefmt

import "github.com/opencontainers/go-digest"

// Covers tells how many distinct bytes the trace has, and how many of them are
// in a layer that is, by its digest, among layers: so much of the trace is of
// use for an image of those layers. A trace of a device has all or nothing: its
// offsets mean something only if layers are its own, in their order.
func (t *Trace) Covers(layers []Layer) (have, all int64) {
	if t.Space == DeviceSpace {
		all = t.Bytes()
		if len(layers) > 0 && len(t.Layers) > 0 && sameStack(&t.Header, &Header{Layers: layers}) {
			have = all
		}
		return have, all
	}
	among := make(map[digest.Digest]bool)
	for _, l := range layers {
		among[l.Digest] = l.Digest != ""
	}
	l := newLane(t, nil)
	for i := range l.events {
		e := &l.events[i]
		addUp(&all, e.Len)
		if e.Layer < len(t.Layers) && among[t.Layers[e.Layer].Digest] {
			addUp(&have, e.Len)
		}
	}
	return have, all
}
