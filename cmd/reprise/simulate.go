package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer"
	"github.com/reprise-project/reprise/tracefmt"
)

// simulateFlags are what simulate is asked.
type simulateFlags struct {
	o     replayer.SimOptions
	links []string
	gaps  []string
	piece string
	think string
	trace string
	json  bool
}

func newSimulate() *cobra.Command {
	var f simulateFlags
	cmd := &cobra.Command{
		Use:   "simulate TRACE…",
		Short: "Compute what a start, or a fleet's starts, would take on a modelled link",
		Long: `Compute what a start takes on a modelled link: lazily, with its trace, and with
all bytes on the node, beside the lower bound of any way to fetch them. Nothing is
fetched or started. Several traces, or copies of them, start at once on one node.

The reads, and what was computed between them, are those of the trace. Give a
recording of a warm start (record again with the same --root) as --think, since
a trace from a cold one also has in it what its requests cost.`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, traces []string) error { return f.run(cmd, traces) },
	}
	fs := cmd.Flags()
	fs.StringArrayVar(&f.links, "link", []string{"10ms,200mbit", "30ms,1gbit", "2ms,2gbit"}, "a link to the registry, DELAY,RATE; may be given again")
	fs.StringSliceVar(&f.gaps, "gap", nil, "what a replay fetches rather than sending another request, bytes, or with K or M; a list gives a row each (default: the planner's)")
	fs.StringVar(&f.think, "think", "", "recording of a warm start, for the time between the reads (default: that of each trace, without its waits)")
	fs.StringVar(&f.trace, "trace", "", "replay this trace instead of each start's own")
	fs.IntVar(&f.o.Copies, "copies", 1, "how many containers of each trace start at once")
	fs.IntVar(&f.o.RoundTrips, "round-trips", 3, "round trips before the first bytes of a layer, in the lower bound")
	fs.DurationVar(&f.o.StartCPU, "start-cpu", 20*time.Millisecond, "from the command until the image is open, without the registry")
	fs.IntVar(&f.o.Lookup, "lookup", 1, "round trips from the manifest to the trace")
	fs.Float64Var(&f.o.Scheduler.Window, "window", 1.5, "prefetch under way, in bandwidth × delay")
	fs.StringVar(&f.piece, "piece", "", "the most that one prefetch request asks for, bytes, or with K or M (default: what a round trip brings, 1M to 4M)")
	fs.BoolVar(&f.json, "json", false, "print JSON")
	return cmd
}

func (f *simulateFlags) run(cmd *cobra.Command, traces []string) error {
	if err := f.check(cmd); err != nil {
		return err
	}
	links, err := f.parseLinks()
	if err != nil {
		return usagef(cmd, "--link: %v", err)
	}
	gaps, err := f.parseGaps()
	if err != nil {
		return usagef(cmd, "--gap: %v", err)
	}
	ws, names, err := f.workloads(traces)
	if err != nil {
		return err
	}
	var out []simulated
	for _, l := range links {
		s, err := f.simulate(ws, l, gaps)
		if err != nil {
			return err
		}
		s.Traces, s.Copies = names, f.o.Copies
		out = append(out, *s)
	}
	if f.json {
		return printJSON(cmd, out)
	}
	for i := range out {
		if err := out[i].print(cmd.OutOrStdout()); err != nil {
			return err
		}
	}
	return nil
}

// check turns the flags into options whose zero fields have been meant.
func (f *simulateFlags) check(cmd *cobra.Command) (err error) {
	switch {
	case f.o.Copies < 1 || f.o.Copies > 1000:
		return usagef(cmd, "--copies %d: not from 1 to 1000", f.o.Copies)
	case f.o.RoundTrips < 1 || f.o.RoundTrips > 1000:
		return usagef(cmd, "--round-trips %d: not from 1 to 1000", f.o.RoundTrips)
	case f.o.StartCPU < 0:
		return usagef(cmd, "--start-cpu %v: cannot be negative", f.o.StartCPU)
	case f.o.Lookup < 0 || f.o.Lookup > 1000:
		return usagef(cmd, "--lookup %d: not from 0 to 1000", f.o.Lookup)
	case !(f.o.Scheduler.Window > 0 && f.o.Scheduler.Window <= 1000):
		return usagef(cmd, "--window %v: above 0 and at most 1000", f.o.Scheduler.Window)
	}
	if f.o.Lookup == 0 {
		f.o.Lookup = -1
	}
	if f.o.StartCPU == 0 {
		f.o.StartCPU = -1
	}
	if f.piece == "" {
		return nil
	}
	f.o.Scheduler.Piece, err = parseSize(f.piece)
	if err != nil || f.o.Scheduler.Piece < 4<<10 {
		return usagef(cmd, "--piece %s: a size of at least 4K", f.piece)
	}
	return nil
}

func (f *simulateFlags) parseLinks() ([]regtest.LinkSpec, error) {
	var links []regtest.LinkSpec
	for _, s := range f.links {
		l, err := regtest.ParseLink(s)
		if err != nil {
			return nil, err
		}
		if l != (regtest.LinkSpec{Delay: l.Delay, Rate: l.Rate}) {
			return nil, fmt.Errorf("%s: only DELAY,RATE is modelled, no faults", s)
		}
		links = append(links, l)
	}
	return links, nil
}

// parseGaps gives the planner's values: 0 is its default, negative none.
func (f *simulateFlags) parseGaps() ([]int64, error) {
	if len(f.gaps) == 0 {
		return []int64{0}, nil
	}
	var gaps []int64
	for _, s := range f.gaps {
		n, err := parseSize(s)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			n = -1
		}
		gaps = append(gaps, n)
	}
	return gaps, nil
}

// parseSize reads a number of bytes, KiB with K or MiB with M behind it.
func parseSize(s string) (int64, error) {
	num, unit := s, int64(1)
	for suffix, n := range map[string]int64{"K": 1 << 10, "M": 1 << 20} {
		if cut, ok := strings.CutSuffix(s, suffix); ok {
			num, unit = cut, n
		}
	}
	n, err := strconv.ParseInt(num, 10, 32)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%q: want bytes, as in 65536, 64K or 1M", s)
	}
	return n * unit, nil
}

func (f *simulateFlags) workloads(traces []string) (ws []*replayer.Workload, names []string, err error) {
	var think *tracefmt.Trace
	if f.think != "" {
		if think, err = tracefmt.Open(f.think); err != nil {
			return nil, nil, err
		}
	}
	if f.trace != "" {
		if f.o.Trace, err = tracefmt.Open(f.trace); err != nil {
			return nil, nil, err
		}
	}
	for _, path := range traces {
		t, err := tracefmt.Open(path)
		if err != nil {
			return nil, nil, err
		}
		w, err := replayer.NewWorkload(t, think)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", path, err)
		}
		ws, names = append(ws, w), append(names, path)
	}
	return ws, names, nil
}

// simulated is what was found for one link, and what simulate --json prints of
// it.
type simulated struct {
	Link   string         `json:"link"`
	Traces []string       `json:"traces"`
	Copies int            `json:"copies"`
	Bound  float64        `json:"lower_bound_seconds"`
	Starts []simulatedRow `json:"starts"`
}

type simulatedRow struct {
	Mode     replayer.SimMode `json:"mode"`
	Gap      *int64           `json:"gap,omitempty"` // bytes; of a replay with --gap
	Ready    float64          `json:"ready_seconds"` // the last start
	Each     []float64        `json:"ready_seconds_each"`
	OfBound  float64          `json:"of_lower_bound"`
	Stall    float64          `json:"stall_seconds"`
	Idle     float64          `json:"idle_seconds"` // reads waited, and the link sent nothing
	WaitP95  float64          `json:"wait_p95_seconds"`
	Requests int64            `json:"requests"`
	Bytes    int64            `json:"bytes"`
	Coverage float64          `json:"coverage"`
	Accuracy float64          `json:"accuracy"`
	Late     float64          `json:"late_seconds"`
	Sent     int64            `json:"prefetch_requests"`
	Fetched  int64            `json:"prefetch_bytes"`
}

// simulate runs all modes on one link.
func (f *simulateFlags) simulate(ws []*replayer.Workload, l regtest.LinkSpec, gaps []int64) (*simulated, error) {
	o := f.o
	o.Link = replayer.Link{Delay: l.Delay, Rate: l.Rate}
	bound, err := replayer.LowerBound(ws, &o)
	if err != nil {
		return nil, err
	}
	s := &simulated{Link: l.String(), Bound: bound.Seconds()}
	add := func(m replayer.SimMode, gap *int64) error {
		r, err := replayer.Simulate(ws, m, &o)
		if err != nil {
			return err
		}
		row := simulatedRow{
			Mode: m, Gap: gap, Ready: r.Ready.Seconds(), OfBound: r.Ready.Seconds() / bound.Seconds(), Stall: r.Stall.Seconds(), Idle: r.Idle.Seconds(),
			WaitP95: r.WaitP95.Seconds(), Requests: r.Requests, Bytes: r.Bytes, Coverage: r.Coverage, Accuracy: r.Accuracy,
			Late: r.Late.Seconds(), Sent: r.Sent, Fetched: r.Fetched,
		}
		for _, at := range r.Starts {
			row.Each = append(row.Each, at.Seconds())
		}
		s.Starts = append(s.Starts, row)
		return nil
	}
	errs := []error{add(replayer.SimWarm, nil)}
	for _, g := range gaps {
		o.Plan = &replayer.Options{Gap: g}
		shown := max(g, 0)
		if g == 0 {
			errs = append(errs, add(replayer.SimReplay, nil))
			continue
		}
		errs = append(errs, add(replayer.SimReplay, &shown))
	}
	return s, errors.Join(append(errs, add(replayer.SimLazy, nil))...)
}

func (s *simulated) print(w io.Writer) error {
	starts := "1 start"
	if n := len(s.Traces) * s.Copies; n > 1 {
		starts = fmt.Sprintf("%d starts at once", n)
	}
	fmt.Fprintf(w, "\nlink %s, %s, ready after\n\n", s.Link, starts)
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "start\tready\tof bound\twaiting for bytes\tlink idle then\trequests\tbytes\tserved by prefetch\tprefetched and read\t")
	fmt.Fprintf(t, "lower bound\t%.3f s\t1.00\t\t\t\t\t\t\t\n", s.Bound)
	for _, r := range s.Starts {
		name, served, read := string(r.Mode), "", ""
		if r.Gap != nil {
			name += ", gap " + size(*r.Gap)
		}
		if r.Mode == replayer.SimReplay {
			served, read = fmt.Sprintf("%.1f %%", 100*r.Coverage), fmt.Sprintf("%.1f %%", 100*r.Accuracy)
		}
		fmt.Fprintf(t, "%s\t%.3f s\t%.2f\t%.3f s\t%.3f s\t%d\t%.1f MB\t%s\t%s\t\n",
			name, r.Ready, r.OfBound, r.Stall, r.Idle, r.Requests, float64(r.Bytes)/1e6, served, read)
	}
	return t.Flush()
}
