package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/backstore/lsmt"
)

// layoutScheme begins the name of an image in an OCI layout directory.
const layoutScheme = "oci:"

// A source is where a converted image comes from: a registry, or an OCI layout
// directory, whose blobs are read in place.
type source struct {
	n  *Node
	at convert.Location
}

func (n *Node) source(ref string) (*source, error) {
	at, err := convert.At(ref, n.client)
	return &source{n, at}, err
}

// manifest is what opening needs of a platform's image manifest.
type manifest struct {
	digest digest.Digest
	config ocispec.Descriptor
	layers []ocispec.Descriptor // acceleration layers left out
	accel  *ocispec.Descriptor  // the acceleration layer; nil if there is none
	above  error                // why what is above the layers is none of them; nil if nothing is
}

func (s *source) manifest(ctx context.Context) (*manifest, error) {
	p := platforms.DefaultSpec()
	d, raw, err := s.at.Manifest(ctx, *cmp.Or(s.n.platform, &p))
	if err != nil {
		return nil, err
	}
	m, err := parseManifest(raw)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
	}
	m.digest = d.Digest
	return m, nil
}

// parseManifest makes sure that the image begins with layers in overlaybd format.
func parseManifest(raw []byte) (*manifest, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, err
	}
	out := &manifest{config: m.Config}
	for i, l := range m.Layers {
		if l.Annotations[annotationAccel] == "yes" {
			out.accel = &l
			continue
		}
		if l.Annotations[annotationDigest] == "" {
			out.above = fmt.Errorf("layer %d (%s) is not in overlaybd format: convert the image first with 'reprise convert'", i, l.Digest)
			break
		}
		out.layers = append(out.layers, l)
	}
	if len(out.layers) == 0 {
		return nil, cmp.Or(out.above, errors.New("the image has no layers"))
	}
	if len(out.layers) > lsmt.MaxLayers {
		return nil, fmt.Errorf("%d layers, at most %d are supported", len(out.layers), lsmt.MaxLayers)
	}
	return out, nil
}

// cut leaves out what is above the layers that are asked for. If none are, all
// layers have to be in overlaybd format.
func (m *manifest) cut(layers []digest.Digest) error {
	if layers == nil {
		if m.above != nil {
			return fmt.Errorf("manifest %s: %w", m.digest, m.above)
		}
		return nil
	}
	if len(layers) == 0 || len(layers) > len(m.layers) {
		return fmt.Errorf("manifest %s: %d layers, not the %d that are asked for", m.digest, len(m.layers), len(layers))
	}
	for i, d := range layers {
		if m.layers[i].Digest != d {
			return fmt.Errorf("manifest %s: layer %d is %s, not %s: the image has been changed since", m.digest, i, m.layers[i].Digest, d)
		}
	}
	m.layers = m.layers[:len(layers)]
	return nil
}

// layers opens the blobs of remote layers, and names the files of others. Of each
// it asks at once for what opening the layer reads: a replay that begins before
// that must not fetch parts of it.
func (s *source) layers(m *manifest) ([]backstore.LayerSource, error) {
	sources := make([]backstore.LayerSource, 0, len(m.layers))
	for i, d := range m.layers {
		l, err := s.layer(d)
		if err != nil {
			_ = closeSources(sources)
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		l.Ask()
		sources = append(sources, l)
	}
	return sources, nil
}

func (s *source) layer(d ocispec.Descriptor) (l backstore.LayerSource, err error) {
	l.Digest = d.Digest
	path, origin, err := s.at.Lower(d)
	if err != nil {
		return l, err
	}
	if l.Path = path; path == "" {
		l.Tail, _ = strconv.ParseInt(d.Annotations[backstore.AnnotationTail], 10, 64) // 0 where it is not told
		l.Blob, err = s.n.cache.Blob(d.Digest, d.Size, origin)
	}
	return l, err
}

// closeSources gives up blobs that no image has taken over.
func closeSources(sources []backstore.LayerSource) error {
	var errs []error
	for _, s := range sources {
		if s.Blob != nil {
			errs = append(errs, s.Blob.Close())
		}
	}
	return errors.Join(errs...)
}
