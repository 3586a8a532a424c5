package node

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/replayer"
	"github.com/reprise-project/reprise/tracefmt"
)

// accelerated pushes the site's image with an acceleration layer, and makes it the
// site's own.
func (s *site) accelerated(t *testing.T, layer []byte) {
	t.Helper()
	to, err := convert.At(s.ref, s.n.Registry())
	require.NoError(t, err)
	_, raw, err := to.Manifest(t.Context(), ocispec.Platform{OS: "linux", Architecture: "arm64"})
	require.NoError(t, err)
	var m ocispec.Manifest
	require.NoError(t, json.Unmarshal(raw, &m))
	d := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(layer), Size: int64(len(layer)),
		Annotations: map[string]string{annotationAccel: "yes"},
	}
	require.NoError(t, to.Push(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil }))
	m.Layers = append(m.Layers, d)
	raw, err = json.Marshal(m)
	require.NoError(t, err)
	s.ref = s.ref[:strings.LastIndex(s.ref, ":")+1] + d.Digest.Encoded()[:12]
	to, err = convert.At(s.ref, s.n.Registry())
	require.NoError(t, err)
	s.desc = ocispec.Descriptor{MediaType: m.MediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	require.NoError(t, to.PushManifest(t.Context(), s.desc, raw))
}

func TestAccelerationLayer(t *testing.T) {
	s := newSite(t)
	var layer bytes.Buffer
	require.NoError(t, tracefmt.WriteAcceleration(&layer, s.trace(t, s.open(t, ImageOptions{}))))
	s.accelerated(t, layer.Bytes())
	im := s.open(t, ImageOptions{Trace: "auto"})
	trace, why := im.Trace(t.Context())
	require.NotNil(t, trace, why)
	require.Contains(t, why, "acceleration layer sha256:")
	require.False(t, im.trace.foreign)
	r := s.n.replay(t.Context(), im, replayer.Options{})
	require.True(t, r.Used, r.Reason)
	im = s.open(t, ImageOptions{Trace: "auto", Workload: "another"})
	trace, _ = im.Trace(t.Context())
	require.NotNil(t, trace)
	require.True(t, im.trace.foreign)

	s.accelerated(t, []byte("not a tar"))
	im = s.open(t, ImageOptions{Trace: "auto"})
	trace, why = im.Trace(t.Context())
	require.Nil(t, trace)
	require.Contains(t, why, "acceleration layer sha256:")
	require.True(t, im.trace.hasFailed(), "it is to be expected")
}
