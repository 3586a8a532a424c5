package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/tracefmt"
)

func newTraceShow() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "show FILE",
		Short: "Say what is in a trace file, native or of the reference implementation",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			t, err := tracefmt.Open(a[0])
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd, t)
			}
			return showTrace(cmd.OutOrStdout(), t)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print header, events and end as JSON")
	return cmd
}

func showTrace(w io.Writer, t *tracefmt.Trace) error {
	known := func(s string) string {
		if s == "" {
			return "unknown"
		}
		return s
	}
	fmt.Fprintf(w, "image     %s\nmanifest  %s\nworkload  %s %q\nrecorded  %s by %s\n",
		known(t.Image), known(string(t.Manifest)), known(t.Workload), t.Args, t.Start.Local().Format(time.DateTime), known(t.Tool))
	switch {
	case t.End == nil:
		fmt.Fprintf(w, "end       none: the recording was cut off\n")
	case t.End.Ready > 0:
		fmt.Fprintf(w, "end       %s, ready after %v\n", t.End.Reason, t.End.Ready.Round(time.Millisecond))
	default:
		fmt.Fprintf(w, "end       %s, never ready\n", known(t.End.Reason))
	}
	first := t.FirstTouch()
	fmt.Fprintf(w, "reads     %d, of %d bytes (%s) in %s space\n\n", len(first), t.Bytes(), size(t.Bytes()), t.Space)
	return showLayers(w, t, first)
}

func showLayers(w io.Writer, t *tracefmt.Trace, first []tracefmt.Event) error {
	type sum struct {
		reads int
		bytes int64
		at    time.Duration
	}
	sums := map[int]*sum{}
	layers := len(t.Layers)
	for _, e := range first {
		s := sums[e.Layer]
		if s == nil {
			s = &sum{at: e.At}
			sums[e.Layer] = s
		}
		s.reads++
		s.bytes += e.Len
		layers = max(layers, e.Layer+1)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "LAYER\tREADS\tBYTES\tOF\tFIRST AT\tDIGEST\t")
	for i := range layers {
		s, of, name := sums[i], "", ""
		if s == nil {
			s = &sum{}
		}
		if i < len(t.Layers) {
			of, name = size(t.Layers[i].Decoded), string(t.Layers[i].Digest)
		}
		fmt.Fprintf(tw, "%d\t%d\t%s\t%s\t%v\t%s\t\n", i, s.reads, size(s.bytes), of, s.at.Round(time.Millisecond), name)
	}
	return tw.Flush()
}
