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
	"os"
	"path/filepath"
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
	// Linger is how long a device stays when no container uses it any more, 30 s
	// by default.
	Linger time.Duration
	// Log receives warnings, slog.Default() by default.
	Log *slog.Logger
}

const defaultLinger = 30 * time.Second

func (o *Options) filled() Options {
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
	return f
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
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	meta, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		return nil, fmt.Errorf("snapshotter: %w", err)
	}
	// It removes no directories by itself: a device may be mounted there.
	plain, err := overlay.NewSnapshotter(root, overlay.WithMetaStore(meta), overlay.AsynchronousRemove)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("snapshotter: %w", err), meta.Close())
	}
	s := &Snapshotter{plain: plain, meta: meta, root: root, o: o.filled()}
	s.devices = newDevices(d, s.o.Linger, s.o.Log)
	if err := s.restore(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("snapshotter: %w", err), s.Close())
	}
	return s, nil
}

// restore finds out which containers use which chains.
func (s *Snapshotter) restore(ctx context.Context) error {
	err := s.read(ctx, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Kind == snapshots.KindCommitted {
				return nil
			}
			c, err := s.chainOf(ctx, info.Parent)
			if err != nil || c == nil {
				return err
			}
			s.devices.use(c.device(), info.Name)
			return nil
		})
	})
	if errdefs.IsNotFound(err) { // there has never been a snapshot
		return nil
	}
	return err
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

// Update implements [snapshots.Snapshotter].
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fields ...string) (snapshots.Info, error) {
	return s.plain.Update(ctx, info, fields...)
}

// Usage implements [snapshots.Snapshotter]. A remote snapshot takes nothing: what
// is on the node of its layer belongs to the chunk cache.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
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
	id := c.device()
	s.devices.use(id, key)
	mounts, err := func() ([]mount.Mount, error) {
		if err := s.attach(ctx, c, labels); err != nil {
			return nil, err
		}
		return create()
	}()
	if err != nil {
		if !errdefs.IsAlreadyExists(err) { // who has made it uses the device
			s.devices.unuse(id, key)
		}
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
	c, err := s.chain(ctx, info.Parent)
	if err != nil {
		return nil, err
	}
	if c != nil {
		s.devices.use(c.device(), key)
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
// ordinary snapshot above it.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	c, err := s.chainUnder(ctx, key)
	if err != nil {
		return err
	}
	if err := s.plain.Commit(ctx, name, key, opts...); err != nil {
		return err
	}
	if c != nil {
		s.devices.unuse(c.device(), key)
	}
	return nil
}

// Remove implements [snapshots.Snapshotter]. The directory of the snapshot is gone
// when it returns, unless somebody still uses the device that is mounted there:
// then it goes with a later Remove or Cleanup.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	c, err := s.chainUnder(ctx, key)
	if err != nil {
		return err
	}
	var id string
	err = s.read(ctx, func(ctx context.Context) (err error) {
		id, _, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	if err := s.plain.Remove(ctx, key); err != nil {
		return err
	}
	if c != nil {
		s.devices.unuse(c.device(), key)
	}
	s.removeDir(ctx, id)
	return nil
}

// removeDir takes a removed snapshot's device and directory away.
func (s *Snapshotter) removeDir(ctx context.Context, id string) {
	if err := s.devices.release(ctx, deviceID(id)); err != nil {
		s.o.Log.Warn("the device of a removed snapshot stays for now", "snapshot", id, "err", err)
		return
	}
	if isMountpoint(s.dir(id)) { // not this program's; what is in it is somebody's
		s.o.Log.Warn("something is mounted in the directory of a removed snapshot", "dir", s.dir(id))
		return
	}
	if err := os.RemoveAll(filepath.Dir(s.dir(id))); err != nil {
		s.o.Log.Warn("the directory of a removed snapshot stays for now", "snapshot", id, "err", err)
	}
}

// Cleanup implements [snapshots.Cleaner]: it removes the directories of snapshots
// that are not there any more.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	var ids map[string]string
	var entries []os.DirEntry
	// In a write transaction, so that no snapshot is being made meanwhile.
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if ids, err = storage.IDMap(ctx); err != nil {
			return err
		}
		entries, err = os.ReadDir(filepath.Join(s.root, "snapshots"))
		return err
	})
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, there := ids[e.Name()]; !there {
			s.removeDir(ctx, e.Name())
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
