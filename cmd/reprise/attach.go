package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

type attachOptions = artifact.PushOptions

// attachFlags are those of attach.
type attachFlags struct {
	node    nodeFlags
	o       attachOptions
	replace bool
	as, tag string
}

func newAttach() *cobra.Command {
	f := &attachFlags{}
	cmd := &cobra.Command{
		Use:   "attach REF TRACE",
		Short: "Put a trace beside an image in its registry",
		Long: `Put a trace beside an image in its registry, for the workload that it names or
that --workload names. The image itself does not change. Of a multi-platform image
it is the platform that the trace was recorded on, unless --platform says otherwise.
` + traceArgHelp + `

An attached trace says which files were read. One that does not is completed: for
that the image is mounted where nobody sees it, which needs root; without root the
trace is attached as it is.

With --as layer the image is written once more, under --tag, with the trace as an
acceleration layer: so nodes with the reference implementation find it.`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			return f.run(cmd, a[0], a[1])
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&f.node.root, "root", node.DefaultRoot, "state directory")
	f.node.addRegistry(cmd)
	f.node.addPlatform(cmd)
	fs.StringVar(&f.o.Workload, "workload", "", "name of what the trace starts (default: the trace's own)")
	fs.BoolVar(&f.o.Default, "default", false, "use it for workloads without a trace of their own too")
	fs.BoolVar(&f.replace, "replace", false, "take the place of the workload's trace, if there is one")
	fs.StringVar(&f.as, "as", "artifact", "artifact (beside the image) or layer (of a new image, see --tag)")
	fs.StringVar(&f.tag, "tag", "", "with --as layer: tag of the new image, in the same repository")
	return cmd
}

// check finds what is wrong with the flags themselves.
func (f *attachFlags) check(cmd *cobra.Command) error {
	changed := cmd.Flags().Changed
	switch {
	case f.as != "artifact" && f.as != "layer":
		return usagef(cmd, "--as %s: neither artifact nor layer", f.as)
	case f.as == "layer" && f.tag == "":
		return usagef(cmd, "--as layer makes a new image: name it with --tag")
	case f.as == "layer" && (f.o.Default || f.replace || f.o.Workload != ""):
		return usagef(cmd, "--default, --replace and --workload are not for --as layer: an image has one layer of that kind")
	case f.as == "artifact" && f.tag != "":
		return usagef(cmd, "--tag is for --as layer")
	case f.node.root == "":
		return usagef(cmd, "--root is empty")
	case changed("workload") && f.o.Workload == "":
		return usagef(cmd, "--workload is empty")
	}
	return f.node.checkPlatform(cmd)
}

func (f *attachFlags) run(cmd *cobra.Command, ref, arg string) error {
	ro := f.node.registry()
	client, err := registry.New(&ro)
	if err != nil {
		return err
	}
	defer client.Close()
	t, err := openTraceArg(cmd, client, arg, f.node.wanted())
	if err != nil {
		return err
	}
	m, err := manifestFor(cmd.Context(), client, ref, f.node.wanted(), t)
	if err != nil {
		return err
	}
	if err := shares(t, m); err != nil {
		return fmt.Errorf("attach %s to %s: %w", arg, ref, err)
	}
	if f.as == "layer" {
		return attachLayer(cmd, client, ref, &m, t, f.tag)
	}
	o := f.o
	o.New = !f.replace
	if f.needsPaths(cmd, client, ref, &m, t) {
		t = f.withPaths(cmd, ref, &m, t)
	}
	return push(cmd.Context(), cmd.OutOrStdout(), client, ref, arg, m, t, o)
}

// attachFile puts the trace in a file beside an image.
func attachFile(ctx context.Context, w io.Writer, client *registry.Client, ref, path string, o attachOptions) error {
	t, err := tracefmt.Open(path)
	if err != nil {
		return err
	}
	m, err := manifestFor(ctx, client, ref, nil, t)
	if err != nil {
		return err
	}
	if err := shares(t, m); err != nil {
		return fmt.Errorf("attach %s to %s: %w", path, ref, err)
	}
	return push(ctx, w, client, ref, path, m, t, o)
}

func push(ctx context.Context, w io.Writer, client *registry.Client, ref, name string, m registry.Manifest, t *tracefmt.Trace, o attachOptions) error {
	store, err := artifact.New(client, ref)
	if err != nil {
		return err
	}
	e, err := store.Push(ctx, m.Descriptor, t, &o)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("attach %s to %s: the workload has a trace already: take its place with --replace, or name another with --workload: %w", name, ref, err)
	}
	if err != nil {
		return fmt.Errorf("attach %s to %s: %w", name, ref, err)
	}
	fmt.Fprintf(w, "attached %s for workload %s: %s in %d reads, %s%s\n",
		e.Descriptor.Digest, e.Workload, size(e.Bytes), e.Events, ref, partly(t, m))
	return nil
}

// partly says how much of the trace is not of the image.
func partly(t *tracefmt.Trace, m registry.Manifest) string {
	have, all := t.Covers(layersOf(m.Layers))
	if have == all {
		return ""
	}
	return fmt.Sprintf("; %.1f %% of it is of layers that the image does not have", percent(all-have, all))
}

// layersOf describes a manifest's layers to a trace, but those that hold traces.
func layersOf(layers []ocispec.Descriptor) (out []tracefmt.Layer) {
	for _, d := range layers {
		if !isAcceleration(d) {
			out = append(out, tracefmt.Layer{Digest: d.Digest, Size: d.Size})
		}
	}
	return out
}

func isAcceleration(d ocispec.Descriptor) bool {
	return d.Annotations["containerd.io/snapshot/overlaybd/acceleration-layer"] == "yes"
}

// manifestFor reads the image that a trace is for: of a multi-platform image that
// of the platform that is wanted, or else of the one that the trace is of.
func manifestFor(ctx context.Context, client *registry.Client, ref string, wanted *ocispec.Platform, t *tracefmt.Trace) (registry.Manifest, error) {
	if p, err := platforms.Parse(t.Platform); wanted == nil && t.Platform != "" && err == nil {
		wanted = &p
	}
	return client.Manifest(ctx, ref, wanted)
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
		return errors.New("the trace does not say which layers it is of: record it with 'reprise record', or import it with 'reprise trace import'")
	}
	return fmt.Errorf("the trace shares no layer with the image: it was recorded on %s", cmp.Or(t.Image, "another one"))
}

// needsPaths tells whether the files of a trace are to be found out. A trace that
// is going to be refused is not worth that.
func (f *attachFlags) needsPaths(cmd *cobra.Command, client *registry.Client, ref string, m *registry.Manifest, t *tracefmt.Trace) bool {
	if hasPaths(t) || t.Space == tracefmt.DeviceSpace {
		return false
	}
	if f.replace {
		return true
	}
	store, err := artifact.New(client, ref)
	if err != nil {
		return false
	}
	_, _, err = store.Pull(cmd.Context(), m.Descriptor.Digest, cmp.Or(f.o.Workload, t.Workload, artifact.DefaultWorkload(t.Args)))
	return errors.Is(err, os.ErrNotExist)
}

func hasPaths(t *tracefmt.Trace) bool {
	return slices.ContainsFunc(t.Events, func(e tracefmt.Event) bool { return e.Path != "" })
}

// withPaths finds out which files the trace has read, or says why not.
func (f *attachFlags) withPaths(cmd *cobra.Command, ref string, m *registry.Manifest, t *tracefmt.Trace) *tracefmt.Trace {
	named, err := f.mapped(cmd, ref, m, t)
	if err != nil {
		fmt.Fprintf(cmd.ErrOrStderr(), "reprise: the trace does not name files, and is attached so: %v\n", err)
		return t
	}
	return named
}

func (f *attachFlags) mapped(cmd *cobra.Command, ref string, m *registry.Manifest, t *tracefmt.Trace) (*tracefmt.Trace, error) {
	r, err := registry.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	files, layers, err := mapFiles(cmd, &f.node, r.WithDigest(m.Descriptor.Digest).String())
	if err != nil {
		return nil, err
	}
	return annotated(t, files, layers), nil
}

// annotated is a trace with the files that its events belong to. The image whose
// files they are may have the layers of the trace at other places, or not at all.
func annotated(t *tracefmt.Trace, files *recorder.Files, layers []tracefmt.Layer) *tracefmt.Trace {
	place := map[digest.Digest]int{}
	for i, l := range layers {
		place[l.Digest] = i
	}
	to, from := make([]int, len(t.Layers)), map[int]int{}
	for i, l := range t.Layers {
		p, ok := place[l.Digest]
		if !ok || l.Digest == "" {
			p = len(layers) + i // nothing is known of it
		}
		to[i], from[p] = p, i
	}
	out := *t
	out.Events = slices.Clone(t.Events)
	for i := range out.Events {
		out.Events[i].Layer = to[out.Events[i].Layer]
	}
	files.Annotate(&out)
	for i := range out.Events {
		out.Events[i].Layer = from[out.Events[i].Layer]
	}
	return &out
}

// attachLayer makes the reference implementation's kind of image.
func attachLayer(cmd *cobra.Command, client *registry.Client, ref string, m *registry.Manifest, t *tracefmt.Trace, tag string) error {
	r, err := registry.ParseReference(ref)
	if err != nil {
		return err
	}
	to, err := registry.ParseReference(r.Name() + ":" + tag)
	if err != nil || to.Name() != r.Name() || to.Tag != tag || to.Digest != "" {
		return usagef(cmd, "--tag %s: not a tag", tag)
	}
	store, err := artifact.New(client, ref)
	if err != nil {
		return err
	}
	l, err := store.PushLayer(cmd.Context(), m, t, tag)
	if err != nil {
		return err
	}
	dropped := ""
	if l.Dropped > 0 {
		dropped = fmt.Sprintf(", without %s of layers that it does not have", size(l.Dropped))
	}
	fmt.Fprintf(cmd.OutOrStdout(), "wrote %s, %s: %s with an acceleration layer for %s%s\n", to, l.Manifest.Digest, ref, size(l.Bytes), dropped)
	return nil
}
