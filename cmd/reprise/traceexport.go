package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
)

func newTraceExport() *cobra.Command {
	var (
		nf     nodeFlags
		format string
	)
	cmd := &cobra.Command{
		Use:   "export TRACE DST",
		Short: "Write a trace in a format of others ('-' is standard output)",
		Long: `Write a trace in a format of others:

  reference  the trace file of the reference implementation
  layer      an acceleration layer, a tar with such a file
  paths      the paths of the files, one a line, in order of first use

A reference trace numbers the layers of its image, and has no times. To put one into
an image, see 'reprise attach --as layer'.
` + traceArgHelp,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			write, ok := exporters[format]
			if !ok {
				return usagef(cmd, "--format %s: one of reference, layer, paths", format)
			}
			return withClient(cmd, &nf, func(client *registry.Client) error {
				t, err := openTraceArg(cmd, client, a[0], nf.wanted())
				if err != nil {
					return err
				}
				err = writeOut(cmd, a[1], func(w io.Writer) error { return write(w, t) })
				if err != nil {
					return fmt.Errorf("export %s: %w", a[0], err)
				}
				return nil
			})
		},
	}
	nf.addRegistry(cmd)
	nf.addPlatform(cmd)
	cmd.Flags().StringVar(&format, "format", "reference", "reference, layer or paths")
	return cmd
}

var exporters = map[string]func(io.Writer, *tracefmt.Trace) error{
	"reference": tracefmt.WriteReference,
	"layer":     tracefmt.WriteAcceleration,
	"paths":     writePaths,
}

// writePaths lists the files of a trace, in order of first touch; but not those
// whose names do not fit on a line.
func writePaths(w io.Writer, t *tracefmt.Trace) error {
	if !hasPaths(t) {
		return errors.New("the trace does not name files: one beside an image does, so attach it and name it REF#WORKLOAD")
	}
	b := bufio.NewWriter(w)
	seen := map[string]bool{"": true}
	for _, e := range t.FirstTouch() {
		if isFile := !strings.HasSuffix(e.Path, "/") && !strings.ContainsAny(e.Path, "\r\n"); isFile && !seen[e.Path] {
			seen[e.Path] = true
			fmt.Fprintln(b, e.Path)
		}
	}
	return b.Flush()
}
