package convert

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// A testRegistry is an embedded registry whose requests are counted.
type testRegistry struct {
	client *registry.Client
	addr   string
	link   *regtest.Link
}

func newRegistry(t *testing.T) *testRegistry {
	t.Helper()
	dir := t.TempDir()
	reg, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: dir})
	require.NoError(t, err)
	link := regtest.NewLink(regtest.LinkSpec{}, reg)
	srv, err := regtest.Start(t.Context(), link)
	require.NoError(t, err)
	t.Cleanup(func() { _ = srv.Close() })
	client, err := registry.New(&registry.Options{HostsDir: dir, DockerConfigDir: dir, LockDir: dir, PlainHTTP: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, client.Close()) })
	return &testRegistry{client, srv.Addr, link}
}

func (r *testRegistry) at(t *testing.T, name string) Location {
	t.Helper()
	l, err := At(r.addr+"/"+name, r.client)
	require.NoError(t, err)
	return l
}

// uploaded lists the digests of blobs that came in completely.
func (r *testRegistry) uploaded() []string {
	var list []string
	for _, q := range r.link.Stats().Log {
		if d := q.Query[strings.Index(q.Query, "=")+1:]; q.Method == http.MethodPut && strings.Contains(q.Path, "/uploads/") {
			list = append(list, strings.Replace(d, "%3A", ":", 1))
		}
	}
	slices.Sort(list)
	return list
}

// stages counts the events of each stage's end.
func stages(into map[Stage]int) func(Event) {
	return func(e Event) {
		if e.Done {
			into[e.Stage]++
		}
	}
}

func TestRegistryToRegistry(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	layers := vectorLayers(t)
	writeImage(t, r.at(t, "src:v1"), layers...)
	r.link.Reset()

	count := map[Stage]int{}
	d, err := testConvert(t, r.at(t, "src:v1"), r.at(t, "dst:v1"), Options{Progress: stages(count)})
	require.NoError(t, err)
	require.Equal(t, map[Stage]int{Fetch: 3, Apply: 3, Commit: 3, Push: 3}, count)
	m := manifestOf(t, r.at(t, "dst:v1"))
	var want []string
	for _, l := range append(slices.Clone(m.Layers), m.Config, ocispec.DescriptorEmptyJSON) {
		want = append(want, l.Digest.String())
	}
	slices.Sort(want)
	require.Equal(t, want, r.uploaded())
	equalTrees(t, listTree(t, mountLayers(t, r.at(t, "dst:v1"), 3), false), readTree(t, vectors(t, "ext4-64m", "tree-layers012.tsv")))

	for name, where := range map[string]string{"the same tag": "dst:v1", "another tag": "dst:v2"} {
		t.Run(name, func(t *testing.T) {
			r.link.Reset()
			count := map[Stage]int{}
			again, err := testConvert(t, r.at(t, "src:v1"), r.at(t, where), Options{Progress: stages(count)})
			require.NoError(t, err)
			require.Equal(t, d, again)
			require.Equal(t, map[Stage]int{Reuse: 3}, count)
			require.Empty(t, r.uploaded())
			require.Less(t, r.link.Stats().BytesSent, int64(20_000))
		})
	}
	t.Run("other settings", func(t *testing.T) {
		count := map[Stage]int{}
		_, err := testConvert(t, r.at(t, "src:v1"), r.at(t, "dst:v3"), Options{Progress: stages(count), BlockSize: 16384})
		require.NoError(t, err)
		require.Zero(t, count[Reuse])
	})
	t.Run("a new layer on top", func(t *testing.T) {
		top := gzipLayer(t, makeTar(t, file("new/file", "on top"), file("etc/.wh.passwd", "")))
		writeImage(t, r.at(t, "src:v2"), append(slices.Clone(layers), top)...)
		r.link.Reset()
		count := map[Stage]int{}
		_, err := testConvert(t, r.at(t, "src:v2"), r.at(t, "dst:v4"), Options{Progress: stages(count)})
		require.NoError(t, err)
		require.Equal(t, map[Stage]int{Reuse: 3, Fetch: 1, Apply: 1, Commit: 1, Push: 1}, count)
		require.Len(t, r.uploaded(), 2, "the layer and the config")
		require.Equal(t, m.Layers, manifestOf(t, r.at(t, "dst:v4")).Layers[:3])
		root := mountLayers(t, r.at(t, "dst:v4"), 4)
		p, err := os.ReadFile(filepath.Join(root, "new/file"))
		require.NoError(t, err)
		require.Equal(t, "on top", string(p))
		require.NoFileExists(t, filepath.Join(root, "etc/passwd"))
		require.FileExists(t, filepath.Join(root, "newdir/a/b/c.txt"))
		fsck(t, r.at(t, "dst:v4"), 4)
	})
	t.Run("a blob that is gone is made again", func(t *testing.T) {
		r.link.SetFault(func(q *http.Request) *regtest.Fault {
			if q.Method == http.MethodHead && strings.HasSuffix(q.URL.Path, m.Layers[1].Digest.String()) {
				return &regtest.Fault{Status: http.StatusNotFound}
			}
			return nil
		})
		defer r.link.SetFault(nil)
		count := map[Stage]int{}
		again, err := testConvert(t, r.at(t, "src:v1"), r.at(t, "dst:v5"), Options{Progress: stages(count)})
		require.NoError(t, err)
		require.Equal(t, 1, count[Reuse])
		require.Equal(t, d, again, "reproducible")
	})
	t.Run("an index under the tag", func(t *testing.T) {
		p := []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageIndex + `","manifests":[]}`)
		require.NoError(t, r.client.Push(t.Context(), r.addr+"/dst:index", ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageIndex, Digest: digestOf(p), Size: int64(len(p)),
		}, opener(p)))
		_, err := testConvert(t, r.at(t, "src:v1"), r.at(t, "dst:index"), Options{})
		require.NoError(t, err)
	})
}

func TestCacheDir(t *testing.T) {
	needRoot(t)
	layers := vectorLayers(t)
	src, cache := at(t, "oci:"+t.TempDir()), filepath.Join(t.TempDir(), "cache")
	writeImage(t, src, layers...)
	convert := func(src Source, o Options) (map[Stage]int, Location) {
		dst := at(t, "oci:"+filepath.Join(t.TempDir(), "new")+":tag")
		count := map[Stage]int{}
		o.CacheDir, o.Progress = cache, stages(count)
		_, err := testConvert(t, src, dst, o)
		require.NoError(t, err)
		return count, dst
	}
	count, first := convert(src, Options{})
	require.Equal(t, map[Stage]int{Apply: 3, Commit: 3, Push: 3}, count)
	count, second := convert(src, Options{})
	require.Equal(t, map[Stage]int{Reuse: 3, Push: 3}, count)
	require.Equal(t, manifestOf(t, first), manifestOf(t, second))
	count, _ = convert(src, Options{DeviceSize: 2 * testSize})
	require.Equal(t, 3, count[Apply])

	other := at(t, "oci:"+t.TempDir())
	writeImage(t, other, layers[0], layers[1], plainLayer(makeTar(t, file("x", "y"))))
	count, third := convert(other, Options{})
	require.Equal(t, map[Stage]int{Reuse: 2, Apply: 1, Commit: 1, Push: 3}, count)
	fsck(t, third, 3)

	// A damaged store is as good as none.
	blob := store{cache}.blob(manifestOf(t, first).Layers[1].Digest)
	require.NoError(t, os.Truncate(blob, 100))
	count, _ = convert(src, Options{})
	require.Equal(t, map[Stage]int{Reuse: 1, Apply: 2, Commit: 2, Push: 3}, count)
}

func TestLayoutReuse(t *testing.T) {
	needRoot(t)
	src, dir := at(t, "oci:"+t.TempDir()), t.TempDir()
	writeImage(t, src, vectorLayers(t)...)
	var digests []string
	for i := range 3 {
		count := map[Stage]int{}
		d, err := testConvert(t, src, at(t, fmt.Sprintf("oci:%s:t%d", dir, i)), Options{Progress: stages(count)})
		require.NoError(t, err)
		digests = append(digests, d.Digest.String())
		if i > 0 {
			require.Equal(t, map[Stage]int{Reuse: 3}, count)
		}
	}
	require.Len(t, slices.Compact(digests), 1)
	m := manifestOf(t, at(t, "oci:"+dir+":t1"))
	require.Len(t, m.Layers, 3)
	_, err := testConvert(t, at(t, "oci:"+dir), at(t, "oci:"+t.TempDir()), Options{})
	require.ErrorContains(t, err, "several images: choose one with oci:DIR:TAG; there are: t0 t1 t2")
	_, err = testConvert(t, at(t, "oci:"+dir+":t1"), at(t, "oci:"+t.TempDir()), Options{})
	require.ErrorContains(t, err, "already in overlaybd format")
}
