package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clock is time that only sleeping makes pass.
type clock struct {
	mu    sync.Mutex
	t     time.Time
	slept time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) sleep(ctx context.Context, d time.Duration) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
	c.slept += d
	return context.Cause(ctx)
}

// newClient has nothing of the machine's configuration, and a clock of its own.
func newClient(t *testing.T, o Options) (*Client, *clock) {
	t.Helper()
	dir := t.TempDir()
	if o.HostsDir == "" {
		o.HostsDir = dir
	}
	if o.DockerConfigDir == "" {
		o.DockerConfigDir = dir
	}
	if o.LockDir == "" {
		o.LockDir = dir
	}
	o.PlainHTTP = !o.Insecure
	c, err := New(&o)
	require.NoError(t, err)
	k := &clock{t: time.Now()}
	c.now, c.sleep = k.now, k.sleep
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c, k
}

func serve(t *testing.T, h http.Handler) *regtest.Server {
	t.Helper()
	s, err := regtest.Start(context.Background(), h)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// fixture is an embedded registry behind a link, and a client.
type fixture struct {
	*Client
	clock *clock
	link  *regtest.Link
	repo  string // 127.0.0.1:PORT/some/repo
	addr  string
}

func newFixture(t *testing.T, o Options, ro regtest.RegistryOptions) *fixture {
	t.Helper()
	ro.Dir = t.TempDir()
	g, err := regtest.NewRegistry(&ro)
	require.NoError(t, err)
	l := regtest.NewLink(regtest.LinkSpec{}, g)
	s := serve(t, l)
	c, k := newClient(t, o)
	return &fixture{Client: c, clock: k, link: l, repo: s.Addr + "/some/repo", addr: s.Addr}
}

func opener(b []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}

func descriptor(mediaType string, b []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
}

// push writes content, random with that seed, and starts counting anew.
func (f *fixture) push(t *testing.T, seed uint64, n int) (ocispec.Descriptor, []byte) {
	t.Helper()
	b := make([]byte, n)
	rng := rand.NewChaCha8([32]byte{byte(seed)})
	rng.Read(b)
	d := descriptor("application/octet-stream", b)
	require.NoError(t, f.Push(t.Context(), f.repo, d, opener(b)))
	f.link.Reset()
	return d, b
}

func mustJSON(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	require.NoError(t, err)
	return b
}

func image(config string, subject *ocispec.Descriptor) ocispec.Manifest {
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    descriptor(ocispec.MediaTypeImageConfig, []byte(config)),
		Layers:    []ocispec.Descriptor{},
		Subject:   subject,
	}
	if subject != nil {
		m.ArtifactType = "application/vnd.test"
		m.Config = ocispec.DescriptorEmptyJSON
		m.Annotations = map[string]string{"n": config}
	}
	return m
}

// fetch reads a range to its end.
func fetch(ctx context.Context, b *Blob, off, n int64) ([]byte, error) {
	rc, err := b.Fetch(ctx, off, n, backstore.Demand)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	return io.ReadAll(rc)
}

// script answers the k-th blob read with the k-th fault, and those after with
// none.
func script(faults ...*regtest.Fault) func(*http.Request) *regtest.Fault {
	var mu sync.Mutex
	return func(r *http.Request) *regtest.Fault {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if len(faults) == 0 {
			return nil
		}
		f := faults[0]
		faults = faults[1:]
		return f
	}
}

func always(f regtest.Fault) func(*http.Request) *regtest.Fault {
	return func(*http.Request) *regtest.Fault { return &f }
}

func writeHosts(t *testing.T, dir, registry, toml string) {
	t.Helper()
	d := filepath.Join(dir, strings.Replace(registry, ":", "_", 1)+"_")
	require.NoError(t, os.MkdirAll(d, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(d, "hosts.toml"), []byte(toml), 0o644))
}

func writeDockerConfig(t *testing.T, registry, user, password string) string {
	t.Helper()
	dir := t.TempDir()
	cfg := map[string]any{"auths": map[string]any{registry: map[string]string{"username": user, "password": password}}}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), mustJSON(t, cfg), 0o600))
	return dir
}
