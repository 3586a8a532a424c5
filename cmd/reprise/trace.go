package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/replayer/compare"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

func newTrace() *cobra.Command {
	return group("trace", "Traces beside images, and trace files",
		newTraceLs(), newTracePull(), newTraceRm(), newTraceShow(), newTraceDiff(), newTraceMerge(), newTraceImport(), newTraceExport())
}

func (f *nodeFlags) addPlatform(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.platform, "platform", "", "os/arch[/variant] of a multi-platform image (default: this machine's, or that of the trace)")
}

func (f *nodeFlags) checkPlatform(cmd *cobra.Command) error {
	if f.platform == "" {
		return nil
	}
	if _, err := platforms.Parse(f.platform); err != nil {
		return usagef(cmd, "--platform: %v", err)
	}
	return nil
}

// wanted is the platform that was asked for, nil without. It has been checked.
func (f *nodeFlags) wanted() *ocispec.Platform {
	if p, err := platforms.Parse(f.platform); f.platform != "" && err == nil {
		return &p
	}
	return nil
}

// withTraces opens the traces beside an image.
func withTraces(cmd *cobra.Command, nf *nodeFlags, ref string, do func(*artifact.Store, registry.Manifest) error) error {
	if err := nf.checkPlatform(cmd); err != nil {
		return err
	}
	ro := nf.registry()
	client, err := registry.New(&ro)
	if err != nil {
		return err
	}
	defer client.Close()
	m, err := client.Manifest(cmd.Context(), ref, nf.wanted())
	if err != nil {
		return err
	}
	store, err := artifact.New(client, ref)
	if err != nil {
		return err
	}
	return do(store, m)
}

// withClient opens the registries that the traces of a command line may be at.
func withClient(cmd *cobra.Command, nf *nodeFlags, do func(*registry.Client) error) error {
	if err := nf.checkPlatform(cmd); err != nil {
		return err
	}
	ro := nf.registry()
	client, err := registry.New(&ro)
	if err != nil {
		return err
	}
	defer client.Close()
	return do(client)
}

const traceArgHelp = `A TRACE is a file, or one beside an image: REF#WORKLOAD, REF#sha256:DIGEST, or REF#
for the only one.`

// openTraceArg reads a trace that is named on the command line.
func openTraceArg(cmd *cobra.Command, client *registry.Client, arg string, platform *ocispec.Platform) (*tracefmt.Trace, error) {
	ref, which, ok := strings.Cut(arg, "#")
	if _, err := os.Stat(arg); err == nil || !ok {
		return tracefmt.Open(arg)
	}
	m, err := client.Manifest(cmd.Context(), ref, platform)
	if err != nil {
		return nil, err
	}
	s, err := artifact.New(client, ref)
	if err != nil {
		return nil, err
	}
	t, err := pullTrace(cmd, s, m.Descriptor.Digest, which)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", arg, err)
	}
	return t, nil
}

func newTraceLs() *cobra.Command {
	var (
		nf     nodeFlags
		asJSON bool
	)
	cmd := &cobra.Command{
		Use:   "ls REF",
		Short: "List the traces beside an image",
		Long: `List the traces beside an image: of which workload they are, when they were
attached, how large they are, how many bytes they make a node fetch and in how many
reads, how much of that is in layers that the image has today, and which of them is
the default.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			return withTraces(cmd, &nf, a[0], func(s *artifact.Store, m registry.Manifest) error {
				infos, err := traceInfos(cmd.Context(), s, m)
				if err != nil {
					return err
				}
				if asJSON {
					return printJSON(cmd, infos)
				}
				return listTraces(cmd.OutOrStdout(), infos, time.Now())
			})
		},
	}
	nf.addRegistry(cmd)
	nf.addPlatform(cmd)
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
	Size     int64         `json:"size"`     // bytes of the trace itself, as it is stored
	Coverage float64       `json:"coverage"` // share of Bytes in layers that the image has
	Digest   digest.Digest `json:"digest"`
	Error    string        `json:"error,omitempty"` // why the trace cannot be read
}

// traceInfos reads all traces of an image. Most are carried inline in what names
// them.
func traceInfos(ctx context.Context, s *artifact.Store, m registry.Manifest) ([]traceInfo, error) {
	entries, err := s.List(ctx, m.Descriptor.Digest)
	if err != nil {
		return nil, err
	}
	infos := make([]traceInfo, len(entries))
	layers := layersOf(m.Layers)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, e := range entries {
		g.Go(func() error {
			infos[i] = newTraceInfo(e)
			t, full, err := s.PullDigest(ctx, e.Descriptor.Digest)
			if err != nil {
				infos[i].Error = err.Error()
				return ctx.Err()
			}
			have, all := t.Covers(layers)
			infos[i].Size, infos[i].Bytes, infos[i].Coverage = full.Size, all, ratio(have, all)
			return nil
		})
	}
	return infos, g.Wait()
}

func newTraceInfo(e artifact.Entry) traceInfo {
	return traceInfo{
		Workload: e.Workload, Default: e.Default, Created: e.Created, Ready: e.Ready.Microseconds(),
		Events: e.Events, Bytes: e.Bytes, Digest: e.Descriptor.Digest,
	}
}

func listTraces(w io.Writer, infos []traceInfo, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "WORKLOAD\tAGE\tSIZE\tREADS\tBYTES\tCOVERAGE\tREADY\tDIGEST")
	for _, i := range infos {
		name := compare.Printable(i.Workload)
		if i.Default {
			name += " (default)"
		}
		coverage := fmt.Sprintf("%.1f %%", 100*i.Coverage)
		if i.Error != "" {
			coverage = "cannot be read"
		}
		ready := "never"
		if i.Ready > 0 {
			ready = (time.Duration(i.Ready) * time.Microsecond).Round(time.Millisecond).String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n", name, age(i.Created, now),
			size(i.Size), i.Events, size(i.Bytes), coverage, ready, i.Digest)
	}
	return t.Flush()
}

// age is how long ago something was, in one unit.
func age(at, now time.Time) string {
	d := max(0, now.Sub(at))
	switch {
	case at.IsZero():
		return "?"
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

func newTracePull() *cobra.Command {
	var (
		nf           nodeFlags
		workload, of string
	)
	cmd := &cobra.Command{
		Use:   "pull REF FILE",
		Short: "Copy a trace beside an image into a file ('-' is standard output)",
		Args:  args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if workload != "" && of != "" {
				return usagef(cmd, "give one of --workload and --digest")
			}
			if _, err := digest.Parse(of); of != "" && err != nil {
				return usagef(cmd, "--digest %s: %v", of, err)
			}
			return withTraces(cmd, &nf, a[0], func(s *artifact.Store, m registry.Manifest) error {
				t, err := pullTrace(cmd, s, m.Descriptor.Digest, cmp.Or(of, workload))
				if err != nil {
					return fmt.Errorf("%s: %w", a[0], err)
				}
				return writeOut(cmd, a[1], func(w io.Writer) error { return tracefmt.Encode(w, t) })
			})
		},
	}
	nf.addRegistry(cmd)
	nf.addPlatform(cmd)
	cmd.Flags().StringVar(&workload, "workload", "", "of which workload (default: the only one)")
	cmd.Flags().StringVar(&of, "digest", "", "the trace of that digest, as trace ls lists it")
	return cmd
}

// pullTrace reads the trace of a workload or of a digest, or, without either, the
// only one.
func pullTrace(cmd *cobra.Command, s *artifact.Store, subject digest.Digest, which string) (*tracefmt.Trace, error) {
	if d, err := digest.Parse(which); err == nil {
		t, _, err := s.PullDigest(cmd.Context(), d)
		return t, err
	}
	if which == "" {
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
		which = entries[0].Workload
	}
	t, _, err := s.Pull(cmd.Context(), subject, which)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("no trace of workload %q: see 'reprise trace ls'", which)
	}
	return t, err
}
