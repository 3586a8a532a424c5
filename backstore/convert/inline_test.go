package convert

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

// inlineImage is the source of an image with a command of that many bytes.
func inlineImage(t *testing.T, mediaType string, n int, data bool) (*image, []ocispec.Descriptor) {
	t.Helper()
	layer := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString("layer"), Size: 5}
	if mediaType == images.MediaTypeDockerSchema2Manifest {
		layer.MediaType = images.MediaTypeDockerSchema2Layer
	}
	config, err := json.Marshal(ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		Config:   ocispec.ImageConfig{Cmd: []string{"<&>" + strings.Repeat("x", n)}},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromString("diff")}},
	})
	require.NoError(t, err)
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	if data {
		d.Data = config
	}
	raw, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, Config: d, Layers: []ocispec.Descriptor{layer},
	})
	require.NoError(t, err)
	im := &image{desc: ocispec.Descriptor{MediaType: mediaType}}
	require.NoError(t, im.parseManifest(raw))
	require.NoError(t, im.parseConfig(config))
	return im, []ocispec.Descriptor{im.layerDescriptor(digest.FromString("converted"), 9, 4, "key")}
}

// TestConfigInline looks for the config in the manifest, where a start needs no
// request for it.
func TestConfigInline(t *testing.T) {
	for name, c := range map[string]struct {
		mediaType string
		n         int
		inline    bool
	}{
		"small":                 {ocispec.MediaTypeImageManifest, 100, true},
		"large":                 {ocispec.MediaTypeImageManifest, maxInlineConfig, false},
		"docker, no such field": {images.MediaTypeDockerSchema2Manifest, 100, false},
	} {
		t.Run(name, func(t *testing.T) {
			var first converted
			for i, data := range []bool{false, false, true} { // whether the source has it inline
				im, layers := inlineImage(t, c.mediaType, c.n, data)
				got, err := im.converted(layers)
				require.NoError(t, err)
				var m ocispec.Manifest
				require.NoError(t, json.Unmarshal(got.manifest, &m))
				require.Equal(t, digest.FromBytes(got.config), m.Config.Digest)
				require.EqualValues(t, len(got.config), m.Config.Size)
				require.Empty(t, got.configDesc.Data, "the config's own descriptor")
				if c.inline {
					require.Equal(t, got.config, m.Config.Data)
				} else {
					require.Nil(t, m.Config.Data)
				}
				if i == 0 {
					first = got
				}
				require.Equal(t, first.desc, got.desc, "the same input gives the same image")
			}
		})
	}
}
