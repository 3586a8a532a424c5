package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// A guard lets nobody at the small image who does not know its password.
type guard struct {
	addr string
	ref  string // of the small image
	to   http.Handler

	mu       sync.Mutex // guards what follows
	password string
	entered  int           // requests with it
	asked    chan struct{} // closed by the next one, which then waits
	goOn     chan struct{}
}

// guard puts one in front of a registry. The user is "pod".
func (b *bench) guard(s *site, password string) *guard {
	b.t.Helper()
	g := &guard{to: s.Link, password: password}
	server, err := regtest.Start(context.Background(), g)
	require.NoError(b.t, err)
	b.t.Cleanup(func() { require.NoError(b.t, server.Close()) })
	b.loop = append(b.loop, server.Addr)
	g.addr, g.ref = server.Addr, server.Addr+smallName
	return g
}

func (g *guard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	user, password, _ := r.BasicAuth()
	if strings.HasPrefix(r.URL.Path, "/v2/tests/small/") && !g.lets(user, password) {
		w.Header().Set("WWW-Authenticate", `Basic realm="tests"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	g.to.ServeHTTP(w, r)
}

func (g *guard) lets(user, password string) bool {
	g.mu.Lock()
	asked, goOn := g.asked, g.goOn
	good := user == "pod" && password == g.password
	if good {
		g.entered++
		g.asked = nil
	}
	g.mu.Unlock()
	if good && asked != nil {
		close(asked)
		<-goOn
	}
	return good
}

// hold has the next request wait. asked is closed when there is one.
func (g *guard) hold() (asked <-chan struct{}, goOn func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked, g.goOn = make(chan struct{}), make(chan struct{})
	end := g.goOn
	return g.asked, func() { close(end) }
}

// change changes the password.
func (g *guard) change(password string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.password = password
}

// count is how many requests there were with the password.
func (g *guard) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.entered
}

// pushPause puts an ordinary image there whose command does nothing.
func (b *bench) pushPause(addr string) (ref string) {
	b.t.Helper()
	dir := b.mkdir("pause")
	layers := []testLayer{append(programs(b.t, "bin/sleep"), dirs("proc", "dev", "sys", "etc", "tmp")...)}
	writeLayout(b.t, dir, layers, ocispec.ImageConfig{Entrypoint: []string{"/bin/sleep", "1000000"}})
	source, err := oci.New(dir)
	require.NoError(b.t, err)
	p, err := os.ReadFile(filepath.Join(dir, "index.json"))
	require.NoError(b.t, err)
	var index ocispec.Index
	require.NoError(b.t, json.Unmarshal(p, &index))
	ref = addr + "/tests/pause:1"
	repo, err := remote.NewRepository(ref)
	require.NoError(b.t, err)
	repo.PlainHTTP = true
	_, err = oras.Copy(b.t.Context(), source, index.Manifests[0].Digest.String(), repo, "1", oras.DefaultCopyOptions)
	require.NoError(b.t, err)
	return ref
}

// A kube does with a node what Kubernetes does: it has containerd's CRI, and its
// image service by way of the daemon.
type kube struct {
	*ctrd
	cri.RuntimeServiceClient
	images cri.ImageServiceClient
	direct cri.ImageServiceClient // containerd's own
	pod    *cri.PodSandboxConfig
	podID  string
	logs   string
	n      int // containers so far

	supervisor *exec.Cmd // of the daemon
	said       func() string
}

// kubeConfigs are those that containerd's CRI is tested with, by what they say of
// pulling: containerd 2 has its transfer service pull, unless it is told to do what
// only the CRI's own pull can.
var kubeConfigs = []struct {
	name   string
	built  bool // for containerd 2 only
	config string
}{
	{"own pull", false, `version = 2
[proxy_plugins.reprise]
  type = "snapshot"
  address = "%[3]s"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "%[4]s"
  disable_cgroup = true
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "%[1]s/cni"
    conf_dir = "%[1]s/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "%[1]s/certs.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "reprise"
    disable_snapshot_annotations = false
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
`},
	{"transfer service", true, `version = 3
[proxy_plugins.reprise]
  type = "snapshot"
  address = "%[3]s"
  [proxy_plugins.reprise.exports]
    enable_remote_snapshot_annotations = "true"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux"
  snapshotter = "reprise"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "reprise"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "%[4]s"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "%[1]s/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["%[1]s/cni"]
    conf_dir = "%[1]s/cni"
`},
}

// kubeConfig is of all of them.
const kubeConfig = `
root = "%[1]s/root"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp", "io.containerd.nri.v1.nri"]
[grpc]
  address = "%[2]s"
`

// kube starts a daemon and a containerd.
func (b *bench) kube(bin, config, pause string) *kube {
	t := b.t
	t.Helper()
	dir, err := os.MkdirTemp("", "ctrd") // sockets have short paths
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	k := &kube{ctrd: &ctrd{b: b, bin: bin, dir: dir, socket: filepath.Join(dir, "c.sock")}, logs: b.mkdir("logs")}
	first, rest, _ := strings.Cut(config, "\n") // the version
	config = fmt.Sprintf(first+kubeConfig+rest, dir, k.socket, filepath.Join(b.root, "reprise.sock"), pause)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o600))
	cgroup := filepath.Base(dir)
	t.Cleanup(func() { removeCgroups(t, cgroup) })
	self, err := os.Executable()
	require.NoError(t, err)
	k.supervisor = b.command("supervise", "--", self, "daemon", "--root", b.root, "--containerd", k.socket)
	k.said = b.start(k.supervisor, func(line string) bool { return strings.Contains(line, "the daemon serves") })
	t.Cleanup(k.stop)
	k.start()
	k.RuntimeServiceClient = cri.NewRuntimeServiceClient(b.dial(k.socket))
	k.direct = cri.NewImageServiceClient(b.dial(k.socket))
	k.images = cri.NewImageServiceClient(b.dial(filepath.Join(b.root, "reprise.sock")))
	k.pod = &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "pod", Namespace: "tests", Uid: b.mark},
		LogDirectory: k.logs,
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: "/" + cgroup, // containerd 2 does not do without
			SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE},
			},
		},
	}
	return k
}

// removeCgroups removes what is left of a pod: the directory that its containers'
// were in.
func removeCgroups(t testing.TB, name string) {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	for _, dir := range append(dirs, "/sys/fs/cgroup/"+name) {
		if err := os.Remove(dir); err != nil && !os.IsNotExist(err) {
			t.Errorf("left behind: %v", err)
		}
	}
}

func (b *bench) dial(socket string) *grpc.ClientConn {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(b.t, err)
	b.t.Cleanup(func() { require.NoError(b.t, conn.Close()) })
	return conn
}

// ready has a call wait for a server that is being started again.
var ready = grpc.WaitForReady(true)

// pull pulls with a password, if it is not empty.
func (k *kube) pull(images cri.ImageServiceClient, ref, password string) error {
	r := &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, SandboxConfig: k.pod}
	if password != "" {
		r.Auth = &cri.AuthConfig{Username: "pod", Password: password}
	}
	_, err := images.PullImage(k.b.t.Context(), r, ready)
	return err
}

// startPod makes the pod whose containers run are.
func (k *kube) startPod() {
	k.b.t.Helper()
	resp, err := k.RunPodSandbox(k.b.t.Context(), &cri.RunPodSandboxRequest{Config: k.pod})
	require.NoError(k.b.t, err, k.log())
	k.podID = resp.PodSandboxId
}

// create makes a container of the pod.
func (k *kube) create(ref string, command ...string) (id string, c *cri.ContainerConfig, err error) {
	k.n++
	c = &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: fmt.Sprintf("container-%d", k.n)},
		Image:    &cri.ImageSpec{Image: ref},
		Command:  command,
		LogPath:  fmt.Sprintf("%d.log", k.n),
		Linux:    &cri.LinuxContainerConfig{},
	}
	resp, err := k.CreateContainer(k.b.t.Context(), &cri.CreateContainerRequest{PodSandboxId: k.podID, Config: c, SandboxConfig: k.pod})
	return resp.GetContainerId(), c, err
}

// run runs a container to its end, removes it, and gives what it has logged.
func (k *kube) run(ref string, command ...string) (code int32, out string) {
	t := k.b.t
	t.Helper()
	id, c, err := k.create(ref, command...)
	require.NoError(t, err, k.log())
	_, err = k.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: id})
	require.NoError(t, err, k.log())
	eventually(t, "the container's end", func() bool {
		st, err := k.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
		require.NoError(t, err)
		code = st.Status.ExitCode
		return st.Status.State == cri.ContainerState_CONTAINER_EXITED
	})
	_, err = k.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: id})
	require.NoError(t, err)
	p, err := os.ReadFile(filepath.Join(k.logs, c.LogPath))
	require.NoError(t, err)
	for line := range strings.Lines(string(p)) {
		if f := strings.SplitN(line, " ", 4); len(f) == 4 { // time, stream, tag
			out += f[3]
		}
	}
	return code, out
}

// stopPod ends and removes the pod.
func (k *kube) stopPod() {
	t := k.b.t
	t.Helper()
	_, err := k.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: k.podID})
	require.NoError(t, err)
	_, err = k.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: k.podID})
	require.NoError(t, err)
}

// secrets are the repositories that the daemon has the secrets of.
func (b *bench) secrets() (all []string) {
	path := filepath.Join(b.root, "secrets.json")
	p, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil
	}
	require.NoError(b.t, err)
	fi, err := os.Stat(path)
	require.NoError(b.t, err)
	require.Equal(b.t, os.FileMode(0o600), fi.Mode())
	var f struct{ Secrets map[string]any }
	require.NoError(b.t, json.Unmarshal(p, &f))
	for name := range f.Secrets {
		all = append(all, name)
	}
	return all
}

// TestCRI runs a pod of an image that only its image pull secret gives access to,
// as kubelet does.
func TestCRI(t *testing.T) {
	eachContainerd(t, func(t *testing.T, bin string) {
		for _, c := range kubeConfigs {
			if !c.built || bin != "" {
				t.Run(c.name, func(t *testing.T) { testCRI(t, bin, c.config) })
			}
		}
	})
}

func testCRI(t *testing.T, bin, config string) {
	b := newBench(t)
	s := b.ownSite(false)
	g := b.guard(s, "first-word")
	pause := b.pushPause(g.addr)
	k := b.kube(bin, config, pause)
	k.startPod()

	// What containerd alone is told, the daemon does not know.
	require.NoError(t, k.pull(k.direct, g.ref, "first-word"), k.log())
	_, _, err := k.create(g.ref)
	require.ErrorContains(t, err, "401")
	require.ErrorContains(t, err, "--image-service-endpoint")

	require.Error(t, k.pull(k.images, g.ref, ""))
	require.Error(t, k.pull(k.images, g.ref, "other-word"))
	require.Empty(t, b.secrets())
	layers := s.blobsSince(func() { require.NoError(t, k.pull(k.images, g.ref, "first-word"), k.log()) })
	require.LessOrEqual(t, layers, 1, "the config only")
	require.Equal(t, []string{strings.TrimSuffix(g.ref, ":obd")}, b.secrets())
	st, err := k.images.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: g.ref}})
	require.NoError(t, err)
	require.Contains(t, st.Image.RepoTags, g.ref)
	_, err = k.images.ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{})
	require.NoError(t, err)

	before := g.count()
	code, out := k.run(g.ref)
	require.Zero(t, code, out)
	require.Equal(t, "hello from the image\n", out)
	require.Greater(t, g.count(), before, "the image is read with the secret")

	// The next process of the daemon knows it too.
	pid := b.daemonPid()
	require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	eventually(t, "another daemon", func() bool { return b.daemonPid() != pid })
	before = g.count()
	code, out = k.run(g.ref, "/bin/cat", "/data/big")
	require.Zero(t, code, out)
	require.Greater(t, g.count(), before)

	// A pull does not outlive the process: kubelet tries again.
	asked, goOn := g.hold()
	pulled := make(chan error, 1)
	go func() { pulled <- k.pull(k.images, g.ref, "first-word") }()
	<-asked
	b.ok("daemon", "upgrade", "--root", b.root)
	require.Equal(t, codes.Unavailable, status.Code(<-pulled))
	goOn()
	require.NoError(t, k.pull(k.images, g.ref, "first-word"), k.log())

	// A new secret comes with the next pull.
	g.change("second-word")
	const readMore = "/bin/cat /data/more > /dev/null && echo read"
	code, out = k.run(g.ref, "/bin/sh", "-c", readMore)
	require.NotZero(t, code)
	require.Contains(t, out, "Input/output error", "what is not on the node yet cannot be had")
	require.Error(t, k.pull(k.images, g.ref, "first-word"))
	require.NoError(t, k.pull(k.images, g.ref, "second-word"), k.log())
	code, out = k.run(g.ref, "/bin/sh", "-c", readMore)
	require.Zero(t, code, out)
	require.Equal(t, "read\n", out)

	k.stopPod()
	for _, ref := range []string{g.ref, pause} {
		_, err = k.images.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
		require.NoError(t, err)
	}
	require.Empty(t, b.secrets())
	k.emptied()
	k.stop()
	b.end(k.supervisor, k.said)
	require.NotContains(t, k.said(), "-word")
}
