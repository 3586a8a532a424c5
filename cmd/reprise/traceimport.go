package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/replayer/compare"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// importFlags are those of trace import.
type importFlags struct {
	node                         nodeFlags
	out, image, format, workload string
}

// importFormats are what --format takes.
var importFormats = []string{"auto", "reference", "layer", tracefmt.AccessPaths, tracefmt.AccessEStargz, tracefmt.AccessNydus}

func newTraceImport() *cobra.Command {
	f := &importFlags{}
	cmd := &cobra.Command{
		Use:   "import SRC --image REF -o OUT",
		Short: "Make a trace of an image from what others have recorded",
		Long: `Make a trace of an image from what others have recorded:

  reference  a trace file of the reference implementation
  layer      an acceleration layer, a tar with such a file; SRC may be the image that
             has it, too
  paths      a list of paths in the image, one a line; * ? [] as in a shell, ** for any
             number of directories, a directory for all that is below it
  estargz    what eStargz's optimizer records: JSON lines
  nydus      what Nydus's optimizer records: CSV

The first two name the layers of the image by their places. Of the others the files
are looked for in the image, which is mounted for that where nobody sees it and
needs root; paths that are not there are listed. With root the traces of the first
two are given the files too.`,
		Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, a []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			return f.run(cmd, a[0])
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&f.node.root, "root", node.DefaultRoot, "state directory")
	f.node.addRegistry(cmd)
	f.node.addPlatform(cmd)
	fs.StringVar(&f.image, "image", "", "the image: REF of a converted one at a registry, or oci:DIR[:TAG]")
	fs.StringVarP(&f.out, "output", "o", "", "file for the trace; must not exist ('-' is standard output)")
	fs.StringVar(&f.format, "format", "auto", strings.Join(importFormats, ", "))
	fs.StringVar(&f.workload, "workload", "", "name of what was started (default: from the image's command)")
	return cmd
}

// check finds what is wrong with the flags themselves.
func (f *importFlags) check(cmd *cobra.Command) error {
	known := false
	for _, name := range importFormats {
		known = known || name == f.format
	}
	switch {
	case f.image == "":
		return usagef(cmd, "name the image with --image")
	case f.out == "":
		return usagef(cmd, "name a file for the trace with -o")
	case !known:
		return usagef(cmd, "--format %s: one of %s", f.format, strings.Join(importFormats, ", "))
	case f.node.root == "":
		return usagef(cmd, "--root is empty")
	}
	return cmp.Or(f.node.checkPlatform(cmd), (&traceFlags{workload: f.workload}).check(cmd))
}

func (f *importFlags) run(cmd *cobra.Command, src string) error {
	ro := f.node.registry()
	client, err := registry.New(&ro)
	if err != nil {
		return err
	}
	defer client.Close()
	in, err := f.read(cmd.Context(), client, src)
	if err != nil {
		return fmt.Errorf("import %s: %w", src, err)
	}
	if in.trace == nil {
		if err := needRoot("import of paths", "to mount the image and find them"); err != nil {
			return err
		}
	}
	im, err := findImage(cmd.Context(), client, f.image, f.node.wanted())
	if err != nil {
		return err
	}
	t, err := f.made(cmd, in, im)
	if err != nil {
		return fmt.Errorf("import %s: %w", src, err)
	}
	if err := writeOut(cmd, f.out, func(w io.Writer) error { return tracefmt.Encode(w, t) }); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.ErrOrStderr(), "imported %s as %s: %s in %d reads of workload %s\n", src, in.format, size(t.Bytes()), len(t.FirstTouch()), t.Workload)
	return err
}

// made is the trace of the image. What it needs the image's files for but can do
// without is said.
func (f *importFlags) made(cmd *cobra.Command, in *foreign, im *importImage) (*tracefmt.Trace, error) {
	t := &tracefmt.Trace{Header: tracefmt.Header{
		Version: tracefmt.Version, Space: tracefmt.LayerSpace, Tool: tool(), Image: f.image,
		Manifest: im.manifest, Platform: im.platform, Layers: im.layers, Args: im.args,
		Workload: cmp.Or(f.workload, artifact.DefaultWorkload(im.args)),
	}}
	files, layers, err := mapFiles(cmd, &f.node, f.image)
	switch {
	case err == nil:
		t.Layers = layers
	case in.trace == nil:
		return nil, err
	default:
		fmt.Fprintf(cmd.ErrOrStderr(), "reprise: the trace does not name files: %v\n", err)
	}
	if in.trace != nil {
		t.Events = in.trace.Events
	} else {
		var missing []string
		t.Events, missing = files.Events(in.accesses)
		sayMissing(cmd.ErrOrStderr(), missing, len(in.accesses))
	}
	if len(t.Events) == 0 {
		return nil, errors.New("nothing of it is in the image")
	}
	if err := t.Check(); err != nil {
		return nil, fmt.Errorf("it is not of this image: %w", err)
	}
	if files != nil {
		files.Annotate(t)
	}
	t.End = &tracefmt.End{Reason: "imported: " + in.format, Events: len(t.Events), Duration: t.Events[len(t.Events)-1].At}
	for _, e := range t.Events {
		t.End.Bytes += e.Len
	}
	return t, nil
}

// mapFiles finds out where the files of an image are.
func mapFiles(cmd *cobra.Command, f *nodeFlags, ref string) (_ *recorder.Files, _ []tracefmt.Layer, err error) {
	if err := needRoot("finding them out", "to mount the image"); err != nil {
		return nil, nil, err
	}
	// The defaults of the flags that the command does not have.
	n, err := node.Open(&node.Config{
		Root: f.root, Registry: f.registry(), Platform: f.platform, Tool: tool(), Log: logger(cmd),
	})
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	files, info, err := n.Files(cmd.Context(), ref)
	if err != nil {
		return nil, nil, err
	}
	return files, info.Layers, nil
}

// sayMissing lists paths that are not in the image, but not without end.
func sayMissing(w io.Writer, missing []string, of int) {
	const most = 20
	if len(missing) == 0 {
		return
	}
	fmt.Fprintf(w, "%d of %d paths are not in the image:\n", len(missing), of)
	for _, p := range missing[:min(len(missing), most)] {
		fmt.Fprintf(w, "  %s\n", compare.Printable(p))
	}
	if n := len(missing) - most; n > 0 {
		fmt.Fprintf(w, "  and %d more\n", n)
	}
}

// foreign is what was recorded by others: reads of layers, or accesses to files.
type foreign struct {
	format   string
	trace    *tracefmt.Trace // nil if it is accesses
	accesses []tracefmt.Access
}

// maxForeign bounds what is read of a file, in bytes.
const maxForeign = 256 << 20

func readForeign(p []byte, format string) (_ *foreign, err error) {
	in := &foreign{format: format}
	if format == "auto" {
		in.format = guess(p)
	}
	switch in.format {
	case "reference":
		in.trace, err = tracefmt.ReadReference(bytes.NewReader(p))
	case "layer":
		in.trace, in.accesses, err = tracefmt.ReadAcceleration(bytes.NewReader(p))
	case "native":
		err = errors.New("it is a trace of this program: attach it as it is")
	default:
		var found string
		in.accesses, found, err = tracefmt.ReadAccesses(bytes.NewReader(p))
		if err == nil && format != "auto" && found != format {
			err = fmt.Errorf("it is not of format %s but %s", format, found)
		}
		in.format = found
	}
	if err == nil && in.trace == nil && len(in.accesses) == 0 {
		err = errors.New("there is nothing in it")
	}
	return in, err
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.IsDir() {
		return nil, cmp.Or(err, fmt.Errorf("%s is a directory", path))
	}
	p, err := io.ReadAll(io.LimitReader(f, maxForeign+1))
	if err == nil && len(p) > maxForeign {
		err = fmt.Errorf("more than %d bytes", maxForeign)
	}
	return p, err
}

// guess tells the formats apart by how they begin; "" is one of text.
func guess(p []byte) string {
	if len(p) > 262 && string(p[257:262]) == "ustar" || bytes.HasPrefix(p, []byte("\x1f\x8b")) {
		return "layer"
	}
	if _, err := tracefmt.ReadReference(bytes.NewReader(p)); err == nil {
		return "reference"
	}
	if _, err := tracefmt.Read(bytes.NewReader(p)); err == nil {
		return "native"
	}
	if bytes.IndexByte(p[:min(len(p), 512)], 0) >= 0 {
		return "reference" // damaged, as it will say
	}
	return ""
}

// importImage is the image that a trace is made for.
type importImage struct {
	manifest digest.Digest
	platform string
	layers   []tracefmt.Layer
	args     []string
}

// read reads what SRC is: a file, or an image's acceleration layer.
func (f *importFlags) read(ctx context.Context, client *registry.Client, src string) (*foreign, error) {
	_, statErr := os.Stat(src)
	_, refErr := registry.ParseReference(src)
	if !errors.Is(statErr, os.ErrNotExist) || refErr != nil && !strings.HasPrefix(src, "oci:") {
		p, err := readFile(src)
		if err != nil {
			return nil, err
		}
		return readForeign(p, f.format)
	}
	if f.format != "auto" && f.format != "layer" {
		return nil, fmt.Errorf("it is an image, which may have a layer of that kind, but no %s", f.format)
	}
	at, m, _, err := manifestOf(ctx, client, src, f.node.wanted())
	if err != nil {
		return nil, err
	}
	for _, d := range m.Layers {
		if isAcceleration(d) {
			p, err := at.Get(ctx, d)
			if err != nil {
				return nil, err
			}
			return readForeign(p, "layer")
		}
	}
	return nil, errors.New("the image has no acceleration layer")
}

// manifestOf reads the manifest of an image at a registry or in a layout.
func manifestOf(ctx context.Context, client *registry.Client, ref string, wanted *ocispec.Platform) (at convert.Location, m ocispec.Manifest, d ocispec.Descriptor, err error) {
	if at, err = convert.At(ref, client); err != nil {
		return at, m, d, err
	}
	here := platforms.DefaultSpec()
	d, raw, err := at.Manifest(ctx, *cmp.Or(wanted, &here))
	if err != nil {
		return at, m, d, err
	}
	if err = json.Unmarshal(raw, &m); err != nil {
		err = fmt.Errorf("%s: manifest %s: %w", ref, d.Digest, err)
	}
	return at, m, d, err
}

// findImage reads the manifest and the config of a converted image.
func findImage(ctx context.Context, client *registry.Client, ref string, wanted *ocispec.Platform) (*importImage, error) {
	at, m, d, err := manifestOf(ctx, client, ref, wanted)
	if err != nil {
		return nil, err
	}
	p, err := at.Get(ctx, m.Config)
	if err != nil {
		return nil, err
	}
	var c ocispec.Image
	if err := json.Unmarshal(p, &c); err != nil {
		return nil, fmt.Errorf("%s: config %s: %w", ref, m.Config.Digest, err)
	}
	im := &importImage{manifest: d.Digest, layers: layersOf(m.Layers), args: append(c.Config.Entrypoint, c.Config.Cmd...)}
	if c.OS != "" && c.Architecture != "" {
		im.platform = platforms.Format(c.Platform)
	}
	if len(im.layers) == 0 {
		return nil, fmt.Errorf("%s: the image has no layers", ref)
	}
	return im, nil
}
