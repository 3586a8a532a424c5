package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/replayer/node"
)

// LabelWritable, on a container's snapshot that is directly on an image in
// overlaybd format, chooses where the container's writes go. It is the
// reference's, as its values are.
const LabelWritable = "containerd.io/snapshot/overlaybd.writable"

// Values of [LabelWritable]. Others are [WritableOverlayfs].
const (
	// WritableOverlayfs has writes go to a directory, by overlayfs. The image's
	// device is shared by all containers.
	WritableOverlayfs = "overlayfs"
	// WritableDir gives the container a device of its own, which is mounted in the
	// snapshot's directory; what is written goes to a file.
	WritableDir = "dir"
	// WritableDev is like WritableDir, but who mounts the snapshot mounts the
	// device itself.
	WritableDev = "dev"
)

// A writableSnapshot is a container's with a device of its own.
type writableSnapshot struct {
	id, mode string
	chain    *chain
	labels   map[string]string
}

// writableMode is that of an active snapshot, in a transaction; empty if it has no
// device of its own.
func (s *Snapshotter) writableMode(ctx context.Context, info snapshots.Info) (string, *chain, error) {
	mode := info.Labels[LabelWritable]
	if mode != WritableDir && mode != WritableDev || !isContainer(info) {
		return "", nil, nil
	}
	c, err := s.chainOf(ctx, info.Parent)
	if err != nil || c == nil || c.ordinary > 0 {
		return "", nil, err
	}
	return mode, c, nil
}

// isContainer tells an active snapshot of a container from one that a layer is
// being unpacked to.
func isContainer(info snapshots.Info) bool {
	return info.Kind == snapshots.KindActive && info.Labels[snapshots.LabelSnapshotRef] == ""
}

// writable is the snapshot of a key if it has a device of its own, else nil.
func (s *Snapshotter) writable(ctx context.Context, key string) (w *writableSnapshot, err error) {
	err = s.read(ctx, func(ctx context.Context) error {
		id, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		mode, c, err := s.writableMode(ctx, info)
		if mode != "" {
			w = &writableSnapshot{id: id, mode: mode, chain: c, labels: info.Labels}
		}
		return err
	})
	return w, err
}

// wantsOwn tells whether a snapshot that is to be made has a device of its own, and
// how that is noted.
func (s *Snapshotter) wantsOwn(ctx context.Context, parent string, labels map[string]string) (own bool, note snapshots.Opt, err error) {
	mode, there := labels[LabelWritable]
	if !there {
		mode = s.o.Writable
	}
	set := map[string]string{LabelWritable: mode}
	info := snapshots.Info{Kind: snapshots.KindActive, Parent: parent, Labels: map[string]string{
		LabelWritable: mode, snapshots.LabelSnapshotRef: labels[snapshots.LabelSnapshotRef],
	}}
	err = s.read(ctx, func(ctx context.Context) error {
		mode, _, err := s.writableMode(ctx, info)
		own = mode != ""
		return err
	})
	return own, snapshots.WithLabels(set), err
}

// prepareWritable makes a container's snapshot with a device of its own.
func (s *Snapshotter) prepareWritable(ctx context.Context, key, parent string, opts []snapshots.Opt) ([]mount.Mount, error) {
	if _, err := s.plain.Prepare(ctx, key, parent, opts...); err != nil {
		return nil, err
	}
	w, err := s.writable(ctx, key)
	if err == nil && w == nil {
		err = fmt.Errorf("snapshot %s: what is below it has changed: %w", key, errdefs.ErrUnavailable)
	}
	mounts, err := s.writableMounts(ctx, w, err)
	if err != nil {
		return nil, errors.Join(err, s.Remove(context.WithoutCancel(ctx), key))
	}
	return mounts, nil
}

// writableMounts attaches the device of a container's own and says how it is
// mounted. An error is passed through.
func (s *Snapshotter) writableMounts(ctx context.Context, w *writableSnapshot, err error) ([]mount.Mount, error) {
	if err != nil {
		return nil, err
	}
	defer s.devices.hold(w.id)()
	r := s.request(w.chain, w.id, w.labels)
	r.Writable, r.Upper = true, s.upper(w.id)
	if w.mode == WritableDir {
		r.Dir = s.dir(w.id)
	}
	st, err := s.devices.attach(ctx, w.id, r)
	if err != nil {
		return nil, refusedPull(err)
	}
	if w.mode == WritableDir {
		return []mount.Mount{{Type: "bind", Source: r.Dir, Options: []string{"rw", "rbind"}}}, nil
	}
	return []mount.Mount{deviceMount(st)}, nil
}

// deviceMount mounts a device of a container's own.
func deviceMount(st *node.Status) mount.Mount {
	m := mount.Mount{Type: st.FSType, Source: st.Device, Options: []string{"rw"}}
	if st.FSType == "ext4" {
		m.Options = append(m.Options, "discard")
	}
	return m
}

// upper is the file that what is written to a snapshot's device goes to.
func (s *Snapshotter) upper(id string) string {
	return filepath.Join(filepath.Dir(s.dir(id)), "upper")
}

// writableUsage is what a container has written to its device.
func (s *Snapshotter) writableUsage(id string) (u snapshots.Usage, err error) {
	for _, path := range []string{s.upper(id), s.upper(id) + backstore.DiscardsSuffix} {
		var st unix.Stat_t
		err := unix.Stat(path, &st)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return u, fmt.Errorf("usage of snapshot %s: %w", id, err)
		}
		u.Size += st.Blocks * 512
		u.Inodes++
	}
	return u, nil
}
