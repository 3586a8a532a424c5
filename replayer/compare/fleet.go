package compare

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/node"
)

// FleetOptions say what [Fleet] starts.
type FleetOptions struct {
	Program string
	Env     []string // of the program; this process's own by default
	// Refs are the images of the containers; one may be there several times.
	Refs  []string
	Flags []string // of each `reprise run`
	Args  []string // the containers', after --; the images' own by default
	// Rounds of each mode, 3 by default.
	Rounds int
	Dir    string
	Link   *regtest.Link
	// Timeout bounds a round, 2 minutes by default.
	Timeout  time.Duration
	Progress func(mode Mode, round, rounds int)
}

// FleetResult is what a fleet's starts have shown.
type FleetResult struct {
	Link   string                 `json:"link"`
	Refs   []string               `json:"images"`
	Modes  map[Mode]*FleetFigures `json:"modes"`
	Paired map[string]*Ratio      `json:"paired"` // p95, p99, wait, mean and last of Replay by those of Lazy, round by round
}

// FleetFigures are those of one mode, a value a round.
type FleetFigures struct {
	// Of the waits for bytes of all containers' reads, until each was ready.
	P95  *Series `json:"demand_p95_seconds"`
	P99  *Series `json:"demand_p99_seconds"`
	Wait *Series `json:"demand_wait_seconds"` // in all

	Mean     *Series `json:"ready_mean_seconds"`
	Last     *Series `json:"ready_last_seconds"`
	Requests *Series `json:"requests"`
	Bytes    *Series `json:"bytes"`
}

// fleetRound is one round of one mode.
type fleetRound struct {
	ready           []time.Duration
	waits           backstore.Histogram // of all containers, each until it was ready
	requests, bytes int64
}

// Fleet starts all containers at once through one daemon, without traces and
// with them in turn, on a node that has nothing.
func Fleet(ctx context.Context, o FleetOptions) (*FleetResult, error) {
	o.Rounds, o.Timeout = cmp.Or(o.Rounds, 3), cmp.Or(o.Timeout, 2*time.Minute)
	rounds := map[Mode][]fleetRound{}
	for i := range o.Rounds {
		modes := []Mode{Lazy, Replay}
		if i%2 == 1 {
			modes[0], modes[1] = modes[1], modes[0]
		}
		for _, m := range modes {
			if o.Progress != nil {
				o.Progress(m, i+1, o.Rounds)
			}
			r, err := fleetOnce(ctx, &o, m)
			if err != nil {
				return nil, fmt.Errorf("fleet: %s, round %d: %w", m, i+1, err)
			}
			rounds[m] = append(rounds[m], r)
		}
	}
	return fleetResult(&o, rounds), nil
}

func fleetResult(o *FleetOptions, rounds map[Mode][]fleetRound) *FleetResult {
	r := &FleetResult{Link: o.Link.Spec().String(), Refs: o.Refs, Modes: map[Mode]*FleetFigures{}, Paired: map[string]*Ratio{}}
	for m, rs := range rounds {
		f := func(value func(fleetRound) float64) *Series {
			var values []float64
			for _, r := range rs {
				values = append(values, value(r))
			}
			return newSeries(values)
		}
		r.Modes[m] = &FleetFigures{
			P95:      f(func(r fleetRound) float64 { return r.waits.Quantile(0.95).Seconds() }),
			P99:      f(func(r fleetRound) float64 { return r.waits.Quantile(0.99).Seconds() }),
			Wait:     f(func(r fleetRound) float64 { return r.waits.Sum.Seconds() }),
			Mean:     f(func(r fleetRound) float64 { return mean(r.ready).Seconds() }),
			Last:     f(func(r fleetRound) float64 { return longest(r.ready).Seconds() }),
			Requests: f(func(r fleetRound) float64 { return float64(r.requests) }),
			Bytes:    f(func(r fleetRound) float64 { return float64(r.bytes) }),
		}
	}
	lazy, replay := r.Modes[Lazy], r.Modes[Replay]
	for key, of := range fleetRatios {
		r.Paired[key] = newRatio(divide(of(replay).Runs, of(lazy).Runs))
	}
	return r
}

// fleetRatios are what is compared round by round.
var fleetRatios = map[string]func(*FleetFigures) *Series{
	"p95":  func(f *FleetFigures) *Series { return f.P95 },
	"p99":  func(f *FleetFigures) *Series { return f.P99 },
	"wait": func(f *FleetFigures) *Series { return f.Wait },
	"mean": func(f *FleetFigures) *Series { return f.Mean },
	"last": func(f *FleetFigures) *Series { return f.Last },
}

// fleetOnce is one round on a state directory of its own.
func fleetOnce(ctx context.Context, o *FleetOptions, m Mode) (r fleetRound, err error) {
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	root, err := os.MkdirTemp(o.Dir, "fleet-")
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	if err := dropCaches(o.Dir); err != nil {
		return r, err
	}
	stop, err := startDaemon(ctx, o.Program, o.Env, root)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	o.Link.Reset()
	reports, err := startAll(ctx, o, m, root)
	if err != nil {
		return r, err
	}
	for _, s := range reports {
		r.ready = append(r.ready, s.Ready)
		r.waits = r.waits.Merge(s.Report.Start.Stats.Latency)
	}
	link := o.Link.Stats()
	r.requests, r.bytes = link.Requests, link.BytesSent
	return r, nil
}

// startDaemon starts a daemon and waits until it answers. stop ends it.
func startDaemon(ctx context.Context, program string, env []string, root string, flags ...string) (stop func() error, err error) {
	cmd := exec.Command(program, append([]string{"daemon", "--root", root}, flags...)...)
	cmd.Env = env
	return startServer(ctx, cmd, func(ctx context.Context) error {
		c, err := node.Dial(ctx, root)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// startServer starts a program that serves and waits until answers gives no error.
// stop ends it.
func startServer(ctx context.Context, cmd *exec.Cmd, answers func(context.Context) error) (stop func() error, err error) {
	name := filepath.Base(cmd.Path)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt from the keyboard is not for it
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stop = func() error {
		_ = cmd.Process.Signal(unix.SIGTERM)
		kill := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		if err := <-ended; err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, said.String())
		}
		return nil
	}
	for {
		if answers(ctx) == nil {
			return stop, nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case err := <-ended:
			return nil, fmt.Errorf("%s: %w: %s", name, err, said.String())
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), stop())
		}
	}
}

// startAll starts the containers at once, and ends them when all are ready.
func startAll(ctx context.Context, o *FleetOptions, m Mode, root string) ([]start, error) {
	trace := "none"
	if m == Replay {
		trace = "auto"
	}
	starts, errs := make([]start, len(o.Refs)), make([]error, len(o.Refs))
	var ready, over sync.WaitGroup
	ready.Add(len(o.Refs))
	all := make(chan struct{})
	for i, ref := range o.Refs {
		over.Go(func() {
			argv := slices.Concat([]string{"run", "--root", root, "--trace", trace, "--report-fd", "3"}, o.Flags, []string{ref})
			if len(o.Args) > 0 {
				argv = append(append(argv, "--"), o.Args...)
			}
			p, err := runUntilReady(ctx, o.Program, o.Env, argv, func() { ready.Done(); <-all })
			if err != nil {
				errs[i] = fmt.Errorf("%s: %w", ref, err)
				return
			}
			starts[i] = start{Begin: p.begin, Ready: p.report.ReadyAt.Sub(p.begin), Report: p.report}
		})
	}
	ready.Wait()
	close(all)
	over.Wait()
	return starts, errors.Join(errs...)
}

// WriteTable prints the result for people.
func (r *FleetResult) WriteTable(w io.Writer) error {
	fmt.Fprintf(w, "\n%d containers at once through one daemon, link %s, %d rounds, medians\n\n", len(r.Refs), r.Link, len(r.Modes[Lazy].P95.Runs))
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "start\tdemand reads, p95\tp99\tall waits\tready, mean\tready, last\trequests\tbytes\t")
	for _, m := range []Mode{Lazy, Replay} {
		f := r.Modes[m]
		fmt.Fprintf(t, "%s\t%.1f ms\t%.1f ms\t%.1f s\t%.2f s\t%.2f s\t%.0f\t%.1f MB\t\n", m, 1e3*f.P95.Median, 1e3*f.P99.Median,
			f.Wait.Median, f.Mean.Median, f.Last.Median, f.Requests.Median, f.Bytes.Median/1e6)
	}
	ratios, intervals := "by lazy\t", "95 %\t"
	for _, key := range []string{"p95", "p99", "wait", "mean", "last"} {
		p := r.Paired[key]
		ratios += fmt.Sprintf("%.2f\t", p.Median)
		intervals += fmt.Sprintf("%.2f–%.2f\t", p.Low, p.High)
	}
	fmt.Fprintf(t, "%s\t\t\n%s\t\t\n", ratios, intervals)
	return t.Flush()
}
