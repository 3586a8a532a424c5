package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/reprise-project/reprise/backstore/convert"
	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/node"
)

// A site is a registry with an image in overlaybd format, and a node of its own.
type site struct {
	t *testing.T
	*regtest.Link
	ref    string
	to     convert.Location
	client *registry.Client

	desc     ocispec.Descriptor
	manifest ocispec.Manifest

	root   string // of the node
	n      *node.Node
	server *node.Server
	sn     *Snapshotter
	o      Options // of sn
	log    *lockedBuffer
}

// converted is the image, which is made once: a registry's directory.
var converted = sync.OnceValues(func() (dir string, err error) { return os.MkdirTemp("", "registry") })

// TestMain removes what tests share, and looks for leaked goroutines.
func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := converted(); err == nil {
		_ = os.RemoveAll(dir)
	}
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

type lockedBuffer struct {
	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// needDevices skips where images cannot be mounted.
func needDevices(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("needs %s: %v", dev, err)
		}
		f.Close()
	}
	for _, program := range []string{"mkfs.ext4", "unshare", "mount"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s", program)
		}
	}
}

// newSite starts a snapshotter on an image of two layers: /base and /top, with
// lines in them.
func newSite(t *testing.T, o *Options) *site {
	t.Helper()
	needDevices(t)
	dir, err := converted()
	require.NoError(t, err)
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: dir})
	require.NoError(t, err)
	s := &site{t: t, Link: regtest.NewLink(regtest.LinkSpec{}, g), log: &lockedBuffer{}}
	server, err := regtest.Start(context.Background(), s.Link)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s.ref = server.Addr + "/an/image:1"
	s.client, err = registry.New(s.registry())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.client.Close()) })
	s.to, err = convert.At(s.ref, s.client)
	require.NoError(t, err)
	s.convert()
	if o != nil {
		s.o = *o
	}
	s.root = t.TempDir()
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("log: %s", s.log)
		}
		require.Empty(t, mountsBelow(t, s.root))
	})
	s.start()
	return s
}

func (s *site) registry() *registry.Options {
	dir := s.t.TempDir()
	return &registry.Options{PlainHTTP: true, HostsDir: dir, DockerConfigDir: dir, LockDir: dir}
}

func platform() ocispec.Platform { return ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH} }

// convert makes the image, unless a test before has.
func (s *site) convert() {
	t := s.t
	t.Helper()
	_, raw, err := s.to.Manifest(t.Context(), platform())
	if err != nil {
		from := newLayout(t)
		config := ocispec.Image{Platform: platform(), Config: ocispec.ImageConfig{Cmd: []string{"/top"}}}
		layers := []ocispec.Descriptor{
			from.layer(&config, "base", "the base\n"), from.layer(&config, "top", "the top\n"),
		}
		from.image(config, layers)
		src, err := convert.At("oci:"+from.dir, nil)
		require.NoError(t, err)
		_, err = convert.Convert(t.Context(), src, s.to, &convert.Options{DeviceSize: 16 << 20, Workdir: t.TempDir()})
		require.NoError(t, err)
		_, raw, err = s.to.Manifest(t.Context(), platform())
		require.NoError(t, err)
	}
	s.desc, _, err = s.to.Manifest(t.Context(), platform())
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(raw, &s.manifest))
	require.Len(t, s.manifest.Layers, 2)
}

// start starts the node's server and the snapshotter.
func (s *site) start() {
	t := s.t
	t.Helper()
	var err error
	log := slog.New(slog.NewTextHandler(s.log, nil))
	require.NoError(t, node.Reap(filepath.Join(s.root, "node")))
	s.n, err = node.Open(&node.Config{Root: filepath.Join(s.root, "node"), Registry: *s.registry(), Log: log})
	require.NoError(t, err)
	s.server = node.NewServer(s.n, nil)
	s.o.Log = log
	s.sn, err = New(t.Context(), filepath.Join(s.root, "snapshotter"), s.server, &s.o)
	require.NoError(t, err)
}

// stop ends them as a daemon does that nobody keeps descriptors for.
func (s *site) stop() {
	if s.n == nil {
		return
	}
	require.NoError(s.t, s.sn.Close())
	require.NoError(s.t, s.server.Close())
	require.NoError(s.t, s.n.Close())
	s.n = nil
}

func mountsBelow(t *testing.T, dir string) (found []string) {
	t.Helper()
	p, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	for line := range strings.Lines(string(p)) {
		if strings.Contains(line, dir) {
			found = append(found, line)
		}
	}
	return found
}

// layout is an OCI layout that is being written.
type layout struct {
	t   *testing.T
	dir string
}

func newLayout(t *testing.T) layout {
	l := layout{t, t.TempDir()}
	require.NoError(t, os.MkdirAll(filepath.Join(l.dir, "blobs/sha256"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(l.dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
	return l
}

func (l layout) put(mediaType string, p []byte) ocispec.Descriptor {
	d := digest.FromBytes(p)
	require.NoError(l.t, os.WriteFile(filepath.Join(l.dir, "blobs/sha256", d.Encoded()), p, 0o644))
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(p))}
}

// layer is one with a file.
func (l layout) layer(c *ocispec.Image, name, content string) ocispec.Descriptor {
	p := layerTar(l.t, name, content)
	c.RootFS.Type = "layers"
	c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, digest.FromBytes(p))
	return l.put(ocispec.MediaTypeImageLayer, p)
}

func layerTar(t *testing.T, name, content string) []byte {
	var p bytes.Buffer
	w := tar.NewWriter(&p)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(1e9, 0)}))
	_, err := io.WriteString(w, content)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return p.Bytes()
}

func (l layout) image(c ocispec.Image, layers []ocispec.Descriptor) {
	config, err := json.Marshal(c)
	require.NoError(l.t, err)
	m, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: l.put(ocispec.MediaTypeImageConfig, config), Layers: layers,
	})
	require.NoError(l.t, err)
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{l.put(ocispec.MediaTypeImageManifest, m)},
	})
	require.NoError(l.t, err)
	require.NoError(l.t, os.WriteFile(filepath.Join(l.dir, "index.json"), index, 0o644))
}

// above pushes another image that has more layers above those of the site's.
func (s *site) above(tag string, more ...ocispec.Descriptor) (ref string, desc ocispec.Descriptor, m ocispec.Manifest) {
	t := s.t
	t.Helper()
	m = s.manifest
	m.Layers = append(m.Layers[:2:2], more...)
	raw, err := json.Marshal(m)
	require.NoError(t, err)
	desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	ref = strings.TrimSuffix(s.ref, ":1") + ":" + tag
	to, err := convert.At(ref, s.client)
	require.NoError(t, err)
	require.NoError(t, to.PushManifest(t.Context(), desc, raw))
	return ref, desc, m
}

// pushed is a blob in the site's repository.
func (s *site) pushed(p []byte, annotations map[string]string) ocispec.Descriptor {
	d := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(p), Size: int64(len(p)), Annotations: annotations,
	}
	err := s.to.Push(s.t.Context(), d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil })
	require.NoError(s.t, err)
	return d
}

// chainIDs are containerd's names for the snapshots of layers. Of layers that
// nobody unpacks any distinct digests will do.
func chainIDs(layers []ocispec.Descriptor) []string {
	diffs := make([]digest.Digest, len(layers))
	for i, l := range layers {
		diffs[i] = l.Digest
	}
	var ids []string
	for _, id := range identity.ChainIDs(diffs) {
		ids = append(ids, id.String())
	}
	return ids
}

// pull does what containerd does for a pull, and returns the name of the topmost
// snapshot. Layers that are not in overlaybd format are unpacked by unpack.
func (s *site) pull(ref string, desc ocispec.Descriptor, layers []ocispec.Descriptor, unpack func(i int, mounts []mount.Mount)) string {
	t := s.t
	t.Helper()
	parent := ""
	for i, id := range chainIDs(layers) {
		if _, err := s.sn.Stat(t.Context(), id); err == nil {
			parent = id
			continue
		}
		labels := map[string]string{
			snapshots.LabelSnapshotRef: id, snapshotters.TargetRefLabel: ref,
			snapshotters.TargetManifestDigestLabel: desc.Digest.String(),
		}
		for k, v := range snapshots.FilterInheritedLabels(layers[i].Annotations) {
			labels[k] = v
		}
		key := "extract-" + id
		mounts, err := s.sn.Prepare(t.Context(), key, parent, snapshots.WithLabels(labels))
		if !isLayer(labels) {
			require.NoError(t, err)
			unpack(i, mounts)
			require.NoError(t, s.sn.Commit(t.Context(), id, key, snapshots.WithLabels(labels)))
		} else {
			require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
		}
		parent = id
	}
	return parent
}

// pulled pulls the site's own image.
func (s *site) pulled() string {
	s.t.Helper()
	return s.pull(s.ref, s.desc, s.manifest.Layers, nil)
}

// in runs a script of sh in the file system of the mounts, and returns what it
// prints. It does so in another process and mount namespace.
func (s *site) in(mounts []mount.Mount, script string) string {
	t := s.t
	t.Helper()
	out, err := s.tryIn(mounts, script)
	require.NoError(t, err, out)
	return out
}

func (s *site) tryIn(mounts []mount.Mount, script string) (string, error) {
	require.Len(s.t, mounts, 1)
	m := mounts[0]
	dir := s.t.TempDir()
	options := strings.Join(m.Options, ",")
	line := fmt.Sprintf("mount -t %s -o %s %s %s", m.Type, options, m.Source, dir)
	if m.Type == "bind" {
		line = fmt.Sprintf("mount --rbind %s %s", m.Source, dir)
		if strings.Contains(","+options+",", ",ro,") {
			line += " && mount -o remount,bind,ro " + dir
		}
	}
	p, err := exec.CommandContext(s.t.Context(), "unshare", "-m", "sh", "-ec", line+"\ncd "+dir+"\n"+script).CombinedOutput()
	return string(p), err
}

// eventually waits until something is the case.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for until := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		require.True(t, time.Now().Before(until), what)
	}
}
