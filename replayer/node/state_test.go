package node

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/stretchr/testify/require"

	"github.com/reprise-project/reprise/backstore/device"
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

func newState(root, dir string) *state {
	id := NewID()
	return &state{Version: stateVersion, Request: Request{ID: id, Ref: "image"}, Dir: dir, Socket: PrivateSocket(root, id), Pid: 42}
}

// live has somebody listen at the socket of a state, until the function it
// returns is called.
func (s *state) live(t *testing.T) (die func()) {
	l, err := listen(s.Socket)
	require.NoError(t, err)
	return func() { require.NoError(t, l.Close()) }
}

func TestState(t *testing.T) {
	n, _ := openNode(t)
	root, dir := n.Root(), t.TempDir()
	_, err := stateOf(root, dir)
	require.ErrorIs(t, err, ErrNotMounted)
	require.ErrorIs(t, Unmount(t.Context(), root, dir), ErrNotMounted)
	require.NoError(t, Reap(root))
	require.NoDirExists(t, devicesDir(root))

	require.NoError(t, makeDevicesDir(root))
	s := newState(root, dir)
	die := s.live(t)
	require.NoError(t, s.claim(t.Context(), root))
	got, err := stateOf(root, dir)
	require.NoError(t, err)
	require.Equal(t, s, got)
	s.Image = &imageState{FSType: "ext4"}
	s.Device = &device.State{ID: s.Request.ID, Size: 4096}
	require.NoError(t, s.write(root, true))
	require.NoError(t, s.claim(t.Context(), root), "it is its own")
	got, err = readState(statePath(root, s.Request.ID))
	require.NoError(t, err)
	require.Equal(t, s, got)
	files, err := os.ReadDir(devicesDir(root))
	require.NoError(t, err)
	require.Len(t, files, 2, "state and socket")

	// The mount point is taken, as long as there is somebody.
	other := newState(root, dir)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, other.claim(ctx, root), context.Canceled)
	require.NoError(t, Reap(root))
	require.FileExists(t, statePath(root, s.Request.ID))
	die()
	require.NoError(t, other.claim(t.Context(), root))
	require.NoFileExists(t, statePath(root, s.Request.ID))
	require.NoFileExists(t, s.Socket)
	require.NoError(t, os.WriteFile(upperPath(root, other.Request.ID), nil, 0o600))
	require.NoError(t, Reap(root))
	files, err = os.ReadDir(devicesDir(root))
	require.NoError(t, err)
	require.Empty(t, files)
}

func TestUnmountOfWhatWasKilled(t *testing.T) {
	n, _ := openNode(t)
	root, dir := n.Root(), t.TempDir()
	require.NoError(t, makeDevicesDir(root))
	for name, path := range map[string]string{"mounted": "/dev/nosuchdevice", "before it had mounted": ""} {
		s := newState(root, dir)
		s.Path = path
		s.live(t)()
		require.NoError(t, s.write(root, false))
		err := Unmount(t.Context(), root, dir)
		if path == "" {
			require.ErrorIs(t, err, ErrNotMounted, name)
		} else {
			require.NoError(t, err, name)
		}
		files, err := os.ReadDir(devicesDir(root))
		require.NoError(t, err)
		require.Empty(t, files, name)
	}
}

// State files are read as what anybody may have written.
func TestBadStates(t *testing.T) {
	good := newState("/r", "/d")
	p, err := json.Marshal(good)
	require.NoError(t, err)
	_, err = parseState(p)
	require.NoError(t, err)
	for bad, says := range map[string]string{
		"": "unexpected end", "[]": "cannot unmarshal", "{}": "version 0", `{"version": 2}`: "version 2, this program knows 1",
		`{"version": 1}`: "an ID is", `{"version": 1, "request": {"id": "../x"}}`: "an ID is",
		`{"version": 1, "request": {"id": "a"}, "device": {"id": "b"}}`: `describes device "b"`,
	} {
		_, err := parseState([]byte(bad))
		require.ErrorContains(t, err, says, bad)
	}
	n, _ := openNode(t)
	require.NoError(t, makeDevicesDir(n.Root()))
	require.NoError(t, os.WriteFile(statePath(n.Root(), "dev-other"), p, 0o600))
	list, err := states(n.Root())
	require.ErrorContains(t, err, "it is of device")
	require.Empty(t, list)
}

func FuzzState(f *testing.F) {
	p, err := json.Marshal(newState("/r", "/d"))
	require.NoError(f, err)
	f.Add(p)
	f.Fuzz(func(t *testing.T, p []byte) {
		s, err := parseState(p)
		if err != nil {
			return
		}
		again, err := json.Marshal(s)
		require.NoError(t, err)
		_, err = parseState(again)
		require.NoError(t, err)
	})
}

func TestRunDir(t *testing.T) {
	n, log := openNode(t)
	base := filepath.Join(n.Root(), "run")
	killed, err := newRunDir(n.Root(), n.o.Log)
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(killed.path+"/work", 0o700))
	require.NoError(t, os.Mkdir(killed.path+"/work/work", 0o000)) // as overlayfs makes it
	running, err := newRunDir(n.Root(), n.o.Log)
	require.NoError(t, err)
	require.DirExists(t, killed.path, "it still runs")
	require.NoError(t, killed.lock.Close())

	next, err := newRunDir(n.Root(), n.o.Log)
	require.NoError(t, err)
	next.remove()
	left, err := os.ReadDir(base)
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.Equal(t, filepath.Base(running.path), left[0].Name())
	running.remove()
	require.NoDirExists(t, running.path)
	require.Empty(t, log.String())

	require.NoError(t, os.Remove(base))
	require.NoError(t, os.WriteFile(base, nil, 0o600))
	_, err = newRunDir(n.Root(), n.o.Log)
	require.ErrorContains(t, err, "state directory")
}

func TestPause(t *testing.T) {
	require.NoError(t, pause(t.Context(), time.Nanosecond))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, pause(ctx, time.Hour), context.Canceled)
}
