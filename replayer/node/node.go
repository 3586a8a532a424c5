// Package node is an image on this node: it resolves a reference, opens the
// image lazily, looks up the trace beside it, attaches and mounts the device,
// starts a container on it, and records or replays that start. The commands,
// the comparisons and the snapshotter stand on it.
//
// # Nouns
//
// A [Node] is the state directory with the chunk cache and the registry
// client. An [Image] is open on a node. A [Server] attaches images as devices,
// mounts them, and serves the devices; a [Client] asks a server in another
// process to. Both are [Devices], on which [Run] starts a container. A keeper is
// the server's parent: it holds the descriptors that devices live by, and starts
// the server again when it is killed.
//
//	keeper ── server ──── device, mount
//	             └ unix socket, HTTP ── clients: run, mount, umount
//
// # Killed processes
//
// A server may be killed at any moment, and is replaced in the same way: the
// next one reads the state files (state.go), opens the same images at the same
// versions and adopts the devices, whose users only wait for it. What is left
// when the keeper was killed too is dead, and answers with I/O errors; the next
// mount or unmount at the same directory, or [Reap], takes it away. A server
// whose keeper was killed goes on until its devices are not used any more.
//
// # Concurrency
//
// Everything exported is safe for concurrent use. Close what was opened on a
// node before the node: containers, servers, images, then the node.
//
// # Deadlocks
//
// A process that serves a mounted image must not look into the mount itself.
package node

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/registry"
)

// DefaultRoot is where state is kept.
const DefaultRoot = "/var/lib/reprise"

// Config are the settings of a [Node]. A zero field means its default.
type Config struct {
	// Root is the state directory, [DefaultRoot] by default. It is made with
	// its parents.
	Root string
	// Registry are the settings of the registry client.
	Registry registry.Options
	// Cache are the settings of the chunk cache in Root.
	Cache backstore.CacheOptions
	// Platform is os/arch[/variant], the machine's by default.
	Platform string
	// Transport of devices, "auto" by default.
	Transport string
	// TraceWait bounds how long a lookup of a trace may take, 2 s by default.
	// It runs beside the opening of the image.
	TraceWait time.Duration
	// Tool signs traces, "reprise" by default.
	Tool string
	// Log receives warnings, slog.Default() by default.
	Log *slog.Logger
}

// A Node is a state directory and what is shared by the images opened from it.
type Node struct {
	o        Config
	platform *ocispec.Platform // nil for the machine's
	cache    *backstore.Cache
	client   *registry.Client
	outcomes outcomes
	ahead    *aheads
}

// Open opens the state directory.
func Open(c *Config) (*Node, error) {
	var o Config
	if c != nil {
		o = *c
	}
	o.Root = cmp.Or(o.Root, DefaultRoot)
	o.TraceWait = cmp.Or(o.TraceWait, 2*time.Second)
	o.Tool = cmp.Or(o.Tool, "reprise")
	o.Log = cmp.Or(o.Log, slog.Default())
	o.Cache.Log = cmp.Or(o.Cache.Log, o.Log)
	root, err := filepath.Abs(o.Root)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	o.Root = root
	if err := os.MkdirAll(o.Root, 0o711); err != nil {
		return nil, fmt.Errorf("state directory: %w; name another with --root", err)
	}
	n := &Node{o: o, ahead: &aheads{}}
	if o.Platform != "" {
		p, err := platforms.Parse(o.Platform)
		if err != nil {
			return nil, fmt.Errorf("platform %q: %w", o.Platform, err)
		}
		n.platform = &p
	}
	client, err := registry.New(&o.Registry)
	if err != nil {
		return nil, err
	}
	cache, err := backstore.OpenCache(filepath.Join(o.Root, "cache"), &o.Cache)
	if err != nil {
		return nil, errors.Join(err, client.Close())
	}
	n.client, n.cache = client, cache
	return n, nil
}

// with is a node of the same root and cache that reaches registries, chooses
// platforms, and logs as a request asks for. Only its client is to be closed.
func (n *Node) with(r *Request, log *slog.Logger) (*Node, error) {
	w := &Node{o: n.o, platform: n.platform, cache: n.cache, client: n.client, ahead: n.ahead}
	w.o.Log = log
	w.o.TraceWait = cmp.Or(r.TraceWait, w.o.TraceWait)
	if r.Transport != "" {
		w.o.Transport = r.Transport
	}
	if r.Platform != "" {
		p, err := platforms.Parse(r.Platform)
		if err != nil {
			return nil, fmt.Errorf("platform %q: %w", r.Platform, err)
		}
		w.platform = &p
	}
	o := n.o.Registry
	o.PlainHTTP, o.HostsDir = o.PlainHTTP || r.PlainHTTP, cmp.Or(r.HostsDir, o.HostsDir)
	client, err := registry.New(&o)
	w.client = client
	return w, err
}

// Registry is the node's registry client.
func (n *Node) Registry() *registry.Client { return n.client }

// Root is the state directory.
func (n *Node) Root() string { return n.o.Root }

// Close writes the cache's state down and ends connections.
func (n *Node) Close() error { return errors.Join(n.client.Close(), n.cache.Close()) }
