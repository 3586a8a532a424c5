package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
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

const ctrdConfig = `version = 2
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
	require.NoError(b.t, os.WriteFile(config, fmt.Appendf(nil, ctrdConfig, dir, c.socket, plugin), 0o600))
	b.t.Cleanup(c.stop)
	c.start()
	return c
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

// stop ends containerd, and shims that a failed test has left.
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
	}
}

// create makes a container on an image that was pulled.
func (c *ctrd) create(name, ref string, args ...string) client.Container {
	t := c.b.t
	t.Helper()
	im, err := c.GetImage(c.ctx(), ref)
	require.NoError(t, err)
	ctr, err := c.NewContainer(c.ctx(), name,
		client.WithImage(im), client.WithSnapshotter("reprise"), client.WithNewSnapshot(name, im),
		client.WithRuntime("io.containerd.runc.v2", nil),
		client.WithNewSpec(oci.WithImageConfigArgs(im, args), noCgroups))
	require.NoError(t, err, c.log())
	return ctr
}

// noCgroups leaves the container in containerd's own: its limits are not tested
// here, and not every machine lets them be set.
func noCgroups(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
	s.Linux.CgroupsPath = ""
	s.Linux.Resources = nil
	return nil
}

// run runs a container to its end.
func (c *ctrd) run(ctr client.Container) (code uint32, out string) {
	t := c.b.t
	t.Helper()
	var buf bytes.Buffer
	task, err := ctr.NewTask(c.ctx(), cio.NewCreator(cio.WithStreams(nil, &buf, &buf), cio.WithFIFODir(filepath.Join(c.dir, "fifo"))))
	require.NoError(t, err, c.log())
	ended, err := task.Wait(c.ctx())
	require.NoError(t, err)
	require.NoError(t, task.Start(c.ctx()), c.log())
	st := <-ended
	task.IO().Wait()
	_, err = task.Delete(c.ctx())
	require.NoError(t, err)
	return st.ExitCode(), buf.String()
}

// containerds are those on this machine.
func eachContainerd(t *testing.T, test func(t *testing.T, bin string)) {
	skipWithoutRunc(t)
	bins := map[string]string{"debian": ""}
	if dir := os.Getenv("REPRISE_CONTAINERD"); dir != "" {
		bins["built"] = dir
	}
	for name, bin := range bins {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(filepath.Join(bin, "containerd")); err != nil {
				t.Skipf("needs containerd: %v", err)
			}
			test(t, bin)
		})
	}
}

func TestContainerd(t *testing.T) {
	eachContainerd(t, func(t *testing.T, bin string) {
		b := newBench(t)
		s := b.smallSite("0s,unlimited")
		supervisor, said := b.daemon(true)
		c := b.containerd(bin, filepath.Join(b.root, "reprise.sock"))
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

		require.NoError(t, c.ImageService().Delete(c.ctx(), s.ref, images.SynchronousDelete()))
		eventually(t, "the device goes with the image", func() bool { return len(b.loops()) == 0 })
		c.stop()
		require.NoError(t, supervisor.Process.Signal(unix.SIGTERM))
		require.NoError(t, supervisor.Wait(), said())
		require.Empty(t, b.leftovers())
	})
}
