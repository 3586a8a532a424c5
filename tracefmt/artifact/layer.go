package artifact

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/tracefmt"
)

// Annotations of the layers of converted images.
const (
	layerAcceleration = "containerd.io/snapshot/overlaybd/acceleration-layer"
	layerBlobDigest   = "containerd.io/snapshot/overlaybd/blob-digest"
	layerBlobSize     = "containerd.io/snapshot/overlaybd/blob-size"
	layerVersion      = "containerd.io/snapshot/overlaybd/version"
	layerFSType       = "containerd.io/snapshot/overlaybd/blob-fs-type"
)

// Media types of uncompressed layers, in the two kinds of manifests.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
)

// A Layered image is what PushLayer has made.
type Layered struct {
	Manifest ocispec.Descriptor
	Bytes    int64 // of the image that its trace has
	Dropped  int64 // bytes of the trace that are in no layer of the image
}

// PushLayer writes the image m, which is in the store's repository, once more,
// under a tag, with the trace as an acceleration layer: a layer on top that nodes
// with the reference implementation read the trace from, and that others pass
// over. It has no times, workload or paths. The image m itself does not change.
func (s *Store) PushLayer(ctx context.Context, m *registry.Manifest, t *tracefmt.Trace, tag string) (Layered, error) {
	l, err := s.pushLayer(ctx, m, t, s.ref.WithTag(tag))
	if err != nil {
		return Layered{}, fmt.Errorf("acceleration layer of %s@%s: %w", s.ref.Name(), m.Descriptor.Digest, err)
	}
	return l, nil
}

func (s *Store) pushLayer(ctx context.Context, m *registry.Manifest, t *tracefmt.Trace, to registry.Reference) (l Layered, err error) {
	if err := checkAttachable(t); err != nil {
		return l, err
	}
	if len(m.Layers) == 0 {
		return l, errors.New("the image has no layers")
	}
	top := m.Layers[len(m.Layers)-1]
	switch {
	case top.Annotations[layerAcceleration] == "yes":
		return l, errors.New("the image has one: name the image without it")
	case top.Annotations[layerBlobDigest] == "":
		return l, errors.New("the image is not in overlaybd format: convert it first with 'reprise convert'")
	}
	on := onLayers(t, m.Layers)
	_, all := t.Covers(nil)
	if l.Bytes = on.Bytes(); l.Bytes == 0 {
		return l, errors.New("the trace shares no layer with the image")
	}
	l.Dropped = all - l.Bytes
	var blob bytes.Buffer
	if err := tracefmt.WriteAcceleration(&blob, on); err != nil {
		return l, err
	}
	layer := accelerationLayer(m, top, blob.Bytes())
	old, err := s.c.Get(ctx, s.ref.Name(), m.Config)
	if err != nil {
		return l, err
	}
	config, err := withLayer(old, len(m.Layers), layer.Digest)
	if err != nil {
		return l, fmt.Errorf("config %s: %w", m.Config.Digest, err)
	}
	image, raw, err := layeredManifest(m, config, layer)
	if err != nil {
		return l, err
	}
	l.Manifest = describe(m.Descriptor.MediaType, raw)
	if err := s.c.Push(ctx, s.ref.Name(), layer, opener(blob.Bytes())); err != nil {
		return l, err
	}
	if err := s.c.Push(ctx, s.ref.Name(), image.Config, opener(config)); err != nil {
		return l, err
	}
	return l, s.c.Push(ctx, to.String(), l.Manifest, opener(raw))
}

// onLayers is a trace of these layers, with the events that are in them.
func onLayers(t *tracefmt.Trace, layers []ocispec.Descriptor) *tracefmt.Trace {
	index := map[digest.Digest]int{}
	out := &tracefmt.Trace{Header: t.Header}
	out.Layers = nil
	for i, d := range layers {
		index[d.Digest] = i
		out.Layers = append(out.Layers, tracefmt.Layer{Digest: d.Digest, Size: d.Size})
	}
	for _, e := range t.FirstTouch() {
		if i, ok := index[t.Layers[e.Layer].Digest]; ok {
			e.Layer = i
			out.Events = append(out.Events, e)
		}
	}
	return out
}

func describe(mediaType string, p []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
}

// accelerationLayer describes the layer as the converter does that of the reference
// implementation.
func accelerationLayer(m *registry.Manifest, top ocispec.Descriptor, blob []byte) ocispec.Descriptor {
	d := describe(ocispec.MediaTypeImageLayer, blob)
	if m.Descriptor.MediaType == dockerManifest {
		d.MediaType = dockerLayer
	}
	d.Annotations = map[string]string{
		layerAcceleration: "yes",
		layerBlobDigest:   d.Digest.String(),
		layerBlobSize:     fmt.Sprint(d.Size),
	}
	for _, k := range []string{layerVersion, layerFSType} {
		if v := top.Annotations[k]; v != "" {
			d.Annotations[k] = v
		}
	}
	return d
}

// withLayer adds a layer to an image's config; what it does not know of the config
// stays.
func withLayer(config []byte, layers int, diffID digest.Digest) ([]byte, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(config, &fields); err != nil {
		return nil, err
	}
	var old struct {
		RootFS  ocispec.RootFS    `json:"rootfs"`
		History []json.RawMessage `json:"history"`
	}
	if err := json.Unmarshal(config, &old); err != nil {
		return nil, err
	}
	if n := len(old.RootFS.DiffIDs); n != layers || fields == nil {
		return nil, fmt.Errorf("it lists %d layers, the manifest %d", n, layers)
	}
	old.RootFS.DiffIDs = append(old.RootFS.DiffIDs, diffID)
	now := time.Now().UTC()
	line, err := json.Marshal(ocispec.History{Created: &now, CreatedBy: layerAcceleration, Comment: "reprise attach --as layer"})
	if err != nil {
		return nil, err
	}
	if fields["rootfs"], err = json.Marshal(old.RootFS); err != nil {
		return nil, err
	}
	if fields["history"], err = json.Marshal(append(old.History, line)); err != nil {
		return nil, err
	}
	return json.Marshal(fields)
}

func layeredManifest(m *registry.Manifest, config []byte, layer ocispec.Descriptor) (ocispec.Manifest, []byte, error) {
	image := m.Manifest
	inline := len(image.Config.Data) > 0
	image.Config = describe(m.Config.MediaType, config)
	image.Config.Annotations = m.Config.Annotations
	if inline {
		image.Config.Data = config
	}
	image.Layers = append(append([]ocispec.Descriptor(nil), m.Layers...), layer)
	raw, err := json.Marshal(image)
	return image, raw, err
}
