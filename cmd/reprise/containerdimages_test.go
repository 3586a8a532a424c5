package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/client"
	ctrdcontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// A variant is the small image with one more layer, at the registry that all tests
// share: converted, with the tag obd, and as it was built, with the tag ordinary.
type variant struct {
	once sync.Once
	made bool
}

var variants [5]variant

// variant is where the site has the variant of a number.
func (b *bench) variant(s *site, n int) (lazy, ordinary string) {
	b.t.Helper()
	repo := fmt.Sprintf("%s/tests/variant-%d", s.addr, n)
	variants[n].once.Do(func() {
		dir := filepath.Join(small.dir, fmt.Sprintf("variant-%d", n))
		more := append(dirs("data"), testFile{name: "data/variant", body: randomBytes(uint64(1000+n), 500_000)})
		writeLayout(b.t, dir, append(slices.Clone(small.layers), more), smallConfig)
		own, err := regtest.Start(b.t.Context(), small.registry) // which no gate closes
		require.NoError(b.t, err)
		defer own.Close()
		at := strings.Replace(repo, s.addr, own.Addr, 1)
		b.ok("convert", "--cache-dir", small.converted(), "oci:"+dir, at+":obd")
		b.push(dir, at, "ordinary")
		variants[n].made = true
	})
	require.True(b.t, variants[n].made, "the variant could not be made")
	return repo + ":obd", repo + ":ordinary"
}

// pushOrdinary puts the small image at the registry as it was built.
func (b *bench) pushOrdinary(s *site) (ref string) {
	b.t.Helper()
	b.push(strings.TrimPrefix(small.source(), "oci:"), s.addr+"/tests/small", "ordinary")
	return s.addr + "/tests/small:ordinary"
}

// push pushes the image of a layout.
func (b *bench) push(dir, repo, tag string) {
	b.t.Helper()
	source, err := oci.New(dir)
	require.NoError(b.t, err)
	var index ocispec.Index
	require.NoError(b.t, json.Unmarshal(contentOf(b.t, filepath.Join(dir, "index.json")), &index))
	to, err := remote.NewRepository(repo)
	require.NoError(b.t, err)
	to.PlainHTTP = true
	_, err = oras.Copy(b.t.Context(), source, index.Manifests[0].Digest.String(), to, tag, oras.DefaultCopyOptions)
	require.NoError(b.t, err)
}

// changes are what a container does to the image's files: a new one, those of
// layers that are written to, emptied and removed.
const changes = `echo word > /data/new && echo more >> /app/hostname && cat /data/big > /data/copy && : > /app/page-7 &&
/tmp/rm -r /data/sub /app/page-8 && echo done`

// changed reads it all back.
const changed = `cat /data/new /app/hostname && [ ! -s /app/page-7 ] && [ ! -e /app/page-8 ] && [ ! -e /data/sub ] &&
cat /data/copy > /data/big && cat /app/page-99 > /dev/null && echo read`

// TestContainerdImages pulls, runs, writes, commits and removes images of all
// kinds, as ctr, nerdctl and their like do.
func TestContainerdImages(t *testing.T) {
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := b.ownSite(false)
		ordinary := b.pushOrdinary(s)
		b.ok("attach", "--as", "layer", "--tag", "accelerated", s.ref, b.recording(s))
		supervisor, said := b.daemon(true)
		c := b.containerd(bin, filepath.Join(b.root, "reprise.sock"))
		for _, im := range []struct {
			ref  string
			lazy bool
		}{
			{s.ref, true},
			{s.addr + "/tests/small:accelerated", true},
			{ordinary, false},
		} {
			t.Log(im.ref)
			blobs := s.blobsSince(func() {
				b.ok("pull", "--plain-http", "--address", c.socket, im.ref)
			})
			if im.lazy {
				require.LessOrEqual(t, blobs, 1, "the config at most")
			} else {
				require.Equal(t, 1+len(small.layers), blobs)
			}
			c.lifeOf(im.ref)
			require.Equal(t, im.lazy, len(b.loops()) > 0, "a device is for layers in overlaybd format")
			c.remove(im.ref)
			c.emptied()
		}
		c.stop()
		b.end(supervisor, said)
	})
}

// blobsSince is how many blobs f has fetched from the registry, by whom ever.
func (s *site) blobsSince(f func()) int {
	seen := map[string]bool{}
	before := len(s.Stats().Log)
	f()
	for _, r := range s.Stats().Log[before:] {
		if r.Method == http.MethodGet && strings.Contains(r.Path, "/blobs/") {
			seen[r.Path] = true
		}
	}
	return len(seen)
}

// lifeOf runs containers on a pulled image and on one that is made of their
// changes. Both are there when it returns, containers are not.
func (c *ctrd) lifeOf(ref string) {
	t := c.b.t
	t.Helper()
	hello := c.create("hello", ref)
	code, out := c.run(hello)
	require.Zero(t, code, out)
	require.Equal(t, "hello from the image\n", out)

	ctr := c.create("changes", ref, "/bin/sh", "-c", changes)
	code, out = c.run(ctr)
	require.Zero(t, code, out)
	require.Equal(t, "done\n", out)
	usage, err := c.SnapshotService("reprise").Usage(c.ctx(), "changes")
	require.NoError(t, err)
	require.Greater(t, usage.Size, int64(3_000_000), "what was written counts")
	require.Less(t, usage.Size, int64(4_000_000), "what was not does not")

	again := ref + "-committed"
	c.commit(ctr, ref, again)
	require.NoError(t, ctr.Delete(c.ctx(), client.WithSnapshotCleanup))
	for _, name := range []string{"one", "two"} { // their writes are their own
		ctr = c.create(name, again, "/bin/sh", "-c", changed)
		code, out = c.run(ctr)
		require.Zero(t, code, out)
		require.Equal(t, "word\nthe image\nmore\nread\n", out)
		require.NoError(t, ctr.Delete(c.ctx(), client.WithSnapshotCleanup))
	}
	c.view(again)

	// The image's layers stay as long as the other one needs them.
	code, out = c.run(hello)
	require.Zero(t, code, out)
	require.NoError(t, hello.Delete(c.ctx(), client.WithSnapshotCleanup))
	c.remove(ref)
	ctr = c.create("three", again, "/bin/cat", "/app/hostname", "/data/new")
	code, out = c.run(ctr)
	require.Zero(t, code, out)
	require.Equal(t, "the image\nmore\nword\n", out)
	require.NoError(t, ctr.Delete(c.ctx(), client.WithSnapshotCleanup))
	c.remove(again)
	c.b.ok("pull", "--plain-http", "--address", c.socket, ref)
	ctr = c.create("four", ref, "/bin/cat", "/app/hostname")
	code, out = c.run(ctr)
	require.Zero(t, code, out)
	require.Equal(t, "the image\n", out)
	require.NoError(t, ctr.Delete(c.ctx(), client.WithSnapshotCleanup))
}

func contentOf(t testing.TB, path string) []byte {
	t.Helper()
	p, err := os.ReadFile(path)
	require.NoError(t, err)
	return p
}

// view mounts an image's files read-only, as ctr does for users.
func (c *ctrd) view(ref string) {
	t := c.b.t
	t.Helper()
	ctx, done, err := c.WithLease(c.ctx())
	require.NoError(t, err)
	defer done(ctx)
	im, err := c.GetImage(ctx, ref)
	require.NoError(t, err)
	ids, err := im.RootFS(ctx)
	require.NoError(t, err)
	mounts, err := c.SnapshotService("reprise").View(ctx, "view", identity.ChainID(ids).String())
	require.NoError(t, err)
	dir := c.b.mkdir("view")
	require.NoError(t, mount.All(mounts, dir))
	require.Equal(t, "the image\nmore\n", string(contentOf(t, filepath.Join(dir, "app/hostname"))))
	require.NoError(t, mount.UnmountAll(dir, 0))
	require.NoError(t, c.SnapshotService("reprise").Remove(ctx, "view"))
}

// commit makes an image of a container's changes, as nerdctl commit does.
func (c *ctrd) commit(ctr client.Container, ref, to string) {
	t := c.b.t
	t.Helper()
	ctx, done, err := c.WithLease(c.ctx())
	require.NoError(t, err)
	defer done(ctx)
	info, err := ctr.Info(ctx)
	require.NoError(t, err)
	layer, err := rootfs.CreateDiff(ctx, info.SnapshotKey, c.SnapshotService("reprise"), c.DiffService())
	require.NoError(t, err)
	cs := c.ContentStore()
	unpacked, err := images.GetDiffID(ctx, cs, layer)
	require.NoError(t, err)

	im, err := c.GetImage(ctx, ref)
	require.NoError(t, err)
	m, err := images.Manifest(ctx, cs, im.Target(), platforms.Default())
	require.NoError(t, err)
	var config ocispec.Image
	p, err := ctrdcontent.ReadBlob(ctx, cs, m.Config)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(p, &config))
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, unpacked)
	m.Layers = append(m.Layers, layer)
	m.Config = c.putJSON(ctx, m.Config.MediaType, config, nil)
	target := c.putJSON(ctx, ocispec.MediaTypeImageManifest, m, map[string]string{
		"containerd.io/gc.ref.content.config": m.Config.Digest.String(),
		"containerd.io/gc.ref.content.l.0":    layer.Digest.String(),
	})
	made, err := c.ImageService().Create(ctx, images.Image{Name: to, Target: target})
	require.NoError(t, err)
	require.NoError(t, client.NewImage(c.Client, made).Unpack(ctx, "reprise"), c.log())
}

func (c *ctrd) putJSON(ctx context.Context, mediaType string, v any, labels map[string]string) ocispec.Descriptor {
	p, err := json.Marshal(v)
	require.NoError(c.b.t, err)
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
	require.NoError(c.b.t, ctrdcontent.WriteBlob(ctx, c.ContentStore(), d.Digest.String(), bytes.NewReader(p), d, ctrdcontent.WithLabels(labels)))
	return d
}
