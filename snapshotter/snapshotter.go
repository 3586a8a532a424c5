// Package snapshotter is a containerd snapshotter: images in overlaybd format
// start before their layers are on the node, from one block device an image.
//
// # Nouns
//
// A remote snapshot is a committed snapshot of an overlaybd layer. It is there as
// soon as containerd asks for it, and nothing of the layer is fetched. A chain is
// a remote snapshot with its parents, down to the base; its device is attached when
// the first container is prepared on it, mounted read-only in the snapshot's
// directory, shared by all containers, and released some time after the last of
// them. All other snapshots are those of containerd's overlayfs snapshotter, whose
// directories and metadata these are as well.
//
//	container   snapshots/9/fs + work     overlayfs: upper
//	ordinary    snapshots/8/fs            overlayfs: lower, such as of a commit
//	remote      snapshots/7/fs  ⇐ device  overlayfs: lower, layers 1 to 3 as one
//	remote      snapshots/6/fs  (empty)
//	remote      snapshots/5/fs  (empty)
//
// A container may have a device of its own instead, and no overlayfs: see
// [LabelWritable]. What it writes is in a file in its snapshot's directory, until the
// snapshot is removed, and cannot be committed.
//
// Who needs a device is not counted but looked up in the metadata, when it could go:
// nothing is lost when the process is killed, and at the next start what is left of
// snapshots that are not there any more is taken away.
//
// # Concurrency
//
// A Snapshotter is safe for concurrent use. Close it before what serves its
// devices; that does not release them.
//
// # Deadlocks
//
// The process that serves the devices must not read files of a chain; whoever
// mounts what Prepare returns is another process.
package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"

	"github.com/reprise-project/reprise/replayer/node"
)

// Options are the settings of a [Snapshotter]. A zero field means its default.
type Options struct {
	// Request, if set, completes the request for the device of a chain: how the
	// registry is reached, and which trace is replayed. Ref, ID, Dir, Layers and
	// Workload are set before. Default: the trace is "auto".
	Request func(r *node.Request)
	// Record, if set, has containers recorded that start on images without a trace.
	Record *RecordOptions
	// Linger is how long a device stays when no container uses it any more, 30 s
	// by default.
	Linger time.Duration
	// Writable is what containers without [LabelWritable] have,
	// [WritableOverlayfs] by default.
	Writable string
	// RemapIDs has the owners of files mapped by the mount for containers in user
	// namespaces. It needs Linux 5.19, and the capability "remap-ids" in
	// containerd's configuration of the plugin, without which containerd copies the
	// image.
	RemapIDs bool
	// NoAhead leaves the lookup of traces to the first container of an image. By
	// default they are looked up while the image is being pulled, beside that.
	NoAhead bool
	// Log receives warnings, slog.Default() by default.
	Log *slog.Logger
}

const defaultLinger = 30 * time.Second

func (o *Options) filled() (Options, error) {
	var f Options
	if o != nil {
		f = *o
	}
	if f.Request == nil {
		f.Request = func(r *node.Request) { r.Trace = "auto" }
	}
	if f.Linger <= 0 {
		f.Linger = defaultLinger
	}
	if f.Log == nil {
		f.Log = slog.Default()
	}
	modes := []string{WritableOverlayfs, WritableDir, WritableDev}
	if f.Writable == "" {
		f.Writable = WritableOverlayfs
	}
	if !slices.Contains(modes, f.Writable) {
		return f, fmt.Errorf("writable mode %q: one of %s", f.Writable, strings.Join(modes, ", "))
	}
	return f, nil
}

// A Snapshotter implements [snapshots.Snapshotter] and [snapshots.Cleaner].
type Snapshotter struct {
	plain snapshots.Snapshotter // overlayfs; it shares meta and the directories
	meta  *storage.MetaStore
	root  string
	o     Options

	devices *devices
	closing sync.Once
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New makes a snapshotter with its state in the directory root, which is made,
// and its devices of d.
func New(ctx context.Context, root string, d node.Devices, o *Options) (*Snapshotter, error) {
	f, err := o.filled()
	if err != nil {
		return nil, fmt.Errorf("snapshotter: %w", err)
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	meta, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		return nil, fmt.Errorf("snapshotter: %w", err)
	}
	// It removes no directories by itself: a device may be mounted there.
	opts := []overlay.Opt{overlay.WithMetaStore(meta), overlay.AsynchronousRemove}
	if f.RemapIDs {
		opts = append(opts, overlay.WithRemapIDs)
	}
	plain, err := overlay.NewSnapshotter(root, opts...)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("snapshotter: %w", err), meta.Close())
	}
	s := &Snapshotter{plain: plain, meta: meta, root: root, o: f}
	s.devices = newDevices(d, f.Linger, f.Log)
	s.devices.need, s.devices.gone = s.need, s.removeDir
	if err := s.restore(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("snapshotter: %w", err), s.Close())
	}
	return s, nil
}

// restore takes away what a process that was killed has left of snapshots that
// are not there, and has devices released that no container has come to use.
func (s *Snapshotter) restore(ctx context.Context) error {
	ids, dirs, err := s.contents(ctx)
	if err != nil {
		return err
	}
	for _, id := range dirs {
		if _, there := ids[id]; !there {
			s.devices.later(id, 0)
		} else if isMountpoint(s.dir(id)) {
			s.devices.later(id, s.o.Linger)
		}
	}
	return nil
}

// contents are the names of snapshots by their IDs, and the directories of
// snapshots that there are, or were.
func (s *Snapshotter) contents(ctx context.Context) (ids map[string]string, dirs []string, err error) {
	// In a write transaction, so that no snapshot is being made meanwhile.
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if ids, err = storage.IDMap(ctx); err != nil && !errdefs.IsNotFound(err) { // there has never been one
			return err
		}
		entries, err := os.ReadDir(filepath.Join(s.root, "snapshots"))
		for _, e := range entries {
			dirs = append(dirs, e.Name())
		}
		return err
	})
	return ids, dirs, err
}

func (s *Snapshotter) read(ctx context.Context, f func(context.Context) error) error {
	return s.meta.WithTransaction(ctx, false, f)
}

// Close implements [snapshots.Snapshotter]. Devices stay as they are.
func (s *Snapshotter) Close() (err error) {
	s.closing.Do(func() {
		s.devices.close()
		err = s.plain.Close() // and meta
	})
	return err
}

// Stat implements [snapshots.Snapshotter].
func (s *Snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	return s.plain.Stat(ctx, key)
}

// Update implements [snapshots.Snapshotter]. Labels stay by which it is known what a
// snapshot is.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fields ...string) (snapshots.Info, error) {
	old, err := s.plain.Stat(ctx, info.Name)
	if err != nil {
		return snapshots.Info{}, err
	}
	info.Labels = maps.Clone(info.Labels)
	for _, label := range keptLabels {
		switch v, there := old.Labels[label]; {
		case !there:
			delete(info.Labels, label)
		case info.Labels == nil:
			info.Labels = map[string]string{label: v}
		default:
			info.Labels[label] = v
		}
	}
	return s.plain.Update(ctx, info, fields...)
}

// Usage implements [snapshots.Snapshotter]. A remote snapshot takes nothing: what
// is on the node of its layer belongs to the chunk cache.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	w, err := s.writable(ctx, key)
	if err != nil {
		return snapshots.Usage{}, err
	}
	if w != nil {
		return s.writableUsage(w.id)
	}
	return s.plain.Usage(ctx, key)
}

// Walk implements [snapshots.Snapshotter].
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.plain.Walk(ctx, fn, filters...)
}

// Prepare implements [snapshots.Snapshotter]. For a layer in overlaybd format it
// makes the snapshot that the layer would be unpacked to, and returns an error that
// matches errdefs.ErrAlreadyExists; containerd does not fetch the layer then. On a
// chain it returns once the chain's device is mounted.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	labels, err := labelsOf(opts)
	if err != nil {
		return nil, err
	}
	if target := labels[snapshots.LabelSnapshotRef]; target != "" && isLayer(labels) {
		return nil, s.prepareLayer(ctx, key, target, parent, labels)
	}
	if own, more, err := s.wantsOwn(ctx, parent, labels); err != nil {
		return nil, err
	} else if own {
		return s.prepareWritable(ctx, key, parent, append(opts, more))
	}
	return s.prepare(ctx, key, parent, labels, func() ([]mount.Mount, error) {
		return s.plain.Prepare(ctx, key, parent, opts...)
	})
}

// View implements [snapshots.Snapshotter], with the device as [Snapshotter.Prepare].
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	labels, err := labelsOf(opts)
	if err != nil {
		return nil, err
	}
	return s.prepare(ctx, key, parent, labels, func() ([]mount.Mount, error) {
		return s.plain.View(ctx, key, parent, opts...)
	})
}

// prepare makes a snapshot for a container, on a device if its parent is on one.
func (s *Snapshotter) prepare(ctx context.Context, key, parent string, labels map[string]string, create func() ([]mount.Mount, error)) ([]mount.Mount, error) {
	c, err := s.chain(ctx, parent)
	if err != nil {
		return nil, err
	}
	if c == nil {
		return create()
	}
	defer s.devices.hold(c.id)()
	if err := s.attach(ctx, c, labels); err != nil {
		return nil, err
	}
	mounts, err := create()
	if err != nil {
		return nil, err
	}
	return s.onDevice(c, mounts), nil
}

// Mounts implements [snapshots.Snapshotter]. The device is attached again where it
// is gone, as after the machine has been started anew.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	info, err := s.plain.Stat(ctx, key)
	if err != nil {
		return nil, err
	}
	if w, err := s.writable(ctx, key); err != nil || w != nil {
		return s.writableMounts(ctx, w, err)
	}
	c, err := s.chain(ctx, info.Parent)
	if err != nil {
		return nil, err
	}
	if c != nil && info.Kind != snapshots.KindCommitted {
		defer s.devices.hold(c.id)()
		if err := s.attach(ctx, c, info.Labels); err != nil {
			return nil, err
		}
	}
	mounts, err := s.plain.Mounts(ctx, key)
	if err != nil || c == nil {
		return mounts, err
	}
	return s.onDevice(c, mounts), nil
}

// Commit implements [snapshots.Snapshotter]. What was written on a chain becomes an
// ordinary snapshot above it; what was written to a device of a container's own
// cannot be committed. Nor can a layer in overlaybd format that was downloaded and
// unpacked as if it were an archive of files: a client that does not pass labels on
// does that, and the container would find one file.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	if w, err := s.writable(ctx, key); err != nil {
		return err
	} else if w != nil {
		return fmt.Errorf("commit of snapshot %s, which is in writable mode %s: %w", key, w.mode, errdefs.ErrNotImplemented)
	}
	if s.isWrapper(ctx, key) {
		return fmt.Errorf("commit of snapshot %s: it is a layer in overlaybd format, unpacked by a client that does not say so: pull the image with 'reprise pull', or through the CRI: %w", key, errdefs.ErrFailedPrecondition)
	}
	id, _ := s.deviceUnder(ctx, key)
	if err := s.plain.Commit(ctx, name, key, opts...); err != nil {
		return err
	}
	if id != "" {
		s.devices.later(id, s.o.Linger)
	}
	return nil
}

// wrapped is the one file in the archive that wraps a layer in overlaybd format.
const wrapped = "overlaybd.commit"

// isWrapper tells whether a snapshot holds such an archive's content, and no more.
func (s *Snapshotter) isWrapper(ctx context.Context, key string) bool {
	var id string
	err := s.read(ctx, func(ctx context.Context) (err error) {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return false
	}
	entries, err := os.ReadDir(s.dir(id)) // the container's own directory, on no device
	return err == nil && len(entries) == 1 && entries[0].Name() == wrapped && entries[0].Type().IsRegular()
}

// Remove implements [snapshots.Snapshotter]. The directory of the snapshot is gone
// when it returns, unless somebody still uses the device that is mounted there:
// then it goes once nobody does.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	under, _ := s.deviceUnder(ctx, key)
	var id string
	err := s.read(ctx, func(ctx context.Context) (err error) {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	if err := s.plain.Remove(ctx, key); err != nil {
		return err
	}
	if under != "" {
		s.devices.later(under, s.o.Linger)
	}
	s.devices.tend(ctx, id)
	return nil
}

// removeDir removes the directory of a removed snapshot, whose device is gone.
func (s *Snapshotter) removeDir(id string) error {
	if dir := s.dir(id); isMountpoint(dir) { // not this program's; what is in it is somebody's
		return fmt.Errorf("something else is mounted at %s", dir)
	}
	return os.RemoveAll(filepath.Dir(s.dir(id)))
}

// Cleanup implements [snapshots.Cleaner]: it removes the directories of snapshots
// that are not there any more.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	ids, dirs, err := s.contents(ctx)
	if err != nil {
		return err
	}
	for _, id := range dirs {
		if _, there := ids[id]; !there {
			s.devices.tend(ctx, id)
		}
	}
	return nil
}

// dir is where the files of a snapshot are.
func (s *Snapshotter) dir(id string) string { return filepath.Join(s.root, "snapshots", id, "fs") }

func labelsOf(opts []snapshots.Opt) (map[string]string, error) {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	return info.Labels, nil
}
