package backstore_test

import (
	"bytes"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/zfile"
)

const deviceSize = 16 << 20

// site is a registry with an image of some layers.
type site struct {
	link   *regtest.Link
	addr   string
	srv    *http.Server
	hang   atomic.Bool
	asked  atomic.Int64
	layers []ocispec.Descriptor
	device []byte
}

func newSite(t *testing.T, layers int) *site {
	t.Helper()
	reg, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: t.TempDir()})
	require.NoError(t, err)
	s := &site{link: regtest.NewLink(regtest.LinkSpec{}, reg), device: make([]byte, deviceSize), addr: "127.0.0.1:0"}
	s.up(t)
	t.Cleanup(func() { s.down(t) })
	c := s.client(t)
	for i := range layers {
		s.addLayer(t, c, byte(i+1))
	}
	s.asked.Store(0)
	return s
}

// up serves the registry, at the address that it had.
func (s *site) up(t *testing.T) {
	t.Helper()
	var lis net.Listener
	require.Eventually(t, func() (ok bool) {
		var err error
		lis, err = net.Listen("tcp", s.addr)
		return err == nil
	}, 10*time.Second, time.Millisecond)
	s.addr = lis.Addr().String()
	s.srv = &http.Server{Handler: s}
	srv := s.srv
	go func() { _ = srv.Serve(lis) }()
}

func (s *site) down(t *testing.T) {
	t.Helper()
	require.NoError(t, s.srv.Close())
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.asked.Add(1)
	if s.hang.Load() {
		<-r.Context().Done() // it is never answered, also when the registry is back
		return
	}
	s.link.ServeHTTP(w, r)
}

func (s *site) client(t *testing.T) *registry.Client {
	t.Helper()
	dir := t.TempDir()
	c, err := registry.New(&registry.Options{HostsDir: dir, DockerConfigDir: dir, LockDir: dir, PlainHTTP: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

// addLayer pushes a layer of bytes that do not compress: every third MiB of the
// device.
func (s *site) addLayer(t *testing.T, c *registry.Client, seed byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "upper"))
	require.NoError(t, err)
	w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: deviceSize})
	require.NoError(t, err)
	defer w.Close()
	for off := int64(seed) << 20; off < deviceSize; off += 3 << 20 {
		p := s.device[off : off+1<<20]
		for i := range p {
			p[i] = byte(uint32(i)*2654435761>>13) + seed
		}
		_, err := w.WriteAt(p, off)
		require.NoError(t, err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "blob"))
	require.NoError(t, err)
	defer out.Close()
	z, err := zfile.NewWriter(out, &zfile.Options{Tar: true})
	require.NoError(t, err)
	require.NoError(t, w.Commit(t.Context(), z, lsmt.CommitOptions{}))
	require.NoError(t, z.Close())
	p, err := os.ReadFile(out.Name())
	require.NoError(t, err)
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(p), Size: int64(len(p))}
	require.NoError(t, c.Push(t.Context(), s.addr+"/some/repo", d, func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(p)), nil
	}))
	s.layers = append(s.layers, d)
}

func openCache(t *testing.T, dir string) *backstore.Cache {
	t.Helper()
	c, err := backstore.OpenCache(dir, &backstore.CacheOptions{Log: slog.New(slog.DiscardHandler), FlushEvery: time.Hour})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

func (s *site) open(t *testing.T, cache *backstore.Cache) *backstore.Image {
	t.Helper()
	c := s.client(t)
	var sources []backstore.LayerSource
	for _, d := range s.layers {
		b, err := c.Blob(s.addr+"/some/repo", d)
		require.NoError(t, err)
		blob, err := cache.Blob(d.Digest, d.Size, b)
		require.NoError(t, err)
		sources = append(sources, backstore.LayerSource{Blob: blob, Digest: d.Digest})
	}
	im, err := backstore.OpenImage(t.Context(), sources)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, im.Close()) })
	return im
}

// Layers that were opened once are opened again without the registry, and what
// was read is read again, also by a process that finds them as a killed one has
// left them: nothing was closed or flushed here.
func TestReopeningAsksNobody(t *testing.T) {
	s := newSite(t, 3)
	dir := t.TempDir()
	im := s.open(t, openCache(t, dir))
	p, q := make([]byte, 2<<20), make([]byte, 2<<20)
	_, err := im.ReadAt(p, 3<<20)
	require.NoError(t, err)
	s.down(t)
	asked := s.asked.Load()
	again := s.open(t, openCache(t, dir))
	_, err = again.ReadAt(q, 3<<20)
	require.NoError(t, err)
	require.True(t, bytes.Equal(p, q))
	require.True(t, bytes.Equal(s.device[3<<20:5<<20], q))
	require.Equal(t, asked, s.asked.Load())
	require.Zero(t, again.Stats().DemandRequests)
}

// The registry goes away in the middle of a lazy sequence of reads, which
// completes once it is back.
func TestRegistryAway(t *testing.T) {
	for name, tc := range map[string]struct{ gone, back func(*testing.T, *site) }{
		"refuses": {func(t *testing.T, s *site) { s.down(t) }, func(t *testing.T, s *site) { s.up(t) }},
		"hangs":   {func(_ *testing.T, s *site) { s.hang.Store(true) }, func(_ *testing.T, s *site) { s.hang.Store(false) }},
		"503": {func(_ *testing.T, s *site) {
			s.link.SetFault(func(*http.Request) *regtest.Fault { return &regtest.Fault{Status: 503} })
		}, func(_ *testing.T, s *site) { s.link.SetFault(nil) }},
		"resets": {func(_ *testing.T, s *site) {
			s.link.SetFault(func(*http.Request) *regtest.Fault { return &regtest.Fault{Reset: true, ResetAt: 1} })
		}, func(_ *testing.T, s *site) { s.link.SetFault(nil) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, 3)
			im := s.open(t, openCache(t, t.TempDir()))
			read := make(chan error, 1)
			var at atomic.Int64
			half, resume := make(chan struct{}), make(chan struct{})
			go func() {
				got := make([]byte, 128<<10)
				for off := int64(0); off < deviceSize; off += int64(len(got)) {
					if off == deviceSize/2 {
						close(half)
						<-resume
					}
					if _, err := im.ReadAt(got, off); err != nil {
						read <- err
						return
					}
					if !bytes.Equal(got, s.device[off:off+int64(len(got))]) {
						read <- io.ErrUnexpectedEOF
						return
					}
					at.Store(off)
				}
				read <- nil
			}()
			<-half
			tc.gone(t, s)
			close(resume)
			attempts := func() int {
				for _, w := range im.Waiting() {
					return w.Attempts
				}
				return 0
			}
			require.Eventually(t, func() bool { return attempts() >= 3 }, time.Minute, time.Millisecond)
			require.NotEmpty(t, im.Explain(at.Load(), 256<<10))
			require.Less(t, attempts(), 20)
			tc.back(t, s)
			require.NoError(t, <-read)
			require.Empty(t, im.Waiting())
		})
	}
}

// Close does not wait for a registry that hangs, and ends the reads.
func TestCloseWhileTheRegistryHangs(t *testing.T) {
	s := newSite(t, 3)
	im := s.open(t, openCache(t, t.TempDir()))
	s.hang.Store(true)
	read := make(chan error, 4)
	for i := range int64(4) {
		go func() {
			_, err := im.ReadAt(make([]byte, 4096), (1+i)<<20)
			read <- err
		}()
	}
	before := s.asked.Load()
	require.Eventually(t, func() bool { return s.asked.Load() >= before+2 }, time.Minute, time.Millisecond)
	require.NoError(t, im.Close())
	for range 4 {
		require.Error(t, <-read)
	}
}

// A writable layer is found again as a killed process has left it, discards
// included, and writes of a sector do not hide what is below the rest of its
// block.
func TestUpperIsFoundAgain(t *testing.T) {
	s := newSite(t, 2)
	dir := t.TempDir()
	path := filepath.Join(dir, "upper")
	im := s.open(t, openCache(t, dir))
	w, err := backstore.CreateUpper(path, deviceSize)
	require.NoError(t, err)
	im.Writable(w)
	want := bytes.Clone(s.device)
	for _, c := range []struct {
		off, n int64
		fill   byte
	}{
		{1<<20 + 512, 512, 7}, {2 << 20, 8192, 8}, {4<<20 - 1024, 4096, 9}, {deviceSize - 512, 512, 10},
		{4 << 20, 1 << 20, 0}, {1<<20 + 8192, 512, 0}, {2<<20 + 512, 1024, 0}, {0, 1 << 20, 0}, {4<<20 + 5120, 1024, 11},
	} {
		p := want[c.off : c.off+c.n]
		for i := range p {
			p[i] = c.fill
		}
		if c.fill == 0 {
			require.NoError(t, im.Discard(c.off, c.n))
			continue
		}
		_, err := im.WriteAt(p, c.off)
		require.NoError(t, err)
	}
	got := make([]byte, deviceSize)
	_, err = im.ReadAt(got, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))

	again := s.open(t, openCache(t, dir))
	w, err = backstore.OpenUpper(path)
	require.NoError(t, err)
	again.Writable(w)
	_, err = again.ReadAt(got, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
	require.NoError(t, again.Sync())
	require.NoError(t, backstore.RemoveUpper(path))
	left, err := filepath.Glob(path + "*")
	require.NoError(t, err)
	require.Empty(t, left)
}
