package snapshotter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// A Containerd is asked what it has and how it is set up. Nothing is changed. It is
// safe for concurrent use. Close it.
type Containerd struct{ c *client.Client }

// OpenContainerd connects to the containerd at a socket.
func OpenContainerd(ctx context.Context, address string) (*Containerd, error) {
	wait := time.Second
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline))
	}
	c, err := client.New(address, client.WithTimeout(wait))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", address, err)
	}
	return &Containerd{c}, nil
}

// Close ends the connection.
func (c *Containerd) Close() error { return c.c.Close() }

// Version is containerd's, such as 1.6.20 or v2.1.4.
func (c *Containerd) Version(ctx context.Context) (string, error) {
	v, err := c.c.Version(ctx)
	return v.Version, err
}

// Loaded tells whether containerd has a plugin of that name as a snapshotter. The
// error matches errdefs.ErrNotFound if it has none, or why it could not be loaded.
func (c *Containerd) Loaded(ctx context.Context, snapshotter string) error {
	list, err := c.c.IntrospectionService().Plugins(ctx, "type=="+string(plugins.SnapshotPlugin))
	if err != nil {
		return err
	}
	for _, p := range list.Plugins {
		if p.ID != snapshotter {
			continue
		}
		if p.InitErr != nil {
			return errors.New(p.InitErr.Message)
		}
		return nil
	}
	return fmt.Errorf("snapshotter %s: %w", snapshotter, errdefs.ErrNotFound)
}

// CheckPlugin tells whether a snapshotter answers at the address of a proxy plugin.
func CheckPlugin(ctx context.Context, address string) error {
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx = namespaces.WithNamespace(ctx, namespaces.Default)
	_, err = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "").Stat(ctx, "reprise-doctor")
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// A Container is one of containerd's.
type Container struct {
	Namespace string `json:"namespace"` // of containerd
	ID        string `json:"id"`
	// Pod is NAMESPACE/NAME of a Kubernetes pod, and Name that of the container in
	// it; empty for others.
	Pod         string `json:"pod,omitempty"`
	Name        string `json:"name,omitempty"`
	Image       string `json:"image"`
	Snapshotter string `json:"snapshotter"`
	SnapshotKey string `json:"snapshot_key"`
	State       string `json:"state"` // "running", …; "created" without a task
}

// Containers lists those of all namespaces, sorted.
func (c *Containerd) Containers(ctx context.Context) ([]Container, error) {
	all, err := c.c.NamespaceService().List(ctx)
	if err != nil {
		return nil, err
	}
	var list []Container
	for _, ns := range all {
		ctx := namespaces.WithNamespace(ctx, ns)
		found, err := c.c.ContainerService().List(ctx)
		if err != nil {
			return nil, fmt.Errorf("namespace %s: %w", ns, err)
		}
		states := c.states(ctx)
		for _, ctr := range found {
			list = append(list, newContainer(ns, ctr, cmp.Or(states[ctr.ID], "created")))
		}
	}
	slices.SortFunc(list, func(a, b Container) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.ID, b.ID))
	})
	return list, nil
}

// Labels that Kubernetes has for containers.
const (
	labelPodNamespace = "io.kubernetes.pod.namespace"
	labelPodName      = "io.kubernetes.pod.name"
	labelName         = "io.kubernetes.container.name"
)

func newContainer(ns string, ctr containers.Container, state string) Container {
	n := Container{
		Namespace: ns, ID: ctr.ID, Name: ctr.Labels[labelName], Image: ctr.Image,
		Snapshotter: ctr.Snapshotter, SnapshotKey: ctr.SnapshotKey, State: state,
	}
	if pod := ctr.Labels[labelPodName]; pod != "" {
		n.Pod = ctr.Labels[labelPodNamespace] + "/" + pod
	}
	return n
}

// states are those of the tasks of a namespace, as far as they can be had.
func (c *Containerd) states(ctx context.Context) map[string]string {
	m := map[string]string{}
	r, err := c.c.TaskService().List(ctx, &tasksapi.ListTasksRequest{})
	if err != nil {
		return m
	}
	for _, t := range r.Tasks {
		m[t.ID] = strings.ToLower(t.Status.String())
	}
	return m
}

// ImageNames are the images of all namespaces, by the digest of their manifest or
// index.
func (c *Containerd) ImageNames(ctx context.Context) (map[digest.Digest][]string, error) {
	all, err := c.c.NamespaceService().List(ctx)
	if err != nil {
		return nil, err
	}
	names := map[digest.Digest][]string{}
	for _, ns := range all {
		list, err := c.c.ImageService().List(namespaces.WithNamespace(ctx, ns))
		if err != nil {
			return nil, fmt.Errorf("namespace %s: %w", ns, err)
		}
		for _, im := range list {
			names[im.Target.Digest] = append(names[im.Target.Digest], im.Name)
		}
	}
	return names, nil
}

// PauseImage is the image of pods' sandboxes that a namespace has; empty for none.
func (c *Containerd) PauseImage(ctx context.Context, namespace string) (string, error) {
	list, err := c.c.ImageService().List(namespaces.WithNamespace(ctx, namespace), `labels."io.cri-containerd.pinned"==pinned`, `name~=/pause:`)
	if err != nil {
		return "", err
	}
	for _, im := range list {
		if strings.Contains(im.Name, ":") && !strings.HasPrefix(im.Name, "sha256:") && !strings.Contains(im.Name, "@") {
			return im.Name, nil
		}
	}
	return "", nil
}

// ImageState is what containerd has of an image.
type ImageState struct {
	There    bool // it knows the image
	Unpacked bool // for the snapshotter that was asked about
	Content  bool // it has all blobs of it, to unpack it from
}

// Image tells what containerd has of an image in a namespace.
func (c *Containerd) Image(ctx context.Context, namespace, ref, snapshotter string) (ImageState, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	im, err := c.c.GetImage(ctx, ref)
	if errdefs.IsNotFound(err) {
		return ImageState{}, nil
	}
	if err != nil {
		return ImageState{}, err
	}
	s := ImageState{There: true}
	available, _, _, missing, err := images.Check(ctx, c.c.ContentStore(), im.Target(), platforms.Default())
	if err != nil {
		return s, err
	}
	s.Content = available && len(missing) == 0
	s.Unpacked, err = im.IsUnpacked(ctx, snapshotter)
	return s, err
}
