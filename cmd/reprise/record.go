package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/recorder/container"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/tracefmt"
)

func newRecord() *cobra.Command {
	var (
		nf     nodeFlags
		tf     traceFlags
		cf     containerFlags
		rules  recorder.Options
		out    string
		attach bool
	)
	cmd := &cobra.Command{
		Use:   "record REF [-- CMD…]",
		Short: "Run a container and write down which blocks its start reads",
		Long: `Run a container and write a trace of its start.

The recording ends, and the container with it, when the first of these comes:
the container is ready (see the --ready flags; by default when it listens or
exits) and --tail has passed; nothing new was read for --quiet; --for is over;
the command is interrupted.

The image is served by this process itself: when it is killed the recording ends,
and the container with it.`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, a []string) error {
			ref, rest, err := refAndArgs(cmd, a)
			if err != nil {
				return err
			}
			cfg, err := cf.config(cmd)
			if err != nil {
				return err
			}
			if out == "" && !attach {
				return usagef(cmd, "name a file for the trace with -o, or put it beside the image with --attach")
			}
			if err := cmp.Or(nf.check(cmd), tf.check(cmd)); err != nil {
				return err
			}
			if err := needRoot("record", "to attach a block device and start a container"); err != nil {
				return err
			}
			n, err := nf.open(cmd)
			if err != nil {
				return err
			}
			f, remove, err := traceFile(out)
			if err != nil {
				return errors.Join(err, n.Close())
			}
			defer remove()
			tf.trace = "none"
			o := &node.RecordOptions{Rules: rules, Out: f, Run: node.RunOptions{
				Request: nf.request(ref, &tf), Args: rest, Config: cfg,
				Stdin: os.Stdin, Stdout: cmd.ErrOrStderr(), Stderr: cmd.ErrOrStderr(),
			}}
			rec, err := n.Record(cmd.Context(), ref, o)
			if err = recorded(cmd, f, rec, err); err == nil && attach {
				// Also after an interrupt, which is one way to end a recording.
				err = attachFile(context.WithoutCancel(cmd.Context()), cmd.OutOrStdout(), n.Registry(), ref, f.Name(), attachOptions{})
			}
			return errors.Join(err, f.Close(), n.Close())
		},
	}
	nf.add(cmd)
	tf.addWorkload(cmd)
	cf.add(cmd)
	fs := cmd.Flags()
	fs.StringVarP(&out, "output", "o", "", "file for the trace; must not exist")
	fs.BoolVar(&attach, "attach", false, "put the trace beside the image in its registry")
	fs.DurationVar(&rules.Tail, "tail", 0, "go on for so long after the container is ready")
	fs.DurationVar(&rules.Quiet, "quiet", 5*time.Second, "stop when nothing new was read for so long; negative for never")
	fs.DurationVar(&rules.MaxDuration, "for", time.Minute, "stop after so long at the latest; negative for never")
	return cmd
}

// traceFile makes the file that is recorded into. remove removes it if it was
// not named, or if nothing was recorded.
func traceFile(name string) (f *os.File, remove func(), err error) {
	if name != "" {
		f, err = createNew(name)
	} else {
		f, err = os.CreateTemp("", "reprise-*.trace")
	}
	if err != nil {
		return nil, nil, err
	}
	return f, func() {
		if fi, err := os.Stat(f.Name()); name == "" || err == nil && fi.Size() == 0 {
			_ = os.Remove(f.Name())
		}
	}, nil
}

// recorded says what a recording has got. The trace of a container that failed
// is there to be looked at, but no good.
func recorded(cmd *cobra.Command, f *os.File, rec *node.Recording, err error) error {
	var failed *container.ExitedError
	if err != nil && !errors.As(err, &failed) {
		return err
	}
	return errors.Join(err, summary(cmd, f, rec))
}

func summary(cmd *cobra.Command, f *os.File, rec *node.Recording) error {
	t, err := tracefmt.Open(f.Name())
	if err != nil {
		return fmt.Errorf("read back the trace: %w", err)
	}
	first := t.FirstTouch()
	if len(first) == 0 {
		return errors.New("nothing was read from the image: the trace is empty")
	}
	ready := "never ready"
	if t.End != nil && t.End.Ready > 0 {
		ready = "ready after " + t.End.Ready.Round(time.Millisecond).String()
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "recorded %s in %d reads of workload %s, %s; ended by %s\n",
		size(t.Bytes()), len(first), t.Workload, ready, rec.Reason)
	return nil
}
