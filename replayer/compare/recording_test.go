package compare

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/tracefmt"
)

// A startOf is a workload that is recorded without being told when it is ready.
// Each says a line that begins with "ready on" when it really is.
type startOf struct {
	name  string
	image string   // of the recipes
	entry []string // flags that replace its entrypoint
	args  []string // of the container, if not the image's own
	ready []string // flags for a replay, which is told; by default readyFlags
	ends  string   // how the reason begins for which its recording should end
}

// saysReady is what all workloads write when they are.
var saysReady = regexp.MustCompile(`^ready on `)

// command is `reprise run` or record of the workload on an image, with flags.
func (w *startOf) command(verb, root, ref string, flags ...string) []string {
	argv := slices.Concat([]string{verb, "--root", root}, w.entry, flags, []string{ref})
	if len(w.args) > 0 {
		argv = append(append(argv, "--"), w.args...)
	}
	return argv
}

func (w *startOf) readyFlags() []string {
	if w.ready != nil {
		return w.ready
	}
	return readyFlags
}

// imports is what a Python program of the image loads.
const imports = "import numpy, scipy.linalg, scipy.sparse, scipy.special, scipy.fft, pandas\n"

// python runs a script in the image of Python.
func python(name, ends, script string) startOf {
	return startOf{name: name, image: "python", ends: ends, entry: []string{"--entrypoint", "/usr/bin/python3"}, args: []string{"-u", "-c", script}}
}

// startsOf are the workloads that are recorded: the images' own, and what a rule
// of thumb for services might get wrong.
func startsOf() []startOf {
	job := python("python job", "ready: ", imports+"print(pandas.DataFrame(numpy.eye(9)).describe())\nprint('ready on exit')\n")
	job.ready = []string{"--net", "own", "--ready-exit"}
	const listen = "import socket\ns = socket.create_server(('127.0.0.1', 8080))\n"
	return []startOf{
		{name: "python", image: "python", ends: "ready: "},
		{name: "node", image: "node", ends: "ready: "},
		{name: "java", image: "java", ends: "ready: "},
		job,
		// Listens at once, and goes on loading for as long as the others do.
		python("listens early", "ready: ", listen+imports+"print('ready on 8080')\nwhile True: s.accept()\n"),
		// As if it waited for a database: no reads for a while.
		python("waits 3 s", "ready: ", "import numpy, time\ntime.sleep(3)\n"+imports+listen+"print('ready on 8080')\nwhile True: s.accept()\n"),
		python("never listens", "quiet: ", imports+"print('ready on nothing')\nimport time\ntime.sleep(1000)\n"),
	}
}

// A recordedStart is one recording, and what it was good for. Times are since
// the zero of the trace, in seconds.
type recordedStart struct {
	Workload string  `json:"workload"`
	Link     string  `json:"link"`
	Reason   string  `json:"reason"`
	Ready    float64 `json:"ready_seconds"` // as the recorder saw it; 0 never
	Said     float64 `json:"said_seconds"`  // the workload's own word
	End      float64 `json:"end_seconds"`
	Exit     float64 `json:"exit_seconds"` // of the command
	Events   int     `json:"events"`
	Bytes    int64   `json:"bytes"`
	Paths    float64 `json:"paths"`     // share of the bytes that have one
	Process  float64 `json:"processes"` // share of the bytes of which it is known who read them
	LastRead float64 `json:"last_read_seconds"`
	// Gap is the longest time without a first touch before the workload was ready.
	Gap float64 `json:"gap_seconds"`
	// Holds is the share of another start's demand, up to its readiness, that
	// the trace holds.
	Holds float64 `json:"holds"`
	// Of the cold replay, up to readiness.
	Coverage    float64 `json:"coverage"`
	Accuracy    float64 `json:"accuracy"`
	ReplayReady float64 `json:"replay_ready_seconds"`
	Explain     string  `json:"explain"`

	w     startOf
	trace *tracefmt.Trace
}

// recording records each workload without stop flags on a node that has nothing,
// and then starts it with that trace on one that has nothing.
func (b *coldBench) recording() {
	var all []*recordedStart
	spec := b.links[0]
	for _, w := range startsOf() {
		if !slices.Contains(b.images, w.image) {
			continue
		}
		for range b.count(1) {
			all = append(all, b.recordAndReplay(w, spec))
		}
	}
	b.keep("recording-"+spec, all)
	require.NoError(b.t, writeRecordings(os.Stdout, spec, all))
	for _, r := range all {
		r.judge(b)
	}
}

// minCoverage is what a replay of a recording without flags has to serve of the
// demand up to readiness.
const minCoverage = 0.98

// judge says what is not as it should be.
func (r *recordedStart) judge(b *coldBench) {
	if !strings.HasPrefix(r.Reason, r.w.ends) {
		b.t.Errorf("%s: ended by %q, not by %q", r.Workload, r.Reason, r.w.ends)
	}
	if r.Said == 0 {
		b.t.Errorf("%s: the recording ended after %.2f s, before the workload was ready", r.Workload, r.End)
	} else if r.End < r.Said {
		b.t.Errorf("%s: the recording ended after %.2f s, the workload was ready after %.2f s", r.Workload, r.End, r.Said)
	}
	if r.Holds < minCoverage {
		b.t.Errorf("%s: the trace holds %.1f %% of another start's demand", r.Workload, 100*r.Holds)
	}
	if r.Coverage < minCoverage {
		b.t.Errorf("%s: %.1f %% of the demand of a replay were fetched ahead", r.Workload, 100*r.Coverage)
	}
}

func (b *coldBench) recordAndReplay(w startOf, spec string) *recordedStart {
	_, srv, err := b.site.behind(b.ctx, spec)
	require.NoError(b.t, err)
	defer srv.Close()
	ref := srv.Addr + "/" + repository(w.image)
	file := b.site.path("recording.trace")
	defer os.Remove(file)
	got, err := b.site.recordWatched(b.ctx, &w, ref, file, "--net", "own")
	require.NoError(b.t, err, w.name)
	r := got.figures()
	r.Workload, r.Link, r.w = w.name, spec, w
	b.replayOf(r, ref, file)
	b.say("%s: %s at %.2f s; it said so at %.2f s; coverage %.2f %%", w.name, r.Reason, r.End, r.Said, 100*r.Coverage)

	again := b.site.path("again.trace")
	defer os.Remove(again)
	other, err := b.site.recordWatched(b.ctx, &w, ref, again, w.readyFlags()...)
	require.NoError(b.t, err, w.name)
	r.Holds = holds(r.trace, other.trace, other.trace.End.Ready)
	return r
}

// replayOf starts the workload with the trace, told when it is ready.
func (b *coldBench) replayOf(r *recordedStart, ref, file string) {
	root, err := os.MkdirTemp(b.site.dir, "replay-")
	require.NoError(b.t, err)
	defer os.RemoveAll(root)
	require.NoError(b.t, dropCaches(b.site.dir))
	ctx, cancel := context.WithTimeout(b.ctx, 2*time.Minute)
	defer cancel()
	argv := r.w.command("run", root, ref, append([]string{"--trace", file, "--explain", "--report-fd", "3"}, r.w.readyFlags()...)...)
	p, err := runUntilReady(ctx, b.site.program, nil, argv, func() {})
	require.NoError(b.t, err, r.Workload)
	require.NoError(b.t, replayed(p.report), r.Workload)
	s := newStart(&p)
	r.Coverage, r.Accuracy, r.ReplayReady = s.Coverage, s.Accuracy, s.Ready.Seconds()
	r.Explain = strings.Join(s.Said, "; ")
}

// A watched is a `reprise record` and when its container said that it was ready.
type watched struct {
	began, said, exited time.Time // said is zero if it never did
	output              string
	trace               *tracefmt.Trace
}

// recordWatched records on a node that has nothing, until the recording ends by
// itself.
func (s *coldSite) recordWatched(ctx context.Context, w *startOf, ref, file string, flags ...string) (*watched, error) {
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	root, err := os.MkdirTemp(s.dir, "record-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(root)
	if err := dropCaches(s.dir); err != nil {
		return nil, err
	}
	got, err := watch(ctx, s.program, w.command("record", root, ref, append([]string{"-o", file}, flags...)...), nil)
	if err != nil {
		return nil, err
	}
	got.trace, err = tracefmt.Open(file)
	if err == nil && got.trace.End == nil {
		err = fmt.Errorf("%s: the trace has no end", filepath.Base(file))
	}
	return got, err
}

// recordTime bounds a recording: by itself it takes a minute at the most.
const recordTime = 3 * time.Minute

// watch runs a command to its end, and returns what it has seen of it also if
// it failed. said, if set, is called at once when the
// container says that it is ready.
func watch(ctx context.Context, program string, argv []string, said func(cmd *exec.Cmd)) (*watched, error) {
	ctx, cancel := context.WithTimeout(ctx, recordTime)
	defer cancel()
	r, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, program, argv...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	w := &watched{began: time.Now()}
	err = cmd.Start()
	_ = out.Close()
	if err != nil {
		return nil, err
	}
	var all bytes.Buffer
	for lines := bufio.NewScanner(r); lines.Scan(); {
		if w.said.IsZero() && saysReady.Match(lines.Bytes()) {
			w.said = time.Now()
			if said != nil {
				said(cmd)
			}
		}
		fmt.Fprintln(&all, lines.Text())
	}
	err = cmd.Wait()
	w.exited, w.output = time.Now(), all.String()
	if err != nil {
		return w, explain(ctx, fmt.Errorf("%s: %w", argv[0], err), nil, w.output)
	}
	return w, nil
}

// figures are what the trace itself says.
func (w *watched) figures() *recordedStart {
	t := w.trace
	r := &recordedStart{
		Reason: t.End.Reason, Ready: t.End.Ready.Seconds(), End: t.End.Duration.Seconds(), Exit: w.exited.Sub(t.Start).Seconds(),
		Events: len(t.Events), Bytes: t.Bytes(), trace: t,
	}
	if !w.said.IsZero() {
		r.Said = w.said.Sub(t.Start).Seconds()
	}
	var all, paths, processes int64
	var before time.Duration
	for _, e := range t.FirstTouch() {
		all += e.Len
		if e.Path != "" {
			paths += e.Len
		}
		if e.Process != "" {
			processes += e.Len
		}
		if e.At.Seconds() < r.Said {
			r.Gap = max(r.Gap, (e.At - before).Seconds())
		}
		before = max(before, e.At+e.Wait)
	}
	r.LastRead = before.Seconds()
	r.Paths, r.Process = fraction(paths, all), fraction(processes, all)
	return r
}

func fraction(part, all int64) float64 {
	if all == 0 {
		return 0
	}
	return float64(part) / float64(all)
}

// holds is the share of the bytes that a start has read until some time that a
// trace of the same image has.
func holds(t, start *tracefmt.Trace, until time.Duration) float64 {
	var has tracefmt.Touched
	for _, e := range t.Events {
		has.Add(nil, e)
	}
	var all, missing int64
	for _, e := range start.FirstTouch() {
		if e.At > until {
			continue
		}
		all += e.Len
		for _, m := range has.Add(nil, e) {
			missing += m.Len
		}
	}
	if all == 0 {
		return 1
	}
	return 1 - fraction(missing, all)
}

func writeRecordings(w io.Writer, spec string, all []*recordedStart) error {
	fmt.Fprintf(w, "\nrecorded without stop flags on a link of %s; times since the image was open; each replayed cold\n\n", spec)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "workload\tseen ready\tsaid ready\tlongest gap\tlast read\tended\tgone\tevents\tMB\twith path\twith process\tholds\tcoverage\taccuracy\treplay ready\t ended by")
	for _, r := range all {
		fmt.Fprintf(t, "%s\t%.2f s\t%.2f s\t%.2f s\t%.2f s\t%.2f s\t%.2f s\t%d\t%.1f\t%.1f %%\t%.1f %%\t%.1f %%\t%.1f %%\t%.1f %%\t%.2f s\t %s\n", r.Workload,
			r.Ready, r.Said, r.Gap, r.LastRead, r.End, r.Exit, r.Events, float64(r.Bytes)/1e6, 100*r.Paths, 100*r.Process, 100*r.Holds, 100*r.Coverage,
			100*r.Accuracy, r.ReplayReady, r.Reason)
	}
	return t.Flush()
}
