package snapshotter

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
	"github.com/reprise-project/reprise/replayer/node"
)

// mounted tells whether a device is mounted in the directory of a snapshot.
func (s *site) mounted(name string) bool {
	s.t.Helper()
	return isMountpoint(s.sn.dir(s.id(name)))
}

// id is that of a snapshot.
func (s *site) id(name string) string {
	s.t.Helper()
	ids, _, err := s.sn.contents(s.t.Context())
	require.NoError(s.t, err)
	for id, n := range ids {
		if n == name {
			return id
		}
	}
	require.Fail(s.t, "no snapshot "+name)
	return ""
}

func TestContainers(t *testing.T) {
	s := newSite(t, &Options{Linger: time.Millisecond})
	top := s.pulled()
	require.Empty(t, s.server.List(), "nothing is attached before there is a container")

	one, err := s.sn.Prepare(t.Context(), "one", top)
	require.NoError(t, err)
	require.Equal(t, "the base\nthe top\n", s.in(one, "cat base top; echo new > new; rm base"))
	two, err := s.sn.Prepare(t.Context(), "two", top)
	require.NoError(t, err)
	require.Equal(t, "base\nlost+found\ntop\n", s.in(two, "ls"))
	view, err := s.sn.View(t.Context(), "view", top)
	require.NoError(t, err)
	require.Equal(t, "the top\n", s.in(view, "cat top"))
	_, err = s.tryIn(view, "echo > top")
	require.Error(t, err, "it is read-only")
	require.Len(t, s.server.List(), 1)
	again, err := s.sn.Mounts(t.Context(), "one")
	require.NoError(t, err)
	require.Equal(t, one, again)

	usage, err := s.sn.Usage(t.Context(), "one")
	require.NoError(t, err)
	require.Less(t, usage.Size, int64(64<<10), "what it has written")
	usage, err = s.sn.Usage(t.Context(), top)
	require.NoError(t, err)
	require.Less(t, usage.Size, int64(64<<10), "of remote layers there is nothing here")

	require.NoError(t, s.sn.Remove(t.Context(), "view"))
	require.NoError(t, s.sn.Commit(t.Context(), "committed", "one"))
	require.NoError(t, s.sn.Remove(t.Context(), "two"))
	eventually(t, "the device goes", func() bool { return len(s.server.List()) == 0 && !s.mounted(top) })

	three, err := s.sn.Prepare(t.Context(), "three", "committed")
	require.NoError(t, err)
	require.Equal(t, "new\n", s.in(three, "cat new; [ ! -e base ]"))
	require.Error(t, s.sn.Remove(t.Context(), top), "there are others on it")
	require.NoError(t, s.sn.Remove(t.Context(), "three"))
	for _, name := range append([]string{"committed"}, reversed(chainIDs(s.manifest.Layers))...) {
		require.NoError(t, s.sn.Remove(t.Context(), name))
	}
	require.Empty(t, s.server.List(), "the device goes with its snapshot")
	left, err := os.ReadDir(s.sn.root + "/snapshots")
	require.NoError(t, err)
	require.Empty(t, left)
	require.NotContains(t, s.log.String(), "level=WARN")
}

func reversed(list []string) (r []string) {
	for i := range list {
		r = append(r, list[len(list)-1-i])
	}
	return r
}

func TestWritableModes(t *testing.T) {
	for _, mode := range []string{WritableDir, WritableDev} {
		t.Run(mode, func(t *testing.T) {
			s := newSite(t, nil)
			top := s.pulled()
			label := snapshots.WithLabels(map[string]string{LabelWritable: mode})
			one, err := s.sn.Prepare(t.Context(), "one", top, label)
			require.NoError(t, err)
			require.Equal(t, map[string]string{WritableDir: "bind", WritableDev: "ext4"}[mode], one[0].Type)
			two, err := s.sn.Prepare(t.Context(), "two", top, label)
			require.NoError(t, err)
			require.Len(t, s.server.List(), 2, "each has its own, and the image none")
			require.Equal(t, "the base\n", s.in(one, "cat base; echo new > new; rm base; dd if=/dev/urandom of=data bs=1000 count=1000 conv=fsync status=none"))
			require.Equal(t, "base\nlost+found\ntop\n", s.in(two, "ls"))
			usage, err := s.sn.Usage(t.Context(), "one")
			require.NoError(t, err)
			require.Greater(t, usage.Size, int64(1000000))
			require.Less(t, usage.Size, int64(4<<20))
			require.ErrorContains(t, s.sn.Commit(t.Context(), "x", "one"), "writable mode "+mode)

			s.stop() // and with it all devices
			s.o.Writable = WritableDir
			s.start()
			one, err = s.sn.Mounts(t.Context(), "one")
			require.NoError(t, err)
			require.Equal(t, "new\n1000000\n", s.in(one, "cat new; [ ! -e base ]; wc -c < data"))
			_, err = s.sn.Update(t.Context(), snapshots.Info{Name: "one", Labels: map[string]string{"containerd.io/snapshot/x": "y"}})
			require.NoError(t, err)
			again, err := s.sn.Mounts(t.Context(), "one")
			require.NoError(t, err)
			require.Equal(t, one, again, "it stays what it is")

			shared, err := s.sn.Prepare(t.Context(), "shared", top, snapshots.WithLabels(map[string]string{LabelWritable: "overlayfs"}))
			require.NoError(t, err)
			require.Equal(t, "overlay", shared[0].Type)
			three, err := s.sn.Prepare(t.Context(), "three", top)
			require.NoError(t, err)
			require.Equal(t, "bind", three[0].Type, "the default")
			s.in(three, "echo more > more")

			for _, key := range []string{"one", "two", "three", "shared"} {
				require.NoError(t, s.sn.Remove(t.Context(), key))
			}
			for _, name := range reversed(chainIDs(s.manifest.Layers)) {
				require.NoError(t, s.sn.Remove(t.Context(), name))
			}
			require.Empty(t, s.server.List())
			left, err := os.ReadDir(s.sn.root + "/snapshots")
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

// Images whose upper layers are ordinary, or an acceleration layer.
func TestMixedChains(t *testing.T) {
	s := newSite(t, &Options{Linger: time.Millisecond})
	ordinary := s.pushed(layerTar(t, "ordinary", "an ordinary layer\n"), nil)
	more := s.pushed(layerTar(t, "more", "another\n"), nil)
	accel := s.pushed(layerTar(t, "trace", ""), map[string]string{labelAccel: "yes"})
	tests := map[string]struct {
		above []ocispec.Descriptor
		want  string
	}{
		"ordinary":     {[]ocispec.Descriptor{ordinary, more}, "another\nan ordinary layer\nthe top\n"},
		"acceleration": {[]ocispec.Descriptor{accel}, "the top\n"},
		"both":         {[]ocispec.Descriptor{accel, ordinary}, "an ordinary layer\nthe top\n"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			ref, desc, m := s.above(name, tt.above...)
			top := s.pull(ref, desc, m.Layers, func(i int, mounts []mount.Mount) {
				s.in(mounts, map[digest.Digest]string{
					ordinary.Digest: "echo an ordinary layer > ordinary", more.Digest: "echo another > more",
				}[m.Layers[i].Digest])
			})
			for _, label := range []string{"", WritableDir} {
				key := "container" + label
				mounts, err := s.sn.Prepare(t.Context(), key, top, snapshots.WithLabels(map[string]string{LabelWritable: label}))
				require.NoError(t, err)
				require.Equal(t, tt.want, s.in(mounts, "cat more ordinary top 2> /dev/null || :; echo > new"))
				view, err := s.sn.View(t.Context(), key+"view", top)
				require.NoError(t, err)
				require.Equal(t, tt.want, s.in(view, "cat more ordinary top 2> /dev/null || :"))
				require.NoError(t, s.sn.Remove(t.Context(), key))
				require.NoError(t, s.sn.Remove(t.Context(), key+"view"))
			}
			for _, name := range reversed(chainIDs(m.Layers)) {
				require.NoError(t, s.sn.Remove(t.Context(), name))
			}
			eventually(t, "devices go", func() bool { return len(s.server.List()) == 0 })
		})
	}
}

// What could not be mounted is refused when it is pulled.
func TestBadLayers(t *testing.T) {
	s := newSite(t, nil)
	d := digest.FromString("layer").String()
	_, err := s.sn.Prepare(t.Context(), "o", "")
	require.NoError(t, err)
	require.NoError(t, s.sn.Commit(t.Context(), "ordinary", "o"))
	tests := map[string]struct {
		parent string
		labels map[string]string
		want   string
	}{
		"no image":        {"", map[string]string{labelBlobDigest: d}, "disable_snapshot_annotations"},
		"no digest":       {"", map[string]string{labelBlobDigest: "x", snapshotters.TargetRefLabel: s.ref}, "blob-digest"},
		"bad image":       {"", map[string]string{labelBlobDigest: d, snapshotters.TargetRefLabel: "//"}, ""},
		"above ordinary":  {"ordinary", map[string]string{labelBlobDigest: d, snapshotters.TargetRefLabel: s.ref}, "the layer below it is not"},
		"nothing to help": {"", map[string]string{labelAccel: "yes", snapshotters.TargetRefLabel: s.ref}, "the layer below it is not"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tt.labels[snapshots.LabelSnapshotRef] = "target"
			_, err := s.sn.Prepare(t.Context(), "key", tt.parent, snapshots.WithLabels(tt.labels))
			require.ErrorContains(t, err, tt.want)
			require.False(t, errdefs.IsAlreadyExists(err))
			for _, name := range []string{"key", "target"} {
				_, err := s.sn.Stat(t.Context(), name)
				require.True(t, errdefs.IsNotFound(err), "%v", err)
			}
		})
	}
	// The reference's own pull has another label for the image.
	_, err = s.sn.Prepare(t.Context(), "key", "", snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotRef: "target", labelBlobDigest: d, labelImageRef: s.ref,
	}))
	require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
	c, err := s.sn.chain(t.Context(), "target")
	require.NoError(t, err)
	require.Equal(t, s.ref, c.ref)
}

// A device that somebody has unmounted is mounted again, for those that use it too.
func TestUnmountedByOthers(t *testing.T) {
	s := newSite(t, nil)
	top := s.pulled()
	one, err := s.sn.Prepare(t.Context(), "one", top)
	require.NoError(t, err)
	dir := s.sn.dir(s.id(top))
	other := s.t.TempDir()
	require.NoError(t, unix.Mount(dir, other, "", unix.MS_BIND, "")) // as a container's
	defer func() { require.NoError(t, unix.Unmount(other, unix.MNT_DETACH)) }()
	before := s.server.List()[0].Device
	require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
	_, err = s.sn.Mounts(t.Context(), "one")
	require.NoError(t, err)
	require.Equal(t, "the top\n", s.in(one, "cat top"))
	require.Equal(t, before, s.server.List()[0].Device)

	// Nothing holds it any more: a new one.
	require.NoError(t, unix.Unmount(other, unix.MNT_DETACH))
	require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
	defer func(err error) { require.NoError(t, err) }(unix.Mount(t.TempDir(), other, "", unix.MS_BIND, ""))
	two, err := s.sn.Prepare(t.Context(), "two", top)
	require.NoError(t, err)
	require.Equal(t, "the top\n", s.in(two, "cat top"))
}

// Somebody keeps the device of an image busy that is removed.
func TestRemovedWhileInUse(t *testing.T) {
	s := newSite(t, &Options{Linger: 10 * time.Millisecond})
	top := s.pulled()
	_, err := s.sn.View(t.Context(), "view", top)
	require.NoError(t, err)
	dir := s.sn.dir(s.id(top))
	f := exec.Command("sleep", "3600")
	f.Dir = dir
	require.NoError(t, f.Start())
	defer func() { _ = f.Process.Kill(); _ = f.Wait() }()
	require.NoError(t, s.sn.Remove(t.Context(), "view"))
	eventually(t, "it is said", func() bool { return strings.Contains(s.log.String(), "stays for now") })
	require.NoError(t, s.sn.Remove(t.Context(), top))
	require.DirExists(t, dir)
	require.Len(t, s.server.List(), 1)
	require.NoError(t, s.sn.Cleanup(t.Context()))
	require.Equal(t, 1, strings.Count(s.log.String(), "stays for now"), "once")
	require.NoError(t, f.Process.Kill())
	_ = f.Wait()
	eventually(t, "it goes by itself", func() bool {
		_, err := os.Stat(filepath.Dir(dir))
		return os.IsNotExist(err)
	})
	require.Empty(t, s.server.List())
}

// What a daemon that was killed has left.
func TestRestore(t *testing.T) {
	s := newSite(t, &Options{Linger: time.Millisecond})
	top := s.pulled()
	_, err := s.sn.Prepare(t.Context(), "used", top)
	require.NoError(t, err)
	base := chainIDs(s.manifest.Layers)[0]
	s.o.Linger = time.Hour
	require.NoError(t, s.sn.Close())
	s.sn, err = New(t.Context(), s.sn.root, s.server, &s.o)
	require.NoError(t, err)
	_, err = s.sn.View(t.Context(), "unused", base)
	require.NoError(t, err)
	require.NoError(t, s.sn.Remove(t.Context(), "unused"))
	require.True(t, s.mounted(base), "it lingers")
	orphan := filepath.Join(s.sn.root, "snapshots", "4711", "fs")
	require.NoError(t, os.MkdirAll(orphan, 0o700))
	half := filepath.Join(s.sn.root, "snapshots", "new-123", "fs")
	require.NoError(t, os.MkdirAll(half, 0o700))
	_, err = s.server.Attach(t.Context(), &node.Request{ID: deviceID("4711"), Ref: s.ref, Dir: orphan}, nil)
	require.NoError(t, err)
	require.Len(t, s.server.List(), 3)

	s.o.Linger = time.Millisecond
	require.NoError(t, s.sn.Close())
	s.sn, err = New(t.Context(), s.sn.root, s.server, &s.o)
	require.NoError(t, err)
	eventually(t, "orphans go", func() bool {
		left, err := filepath.Glob(filepath.Join(s.sn.root, "snapshots", "[4n]*"))
		require.NoError(t, err)
		return len(s.server.List()) == 1 && len(left) == 0 && !s.mounted(base)
	})
	require.True(t, s.mounted(top), "it is used")
	require.NoError(t, s.sn.Remove(t.Context(), "used"))
	eventually(t, "all go", func() bool { return len(s.server.List()) == 0 })
}

// A Prepare that fails leaves nothing, and takes nothing from others.
func TestFailedPrepare(t *testing.T) {
	s := newSite(t, &Options{Linger: time.Millisecond})
	top := s.pulled()
	for _, mode := range []string{WritableOverlayfs, WritableDir} {
		label := snapshots.WithLabels(map[string]string{LabelWritable: mode})
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := s.sn.Prepare(gone, "one", top, label)
		require.Error(t, err)
		s.SetFault(func(*http.Request) *regtest.Fault { return &regtest.Fault{Status: http.StatusForbidden} })
		_, err = s.sn.Prepare(t.Context(), "one", top, label)
		require.ErrorContains(t, err, s.ref[:strings.LastIndex(s.ref, ":")])
		s.SetFault(nil)
		_, err = s.sn.Stat(t.Context(), "one")
		require.True(t, errdefs.IsNotFound(err), "%v", err)

		mounts, err := s.sn.Prepare(t.Context(), "one", top, label)
		require.NoError(t, err)
		_, err = s.sn.Prepare(t.Context(), "one", top, label)
		require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
		_, err = s.sn.Prepare(gone, "one", top, label)
		require.Error(t, err)
		for range 20 { // and not later either
			time.Sleep(time.Millisecond)
			require.Len(t, s.server.List(), 1)
		}
		require.Equal(t, "the top\n", s.in(mounts, "cat top"))
		require.NoError(t, s.sn.Remove(t.Context(), "one"))
		eventually(t, "it goes", func() bool { return len(s.server.List()) == 0 })
	}
	s.sn.devices.mu.Lock()
	defer s.sn.devices.mu.Unlock()
	require.LessOrEqual(t, len(s.sn.devices.by), 1)
}

// Containers come and go at once, and the device with them.
func TestManyAtOnce(t *testing.T) {
	s := newSite(t, &Options{Linger: time.Millisecond})
	top := s.pulled()
	var g errgroup.Group
	for i := range 6 {
		g.Go(func() error {
			r := rand.New(rand.NewPCG(uint64(i), 0))
			for n := range 6 {
				key := fmt.Sprintf("%d-%d", i, n)
				mode := []string{WritableOverlayfs, WritableOverlayfs, WritableOverlayfs, WritableDir}[r.IntN(4)]
				label := snapshots.WithLabels(map[string]string{LabelWritable: mode})
				mounts, err := s.sn.Prepare(t.Context(), key, top, label)
				if err != nil {
					return fmt.Errorf("prepare %s: %w", key, err)
				}
				if out, err := s.tryIn(mounts, "cat top"); err != nil || out != "the top\n" {
					return fmt.Errorf("%s: %s: %w", key, out, err)
				}
				if r.IntN(2) == 0 {
					if _, err = s.sn.Mounts(t.Context(), key); err != nil {
						return err
					}
				}
				if err := s.sn.Remove(t.Context(), key); err != nil {
					return err
				}
			}
			return nil
		})
	}
	require.NoError(t, g.Wait())
	eventually(t, "the devices go", func() bool { return len(s.server.List()) == 0 })
	eventually(t, "all is forgotten", func() bool {
		s.sn.devices.mu.Lock()
		defer s.sn.devices.mu.Unlock()
		return len(s.sn.devices.by) == 0
	})
	left, err := os.ReadDir(s.sn.root + "/snapshots")
	require.NoError(t, err)
	require.Len(t, left, 2)
	require.NotContains(t, s.log.String(), "level=ERROR")
}

// aheadDevices tells what is looked up ahead.
type aheadDevices struct {
	noDevices
	asked chan string
}

func (d aheadDevices) Ahead(ctx context.Context, r *node.Request) error {
	d.asked <- r.Ref
	<-ctx.Done() // nobody waits for it
	return ctx.Err()
}

// The trace is looked up when the first layer of an image is prepared.
func TestLookAhead(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for name, o := range map[string]*Options{
		"on": nil, "off": {NoAhead: true},
		"no trace": {Request: func(r *node.Request) { r.Trace = "none" }},
	} {
		t.Run(name, func(t *testing.T) {
			d := aheadDevices{asked: make(chan string, 3)}
			s, err := New(t.Context(), t.TempDir(), d, o)
			require.NoError(t, err)
			parent := ""
			for _, id := range []string{"base", "top"} {
				manifest := digest.FromString("manifest")
				_, err = s.Prepare(t.Context(), "key", parent, snapshots.WithLabels(map[string]string{
					snapshots.LabelSnapshotRef: id, labelBlobDigest: digest.FromString(id).String(),
					snapshotters.TargetRefLabel: "docker.io/library/x:1", snapshotters.TargetManifestDigestLabel: manifest.String(),
				}))
				require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
				if parent = id; id == "base" && name == "on" {
					require.Equal(t, "docker.io/library/x@"+manifest.String(), <-d.asked)
				}
			}
			require.NoError(t, s.Close(), "it ends what is under way")
			require.Empty(t, d.asked)
		})
	}
}

// A client that passes no labels on unpacks the archive around a layer.
func TestUnpackedWrapper(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	s, err := New(t.Context(), t.TempDir(), noDevices{}, nil)
	require.NoError(t, err)
	defer s.Close()
	mounts, err := s.Prepare(t.Context(), "extract-1 chain", "")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(mounts[0].Source, "overlaybd.commit"), []byte("x"), 0o600))
	err = s.Commit(t.Context(), "chain", "extract-1 chain")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "reprise pull")
	require.NoError(t, os.WriteFile(filepath.Join(mounts[0].Source, "other"), nil, 0o600))
	require.NoError(t, s.Commit(t.Context(), "chain", "extract-1 chain"))
}

func TestBadOptions(t *testing.T) {
	_, err := New(t.Context(), t.TempDir(), noDevices{}, &Options{Writable: "both"})
	require.ErrorContains(t, err, `writable mode "both"`)
}

// The mounts of containers in user namespaces say how owners are mapped, if that is
// the mount's work.
func TestRemapIDs(t *testing.T) {
	for _, remap := range []bool{false, true} {
		s := newSite(t, &Options{RemapIDs: remap})
		top := s.pulled()
		label := snapshots.WithLabels(map[string]string{
			snapshots.LabelSnapshotUIDMapping: "0:100000:65536", snapshots.LabelSnapshotGIDMapping: "0:200000:65536",
		})
		mounts, err := s.sn.Prepare(t.Context(), "active", top, label)
		require.NoError(t, err)
		view, err := s.sn.View(t.Context(), "view", top, label)
		require.NoError(t, err)
		require.Equal(t, "bind", view[0].Type)
		for _, m := range append(mounts, view...) {
			require.Equal(t, remap, slices.Contains(m.Options, "uidmap=0:100000:65536"), m.Options)
			require.Equal(t, remap, slices.Contains(m.Options, "gidmap=0:200000:65536"), m.Options)
		}
		var st unix.Stat_t
		require.NoError(t, unix.Stat(s.sn.dir(s.id("active")), &st))
		require.Equal(t, []uint32{100000, 200000}, []uint32{st.Uid, st.Gid}, "its root is root's")
	}
}
