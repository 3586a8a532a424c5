package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/stretchr/testify/require"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"sigs.k8s.io/yaml"
)

func TestVersions(t *testing.T) {
	for _, tt := range []struct{ git, semantic, debian, tag string }{
		{"v0.4.0", "0.4.0", "0.4.0", "0.4.0"},
		{"0.4.0", "0.4.0", "0.4.0", "0.4.0"},
		{"v0.4.0-dirty", "0.4.0+dirty", "0.4.0+dirty", "0.4.0-dirty"},
		{"v0.4.0-3-gabcdef0", "0.4.0+3.gabcdef0", "0.4.0+3.gabcdef0", "0.4.0-3.gabcdef0"},
		{"v0.4.0-3-gabcdef0-dirty", "0.4.0+3.gabcdef0.dirty", "0.4.0+3.gabcdef0.dirty", "0.4.0-3.gabcdef0.dirty"},
		{"v1.0.0-rc.1", "1.0.0-rc.1", "1.0.0~rc.1", "1.0.0-rc.1"},
		{"v1.0.0-rc.1-3-gabcdef0", "1.0.0-rc.1+3.gabcdef0", "1.0.0~rc.1+3.gabcdef0", "1.0.0-rc.1-3.gabcdef0"},
		{"0123456", "0.0.0+0123456", "0.0.0+0123456", "0.0.0-0123456"},
		{"abcdef0-dirty", "0.0.0+abcdef0.dirty", "0.0.0+abcdef0.dirty", "0.0.0-abcdef0.dirty"},
		{"devel", "0.0.0+devel", "0.0.0+devel", "0.0.0-devel"},
		{"", "0.0.0+devel", "0.0.0+devel", "0.0.0-devel"},
	} {
		version := semantic(tt.git)
		require.Equal(t, tt.semantic, version, tt.git)
		require.Equal(t, tt.debian, debian(version), tt.git)
		require.Equal(t, tt.tag, tag(version), tt.git)
		if _, err := exec.LookPath("dpkg"); err == nil {
			require.NoError(t, exec.Command("dpkg", "--validate-version", debian(version)).Run(), tt.git)
		}
	}
}

// What is installed has its time.
var testTime = time.Unix(1_700_000_000, 0).UTC()

func testRelease() *release {
	return &release{tree: "../..", version: "0.4.0+3.gabcdef0", image: "registry.example.com/reprise", time: testTime}
}

// objects decodes what the chart makes, by the API's own types: a field that they do not have is an error.
func objects(t *testing.T, texts map[string]string) (ds *appsv1.DaemonSet, cm *corev1.ConfigMap, rc *nodev1.RuntimeClass) {
	t.Helper()
	for name, text := range texts {
		if name == "NOTES.txt" {
			continue
		}
		var kind struct{ APIVersion, Kind string }
		require.NoError(t, yaml.Unmarshal([]byte(text), &kind))
		var to any
		switch kind.APIVersion + " " + kind.Kind {
		case "apps/v1 DaemonSet":
			ds = new(appsv1.DaemonSet)
			to = ds
		case "v1 ConfigMap":
			cm = new(corev1.ConfigMap)
			to = cm
		case "node.k8s.io/v1 RuntimeClass":
			rc = new(nodev1.RuntimeClass)
			to = rc
		default:
			t.Fatalf("%s: %+v", name, kind)
		}
		require.NoError(t, yaml.UnmarshalStrict([]byte(text), to), text)
	}
	return ds, cm, rc
}

// checkDaemonSet is what the types do not say.
func checkDaemonSet(t *testing.T, ds *appsv1.DaemonSet) {
	t.Helper()
	pod := ds.Spec.Template
	for k, v := range ds.Spec.Selector.MatchLabels {
		require.Equal(t, v, pod.Labels[k], "the selector does not meet the pod")
	}
	volumes := map[string]corev1.Volume{}
	for _, v := range pod.Spec.Volumes {
		volumes[v.Name] = v
	}
	require.Len(t, pod.Spec.Containers, 1)
	c := pod.Spec.Containers[0]
	for _, m := range c.VolumeMounts {
		v, ok := volumes[m.Name]
		require.True(t, ok, "no volume %s", m.Name)
		delete(volumes, m.Name)
		if v.HostPath != nil { // each as --host has it
			require.Equal(t, "/host"+v.HostPath.Path, m.MountPath)
		}
	}
	require.Empty(t, volumes, "mounted nowhere")
	require.Contains(t, c.Args, "--host=/host")
	require.False(t, *pod.Spec.AutomountServiceAccountToken)
	require.True(t, *c.SecurityContext.ReadOnlyRootFilesystem)
	require.Zero(t, *c.SecurityContext.RunAsUser)
	require.True(t, c.Resources.Limits.Memory().Cmp(*c.Resources.Requests.Memory()) > 0)
}

func TestChart(t *testing.T) {
	image := map[string]any{"repository": "registry.example.com/reprise"}
	digest := "sha256:" + strings.Repeat("a", 64)
	text := "# a comment\n[record]\npolicy = \"off\"\n"
	for name, tt := range map[string]struct {
		values map[string]any
		check  func(t *testing.T, ds *appsv1.DaemonSet, cm *corev1.ConfigMap, rc *nodev1.RuntimeClass)
	}{
		"defaults": {map[string]any{"image": image}, func(t *testing.T, ds *appsv1.DaemonSet, cm *corev1.ConfigMap, rc *nodev1.RuntimeClass) {
			require.Nil(t, cm)
			require.Nil(t, rc)
			c := ds.Spec.Template.Spec.Containers[0]
			require.Equal(t, "registry.example.com/reprise:0.4.0-3.gabcdef0", c.Image)
			require.Equal(t, []string{"daemon", "install", "--host=/host", "--prefix=/opt/reprise", "--stay"}, c.Args)
			require.Equal(t, []string{"/usr/bin/reprise", "daemon", "install", "--host=/host", "--prefix=/opt/reprise", "--check"},
				c.ReadinessProbe.Exec.Command)
		}},
		"config": {map[string]any{"image": image, "config": text}, func(t *testing.T, ds *appsv1.DaemonSet, cm *corev1.ConfigMap, _ *nodev1.RuntimeClass) {
			require.Equal(t, text, cm.Data["config.toml"])
			require.Len(t, ds.Spec.Template.Annotations["checksum/config"], 64)
			c := ds.Spec.Template.Spec.Containers[0]
			require.Contains(t, c.Args, "--config=/config/config.toml")
			require.Contains(t, c.ReadinessProbe.Exec.Command, "--config=/config/config.toml")
		}},
		"runtime class": {map[string]any{"image": image, "runtimeClass": map[string]any{"create": true, "handler": "lazy"}},
			func(t *testing.T, _ *appsv1.DaemonSet, _ *corev1.ConfigMap, rc *nodev1.RuntimeClass) {
				require.Equal(t, "lazy", rc.Handler)
				require.Equal(t, "reprise", rc.Name)
			}},
		"removal": {map[string]any{"image": image, "config": text, "remove": true, "runtimeClass": map[string]any{"create": true}},
			func(t *testing.T, ds *appsv1.DaemonSet, cm *corev1.ConfigMap, rc *nodev1.RuntimeClass) {
				require.Nil(t, cm)
				require.Nil(t, rc)
				c := ds.Spec.Template.Spec.Containers[0]
				require.Equal(t, []string{"daemon", "uninstall", "--host=/host", "--prefix=/opt/reprise", "--stay"}, c.Args)
				require.Nil(t, c.ReadinessProbe)
			}},
		"all else": {map[string]any{
			"image":            map[string]any{"repository": "x/y", "digest": digest, "pullPolicy": "Always"},
			"imagePullSecrets": []any{map[string]any{"name": "secret"}}, "prefix": "/var/lib/here",
			"podLabels": map[string]any{"team": "a"}, "podAnnotations": map[string]any{"note": "b"},
			"affinity": map[string]any{"nodeAffinity": map[string]any{}}, "priorityClassName": "",
		}, func(t *testing.T, ds *appsv1.DaemonSet, _ *corev1.ConfigMap, _ *nodev1.RuntimeClass) {
			pod := ds.Spec.Template
			require.Equal(t, "x/y@"+digest, pod.Spec.Containers[0].Image)
			require.Equal(t, "secret", pod.Spec.ImagePullSecrets[0].Name)
			require.Equal(t, "a", pod.Labels["team"])
			require.Equal(t, "b", pod.Annotations["note"])
			require.Empty(t, pod.Spec.PriorityClassName)
			require.NotNil(t, pod.Spec.Affinity.NodeAffinity)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			texts, err := testRelease().render(tt.values)
			require.NoError(t, err)
			require.Contains(t, texts["NOTES.txt"], "daemon is being") // and no error
			ds, cm, rc := objects(t, texts)
			checkDaemonSet(t, ds)
			tt.check(t, ds, cm, rc)
		})
	}
}

func TestChartRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		values map[string]any
		says   string
	}{
		"no image":      {nil, "image.repository"},
		"unknown value": {map[string]any{"imge": "x"}, "imge"},
		"a bad digest":  {map[string]any{"image": map[string]any{"digest": "sha256:1"}}, "digest"},
		"a bad prefix":  {map[string]any{"prefix": "opt"}, "prefix"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := testRelease().render(tt.values)
			require.ErrorContains(t, err, tt.says)
		})
	}
}

// built makes a release of a small program of this machine's architecture.
func built(t *testing.T) *release {
	t.Helper()
	r := testRelease()
	r.out, r.archs = t.TempDir(), []string{runtime.GOARCH}
	require.NoError(t, os.MkdirAll(filepath.Join(r.out, runtime.GOARCH), 0o755))
	source := filepath.Join(t.TempDir(), "main.go")
	require.NoError(t, os.WriteFile(source, []byte(`package main

import "fmt"

func main() { fmt.Println("it runs") }
`), 0o644))
	cmd := exec.Command("go", "build", "-o", r.program(runtime.GOARCH), source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return r
}

func TestChartPacked(t *testing.T) {
	r := testRelease()
	r.out = t.TempDir()
	name, err := r.chart()
	require.NoError(t, err)
	require.Equal(t, "reprise-0.4.0+3.gabcdef0.tgz", filepath.Base(name))
	f, err := os.Open(name)
	require.NoError(t, err)
	defer f.Close()
	z, err := gzip.NewReader(f)
	require.NoError(t, err)
	dir := t.TempDir()
	extract(t, tar.NewReader(z), dir)
	c, err := loader.LoadDir(filepath.Join(dir, "reprise"))
	require.NoError(t, err)
	require.Equal(t, "0.4.0+3.gabcdef0", c.Metadata.AppVersion)
	require.NotNil(t, c.Schema)
	require.Len(t, c.Templates, 5)
}

func TestManifest(t *testing.T) {
	r := testRelease()
	r.out = t.TempDir()
	name, err := r.manifest()
	require.NoError(t, err)
	p, err := os.ReadFile(name)
	require.NoError(t, err)
	ds, _, _ := objects(t, map[string]string{"daemonset.yaml": string(p)})
	checkDaemonSet(t, ds)
	require.Equal(t, "kube-system", ds.Namespace)
}

func TestImage(t *testing.T) {
	r := built(t)
	name, err := r.oci()
	require.NoError(t, err)
	again, err := os.ReadFile(name)
	require.NoError(t, err)
	_, err = r.oci()
	require.NoError(t, err)
	first, err := os.ReadFile(name)
	require.NoError(t, err)
	require.True(t, bytes.Equal(first, again), "made twice, it differs")

	dir := t.TempDir()
	extract(t, tar.NewReader(bytes.NewReader(first)), dir)
	index, err := layout.ImageIndexFromPath(dir)
	require.NoError(t, err)
	require.NoError(t, validate.Index(index))
	m, err := index.IndexManifest()
	require.NoError(t, err)
	require.Equal(t, "registry.example.com/reprise:0.4.0-3.gabcdef0", m.Manifests[0].Annotations["io.containerd.image.name"])
	inner, err := index.ImageIndex(m.Manifests[0].Digest)
	require.NoError(t, err)
	m, err = inner.IndexManifest()
	require.NoError(t, err)
	require.Equal(t, runtime.GOARCH, m.Manifests[0].Platform.Architecture)
	im, err := inner.Image(m.Manifests[0].Digest)
	require.NoError(t, err)
	cf, err := im.ConfigFile()
	require.NoError(t, err)
	require.Equal(t, []string{"/usr/bin/reprise"}, cf.Config.Entrypoint)
	layers, err := im.Layers()
	require.NoError(t, err)
	rc, err := layers[0].Uncompressed()
	require.NoError(t, err)
	defer rc.Close()
	root := t.TempDir()
	extract(t, tar.NewReader(rc), root)
	checkCertificates(t, filepath.Join(root, "etc/ssl/certs/ca-certificates.crt"))
	runIn(t, root, cf.Config.Entrypoint[0])
}

func checkCertificates(t *testing.T, name string) {
	p, err := os.ReadFile(name)
	require.NoError(t, err)
	require.Greater(t, bytes.Count(p, []byte("BEGIN CERTIFICATE")), 50)
}

// runIn runs a program with nothing but the image around it.
func runIn(t *testing.T, root, program string) {
	t.Helper()
	cmd := exec.Command(program)
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		cmd.Dir = "/"
	} else { // without the privilege, beside this machine's files
		cmd.Path = filepath.Join(root, program)
	}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, "it runs\n", string(out))
}

func extract(t *testing.T, from *tar.Reader, dir string) {
	t.Helper()
	for {
		h, err := from.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		require.NoError(t, err)
		require.Equal(t, testTime, h.ModTime.UTC(), h.Name)
		require.True(t, filepath.IsLocal(h.Name), h.Name)
		name := filepath.Join(dir, h.Name)
		if h.Typeflag == tar.TypeDir {
			require.NoError(t, os.MkdirAll(name, 0o755))
			continue
		}
		require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o755))
		p, err := io.ReadAll(from)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(name, p, h.FileInfo().Mode().Perm()))
	}
}

func TestDeb(t *testing.T) {
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		t.Skip("needs dpkg-deb")
	}
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	r := built(t)
	name, err := r.deb(runtime.GOARCH)
	require.NoError(t, err)
	first, err := os.ReadFile(name)
	require.NoError(t, err)
	_, err = r.deb(runtime.GOARCH)
	require.NoError(t, err)
	again, err := os.ReadFile(name)
	require.NoError(t, err)
	require.True(t, bytes.Equal(first, again), "made twice, it differs")

	field := func(field string) string { return strings.TrimSpace(ask(t, "dpkg-deb", "--field", name, field)) }
	require.Equal(t, "reprise", field("Package"))
	require.Equal(t, "0.4.0+3.gabcdef0", field("Version"))
	require.Equal(t, runtime.GOARCH, field("Architecture"))
	checkOwners(t, ask(t, "dpkg-deb", "--contents", name))

	root := t.TempDir()
	ask(t, "dpkg-deb", "--raw-extract", name, root)
	for _, script := range []string{"postinst", "prerm", "postrm"} {
		ask(t, "sh", "-n", filepath.Join(root, "DEBIAN", script))
	}
	sums := exec.Command("md5sum", "-c", "--quiet", "DEBIAN/md5sums")
	sums.Dir = root
	out, err := sums.CombinedOutput()
	require.NoError(t, err, "%s", out)
	conf, err := os.ReadFile(filepath.Join(root, "DEBIAN", "conffiles"))
	require.NoError(t, err)
	require.Equal(t, "/etc/reprise/config.toml\n", string(conf))
	unit, err := os.ReadFile(filepath.Join(root, "usr/lib/systemd/system/reprise.service"))
	require.NoError(t, err)
	require.Contains(t, string(unit), "\nExecStart=/usr/bin/reprise daemon\n")
	require.Equal(t, "it runs\n", ask(t, filepath.Join(root, "usr/bin/reprise")))
}

// TestDebInstalled has dpkg install the package into a directory, and purge it.
func TestDebInstalled(t *testing.T) {
	for _, tool := range []string{"dpkg", "dpkg-deb", "deb-systemd-helper"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s", tool)
		}
	}
	if os.Geteuid() != 0 {
		t.Skip("dpkg needs root")
	}
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	r := built(t)
	name, err := r.deb(runtime.GOARCH)
	require.NoError(t, err)
	root := t.TempDir()
	for _, dir := range []string{"info", "updates", "triggers"} {
		require.NoError(t, os.MkdirAll(filepath.Join(root, "var/lib/dpkg", dir), 0o755))
	}
	require.NoError(t, os.WriteFile(filepath.Join(root, "var/lib/dpkg/status"), nil, 0o644))
	dpkg := func(args ...string) {
		t.Helper()
		ask(t, "dpkg", append([]string{"--root=" + root, "--force-depends", "--force-script-chrootless"}, args...)...)
	}
	in := func(path string) string { return filepath.Join(root, path) }
	dpkg("--install", name)
	require.Equal(t, "it runs\n", ask(t, in("usr/bin/reprise")))
	const wanted = "etc/systemd/system/multi-user.target.wants/reprise.service"
	to, err := os.Readlink(in(wanted))
	require.NoError(t, err, "not enabled")
	require.Contains(t, to, "/systemd/system/reprise.service")

	config, state := in("etc/reprise/config.toml"), in("var/lib/reprise/cache")
	require.NoError(t, os.WriteFile(config, []byte("# an administrator's\n"), 0o644))
	require.NoError(t, os.MkdirAll(state, 0o755))
	dpkg("--install", name) // as an upgrade does
	p, err := os.ReadFile(config)
	require.NoError(t, err)
	require.Equal(t, "# an administrator's\n", string(p))
	dpkg("--remove", "reprise")
	require.NoFileExists(t, in("usr/bin/reprise"))
	require.FileExists(t, config)
	require.DirExists(t, state)
	dpkg("--purge", "reprise")
	for _, path := range []string{"etc/reprise", "var/lib/reprise", wanted, "etc/systemd/system/reprise.service"} {
		_, err := os.Lstat(in(path))
		require.ErrorIs(t, err, os.ErrNotExist, path)
	}
}

// checkOwners reads a listing of the package: all of it is root's, and everybody may read it.
func checkOwners(t *testing.T, listing string) {
	lines := bufio.NewScanner(strings.NewReader(listing))
	var n int
	for ; lines.Scan(); n++ {
		f := strings.Fields(lines.Text())
		require.Equal(t, "root/root", f[1], lines.Text())
		require.Contains(t, []string{"drwxr-xr-x", "-rwxr-xr-x", "-rw-r--r--"}, f[0], lines.Text())
	}
	require.Greater(t, n, 10)
}

func ask(t *testing.T, program string, args ...string) string {
	t.Helper()
	out, err := exec.Command(program, args...).CombinedOutput()
	require.NoError(t, err, "%s %q: %s", program, args, out)
	return string(out)
}
