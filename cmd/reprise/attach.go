package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

type attachOptions = artifact.PushOptions

func newAttach() *cobra.Command {
	var (
		nf nodeFlags
		o  attachOptions
	)
	cmd := &cobra.Command{
		Use:   "attach REF TRACE",
		Short: "Put a trace beside an image in its registry",
		Long: `Put a trace beside an image in its registry, for the workload that it names or
that --workload names. It replaces the trace of the same workload. The image
itself does not change.`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			ro := nf.registry()
			client, err := registry.New(&ro)
			if err != nil {
				return err
			}
			defer client.Close()
			return attachFile(cmd.Context(), cmd.OutOrStdout(), client, a[0], a[1], o)
		},
	}
	nf.addRegistry(cmd)
	cmd.Flags().StringVar(&o.Workload, "workload", "", "name of what the trace starts (default: the trace's own)")
	cmd.Flags().BoolVar(&o.Default, "default", false, "use it for workloads without a trace of their own too")
	return cmd
}

// attachFile puts the trace in a file beside an image.
func attachFile(ctx context.Context, w io.Writer, client *registry.Client, ref, path string, o attachOptions) error {
	t, err := tracefmt.Open(path)
	if err != nil {
		return err
	}
	m, err := client.Manifest(ctx, ref, nil)
	if err != nil {
		return err
	}
	if err := shares(t, m); err != nil {
		return fmt.Errorf("attach %s to %s: %w", path, ref, err)
	}
	store, err := artifact.New(client, ref)
	if err != nil {
		return err
	}
	e, err := store.Push(ctx, m.Descriptor, t, &o)
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", path, ref, err)
	}
	fmt.Fprintf(w, "attached %s for workload %s: %s in %d reads, %s\n",
		e.Descriptor.Digest, e.Workload, size(e.Bytes), e.Events, ref)
	return nil
}

// shares makes sure that a trace is of layers that the image has.
func shares(t *tracefmt.Trace, m registry.Manifest) error {
	if len(t.Events) == 0 {
		return errors.New("the trace is empty: record again")
	}
	for _, a := range t.Layers {
		for _, b := range m.Layers {
			if a.Digest == b.Digest {
				return nil
			}
		}
	}
	if t.Space == tracefmt.DeviceSpace || len(t.Layers) == 0 {
		return errors.New("the trace does not say which layers it is of: record it with 'reprise record'")
	}
	return fmt.Errorf("the trace shares no layer with the image: it was recorded on %s", t.Image)
}
