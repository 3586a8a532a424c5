package node

import (
	"context"
	"errors"
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// An accelerator reads the trace in the acceleration layer of an image, the
// reference's own way to carry one. It is used where there is none beside the
// image. A nil one is an image without.
type accelerator struct {
	src    *source
	layer  ocispec.Descriptor
	layers []tracefmt.Layer // of the image, from the base up
}

func (s *source) accelerator(m *manifest) *accelerator {
	if m.accel == nil {
		return nil
	}
	a := &accelerator{src: s, layer: *m.accel}
	for _, l := range m.layers {
		a.layers = append(a.layers, tracefmt.Layer{Digest: l.Digest, Size: l.Size})
	}
	return a
}

// find returns the trace, and where it is from; nil and nothing if there is none. It
// counts as one of the image's own command. The config must have been read.
func (a *accelerator) find(ctx context.Context, im *Image) (_ *tracefmt.Trace, why string, err error) {
	if a == nil {
		return nil, "", nil
	}
	why = "acceleration layer " + a.layer.Digest.String()
	t, err := a.read(ctx)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", why, err)
	}
	args := im.Command(nil)
	t.Header = tracefmt.Header{
		Version: tracefmt.Version, Space: tracefmt.LayerSpace, Image: im.Ref, Manifest: im.Manifest,
		Platform: im.platform(), Layers: a.layers, Args: args, Workload: artifact.DefaultWorkload(args),
	}
	if err := t.Check(); err != nil {
		return nil, "", fmt.Errorf("%s: it is not of this image: %w", why, err)
	}
	return t, why, nil
}

func (a *accelerator) read(ctx context.Context) (*tracefmt.Trace, error) {
	f, err := a.src.at.Open(ctx, a.layer)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t, accesses, err := tracefmt.ReadAcceleration(f)
	if err == nil && t == nil {
		err = fmt.Errorf("it lists %d files: make a trace of it with 'reprise trace import'", len(accesses))
	}
	if err == nil && len(t.Events) == 0 {
		err = errors.New("there is nothing in it")
	}
	return t, err
}
