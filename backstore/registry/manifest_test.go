package registry

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

func (f *fixture) put(t *testing.T, ref, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	raw := mustJSON(t, v)
	d := descriptor(mediaType, raw)
	require.NoError(t, f.Push(t.Context(), ref, d, opener(raw)))
	return d
}

// reset forgets what the client has read and counts anew.
func (f *fixture) reset() {
	f.manifests = manifestCache{}
	f.link.Reset()
}

func (f *fixture) kinds() map[string]int { return f.link.Stats().ByKind }

// An index may carry what it names. What it carries has to be that.
func TestIndexWithData(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	one := f.put(t, f.repo+":one", ocispec.MediaTypeImageManifest, image("one", nil))
	for want, data := range map[int][]byte{1: mustJSON(t, image("one", nil)), 2: mustJSON(t, image("two", nil))} {
		idx := emptyIndex()
		idx.Manifests = []ocispec.Descriptor{one}
		idx.Manifests[0].Data = data
		f.put(t, f.repo+":latest", ocispec.MediaTypeImageIndex, idx)
		f.reset()
		m, err := f.Manifest(t.Context(), f.repo, nil)
		require.NoError(t, err)
		require.Equal(t, one.Digest, m.Descriptor.Digest)
		require.EqualValues(t, want, f.link.Stats().Requests)
	}
}

func TestManifestCostsFewRequests(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	amd := f.put(t, f.repo+":one", ocispec.MediaTypeImageManifest, image("amd", nil))
	arm := f.put(t, f.repo, images.MediaTypeDockerSchema2Manifest, image("arm", nil))
	ppc := f.put(t, f.repo, ocispec.MediaTypeImageManifest, image("ppc", nil))
	platform := func(d ocispec.Descriptor, arch string) ocispec.Descriptor {
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		return d
	}
	idx := emptyIndex()
	idx.Manifests = []ocispec.Descriptor{platform(ppc, "unknown"), platform(arm, "arm64"), platform(amd, "amd64")}
	multi := f.put(t, f.repo+":latest", ocispec.MediaTypeImageIndex, idx)
	outer := emptyIndex()
	outer.Manifests = []ocispec.Descriptor{multi}
	f.put(t, f.repo+":nested", ocispec.MediaTypeImageIndex, outer)

	f.reset()
	m, err := f.Manifest(t.Context(), f.repo+":one", nil)
	require.NoError(t, err)
	require.Equal(t, amd, m.Descriptor)
	require.Nil(t, m.Index)
	require.Equal(t, map[string]int{"tag": 1}, f.kinds())

	f.reset()
	m, err = f.Manifest(t.Context(), f.repo, &ocispec.Platform{OS: "linux", Architecture: "arm64"})
	require.NoError(t, err)
	require.Equal(t, arm.Digest, m.Descriptor.Digest)
	require.EqualValues(t, 3, m.Config.Size)
	require.Equal(t, multi, *m.Index)
	require.Equal(t, map[string]int{"tag": 1, "manifest": 1}, f.kinds())

	f.reset()
	d, err := f.Resolve(t.Context(), f.repo)
	require.NoError(t, err)
	require.Equal(t, multi, d)
	raw, err := f.Get(t.Context(), f.repo, d)
	require.NoError(t, err)
	require.Equal(t, mustJSON(t, idx), raw)
	require.Equal(t, map[string]int{"tag": 1}, f.kinds())

	f.reset()
	m, err = f.Manifest(t.Context(), f.repo+":nested", &ocispec.Platform{OS: "linux", Architecture: "amd64"})
	require.NoError(t, err)
	require.Equal(t, amd.Digest, m.Descriptor.Digest)

	_, err = f.Manifest(t.Context(), f.repo, &ocispec.Platform{OS: "linux", Architecture: "riscv64"})
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.ErrorContains(t, err, "linux/arm64")

	f.reset()
	m, err = f.Manifest(t.Context(), f.repo+"@"+amd.Digest.String(), nil)
	require.NoError(t, err)
	require.Equal(t, amd, m.Descriptor)
	require.Equal(t, map[string]int{"manifest": 1}, f.kinds())
}

func TestManifestByTag(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d := f.put(t, f.repo+":there", ocispec.MediaTypeImageManifest, image("x", nil))
	f.reset()
	m, err := f.ManifestByTag(t.Context(), f.repo+":other", "there")
	require.NoError(t, err)
	require.Equal(t, d, m.Descriptor)
	_, err = f.ManifestByTag(t.Context(), f.repo, "missing")
	require.ErrorIs(t, err, os.ErrNotExist)
	require.True(t, errdefs.IsNotFound(err))
	require.ErrorContains(t, err, "some/repo:missing")
	require.Equal(t, map[string]int{"tag": 2}, f.kinds())
	_, err = f.ManifestByTag(t.Context(), f.repo, "a/b")
	require.Error(t, err)
}

func TestManifestRefused(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	f.put(t, f.repo+":x", ocispec.MediaTypeImageManifest, image("x", nil))
	good := string(mustJSON(t, image("x", nil)))
	answer := func(body string, header ...string) *regtest.Fault {
		h := http.Header{"Content-Type": {ocispec.MediaTypeImageManifest}}
		for i := 0; i < len(header); i += 2 {
			h.Set(header[i], header[i+1])
		}
		return &regtest.Fault{Status: 200, Body: body, Header: h}
	}
	for name, c := range map[string]struct {
		fault *regtest.Fault
		says  string
	}{
		"other digest":  {answer(good, "Docker-Content-Digest", "sha256:"+strings.Repeat("0", 64)), "another digest"},
		"corrupt":       {&regtest.Fault{Corrupt: true}, "another digest"},
		"not JSON":      {answer("<html>"), "not a manifest"},
		"ambiguous":     {answer(`{"manifests":[],"layers":[]}`), "at once"},
		"no type":       {answer(`{}`, "Content-Type", "text/plain"), "not a manifest"},
		"index as such": {answer(`{"mediaType":"text/plain"}`), "not an image manifest"},
		"bad layer":     {answer(`{"config":{"digest":"sha256:x"},"layers":[{}]}`), "invalid"},
		"too long":      {answer(`{"a":"` + strings.Repeat("x", MaxObject) + `"}`), "limit"},
	} {
		f.reset()
		f.link.SetFault(always(*c.fault))
		_, err := f.Manifest(t.Context(), f.repo+":x", nil)
		require.ErrorContains(t, err, c.says, name)
		require.EqualValues(t, 1, f.link.Stats().Requests, name)
	}
}

func TestGet(t *testing.T) {
	f := newFixture(t, Options{}, regtest.RegistryOptions{})
	d, content := f.push(t, 1, 10_000)
	f.link.SetFault(script(&regtest.Fault{Cut: true, CutAt: 100}, &regtest.Fault{Status: 500}))
	got, err := f.Get(t.Context(), f.repo, d)
	require.NoError(t, err)
	require.Equal(t, content, got)
	require.EqualValues(t, 3, f.link.Stats().Requests)

	f.link.SetFault(always(regtest.Fault{Corrupt: true}))
	_, err = f.Get(t.Context(), f.repo, d)
	require.ErrorContains(t, err, "another digest")
	f.link.SetFault(nil)

	short := d
	short.Size--
	_, err = f.Get(t.Context(), f.repo, short)
	require.ErrorContains(t, err, "descriptor says")
	short.Size = MaxObject + 1
	_, err = f.Get(t.Context(), f.repo, short)
	require.ErrorContains(t, err, "limit")

	f.link.Reset()
	inline := descriptor("application/x", []byte("here"))
	inline.Data = []byte("here")
	got, err = f.Get(t.Context(), f.repo, inline)
	require.NoError(t, err)
	require.Equal(t, "here", string(got))
	require.Zero(t, f.link.Stats().Requests)
}

func TestManifestCacheIsBounded(t *testing.T) {
	var m manifestCache
	for i := range 10 {
		raw := []byte(fmt.Sprint(i) + strings.Repeat("x", 4<<20))
		m.put(descriptor("", raw).Digest, cached{raw: raw})
		m.put(descriptor("", raw).Digest, cached{raw: raw})
	}
	require.Len(t, m.byID, 3)
	require.Len(t, m.order, 3)
	require.LessOrEqual(t, m.size, maxManifestCache)
	for _, d := range append([]string(nil), string(m.order[0]), string(m.order[1]), string(m.order[2])) {
		m.drop(descriptor("", nil).Digest)
		m.drop(descriptorDigest(d))
	}
	require.Zero(t, m.size)
}

func TestReference(t *testing.T) {
	dg := "sha256:" + strings.Repeat("a", 64)
	for in, want := range map[string]Reference{
		"docker.io/alpine:3":        {Registry: "docker.io", Repository: "library/alpine", Tag: "3"},
		"docker.io/a/b":             {Registry: "docker.io", Repository: "a/b"},
		"localhost/a":               {Registry: "localhost", Repository: "a"},
		"localhost:5000/a/b-c:v1":   {Registry: "localhost:5000", Repository: "a/b-c", Tag: "v1"},
		"[::1]:5000/a":              {Registry: "[::1]:5000", Repository: "a"},
		"ghcr.io/a/b@" + dg:         {Registry: "ghcr.io", Repository: "a/b", Digest: descriptorDigest(dg)},
		"ghcr.io/a/b:tag_1.2@" + dg: {Registry: "ghcr.io", Repository: "a/b", Tag: "tag_1.2", Digest: descriptorDigest(dg)},
	} {
		got, err := ParseReference(in)
		require.NoError(t, err, in)
		require.Equal(t, want, got)
		again, err := ParseReference(got.String())
		require.NoError(t, err)
		require.Equal(t, got, again)
	}
	for _, in := range []string{
		"", "alpine", "alpine:3", "library/alpine", "https://ghcr.io/a", "ghcr.io/", "ghcr.io/A", "ghcr.io/a:", "ghcr.io/a:b:c",
		"ghcr.io/../a", "ghcr.io/a//b", "ghcr.io/a@sha256:12", "ghcr.io/a@" + dg + "@" + dg, "ghcr.io/a b", "ghcr.io:x/a",
		"a@b.c/d", "ghcr.io/a?x=y", "ghcr.io/a#b", "ghcr.io/a:" + strings.Repeat("x", 129), "-.io/a",
	} {
		_, err := ParseReference(in)
		require.Error(t, err, in)
	}
}

func FuzzParseReference(f *testing.F) {
	f.Add("docker.io/alpine:3")
	f.Add("localhost:5000/a/b-c:v1@sha256:" + strings.Repeat("a", 64))
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseReference(s)
		if err != nil {
			return
		}
		again, err := ParseReference(r.String())
		if err != nil || again != r {
			t.Fatalf("%q → %+v → %q → %+v, %v", s, r, r.String(), again, err)
		}
	})
}

func FuzzContentRange(f *testing.F) {
	f.Add("bytes 0-1/2")
	f.Add("bytes 5-9/*")
	f.Fuzz(func(t *testing.T, s string) {
		first, last, total, ok := parseContentRange(s)
		if ok && (first < 0 || last < 0 || total < -1) {
			t.Fatalf("%q: %d-%d/%d", s, first, last, total)
		}
	})
}

func FuzzManifestType(f *testing.F) {
	f.Add("application/json", []byte(`{"mediaType":"x"}`))
	f.Fuzz(func(t *testing.T, h string, raw []byte) {
		if mt, err := manifestType(h, raw); err == nil && mt == "" {
			t.Fatal("no type and no error")
		}
	})
}

func TestErrorMessage(t *testing.T) {
	for in, want := range map[string]string{
		`{"errors":[{"code":"DENIED","message":"no"},{"code":"X"}]}`: "DENIED no; X",
		"plain": "plain", "<html>": "", "": "", "a\x1b[31mb": `"a\x1b[31mb"`,
	} {
		require.Equal(t, want, errorMessage([]byte(in)))
	}
	require.Less(t, len(errorMessage([]byte(strings.Repeat("ä", 1000)))), 210)
}

func TestBrokenHostsFile(t *testing.T) {
	dir := t.TempDir()
	writeHosts(t, dir, "localhost:5000", "server = [[[\n")
	c, _ := newClient(t, Options{HostsDir: dir})
	_, err := c.Resolve(t.Context(), "localhost:5000/a:b")
	require.ErrorContains(t, err, "hosts.toml")
}
