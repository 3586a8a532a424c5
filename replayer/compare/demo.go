package compare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/recorder/container"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// DemoOptions are the settings of [Demo].
type DemoOptions struct {
	Link regtest.LinkSpec
	Runs int
	// Keep names a directory in which image, registry and trace stay; by
	// default a temporary one is removed.
	Keep string
	Tool string // signs the trace
	// Say is told of each step that is done, Status of what goes on.
	Say, Status func(string)
	Layer       func(convert.Event)
	Stderr      io.Writer
}

// demo is a running demonstration.
type demo struct {
	o        DemoOptions
	dir      string
	registry *regtest.Server // as it is: for the converter and the recording
	shaped   *regtest.Server // behind the link: for the starts
	link     *regtest.Link
	client   *registry.Client
}

const demoRepository = "demo:overlaybd"

// Demo does the project's whole job on this machine: it makes an image, serves
// it from an embedded registry, converts, records, attaches, and compares.
func Demo(ctx context.Context, o DemoOptions) (r *Result, err error) {
	d := &demo{o: o}
	if err := d.open(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("demo: %w", err), d.close())
	}
	r, err = d.run(ctx)
	if err = errors.Join(err, d.close()); err != nil {
		return nil, fmt.Errorf("demo: %w", err)
	}
	return r, nil
}

// open starts the registry, once as it is and once behind the link.
func (d *demo) open(ctx context.Context) error {
	d.dir = d.o.Keep
	var err error
	if d.dir == "" {
		d.dir, err = os.MkdirTemp("", "reprise-demo-")
	} else {
		err = os.MkdirAll(d.dir, 0o755)
	}
	if err != nil {
		return err
	}
	reg, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: filepath.Join(d.dir, "registry")})
	if err != nil {
		return err
	}
	if d.registry, err = regtest.Start(ctx, reg); err != nil {
		return err
	}
	d.link = regtest.NewLink(d.o.Link, reg)
	if d.shaped, err = regtest.Start(ctx, d.link); err != nil {
		return err
	}
	d.client, err = registry.New(nil)
	return err
}

func (d *demo) close() error {
	var errs []error
	if d.client != nil {
		errs = append(errs, d.client.Close())
	}
	for _, s := range []*regtest.Server{d.shaped, d.registry} {
		if s != nil {
			errs = append(errs, s.Close())
		}
	}
	if d.o.Keep == "" && d.dir != "" {
		errs = append(errs, os.RemoveAll(d.dir))
	}
	return errors.Join(errs...)
}

func (d *demo) run(ctx context.Context) (*Result, error) {
	near := d.registry.Addr + "/" + demoRepository
	if err := d.image(ctx, near); err != nil {
		return nil, err
	}
	if err := d.record(ctx, near); err != nil {
		return nil, err
	}
	return Run(ctx, Options{
		Ref:  d.shaped.Addr + "/" + demoRepository,
		Runs: d.o.Runs, Dir: d.dir, Link: d.link, Stderr: d.o.Stderr,
		Flags: []string{"--net", "own", "--ready-log", DemoReadyLog},
		Progress: func(m Mode, i, n int) {
			d.o.Status(fmt.Sprintf("cold start %d/%d, %s …", i, n, m))
		},
	})
}

// image makes the demo image and converts it.
func (d *demo) image(ctx context.Context, to string) error {
	d.o.Status("making an image of this machine's /usr …")
	begin := time.Now()
	im, err := BuildDemoImage(ctx, d.dir, nil)
	if err != nil {
		return err
	}
	d.o.Say(fmt.Sprintf("image: %d layers, %d files, %.0f MB (%.0f MB compressed), made in %.1f s",
		im.Layers, im.Files, float64(im.Bytes)/1e6, float64(im.Compressed)/1e6, time.Since(begin).Seconds()))
	src, err := convert.At(im.Ref(), d.client)
	if err != nil {
		return err
	}
	dst, err := convert.At(to, d.client)
	if err != nil {
		return err
	}
	begin = time.Now()
	if _, err := convert.Convert(ctx, src, dst, &convert.Options{Workdir: d.dir, Progress: d.o.Layer}); err != nil {
		return err
	}
	d.o.Say(fmt.Sprintf("converted to overlaybd and pushed in %.1f s", time.Since(begin).Seconds()))
	return nil
}

// record records one start and attaches the trace.
func (d *demo) record(ctx context.Context, ref string) error {
	d.o.Status("recording a first start …")
	root, err := os.MkdirTemp(d.dir, "record-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(root)
	file := filepath.Join(root, "demo.trace")
	if err := d.recordTo(ctx, ref, root, file); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	t, err := tracefmt.Open(file)
	if err != nil {
		return err
	}
	m, err := d.client.Manifest(ctx, ref, nil)
	if err != nil {
		return err
	}
	return d.attach(ctx, ref, m.Descriptor, t)
}

func (d *demo) recordTo(ctx context.Context, ref, root, file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	n, err := node.Open(&node.Config{Root: filepath.Join(root, "state"), Tool: d.o.Tool})
	if err != nil {
		return errors.Join(err, f.Close())
	}
	rec, err := n.Record(ctx, ref, &node.RecordOptions{
		Out: f, Rules: recorder.Options{},
		Run: node.RunOptions{Config: container.Config{
			Network: container.OwnNetwork,
			Ready:   container.Ready{Log: regexp.MustCompile(DemoReadyLog)},
		}},
	})
	if err == nil && !rec.Report.Ready {
		err = fmt.Errorf("the workload never got ready: %s", rec.Report.NotReady)
	}
	if err == nil {
		d.o.Say(fmt.Sprintf("recorded a first start: %d reads, %.1f MB of the layers; stopped: %s",
			rec.Stats.Events, float64(rec.Stats.Bytes)/1e6, rec.Reason))
	}
	return errors.Join(err, n.Close(), f.Close())
}

func (d *demo) attach(ctx context.Context, ref string, subject ocispec.Descriptor, t *tracefmt.Trace) error {
	store, err := artifact.New(d.client, ref)
	if err != nil {
		return err
	}
	e, err := store.Push(ctx, subject, t, nil)
	if err != nil {
		return err
	}
	d.o.Say(fmt.Sprintf("attached the trace as %s for workload %s", e.Descriptor.Digest.String()[:19], e.Workload))
	return nil
}
