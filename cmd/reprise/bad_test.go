package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/tracefmt"
)

// layers are the digests of an image's layers.
func (b *bench) layers(ref string) (digests []string) {
	b.t.Helper()
	for _, l := range decode(b.t, b.ok("image", "info", "--json", ref), "layers.digest")["layers"].([]any) {
		digests = append(digests, l.(map[string]any)["digest"].(string))
	}
	return digests
}

// to makes a fault of the requests whose path contains part.
func to(part string, f regtest.Fault) func(*http.Request) *regtest.Fault {
	return func(r *http.Request) *regtest.Fault {
		if !strings.Contains(r.URL.Path, part) {
			return nil
		}
		g := f
		return &g
	}
}

// impatient are the flags of a start that does not ask again for a minute.
func impatient(ref string, args ...string) []string {
	return append([]string{"run", "--retry-for", "100ms", ref}, args...)
}

// TestRegistryRefuses: what the registry says is passed on, with what to do.
func TestRegistryRefuses(t *testing.T) {
	skipWithoutRunc(t)
	tests := []struct {
		name  string
		fault func(*http.Request) *regtest.Fault
		says  []string
	}{
		{"401", to("/manifests/", regtest.Fault{Status: 401}), []string{"401", "tests/small:obd", "docker login"}},
		{"403", to("/manifests/", regtest.Fault{Status: 403}), []string{"403", "tests/small:obd", "ask for access"}},
		{"404", to("/manifests/", regtest.Fault{Status: 404}), []string{"404", "tests/small:obd"}},
		{"500", to("/manifests/", regtest.Fault{Status: 500}), []string{"500", "tests/small:obd"}},
		{"not a manifest", to("/manifests/obd", regtest.Fault{Status: 200, Body: "{"}), []string{"tests/small"}},
		{"another manifest", to("/manifests/obd", regtest.Fault{Corrupt: true}), []string{"tests/small"}},
		{"403 of blobs", to("/blobs/", regtest.Fault{Status: 403}), []string{"403", "tests/small@sha256:"}},
		{"404 of blobs", to("/blobs/", regtest.Fault{Status: 404}), []string{"404", "tests/small@sha256:"}},
		{"too many requests", to("", regtest.Fault{Status: 429, Header: http.Header{"Retry-After": {"3600"}}}), []string{"asks to wait 1h0m0s"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			s := b.smallSite("0s,unlimited")
			s.SetFault(tt.fault)
			b.fails(exitFailed, impatient(s.ref), append(tt.says, s.addr)...)
			dir := b.mkdir("mnt")
			b.fails(exitFailed, []string{"mount", "--retry-for", "100ms", s.ref, dir}, append(tt.says, s.addr)...)
		})
	}
}

func TestRegistryGone(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := l.Addr().String()
	require.NoError(t, l.Close())
	b := newBench(t)
	b.fails(exitFailed, impatient(addr+"/tests/small:obd"), addr, "connection refused")
	b.fails(exitFailed, impatient("no.such.host.invalid/tests/small:obd"), "no.such.host.invalid")
	b.fails(exitFailed, impatient("small"), "name the registry too")
	b.fails(exitFailed, impatient("https://"+addr+"/a"), "leave out the scheme")
	b.fails(exitFailed, []string{"trace", "ls", addr + "/tests/small"}, addr)
	b.fails(exitFailed, []string{"convert", addr + "/a", "oci:" + b.path("out")}, addr)
	require.NoFileExists(t, b.path("out/index.json"))
}

// TestRegistryIsPatient: a limit on requests and a redirect are followed, and
// so is a server that does not know ranges.
func TestRegistryIsPatient(t *testing.T) {
	skipWithoutRunc(t)
	for name, fault := range map[string]func(s *site) func(*http.Request) *regtest.Fault{
		"Retry-After": func(*site) func(*http.Request) *regtest.Fault {
			var manifests, blobs atomic.Int32
			return func(r *http.Request) *regtest.Fault {
				manifest := strings.HasSuffix(r.URL.Path, "/manifests/obd")
				blob := strings.Contains(r.URL.Path, "/blobs/")
				if manifest && manifests.Add(1) == 1 || blob && blobs.Add(1)%4 == 3 && blobs.Load() < 10 {
					return &regtest.Fault{Status: 429, Header: http.Header{"Retry-After": {"1"}}}
				}
				return nil
			}
		},
		"redirect": func(s *site) func(*http.Request) *regtest.Fault {
			store, err := regtest.Start(context.Background(), small.registry)
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, store.Close()) })
			return func(r *http.Request) *regtest.Fault {
				if !strings.Contains(r.URL.Path, "/blobs/") {
					return nil
				}
				return &regtest.Fault{Status: 307, Header: http.Header{"Location": {store.URL() + r.URL.Path}}}
			}
		},
		"no ranges": func(*site) func(*http.Request) *regtest.Fault { return to("/blobs/", regtest.Fault{IgnoreRange: true}) },
		"cut bodies": func(*site) func(*http.Request) *regtest.Fault {
			var blobs atomic.Int32
			return func(r *http.Request) *regtest.Fault {
				if strings.Contains(r.URL.Path, "/blobs/") && blobs.Add(1)%3 == 0 {
					return &regtest.Fault{Cut: true, CutAt: 5000}
				}
				return nil
			}
		},
		"bad bytes": func(*site) func(*http.Request) *regtest.Fault {
			var ranges atomic.Int32
			return func(r *http.Request) *regtest.Fault {
				// Two, after those that open the layers.
				if strings.Contains(r.URL.Path, "/blobs/") && r.Header.Get("Range") != "" {
					if n := ranges.Add(1); n == 8 || n == 10 {
						return &regtest.Fault{Corrupt: true}
					}
				}
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			s := b.smallSite("0s,unlimited")
			s.SetFault(fault(s))
			r := b.run("run", s.ref)
			require.Zero(t, r.code, r.stderr)
			require.Equal(t, "hello from the image\n", r.stdout)
		})
	}
}

// TestBadBlobs: layers that are cut short, or other bytes.
func TestBadBlobs(t *testing.T) {
	skipWithoutRunc(t)
	for name, fault := range map[string]regtest.Fault{
		"cut":   {Cut: true, CutAt: 10},
		"reset": {Reset: true, ResetAt: 10},
		"bytes": {Corrupt: true},
		"other": {Status: 200, Body: "nothing like it"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			s := b.smallSite("0s,unlimited")
			bad := b.layers(s.ref)[2]
			s.SetFault(to(bad, fault))
			b.fails(exitFailed, impatient(s.ref), "layer 2", bad)
			b.fails(exitFailed, []string{"mount", "--retry-for", "100ms", s.ref, b.mkdir("mnt")}, "layer 2", bad)
			b.fails(exitFailed, []string{"image", "verify", "--retry-for", "100ms", s.ref}, bad)
			s.SetFault(nil)
			require.Equal(t, "hello from the image\n", b.ok("run", s.ref), "what was bad is not kept")
		})
	}
}

// TestBadBlobUnderContainer: bytes that go bad once the container runs are its
// I/O errors, and it is said which layer they are of.
func TestBadBlobUnderContainer(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	bad := b.layers(s.ref)[4]
	cmd := b.command(impatient(s.ref, "--", "/bin/sh", "-c", "echo up; read go; cat /data/more > /dev/null || exit 33")...)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	said := b.start(cmd, func(line string) bool { return line == "up" })
	s.SetFault(to(bad, regtest.Fault{Corrupt: true}))
	_, err = io.WriteString(in, "go\n")
	require.NoError(t, err)
	_ = cmd.Wait()
	require.Equal(t, 33, cmd.ProcessState.ExitCode(), said())
	require.Contains(t, said(), "Input/output error")
	require.Contains(t, said(), bad)
	b.settled()
}

// TestNotConverted names the image and what to do.
func TestNotConverted(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	ref := s.addr + "/tests/plain:1"
	pushLayout(t, strings.TrimPrefix(small.source(), "oci:"), ref)
	for _, r := range []string{ref, small.source()} {
		for _, args := range [][]string{{"run", r}, {"mount", r, b.mkdir("mnt")}, {"image", "info", r}, {"record", "-o", b.path("trace"), r}} {
			b.fails(exitFailed, args, r, "layer 0", "not in overlaybd format", "reprise convert")
		}
	}
	require.NoFileExists(t, b.path("trace"), "a file in which nothing is")
}

// pushLayout copies the image of a layout to a registry as it is.
func pushLayout(t testing.TB, dir, ref string) {
	t.Helper()
	c, err := registry.New(&registry.Options{PlainHTTP: true, LockDir: t.TempDir(), HostsDir: t.TempDir(), DockerConfigDir: t.TempDir()})
	require.NoError(t, err)
	defer c.Close()
	read := func(d digest.Digest) []byte {
		p, err := os.ReadFile(filepath.Join(dir, "blobs/sha256", d.Encoded()))
		require.NoError(t, err)
		return p
	}
	push := func(d ocispec.Descriptor) {
		p := read(d.Digest)
		require.NoError(t, c.Push(t.Context(), ref, d, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(p)), nil }))
	}
	var index ocispec.Index
	p, err := os.ReadFile(filepath.Join(dir, "index.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(p, &index))
	var m ocispec.Manifest
	require.NoError(t, json.Unmarshal(read(index.Manifests[0].Digest), &m))
	for _, d := range append(m.Layers, m.Config, index.Manifests[0]) {
		push(d)
	}
}

// TestBadConversions: what cannot be read or written ends a conversion, and
// there is no half of an image then.
func TestBadConversions(t *testing.T) {
	skipUnprivileged(t)
	t.Parallel()
	b := newBench(t)
	source := b.path("source")
	layers := []testLayer{dirs("a"), {{name: "b", body: randomBytes(1, 200_000)}}}
	writeLayout(t, source, layers, ocispec.ImageConfig{})
	g, err := regtest.NewRegistry(&regtest.RegistryOptions{Dir: b.mkdir("registry")})
	require.NoError(t, err)
	s := b.site("0s,unlimited", g)
	ref := s.addr + "/tests/new:1"
	s.SetFault(func(r *http.Request) *regtest.Fault {
		if r.Method == http.MethodGet || r.Method == http.MethodHead {
			return nil
		}
		return &regtest.Fault{Status: http.StatusForbidden}
	})
	b.fails(exitFailed, []string{"convert", "oci:" + source, ref}, "403", "tests/new", "docker login")
	s.SetFault(nil)
	b.fails(exitFailed, []string{"image", "info", ref}, "404")

	out := "oci:" + b.path("out")
	b.fails(exitFailed, []string{"convert", "oci:" + b.path("missing"), out}, b.path("missing"), "not an OCI image layout")
	b.fails(exitFailed, []string{"convert", "oci:" + source + ":tag", out}, "no image with this tag")
	packed, _ := layers[1].pack(t)
	blob := filepath.Join(source, "blobs/sha256", digest.FromBytes(packed).Encoded())
	require.NoError(t, os.WriteFile(blob, flip(packed, len(packed)/2, 100), 0o644))
	b.fails(exitFailed, []string{"convert", "oci:" + source, out}, "layer 1")
	require.NoError(t, os.WriteFile(blob, packed[:len(packed)/2], 0o644))
	b.fails(exitFailed, []string{"convert", "oci:" + source, out}, "layer 1", filepath.Base(blob))
	require.NoError(t, os.Remove(blob))
	b.fails(exitFailed, []string{"convert", "oci:" + source, out}, "layer 1", filepath.Base(blob), "no such file")
	require.NoFileExists(t, b.path("out/index.json"))
}

// TestBadConfigs: a config.v1.json is input from anywhere.
func TestBadConfigs(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	b := newBench(t)
	good := vectors(t, "ext4-64m/layer0.overlaybd.commit")
	p, err := os.ReadFile(good)
	require.NoError(t, err)
	b.write("cut", string(p[:len(p)/2]))
	b.write("flipped", string(flip(p, len(p)-3000, 2000)))
	b.write("garbage", strings.Repeat("garbage ", 1000))
	b.write("empty", "")
	copyFile(t, good, b.path("good"))
	b.mkdir("dir")
	require.NoError(t, unix.Mkfifo(b.path("pipe"), 0o600))
	require.NoError(t, unix.Mkfifo(b.path("pipe.json"), 0o600))
	many := configJSON{Lowers: make([]lowerJSON, 300)}
	for i := range many.Lowers {
		many.Lowers[i].File = "good"
	}
	p, err = json.Marshal(many)
	require.NoError(t, err)
	tests := []struct{ config, says string }{
		{``, "unexpected end of JSON"},
		{`{"lowers": [`, "unexpected end of JSON"},
		{`[]`, "cannot unmarshal"},
		{`{}`, "no lower layers"},
		{`{"lowers": []}`, "no lower layers"},
		{`{"lowers": [{}]}`, "lower layer 0 has no file"},
		{`{"lowers": [{"file": "missing"}]}`, "missing: no such file"},
		{`{"lowers": [{"file": "dir"}]}`, "dir: not a file"},
		{`{"lowers": [{"file": "pipe"}]}`, "pipe: not a file"},
		{`{"lowers": [{"file": "good"}], "upper": {"data": "pipe"}}`, "pipe: not a file"},
		{`{"lowers": [{"dir": "dir"}]}`, "dir/overlaybd"},
		{`{"lowers": [{"file": "empty"}]}`, "empty"},
		{`{"lowers": [{"file": "garbage"}]}`, "garbage"},
		{`{"lowers": [{"file": "cut"}]}`, "cut"},
		{`{"lowers": [{"file": "flipped"}]}`, "flipped"},
		{`{"lowers": [{"file": "/dev/zero"}]}`, "/dev/zero: not a file"},
		{`{"lowers": [{"file": "/proc/self/environ"}]}`, "/proc/self/environ"},
		{`{"lowers": [{"file": "good", "digest": "sha256:short"}]}`, "sha256:short"},
		{`{"lowers": [{"file": "good"}], "upper": {"index": "x"}}`, "no data file"},
		{`{"lowers": [{"file": "good"}], "upper": {"data": "missing", "index": "x"}}`, "missing: no such file"},
		{`{"lowers": [{"file": "good"}], "upper": {"data": "garbage", "index": "garbage"}}`, "garbage"},
		{string(p), "300 lower layers, at most 255"},
		{"{\"lowers\": [" + strings.Repeat(" ", 2<<20) + "]}", "larger than"},
	}
	before := b.sums()
	for i, tt := range tests {
		config := filepath.Join(b.mkdir("configs"), fmt.Sprintf("%d.json", i))
		require.NoError(t, os.WriteFile(config, []byte(tt.config), 0o644))
		relative(t, config, b.dir)
		for _, args := range [][]string{{"image", "info", config}, {"mount", config, b.mkdir("mnt")}, {"run", config, "--", "/bin/true"}} {
			b.fails(exitFailed, args, config, tt.says)
		}
	}
	require.Equal(t, before, b.sums(), "nothing of what was there has changed")
	b.fails(exitFailed, []string{"run", b.path("no.json"), "--", "/bin/true"}, "no.json: no such file")
	b.fails(exitFailed, []string{"image", "info", b.path("pipe.json")}, "pipe.json: not a file")
	// A digest that the file has not is found by verify.
	c := b.config("wrong.json", configJSON{Lowers: []lowerJSON{{File: "good", Digest: "sha256:" + strings.Repeat("0", 64)}}})
	b.fails(exitFailed, []string{"image", "verify", c}, "good", "its content is not sha256:0000")
}

// relative makes the names in a config lead to dir.
func relative(t testing.TB, config, dir string) {
	p, err := os.ReadFile(config)
	require.NoError(t, err)
	for _, name := range []string{"missing", "dir", "pipe", "empty", "garbage", "cut", "flipped", "good"} {
		p = bytes.ReplaceAll(p, []byte(`": "`+name+`"`), []byte(`": "../`+name+`"`))
		p = bytes.ReplaceAll(p, []byte(`":"`+name+`"`), []byte(`":"../`+name+`"`))
	}
	require.NoError(t, os.WriteFile(config, p, 0o644))
}

// flip inverts n bytes.
func flip(p []byte, at, n int) []byte {
	p = bytes.Clone(p)
	for i := at; i < at+n; i++ {
		p[i] = ^p[i]
	}
	return p
}

// sums are those of the test's own files.
func (b *bench) sums() map[string]string {
	m := map[string]string{}
	entries, err := os.ReadDir(b.dir)
	require.NoError(b.t, err)
	for _, e := range entries {
		if e.Type().IsRegular() {
			m[e.Name()] = sha(b.t, b.path(e.Name()))
		}
	}
	return m
}

// TestBadBlobFiles: the same of the blob commands, which need no privilege.
func TestBadBlobFiles(t *testing.T) {
	b := newBench(t)
	p, err := os.ReadFile(vectors(t, "ext4-64m/layer0.overlaybd.commit"))
	require.NoError(t, err)
	b.write("exists", "precious")
	tests := []struct {
		name string
		body []byte
		says string
	}{
		{"empty", nil, ""},
		{"garbage", bytes.Repeat([]byte("garbage "), 1000), ""},
		{"cut", p[:len(p)/2], ""},
		{"header", p[:2000], ""},
		{"flipped tail", flip(p, len(p)-3000, 2000), ""},
		{"flipped block", flip(p, 5000, 100), ""},
	}
	for _, tt := range tests {
		path := b.write(tt.name, string(tt.body))
		b.fails(exitFailed, []string{"blob", "verify", path}, path)
		b.fails(exitFailed, []string{"blob", "unpack", path, b.path("out")}, path)
		require.NoFileExists(t, b.path("out"))
	}
	b.fails(exitFailed, []string{"blob", "info", b.path("missing")}, "missing: no such file")
	b.fails(exitFailed, []string{"blob", "info", b.dir}, "is not a file")
	b.fails(exitFailed, []string{"blob", "info", "/dev/zero"}, "is not a file")
	good := vectors(t, "ext4-64m/layer0.overlaybd.commit")
	b.fails(exitFailed, []string{"blob", "unpack", good, b.path("exists")}, "exists: name a new file")
	b.fails(exitFailed, []string{"image", "dump", vectors(t, "ext4-64m/config.v1.json"), b.path("exists")}, "exists: name a new file")
	b.fails(exitFailed, []string{"blob", "unpack", good, b.path("no/such/dir/out")}, "no/such/dir/out: no such file")
	got, err := os.ReadFile(b.path("exists"))
	require.NoError(t, err)
	require.Equal(t, "precious", string(got))
	for _, path := range []string{b.path("garbage"), b.path("empty"), b.path("missing"), b.dir} {
		b.fails(exitFailed, []string{"trace", "show", path}, path)
	}
	b.fails(exitFailed, []string{"trace", "pull", "small", b.path("t")}, "name the registry too")
}

// TestBadTraces: a start never fails for its trace. It says why there was none.
func TestBadTraces(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	b.ok("record", "-o", b.path("good"), s.ref)
	p, err := os.ReadFile(b.path("good"))
	require.NoError(t, err)
	b.write("garbage", strings.Repeat("garbage ", 100))
	b.write("empty", "")
	b.write("head", string(p[:20]))
	b.write("flipped", string(flip(p, 20, 40)))
	b.write("cut", string(p[:len(p)*2/3]))
	require.NoError(t, unix.Mkfifo(b.path("pipe"), 0o600))
	other := foreignTrace(t, b.path("foreign"))
	tests := []struct{ trace, says string }{
		{b.path("garbage"), "garbage"},
		{b.path("empty"), "empty"},
		{b.path("head"), "head"},
		{b.path("flipped"), "flipped"},
		{b.path("missing"), "missing: no such file"},
		{b.path("pipe"), "pipe: not a file"},
		{b.dir, "not a file"},
		{other, "shares no layer with the image"},
		{"sha256:" + strings.Repeat("0", 64), "404"},
		{"sha256:0", "sha256:0"},
	}
	for _, tt := range tests {
		r := b.run("run", "--trace", tt.trace, "--explain", s.ref)
		require.Zero(t, r.code, r.stderr)
		require.Equal(t, "hello from the image\n", r.stdout)
		require.Regexp(t, `(?m)^replay:   .*`+tt.says, r.stderr)
		require.Regexp(t, `level=WARN msg="(no trace is|the trace is not) replayed".*`+tt.says, r.stderr)
	}
	// What is left of one that was cut off is good.
	r := b.run("run", "--root", b.mkdir("cold"), "--trace", b.path("cut"), "--explain", s.ref)
	require.Contains(t, r.stderr, "replay:   replayed")

	b.fails(exitFailed, []string{"attach", s.ref, other}, "shares no layer with the image", "other.invalid/image:1")
	b.fails(exitFailed, []string{"attach", s.ref, b.path("garbage")}, "garbage")
	b.fails(exitFailed, []string{"attach", s.ref, vectors(t, "trace/recorded.trace")}, "does not say which layers")
	b.fails(exitFailed, []string{"record", "-o", b.path("good"), s.ref}, "good exists: name a new file")
	require.Equal(t, digest.FromBytes(p).Encoded(), sha(t, b.path("good")))
	b.fails(exitFailed, []string{"trace", "pull", s.ref, b.path("new")}, "no traces")
	require.NoFileExists(t, b.path("new"))
}

func foreignTrace(t testing.TB, path string) string {
	f, err := os.Create(path)
	require.NoError(t, err)
	w, err := tracefmt.NewWriter(f, tracefmt.Header{
		Image: "other.invalid/image:1", Space: tracefmt.LayerSpace, Workload: "w",
		Layers: []tracefmt.Layer{{Digest: digest.FromString("other"), Size: 1 << 20, Decoded: 1 << 20}},
	})
	require.NoError(t, err)
	require.NoError(t, w.Add(tracefmt.Event{Off: 0, Len: 4096}))
	require.NoError(t, w.Finish(tracefmt.End{Reason: "ready: exit 0"}))
	require.NoError(t, f.Close())
	return path
}

// TestNotRoot: as nobody, what needs root says so and the rest works.
func TestNotRoot(t *testing.T) {
	b := newBench(t)
	program := b.executable()
	as := func(args ...string) result {
		cmd := b.command(args...)
		cmd.Path, cmd.Dir = program, b.mkdir("cwd")
		if os.Geteuid() == 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		return b.finish(cmd)
	}
	if os.Geteuid() == 0 && as("version").code != 0 {
		t.Skip("needs a temporary directory that nobody can use")
	}
	for _, args := range [][]string{
		{"run", "127.0.0.1:1/x"}, {"mount", "127.0.0.1:1/x", b.dir}, {"umount", b.dir},
		{"record", "-o", "trace", "127.0.0.1:1/x"}, {"demo"},
	} {
		r := as(args...)
		b.complains(r, exitFailed, args, args[0]+" needs root", "try sudo")
	}
	require.Equal(t, exitUsage, as("run").code, "wrong usage is told first")
	require.NoFileExists(t, b.path("cwd/trace"))

	dir := b.mkdir("vectors")
	for _, l := range []string{"layer0.overlaybd.commit", "layer1.overlaybd.commit", "layer2.overlaybd.commit", "config.v1.json"} {
		copyFile(t, vectors(t, "ext4-64m", l), filepath.Join(dir, l))
	}
	config := filepath.Join(dir, "config.v1.json")
	require.Zero(t, as("image", "info", config).code)
	require.Zero(t, as("blob", "verify", filepath.Join(dir, "layer0.overlaybd.commit")).code)
	r := as("image", "dump", config, "device")
	require.Zero(t, r.code, r.stderr)
	require.Equal(t, shaLayers, sha(t, b.path("cwd/device")))
	if os.Geteuid() == 0 {
		small.make(t)
		require.NoError(t, os.Chmod(small.dir, 0o755))
		r := as("convert", small.source(), "oci:"+b.path("cwd/out"))
		b.complains(r, exitFailed, []string{"convert"}, "convert needs root")
	}
}

// TestMissingTools names what to install.
func TestMissingTools(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	b.env = append(b.env, "PATH="+b.mkdir("nothing"))
	b.fails(exitFailed, []string{"run", s.ref}, "runc", "install")
	b.fails(exitFailed, []string{"record", "-o", b.path("trace"), s.ref}, "runc", "install")
	require.NoFileExists(t, b.path("trace"))
}

// TestFullDisk: without space for the cache, reads go around it.
func TestFullDisk(t *testing.T) {
	skipWithoutRunc(t)
	t.Parallel()
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	disk := func(name string) string {
		root := b.mkdir(name)
		require.NoError(t, unix.Mount("tmpfs", root, "tmpfs", 0, "size=512k"))
		t.Cleanup(func() { require.NoError(t, unix.Unmount(root, 0)) })
		return root
	}
	root, dir := disk("disk"), b.mkdir("mnt")
	b.ok("mount", "--root", root, s.ref, dir)
	require.Equal(t, expected(small.layers), withoutRoot(listTree(t, dir)))
	b.ok("umount", "--root", root, dir)

	root = disk("another")
	r := b.run("run", "--root", root, s.ref)
	require.Zero(t, r.code, r.stderr)
	require.Equal(t, "hello from the image\n", r.stdout)
	require.Contains(t, r.stderr, "the cache is not kept")
	// Now there is no space for anything at all.
	b.fails(exitFailed, []string{"mount", "--root", root, s.ref, dir}, root, "no space left on device")
	out := filepath.Join(root, "device")
	b.fails(exitFailed, []string{"image", "dump", s.ref, out}, "no space left on device")
	require.NoFileExists(t, out)
}

// TestFileInTheWay: a state directory that cannot be one.
func TestFileInTheWay(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	file := b.write("file", "precious")
	b.fails(exitFailed, []string{"run", "--root", file, "127.0.0.1:1/x"}, file, "--root")
	b.fails(exitFailed, []string{"mount", "--root", file, "127.0.0.1:1/x", b.mkdir("mnt")}, file, "--root")
}
