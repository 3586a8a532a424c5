package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/zfile"
)

func digestOf(p []byte) digest.Digest { return digest.FromBytes(p) }

func TestBadLayers(t *testing.T) {
	needRoot(t)
	good := gzipLayer(t, makeTar(t, file("a", strings.Repeat("0123456789", 20000))))
	change := func(f func(*testLayer)) testLayer {
		l := good
		l.blob = bytes.Clone(l.blob)
		f(&l)
		return l
	}
	for _, c := range []struct {
		name  string
		layer testLayer
		want  string
	}{
		{"broken gzip", change(func(l *testLayer) { copy(l.blob[len(l.blob)/2:], "rubbishrubbish") }), "gzip: "},
		{"cut gzip", change(func(l *testLayer) { l.blob = l.blob[:len(l.blob)/2] }), "gzip: unexpected EOF"},
		{"wrong diff ID", change(func(l *testLayer) { l.diffID = digestOf(nil) }),
			"the uncompressed layer has digest " + good.diffID.String() + ", the image's config says " + digestOf(nil).String()},
		{"cut tar", plainLayer(makeTar(t, file("a", "0123456789"))[:1540]), "unexpected EOF"},
		{"no tar", plainLayer([]byte(strings.Repeat("rubbish ", 1000))), "invalid tar header"},
		{"too much for the device", plainLayer(makeTar(t, file("a", strings.Repeat("x", testSize)))), `apply "a": allocate 67108864 bytes: no space left on device`},
	} {
		t.Run(c.name, func(t *testing.T) {
			src, dst := at(t, "oci:"+t.TempDir()), at(t, "oci:"+t.TempDir())
			writeImage(t, src, plainLayer(makeTar(t, dir("d"))), c.layer)
			_, err := testConvert(t, src, dst, Options{})
			require.ErrorContains(t, err, fmt.Sprintf("layer 1 (%s): ", digestOf(c.layer.blob)))
			require.ErrorContains(t, err, c.want)
			_, _, err = dst.Manifest(t.Context(), ocispec.Platform{})
			require.Error(t, err, "nothing may be published")
		})
	}
	noDevices(t)
}

func TestBadRemoteLayer(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		fault regtest.Fault
		want  string
	}{
		"other bytes": {regtest.Fault{Corrupt: true}, "digest"},
		"gone":        {regtest.Fault{Status: http.StatusNotFound}, "404"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t)
			bad := gzipLayer(t, makeTar(t, file("a", strings.Repeat("0123456789", 20000))))
			writeImage(t, r.at(t, "src:v1"), plainLayer(makeTar(t, dir("d"))), bad)
			r.link.SetFault(func(q *http.Request) *regtest.Fault {
				if q.Method == http.MethodGet && strings.HasSuffix(q.URL.Path, digestOf(bad.blob).String()) {
					return &c.fault
				}
				return nil
			})
			_, err := testConvert(t, r.at(t, "src:v1"), r.at(t, "dst:v1"), Options{})
			require.ErrorContains(t, err, "layer 1 ")
			require.ErrorContains(t, err, c.want)
		})
	}
	noDevices(t)
}

// noDevices fails if this process has left a device.
func noDevices(t *testing.T) {
	t.Helper()
	require.Empty(t, devicesOf(os.Getpid()))
}

// devicesOf lists the loop devices of conversions of one process.
func devicesOf(pid int) []string {
	var found []string
	paths, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, path := range paths {
		p, _ := os.ReadFile(path)
		if strings.Contains(string(p), fmt.Sprintf("reprise-convert-%d", pid)) {
			found = append(found, path)
		}
	}
	return found
}

// memory is an image that exists nowhere.
type memory map[digest.Digest][]byte

func (m memory) String() string { return "memory" }

func (m memory) put(mediaType string, v any) ocispec.Descriptor {
	p, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digestOf(p), Size: int64(len(p))}
	m[d.Digest] = p
	return d
}

// image makes an image and changes it before it is written.
func (m memory) image(f func(manifest, config map[string]any)) ocispec.Descriptor {
	diffIDs := []digest.Digest{digestOf([]byte("layer"))}
	config := map[string]any{"os": "linux", "rootfs": ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}}
	layer := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digestOf([]byte("layer")), Size: 5}
	manifest := map[string]any{
		"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageManifest,
		"layers": []ocispec.Descriptor{layer},
	}
	f(manifest, config)
	if manifest["config"] == nil {
		manifest["config"] = m.put(ocispec.MediaTypeImageConfig, config)
	}
	return m.put(manifest["mediaType"].(string), manifest)
}

func TestBadImages(t *testing.T) {
	layers := func(ds ...ocispec.Descriptor) []ocispec.Descriptor { return ds }
	layer := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digestOf([]byte("layer")), Size: 5}
	for _, c := range []struct {
		name string
		f    func(m memory, manifest, config map[string]any)
		want string
	}{
		{"unknown layer", func(_ memory, mf, _ map[string]any) {
			mf["layers"] = layers(ocispec.Descriptor{MediaType: "application/vnd.example.layer", Digest: layer.Digest, Size: 5})
		}, `layer 0 (` + layer.Digest.String() + `): media type "application/vnd.example.layer": unsupported operation`},
		{"overlaybd already", func(_ memory, mf, _ map[string]any) {
			l := layer
			l.Annotations = map[string]string{annotationDigest: "x"}
			mf["layers"] = layers(l)
		}, "already in overlaybd format"},
		{"artifact", func(m memory, mf, _ map[string]any) { mf["config"] = m.put("application/vnd.example", 1) }, "not a container image"},
		{"no layers", func(_ memory, mf, _ map[string]any) { mf["layers"] = layers() }, "the image has no layers"},
		{"too many layers", func(_ memory, mf, _ map[string]any) { mf["layers"] = make([]ocispec.Descriptor, 256) }, "256 layers, the format has at most 255"},
		{"another number of diff IDs", func(_ memory, mf, _ map[string]any) { mf["layers"] = layers(layer, layer) }, "1 diff IDs for 2 layers"},
		{"bad diff ID", func(_ memory, _, c map[string]any) {
			c["rootfs"] = map[string]any{"diff_ids": []string{"sha256:../../etc"}}
		}, "diff ID"},
		{"bad digest", func(_ memory, mf, _ map[string]any) {
			mf["layers"] = layers(ocispec.Descriptor{MediaType: layer.MediaType, Digest: "sha256:../x"})
		}, "layer 0 (sha256:../x): "},
		{"windows", func(_ memory, _, c map[string]any) { c["os"] = "windows" }, "an image for windows, only linux is supported"},
		{"other manifest", func(_ memory, mf, _ map[string]any) { mf["mediaType"] = "application/json" }, "is not an image manifest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := memory{}
			src := at(t, "oci:"+t.TempDir())
			d := m.image(func(mf, cf map[string]any) { c.f(m, mf, cf) })
			for _, p := range m {
				require.NoError(t, src.Push(t.Context(), ocispec.Descriptor{Digest: digestOf(p), Size: int64(len(p))}, opener(p)))
			}
			require.NoError(t, src.PushManifest(t.Context(), d, m[d.Digest]))
			_, err := testConvert(t, src, at(t, "oci:"+t.TempDir()), Options{})
			require.ErrorContains(t, err, c.want)
		})
	}
}

func TestPlatforms(t *testing.T) {
	needRoot(t)
	dirPath := t.TempDir()
	var index ocispec.Index
	index.SchemaVersion, index.MediaType = 2, ocispec.MediaTypeImageIndex
	src := at(t, "oci:"+dirPath+":index")
	for _, arch := range []string{"amd64", "arm64"} {
		one := at(t, "oci:"+dirPath+":"+arch)
		d := writeImage(t, one, plainLayer(makeTar(t, file("arch", arch))))
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
		index.Manifests = append(index.Manifests, d)
	}
	p, err := json.Marshal(index)
	require.NoError(t, err)
	require.NoError(t, src.PushManifest(t.Context(),
		ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digestOf(p), Size: int64(len(p))}, p))
	for _, arch := range []string{"amd64", "arm64"} {
		dst := at(t, "oci:"+t.TempDir())
		_, err := testConvert(t, src, dst, Options{Platform: &ocispec.Platform{OS: "linux", Architecture: arch}})
		require.NoError(t, err)
		got, err := os.ReadFile(filepath.Join(mountLayers(t, dst, 1), "arch"))
		require.NoError(t, err)
		require.Equal(t, arch, string(got))
	}
	_, err = testConvert(t, src, at(t, "oci:"+t.TempDir()), Options{Platform: &ocispec.Platform{OS: "linux", Architecture: "riscv64"}})
	require.ErrorContains(t, err, "no image for linux/riscv64; there are: linux/amd64 linux/arm64")
}

func TestDocker(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	src := r.at(t, "docker:v1")
	tarball := makeTar(t, file("a", "b"))
	layer := pushBytes(t, src, images.MediaTypeDockerSchema2LayerGzip, gzipped(t, tarball))
	config, err := json.Marshal(map[string]any{"os": "linux", "rootfs": ocispec.RootFS{DiffIDs: []digest.Digest{digestOf(tarball)}}})
	require.NoError(t, err)
	m, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": images.MediaTypeDockerSchema2Manifest,
		"config": pushBytes(t, src, images.MediaTypeDockerSchema2Config, config), "layers": []ocispec.Descriptor{layer},
	})
	require.NoError(t, err)
	require.NoError(t, src.PushManifest(t.Context(), ocispec.Descriptor{
		MediaType: images.MediaTypeDockerSchema2Manifest, Digest: digestOf(m), Size: int64(len(m)),
	}, m))
	d, err := testConvert(t, src, r.at(t, "docker:v2"), Options{})
	require.NoError(t, err)
	require.Equal(t, images.MediaTypeDockerSchema2Manifest, d.MediaType)
	got := manifestOf(t, r.at(t, "docker:v2"))
	require.Equal(t, images.MediaTypeDockerSchema2Layer, got.Layers[0].MediaType)
	require.Equal(t, images.MediaTypeDockerSchema2Config, got.Config.MediaType)
}

func TestOptions(t *testing.T) {
	for _, o := range []Options{
		{DeviceSize: 1}, {DeviceSize: minDeviceSize + 512}, {DeviceSize: 1 << 50}, {DeviceSize: -4096},
		{BlockSize: 5000}, {Algo: 99}, {Algo: zfile.Zstd, Level: 50}, {Level: 3},
	} {
		_, err := Convert(t.Context(), nil, nil, &o)
		require.Error(t, err, "%+v", o)
	}
	_, err := findTool("mkfs.nosuchfs", "somepackage")
	require.EqualError(t, err, "mkfs.nosuchfs: not found: install somepackage")
	_, err = At("oci:", nil)
	require.ErrorContains(t, err, "name a directory")
	_, err = At("registry.example/x", nil)
	require.ErrorContains(t, err, "no registry client")
	l, err := newLayout("/a:b/c")
	require.NoError(t, err)
	require.Equal(t, &layout{dir: "/a:b/c"}, l)
}

// A full disk is reported as such, though the kernel says EIO to the child.
func TestFullDisk(t *testing.T) {
	needRoot(t)
	src, dst := at(t, "oci:"+t.TempDir()), at(t, "oci:"+t.TempDir())
	noise := make([]byte, 16<<20)
	for i := range noise {
		noise[i] = byte(i * i >> 7)
	}
	writeImage(t, src, plainLayer(makeTar(t, file("a", string(noise)))))
	_, err := testConvert(t, src, dst, Options{Workdir: smallDisk(t, "8m")})
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.ErrorContains(t, err, "layer 0 ")
	noDevices(t)
}

// smallDisk is a tmpfs that is mounted nowhere.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(fs)
	require.NoError(t, unix.FsconfigSetString(fs, "size", size))
	require.NoError(t, unix.FsconfigCreate(fs))
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return fmt.Sprintf("/proc/self/fd/%d/.", fd)
}

func TestCancel(t *testing.T) {
	needRoot(t)
	src := at(t, "oci:"+t.TempDir())
	writeImage(t, src, vectorLayers(t)...)
	for _, s := range []Stage{Apply, Commit, Push} {
		ctx, cancel := context.WithCancel(t.Context())
		o := Options{DeviceSize: testSize, Workdir: t.TempDir(), Progress: func(e Event) {
			if e.Layer == 1 && e.Stage == s {
				cancel()
			}
		}}
		_, err := Convert(ctx, src, at(t, "oci:"+t.TempDir()), &o)
		require.ErrorIs(t, err, context.Canceled, "%s", s)
	}
	noDevices(t)
}

// TestWithoutRoot runs itself as nobody.
func TestWithoutRoot(t *testing.T) {
	if os.Getuid() == 0 {
		dir, err := os.MkdirTemp("", "nobody")
		require.NoError(t, err)
		defer os.RemoveAll(dir)
		require.NoError(t, os.Chmod(dir, 0o777))
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestWithoutRoot$")
		cmd.Env = append(os.Environ(), "TMPDIR="+dir)
		cmd.Dir = dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return
	}
	src := at(t, "oci:"+t.TempDir())
	writeImage(t, src, plainLayer(makeTar(t, dir("d"))))
	_, err := testConvert(t, src, at(t, "oci:"+t.TempDir()), Options{})
	require.EqualError(t, err, "convert needs root (CAP_SYS_ADMIN) to mount")
}

// TestKilled kills conversions at various moments: no device and no child may
// survive them, and the next one finishes.
func TestKilled(t *testing.T) {
	const env = "CONVERT_TEST_KILLED"
	if ref := os.Getenv(env); ref != "" {
		src, dst, _ := strings.Cut(ref, " ")
		_, err := Convert(t.Context(), at(t, src), at(t, dst), &Options{DeviceSize: testSize, Workdir: os.Getenv(env + "_DIR")})
		require.NoError(t, err)
		return
	}
	needRoot(t)
	work := t.TempDir()
	src := "oci:" + t.TempDir()
	writeImage(t, at(t, src), append(vectorLayers(t), plainLayer(makeTar(t, file("big", strings.Repeat("x", 2<<20)))))...)
	run := func(dst string, after time.Duration) error {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), env+"="+src+" "+dst, env+"_DIR="+work)
		require.NoError(t, cmd.Start())
		timer := time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
		err := cmd.Wait()
		require.Eventually(t, func() bool { return len(devicesOf(cmd.Process.Pid)) == 0 && !hasChild(cmd.Process.Pid) },
			30*time.Second, 10*time.Millisecond, "killed after %v: something is left", after)
		return err
	}
	begun := time.Now()
	require.NoError(t, run("oci:"+t.TempDir(), time.Hour))
	whole := time.Since(begun)
	const times = 10
	killed, dst := 0, ""
	for i := range times {
		dst = "oci:" + t.TempDir()
		if run(dst, whole*time.Duration(i+1)/(times+1)) != nil {
			killed++
		}
	}
	t.Logf("%d of %d were killed in time", killed, times)
	require.NoError(t, run(dst, time.Hour))
	left, err := os.ReadDir(work)
	require.NoError(t, err)
	require.Empty(t, left)
	fsck(t, at(t, dst), 4)
}

// hasChild tells whether a child with that name is left whose parent is gone.
func hasChild(parent int) bool {
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		p, _ := os.ReadFile(path)
		if !strings.HasPrefix(string(p), childName+"\x00") {
			continue
		}
		stat, _ := os.ReadFile(filepath.Join(filepath.Dir(path), "stat"))
		_, rest, _ := strings.Cut(string(stat), ") ")
		var state string
		var ppid int
		if _, err := fmt.Sscan(rest, &state, &ppid); err == nil && (ppid == parent || ppid == 1) {
			return true
		}
	}
	return false
}
