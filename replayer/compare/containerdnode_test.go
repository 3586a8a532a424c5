package compare

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"

	"github.com/reprise-project/reprise/replayer/node"
)

// ctrdConfig is for containerd 1.6 and later, without what starts do not need.
const ctrdConfig = `version = 2
root = %[1]q
state = %[2]q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = %[3]q
`

// ctrdPlugin adds a snapshotter to it.
const ctrdPlugin = `[proxy_plugins.reprise]
  type = "snapshot"
  address = %q
`

// A ctrd is a containerd of its own. Its images are in a directory that may
// outlive it.
type ctrd struct {
	*client.Client
	socket string
	tmp    string // what does not outlive it
	end    func() error
}

// startContainerd starts the containerd in the directory bin, by default that of
// PATH, and waits until it serves. Its images are in root; plugin, if not empty,
// is the socket of the snapshotter "reprise".
func startContainerd(ctx context.Context, bin, root, plugin string) (c *ctrd, err error) {
	c = new(ctrd)
	if c.tmp, err = os.MkdirTemp("", "ctrd-"); err != nil { // sockets have short paths
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	c.socket = filepath.Join(c.tmp, "c.sock")
	config := fmt.Sprintf(ctrdConfig, root, filepath.Join(c.tmp, "state"), c.socket)
	if plugin != "" {
		short := filepath.Join(c.tmp, "r.sock")
		if err := os.Symlink(plugin, short); err != nil {
			return nil, err
		}
		config += fmt.Sprintf(ctrdPlugin, short)
	}
	file := filepath.Join(c.tmp, "config.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command(filepath.Join(bin, "containerd"), "--config", file)
	if bin != "" { // its shim is there as well
		cmd.Env = append(os.Environ(), "PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"))
	}
	c.end, err = startServer(ctx, cmd, c.serving)
	return c, err
}

// serving tells whether it answers.
func (c *ctrd) serving(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if c.Client == nil {
		c.Client, err = client.New(c.socket, client.WithTimeout(time.Second), client.WithDefaultNamespace("default"))
		if err != nil {
			c.Client = nil
			return err
		}
	}
	ok, err := c.IsServing(ctx)
	if err == nil && !ok {
		err = errors.New("containerd does not serve yet")
	}
	return err
}

// close ends it.
func (c *ctrd) close() (err error) {
	if c.Client != nil {
		err = c.Client.Close()
	}
	if c.end != nil {
		err = errors.Join(err, c.end())
	}
	if left := mountsBelow(c.tmp); len(left) > 0 { // of a container that could not be removed
		return errors.Join(err, fmt.Errorf("still mounted: %s", strings.Join(left, ", ")))
	}
	return errors.Join(err, os.RemoveAll(c.tmp))
}

// pull has containerd's own client pull an image, as for users of its overlayfs
// snapshotter, over connections of its own.
func (c *ctrd) pull(ctx context.Context, ref string) error {
	conns := docker.DefaultHTTPTransport(nil)
	defer conns.CloseIdleConnections()
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost), docker.WithClient(&http.Client{Transport: conns}))
	_, err := c.Pull(ctx, ref, client.WithPullUnpack, client.WithPullSnapshotter("overlayfs"),
		client.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: hosts})))
	if err != nil {
		err = fmt.Errorf("pull %s: %w", ref, err)
	}
	return err
}

// forget removes an image and its snapshots.
func (c *ctrd) forget(ctx context.Context, ref string) error {
	return c.ImageService().Delete(ctx, ref, images.SynchronousDelete())
}

// programs are those that a start through containerd uses, beside reprise.
func programs(bin string) (paths []string, err error) {
	for _, name := range []string{filepath.Join(bin, "containerd"), filepath.Join(bin, "containerd-shim-runc-v2"), "runc"} {
		path, err := exec.LookPath(name)
		if err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	return paths, nil
}

// deviceOf is the one device that a daemon has.
func deviceOf(ctx context.Context, root string) (*node.Status, error) {
	c, err := node.Dial(ctx, root)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	list, err := c.List(ctx)
	if err != nil {
		return nil, err
	}
	if len(list) != 1 {
		return nil, fmt.Errorf("the daemon has %d devices, not 1", len(list))
	}
	return &list[0], nil
}

// mountsBelow are the mounts at a directory or below it.
func mountsBelow(dir string) (at []string) {
	p, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	for line := range strings.Lines(string(p)) {
		if f := strings.Fields(line); len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			at = append(at, f[4])
		}
	}
	return at
}
