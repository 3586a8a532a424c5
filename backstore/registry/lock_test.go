package registry

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestLockFiles takes one lock in many clients at once, as many processes do: one
// at a time has it, and no file is left.
func TestLockFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "locks")
	var wg sync.WaitGroup
	var held atomic.Int64
	for range 8 {
		c, _ := newClient(t, Options{LockDir: dir})
		wg.Go(func() {
			for range 50 {
				unlock, err := c.lock(t.Context(), "key")
				if err != nil {
					t.Error(err)
					return
				}
				if n := held.Add(1); n != 1 {
					t.Errorf("%d hold it", n)
				}
				held.Add(-1)
				unlock()
			}
		})
	}
	wg.Wait()
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

// TestLockLeftBehind takes a lock whose file somebody left who was killed, and one
// that is never free.
func TestLockLeftBehind(t *testing.T) {
	dir := t.TempDir()
	c, _ := newClient(t, Options{LockDir: dir})
	other, _ := newClient(t, Options{LockDir: dir})
	f, err := c.lockFile(t.Context(), "key")
	require.NoError(t, err)
	require.NoError(t, f.Close()) // and the file stays
	unlock, err := c.lock(t.Context(), "key")
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	waits := make(chan error)
	go func() {
		_, err := other.lock(ctx, "key")
		waits <- err
	}()
	cancel()
	require.ErrorIs(t, <-waits, context.Canceled)
	unlock()
	_, err = os.Stat(f.Name())
	require.True(t, errors.Is(err, os.ErrNotExist))
}

func TestDefaultLockDir(t *testing.T) {
	dir := lockDir()
	require.True(t, filepath.IsAbs(dir))
	if os.Getuid() == 0 {
		if fi, err := os.Stat("/run/lock"); err == nil && ownerOf(fi) == 0 {
			require.Equal(t, "/run/lock/reprise", dir)
		}
	}
}
