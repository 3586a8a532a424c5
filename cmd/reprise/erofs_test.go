package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/zfile"
)

// erofsLayout makes an EROFS of a tree, and an image of that in one layer.
func (b *bench) erofsLayout(tree string) (ref string) {
	b.t.Helper()
	file := b.path("erofs")
	out, err := exec.Command("mkfs.erofs", "--quiet", file, tree).CombinedOutput()
	require.NoError(b.t, err, "%s", out)
	dir := b.mkdir("layout")
	blobs := filepath.Join(dir, "blobs", "sha256")
	require.NoError(b.t, os.MkdirAll(blobs, 0o755))
	put := func(mediaType string, p []byte) ocispec.Descriptor {
		d := digest.FromBytes(p)
		require.NoError(b.t, os.WriteFile(filepath.Join(blobs, d.Encoded()), p, 0o644))
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(p))}
	}
	putJSON := func(mediaType string, v any) ocispec.Descriptor {
		p, err := json.Marshal(v)
		require.NoError(b.t, err)
		return put(mediaType, p)
	}
	layer := put(ocispec.MediaTypeImageLayer, b.sealed(file))
	layer.Annotations = map[string]string{
		"containerd.io/snapshot/overlaybd/blob-digest":  layer.Digest.String(),
		"containerd.io/snapshot/overlaybd/blob-size":    "1",
		"containerd.io/snapshot/overlaybd/blob-fs-type": "erofs",
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{layer},
		Config: putJSON(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, Config: smallConfig}),
	}
	p, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{putJSON(m.MediaType, m)}})
	require.NoError(b.t, err)
	require.NoError(b.t, os.WriteFile(filepath.Join(dir, "index.json"), p, 0o644))
	require.NoError(b.t, os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
	return "oci:" + dir
}

// sealed is a file's content as a sealed layer.
func (b *bench) sealed(file string) []byte {
	b.t.Helper()
	p, err := os.ReadFile(file)
	require.NoError(b.t, err)
	f, err := os.Create(b.path("upper"))
	require.NoError(b.t, err)
	w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: int64(len(p))})
	require.NoError(b.t, err)
	defer w.Close()
	_, err = w.WriteAt(p, 0)
	require.NoError(b.t, err)
	out, err := os.Create(b.path("blob"))
	require.NoError(b.t, err)
	defer out.Close()
	z, err := zfile.NewWriter(out, &zfile.Options{Tar: true})
	require.NoError(b.t, err)
	require.NoError(b.t, w.Commit(b.t.Context(), z, lsmt.CommitOptions{}))
	require.NoError(b.t, z.Close())
	p, err = os.ReadFile(out.Name())
	require.NoError(b.t, err)
	return p
}

// TestErofs mounts and runs an image that is EROFS: without a loop device where
// the kernel can, with one where that is asked for.
func TestErofs(t *testing.T) {
	skipUnprivileged(t)
	if !hasTool("mkfs.erofs") {
		t.Skip("needs mkfs.erofs")
	}
	if err := device.FileSystem("erofs"); err != nil {
		t.Skip(err)
	}
	b := newBench(t)
	dir := b.mkdir("mnt")
	b.ok("mount", b.smallSite("0s,unlimited").ref, dir)
	want := withoutRoot(listTree(t, dir))
	ref := b.erofsLayout(dir)
	b.ok("umount", dir)

	files := false // whether this kernel can do without a loop device
	for _, s := range device.Probe() {
		files = files || s.Transport == "erofs" && s.Available
	}
	for _, transport := range []string{"auto", "fuse"} {
		b.ok("mount", "--transport", transport, ref, dir)
		require.Equal(t, want, withoutRoot(listTree(t, dir)))
		source := sourceOf(t, dir)
		require.Equal(t, transport == "fuse" || !files, strings.HasPrefix(source, "/dev/loop"), source)
		server := 0
		for range 3 {
			server = b.restarted(dir, server)
			require.NoError(t, unix.Kill(server, unix.SIGKILL))
		}
		b.restarted(dir, server)
		require.Equal(t, want, withoutRoot(listTree(t, dir)))
		b.ok("umount", dir)
		b.settled()
		if hasTool("runc") {
			require.Equal(t, "hello from the image\n", b.ok("run", "--transport", transport, ref))
		}
	}
}

// sourceOf is what is mounted at dir.
func sourceOf(t *testing.T, dir string) string {
	t.Helper()
	p, err := os.ReadFile("/proc/self/mounts")
	require.NoError(t, err)
	for line := range strings.Lines(string(p)) {
		if f := strings.Fields(line); len(f) > 1 && f[1] == dir {
			return f[0]
		}
	}
	t.Fatalf("nothing is mounted at %s", dir)
	return ""
}
