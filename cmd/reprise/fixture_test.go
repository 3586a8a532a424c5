package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// A testFile is a regular file unless one of dir, link, hard is set.
type testFile struct {
	name   string
	body   []byte
	mode   int64 // default 0644, 0755 of a directory, 0777 of a link
	uid    int   // and gid
	mtime  int64
	dir    bool
	link   string
	hard   string
	xattrs map[string]string
}

type testLayer []testFile

func (f testFile) perm() int64 {
	switch {
	case f.link != "":
		return 0o777
	case f.mode != 0:
		return f.mode
	case f.dir:
		return 0o755
	}
	return 0o644
}

func (f testFile) time() int64 {
	if f.mtime == 0 {
		return 1_600_000_000
	}
	return f.mtime
}

func (f testFile) header() *tar.Header {
	h := &tar.Header{
		Name: f.name, Mode: f.perm(), Uid: f.uid, Gid: f.uid, ModTime: time.Unix(f.time(), 0),
		Typeflag: tar.TypeReg, Size: int64(len(f.body)), Format: tar.FormatPAX,
	}
	switch {
	case f.dir:
		h.Typeflag, h.Name = tar.TypeDir, f.name+"/"
	case f.link != "":
		h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
	case f.hard != "":
		h.Typeflag, h.Linkname = tar.TypeLink, f.hard
	}
	for k, v := range f.xattrs {
		h.PAXRecords = map[string]string{"SCHILY.xattr." + k: v}
	}
	return h
}

// pack gives the layer as a blob, and its diff ID.
func (l testLayer) pack(t testing.TB) ([]byte, digest.Digest) {
	t.Helper()
	var plain, packed bytes.Buffer
	w := tar.NewWriter(&plain)
	for _, f := range l {
		require.NoError(t, w.WriteHeader(f.header()))
		_, err := w.Write(f.body)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	z, err := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	require.NoError(t, err)
	_, err = z.Write(plain.Bytes())
	require.NoError(t, err)
	require.NoError(t, z.Close())
	return packed.Bytes(), digest.FromBytes(plain.Bytes())
}

// dirs are the directories above the files, as entries of their own.
func dirs(names ...string) (l testLayer) {
	for _, n := range names {
		l = append(l, testFile{name: n, dir: true})
	}
	return l
}

// randomBytes are the same in each run.
func randomBytes(seed uint64, n int) []byte {
	p := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = r.Read(p)
	return p
}

// programs are files of this machine, with the libraries they need.
func programs(t testing.TB, paths ...string) testLayer {
	t.Helper()
	files := map[string]string{} // name in the image: file here
	var add func(name string)
	add = func(name string) {
		if _, ok := files[name]; ok {
			return
		}
		real, err := filepath.EvalSymlinks("/" + name)
		require.NoError(t, err)
		files[name] = real
		f, err := elf.Open(real)
		require.NoError(t, err)
		defer f.Close()
		if s := f.Section(".interp"); s != nil {
			p, err := s.Data()
			require.NoError(t, err)
			add(strings.Trim(string(p), "/\x00"))
		}
		libs, err := f.ImportedLibraries()
		require.NoError(t, err)
		for _, lib := range libs {
			add(library(t, lib))
		}
	}
	for _, p := range paths {
		add(p)
	}
	seen := map[string]bool{}
	var l testLayer
	for name, real := range files {
		var above []string
		for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
			above = append([]string{dir}, above...)
		}
		for _, dir := range above {
			if !seen[dir] {
				seen[dir] = true
				l = append(l, dirs(dir)...)
			}
		}
		p, err := os.ReadFile(real)
		require.NoError(t, err)
		l = append(l, testFile{name: name, body: p, mode: 0o755})
	}
	return l
}

func library(t testing.TB, name string) string {
	for _, pattern := range []string{"/lib/*-linux-gnu", "/usr/lib/*-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"} {
		if found, _ := filepath.Glob(filepath.Join(pattern, name)); len(found) > 0 {
			return strings.TrimPrefix(found[0], "/")
		}
	}
	t.Skipf("needs %s", name)
	return ""
}

const startScript = `echo "$GREETING from $(cat hostname)"
cat /data/a /data/sub/new page-1* > /dev/null
[ -z "$WAIT" ] || exec sleep "$WAIT"
`

// smallImage is an image of five layers whose command reads a part of it.
func smallImage(t testing.TB) []testLayer {
	base := append(programs(t, "bin/sh", "bin/cat", "bin/sleep"), dirs("etc", "tmp", "proc", "dev", "sys")...)
	base = append(base, testFile{name: "etc/passwd", body: []byte("root:x:0:0::/:/bin/sh\nalice:x:1234:1234::/:/bin/sh\n")})
	data := append(dirs("data", "data/sub", "data/gone"),
		testFile{name: "data/a", body: randomBytes(1, 300_000)},
		testFile{name: "data/a.hard", hard: "data/a"},
		testFile{name: "data/b", body: bytes.Repeat([]byte("text\n"), 20_000), uid: 1234},
		testFile{name: "data/c", body: []byte("c"), mode: 0o4755, xattrs: map[string]string{"user.key": "value"}, mtime: 1_500_000_000},
		testFile{name: "data/l", link: "../etc/passwd"},
		testFile{name: "data/sub/old", body: []byte("old")},
		testFile{name: "data/gone/file", body: []byte("file")})
	change := append(dirs("data", "data/sub"),
		testFile{name: "data/.wh.gone"},
		testFile{name: "data/.wh.b"},
		testFile{name: "data/sub/.wh..wh..opq"},
		testFile{name: "data/sub/new", body: randomBytes(2, 700_000)},
		testFile{name: "data/big", body: randomBytes(3, 3_000_000)})
	app := append(dirs("app"), testFile{name: "app/start", body: []byte(startScript)}, testFile{name: "app/hostname", body: []byte("the image\n")})
	for i := range 100 {
		app = append(app, testFile{name: fmt.Sprintf("app/page-%d", i), body: randomBytes(uint64(100+i), 10_000)})
	}
	more := append(dirs("data"), testFile{name: "data/more", body: randomBytes(4, 2_000_000)})
	return []testLayer{base, data, change, app, more}
}

var smallConfig = ocispec.ImageConfig{
	Cmd:        []string{"/bin/sh", "/app/start"},
	Env:        []string{"PATH=/bin", "GREETING=hello"},
	WorkingDir: "/app",
}

// writeLayout writes an image as an OCI layout.
func writeLayout(t testing.TB, dir string, layers []testLayer, config ocispec.ImageConfig) {
	t.Helper()
	blobs := filepath.Join(dir, "blobs", "sha256")
	require.NoError(t, os.MkdirAll(blobs, 0o755))
	put := func(mediaType string, p []byte) ocispec.Descriptor {
		d := digest.FromBytes(p)
		require.NoError(t, os.WriteFile(filepath.Join(blobs, d.Encoded()), p, 0o644))
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(p))}
	}
	putJSON := func(mediaType string, v any) ocispec.Descriptor {
		p, err := json.Marshal(v)
		require.NoError(t, err)
		return put(mediaType, p)
	}
	image := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, Config: config, RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		p, id := l.pack(t)
		m.Layers = append(m.Layers, put(ocispec.MediaTypeImageLayerGzip, p))
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, id)
	}
	m.Config = putJSON(ocispec.MediaTypeImageConfig, image)
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{putJSON(m.MediaType, m)}}
	p, err := json.Marshal(index)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "index.json"), p, 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
}

// fixture is the small image: as a layout, and converted at a registry. It is
// made once.
type fixture struct {
	once     sync.Once
	dir      string
	layers   []testLayer
	registry *regtest.Registry
	err      string
}

var small fixture

// source is the layout of the small image, not converted.
func (f *fixture) source() string { return "oci:" + filepath.Join(f.dir, "source") }

// converted is where conversions keep layers, so that each is made once.
func (f *fixture) converted() string { return filepath.Join(f.dir, "converted") }

const smallName = "/tests/small:obd"

func (f *fixture) make(t testing.TB) {
	t.Helper()
	f.once.Do(func() {
		f.err = "the image could not be made"
		var err error
		f.dir, err = os.MkdirTemp("", "reprise-test-")
		require.NoError(t, err)
		f.layers = smallImage(t)
		writeLayout(t, filepath.Join(f.dir, "source"), f.layers, smallConfig)
		f.registry, err = regtest.NewRegistry(&regtest.RegistryOptions{Dir: filepath.Join(f.dir, "registry")})
		require.NoError(t, err)
		s, err := regtest.Start(context.Background(), f.registry)
		require.NoError(t, err)
		defer s.Close()
		newBench(t).ok("convert", "--cache-dir", f.converted(), f.source(), s.Addr+smallName)
		f.err = ""
	})
	if f.err != "" {
		t.Fatal(f.err)
	}
}

func (f *fixture) remove() {
	if f.dir != "" {
		_ = os.RemoveAll(f.dir)
	}
}

// A site is a registry behind a link, as one test sees it.
type site struct {
	*regtest.Link
	addr string
	ref  string // of the small image
}

// smallSite is the registry that has the small image, which is shared: what is
// written there, all tests see.
func (b *bench) smallSite(spec string) *site {
	b.t.Helper()
	small.make(b.t)
	return b.site(spec, small.registry)
}

// ownSite is a registry of this test alone, with the small image.
func (b *bench) ownSite(noReferrers bool) *site {
	b.t.Helper()
	small.make(b.t)
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry"), NoReferrers: noReferrers})
	require.NoError(b.t, err)
	s := b.site("0s,unlimited", g)
	b.ok("convert", "--cache-dir", small.converted(), small.source(), s.ref)
	return s
}

func (b *bench) site(spec string, g *regtest.Registry) *site {
	b.t.Helper()
	l, err := regtest.ParseLink(spec)
	require.NoError(b.t, err)
	link := regtest.NewLink(l, g)
	s, err := regtest.Start(context.Background(), link)
	require.NoError(b.t, err)
	b.t.Cleanup(func() { require.NoError(b.t, s.Close()) })
	b.loop = append(b.loop, s.Addr)
	return &site{Link: link, addr: s.Addr, ref: s.Addr + smallName}
}

// upper makes an empty sparse writable layer.
func (b *bench) upper(size int64) string {
	f, err := os.Create(b.path("upper"))
	require.NoError(b.t, err)
	w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: size})
	require.NoError(b.t, err)
	require.NoError(b.t, w.Close())
	return f.Name()
}
