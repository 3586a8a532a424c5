package snapshotter

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore/registry"
)

// DefaultName is the snapshotter's in containerd's configuration.
const DefaultName = "reprise"

// PullOptions are the settings of [Pull]. A zero field means its default.
type PullOptions struct {
	// Address is containerd's socket, /run/containerd/containerd.sock by default.
	Address string
	// Namespace of containerd, "default" by default.
	Namespace string
	// Snapshotter is the name of the proxy plugin, [DefaultName] by default.
	Snapshotter string
	// Platform is os/arch[/variant], the machine's by default.
	Platform string
}

func (o *PullOptions) filled() PullOptions {
	var f PullOptions
	if o != nil {
		f = *o
	}
	for _, d := range []struct {
		field *string
		value string
	}{
		{&f.Address, "/run/containerd/containerd.sock"},
		{&f.Namespace, "default"},
		{&f.Snapshotter, DefaultName},
	} {
		if *d.field == "" {
			*d.field = d.value
		}
	}
	return f
}

// Pulled is an image that containerd has.
type Pulled struct {
	Name   string        `json:"name"`
	Digest digest.Digest `json:"digest"` // of the manifest or index
}

// Pull has containerd make an image ready to start with the snapshotter, as its own
// client pulls one: of layers in overlaybd format nothing is fetched, all others are
// unpacked. The registry is asked as c does it.
func Pull(ctx context.Context, c *registry.Client, ref string, o *PullOptions) (*Pulled, error) {
	f := o.filled()
	r, err := registry.ParseReference(ref)
	if err != nil {
		return nil, err
	}
	ctrd, err := client.New(f.Address, client.WithDefaultNamespace(f.Namespace))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", f.Address, err)
	}
	defer ctrd.Close()
	name := r.String()
	opts := []client.RemoteOpt{
		client.WithResolver(c.Resolver()),
		client.WithPullUnpack, client.WithPullSnapshotter(f.Snapshotter),
		client.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(name)),
	}
	if f.Platform != "" {
		opts = append(opts, client.WithPlatform(f.Platform))
	}
	im, err := ctrd.Pull(ctx, name, opts...)
	if err != nil {
		return nil, fmt.Errorf("pull %s: %w", name, err)
	}
	return &Pulled{Name: im.Name(), Digest: im.Target().Digest}, nil
}
