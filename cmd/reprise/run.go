package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/recorder/container"
	"github.com/reprise-project/reprise/replayer/node"
)

func newRun() *cobra.Command {
	var (
		nf       nodeFlags
		tf       traceFlags
		cf       containerFlags
		reportFD int
	)
	cmd := &cobra.Command{
		Use:   "run REF [-- CMD…]",
		Short: "Start a container on an image that is loaded lazily, along its trace",
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, a []string) error {
			ref, rest, err := refAndArgs(cmd, a)
			if err != nil {
				return err
			}
			cfg, err := cf.config(cmd)
			if err != nil {
				return err
			}
			if err := cmp.Or(nf.check(cmd), tf.check(cmd)); err != nil {
				return err
			}
			if err := needRoot("run", "to attach a block device and start a container"); err != nil {
				return err
			}
			o := &node.RunOptions{
				Request: nf.request(ref, &tf), Args: rest, Config: cfg, Root: nf.absRoot(), Log: logger(cmd),
				Stdin: os.Stdin, Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr(),
			}
			s, closeServer, err := nf.server(cmd, &o.Request)
			if err != nil {
				return err
			}
			if _, ok := s.(*node.Private); !ok { // whose words come by themselves
				o.Say = func(line string) { fmt.Fprintln(cmd.ErrOrStderr(), line) }
			}
			var reports io.WriteCloser
			if reportFD > 0 {
				reports = os.NewFile(uintptr(reportFD), "report")
				defer reports.Close()
				o.Ready = func(r *node.Report) { _ = json.NewEncoder(reports).Encode(r) }
			}
			report, err := node.Run(cmd.Context(), s, ref, o)
			err = errors.Join(err, closeServer())
			if tf.explain && report.Layers > 0 {
				explain(cmd.ErrOrStderr(), report)
			}
			return ended(cmd, report, err)
		},
	}
	nf.add(cmd)
	tf.add(cmd)
	cf.add(cmd)
	cmd.Flags().IntVar(&reportFD, "report-fd", 0, "descriptor that receives a JSON report once the container is ready")
	_ = cmd.Flags().MarkHidden("report-fd")
	return cmd
}

// ended passes the container's exit status on.
func ended(cmd *cobra.Command, r *node.Report, err error) error {
	var failed *container.StartError
	if errors.As(err, &failed) {
		fmt.Fprintln(cmd.ErrOrStderr(), "reprise:", err)
		return exitStatus(failed.Status)
	}
	if err != nil {
		return err
	}
	if r.Exit != 0 {
		return exitStatus(r.Exit)
	}
	return nil
}

// explain says in a few lines what the trace did for a start.
func explain(w io.Writer, r *node.Report) {
	fmt.Fprintf(w, "trace:    %s\nreplay:   %s\n", r.Trace, r.Replay.Reason)
	if r.Replay.Used {
		fmt.Fprintf(w, "fetched:  %s in %d requests for %d ranges, %s was here, took %v\n",
			size(r.Replay.Asked), r.Replay.Sent, r.Replay.Wants, size(r.Replay.Here), r.Replay.Took.Round(time.Millisecond))
	}
	for _, s := range []struct {
		name string
		at   node.Snapshot
		ok   bool
	}{{"at ready", r.Start, r.Ready}, {"at end", r.End, true}} {
		if !s.ok {
			continue
		}
		fmt.Fprintf(w, "%-9s %d requests, %s; waited %v for bytes", s.name+":",
			s.at.Stats.DemandRequests+s.at.Stats.BackgroundRequests, size(s.at.Stats.DemandBytes+s.at.Stats.BackgroundBytes),
			s.at.Stats.Stall.Round(time.Millisecond))
		if r.Replay.Used {
			fmt.Fprintf(w, "; %.1f %% of demand served by prefetch; %.1f %% of prefetched bytes read", 100*s.at.Coverage, 100*s.at.Accuracy)
		}
		fmt.Fprintln(w)
	}
	if r.Restarts > 0 {
		fmt.Fprintf(w, "restarts: %d of the image's server; figures are since the last\n", r.Restarts)
	}
	fmt.Fprint(w, "steps:   ")
	for _, p := range r.Phases {
		fmt.Fprintf(w, " %s %v;", p.Name, p.At.Round(time.Millisecond))
	}
	fmt.Fprintln(w)
}
