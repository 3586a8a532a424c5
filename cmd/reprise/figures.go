package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/replayer/node"
)

// fetched tells whether the start needed anything that was not on the node: else
// the container's own words are all that is said.
func fetched(r *node.Report) bool {
	return r.Before != nil || r.End.Stats.DemandRequests+r.End.Stats.BackgroundRequests > 0
}

// figures says in a line each what the container's reads and the replay had come
// to when it was ready and, where that is more, in the end.
func figures(w io.Writer, r *node.Report) {
	start := ""
	if r.Ready {
		start = figuresOf(&r.Start.Stats)
		fmt.Fprintf(w, "reprise: ready after %v: %s\n", phaseAt(r, "ready").Round(time.Millisecond), start)
	}
	end := r.End.Stats
	if r.Before != nil {
		end = r.Before.Add(end)
	}
	if text := figuresOf(&end); text != start {
		fmt.Fprintf(w, "reprise: at the end: %s\n", text)
	}
}

// figuresOf is what matters of the figures, in words.
func figuresOf(s *backstore.Stats) string {
	parts := []string{
		fmt.Sprintf("%s in %d requests", size(s.DemandBytes+s.BackgroundBytes), s.DemandRequests+s.BackgroundRequests),
		fmt.Sprintf("reads waited %v, 95 of 100 no longer than %v", s.Stall.Round(time.Millisecond), short(s.Latency.Quantile(0.95))),
	}
	if s.BackgroundBytes > 0 {
		parts = append(parts, fmt.Sprintf("%.1f %% of the bytes read were prefetched", 100*s.Coverage()))
		if s.Late.Reads > 0 {
			parts = append(parts, fmt.Sprintf("%d reads of %s met theirs on the way and waited %v", s.Late.Reads, size(s.Late.Bytes), short(s.Late.Wait)))
		}
		parts = append(parts, fmt.Sprintf("%.1f %% of the bytes prefetched were read, %s were not", 100*s.Accuracy(), size(s.Unused)))
	}
	return strings.Join(parts, "; ")
}

// short prints a time with three digits or so.
func short(d time.Duration) time.Duration {
	switch {
	case d >= time.Second:
		return d.Round(10 * time.Millisecond)
	case d >= time.Millisecond:
		return d.Round(100 * time.Microsecond)
	}
	return d.Round(time.Microsecond)
}

// phaseAt is when the start had come to a phase, 0 if it never has.
func phaseAt(r *node.Report, name string) time.Duration {
	for _, p := range r.Phases {
		if p.Name == name {
			return p.At
		}
	}
	return 0
}
