package recorder

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sort"

	"github.com/reprise-project/reprise/tracefmt"
)

// AttributeStats counts what Attribute has found.
type AttributeStats struct {
	Events, Attributed int   // events of the trace; those whose process is known now
	Bytes, Known       int64 // of the events; of those whose process is known now
}

// Attribute tells who read: each event of t, which is in layer space, gets
// Process, Pid and Container of the reads, in device space, that touched most of
// its bytes first. An event that no read touches stays as it is.
func Attribute(t *tracefmt.Trace, reads []tracefmt.Event, m DeviceMap) AttributeStats {
	readers := firstReaders(reads, m)
	var s AttributeStats
	for i := range t.Events {
		e := &t.Events[i]
		s.Events++
		s.Bytes += e.Len
		if e.Layer < 0 || e.Layer >= len(readers) {
			continue
		}
		if r := most(readers[e.Layer], e.Off, e.Off+e.Len); r != nil {
			e.Process, e.Pid, e.Container = r.Process, r.Pid, r.Container
			s.Attributed++
			s.Known += e.Len
		}
	}
	return s
}

// firstReaders are the reads in layer space, only what they touch first, in
// order of each layer's offsets.
func firstReaders(reads []tracefmt.Event, m DeviceMap) [][]tracefmt.Event {
	if !slices.IsSortedFunc(reads, eventTime) {
		reads = slices.Clone(reads)
		slices.SortStableFunc(reads, eventTime)
	}
	var touched tracefmt.Touched
	var layers [][]tracefmt.Event
	for i := range reads {
		for _, e := range onLayers(&reads[i], m) {
			if e.Layer >= tracefmt.MaxLayers {
				continue
			}
			for len(layers) <= e.Layer {
				layers = append(layers, nil)
			}
			layers[e.Layer] = touched.Add(layers[e.Layer], e)
		}
	}
	for _, l := range layers {
		slices.SortFunc(l, func(a, b tracefmt.Event) int { return cmp.Compare(a.Off, b.Off) })
	}
	return layers
}

func eventTime(a, b tracefmt.Event) int { return cmp.Compare(a.At, b.At) }

// onLayers are the parts of an event in device space that lie in layers.
func onLayers(e *tracefmt.Event, m DeviceMap) (parts []tracefmt.Event) {
	for _, x := range m(e.Off, e.Len) {
		p := *e
		if p.Path != "" {
			p.FileOff += x.Off - e.Off
		}
		p.Layer, p.Off, p.Len = x.Layer, x.LayerOff, x.Len
		parts = append(parts, p)
	}
	return parts
}

// most is the reader of most of [off, end); nil if nobody read there.
func most(sorted []tracefmt.Event, off, end int64) *tracefmt.Event {
	type reader struct {
		process   string
		pid       int
		container string
	}
	var best *tracefmt.Event
	var bestBytes int64
	var sums map[reader]int64
	for i := sort.Search(len(sorted), func(i int) bool { return sorted[i].Off+sorted[i].Len > off }); i < len(sorted) && sorted[i].Off < end; i++ {
		r := &sorted[i]
		n := min(end, r.Off+r.Len) - max(off, r.Off)
		if n == end-off {
			return r
		}
		if sums == nil {
			sums = map[reader]int64{}
		}
		who := reader{r.Process, r.Pid, r.Container}
		if sums[who] += n; sums[who] > bestBytes {
			best, bestBytes = r, sums[who]
		}
	}
	return best
}

// FromDevice turns a trace of a device into one of the layers on it. What the
// device has in no layer is left out, and what is beyond the Decoded size of one.
// t is not changed.
func FromDevice(t *tracefmt.Trace, m DeviceMap, layers []tracefmt.Layer) (*tracefmt.Trace, error) {
	if t.Space != tracefmt.DeviceSpace {
		return nil, errors.New("map trace to layers: it is not a trace of a device")
	}
	out := &tracefmt.Trace{Header: t.Header, End: t.End}
	out.Space, out.Layers = tracefmt.LayerSpace, slices.Clone(layers)
	for i := range t.Events {
		for _, p := range onLayers(&t.Events[i], m) {
			if p.Layer >= len(layers) {
				continue
			}
			if size := layers[p.Layer].Decoded; size > 0 {
				p.Len = min(p.Len, size-p.Off)
			}
			if p.Len > 0 {
				out.Events = append(out.Events, p)
			}
		}
	}
	count(out)
	if err := out.Check(); err != nil {
		return nil, fmt.Errorf("map trace to layers: %w", err)
	}
	return out, nil
}
