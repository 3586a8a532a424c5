package node

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"
)

func TestMountTable(t *testing.T) {
	require.True(t, isMountPoint("/proc"))
	require.False(t, isMountPoint(t.TempDir()))
	proc := mounts(func(m *mountinfo.Info) bool { return m.Mountpoint == "/proc" })
	require.NotEmpty(t, proc)
	require.True(t, mountedAt("/proc", proc[0].Source))
	require.True(t, mounted(proc[0].Source))
	require.False(t, mountedAt("/proc", "/dev/nosuchdevice"))
	require.False(t, mounted("/dev/nosuchdevice"))
	require.Empty(t, backingOf("/dev/nosuchdevice"))
}

func TestMountPoint(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(dir+"/real", 0o755))
	require.NoError(t, os.Symlink("real", dir+"/link"))
	require.NoError(t, os.WriteFile(dir+"/file", nil, 0o644))
	for path, want := range map[string]string{
		dir + "/real": "real", dir + "/link": "real", dir + "/link/": "real", dir + "/link/missing": "real/missing",
		dir + "/missing": "missing", dir + "/real/../link": "real",
	} {
		require.Equal(t, filepath.Join(dir, want), resolveDir(path), path)
	}
	t.Chdir(dir)
	require.Equal(t, dir+"/real", resolveDir("link"))

	require.NoError(t, checkMountPoint(dir+"/real"))
	require.ErrorContains(t, checkMountPoint(dir+"/file"), "not a directory")
	require.ErrorContains(t, checkMountPoint(dir+"/missing"), "make it first")
	require.ErrorContains(t, checkMountPoint("/proc"), "something is mounted there already")
}

// Locks are of an opening, so that this process stands for several.
func TestState(t *testing.T) {
	n, _ := openNode(t)
	dir := t.TempDir()
	path := statePath(n.Root(), dir)
	_, err := openState(path, os.O_RDWR)
	require.ErrorIs(t, err, os.ErrNotExist)

	s, err := n.claimState(t.Context(), dir)
	require.NoError(t, err)
	require.Zero(t, s.read(), "nothing yet")
	want := MountState{Dir: dir, Ref: "image", Device: "/dev/nosuchdevice", Pid: 42}
	require.NoError(t, s.write(MountState{Dir: dir, Ref: "a longer name than that"}))
	require.NoError(t, s.write(want))
	require.Equal(t, want, s.read())
	_, err = openState(path, os.O_RDWR)
	require.ErrorIs(t, err, errLocked)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = n.claimState(ctx, dir)
	require.ErrorIs(t, err, context.Canceled)

	// Other processes' mounts are left alone.
	require.NoError(t, Reap(t.Context(), n.Root(), dir, 43))
	require.ErrorIs(t, Reap(ctx, n.Root(), dir, 42), context.Canceled, "it lives")
	require.ErrorIs(t, Unmount(ctx, n.Root(), dir), context.Canceled)
	require.FileExists(t, path)

	// It dies.
	require.NoError(t, os.WriteFile(s.upper(), nil, 0o600))
	require.NoError(t, s.f.Close())
	require.NoError(t, Reap(t.Context(), n.Root(), dir, 43))
	require.FileExists(t, path)
	require.NoError(t, Reap(t.Context(), n.Root(), dir, 42))
	require.NoFileExists(t, path)
	require.NoFileExists(t, s.upper())
	require.NoError(t, Reap(t.Context(), n.Root(), dir, 42), "again")
	require.ErrorIs(t, Unmount(t.Context(), n.Root(), dir), ErrNotMounted)
}

func TestUnmountOfWhatWasKilled(t *testing.T) {
	n, _ := openNode(t)
	dir := t.TempDir()
	path := statePath(n.Root(), dir)
	for name, m := range map[string]MountState{
		"mounted": {Dir: dir, Device: "/dev/nosuchdevice", Pid: 42}, "before it had mounted": {Dir: dir, Pid: 42},
	} {
		s, err := n.claimState(t.Context(), dir)
		require.NoError(t, err)
		require.NoError(t, s.write(m))
		require.NoError(t, s.f.Close())
		err = Unmount(t.Context(), n.Root(), dir)
		if m.Device == "" {
			require.ErrorIs(t, err, ErrNotMounted, name)
		} else {
			require.NoError(t, err, name)
		}
		require.NoFileExists(t, path)
	}
	// What is in the way of a new mount, too.
	require.NoError(t, os.WriteFile(path, []byte("not JSON"), 0o600))
	s, err := n.claimState(t.Context(), dir)
	require.NoError(t, err)
	require.NoError(t, s.remove())
}

// A mount that comes to its end makes room for the next, which waits for it.
func TestStateIsWaitedFor(t *testing.T) {
	n, _ := openNode(t)
	dir := t.TempDir()
	first, err := n.claimState(t.Context(), dir)
	require.NoError(t, err)
	require.NoError(t, first.write(MountState{Dir: dir, Device: "/dev/nosuchdevice", Pid: 42}))
	second := make(chan error)
	unmounted := make(chan error)
	go func() {
		s, err := n.claimState(t.Context(), dir)
		if err == nil {
			err = s.remove()
		}
		second <- err
	}()
	go func() { unmounted <- Unmount(t.Context(), n.Root(), dir) }()
	require.NoError(t, first.remove())
	require.NoError(t, <-second)
	if err := <-unmounted; err != nil { // it may have come too late
		require.ErrorIs(t, err, ErrNotMounted)
	}
}

func TestRunDir(t *testing.T) {
	n, log := openNode(t)
	base := filepath.Join(n.Root(), "run")
	killed, err := n.newRunDir()
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(killed.path+"/work", 0o700))
	require.NoError(t, os.Mkdir(killed.path+"/work/work", 0o000)) // as overlayfs makes it
	running, err := n.newRunDir()
	require.NoError(t, err)
	require.DirExists(t, killed.path, "it still runs")
	require.NoError(t, killed.lock.Close())

	next, err := n.newRunDir()
	require.NoError(t, err)
	next.remove(n)
	left, err := os.ReadDir(base)
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.Equal(t, filepath.Base(running.path), left[0].Name())
	running.remove(n)
	require.NoDirExists(t, running.path)
	require.Empty(t, log.String())

	require.NoError(t, os.Remove(base))
	require.NoError(t, os.WriteFile(base, nil, 0o600))
	_, err = n.newRunDir()
	require.ErrorContains(t, err, "state directory")
}

func TestPause(t *testing.T) {
	require.NoError(t, pause(t.Context(), time.Nanosecond))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, pause(ctx, time.Hour), context.Canceled)
}
