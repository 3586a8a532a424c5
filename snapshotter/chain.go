package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/reprise-project/reprise/backstore/registry"
	"github.com/reprise-project/reprise/replayer/node"
)

// Labels of snapshots. Those of the reference are the annotations of layers, which
// containerd passes on: see
// https://github.com/containerd/accelerated-container-image/blob/main/docs/IMAGE_CONVERTOR.md
const (
	labelBlobDigest = "containerd.io/snapshot/overlaybd/blob-digest"
	labelAccel      = "containerd.io/snapshot/overlaybd/acceleration-layer"
	labelImageRef   = "containerd.io/snapshot/image-ref" // of the reference's own pull

	// LabelWorkload, on a container's snapshot, names the workload whose trace is
	// replayed. The CRI passes annotations of a container on whose names begin as
	// this one's does.
	LabelWorkload = "containerd.io/snapshot/reprise.workload"
)

// keptLabels are those by which it is known what a snapshot is.
var keptLabels = []string{
	labelBlobDigest, labelAccel, labelImageRef, LabelWritable, snapshots.LabelSnapshotRef,
	snapshotters.TargetRefLabel, snapshotters.TargetManifestDigestLabel,
}

// isLayer tells whether the labels are those of a layer in overlaybd format, or of
// an acceleration layer, which is above those and has no files.
func isLayer(labels map[string]string) bool { return labels[labelBlobDigest] != "" || isAccel(labels) }

func isAccel(labels map[string]string) bool { return labels[labelAccel] == "yes" }

// A chain is a remote snapshot with its parents.
type chain struct {
	id       string          // of the topmost remote snapshot
	ref      string          // of the image, with the digest of its manifest if that is known
	layers   []digest.Digest // from the base up; without acceleration layers
	ordinary int             // snapshots above it, up to what it was asked for
}

func (c *chain) device() string { return deviceID(c.id) }

// deviceID names the device of a chain.
func deviceID(snapshot string) string { return "snapshot-" + snapshot }

// chain is the chain that a committed snapshot is of or on; nil if it is on none.
func (s *Snapshotter) chain(ctx context.Context, name string) (c *chain, err error) {
	err = s.read(ctx, func(ctx context.Context) error {
		c, err = s.chainOf(ctx, name)
		return err
	})
	return c, err
}

// deviceUnder is the ID of the remote snapshot whose device the snapshot of a key
// needs; empty if it needs none, or one of its own.
func (s *Snapshotter) deviceUnder(ctx context.Context, key string) (id string, err error) {
	err = s.read(ctx, func(ctx context.Context) error {
		_, info, _, err := storage.GetInfo(ctx, key)
		if err == nil {
			id, err = s.deviceOf(ctx, info)
		}
		return err
	})
	return id, err
}

// deviceOf is deviceUnder in a transaction.
func (s *Snapshotter) deviceOf(ctx context.Context, info snapshots.Info) (string, error) {
	if info.Kind == snapshots.KindCommitted {
		return "", nil
	}
	if mode, _, _ := s.writableMode(ctx, info); mode != "" {
		return "", nil
	}
	for name := info.Parent; name != ""; {
		id, info, _, err := storage.GetInfo(ctx, name)
		if err != nil || isLayer(info.Labels) {
			return id, err
		}
		name = info.Parent
	}
	return "", nil
}

// need tells whether there is a snapshot of an ID, and whether its device is needed:
// by itself, or by containers on it.
func (s *Snapshotter) need(ctx context.Context, id string) (there, needed bool, err error) {
	err = s.read(ctx, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if errdefs.IsNotFound(err) { // there has never been a snapshot
			return nil
		}
		if err != nil {
			return err
		}
		var name string
		if name, there = ids[id]; !there {
			return nil
		}
		_, info, _, err := storage.GetInfo(ctx, name)
		switch {
		case err != nil:
			return err
		case info.Kind != snapshots.KindCommitted:
			mode, _, err := s.writableMode(ctx, info)
			needed = mode != ""
			return err
		case !isLayer(info.Labels):
			return nil
		}
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			on, err := s.deviceOf(ctx, info)
			needed = needed || on == id
			return err
		})
	})
	return there, needed, err
}

// chainOf is chain in a transaction.
func (s *Snapshotter) chainOf(ctx context.Context, name string) (*chain, error) {
	var c *chain
	ordinary := 0
	for name != "" {
		id, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return nil, err
		}
		switch {
		case !isLayer(info.Labels) && c != nil:
			return nil, fmt.Errorf("snapshot %s: a layer in overlaybd format on one that is not: %w", name, errdefs.ErrFailedPrecondition)
		case !isLayer(info.Labels):
			ordinary++
		case c == nil:
			ref, err := imageRef(info.Labels)
			if err != nil {
				return nil, fmt.Errorf("snapshot %s: %w", name, err)
			}
			c = &chain{id: id, ref: ref, ordinary: ordinary}
			fallthrough
		default:
			if !isAccel(info.Labels) {
				c.layers = append(c.layers, digest.Digest(info.Labels[labelBlobDigest]))
			}
		}
		name = info.Parent
	}
	if c != nil && len(c.layers) == 0 {
		return nil, fmt.Errorf("an acceleration layer without layers below it: %w", errdefs.ErrFailedPrecondition)
	}
	if c != nil {
		slices.Reverse(c.layers)
	}
	return c, nil
}

// errNoRef is a layer whose image is not known.
var errNoRef = errors.New("containerd does not say of which image the layer is: set disable_snapshot_annotations = false in its configuration, or pull with 'reprise pull'")

// imageRef is what a layer's labels say of its image.
func imageRef(labels map[string]string) (string, error) {
	ref := labels[snapshotters.TargetRefLabel]
	if ref == "" {
		ref = labels[labelImageRef]
	}
	if ref == "" {
		return "", errNoRef
	}
	r, err := registry.ParseReference(ref)
	if err != nil {
		return "", err
	}
	manifest, err := digest.Parse(labels[snapshotters.TargetManifestDigestLabel])
	if err != nil {
		return ref, nil
	}
	return r.Name() + "@" + manifest.String(), nil
}

// prepareLayer makes the remote snapshot of a layer.
func (s *Snapshotter) prepareLayer(ctx context.Context, key, target, parent string, labels map[string]string) error {
	if err := s.checkLayer(ctx, parent, labels); err != nil {
		return fmt.Errorf("layer %s: %w", labels[labelBlobDigest], err)
	}
	set := snapshots.WithLabels(labels)
	if _, err := s.plain.Prepare(ctx, key, parent, set); err != nil {
		return err
	}
	if err := s.plain.Commit(ctx, target, key, set); err != nil {
		return errors.Join(err, s.Remove(context.WithoutCancel(ctx), key))
	}
	if parent == "" {
		s.lookAhead(labels)
	}
	return fmt.Errorf("snapshot %s of layer %s is loaded lazily: %w", target, labels[labelBlobDigest], errdefs.ErrAlreadyExists)
}

// aheadTime bounds the lookup of a trace during a pull, which nobody waits for.
const aheadTime = 10 * time.Second

// lookAhead looks for the trace of an image whose pull begins, beside that: the
// first container finds it.
func (s *Snapshotter) lookAhead(labels map[string]string) {
	of, can := s.devices.of.(interface {
		Ahead(ctx context.Context, r *node.Request) error
	})
	ref, err := imageRef(labels)
	if !can || err != nil || s.o.NoAhead {
		return
	}
	r := &node.Request{Ref: ref}
	s.o.Request(r)
	if r.Trace != "auto" {
		return
	}
	s.devices.background(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, aheadTime)
		defer cancel()
		if err := of.Ahead(ctx, r); err != nil && ctx.Err() == nil {
			s.o.Log.Debug("the trace is not looked up ahead", "image", ref, "err", err)
		}
	})
}

// checkLayer refuses now what could not be mounted later.
func (s *Snapshotter) checkLayer(ctx context.Context, parent string, labels map[string]string) error {
	if _, err := digest.Parse(labels[labelBlobDigest]); err != nil && !isAccel(labels) {
		return fmt.Errorf("label %s: %w", labelBlobDigest, err)
	}
	if _, err := imageRef(labels); err != nil {
		return err
	}
	if parent == "" && !isAccel(labels) {
		return nil
	}
	c, err := s.chain(ctx, parent)
	if err == nil && (c == nil || c.ordinary > 0) {
		err = fmt.Errorf("it is in overlaybd format, and the layer below it is not: %w", errdefs.ErrFailedPrecondition)
	}
	return err
}

// request asks for the device of a snapshot on a chain.
func (s *Snapshotter) request(c *chain, id string, labels map[string]string) *node.Request {
	r := &node.Request{ID: deviceID(id), Ref: c.ref, Layers: c.layers, Workload: labels[LabelWorkload]}
	s.o.Request(r)
	s.o.Record.record(r)
	return r
}

// attach makes sure that the chain's device is mounted. It is held.
func (s *Snapshotter) attach(ctx context.Context, c *chain, labels map[string]string) error {
	r := s.request(c, c.id, labels)
	r.Dir = s.dir(c.id)
	_, err := s.devices.attach(ctx, c.id, r)
	return refusedPull(err)
}

// onDevice has the mounts of a container's snapshot lead to the chain's device:
// below its directory are those of the layers that it consists of, which are empty.
func (s *Snapshotter) onDevice(c *chain, mounts []mount.Mount) []mount.Mount {
	dev := s.dir(c.id)
	for i, m := range mounts {
		if m.Type != "overlay" {
			continue
		}
		upper := slices.ContainsFunc(m.Options, func(o string) bool { return strings.HasPrefix(o, "upperdir=") })
		for j, o := range m.Options {
			dirs, ok := strings.CutPrefix(o, "lowerdir=")
			if !ok {
				continue
			}
			lower := strings.Split(dirs, ":")
			if at := slices.Index(lower, dev); at >= 0 {
				lower = lower[:at+1]
			}
			m.Options[j] = "lowerdir=" + strings.Join(lower, ":")
			if len(lower) == 1 && !upper { // overlayfs needs two
				mounts[i] = mount.Mount{Type: "bind", Source: dev, Options: append(mapped(m.Options), "ro", "rbind")}
			}
		}
	}
	return mounts
}

// mapped are the options that map the owners of files.
func mapped(options []string) []string {
	return slices.DeleteFunc(slices.Clone(options), func(o string) bool {
		return !strings.HasPrefix(o, "uidmap=") && !strings.HasPrefix(o, "gidmap=")
	})
}
