package compare

import (
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"text/tabwriter"

	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/tracefmt"
)

// A Stability is what several recordings of the same start have in common.
type Stability struct {
	Workload  string              `json:"workload"`
	Agreement *tracefmt.Agreement `json:"agreement"`
	Kinds     []mergedKind        `json:"kinds"`
}

// A mergedKind is a way of making one trace of the recordings, and what it has
// of one more start.
type mergedKind struct {
	Name  string  `json:"name"` // a merge mode, or first for the first recording alone
	Bytes int64   `json:"bytes"`
	Holds float64 `json:"holds"` // share of another start's demand up to readiness
	Used  float64 `json:"used"`  // share of the trace's bytes that the other start read, ready or not
}

// stability records each image's own start several times, cold, and once more:
// what have the recordings in common, and which merge has most of the last?
func (b *coldBench) stability() {
	var all []*Stability
	for _, w := range startsOf() {
		if w.args != nil || !slices.Contains(b.images, w.image) {
			continue
		}
		all = append(all, b.stabilityOf(w))
	}
	b.keep("stability-"+b.links[0], all)
	require.NoError(b.t, writeStability(os.Stdout, all))
}

func (b *coldBench) stabilityOf(w startOf) *Stability {
	_, srv, err := b.site.behind(b.ctx, b.links[0])
	require.NoError(b.t, err)
	defer srv.Close()
	file := b.site.path("stability.trace")
	defer os.Remove(file)
	var traces []*tracefmt.Trace
	for range b.count(3) + 1 {
		got, err := b.site.recordWatched(b.ctx, &w, srv.Addr+"/"+repository(w.image), file, "--net", "own")
		require.NoError(b.t, err, w.name)
		traces = append(traces, got.trace)
	}
	other := traces[len(traces)-1]
	traces = traces[:len(traces)-1]
	s := &Stability{Workload: w.name, Kinds: []mergedKind{kindOf("first", traces[0], other)}}
	for _, mode := range []tracefmt.MergeMode{tracefmt.MergeUnion, tracefmt.MergeMajority, tracefmt.MergeIntersection} {
		merged, agreement, err := tracefmt.Merge(traces, mode)
		require.NoError(b.t, err, w.name)
		s.Agreement = agreement
		s.Kinds = append(s.Kinds, kindOf(mode.String(), merged, other))
	}
	b.say("%s: %.1f %% of %d extents in all of %d recordings", w.name, 100*fraction(int64(s.Agreement.ExtentsAll), int64(s.Agreement.Extents)),
		s.Agreement.Extents, s.Agreement.Runs)
	return s
}

func kindOf(name string, t, other *tracefmt.Trace) mergedKind {
	return mergedKind{
		Name: name, Bytes: t.Bytes(), Holds: holds(t, other, other.End.Ready), Used: holds(other, t, math.MaxInt64),
	}
}

func writeStability(w io.Writer, all []*Stability) error {
	fmt.Fprintf(w, "\nrecordings of the same start, merged, beside one more\n\n")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "workload\trecordings\textents in all\tof\tbytes in all\tmerge\tMB\tholds of another\tits bytes used\t")
	for _, s := range all {
		a := s.Agreement
		for _, k := range s.Kinds {
			fmt.Fprintf(t, "%s\t%d\t%.1f %%\t%d\t%.1f %%\t%s\t%.1f\t%.2f %%\t%.1f %%\t\n", s.Workload, a.Runs,
				100*fraction(int64(a.ExtentsAll), int64(a.Extents)), a.Extents, 100*fraction(a.BytesAll, a.Bytes),
				k.Name, float64(k.Bytes)/1e6, 100*k.Holds, 100*k.Used)
		}
	}
	return t.Flush()
}
