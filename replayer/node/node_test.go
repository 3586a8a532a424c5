package node

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/zfile"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// logged collects what a node warns of.
type logged struct{ bytes.Buffer }

func openNode(t testing.TB) (*Node, *logged) {
	t.Helper()
	log := &logged{}
	dir := t.TempDir()
	n, err := Open(&Config{
		Root:     filepath.Join(dir, "state"),
		Registry: registry.Options{PlainHTTP: true, HostsDir: dir, DockerConfigDir: dir, LockDir: dir},
		Log:      slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, n.Close()) })
	return n, log
}

const testSize = 1 << 20

// testLayer is a layer blob that has p at off of the device.
func testLayer(t testing.TB, off int64, p []byte) []byte {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "upper"))
	require.NoError(t, err)
	w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: testSize})
	require.NoError(t, err)
	defer w.Close()
	_, err = w.WriteAt(p, off)
	require.NoError(t, err)
	out, err := os.Create(filepath.Join(dir, "blob"))
	require.NoError(t, err)
	defer out.Close()
	z, err := zfile.NewWriter(out, &zfile.Options{Tar: true})
	require.NoError(t, err)
	require.NoError(t, w.Commit(t.Context(), z, lsmt.CommitOptions{}))
	require.NoError(t, z.Close())
	blob, err := os.ReadFile(out.Name())
	require.NoError(t, err)
	return blob
}

// layoutDir is an OCI layout that is being written.
type layoutDir struct {
	t   testing.TB
	dir string
}

func newLayout(t testing.TB) layoutDir {
	l := layoutDir{t, t.TempDir()}
	require.NoError(t, os.MkdirAll(filepath.Join(l.dir, "blobs/sha256"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(l.dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
	return l
}

func (l layoutDir) put(mediaType string, p []byte) ocispec.Descriptor {
	d := digest.FromBytes(p)
	require.NoError(l.t, os.WriteFile(l.blob(d), p, 0o644))
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(p))}
}

func (l layoutDir) blob(d digest.Digest) string {
	return filepath.Join(l.dir, "blobs/sha256", d.Encoded())
}

func (l layoutDir) json(mediaType string, v any) ocispec.Descriptor {
	p, err := json.Marshal(v)
	require.NoError(l.t, err)
	return l.put(mediaType, p)
}

func (l layoutDir) image(config ocispec.ImageConfig, layers ...ocispec.Descriptor) ocispec.Descriptor {
	c := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}, Config: config}
	return l.json(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: l.json(ocispec.MediaTypeImageConfig, c), Layers: layers,
	})
}

func (l layoutDir) converted(p []byte) ocispec.Descriptor {
	d := l.put(ocispec.MediaTypeImageLayer, p)
	d.Annotations = map[string]string{annotationDigest: d.Digest.String(), annotationFSType: "ext4"}
	return d
}

func (l layoutDir) index(manifests ...ocispec.Descriptor) {
	p, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: manifests})
	require.NoError(l.t, err)
	require.NoError(l.t, os.WriteFile(filepath.Join(l.dir, "index.json"), p, 0o644))
}

func tagged(d ocispec.Descriptor, tag string) ocispec.Descriptor {
	d.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	return d
}

var below, above = bytes.Repeat([]byte("below..."), 1024), bytes.Repeat([]byte("ABOVE..."), 512)

func TestOpenLayout(t *testing.T) {
	n, _ := openNode(t)
	l := newLayout(t)
	bottom, top := l.converted(testLayer(t, 8192, below)), l.converted(testLayer(t, 12288, above))
	accelerator := l.put(ocispec.MediaTypeImageLayer, []byte("a trace"))
	accelerator.Annotations = map[string]string{annotationAccel: "yes"}
	v1 := tagged(l.image(ocispec.ImageConfig{Entrypoint: []string{"/server"}, Cmd: []string{"--port", "1"}}, bottom, top, accelerator), "v1")
	l.index(v1, tagged(l.image(ocispec.ImageConfig{}, bottom), "v0"))

	im, err := n.OpenImage(t.Context(), "oci:"+l.dir+":v1", nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, im.Close()) }()
	require.Equal(t, v1.Digest, im.Manifest)
	require.Equal(t, "ext4", im.FSType)
	require.Len(t, im.Layers(), 2, "without the acceleration layer")
	require.Equal(t, []string{"/server", "--port", "1"}, im.Command(nil))
	require.Equal(t, []string{"/server", "x"}, im.Command([]string{"x"}))
	require.Equal(t, "linux/arm64/v8", im.platform())
	p := make([]byte, 16384)
	_, err = im.ReadAt(p, 0)
	require.NoError(t, err)
	require.Equal(t, append(append(make([]byte, 8192), below[:4096]...), above...), p)
	require.NoError(t, im.Verify(t.Context()))
	require.NotEmpty(t, im.phases.List())

	h := im.traceHeader("tool", ImageOptions{})
	require.Equal(t, im.Manifest, h.Manifest)
	require.Equal(t, bottom.Digest, h.Layers[0].Digest)
	require.True(t, strings.HasPrefix(h.Workload, "server-"))

	// A bit that has flipped on disk.
	blob, err := os.ReadFile(l.blob(top.Digest))
	require.NoError(t, err)
	blob[len(blob)-1] ^= 1 // padding of the tar: only the digest tells
	require.NoError(t, os.WriteFile(l.blob(top.Digest), blob, 0o644))
	require.ErrorContains(t, im.Verify(t.Context()), top.Digest.String())
}

func TestOpenLayoutErrors(t *testing.T) {
	n, _ := openNode(t)
	l := newLayout(t)
	good := l.converted(testLayer(t, 0, below))
	plain := l.put(ocispec.MediaTypeImageLayer, []byte("a tar"))
	missing := good
	missing.Digest = digest.FromString("missing")
	other := good
	other.Annotations = map[string]string{annotationDigest: "x", annotationFSType: "../../nfs"}
	wrong := l.image(ocispec.ImageConfig{}, good)
	require.NoError(t, os.WriteFile(l.blob(wrong.Digest), bytes.Repeat([]byte("x"), int(wrong.Size)), 0o644))
	noConfig := l.json(ocispec.MediaTypeImageManifest, ocispec.Manifest{Layers: []ocispec.Descriptor{good}})
	many := make([]ocispec.Descriptor, lsmt.MaxLayers+1)
	for i := range many {
		many[i] = good
	}
	tests := map[string]struct {
		manifest ocispec.Descriptor
		says     string
	}{
		"plain":     {l.image(ocispec.ImageConfig{}, good, plain), "layer 1 (" + plain.Digest.String() + ") is not in overlaybd format: convert the image first"},
		"empty":     {l.image(ocispec.ImageConfig{}), "has no layers"},
		"many":      {l.image(ocispec.ImageConfig{}, many...), "256 layers, at most 255"},
		"missing":   {l.image(ocispec.ImageConfig{}, good, missing), missing.Digest.Encoded()},
		"fs":        {l.image(ocispec.ImageConfig{}, other), `file system "../../nfs"`},
		"wrong":     {wrong, wrong.Digest.String()},
		"no config": {noConfig, "image config"},
		"not json":  {l.put(ocispec.MediaTypeImageManifest, []byte("{")), "unexpected end of JSON"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			l.index(tagged(tt.manifest, "v1"))
			ref := "oci:" + l.dir + ":v1"
			_, err := n.OpenImage(t.Context(), ref, nil)
			require.ErrorContains(t, err, "open "+ref+": ")
			require.ErrorContains(t, err, tt.says)
		})
	}
	_, err := n.OpenImage(t.Context(), "oci:"+l.dir+":v9", nil)
	require.ErrorContains(t, err, "v1", "says which tags there are")
	_, err = n.OpenImage(t.Context(), "oci:"+t.TempDir(), nil)
	require.ErrorContains(t, err, "not an OCI image layout")
	_, err = n.OpenImage(t.Context(), "name", nil)
	require.ErrorContains(t, err, "name the registry too")
}

func TestIsConfig(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "config")
	require.NoError(t, os.WriteFile(file, nil, 0o644))
	for ref, want := range map[string]bool{
		file: true, "missing.json": true, dir: false, "registry.example/name:tag": false,
		"oci:" + file: false, "oci:x.json": false, filepath.Join(dir, "missing"): false,
	} {
		require.Equal(t, want, isConfig(ref), ref)
	}
}

func TestFSType(t *testing.T) {
	layer := func(fs string) ocispec.Descriptor {
		return ocispec.Descriptor{Annotations: map[string]string{annotationFSType: fs}}
	}
	for want, layers := range map[string][]ocispec.Descriptor{
		"ext4":  {{}, layer("")},
		"xfs":   {{}, layer(" XFS\n"), layer("ext4")},
		"erofs": {layer("erofs")},
	} {
		got, err := fsType(layers)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	for _, bad := range []string{"nfs", "overlay", "ext4,x", strings.Repeat("x", 1000)} {
		_, err := fsType([]ocispec.Descriptor{layer(bad)})
		require.ErrorContains(t, err, "only ext4")
		require.Less(t, len(err.Error()), 200)
	}
}

func TestWorkload(t *testing.T) {
	im := &Image{Config: ocispec.Image{Config: ocispec.ImageConfig{Entrypoint: []string{"/bin/server"}, Cmd: []string{"-v"}}}}
	own := im.workload(ImageOptions{})
	require.True(t, strings.HasPrefix(own, "server-"), own)
	require.Equal(t, own, im.workload(ImageOptions{Args: []string{"-v"}}), "the same command")
	require.NotEqual(t, own, im.workload(ImageOptions{Args: []string{"-q"}}))
	require.Equal(t, "mine", im.workload(ImageOptions{Args: []string{"-q"}, Workload: "mine"}))
	require.True(t, strings.HasPrefix(im.workload(ImageOptions{Entrypoint: []string{"/bin/sh"}, Args: []string{"-c", "true"}}), "sh-"))
	require.NotEmpty(t, (&Image{}).workload(ImageOptions{}))
	require.Equal(t, runtime.GOOS+"/"+runtime.GOARCH, (&Image{}).platform())
}

func TestPhases(t *testing.T) {
	p := NewPhases()
	p.mark("one")
	p.markAt("zero", p.Start())
	list := p.List()
	require.Equal(t, []string{"one", "zero"}, []string{list[0].Name, list[1].Name})
	require.GreaterOrEqual(t, list[0].At, list[1].At)
	require.Zero(t, list[1].At)
	p.mark("three")
	require.Len(t, list, 2, "a list is a copy")
}

func TestOpenErrors(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o644))
	_, err := Open(&Config{Root: file})
	require.ErrorContains(t, err, "name another with --root")
	_, err = Open(&Config{Root: t.TempDir(), Platform: "a/b/c/d"})
	require.ErrorContains(t, err, `platform "a/b/c/d"`)
	c := &Config{Root: t.TempDir(), Registry: registry.Options{DockerConfigDir: t.TempDir()}}
	c.Cache.ChunkSize = 3
	_, err = Open(c)
	require.ErrorContains(t, err, "chunk size 3")
}

// A sector must not be larger than the blocks of the file system.
func TestSectorSize(t *testing.T) {
	n, _ := openNode(t)
	super := func(logBlock byte) []byte {
		p := make([]byte, 4096)
		p[1024+24], p[1024+56], p[1024+57] = logBlock, 0x53, 0xEF
		return p
	}
	for want, p := range map[int][]byte{4096: super(2), 512: super(0)} {
		l := newLayout(t)
		l.index(l.image(ocispec.ImageConfig{}, l.converted(testLayer(t, 0, p))))
		im, err := n.OpenImage(t.Context(), "oci:"+l.dir, nil)
		require.NoError(t, err)
		got, err := im.sectorSize()
		require.NoError(t, err)
		require.Equal(t, want, got)
		im.FSType = "xfs"
		got, err = im.sectorSize()
		require.NoError(t, err)
		require.Equal(t, 4096, got)
		require.NoError(t, im.Close())
	}
	l := newLayout(t)
	l.index(l.image(ocispec.ImageConfig{}, l.converted(testLayer(t, 0, below))))
	im, err := n.OpenImage(t.Context(), "oci:"+l.dir, nil)
	require.NoError(t, err)
	_, err = im.sectorSize()
	require.ErrorContains(t, err, "holds no ext4 file system")
	require.NoError(t, im.Close())
}

// A device that cannot be read fails thousands of requests, but not as many
// lines.
func TestLogFailures(t *testing.T) {
	n, log := openNode(t)
	fail := (&Image{Ref: "image", node: n}).logFailures()
	for range 100 {
		fail(io.ErrUnexpectedEOF)
	}
	require.Equal(t, 1, strings.Count(log.String(), "the device cannot be read"))
}

// A request that takes long is named, with what it waits for.
func TestLogSlow(t *testing.T) {
	n, log := openNode(t)
	l := newLayout(t)
	l.index(l.image(ocispec.ImageConfig{}, l.converted(testLayer(t, 8192, below))))
	im, err := n.OpenImage(t.Context(), "oci:"+l.dir, nil)
	require.NoError(t, err)
	im.device.Store("/dev/loop7")
	im.logSlow(device.Slow{Op: "read", Off: 8192, N: 4096, For: 20 * time.Second})
	for _, says := range []string{l.dir, "/dev/loop7", "op=read", "offset=8192", "bytes=4096", "for=20s", "waits_for=", "layer 0"} {
		require.Contains(t, log.String(), says)
	}
	log.Reset()
	im.logSlow(device.Slow{Op: "sync", For: 40 * time.Second})
	require.Contains(t, log.String(), "op=sync")
	require.NoError(t, im.Close())
	log.Reset()
	im.fail()
	im.logSlow(device.Slow{Op: "read", For: 40 * time.Second})
	require.Empty(t, log.String(), "reads are made to fail")
}
