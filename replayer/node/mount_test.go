package node

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// vectorImage is the reference's three-layer ext4 image, where it can be
// mounted.
func vectorImage(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		f, err := os.OpenFile(dev, os.O_RDWR, 0)
		if err != nil {
			t.Skipf("needs %s: %v", dev, err)
		}
		f.Close()
	}
	dir, err := os.Getwd()
	require.NoError(t, err)
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		require.NotEqual(t, "/", dir, "no go.mod above the working directory")
		dir = filepath.Dir(dir)
	}
	config := filepath.Join(dir, "../shared/vectors/ext4-64m/config.v1.json")
	if _, err := os.Stat(config); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("vectors: %v", err)
		}
		t.Skipf("vectors: %v", err)
	}
	return config
}

// A mount in this process, which therefore must not look into it. TestMain sees
// what it leaks.
func TestMount(t *testing.T) {
	config := vectorImage(t)
	n, _ := openNode(t)
	dir := t.TempDir()
	for _, writable := range []bool{false, true} {
		begun := MountState{}
		o := &MountOptions{Writable: writable, Begin: func(s MountState) error { begun = s; return nil }}
		m, err := n.Mount(t.Context(), config, dir, o)
		require.NoError(t, err)
		require.Equal(t, os.Getpid(), begun.Pid)
		require.Empty(t, begun.Device, "before it is mounted")
		require.True(t, mountedAt(dir, m.State.Device))
		require.Contains(t, m.State.Backing, "reprise:")
		require.FileExists(t, statePath(n.Root(), dir))
		_, err = n.Mount(t.Context(), config, dir, o)
		require.ErrorContains(t, err, "another reprise process")

		waited := make(chan error)
		go func() { waited <- m.Wait(context.Background()) }()
		if writable { // as umount(8) does
			require.NoError(t, unix.Unmount(dir, 0))
		} else {
			require.NoError(t, m.Close())
		}
		require.NoError(t, <-waited)
		require.NoError(t, m.Close())
		require.NoError(t, m.Close(), "again")
		require.False(t, mounted(m.State.Device))
		left, err := filepath.Glob(filepath.Join(n.Root(), "mounts", "*"))
		require.NoError(t, err)
		require.Empty(t, left)
	}
}

func TestMountErrors(t *testing.T) {
	config := vectorImage(t)
	n, _ := openNode(t)
	dir := t.TempDir()
	boom := errors.New("boom")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	tests := map[string]struct {
		ctx  context.Context
		ref  string
		o    MountOptions
		want error
	}{
		"Begin":   {t.Context(), config, MountOptions{Begin: func(MountState) error { return boom }}, boom},
		"ended":   {ended, config, MountOptions{}, context.Canceled},
		"missing": {t.Context(), "missing.json", MountOptions{}, os.ErrNotExist},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := n.Mount(tt.ctx, tt.ref, dir, &tt.o)
			require.ErrorIs(t, err, tt.want)
			require.False(t, isMountPoint(dir))
			require.NoFileExists(t, statePath(n.Root(), dir))
		})
	}
}
