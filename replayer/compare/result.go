package compare

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
	"time"
)

// Result is what a comparison found. Its JSON form is what `demo --json` and
// `compare --json` print.
type Result struct {
	Image    string            `json:"image"`
	Manifest string            `json:"manifest"`
	Layers   int               `json:"layers"`
	Link     string            `json:"link,omitempty"`
	Workload string            `json:"workload"`
	Runs     int               `json:"runs"`
	Modes    map[Mode]*Figures `json:"modes"`
	Paired   map[string]*Ratio `json:"paired,omitempty"` // ratios of ready times, run by run: "replay/lazy"
	Slowest  map[Mode][]string `json:"slowest"`          // the steps of each mode's slowest start
	Typical  map[Mode][]string `json:"typical"`          // and of its median start
	Said     map[Mode][]string `json:"said"`             // what the median start's --explain said of the trace
	Exits    map[Mode][]int    `json:"exits"`            // status of each start, which SIGTERM ended

	variants []Variant
	typical  map[Mode]start
}

// Figures are the measurements of one mode.
type Figures struct {
	Ready    *Series `json:"ready_seconds"`
	Process  *Series `json:"process_seconds"` // until the container's process was started
	Stall    *Series `json:"stall_seconds"`
	Requests *Series `json:"requests"`
	Bytes    *Series `json:"bytes"`
	Serial   *Series `json:"serial_seconds"`
	Coverage *Series `json:"coverage"`
	Accuracy *Series `json:"accuracy"`
	CPU      *Series `json:"cpu_seconds"` // of reprise, not of the container
}

// A Series is one figure over all runs.
type Series struct {
	Median float64   `json:"median"`
	P95    float64   `json:"p95"`
	Min    float64   `json:"min"`
	Max    float64   `json:"max"`
	Runs   []float64 `json:"runs"`
}

func newSeries(runs []float64) *Series {
	s := &Series{Runs: runs}
	if len(runs) == 0 {
		return s
	}
	sorted := slices.Sorted(slices.Values(runs))
	s.Min, s.Max = sorted[0], sorted[len(sorted)-1]
	s.Median, s.P95 = quantile(sorted, 0.5), quantile(sorted, 0.95)
	return s
}

// quantile interpolates linearly between the ranks of sorted values.
func quantile(sorted []float64, q float64) float64 {
	at := q * float64(len(sorted)-1)
	lo := int(math.Floor(at))
	hi := min(lo+1, len(sorted)-1)
	return sorted[lo] + (at-float64(lo))*(sorted[hi]-sorted[lo])
}

func series(starts []start, f func(start) float64) *Series {
	runs := make([]float64, len(starts))
	for i, s := range starts {
		runs[i] = f(s)
	}
	return newSeries(runs)
}

func (c *comparison) result() *Result {
	r := &Result{
		Image: c.o.Ref, Runs: c.o.Runs, Modes: map[Mode]*Figures{}, Paired: map[string]*Ratio{}, Slowest: map[Mode][]string{},
		Typical: map[Mode][]string{}, Said: map[Mode][]string{}, Exits: map[Mode][]int{},
		variants: c.o.Variants, typical: map[Mode]start{},
	}
	if c.o.Link != nil {
		r.Link = c.o.Link.Spec().String()
	}
	for _, v := range c.o.Variants {
		r.add(v, c.starts[v.Name])
		if base := c.starts[v.Against]; v.Against != v.Name && len(base) > 0 {
			r.Paired[pair(v)] = ratios(c.starts[v.Name], base)
		}
	}
	return r
}

// pair is the key of a variant in Result.Paired.
func pair(v Variant) string { return fmt.Sprintf("%s/%s", v.Name, v.Against) }

func (r *Result) add(v Variant, starts []start) {
	sorted := slices.SortedFunc(slices.Values(starts), func(a, b start) int { return cmp.Compare(a.Ready, b.Ready) })
	typical, slowest := sorted[(len(sorted)-1)/2], sorted[len(sorted)-1]
	r.Manifest, r.Layers, r.Workload = typical.Report.Manifest, typical.Report.Layers, typical.Report.Workload
	r.Modes[v.Name], r.typical[v.Name] = figures(starts), typical
	r.Typical[v.Name], r.Slowest[v.Name], r.Said[v.Name] = steps(typical), steps(slowest), typical.Said
	for _, s := range starts {
		r.Exits[v.Name] = append(r.Exits[v.Name], s.Exit)
	}
}

func figures(starts []start) *Figures {
	return &Figures{
		Ready:    series(starts, func(s start) float64 { return s.Ready.Seconds() }),
		Process:  series(starts, func(s start) float64 { return s.Process.Seconds() }),
		Stall:    series(starts, func(s start) float64 { return s.Stall.Seconds() }),
		Requests: series(starts, func(s start) float64 { return float64(s.Requests) }),
		Bytes:    series(starts, func(s start) float64 { return float64(s.Bytes) }),
		Serial:   series(starts, func(s start) float64 { return s.Serial.Seconds() }),
		Coverage: series(starts, func(s start) float64 { return s.Coverage }),
		Accuracy: series(starts, func(s start) float64 { return s.Accuracy }),
		CPU:      series(starts, func(s start) float64 { return s.CPU.Seconds() }),
	}
}

// steps are the phases of a start.
func steps(s start) (steps []string) {
	for _, p := range s.Report.Phases {
		steps = append(steps, fmt.Sprintf("%s %v", p.Name, p.At.Round(time.Millisecond)))
	}
	return steps
}

// ratios pairs the ready times of the same round.
func ratios(a, b []start) *Ratio {
	var rs []float64
	for i := range min(len(a), len(b)) {
		rs = append(rs, a[i].Ready.Seconds()/b[i].Ready.Seconds())
	}
	return newRatio(rs)
}

// WriteJSON prints the result for machines.
func (r *Result) WriteJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// WriteTable prints the result for people.
func (r *Result) WriteTable(w io.Writer) error {
	link := ""
	if r.Link != "" {
		link = ", link " + r.Link
	}
	fmt.Fprintf(w, "\n%s, %d layers%s, %d cold starts a mode, medians\n\n", r.Workload, r.Layers, link, r.Runs)
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "start\tready\tof lazy\twaiting for bytes\trequests\tbytes\tone request alone\tserved by prefetch\t")
	for _, v := range r.variants {
		f := r.Modes[v.Name]
		ratio, served := "", ""
		if p := r.Paired[pair(v)]; p != nil {
			ratio = fmt.Sprintf("%.2f", p.Median)
		}
		if v.Trace != "none" {
			served = fmt.Sprintf("%.1f %%", 100*f.Coverage.Median)
		}
		fmt.Fprintf(t, "%s\t%.2f s\t%s\t%.2f s\t%.0f\t%.1f MB\t%.2f s\t%s\t\n", v.Name, f.Ready.Median, ratio,
			f.Stall.Median, f.Requests.Median, f.Bytes.Median/1e6, f.Serial.Median, served)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprint(w, legend)
	return err
}

const legend = `
ready               from the command to the moment the container serves
waiting for bytes   while at least one read of the container waited for the registry
one request alone   the longest time with exactly one request in flight
served by prefetch  share of the bytes read that had been, or were being, fetched ahead
`
