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
			}
			said := "" // of the trace, when the container was ready
			o.Ready = func(r *node.Report) {
				if reports != nil {
					_ = json.NewEncoder(reports).Encode(r)
				}
				if tf.explain {
					said = r.Explain
					explainTrace(cmd.ErrOrStderr(), said)
				}
			}
			report, err := node.Run(cmd.Context(), s, ref, o)
			err = errors.Join(err, closeServer())
			if tf.explain && report.Layers > 0 {
				if report.Explain != said {
					explainTrace(cmd.ErrOrStderr(), report.Explain)
				}
				explain(cmd.ErrOrStderr(), report)
			}
			if tf.explain && report.Layers > 0 || fetched(report) {
				figures(cmd.ErrOrStderr(), report)
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

// explainTrace says in a line why a trace was used or not.
func explainTrace(w io.Writer, why string) { fmt.Fprintf(w, "trace:    %s\n", why) }

// explain says in a few lines what the trace did for a start.
func explain(w io.Writer, r *node.Report) {
	fmt.Fprintf(w, "replay:   %s\n", r.Replay.Reason)
	if r.Replay.Used {
		fmt.Fprintf(w, "fetched:  %s in %d requests for %d ranges, %s was here, took %v\n",
			size(r.Replay.Asked), r.Replay.Sent, r.Replay.Wants, size(r.Replay.Here), r.Replay.Took.Round(time.Millisecond))
	}
	if r.Restarts > 0 {
		fmt.Fprintf(w, "restarts: %d of the image's server; figures lack the last seconds before each\n", r.Restarts)
	}
	fmt.Fprint(w, "steps:   ")
	for _, p := range r.Phases {
		fmt.Fprintf(w, " %s %v;", p.Name, p.At.Round(time.Millisecond))
	}
	fmt.Fprintln(w)
}
