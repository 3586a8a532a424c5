package main

import (
	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/compare"
)

func newDemo() *cobra.Command {
	var (
		o      compare.DemoOptions
		link   string
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Record and replay a real image on this machine, with an embedded registry",
		Long: `Make an image of this machine's own /usr whose workload is a Python HTTP server,
serve it from an embedded registry behind a shaped link, convert it, record its
first start, attach the trace, and compare cold starts: lazy (no trace), replay
(with it), warm (all bytes on the node, page cache dropped).`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			spec, err := regtest.ParseLink(link)
			if err != nil {
				return usagef(cmd, "--link: %v", err)
			}
			if o.Runs < 1 {
				return usagef(cmd, "--runs %d: at least 1", o.Runs)
			}
			if err := needRoot("demo", "to attach block devices and start containers"); err != nil {
				return err
			}
			p := newProgress(cmd.ErrOrStderr())
			o.Link, o.Say, o.Status, o.Tool, o.Stderr = spec, p.line, p.status, tool(), cmd.ErrOrStderr()
			o.Layer = func(e convert.Event) {
				if e.Done && (e.Stage == convert.Push || e.Stage == convert.Reuse) {
					p.layer(e)
				}
			}
			r, err := compare.Demo(cmd.Context(), o)
			p.done()
			if err != nil {
				return err
			}
			if asJSON {
				return r.WriteJSON(cmd.OutOrStdout())
			}
			return r.WriteTable(cmd.OutOrStdout())
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&link, "link", "10ms,200mbit", "the link to the registry: DELAY,RATE[,stall=P][,reset=P][,429=N/min]")
	fs.IntVar(&o.Runs, "runs", 3, "cold starts of each mode")
	fs.BoolVar(&asJSON, "json", false, "print JSON")
	fs.StringVar(&o.Keep, "keep", "", "keep image, registry and trace in this directory, and use what is there")
	return cmd
}
