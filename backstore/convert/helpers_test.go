package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/device"
)

const testSize = 64 << 20

// needRoot skips a test that mounts where mounting is not possible.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	fs, err := unix.Fsopen("ext4", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Skipf("needs fsopen of ext4: %v", err)
	}
	unix.Close(fs)
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("needs %s: %v", dev, err)
		}
		f.Close()
	}
	if _, err := findTool("mkfs.ext4", "e2fsprogs"); err != nil {
		t.Skip(err)
	}
}

// vectors is the folder of the reference's files.
func vectors(t testing.TB, elem ...string) string {
	t.Helper()
	dir, err := os.Getwd()
	require.NoError(t, err)
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		require.NotEqual(t, "/", dir)
		dir = filepath.Dir(dir)
	}
	dir = filepath.Join(dir, "..", "shared", "vectors")
	if _, err := os.Stat(dir); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("vectors: %v", err)
		}
		t.Skipf("vectors: %v", err)
	}
	return filepath.Join(append([]string{dir}, elem...)...)
}

// A testLayer is a layer of a test image.
type testLayer struct {
	mediaType string
	blob      []byte
	diffID    digest.Digest
}

func gzipped(t testing.TB, p []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := z.Write(p)
	require.NoError(t, err)
	require.NoError(t, z.Close())
	return b.Bytes()
}

func gzipLayer(t testing.TB, tarball []byte) testLayer {
	return testLayer{ocispec.MediaTypeImageLayerGzip, gzipped(t, tarball), digest.FromBytes(tarball)}
}

func zstdLayer(t testing.TB, tarball []byte) testLayer {
	t.Helper()
	z, err := zstd.NewWriter(nil)
	require.NoError(t, err)
	return testLayer{ocispec.MediaTypeImageLayerZstd, z.EncodeAll(tarball, nil), digest.FromBytes(tarball)}
}

func plainLayer(tarball []byte) testLayer {
	return testLayer{ocispec.MediaTypeImageLayer, tarball, digest.FromBytes(tarball)}
}

// vectorLayers are the tars of vectors/ext4-64m.
func vectorLayers(t testing.TB) []testLayer {
	t.Helper()
	var layers []testLayer
	for _, name := range []string{"layer0.tar.gz", "layer1.tar.gz", "layer2.tar.gz"} {
		p, err := os.ReadFile(vectors(t, "ext4-64m", name))
		require.NoError(t, err)
		z, err := gzip.NewReader(bytes.NewReader(p))
		require.NoError(t, err)
		plain, err := io.ReadAll(z)
		require.NoError(t, err)
		layers = append(layers, testLayer{ocispec.MediaTypeImageLayerGzip, p, digest.FromBytes(plain)})
	}
	return layers
}

// writeImage writes an image of layers to dst.
func writeImage(t testing.TB, dst Dest, layers ...testLayer) ocispec.Descriptor {
	t.Helper()
	var descs []ocispec.Descriptor
	var diffIDs []digest.Digest
	for _, l := range layers {
		descs = append(descs, pushBytes(t, dst, l.mediaType, l.blob))
		diffIDs = append(diffIDs, l.diffID)
	}
	return pushImage(t, dst, descs, diffIDs)
}

func at(t testing.TB, ref string) Location {
	t.Helper()
	l, err := At(ref, nil)
	require.NoError(t, err)
	return l
}

// manifestOf reads the manifest at src.
func manifestOf(t testing.TB, src Source) ocispec.Manifest {
	t.Helper()
	o, err := (*Options)(nil).filled()
	require.NoError(t, err)
	_, raw, err := src.Manifest(t.Context(), *o.Platform)
	require.NoError(t, err)
	var m ocispec.Manifest
	require.NoError(t, json.Unmarshal(raw, &m))
	return m
}

// mountLayers mounts the n lowest layers of a converted image read-only and
// returns where.
func mountLayers(t testing.TB, src Source, n int) string {
	t.Helper()
	return mountFiles(t, layerFiles(t, src, n)...)
}

// layerFiles copies the n lowest layers of an image into files.
func layerFiles(t testing.TB, src Source, n int) []string {
	t.Helper()
	var paths []string
	for _, d := range manifestOf(t, src).Layers[:n] {
		rc, err := src.Open(t.Context(), d)
		require.NoError(t, err)
		f, err := os.Create(filepath.Join(t.TempDir(), d.Digest.Encoded()))
		require.NoError(t, err)
		_, err = io.Copy(f, rc)
		require.NoError(t, err)
		require.NoError(t, errors.Join(rc.Close(), f.Close()))
		paths = append(paths, f.Name())
	}
	return paths
}

// openLayers opens a stack of committed layers, bottom first.
func openLayers(t testing.TB, paths ...string) *backstore.Image {
	t.Helper()
	var sources []backstore.LayerSource
	for _, p := range paths {
		sources = append(sources, backstore.LayerSource{Path: p})
	}
	im, err := backstore.OpenImage(t.Context(), sources)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, im.Close()) })
	return im
}

// mountFiles mounts a stack of committed layers, bottom first, and returns
// where. The mount is in no namespace: others that are made meanwhile would
// keep it.
func mountFiles(t testing.TB, paths ...string) string {
	t.Helper()
	im := openLayers(t, paths...)
	dev, err := device.Attach(t.Context(), im, im.Size(), &device.Options{ReadOnly: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, dev.Close()) })
	fs, err := unix.Fsopen("ext4", unix.FSOPEN_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(fs)
	require.NoError(t, unix.FsconfigSetString(fs, "source", dev.Path()))
	require.NoError(t, unix.FsconfigSetFlag(fs, "ro"))
	require.NoError(t, unix.FsconfigSetFlag(fs, "noload"))
	require.NoError(t, unix.FsconfigCreate(fs))
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	require.NoError(t, err)
	m := &ext4Mount{fd: fd, dev: dev.Path()}
	t.Cleanup(func() { require.NoError(t, m.close()) })
	return fmt.Sprintf("/proc/self/fd/%d", fd)
}

// makeTar makes a tar of entries; a header's size is that of its content.
func makeTar(t testing.TB, entries ...tarEntry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.content))
		h.Format = tar.FormatPAX
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		require.NoError(t, tw.WriteHeader(&h))
		_, err := io.WriteString(tw, e.content)
		require.NoError(t, err)
	}
	require.NoError(t, tw.Close())
	return b.Bytes()
}

type tarEntry struct {
	tar.Header
	content string
}

// testConvert converts with a small device.
func testConvert(t testing.TB, src Source, dst Dest, o Options) (ocispec.Descriptor, error) {
	t.Helper()
	if o.DeviceSize == 0 {
		o.DeviceSize = testSize
	}
	if o.Workdir == "" {
		o.Workdir = t.TempDir()
	}
	d, err := Convert(context.WithoutCancel(t.Context()), src, dst, &o)
	left, rerr := os.ReadDir(o.Workdir)
	require.NoError(t, rerr)
	require.Empty(t, left, "files left in the work directory")
	return d, err
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
