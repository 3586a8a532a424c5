package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/recorder/container"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/tracefmt"
)

// How a tail ends that nobody has chosen: when nothing new is read for settle,
// or after defaultTail.
const (
	settle      = 2 * time.Second
	defaultTail = time.Minute
)

// recordFlags are those of record alone.
type recordFlags struct {
	node      nodeFlags
	trace     traceFlags
	container containerFlags
	device    deviceFlags
	rules     recorder.Options
	maxBytes  string
	out       string
	attach    bool
	runs      int
	merge     string
	mode      tracefmt.MergeMode
}

func newRecord() *cobra.Command {
	f := &recordFlags{}
	cmd := &cobra.Command{
		Use:   "record REF [-- CMD…] | record --device /dev/X [REF]",
		Short: "Run a container and write down which blocks its start reads",
		Long: `Run a container and write a trace of its start.

The recording ends, and the container with it, when the first of these comes; the
reason is in the trace:

  ready     The container is ready: as one of the --ready flags says, or, without
            one, when it listens on a TCP port or exits with status 0. The
            recording goes on until nothing new was read for 2 s, for services
            that listen first and load the rest after; --tail gives a time
            instead, and --tail 0 none. An exit needs no tail.
  quiet     Nothing new was read for --quiet, since the first read. The time in
            which a read waits for the registry does not count. It is a guess at
            being ready: with a --ready flag it is off unless --quiet is given.
  duration, bytes, events
            --for, --max-bytes or --max-events is reached.
  stop      The command is interrupted, or the container has ended.

The trace names the files that were read and, where the kernel has BTF and the
command the privilege for eBPF, the processes that read; a line says what could
not be found out. Files are looked for after the end: the trace is complete in
its file before that.

With --runs the start is recorded several times, each time as if nothing of the
image were on this machine, and the traces are merged: the default, union, has
what any of them has read, since a read that waits costs far more than some bytes
that are fetched for nothing.

With --device nothing is run: the reads of that block device, a whole disk or a
partition, are recorded by eBPF, whoever serves it: a loop device, an NBD, a TCMU
device of overlaybd. With REF, the image on it, the trace is mapped to the image's
layers and files at the end; without, it stays one of the device. --ready-port is
of the whole machine, or, with --pid, of the container that the process is in. A
read that waits counts as quiet.

The image is served by this process itself: when it is killed the recording ends,
and the container with it.`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, a []string) error {
			if f.device.given(cmd) {
				return f.recordDevice(cmd, a)
			}
			ref, rest, err := refAndArgs(cmd, a)
			if err != nil {
				return err
			}
			if err := f.check(cmd); err != nil {
				return err
			}
			cfg, err := f.container.config(cmd)
			if err != nil {
				return err
			}
			if err := needRoot("record", "to attach a block device and start a container"); err != nil {
				return err
			}
			return f.record(cmd, ref, rest, cfg)
		},
	}
	f.add(cmd)
	return cmd
}

func (f *recordFlags) add(cmd *cobra.Command) {
	f.node.add(cmd)
	f.trace.addWorkload(cmd)
	f.container.add(cmd)
	f.device.add(cmd)
	fs := cmd.Flags()
	fs.StringVarP(&f.out, "output", "o", "", "file for the trace; must not exist")
	fs.BoolVar(&f.attach, "attach", false, "put the trace beside the image in its registry")
	fs.DurationVar(&f.rules.Tail, "tail", 0, "go on for so long after the container is ready (default: until nothing new was read for 2 s)")
	fs.DurationVar(&f.rules.Quiet, "quiet", 5*time.Second, "stop when nothing new was read for so long; negative for never")
	fs.DurationVar(&f.rules.MaxDuration, "for", time.Minute, "stop after so long at the latest; negative for never")
	fs.StringVar(&f.maxBytes, "max-bytes", "", "stop when so much was read: bytes, or K or M behind the number")
	fs.IntVar(&f.rules.MaxEvents, "max-events", 0, "stop after so many reads of something new")
	fs.IntVar(&f.runs, "runs", 1, "record so many cold starts, and merge them")
	fs.StringVar(&f.merge, "merge", tracefmt.MergeUnion.String(), "what a merged trace has: union, majority or intersection of what was read")
}

// check finds what is wrong with the flags, and fills what others decide.
func (f *recordFlags) check(cmd *cobra.Command) (err error) {
	if f.out == "" && !f.attach {
		return usagef(cmd, "name a file for the trace with -o, or put it beside the image with --attach")
	}
	if f.mode, err = tracefmt.ParseMergeMode(f.merge); err != nil {
		return usagef(cmd, "--merge: %v", err)
	}
	changed := cmd.Flags().Changed
	switch {
	case f.runs < 1 || f.runs > maxRuns:
		return usagef(cmd, "--runs %d: from 1 to %d", f.runs, maxRuns)
	case changed("merge") && f.runs == 1:
		return usagef(cmd, "--merge is for several --runs")
	case f.rules.Tail < 0:
		return usagef(cmd, "--tail %v: it cannot be negative", f.rules.Tail)
	case changed("max-events") && (f.rules.MaxEvents < 1 || f.rules.MaxEvents > tracefmt.MaxEvents):
		return usagef(cmd, "--max-events %d: from 1 to %d", f.rules.MaxEvents, tracefmt.MaxEvents)
	}
	if f.maxBytes != "" {
		if f.rules.MaxBytes, err = parseSize(f.maxBytes); err != nil || f.rules.MaxBytes < 1 {
			return usagef(cmd, "--max-bytes %s: a number of bytes, as 1000000 or 64M", f.maxBytes)
		}
	}
	if !changed("tail") {
		f.rules.Tail, f.rules.Settle = defaultTail, settle
	}
	if f.container.hasRule() && !changed("quiet") {
		f.rules.Quiet = -1
	}
	return cmp.Or(f.node.check(cmd), f.trace.check(cmd))
}

// maxRuns is how many recordings one command makes.
const maxRuns = 100

// hasRule tells whether it was said when a container is ready.
func (f *containerFlags) hasRule() bool {
	return f.port != 0 || f.log != "" || f.http != "" || len(f.exec) > 0 || f.exit
}

func (f *recordFlags) record(cmd *cobra.Command, ref string, args []string, cfg container.Config) error {
	out, remove, err := traceFile(f.out)
	if err != nil {
		return err
	}
	defer remove()
	defer out.Close()
	f.trace.trace = "none"
	o := &node.RecordOptions{Rules: f.rules, Run: node.RunOptions{
		Request: f.node.request(ref, &f.trace), Args: args, Config: cfg,
		Stdin: os.Stdin, Stdout: cmd.ErrOrStderr(), Stderr: cmd.ErrOrStderr(),
	}}
	n, err := f.node.open(cmd)
	if err != nil {
		return err
	}
	if f.runs > 1 {
		err = f.recordRuns(cmd, n, ref, out, o)
	} else {
		err = recordOnce(cmd, n, ref, out, o)
	}
	if err == nil && f.attach {
		// Also after an interrupt, which is one way to end a recording.
		err = attachFile(context.WithoutCancel(cmd.Context()), cmd.OutOrStdout(), n.Registry(), ref, out.Name(), attachOptions{})
	}
	return errors.Join(err, n.Close())
}

// recordOnce records into a file and says what that has got. The trace of a
// container that failed is there to be looked at, but no good.
func recordOnce(cmd *cobra.Command, n *node.Node, ref string, f *node.TraceFile, o *node.RecordOptions) error {
	rec, err := n.RecordFile(cmd.Context(), ref, f, o)
	var failed *container.ExitedError
	if err != nil && !errors.As(err, &failed) {
		return err
	}
	return errors.Join(err, summary(cmd, f.Name(), rec))
}

// traceFile makes the file that is recorded into. remove removes it if it was
// not named.
func traceFile(name string) (f *node.TraceFile, remove func(), err error) {
	remove = func() {}
	if name == "" {
		dir, err := os.MkdirTemp("", "reprise-")
		if err != nil {
			return nil, nil, err
		}
		name, remove = filepath.Join(dir, "trace"), func() { _ = os.RemoveAll(dir) }
	}
	if f, err = createTrace(name); err != nil {
		remove()
		return nil, nil, err
	}
	return f, remove, nil
}

func createTrace(name string) (*node.TraceFile, error) {
	f, err := node.CreateTrace(name)
	if errors.Is(err, os.ErrExist) {
		err = errExists(name)
	}
	return f, err
}

func summary(cmd *cobra.Command, path string, rec *node.Recording) error {
	t, err := tracefmt.Open(path)
	if err != nil {
		return fmt.Errorf("read back the trace: %w", err)
	}
	first := t.FirstTouch()
	if len(first) == 0 {
		return errors.New("nothing was read from the image: the trace is empty")
	}
	w := cmd.ErrOrStderr()
	fmt.Fprintf(w, "recorded %s in %d reads of workload %s, %s; ended by %s; recording took at most %s\n",
		size(t.Bytes()), len(first), t.Workload, readiness(t), rec.Reason, share(rec.Stats.CPU, t.End))
	for _, line := range rec.Missing {
		fmt.Fprintln(w, "reprise:", line)
	}
	return nil
}

func readiness(t *tracefmt.Trace) string {
	if t.End == nil || t.End.Ready <= 0 {
		return "never ready"
	}
	return "ready after " + t.End.Ready.Round(time.Millisecond).String()
}

// share is the part of one processor that the recording had.
func share(cpu time.Duration, end *tracefmt.End) string {
	if end == nil || end.Duration <= 0 {
		return "an unknown part of a processor"
	}
	return fmt.Sprintf("%.2f %% of a processor", 100*cpu.Seconds()/end.Duration.Seconds())
}
