package node

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer"
	"github.com/reprise-project/reprise/tracefmt"
	"github.com/reprise-project/reprise/tracefmt/artifact"
)

// A site is an image at a registry.
type site struct {
	*regtest.Link
	n    *Node
	log  *logged
	ref  string
	desc ocispec.Descriptor
}

func newSite(t *testing.T) *site { return newSiteOf(t, below) }

// newSiteOf is one whose image has content at 8192.
func newSiteOf(t *testing.T, content []byte) *site {
	t.Helper()
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: t.TempDir()})
	require.NoError(t, err)
	s := &site{Link: regtest.NewLink(regtest.LinkSpec{}, g)}
	server, err := regtest.Start(context.Background(), s.Link)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s.n, s.log = openNode(t)
	s.ref = server.Addr + "/some/image:1"

	l := newLayout(t)
	layer := l.converted(testLayer(t, 8192, content))
	s.desc = l.image(ocispec.ImageConfig{Entrypoint: []string{"/server"}}, layer)
	l.index(s.desc)
	from, err := convert.At("oci:"+l.dir, nil)
	require.NoError(t, err)
	to, err := convert.At(s.ref, s.n.Registry())
	require.NoError(t, err)
	_, raw, err := from.Manifest(t.Context(), ocispec.Platform{OS: "linux", Architecture: "arm64"})
	require.NoError(t, err)
	m, err := parseManifest(raw)
	require.NoError(t, err)
	for _, d := range append(m.layers, m.config) {
		f, err := os.ReadFile(l.blob(d.Digest))
		require.NoError(t, err)
		require.NoError(t, to.Push(t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(f)), nil }))
	}
	require.NoError(t, to.PushManifest(t.Context(), s.desc, raw))
	return s
}

func (s *site) open(t *testing.T, o ImageOptions) *Image {
	t.Helper()
	im, err := s.n.OpenImage(t.Context(), s.ref, &o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, im.Close()) })
	return im
}

// trace makes one of the image's layer.
func (s *site) trace(t *testing.T, im *Image) *tracefmt.Trace {
	h := im.traceHeader("tool", ImageOptions{})
	return &tracefmt.Trace{Header: h, Events: []tracefmt.Event{{Off: 4096, Len: 4096}}, End: &tracefmt.End{Reason: "ready: exit 0"}}
}

func TestTraceBesideImage(t *testing.T) {
	s := newSite(t)
	im := s.open(t, ImageOptions{Trace: "auto"})
	trace, why := im.Trace(t.Context())
	require.Nil(t, trace)
	require.Contains(t, why, "no trace of workload server-")
	require.False(t, im.trace.hasFailed(), "that is usual")

	store, err := artifact.New(s.n.Registry(), s.ref)
	require.NoError(t, err)
	e, err := store.Push(t.Context(), s.desc, s.trace(t, im), nil)
	require.NoError(t, err)
	for _, o := range []ImageOptions{
		{Trace: "auto"}, {Trace: "auto", Workload: e.Workload, Args: []string{"other"}}, {Trace: string(e.Descriptor.Digest)},
	} {
		im := s.open(t, o)
		trace, why := im.Trace(t.Context())
		require.NotNil(t, trace, why)
		require.Contains(t, why, string(e.Descriptor.Digest))
		require.False(t, im.trace.foreign)
		r := s.n.replay(t.Context(), im, replayer.Options{})
		require.Equal(t, "replayed", r.Reason)
		require.True(t, r.Used)
	}
	im = s.open(t, ImageOptions{Trace: string(e.Descriptor.Digest), Args: []string{"other"}})
	trace, _ = im.Trace(t.Context())
	require.NotNil(t, trace)
	require.True(t, im.trace.foreign, "another command")
	// A workload without one gets all there are.
	im = s.open(t, ImageOptions{Trace: "auto", Args: []string{"other"}})
	trace, why = im.Trace(t.Context())
	require.NotNil(t, trace, why)
	require.Equal(t, "union of the traces of other workloads: "+e.Workload, why)
	require.Empty(t, s.log.String())

	// A registry that has trouble with it costs the replay only.
	s.SetFault(func(r *http.Request) *regtest.Fault {
		if strings.Contains(r.URL.Path, "reprise-") || strings.Contains(r.URL.Path, "/referrers/") {
			return &regtest.Fault{Status: http.StatusForbidden}
		}
		return nil
	})
	im = s.open(t, ImageOptions{Trace: "auto", Workload: "another"})
	r := s.n.replay(t.Context(), im, replayer.Options{})
	require.False(t, r.Used)
	require.Contains(t, s.log.String()+r.Reason, "no trace")
}

// A lookup that takes long is given up, and by Close at once.
func TestLookupIsBounded(t *testing.T) {
	s := newSite(t)
	s.SetFault(func(r *http.Request) *regtest.Fault {
		if strings.Contains(r.URL.Path, "reprise-") || strings.Contains(r.URL.Path, "/referrers/") {
			return &regtest.Fault{Stall: time.Hour}
		}
		return nil
	})
	s.n.o.TraceWait = time.Millisecond
	im := s.open(t, ImageOptions{Trace: "auto"})
	trace, why := im.Trace(t.Context())
	require.Nil(t, trace)
	require.Contains(t, why, "took longer than 1ms")
	require.True(t, im.trace.hasFailed())
	require.False(t, s.n.replay(t.Context(), im, replayer.Options{}).Used)
	require.Contains(t, s.log.String(), "no trace is replayed")

	s.n.o.TraceWait = time.Hour
	im = s.open(t, ImageOptions{Trace: "auto"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, why = im.Trace(ctx)
	require.NotEmpty(t, why)
	require.NoError(t, im.Close())
}

func TestTraceFiles(t *testing.T) {
	s := newSite(t)
	im := s.open(t, ImageOptions{})
	_, why := im.Trace(t.Context())
	require.Equal(t, "no trace was asked for", why)
	dir := t.TempDir()
	write := func(name string, trace *tracefmt.Trace) string {
		f, err := os.Create(filepath.Join(dir, name))
		require.NoError(t, err)
		require.NoError(t, tracefmt.Encode(f, trace))
		require.NoError(t, f.Close())
		return f.Name()
	}
	good := s.trace(t, im)
	foreign := s.trace(t, im)
	foreign.Layers = []tracefmt.Layer{{Digest: digest.FromString("other"), Size: 1, Decoded: 1 << 20}}
	garbage := filepath.Join(dir, "garbage")
	require.NoError(t, os.WriteFile(garbage, []byte("garbage"), 0o644))
	tests := []struct{ trace, reason, warns string }{
		{write("good", good), "replayed", ""},
		{write("foreign", foreign), "shares no layer", "the trace is not replayed"},
		{garbage, "not a trace", "no trace is replayed"},
		{dir, "not a file", "no trace is replayed"},
		{filepath.Join(dir, "missing"), "no such file", "no trace is replayed"},
		{"sha256:" + strings.Repeat("0", 64), "404", "no trace is replayed"},
	}
	before := s.n.outcomes.read()
	for _, tt := range tests {
		s.log.Reset()
		im := s.open(t, ImageOptions{Trace: tt.trace})
		r := s.n.replay(t.Context(), im, replayer.Options{})
		require.Contains(t, r.Reason, tt.reason)
		require.Contains(t, s.log.String(), tt.warns)
		if tt.warns == "" {
			require.Empty(t, s.log.String())
		}
	}
	now := s.n.outcomes.read()
	require.EqualValues(t, 1, now[replayComplete]-before[replayComplete])
	require.EqualValues(t, 1, now[replayUnused]-before[replayUnused], "of another image")
	require.EqualValues(t, 4, now[replayNone]-before[replayNone])
	require.Contains(t, scrape(t, NewServer(s.n, nil)), `reprise_replays_total{outcome="stopped"}`)
}
