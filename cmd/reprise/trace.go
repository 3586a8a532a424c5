package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

func newTrace() *cobra.Command {
	return group("trace", "Traces beside images, and trace files", newTraceLs(), newTracePull(), newTraceShow())
}

// withTraces opens the traces beside an image.
func withTraces(cmd *cobra.Command, nf *nodeFlags, ref string, do func(*artifact.Store, registry.Manifest) error) error {
	ro := nf.registry()
	client, err := registry.New(&ro)
	if err != nil {
		return err
	}
	defer client.Close()
	m, err := client.Manifest(cmd.Context(), ref, nil)
	if err != nil {
		return err
	}
	store, err := artifact.New(client, ref)
	if err != nil {
		return err
	}
	return do(store, m)
}

func newTraceLs() *cobra.Command {
	var (
		nf     nodeFlags
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "ls REF",
		Short: "List the traces beside an image",
		Args:  args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			return withTraces(cmd, &nf, a[0], func(s *artifact.Store, m registry.Manifest) error {
				entries, err := s.List(cmd.Context(), m.Descriptor.Digest)
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd, traceInfos(entries))
				}
				return listTraces(cmd.OutOrStdout(), entries)
			})
		},
	}
	nf.addRegistry(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// traceInfo is what trace ls --json prints of each trace.
type traceInfo struct {
	Workload string        `json:"workload"`
	Default  bool          `json:"default"`
	Created  time.Time     `json:"created"`
	Ready    int64         `json:"ready_us"` // 0 for never
	Events   int           `json:"events"`
	Bytes    int64         `json:"bytes"`
	Digest   digest.Digest `json:"digest"`
}

func traceInfos(entries []artifact.Entry) []traceInfo {
	infos := make([]traceInfo, len(entries))
	for i, e := range entries {
		infos[i] = traceInfo{e.Workload, e.Default, e.Created, e.Ready.Microseconds(), e.Events, e.Bytes, e.Descriptor.Digest}
	}
	return infos
}

func listTraces(w io.Writer, entries []artifact.Entry) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "WORKLOAD\tATTACHED\tREADY\tREADS\tBYTES\tDIGEST")
	for _, e := range entries {
		name := e.Workload
		if e.Default {
			name += " (default)"
		}
		fmt.Fprintf(t, "%s\t%s\t%v\t%d\t%s\t%s\n", name, e.Created.Local().Format(time.DateTime),
			e.Ready.Round(time.Millisecond), e.Events, size(e.Bytes), e.Descriptor.Digest)
	}
	return t.Flush()
}

func newTracePull() *cobra.Command {
	var (
		nf       nodeFlags
		workload string
	)
	cmd := &cobra.Command{
		Use:   "pull REF FILE",
		Short: "Copy a trace beside an image into a file ('-' is standard output)",
		Args:  args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			return withTraces(cmd, &nf, a[0], func(s *artifact.Store, m registry.Manifest) error {
				t, err := pullTrace(cmd, s, m.Descriptor.Digest, workload)
				if err != nil {
					return fmt.Errorf("%s: %w", a[0], err)
				}
				return writeOut(cmd, a[1], func(w io.Writer) error { return tracefmt.Encode(w, t) })
			})
		},
	}
	nf.addRegistry(cmd)
	cmd.Flags().StringVar(&workload, "workload", "", "of which workload (default: the only one)")
	return cmd
}

// pullTrace reads the trace of a workload, or the only one.
func pullTrace(cmd *cobra.Command, s *artifact.Store, subject digest.Digest, workload string) (*tracefmt.Trace, error) {
	if workload == "" {
		entries, err := s.List(cmd.Context(), subject)
		if err != nil {
			return nil, err
		}
		switch len(entries) {
		case 0:
			return nil, errors.New("it has no traces: record one with 'reprise record --attach'")
		case 1:
		default:
			return nil, fmt.Errorf("it has %d traces: name one with --workload (see 'reprise trace ls')", len(entries))
		}
		workload = entries[0].Workload
	}
	t, _, err := s.Pull(cmd.Context(), subject, workload)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("no trace of workload %q: see 'reprise trace ls'", workload)
	}
	return t, err
}
