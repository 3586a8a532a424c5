package compare

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
)

// smallUsr makes a tree with a little of everything that the planner tells apart, and returns its root.
func smallUsr(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	files := map[string]string{
		"usr/bin/python3.99":                    "python",
		"usr/bin/sh":                            "sh",
		"usr/bin/tool":                          strings.Repeat("tool", 1000),
		"usr/sbin/daemon":                       "daemon",
		"usr/lib64/ld.so":                       "loader",
		"usr/lib/x86_64-linux-gnu/libc.so.6":    strings.Repeat("libc", 2000),
		"usr/lib/x86_64-linux-gnu/libz.so.1":    "libz",
		"usr/lib/jvm/lib/modules":               strings.Repeat("jvm", 5000),
		"usr/lib/python3.99/http/server.py":     "pass",
		"usr/lib/python3.99/os.py":              "pass # os",
		"usr/share/data/a":                      "a",
		"usr/share/doc/readme":                  "not in the image",
		"usr/local/bin/private":                 "not in the image",
		"usr/share/data/secret":                 "not in the image",
		"usr/share/closed/file":                 "not in the image",
		"usr/share/" + strings.Repeat("n", 120): "a long name",
	}
	for name, text := range files {
		write(t, root, name, text)
	}
	for link, target := range map[string]string{
		"usr/bin/python3": "python3.99", "usr/bin/bash": "sh", "usr/share/dangling": "/nowhere",
	} {
		require.NoError(t, os.Symlink(target, filepath.Join(root, link)))
	}
	require.NoError(t, os.Link(filepath.Join(root, "usr/bin/tool"), filepath.Join(root, "usr/bin/tool-again")))
	require.NoError(t, os.Chmod(filepath.Join(root, "usr/share/data/secret"), 0o640))
	require.NoError(t, os.Chmod(filepath.Join(root, "usr/share/closed"), 0o750))
	require.NoError(t, filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.Type() == fs.ModeSymlink {
			return err
		}
		return os.Chtimes(name, time.Time{}, time.Unix(1700000000, 999))
	}))
	return root
}

func write(t *testing.T, root, name, text string) {
	t.Helper()
	name = filepath.Join(root, name)
	require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o755))
	require.NoError(t, os.WriteFile(name, []byte(text), 0o755))
}

func small(root string) *DemoImageOptions { return &DemoImageOptions{Root: root, MinBytes: 1} }

func build(t *testing.T, dir string, o *DemoImageOptions) *DemoImage {
	t.Helper()
	d, err := BuildDemoImage(t.Context(), dir, o)
	require.NoError(t, err)
	return d
}

func TestDemoImageLayout(t *testing.T) {
	var last, total int64
	o := small(smallUsr(t))
	o.Progress = func(done, all int64) { last, total = done, all }
	d := build(t, t.TempDir(), o)

	require.GreaterOrEqual(t, d.Layers, minDemoLayers)
	require.False(t, d.Reused)
	require.Positive(t, total)
	require.Equal(t, total, last)
	require.Equal(t, "oci:"+d.Layout+":demo", d.Ref())
	members := checkLayout(t, d)

	link := func(name string) string { return members[name].Linkname }
	require.Equal(t, "usr/bin", link("bin"))
	require.Equal(t, "python3.99", link("usr/bin/python3"))
	require.Equal(t, "/nowhere", link("usr/share/dangling"))
	require.Equal(t, byte(tar.TypeLink), members["usr/bin/tool-again"].Typeflag)
	require.Equal(t, "usr/bin/tool", link("usr/bin/tool-again"))
	require.Equal(t, int64(0o1777), members["tmp/"].Mode)
	require.Equal(t, int64(1700000000), members["usr/bin/tool"].ModTime.Unix())
	require.Contains(t, members, "etc/passwd")
	require.Contains(t, members, "srv/app.py")
	require.Contains(t, members, "usr/share/"+strings.Repeat("n", 120))
	for _, name := range []string{"usr/share/doc/", "usr/local/", "usr/share/data/secret", "usr/share/closed/"} {
		require.NotContains(t, members, name)
	}
}

// checkLayout checks every digest and size of a layout, and that parents come before children; it returns the
// members of all layers.
func checkLayout(t *testing.T, d *DemoImage) map[string]*tar.Header {
	t.Helper()
	marker, err := os.ReadFile(filepath.Join(d.Layout, ocispec.ImageLayoutFile))
	require.NoError(t, err)
	require.JSONEq(t, `{"imageLayoutVersion":"1.0.0"}`, string(marker))

	var m ocispec.Manifest
	var config ocispec.Image
	checkBlob(t, d, d.Descriptor)
	require.NoError(t, readJSON(blobPath(d.Layout, d.Descriptor.Digest), &m))
	checkBlob(t, d, m.Config)
	require.NoError(t, readJSON(blobPath(d.Layout, m.Config.Digest), &config))
	require.Len(t, config.RootFS.DiffIDs, len(m.Layers))
	require.Len(t, config.History, len(m.Layers))

	members := make(map[string]*tar.Header)
	var size, compressed int64
	files := 0
	for i, l := range m.Layers {
		checkBlob(t, d, l)
		f, err := os.Open(blobPath(d.Layout, l.Digest))
		require.NoError(t, err)
		defer f.Close()
		zr, err := gzip.NewReader(f)
		require.NoError(t, err)
		v := config.RootFS.DiffIDs[i].Verifier()
		count := &countingHash{w: v, h: config.RootFS.DiffIDs[i].Algorithm().Hash()}
		r := io.TeeReader(zr, count)
		files += readMembers(t, tar.NewReader(r), members)
		_, err = io.Copy(io.Discard, r)
		require.NoError(t, err)
		require.True(t, v.Verified(), "diff id of layer %d", i)
		size += count.n
		compressed += l.Size
	}
	require.Equal(t, size, d.Bytes)
	require.Equal(t, compressed, d.Compressed)
	require.Equal(t, files, d.Files)
	return members
}

func readMembers(t *testing.T, tr *tar.Reader, all map[string]*tar.Header) (files int) {
	t.Helper()
	dirs := map[string]bool{"./": true}
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		require.NoError(t, err)
		require.True(t, dirs[filepath.Dir(strings.TrimSuffix(h.Name, "/"))+"/"], "%s comes before its folder", h.Name)
		if h.Typeflag == tar.TypeDir {
			dirs[h.Name] = true
		} else {
			files++
		}
		all[h.Name] = h
	}
}

func checkBlob(t *testing.T, d *DemoImage, want ocispec.Descriptor) {
	t.Helper()
	f, err := os.Open(blobPath(d.Layout, want.Digest))
	require.NoError(t, err)
	defer f.Close()
	v := want.Digest.Verifier()
	n, err := io.Copy(v, f)
	require.NoError(t, err)
	require.Equal(t, want.Size, n)
	require.True(t, v.Verified(), want.Digest)
}

func TestDemoImageIsReproducible(t *testing.T) {
	root := smallUsr(t)
	o := small(root)
	o.Concurrency = 1
	a, b := build(t, t.TempDir(), o), build(t, t.TempDir(), small(root))
	require.Equal(t, a.Descriptor, b.Descriptor)
	require.Equal(t, filepath.Base(a.Layout), filepath.Base(b.Layout))
}

func TestDemoImageIsReused(t *testing.T) {
	root, dir := smallUsr(t), t.TempDir()
	first := build(t, dir, small(root))
	again := build(t, dir, small(root))
	require.True(t, again.Reused)
	again.Reused = false
	require.Equal(t, first, again)

	write(t, root, "usr/bin/another", "tool")
	other := build(t, dir, small(root))
	require.False(t, other.Reused)
	require.NotEqual(t, first.Layout, other.Layout)
	require.NotEqual(t, first.Descriptor.Digest, other.Descriptor.Digest)
}

func TestDemoImageRepairsItsCache(t *testing.T) {
	root, dir := smallUsr(t), t.TempDir()
	first := build(t, dir, small(root))
	require.NoError(t, os.Truncate(blobPath(first.Layout, first.Descriptor.Digest), 1))
	again := build(t, dir, small(root))
	require.Equal(t, first, again)
	checkLayout(t, again)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)
}

func TestDemoImageIsBounded(t *testing.T) {
	o := small(smallUsr(t))
	o.MaxBytes = 14000
	layers, err := planDemoImage(t.Context(), o.withDefaults())
	require.NoError(t, err)
	var size int64
	var names []string
	for _, l := range layers {
		for _, e := range l.entries {
			names = append(names, e.path)
			if e.data == nil {
				size += e.size
			}
		}
	}
	require.LessOrEqual(t, size, o.MaxBytes)
	require.Contains(t, names, "usr/lib/python3.99/os.py")
	require.Contains(t, names, "usr/bin/tool", "what the small layers leave goes to the larger ones")
	require.NotContains(t, names, "usr/lib/jvm/lib/modules")
}

func TestDemoImageErrors(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	tests := map[string]struct {
		ctx    context.Context
		change func(t *testing.T, root string, o *DemoImageOptions)
		want   string
	}{
		"too small": {
			change: func(t *testing.T, root string, o *DemoImageOptions) { o.MinBytes = 1 << 30 },
			want:   "make deps",
		},
		"no python": {
			change: func(t *testing.T, root string, o *DemoImageOptions) {
				require.NoError(t, os.Remove(filepath.Join(root, "usr/bin/python3.99")))
			},
			want: "install the package python3",
		},
		"no standard library": {
			change: func(t *testing.T, root string, o *DemoImageOptions) {
				require.NoError(t, os.Remove(filepath.Join(root, "usr/lib/python3.99/http/server.py")))
			},
			want: "the standard library is not there",
		},
		"no usr": {
			change: func(t *testing.T, root string, o *DemoImageOptions) { o.Root = filepath.Join(root, "none") },
			want:   "no such file",
		},
		"few layers": {
			change: func(t *testing.T, root string, o *DemoImageOptions) {
				require.NoError(t, os.RemoveAll(filepath.Join(root, "usr/share")))
				require.NoError(t, os.RemoveAll(filepath.Join(root, "usr/lib/jvm")))
			},
			want: "5 layers, 6 are needed",
		},
		"canceled": {ctx: canceled, want: "context canceled"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			root, dir := smallUsr(t), t.TempDir()
			o := small(root)
			if tt.change != nil {
				tt.change(t, root, o)
			}
			ctx := tt.ctx
			if ctx == nil {
				ctx = t.Context()
			}
			_, err := BuildDemoImage(ctx, dir, o)
			require.ErrorContains(t, err, "demo image: ")
			require.ErrorContains(t, err, tt.want)
			left, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

func TestDemoImageFileThatShrinks(t *testing.T) {
	root, dir := smallUsr(t), t.TempDir()
	layers, err := planDemoImage(t.Context(), small(root).withDefaults())
	require.NoError(t, err)
	require.NoError(t, os.Truncate(filepath.Join(root, "usr/bin/tool"), 10))
	err = buildDemoLayout(t.Context(), dir, filepath.Join(dir, "layout"), layers, small(root).withDefaults())
	require.ErrorContains(t, err, "usr/bin/tool: it shrank")
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

// planOfThisMachine skips where /usr is too small or has no Python.
func planOfThisMachine(t *testing.T) []demoLayer {
	t.Helper()
	layers, err := planDemoImage(t.Context(), (*DemoImageOptions)(nil).withDefaults())
	if err != nil && strings.Contains(err.Error(), "make deps") {
		t.Skip(err)
	}
	require.NoError(t, err)
	return layers
}

// The machine's own tree, without compressing it: it is large enough, and every library that Python needs is in the
// base layer.
func TestDemoImagePlanOfThisMachine(t *testing.T) {
	layers := planOfThisMachine(t)
	var base []string
	for _, e := range layers[0].entries {
		base = append(base, e.path)
	}
	for _, part := range []string{"/libc.so.6", "/ld-linux", "/libssl.so", "/libsqlite3.so", "/libz.so", "/libexpat.so"} {
		require.True(t, slices.ContainsFunc(base, func(s string) bool { return strings.Contains(s, part) }), part)
	}
	var size int64
	for _, l := range layers {
		size += l.size()
		t.Logf("%5d entries %4d MB  %s", len(l.entries), l.size()/1e6, l.name)
	}
	require.GreaterOrEqual(t, size, int64(500<<20))
	require.LessOrEqual(t, size, int64(601<<20))
	require.GreaterOrEqual(t, len(layers), minDemoLayers)
}

// A part of the machine's own tree, written and read back.
func TestDemoImageOfThisMachine(t *testing.T) {
	if testing.Short() {
		t.Skip("writes an image of 80 MB")
	}
	d, err := BuildDemoImage(t.Context(), t.TempDir(), &DemoImageOptions{MinBytes: 50 << 20, MaxBytes: 80 << 20})
	if err != nil && strings.Contains(err.Error(), "make deps") {
		t.Skip(err)
	}
	require.NoError(t, err)
	members := checkLayout(t, d)
	require.Contains(t, members, "usr/bin/python3")
	t.Logf("%d layers, %d files, %d MB, compressed %d MB", d.Layers, d.Files, d.Bytes/1e6, d.Compressed/1e6)
}

// The real size, as the demo makes it.
func BenchmarkBuildDemoImage(b *testing.B) {
	for b.Loop() {
		d, err := BuildDemoImage(b.Context(), b.TempDir(), nil)
		require.NoError(b, err)
		b.SetBytes(d.Bytes)
		b.ReportMetric(float64(d.Compressed), "compressed-bytes")
	}
}
