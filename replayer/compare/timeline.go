package compare

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// A slice is what went over the link in a part of a start.
type slice struct {
	begun    int           // requests
	inFlight float64       // on average
	bytes    float64       // of responses, spread evenly over each
	phases   []string      // reached in it
	idle     time.Duration // without any request in flight
}

// timeline cuts a start into parts of the same length, up to its readiness.
func timeline(s *start, width time.Duration) []slice {
	n := int((s.Ready + width - 1) / width)
	out := make([]slice, max(n, 1))
	for i := range out {
		begin, end := s.Begin.Add(time.Duration(i)*width), s.Begin.Add(min(time.Duration(i+1)*width, s.Ready))
		out[i] = cut(s.Log, begin, end)
	}
	for _, p := range s.Report.Phases {
		if i := int(p.At / width); i < len(out) {
			out[i].phases = append(out[i].phases, p.Name)
		}
	}
	return out
}

// cut measures the requests between two moments.
func cut(log []regtest.Request, begin, end time.Time) (c slice) {
	covered := begin // up to where it is known whether a request was in flight
	var busy time.Duration
	for _, r := range log { // in the order of their starts
		from, to := r.Start, r.End
		if to.IsZero() {
			to = end
		}
		if !from.Before(begin) && from.Before(end) {
			c.begun++
		}
		whole := to.Sub(from)
		from, to = later(from, begin), earlier(to, end)
		part := to.Sub(from)
		if part <= 0 {
			continue
		}
		c.inFlight += part.Seconds()
		c.bytes += float64(r.Bytes) * part.Seconds() / whole.Seconds()
		if from = later(from, covered); to.After(from) {
			busy += to.Sub(from)
			covered = to
		}
	}
	if d := end.Sub(begin); d > 0 {
		c.inFlight /= d.Seconds()
		c.idle = d - busy
	}
	return c
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// writeTimeline prints what a start did at the link, a line for each 100 ms, or
// for more where that would be too many.
func writeTimeline(w io.Writer, s start) {
	width := 100 * time.Millisecond
	for s.Ready/width > 40 {
		width *= 2
	}
	fmt.Fprintf(w, "  from    requests  in flight      MB  link idle\n")
	for i, c := range timeline(&s, width) {
		fmt.Fprintf(w, "%6.2f s  %8d  %9.1f  %6.2f  %6.0f ms  %s\n", (time.Duration(i) * width).Seconds(), c.begun, c.inFlight,
			c.bytes/1e6, float64(c.idle)/1e6, strings.Join(c.phases, ", "))
	}
}
