package recorder

import (
	"cmp"
	"math"
	"slices"

	"github.com/reprise-project/reprise/tracefmt"
)

// keepGiven appends the first touches among what Options.Given gives.
func (r *Recorder) keepGiven() {
	if r.opts.Given == nil {
		return
	}
	events := r.opts.Given(r.last)
	slices.SortStableFunc(events, func(a, b tracefmt.Event) int { return cmp.Compare(a.At, b.At) })
	for _, e := range events {
		if len(r.header.Layers) > 0 || e.Layer < 0 || e.Layer >= tracefmt.MaxLayers || e.Off < 0 || e.Len <= 0 || e.Off > math.MaxInt64-e.Len {
			r.invalid.Add(1)
			continue
		}
		e.At, e.Wait = max(e.At, 0), max(e.Wait, 0)
		r.parts = r.touched.Add(r.parts[:0], e)
		for i := range r.parts {
			r.add(&r.parts[i])
		}
	}
}
