package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A ctrd is a containerd of one test, with a daemon's snapshotter.
type ctrd struct {
	b      *bench
	bin    string // its directory; empty for PATH
	dir    string
	socket string
	cmd    *exec.Cmd
	*client.Client
}

const containerdToml = `version = 2
root = "%[1]s/root"
state = "%[1]s/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "%[2]s"
[proxy_plugins.reprise]
  type = "snapshot"
  address = "%[3]s"
`

// containerd starts one of the programs in bin.
func (b *bench) containerd(bin, plugin string) *ctrd {
	b.t.Helper()
	dir, err := os.MkdirTemp("", "ctrd") // sockets have short paths
	require.NoError(b.t, err)
	c := &ctrd{b: b, bin: bin, dir: dir, socket: filepath.Join(dir, "c.sock")}
	b.t.Cleanup(func() { require.NoError(b.t, os.RemoveAll(dir)) })
	config := filepath.Join(dir, "config.toml")
	require.NoError(b.t, os.WriteFile(config, fmt.Appendf(nil, containerdToml, dir, c.socket, plugin), 0o600))
	b.t.Cleanup(c.stop)
	c.start()
	return c
}

// collect has containerd remove what was marked to be: it does that some time, or
// at once when somebody waits for the end of a lease.
func (c *ctrd) collect() {
	t := c.b.t
	t.Helper()
	l, err := c.LeasesService().Create(c.ctx(), leases.WithRandomID(), leases.WithExpiration(time.Minute))
	require.NoError(t, err)
	require.NoError(t, c.LeasesService().Delete(c.ctx(), l, leases.SynchronousDelete))
}

// program is one of containerd's.
func (c *ctrd) program(name string) string { return filepath.Join(c.bin, name) }

func (c *ctrd) start() {
	t := c.b.t
	t.Helper()
	log, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	defer log.Close()
	c.cmd = exec.Command(c.program("containerd"), "--config", filepath.Join(c.dir, "config.toml"))
	c.cmd.Env = append(os.Environ(), envMark+"="+c.b.mark)
	if c.bin != "" {
		c.cmd.Env = append(c.cmd.Env, "PATH="+c.bin+":"+os.Getenv("PATH"))
	}
	c.cmd.Stdout, c.cmd.Stderr = log, log
	require.NoError(t, c.cmd.Start())
	eventually(t, "containerd", func() bool {
		if c.Client == nil {
			c.Client, err = client.New(c.socket, client.WithTimeout(time.Second), client.WithDefaultNamespace("default"))
			if err != nil {
				return false
			}
		}
		ok, err := c.IsServing(c.ctx())
		return err == nil && ok
	})
}

func (c *ctrd) ctx() context.Context {
	return namespaces.WithNamespace(context.Background(), "default")
}

func (c *ctrd) log() string {
	p, _ := os.ReadFile(filepath.Join(c.dir, "log"))
	return string(p)
}

// kill ends containerd as a crash does. What it has started lives on.
func (c *ctrd) kill() {
	c.b.t.Helper()
	require.NoError(c.b.t, c.cmd.Process.Kill())
	_ = c.cmd.Wait()
}

// stop ends containerd, and what a failed test has left.
func (c *ctrd) stop() {
	if c.Client != nil {
		_ = c.Client.Close()
		c.Client = nil
	}
	if c.cmd.ProcessState == nil {
		_ = c.cmd.Process.Signal(unix.SIGTERM)
		_ = c.cmd.Wait()
	}
	if c.b.t.Failed() {
		c.b.t.Logf("containerd: %s", c.log())
		c.clean()
	}
}

// clean ends the containers and shims of a failed test.
func (c *ctrd) clean() {
	ours, _ := os.Readlink("/proc/self/ns/mnt")
	tables, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, name := range tables { // of containers, whose root names the state directory
		p, _ := os.ReadFile(name)
		ns, err := os.Readlink(filepath.Join(filepath.Dir(name), "ns/mnt"))
		pid, e := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err == nil && e == nil && ns != ours && bytes.Contains(p, []byte(c.b.root+"/snapshotter/")) {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	for _, pid := range c.b.processes() {
		if strings.Contains(cmdline(pid), "containerd-shim") {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	for _, dir := range c.mounts() {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	}
}

// mounts are those of containers that containerd has started, the last one first.
func (c *ctrd) mounts() (at []string) {
	p, err := os.ReadFile("/proc/self/mounts")
	require.NoError(c.b.t, err)
	for line := range strings.Lines(string(p)) {
		if dir := strings.Fields(line)[1]; strings.HasPrefix(dir, c.dir+"/") {
			at = append(at, dir)
		}
	}
	slices.Reverse(at)
	return at
}

// emptied makes sure that nothing is left when all containers and images are
// deleted: no mount, no device, no snapshot and no directory of one.
func (c *ctrd) emptied() {
	t := c.b.t
	t.Helper()
	require.Empty(t, c.mounts())
	eventually(t, "the devices go with the images", func() bool { return len(c.b.loops()) == 0 })
	require.Empty(t, c.b.mounts())
	require.NoError(t, c.SnapshotService("reprise").Walk(c.ctx(), func(_ context.Context, info snapshots.Info) error {
		t.Errorf("snapshot %s is left", info.Name)
		return nil
	}))
	dirs, err := os.ReadDir(filepath.Join(c.b.root, "snapshotter", "snapshots"))
	require.NoError(t, err)
	require.Empty(t, dirs)
}

// remove deletes images, and what only they need, before it returns.
func (c *ctrd) remove(refs ...string) {
	c.b.t.Helper()
	for _, ref := range refs {
		require.NoError(c.b.t, c.ImageService().Delete(c.ctx(), ref, images.SynchronousDelete()))
	}
}

// create makes a container on an image that was pulled.
func (c *ctrd) create(name, ref string, args ...string) client.Container {
	c.b.t.Helper()
	ctr, err := c.tryCreate(c.ctx(), name, ref, args...)
	require.NoError(c.b.t, err, c.log())
	return ctr
}

func (c *ctrd) tryCreate(ctx context.Context, name, ref string, args ...string) (client.Container, error) {
	im, err := c.GetImage(ctx, ref)
	if err != nil {
		return nil, err
	}
	return c.NewContainer(ctx, name,
		client.WithImage(im), client.WithSnapshotter("reprise"), client.WithNewSnapshot(name, im),
		client.WithRuntime("io.containerd.runc.v2", &options.Options{Root: filepath.Join(c.dir, "runc")}),
		client.WithNewSpec(oci.WithImageConfigArgs(im, args), noCgroups, withRm))
}

// noCgroups leaves the container in containerd's own: its limits are not tested
// here, and not every machine lets them be set.
func noCgroups(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
	s.Linux.CgroupsPath = ""
	s.Linux.Resources = nil
	return nil
}

// withRm has the machine's rm in the container, as /tmp/rm: its libraries are the
// image's, which has no program that removes files.
func withRm(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
	s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/bin/rm", Destination: "/tmp/rm", Options: []string{"bind", "ro"}})
	return nil
}

// run runs a container to its end, and gives what it has said.
func (c *ctrd) run(ctr client.Container) (code uint32, said string) {
	t := c.b.t
	t.Helper()
	var out, errs bytes.Buffer // one for both would be read into by two at once
	task, err := ctr.NewTask(c.ctx(), cio.NewCreator(cio.WithStreams(nil, &out, &errs), cio.WithFIFODir(filepath.Join(c.dir, "fifo"))))
	require.NoError(t, err, c.log())
	ended, err := task.Wait(c.ctx())
	require.NoError(t, err)
	require.NoError(t, task.Start(c.ctx()), c.log())
	st := <-ended
	task.IO().Wait()
	_, err = task.Delete(c.ctx())
	require.NoError(t, err)
	return st.ExitCode(), out.String() + errs.String()
}

// eachContainerd runs a test with the machine's containerd and with the one that
// `make containerd` has built. In CI neither may be missing.
func eachContainerd(t *testing.T, test func(t *testing.T, bin string)) {
	skipWithoutRunc(t)
	if raceEnabled && !slices.Contains([]string{"TestContainerd", "TestAutoRecord"}, t.Name()) {
		t.Skip("takes minutes with the race detector, and runs without")
	}
	built := os.Getenv("REPRISE_CONTAINERD")
	for _, bin := range []string{"", built} {
		if bin != "" {
			t.Run("built", func(t *testing.T) { test(t, bin) })
			continue
		}
		t.Run("installed", func(t *testing.T) {
			_, err := exec.LookPath("containerd")
			switch {
			case err != nil && os.Getenv("CI") == "true":
				t.Fatalf("needs containerd: %v", err)
			case err != nil:
				t.Skipf("needs containerd: %v", err)
			}
			test(t, "")
		})
		if built == "" {
			return
		}
	}
}

func TestContainerd(t *testing.T) {
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := b.smallSite("0s,unlimited")
		supervisor, said := b.daemon(true)
		c := b.containerd(bin, filepath.Join(b.root, "reprise.sock"))
		v, err := c.Version(c.ctx())
		require.NoError(t, err)
		t.Logf("containerd %s", v.Version)
		if bin != "" {
			require.True(t, strings.HasPrefix(strings.TrimPrefix(v.Version, "v"), "2."), v.Version)
		}
		before := s.Stats().BytesSent
		b.ok("pull", "--plain-http", "--address", c.socket, s.ref)
		require.Less(t, s.Stats().BytesSent-before, int64(100<<10), "no layer is fetched")

		ctr := c.create("one", s.ref)
		code, out := c.run(ctr)
		require.Zero(t, code, out)
		require.Equal(t, "hello from the image\n", out)
		require.NoError(t, ctr.Delete(c.ctx(), client.WithSnapshotCleanup))

		ctr = c.create("two", s.ref, "/bin/sh", "-c", "echo word > /data/new && cat /data/new && cat /data/big > /dev/null")
		code, out = c.run(ctr)
		require.Zero(t, code, out)
		require.Equal(t, "word\n", out)
		require.NoError(t, ctr.Delete(c.ctx(), client.WithSnapshotCleanup))

		c.remove(s.ref)
		c.emptied()
		c.stop()
		b.end(supervisor, said)
	})
}

// end has a daemon end that nothing keeps.
func (b *bench) end(supervisor *exec.Cmd, said func() string) {
	b.t.Helper()
	require.NoError(b.t, supervisor.Process.Signal(unix.SIGTERM))
	require.NoError(b.t, supervisor.Wait(), said())
	b.settled()
}
