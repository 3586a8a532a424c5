package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/lsmt"
)

// Annotations of a converted layer. The first four are the reference's.
const (
	annotationDigest  = "containerd.io/snapshot/overlaybd/blob-digest"
	annotationSize    = "containerd.io/snapshot/overlaybd/blob-size"
	annotationVersion = "containerd.io/snapshot/overlaybd/version"
	annotationFsType  = "containerd.io/snapshot/overlaybd/blob-fs-type"
	// annotationKey holds the layer's key: what it was made from and how.
	annotationKey = "dev.reprise.convert"

	overlaybdVersion = "0.1.0"
	fsType           = "ext4"
)

// An image is what is known of the source before a byte of a layer is read.
type image struct {
	desc      ocispec.Descriptor
	manifest  ocispec.Manifest
	raw       map[string]json.RawMessage // the manifest, with what this program does not know
	config    map[string]json.RawMessage
	mediaType string // of the manifest
	layers    []layerInfo
}

// layerInfo is one layer of the source.
type layerInfo struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
	chain  digest.Digest // of this layer and all below
	key    string
}

func isIndex(mediaType string) bool { return images.IsIndexType(mediaType) }

func readImage(ctx context.Context, src Source, o *Options) (*image, error) {
	d, raw, err := src.Manifest(ctx, *o.Platform)
	if err != nil {
		return nil, err
	}
	im := &image{desc: d}
	if err := im.parseManifest(raw); err != nil {
		return nil, fmt.Errorf("%s: manifest %s: %w", src, d.Digest, err)
	}
	p, err := src.Get(ctx, im.manifest.Config)
	if err != nil {
		return nil, fmt.Errorf("%s: config: %w", src, err)
	}
	if err := im.parseConfig(p); err != nil {
		return nil, fmt.Errorf("%s: config %s: %w", src, im.manifest.Config.Digest, err)
	}
	for i := range im.layers {
		im.layers[i].key = o.key(im.layers[i].chain)
	}
	return im, nil
}

func (im *image) parseManifest(raw []byte) error {
	if err := json.Unmarshal(raw, &im.manifest); err != nil {
		return err
	}
	if err := json.Unmarshal(raw, &im.raw); err != nil {
		return err
	}
	mt := im.desc.MediaType
	if mt == "" {
		mt = im.manifest.MediaType
	}
	if mt != images.MediaTypeDockerSchema2Manifest && mt != ocispec.MediaTypeImageManifest {
		return fmt.Errorf("media type %q is not an image manifest", mt)
	}
	im.mediaType = mt
	if !images.IsConfigType(im.manifest.Config.MediaType) {
		return fmt.Errorf("not a container image: its config is of type %q", im.manifest.Config.MediaType)
	}
	switch n := len(im.manifest.Layers); {
	case n == 0:
		return errors.New("the image has no layers")
	case n > lsmt.MaxLayers:
		return fmt.Errorf("%d layers, the format has at most %d", n, lsmt.MaxLayers)
	}
	for i, d := range im.manifest.Layers {
		if err := checkLayer(d); err != nil {
			return fmt.Errorf("layer %d (%s): %w", i, d.Digest, err)
		}
		im.layers = append(im.layers, layerInfo{desc: d})
	}
	return nil
}

var layerTypes = []string{
	ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
	ocispec.MediaTypeImageLayerNonDistributable,     //nolint:staticcheck // images have them
	ocispec.MediaTypeImageLayerNonDistributableGzip, //nolint:staticcheck // images have them
	ocispec.MediaTypeImageLayerNonDistributableZstd, //nolint:staticcheck // images have them
	images.MediaTypeDockerSchema2Layer, images.MediaTypeDockerSchema2LayerGzip, images.MediaTypeDockerSchema2LayerZstd,
	images.MediaTypeDockerSchema2LayerForeign, images.MediaTypeDockerSchema2LayerForeignGzip,
}

func checkLayer(d ocispec.Descriptor) error {
	if _, ok := d.Annotations[annotationDigest]; ok {
		return errors.New("already in overlaybd format: there is nothing to convert")
	}
	if !slices.Contains(layerTypes, d.MediaType) {
		return fmt.Errorf("media type %q: %w", d.MediaType, errors.ErrUnsupported)
	}
	return d.Digest.Validate()
}

// isForeign tells a layer that registries need not have.
func isForeign(mediaType string) bool {
	return strings.Contains(mediaType, ".nondistributable.") || strings.Contains(mediaType, ".foreign.")
}

func (im *image) parseConfig(p []byte) error {
	var c ocispec.Image
	if err := json.Unmarshal(p, &c); err != nil {
		return err
	}
	if err := json.Unmarshal(p, &im.config); err != nil {
		return err
	}
	if c.OS != "" && c.OS != "linux" {
		return fmt.Errorf("an image for %s, only linux is supported", c.OS)
	}
	if len(c.RootFS.DiffIDs) != len(im.layers) {
		return fmt.Errorf("%d diff IDs for %d layers", len(c.RootFS.DiffIDs), len(im.layers))
	}
	for i, id := range c.RootFS.DiffIDs {
		if err := id.Validate(); err != nil {
			return fmt.Errorf("diff ID %q: %w", id, err)
		}
		im.layers[i].diffID = id
	}
	for i, chain := range identity.ChainIDs(slices.Clone(c.RootFS.DiffIDs)) {
		im.layers[i].chain = chain
	}
	return nil
}

// uuid is the LSMT UUID of a layer.
func uuid(chain digest.Digest) string {
	h := chain.Encoded()
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:32]}, "-")
}

// layerDescriptor describes a converted layer; a tail of 0 is not known. The
// media type is that of a plain tar, which the blob is.
func (im *image) layerDescriptor(d digest.Digest, size, tail int64, key string) ocispec.Descriptor {
	mt := ocispec.MediaTypeImageLayer
	if im.mediaType == images.MediaTypeDockerSchema2Manifest {
		mt = images.MediaTypeDockerSchema2Layer
	}
	annotations := map[string]string{
		annotationDigest:  d.String(),
		annotationSize:    strconv.FormatInt(size, 10),
		annotationVersion: overlaybdVersion,
		annotationFsType:  fsType,
		annotationKey:     key,
	}
	if tail > 0 {
		annotations[backstore.AnnotationTail] = strconv.FormatInt(tail, 10)
	}
	return ocispec.Descriptor{MediaType: mt, Digest: d, Size: size, Annotations: annotations}
}

// maxInlineConfig is the size of a config, in bytes, up to which the manifest
// carries it in its descriptor too.
const maxInlineConfig = 16 << 10

// A converted image, ready to be written.
type converted struct {
	configDesc, desc ocispec.Descriptor
	config, manifest []byte
}

// converted makes the config and the manifest of the image with new layers.
// All else stays as it is in the source.
func (im *image) converted(layers []ocispec.Descriptor) (c converted, err error) {
	diffIDs := make([]digest.Digest, len(layers))
	for i, d := range layers {
		diffIDs[i] = d.Digest
	}
	if c.config, err = withField(im.config, "rootfs", ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}); err != nil {
		return c, err
	}
	c.configDesc = im.manifest.Config
	c.configDesc.Digest, c.configDesc.Size, c.configDesc.Data = digest.FromBytes(c.config), int64(len(c.config)), nil
	inManifest := c.configDesc
	if im.mediaType == ocispec.MediaTypeImageManifest && len(c.config) <= maxInlineConfig {
		inManifest.Data = c.config // a start needs it at once: one request less
	}
	if im.raw["config"], err = json.Marshal(inManifest); err != nil {
		return c, err
	}
	if c.manifest, err = withField(im.raw, "layers", layers); err != nil {
		return c, err
	}
	c.desc = ocispec.Descriptor{
		MediaType: im.mediaType,
		Digest:    digest.FromBytes(c.manifest),
		Size:      int64(len(c.manifest)),
	}
	return c, nil
}

func withField(m map[string]json.RawMessage, key string, value any) ([]byte, error) {
	p, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	m[key] = p
	return json.Marshal(m)
}

// matching returns the layers of a manifest that have the given keys, as far
// as they do.
func matching(manifest []byte, keys []string) []ocispec.Descriptor {
	var m ocispec.Manifest
	if json.Unmarshal(manifest, &m) != nil {
		return nil
	}
	n := 0
	for n < len(keys) && n < len(m.Layers) && m.Layers[n].Annotations[annotationKey] == keys[n] &&
		m.Layers[n].Digest.Validate() == nil {
		n++
	}
	return m.Layers[:n:n]
}
