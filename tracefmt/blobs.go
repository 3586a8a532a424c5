package tracefmt

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"
)

// Where the bytes of an event lie in its layer's blob follows, roughly, from
// where they lie in the layer: the columns of blob ranges hold what they are
// off by. Their rows are in the order of byOffset, in which each range is
// expected to begin as far behind the one before it, and to be as long, as if
// the bytes of the layer since then had been compressed as well as that one.
// Of a demo's trace that makes 3.1 bytes an event, compressed, where the
// differences in order of time take 5.5.
type blobGuess struct {
	off, blobOff int64 // of the known range before
	from, to     int64 // bytes of the layer, and of the blob, that they became
}

// guesses are those at the beginning of each layer of a frame.
func (h *Header) guesses() []blobGuess {
	all := make([]blobGuess, MaxLayers)
	for i, l := range h.Layers {
		if l.Decoded > 0 {
			all[i].from, all[i].to = l.Decoded, l.Size
		}
	}
	return all
}

// expect is what is expected of an event that does not begin before the last.
func (g *blobGuess) expect(e *Event) (off, n int64) {
	return g.blobOff + min(g.scale(e.Off-g.off), maxSum-g.blobOff), g.scale(e.Len)
}

// learn takes what has come of an event.
func (g *blobGuess) learn(e *Event) {
	if e.BlobLen > 0 {
		*g = blobGuess{off: e.Off, blobOff: e.BlobOff, from: e.Len, to: e.BlobLen}
	}
}

// scale is how many bytes of the blob n of the layer are expected to be.
func (g *blobGuess) scale(n int64) int64 {
	if g.from == 0 {
		return 0
	}
	hi, lo := bits.Mul64(uint64(n), uint64(g.to))
	if hi >= uint64(g.from) {
		return maxSum
	}
	q, _ := bits.Div64(hi, lo, uint64(g.from))
	return int64(min(q, maxSum))
}

// A place is that of an event, by its index, in its layer.
type place struct {
	off   int64
	layer int32
	i     int32
}

// byOffset are the places of events in the order of layer and offset; those
// that have both in common keep their order.
func byOffset(events []Event) []place {
	order := make([]place, len(events))
	for i := range events {
		order[i] = place{off: events[i].Off, layer: int32(events[i].Layer), i: int32(i)}
	}
	slices.SortFunc(order, func(a, b place) int {
		if a.layer != b.layer {
			return cmp.Compare(a.layer, b.layer)
		}
		if a.off != b.off {
			return cmp.Compare(a.off, b.off)
		}
		return cmp.Compare(a.i, b.i)
	})
	return order
}

// putBlobs fills the columns of blob ranges, if any event has one.
func (h *Header) putBlobs(events []Event, offs, lens *writeColumn) {
	if !slices.ContainsFunc(events, func(e Event) bool { return e.BlobLen > 0 }) {
		return
	}
	offs.used, lens.used = true, true
	guesses := h.guesses()
	for _, p := range byOffset(events) {
		e := &events[p.i]
		g := &guesses[e.Layer]
		off, n := g.expect(e)
		offs.delta(e.BlobOff - off)
		lens.delta(e.BlobLen - n)
		g.learn(e)
	}
}

// blobs gives the events of a frame their blob ranges, if it has them.
func (c *columnReader) blobs(h *Header, events []Event) error {
	offs, lens := &c.f.cols[colBlobOff], &c.f.cols[colBlobLen]
	if !offs.present && !lens.present {
		return nil
	}
	if !offs.present || !lens.present {
		return fmt.Errorf("%s without %s, or the other way round", keyBlobOff, keyBlobLen)
	}
	guesses := h.guesses()
	for _, p := range byOffset(events) {
		e := &events[p.i]
		g := &guesses[e.Layer]
		off, n := g.expect(e)
		e.BlobOff = c.delta(colBlobOff, off, maxSum)
		e.BlobLen = c.delta(colBlobLen, n, maxSum)
		if c.err == nil {
			c.err = h.checkBlob(e)
		}
		if c.err != nil {
			return fmt.Errorf("event %d: %w", p.i, c.err)
		}
		g.learn(e)
	}
	return nil
}

// checkBlob tells whether the range in the blob is one.
func (h *Header) checkBlob(e *Event) error {
	off, n := e.BlobOff, e.BlobLen
	switch {
	case off < 0 || n < 0 || n == 0 && off != 0:
		return fmt.Errorf("range of %d bytes at %d of the blob: not a range", n, off)
	case off > maxSum-n:
		return fmt.Errorf("range of %d bytes at %d of the blob: overflow", n, off)
	case n > 0 && h.Space == DeviceSpace:
		return fmt.Errorf("range of %d bytes at %d of a blob in a trace of a device", n, off)
	case len(h.Layers) == 0:
		return nil
	}
	if size := h.Layers[e.Layer].Size; size > 0 && off+n > size {
		return fmt.Errorf("range of %d bytes at %d of the blob: that of layer %d has %d bytes", n, off, e.Layer, size)
	}
	return nil
}

// joinBlobs makes a's range cover b's as well; both are known, or neither.
func joinBlobs(a, b *Event) {
	if a.BlobLen == 0 {
		return
	}
	end := max(a.BlobOff+a.BlobLen, b.BlobOff+b.BlobLen)
	a.BlobOff = min(a.BlobOff, b.BlobOff)
	a.BlobLen = end - a.BlobOff
}
