package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/backstore/registry/registrytest"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/tracefmt"
)

// A shelf is a registry with images that no node could open, but beside which
// there can be traces.
type shelf struct {
	*bench
	c     *registry.Client
	ref   string
	layer ocispec.Descriptor
}

func (b *bench) shelf(addr string) *shelf {
	b.t.Helper()
	dir := b.t.TempDir()
	c, err := registry.New(&registry.Options{PlainHTTP: true, LockDir: dir, HostsDir: dir, DockerConfigDir: dir})
	require.NoError(b.t, err)
	b.t.Cleanup(func() { require.NoError(b.t, c.Close()) })
	s := &shelf{bench: b, c: c, ref: addr + "/app:1"}
	s.layer = s.push(ocispec.MediaTypeImageLayer, []byte("a layer"))
	s.layer.Annotations = map[string]string{"containerd.io/snapshot/overlaybd/blob-digest": s.layer.Digest.String()}
	s.tag(s.ref, s.image(runtime.GOARCH))
	return s
}

func (s *shelf) push(mediaType string, p []byte) ocispec.Descriptor {
	s.t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}
	s.tag(s.ref, stored{d, p})
	return d
}

type stored struct {
	ocispec.Descriptor
	bytes []byte
}

func (s *shelf) tag(ref string, c stored) {
	s.t.Helper()
	require.NoError(s.t, s.c.Push(context.Background(), ref, c.Descriptor, func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(c.bytes)), nil
	}))
}

func (s *shelf) json(mediaType string, v any) stored {
	s.t.Helper()
	p, err := json.Marshal(v)
	require.NoError(s.t, err)
	return stored{ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(p), Size: int64(len(p))}, p}
}

// image is a manifest that has been pushed by what it names.
func (s *shelf) image(arch string) stored {
	config := s.json(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: arch},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{s.layer.Digest}},
	})
	s.tag(s.ref, config)
	return s.json(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config.Descriptor, Layers: []ocispec.Descriptor{s.layer},
	})
}

// trace writes a trace of n reads of a file.
func (s *shelf) trace(workload string, n int) string {
	s.t.Helper()
	t := &tracefmt.Trace{
		Header: tracefmt.Header{
			Version: tracefmt.Version, Workload: workload, Space: tracefmt.LayerSpace, Platform: "linux/" + runtime.GOARCH,
			Layers: []tracefmt.Layer{{Digest: s.layer.Digest, Size: s.layer.Size, Decoded: 1 << 30}},
		},
		End: &tracefmt.End{Reason: "ready: port 80", Ready: time.Second, Duration: 2 * time.Second},
	}
	for i := range n {
		t.Events = append(t.Events, tracefmt.Event{
			At: time.Duration(i) * 10 * time.Millisecond, Off: int64(i) << 20, Len: 4096, Path: "/bin/" + workload, FileOff: int64(i) << 12,
		})
	}
	return s.save(fmt.Sprintf("%s-%d.trace", workload, n), t)
}

func (b *bench) save(name string, t *tracefmt.Trace) string {
	b.t.Helper()
	var p bytes.Buffer
	require.NoError(b.t, tracefmt.Encode(&p, t))
	return b.write(name, p.String())
}

func (b *bench) open(path string) *tracefmt.Trace {
	b.t.Helper()
	t, err := tracefmt.Open(path)
	require.NoError(b.t, err)
	return t
}

func (b *bench) list(ref string, more ...string) (list []traceInfo) {
	b.t.Helper()
	out := b.ok(append([]string{"trace", "ls", "--json", ref}, more...)...)
	require.NoError(b.t, json.Unmarshal([]byte(out), &list))
	return list
}

func names(list []traceInfo) []string {
	out := []string{}
	for _, i := range list {
		out = append(out, i.Workload)
	}
	return out
}

// TestAttachAtOnce has fifty processes attach a trace each at the same moment.
func TestAttachAtOnce(t *testing.T) {
	registrytest.Each(t, registrytest.Options{OneByOne: true}, func(t *testing.T, r *registrytest.Registry) {
		const n = 50
		s := newBench(t).shelf(r.Addr)
		var wg sync.WaitGroup
		for i := range n {
			cmd := s.command("attach", s.ref, s.trace(fmt.Sprintf("w%02d", i), 10+i))
			wg.Go(func() {
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%q: %v\n%s", cmd.Args, err, out)
				}
			})
		}
		wg.Wait()
		referrers, err := s.c.Referrers(t.Context(), s.ref, s.subject(), "application/vnd.reprise.trace.v1")
		require.NoError(t, err)
		require.Equal(t, n, len(referrers), "referrers")
		list := s.list(s.ref)
		require.Len(t, list, n)
		for i, e := range list {
			require.Equal(t, fmt.Sprintf("w%02d", i), e.Workload)
			require.Equal(t, 10+i, e.Events)
			require.InDelta(t, 1, e.Coverage, 0)
		}
	})
}

func (s *shelf) subject() digest.Digest {
	m, err := s.c.Manifest(context.Background(), s.ref, nil)
	require.NoError(s.t, err)
	return m.Descriptor.Digest
}

// TestManageTraces is what people do with the traces of an image, at registries of
// all kinds.
func TestManageTraces(t *testing.T) {
	registrytest.Each(t, registrytest.Options{}, func(t *testing.T, r *registrytest.Registry) {
		s := newBench(t).shelf(r.Addr)
		require.Empty(t, s.list(s.ref))
		s.fails(exitFailed, []string{"trace", "pull", s.ref, s.path("none")}, "it has no traces")
		web, batch := s.trace("web", 20), s.trace("batch", 5)
		require.Contains(t, s.ok("attach", s.ref, web), "for workload web: 80 KiB in 20 reads")
		s.ok("attach", "--default", s.ref, batch)
		list := s.list(s.ref)
		require.Equal(t, []string{"batch", "web"}, names(list))
		require.True(t, list[0].Default)
		require.Positive(t, list[1].Size)
		require.EqualValues(t, 20*4096, list[1].Bytes)
		table := s.ok("trace", "ls", s.ref)
		require.Regexp(t, `(?m)^batch \(default\)  \d+s +\d+ B +5 +20 KiB +100\.0 % +1s +sha256:`, table)

		// What is there is not replaced by mistake.
		other := s.trace("web", 30)
		s.fails(exitFailed, []string{"attach", s.ref, other}, "the workload has a trace already", "--replace", "--workload")
		require.Equal(t, 20, s.list(s.ref)[1].Events)
		s.ok("attach", "--replace", s.ref, other)
		require.Equal(t, 30, s.list(s.ref)[1].Events)

		// By name, by digest, and in the place of a file.
		s.ok("trace", "pull", s.ref, s.path("by-name"), "--workload", "web")
		s.ok("trace", "pull", s.ref, s.path("by-digest"), "--digest", string(s.list(s.ref)[1].Digest))
		require.Equal(t, s.open(s.path("by-name")), s.open(s.path("by-digest")))
		require.Len(t, s.open(s.path("by-name")).Events, 30)
		s.ok("trace", "merge", s.ref+"#batch", s.ref+"#"+string(s.list(s.ref)[1].Digest), "-o", s.path("merged"))
		require.EqualValues(t, 30*4096, s.open(s.path("merged")).Bytes())
		s.fails(exitFailed, []string{"trace", "diff", s.ref + "#", s.ref + "#web"}, "it has 2 traces")

		require.Contains(t, s.ok("trace", "rm", s.ref, "--workload", "web"), "removed the trace of workload web\n")
		require.Equal(t, []string{"batch"}, names(s.list(s.ref)))
		s.fails(exitFailed, []string{"trace", "rm", s.ref, "--workload", "web"}, `no trace of workload "web"`)
		s.ok("attach", s.ref, web)
		s.ok("trace", "rm", s.ref, "--digest", string(s.list(s.ref)[1].Digest))
		s.ok("attach", s.ref, web)
		require.Len(t, s.list(s.ref), 2)
		s.ok("trace", "rm", s.ref, "--all")
		require.Empty(t, s.list(s.ref))
		s.ok("trace", "rm", s.ref, "--all")
	})
}

// TestRegistryKeeps: where nothing can be deleted, traces are taken off the list.
func TestRegistryKeeps(t *testing.T) {
	registrytest.Each(t, registrytest.Options{NoDeletes: true}, func(t *testing.T, r *registrytest.Registry) {
		s := newBench(t).shelf(r.Addr)
		s.ok("attach", "--default", s.ref, s.trace("web", 20))
		s.ok("attach", "--replace", s.ref, s.trace("web", 30))
		s.ok("attach", s.ref, s.trace("batch", 5))
		require.Contains(t, s.ok("trace", "rm", s.ref, "--workload", "web"), "the registry does not allow deletes, so it keeps the bytes")
		require.Equal(t, []string{"batch"}, names(s.list(s.ref)))
		s.fails(exitFailed, []string{"trace", "pull", s.ref, s.path("gone"), "--workload", "web"}, `no trace of workload "web"`)
		s.ok("attach", s.ref, s.trace("web", 40))
		require.Equal(t, 40, s.list(s.ref)[1].Events)
		s.ok("trace", "rm", s.ref, "--all")
		require.Empty(t, s.list(s.ref))
	})
}

// TestAttachToIndex attaches to the image of the platform.
func TestAttachToIndex(t *testing.T) {
	registrytest.Each(t, registrytest.Options{}, func(t *testing.T, r *registrytest.Registry) {
		s := newBench(t).shelf(r.Addr)
		var index ocispec.Index
		index.SchemaVersion, index.MediaType = 2, ocispec.MediaTypeImageIndex
		arches := []string{"amd64", "arm64"}
		for _, arch := range arches {
			m := s.image(arch)
			s.tag(s.ref+"-"+arch, m)
			d := m.Descriptor
			d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
			index.Manifests = append(index.Manifests, d)
		}
		s.tag(s.ref, s.json(index.MediaType, index))

		tr := s.open(s.trace("web", 20))
		for i, arch := range arches {
			tr.Platform = "linux/" + arch
			s.ok("attach", s.ref, s.save("of-"+arch, tr))
			require.Len(t, s.list(s.ref, "--platform", "linux/"+arch), 1)
			require.Len(t, s.list(s.ref+"-"+arch), 1)
			require.Len(t, s.list(s.ref, "--platform", "linux/"+arches[1]), i)
		}
		s.ok("attach", "--platform", "linux/arm64", "--workload", "two", s.ref, s.path("of-amd64"))
		require.Equal(t, []string{"two", "web"}, names(s.list(s.ref+"-arm64")))
		s.ok("trace", "pull", s.ref, s.path("two"), "--platform", "linux/arm64", "--workload", "two")
		s.ok("trace", "rm", s.ref, "--platform", "linux/arm64", "--all")
		require.Empty(t, s.list(s.ref+"-arm64"))
		require.Len(t, s.list(s.ref+"-amd64"), 1)
		s.fails(exitFailed, []string{"attach", "--platform", "linux/s390x", s.ref, s.path("of-amd64")}, "no image for linux/s390x")
	})
}

// TestTraceFiles merges, compares and exports traces without any registry.
func TestTraceFiles(t *testing.T) {
	b := newBench(t)
	s := &shelf{bench: b, layer: ocispec.Descriptor{Digest: digest.FromString("layer"), Size: 1 << 20}}
	one, two, three := s.trace("web", 20), s.trace("web", 30), s.trace("web", 40)
	for mode, want := range map[string]int{"union": 40, "majority": 30, "intersection": 20} {
		out := s.path(mode)
		report := struct {
			Mode      string
			Bytes     int64
			Agreement struct {
				Runs   int
				Bytes  int64
				All    int64 `json:"bytes_all"`
				Unique []int64
			}
		}{}
		require.NoError(t, json.Unmarshal([]byte(b.ok("trace", "merge", "--json", "--mode", mode, one, two, three, "-o", out)), &report))
		merged := b.open(out)
		require.Len(t, merged.Events, want)
		require.Equal(t, 3, merged.Runs)
		require.Equal(t, mode, report.Mode)
		require.EqualValues(t, want*4096, report.Bytes)
		require.EqualValues(t, 3, report.Agreement.Runs)
		require.EqualValues(t, 20*4096, report.Agreement.All)
		require.Equal(t, []int64{0, 0, 10 * 4096}, report.Agreement.Unique)
	}
	r := b.run("trace", "merge", one, two, "-o", b.path("human"))
	require.Zero(t, r.code, r.stderr)
	require.Contains(t, r.stderr, "merged 2 recordings (union)")
	require.Contains(t, r.stderr, two+": 40 KiB that no other has")

	require.Equal(t, `          ONLY A  ONLY B  BOTH
all       0 B     40 KiB  80 KiB
layer 0   0 B     40 KiB  80 KiB
/bin/web  0 B     40 KiB  80 KiB
order: 1.000 (1 is the same, 0 has nothing to do with it, -1 is reversed); half of the bytes in both are at most 0 B from their place
`, trimLines(b.ok("trace", "diff", one, two)))
	shown := decode(t, b.ok("trace", "diff", "--json", one, two), "only_a", "only_b", "both", "order", "layers.only_b", "paths.path")
	require.EqualValues(t, 40<<10, shown["only_b"])

	require.Equal(t, "/bin/web\n", b.ok("trace", "export", one, "-", "--format", "paths"))
	for _, format := range []string{"reference", "layer"} {
		b.ok("trace", "export", one, b.path(format), "--format", format)
	}
	ref := b.open(b.path("reference"))
	require.Len(t, ref.Events, 20)
	for i, e := range b.open(one).Events {
		require.Equal(t, [3]int64{int64(e.Layer), e.Off, e.Len}, [3]int64{int64(ref.Events[i].Layer), ref.Events[i].Off, ref.Events[i].Len})
	}
	list, err := os.Open(b.path("layer"))
	require.NoError(t, err)
	defer list.Close()
	accel, _, err := tracefmt.ReadAcceleration(list)
	require.NoError(t, err)
	require.Equal(t, ref.Events, accel.Events)
	b.fails(exitFailed, []string{"trace", "export", b.path("reference"), "-", "--format", "paths"}, "does not name files")
	odd := b.open(one)
	odd.Events[0].Path, odd.Events[1].Path, odd.Events[2].Path = "/two\nlines", "/dir/", "/esc\x1b[2J"
	file := b.save("odd", odd)
	require.Equal(t, "/esc\x1b[2J\n/bin/web\n", b.ok("trace", "export", file, "-", "--format", "paths"), "as it is, for programs")
	require.NotContains(t, b.ok("trace", "diff", file, one), "\x1b", "for people")
	b.fails(exitFailed, []string{"trace", "merge", one, b.write("not", "a trace"), "-o", b.path("out")}, "not")
	require.NoFileExists(t, b.path("out"))
}

// trimLines takes away what a table has behind its last column.
func trimLines(s string) string {
	var out strings.Builder
	for line := range strings.Lines(s) {
		out.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
	return out.String()
}

// TestAttachRefuses says what is wrong, with everything that can be.
func TestAttachRefuses(t *testing.T) {
	b := newBench(t)
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry")})
	require.NoError(t, err)
	site := b.site("0s,unlimited", g)
	s := b.shelf(site.addr)
	web := s.trace("web", 20)
	tr := s.open(web)
	tr.Layers[0].Digest, tr.Image = digest.FromString("other"), "other.invalid/image:1"
	other := s.save("other", tr)
	s.fails(exitFailed, []string{"attach", s.ref, other}, "shares no layer with the image", "other.invalid/image:1")
	s.fails(exitFailed, []string{"attach", s.ref, b.write("garbage", "no trace")}, "garbage")
	s.fails(exitFailed, []string{"attach", s.ref, b.path("missing")}, "no such file")
	s.fails(exitFailed, []string{"attach", s.addr("nosuch:1"), web}, "404")
	s.fails(exitFailed, []string{"attach", s.ref, s.ref + "#nosuch"}, `no trace of workload "nosuch"`)
	s.fails(exitFailed, []string{"attach", "127.0.0.1:1/app:1", web}, "127.0.0.1:1", "connection refused")
	s.fails(exitFailed, []string{"trace", "pull", s.ref, b.path("out"), "--digest", string(s.subject())}, "not a trace")
	s.fails(exitFailed, []string{"trace", "rm", s.ref, "--digest", string(s.subject())}, "no such trace")
	for _, args := range [][]string{
		{"attach", s.ref, web, "--as", "tar"}, {"attach", s.ref, web, "--as", "layer"}, {"attach", s.ref, web, "--tag", "x"},
		{"attach", s.ref, web, "--as", "layer", "--tag", "x", "--replace"}, {"attach", s.ref, web, "--platform", "a/b/c/d/e"},
		{"attach", s.ref, web, "--workload", ""}, {"attach", s.ref, web, "--as", "layer", "--tag", "a/b"},
		{"trace", "rm", s.ref}, {"trace", "rm", s.ref, "--all", "--workload", "x"}, {"trace", "rm", s.ref, "--digest", "x"},
		{"trace", "pull", s.ref, "x", "--digest", "x", "--workload", "x"}, {"trace", "pull", s.ref, "x", "--digest", "x"}, {"trace", "merge", web, web},
		{"trace", "merge", web, web, "-o", "x", "--mode", "most"}, {"trace", "diff", web, web, "--top", "-1"},
		{"trace", "merge", web, web, "-o", "-", "--json"}, {"trace", "export", web, "x", "--format", "x"},
		{"trace", "import", web, "-o", "x"}, {"trace", "import", web, "--image", s.ref},
		{"trace", "import", web, "--image", s.ref, "-o", "x", "--format", "x"},
	} {
		s.fails(exitUsage, args)
	}
	site.SetFault(func(r *http.Request) *regtest.Fault {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			return &regtest.Fault{Status: http.StatusMethodNotAllowed, Body: `{"errors":[{"code":"UNSUPPORTED","message":"read-only"}]}`}
		}
		return nil
	})
	s.fails(exitFailed, []string{"attach", s.ref, web}, "405", "read-only")
	site.SetFault(func(r *http.Request) *regtest.Fault {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			return &regtest.Fault{Status: http.StatusForbidden}
		}
		return nil
	})
	s.fails(exitFailed, []string{"attach", s.ref, web}, "403", "ask for access")
	require.Empty(t, s.list(s.ref))
}

// TestPartlyCovered attaches a trace of which the image has one layer of two.
func TestPartlyCovered(t *testing.T) {
	b := newBench(t)
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry")})
	require.NoError(t, err)
	s := b.shelf(b.site("0s,unlimited", g).addr)
	tr := s.open(s.trace("web", 20))
	tr.Layers = append([]tracefmt.Layer{{Digest: digest.FromString("rebuilt"), Size: 1, Decoded: 1 << 30}}, tr.Layers...)
	for i := range tr.Events {
		if i >= 5 {
			tr.Events[i].Layer = 1
		}
	}
	require.Contains(t, s.ok("attach", s.ref, s.save("half", tr)), "; 25.0 % of it is of layers that the image does not have\n")
	require.InDelta(t, 0.75, s.list(s.ref)[0].Coverage, 0)
	require.Regexp(t, `(?m)^web .* 75\.0 % `, s.ok("trace", "ls", s.ref))
}

func (s *shelf) addr(name string) string {
	host, _, _ := strings.Cut(s.ref, "/")
	return host + "/" + name
}

// recording is a trace of the small image.
func (b *bench) recording(s *site) string {
	b.ok("record", "--root", b.mkdir("recorded"), "-o", b.path("recorded.trace"), s.ref)
	return b.path("recorded.trace")
}

func (b *bench) withoutPaths(path string) string {
	t := b.open(path)
	for i := range t.Events {
		t.Events[i].Path, t.Events[i].FileOff = "", 0
	}
	return b.save("stripped.trace", t)
}

// TestAttachNamesFiles attaches a trace that does not say which files it is of.
func TestAttachNamesFiles(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	b := newBench(t)
	s := b.ownSite(false)
	stripped := b.withoutPaths(b.recording(s))

	program := b.executable()
	cmd := b.command("attach", "--workload", "nobody", s.ref, stripped)
	cmd.Path, cmd.Dir = program, b.mkdir("cwd")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	r := b.finish(cmd)
	require.Zero(t, r.code, r.stderr)
	require.Contains(t, r.stderr, "the trace does not name files, and is attached so: ")
	require.Contains(t, r.stderr, "needs root")
	b.ok("trace", "pull", s.ref, b.path("nobodys"), "--workload", "nobody")
	require.False(t, hasPaths(b.open(b.path("nobodys"))))

	r = b.run("attach", "--workload", "named", s.ref, stripped)
	require.Zero(t, r.code, r.stderr)
	require.Empty(t, r.stderr)
	b.settled()
	paths := b.ok("trace", "export", s.ref+"#named", "-", "--format", "paths")
	for _, p := range []string{"/bin/sh", "/app/start", "/data/a"} {
		require.Contains(t, strings.Fields(paths), p)
	}
	b.ok("trace", "pull", s.ref, b.path("named"), "--workload", "named")
	require.Equal(t, b.open(stripped).Bytes(), b.open(b.path("named")).Bytes())

	// What a node takes for a workload without a trace of its own.
	explained := func(name, says string) {
		t.Helper()
		r := b.run("run", "--root", b.mkdir(name), "--explain", s.ref)
		require.Zero(t, r.code, r.stderr)
		require.Contains(t, r.stderr, says)
	}
	explained("union", "union of the traces of other workloads: named, nobody")
	b.ok("attach", "--replace", "--default", s.ref, s.ref+"#named")
	require.True(t, b.list(s.ref)[0].Default)
	explained("default", "of workload named, the default")
}

// TestAttachLayer makes the reference implementation's kind of image, and opens
// and runs it.
func TestAttachLayer(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	b := newBench(t)
	s := b.ownSite(false)
	file := b.recording(s)
	require.Contains(t, b.ok("attach", "--as", "layer", "--tag", "accelerated", s.ref, file), "with an acceleration layer")
	ref := s.addr + "/tests/small:accelerated"

	c := b.shelf(s.addr).c
	old, err := c.Manifest(t.Context(), s.ref, nil)
	require.NoError(t, err)
	m, err := c.Manifest(t.Context(), ref, nil)
	require.NoError(t, err)
	require.Equal(t, old.Layers, m.Layers[:len(old.Layers)])
	require.Len(t, m.Layers, len(old.Layers)+1)
	top := m.Layers[len(old.Layers)]
	require.Equal(t, "yes", top.Annotations["containerd.io/snapshot/overlaybd/acceleration-layer"])
	require.Equal(t, top.Digest.String(), top.Annotations["containerd.io/snapshot/overlaybd/blob-digest"])
	var was, is ocispec.Image
	for config, into := range map[*registry.Manifest]*ocispec.Image{&old: &was, &m: &is} {
		p, err := c.Get(t.Context(), ref, config.Config)
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(p, into))
	}
	require.Equal(t, append(was.RootFS.DiffIDs, top.Digest), is.RootFS.DiffIDs)
	require.Len(t, is.History, len(was.History)+1)
	require.Equal(t, was.Config, is.Config)

	require.Equal(t, "hello from the image\n", b.ok("run", ref))
	dir := b.mkdir("mnt")
	b.ok("mount", ref, dir)
	require.Equal(t, expected(small.layers), withoutRoot(listTree(t, dir)))
	b.ok("umount", dir)
	b.fails(exitFailed, []string{"attach", "--as", "layer", "--tag", "twice", ref, file}, "the image has one")

	// And back: its trace is the recording, without times.
	blob, err := c.Get(t.Context(), ref, top)
	require.NoError(t, err)
	b.ok("trace", "import", b.write("layer.tar", string(blob)), "--image", ref, "-o", b.path("back"))
	back, want := b.open(b.path("back")), b.open(file)
	require.Equal(t, want.Bytes(), back.Bytes())
	require.True(t, hasPaths(back))
	require.Equal(t, m.Descriptor.Digest, back.Manifest)
	var d tracefmt.Difference
	require.NoError(t, json.Unmarshal([]byte(b.ok("trace", "diff", "--json", file, b.path("back"))), &d))
	require.Zero(t, d.OnlyA+d.OnlyB)
	require.InDelta(t, 1, d.Order, 0.05)

	b.ok("trace", "import", ref, "--image", s.ref, "-o", b.path("of-image"))
	require.Equal(t, back.Events, b.open(b.path("of-image")).Events)
	b.fails(exitFailed, []string{"trace", "import", s.ref, "--image", s.ref, "-o", b.path("x")}, "the image has no acceleration layer")
	b.fails(exitFailed, []string{"trace", "import", ref, "--format", "paths", "--image", s.ref, "-o", b.path("x")}, "it is an image")
}

// TestImport makes traces from what others record, and runs the image with one.
func TestImport(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	b := newBench(t)
	s := b.ownSite(false)
	imported := func(src, format string, says ...string) *tracefmt.Trace {
		t.Helper()
		out := b.path(filepath.Base(src) + "." + format)
		r := b.run("trace", "import", src, "--image", s.ref, "-o", out, "--format", format)
		require.Zero(t, r.code, r.stderr)
		for _, line := range says {
			require.Contains(t, r.stderr, line)
		}
		b.settled()
		tr := b.open(out)
		require.Equal(t, s.ref, tr.Image)
		require.True(t, strings.HasPrefix(tr.Workload, "sh-"), tr.Workload)
		return tr
	}
	first := func(tr *tracefmt.Trace) (paths []string) {
		for _, e := range tr.Events {
			if len(paths) == 0 || paths[len(paths)-1] != e.Path {
				paths = append(paths, e.Path)
			}
		}
		return paths
	}
	list := b.write("paths", "/data/sub/new\n/nosuch\n/app/page-9*\n/bin/cat\n")
	tr := imported(list, "auto", "1 of 4 paths are not in the image:\n  /nosuch\n", "as paths")
	got := first(tr)
	require.Equal(t, "/data/sub/new", got[0])
	require.Equal(t, "/bin/cat", got[len(got)-1])
	require.Len(t, got, 1+11+1)
	require.GreaterOrEqual(t, tr.Bytes(), int64(700_000+11*10_000))
	require.Equal(t, tr.Events, imported(list, "paths").Events)

	estargz := b.write("log.json", `{"path":"app/start","manifestDigest":"x","layerIndex":1}`+"\n"+`{"path":"data/a"}`+"\n")
	require.Equal(t, []string{"/app/start", "/data/a"}, first(imported(estargz, "auto", "as estargz")))
	nydus := b.write("log.csv", "path,size,elapsed\n/data/a,300000,10\n/app/start,100,20\n")
	require.Equal(t, []string{"/data/a", "/app/start"}, first(imported(nydus, "auto", "as nydus")))
	b.fails(exitFailed, []string{"trace", "import", nydus, "--image", s.ref, "-o", b.path("x"), "--format", "paths"}, "log.csv")

	// The reference implementation's trace, there and back.
	file := b.recording(s)
	b.ok("trace", "export", file, b.path("reference"))
	ref := imported(b.path("reference"), "auto", "as reference")
	require.Equal(t, b.open(file).Bytes(), ref.Bytes())
	require.True(t, hasPaths(ref))
	b.ok("trace", "export", b.path("reference.auto"), b.path("again"))
	require.Equal(t, b.open(b.path("reference")).Bytes(), b.open(b.path("again")).Bytes())

	b.ok("attach", s.ref, b.path("paths.auto"))
	r := b.run("run", "--explain", s.ref)
	require.Zero(t, r.code, r.stderr)
	require.Contains(t, r.stderr, "trace:    used: ")

	for says, src := range map[string]string{
		"nothing of it is in the image": b.write("none", "/nosuch\n"),
		"it is a trace of this program": file,
		"it is not of this image":       b.outside(),
		"no such file":                  b.path("missing"),
		"is a directory":                b.dir,
		"import " + b.path("empty"):     b.write("empty", ""),
	} {
		b.fails(exitFailed, []string{"trace", "import", src, "--image", s.ref, "-o", b.path("x")}, says)
		require.NoFileExists(t, b.path("x"))
	}
}

// TestImportVector imports what the reference implementation has recorded of its
// own image.
func TestImportVector(t *testing.T) {
	recorded := vectors(t, "trace/recorded.trace")
	b := newBench(t)
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry")})
	require.NoError(t, err)
	s := b.shelf(b.site("0s,unlimited", g).addr)
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	image := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}}
	image.Config.Cmd = []string{"/bin/serve"}
	for i := range 3 {
		p, err := os.ReadFile(vectors(t, fmt.Sprintf("ext4-64m/layer%d.overlaybd.commit", i)))
		require.NoError(t, err)
		d := s.push(ocispec.MediaTypeImageLayer, p)
		d.Annotations = map[string]string{
			"containerd.io/snapshot/overlaybd/blob-digest":  d.Digest.String(),
			"containerd.io/snapshot/overlaybd/blob-fs-type": "ext4",
		}
		m.Layers = append(m.Layers, d)
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, d.Digest)
	}
	config := s.json(ocispec.MediaTypeImageConfig, image)
	s.tag(s.ref, config)
	m.Config = config.Descriptor
	s.tag(s.ref, s.json(m.MediaType, m))

	out := s.path("imported")
	r := s.run("trace", "import", recorded, "--image", s.ref, "-o", out)
	require.Zero(t, r.code, r.stderr)
	require.Contains(t, r.stderr, "as reference")
	s.settled()
	tr, ref := s.open(out), s.open(recorded)
	require.Equal(t, ref.Bytes(), tr.Bytes())
	require.True(t, strings.HasPrefix(tr.Workload, "serve-"), tr.Workload)
	for i, l := range tr.Layers {
		require.Equal(t, m.Layers[i].Digest, l.Digest)
	}
	same := func(file string) {
		t.Helper()
		d := tracefmt.Diff(ref, s.open(file))
		require.Zero(t, d.OnlyA+d.OnlyB)
		require.InDelta(t, 1, d.Order, 0)
	}
	same(out)
	s.ok("attach", s.ref, out)
	s.ok("trace", "export", s.ref+"#", s.path("exported"))
	same(s.path("exported"))
	s.ok("trace", "export", out, s.path("layer"), "--format", "layer")
	s.ok("trace", "import", s.path("layer"), "--image", s.ref, "-o", s.path("of-layer"))
	same(s.path("of-layer"))
}

// outside is a reference trace of a layer that the small image does not have.
func (b *bench) outside() string {
	b.t.Helper()
	var p bytes.Buffer
	require.NoError(b.t, tracefmt.WriteReference(&p, &tracefmt.Trace{Events: []tracefmt.Event{{Layer: 200, Len: 4096}}}))
	return b.write("outside", p.String())
}
