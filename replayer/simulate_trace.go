package replayer

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/tracefmt"
)

// maxSimulated bounds the blobs of a simulated image, in bytes: a trace is input
// from outside, and sizes are memory.
const maxSimulated = 256 << 30

// ErrNoBlobRanges is a trace that does not tell where its reads lie in the
// layers' blobs, as those of older versions.
var ErrNoBlobRanges = errors.New("the trace does not say where its reads lie in the layers' blobs: record it again with this version")

// A Workload is what a simulation knows of one start: which bytes it reads, in
// which order, and how long it computes between two reads. It is not changed
// once it is made.
//
// Reads of a recording overlap where readers do. What a read had to wait for is
// not recorded, so it is taken to be everything: a read begins some time of
// thinking after all reads before it have begun, and after all those have ended
// that had ended by then in the recording. In a warm recording, where no read
// waits, that is a chain: each read begins thinking time after the end of the
// one before.
type Workload struct {
	trace  *tracefmt.Trace
	layers []backstore.LayerInfo
	reads  []simRead // in the order of their starts
	ended  []int     // of reads, in the order of their ends
	// The start is ready so long after the last read has begun and the first
	// readyAfter of ended have ended.
	readyAfter int
	readyThink time.Duration
}

// simRead is one read of the device; its parts were asked for at once.
type simRead struct {
	parts []simPart
	after int           // of ended have ended before it begins
	think time.Duration // since then, and since the read before it has begun
}

// simPart is a read of one layer.
type simPart struct {
	layer  int
	off, n int64 // in blob space
	bytes  int64 // in layer space
}

// NewWorkload makes a workload of the reads that t has up to its ready time.
// Thinking times are those of think, a warm recording of the same start, or
// where that is nil those of t: what lies between the reads when their waits
// are taken out.
func NewWorkload(t, think *tracefmt.Trace) (*Workload, error) {
	if t.Space == tracefmt.DeviceSpace {
		return nil, errors.New("the trace is in device space, and has to be mapped to layers first")
	}
	w := &Workload{trace: t}
	events := t.FirstTouch()
	if err := w.setLayers(events); err != nil {
		return nil, err
	}
	if t.End != nil && t.End.Ready > 0 {
		late, _ := slices.BinarySearchFunc(events, t.End.Ready+1, func(e tracefmt.Event, at time.Duration) int { return cmp.Compare(e.At, at) })
		events = events[:late]
	}
	if len(events) == 0 {
		return nil, errors.New("the trace has no reads")
	}
	w.setReads(events)
	if think != nil {
		return w, w.setThink(events, think)
	}
	return w, nil
}

// setLayers takes what the header knows of the layers, and the rest from the
// events.
func (w *Workload) setLayers(events []tracefmt.Event) error {
	layers := make([]backstore.LayerInfo, len(w.trace.Layers))
	for i, l := range w.trace.Layers {
		layers[i] = backstore.LayerInfo{Digest: l.Digest, Size: l.Size, Decoded: l.Decoded, Name: string(l.Digest)}
	}
	for i := range events {
		e := &events[i]
		switch {
		case e.BlobLen <= 0:
			return ErrNoBlobRanges
		case e.BlobOff < 0 || e.BlobOff > maxSimulated || e.BlobLen > maxSimulated-e.BlobOff:
			return fmt.Errorf("read of %d bytes at %d of a blob: more than can be simulated", e.BlobLen, e.BlobOff)
		}
		for len(layers) <= e.Layer {
			layers = append(layers, backstore.LayerInfo{})
		}
		l, end, known := &layers[e.Layer], e.BlobOff+e.BlobLen, tracefmt.Layer{}
		if e.Layer < len(w.trace.Layers) {
			known = w.trace.Layers[e.Layer]
		}
		if known.Size > 0 && end > known.Size {
			return fmt.Errorf("read of %d bytes at %d of the blob of layer %d, which has %d", e.BlobLen, e.BlobOff, e.Layer, known.Size)
		}
		l.Size = max(l.Size, end)
		if known.Decoded == 0 {
			l.Decoded = max(l.Decoded, e.Off+e.Len)
		}
	}
	var sum int64
	for _, l := range layers {
		if sum += min(l.Size, maxSimulated); sum > maxSimulated {
			return errors.New("the image is larger than can be simulated")
		}
	}
	w.layers = layers
	return nil
}

// setReads groups the events, which are in order of time, into reads.
func (w *Workload) setReads(events []tracefmt.Event) {
	var starts, ends []time.Duration
	for _, e := range events {
		if n := len(starts); n == 0 || starts[n-1] != e.At {
			starts, ends = append(starts, e.At), append(ends, e.At)
			w.reads = append(w.reads, simRead{})
		}
		n := len(starts) - 1
		ends[n] = max(ends[n], e.At+e.Wait)
		w.reads[n].parts = append(w.reads[n].parts, simPart{e.Layer, e.BlobOff, e.BlobLen, e.Len})
	}
	w.ended = make([]int, len(ends))
	for i := range w.ended {
		w.ended[i] = i
	}
	slices.SortStableFunc(w.ended, func(i, j int) int { return cmp.Compare(ends[i], ends[j]) })
	k, last := 0, time.Duration(0)
	mark := func(at time.Duration, before int) (int, time.Duration) {
		for k < len(ends) && ends[w.ended[k]] <= at && w.ended[k] < before {
			last = max(last, ends[w.ended[k]])
			k++
		}
		think := at - last
		last = at
		return k, think
	}
	for i := range w.reads {
		w.reads[i].after, w.reads[i].think = mark(starts[i], i)
	}
	ready := slices.Max(ends)
	if w.trace.End != nil && w.trace.End.Ready > 0 {
		ready = w.trace.End.Ready
	}
	w.readyAfter, w.readyThink = mark(ready, len(ends))
}

// setThink replaces the thinking times by those of a warm recording. A read that
// it does not have takes no time of its own, and one that came earlier there
// than a read before it neither; the sum stays that of the warm start.
func (w *Workload) setThink(events []tracefmt.Event, warm *tracefmt.Trace) error {
	touched := warmTimes(w.trace, warm)
	at := make([]time.Duration, len(w.reads))
	read, found := -1, 0
	for i, e := range events {
		if i == 0 || e.At != events[i-1].At {
			read++
			at[read] = -1
		}
		if t, ok := touched(e.Layer, e.Off); ok {
			found++
			if at[read] < 0 || t < at[read] {
				at[read] = t
			}
		}
	}
	if found*2 < len(events) {
		return fmt.Errorf("the recording with the thinking times has only %d of the trace's %d reads: it is of another start", found, len(events))
	}
	var last time.Duration
	for i, t := range at {
		w.reads[i].think = max(0, t-last)
		last = max(last, t)
	}
	if warm.End != nil && warm.End.Ready > 0 {
		w.readyThink = max(0, warm.End.Ready-last)
	}
	return nil
}

// warmTimes gives the time at which warm first touches an offset of a layer of
// t.
func warmTimes(t, warm *tracefmt.Trace) func(layer int, off int64) (time.Duration, bool) {
	byDigest := map[digest.Digest]int{}
	for i, l := range warm.Layers {
		if l.Digest != "" {
			byDigest[l.Digest] = i
		}
	}
	parts := newTouchIndex(warm.FirstTouch())
	return func(layer int, off int64) (time.Duration, bool) {
		if layer < len(t.Layers) && t.Layers[layer].Digest != "" {
			i, ok := byDigest[t.Layers[layer].Digest]
			if !ok {
				return 0, false
			}
			layer = i
		}
		e := parts.find(layer, off)
		if e == nil {
			return 0, false
		}
		return e.At, true
	}
}

// touchIndex finds first touches by place. They do not overlap.
type touchIndex map[int][]tracefmt.Event

func newTouchIndex(events []tracefmt.Event) touchIndex {
	x := touchIndex{}
	for _, e := range events {
		x[e.Layer] = append(x[e.Layer], e)
	}
	for _, l := range x {
		slices.SortFunc(l, func(a, b tracefmt.Event) int { return cmp.Compare(a.Off, b.Off) })
	}
	return x
}

// find returns the event that has touched an offset, or nil.
func (x touchIndex) find(layer int, off int64) *tracefmt.Event {
	l := x[layer]
	i, ok := slices.BinarySearchFunc(l, off, func(e tracefmt.Event, off int64) int { return cmp.Compare(e.Off, off) })
	if !ok {
		i--
	}
	if i < 0 || off >= l[i].Off+l[i].Len {
		return nil
	}
	return &l[i]
}
