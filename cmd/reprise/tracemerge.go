package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
)

func newTraceMerge() *cobra.Command {
	var (
		nf        nodeFlags
		out, mode string
		workload  string
		asJSON    bool
	)
	cmd := &cobra.Command{
		Use:   "merge TRACE… -o OUT",
		Short: "Make one trace of several recordings, and say how much they agree",
		Long: `Make one trace of several recordings: of what any of them has read (union), more
than half of them (majority), or all (intersection). Its order is by the median of
when they first read each byte, and it says in how many of them that was.
` + traceArgHelp,
		Args: args(cobra.MinimumNArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			m, err := tracefmt.ParseMergeMode(mode)
			if err != nil {
				return usagef(cmd, "--mode: %v", err)
			}
			if out == "" {
				return usagef(cmd, "name a file for the trace with -o")
			}
			if asJSON && out == "-" {
				return usagef(cmd, "--json and -o - both write to standard output")
			}
			return withClient(cmd, &nf, func(client *registry.Client) error {
				traces, err := openTraceArgs(cmd, client, &nf, a)
				if err != nil {
					return err
				}
				t, agreement, err := tracefmt.Merge(traces, m)
				if err != nil {
					return err
				}
				if workload != "" {
					t.Workload = workload
				}
				if err := writeOut(cmd, out, func(w io.Writer) error { return tracefmt.Encode(w, t) }); err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd, mergeReport{m.String(), len(t.Events), t.Bytes(), agreement})
				}
				sayMerged(cmd.ErrOrStderr(), t, agreement, m)
				for i, n := range agreement.Unique {
					if n > 0 {
						fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s that no other has\n", a[i], size(n))
					}
				}
				return nil
			})
		},
	}
	nf.addRegistry(cmd)
	nf.addPlatform(cmd)
	fs := cmd.Flags()
	fs.StringVarP(&out, "output", "o", "", "file for the trace; must not exist ('-' is standard output)")
	fs.StringVar(&mode, "mode", tracefmt.MergeUnion.String(), "what it has: union, majority or intersection of what was read")
	fs.StringVar(&workload, "workload", "", "name of its workload (default: that of the traces, if it is one)")
	fs.BoolVar(&asJSON, "json", false, "print how much the traces agree as JSON")
	return cmd
}

// mergeReport is what trace merge --json prints.
type mergeReport struct {
	Mode      string              `json:"mode"`
	Events    int                 `json:"events"` // of the merged trace
	Bytes     int64               `json:"bytes"`
	Agreement *tracefmt.Agreement `json:"agreement"`
}

func openTraceArgs(cmd *cobra.Command, client *registry.Client, nf *nodeFlags, names []string) ([]*tracefmt.Trace, error) {
	var traces []*tracefmt.Trace
	for _, name := range names {
		t, err := openTraceArg(cmd, client, name, nf.wanted())
		if err != nil {
			return nil, err
		}
		traces = append(traces, t)
	}
	return traces, nil
}
