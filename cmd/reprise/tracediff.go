package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/replayer/compare"
	"github.com/reprise-project/reprise/tracefmt"
)

func newTraceDiff() *cobra.Command {
	var (
		nf     nodeFlags
		top    int
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "diff A B",
		Short: "Say what two traces have in common: by layer, by file, and in their order",
		Long: `Say what two traces have in common, in bytes: by layer, by file, and in the order
in which they were first read. The files that differ most come first.
` + traceArgHelp,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if top < 0 {
				return usagef(cmd, "--top %d: it cannot be negative", top)
			}
			return withClient(cmd, &nf, func(client *registry.Client) error {
				t, err := openTraceArgs(cmd, client, &nf, a)
				if err != nil {
					return err
				}
				d := tracefmt.Diff(t[0], t[1])
				if asJSON {
					return printJSON(cmd, d)
				}
				return showDifference(cmd.OutOrStdout(), d, top)
			})
		},
	}
	nf.addRegistry(cmd)
	nf.addPlatform(cmd)
	cmd.Flags().IntVar(&top, "top", 20, "how many files to list, 0 for all")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, with all files")
	return cmd
}

func showDifference(w io.Writer, d *tracefmt.Difference, top int) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	row := func(name string, s tracefmt.Shares) {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", name, size(s.OnlyA), size(s.OnlyB), size(s.Both))
	}
	fmt.Fprintln(t, "\tONLY A\tONLY B\tBOTH")
	row("all", d.Shares)
	for _, l := range d.Layers {
		row("layer "+layerName(l), l.Shares)
	}
	paths := d.Paths
	if top > 0 {
		paths = paths[:min(len(paths), top)]
	}
	for _, p := range paths {
		name := compare.Printable(p.Path)
		if name == "" {
			name = "(of no known file)"
		}
		row(name, p.Shares)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if n := len(d.Paths) - len(paths); n > 0 {
		fmt.Fprintf(w, "and %d more files\n", n)
	}
	if d.Both > 0 {
		fmt.Fprintf(w, "order: %.3f (1 is the same, 0 has nothing to do with it, -1 is reversed); half of the bytes in both are at most %s from their place\n",
			d.Order, size(d.Displacement))
	}
	return nil
}

// layerName numbers a layer as the traces do.
func layerName(l tracefmt.LayerDifference) string {
	switch {
	case l.A < 0:
		return fmt.Sprintf("%d of B", l.B)
	case l.B < 0:
		return fmt.Sprintf("%d of A", l.A)
	case l.A != l.B:
		return fmt.Sprintf("%d of A, %d of B", l.A, l.B)
	}
	return fmt.Sprint(l.A)
}
