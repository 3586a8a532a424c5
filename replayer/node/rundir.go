package node

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// A container's own files are in a directory below Root/run that its process
// has locked. One that nobody locks was left by a process that was killed.

// A runDir is the directory of one container.
type runDir struct {
	path    string
	lock    *os.File
	log     *slog.Logger
	removal sync.WaitGroup // of what killed processes have left
}

// newRunDir makes a directory for one container, and begins to remove those
// of killed processes.
func newRunDir(root string, log *slog.Logger) (*runDir, error) {
	base := filepath.Join(root, "run")
	if err := os.MkdirAll(base, 0o711); err != nil {
		return nil, fmt.Errorf("state directory: %w; name another with --root", err)
	}
	// With the lock on base, none of the directories in it is being made.
	all, err := lockDir(base, unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer all.Close()
	stale := staleDirs(base)
	d := &runDir{log: log}
	if d.path, err = os.MkdirTemp(base, ""); err == nil {
		d.lock, err = lockDir(d.path, unix.LOCK_EX)
	}
	for _, f := range stale {
		d.removal.Go(func() {
			removeDir(f.Name(), log)
			_ = f.Close()
		})
	}
	if err != nil {
		_ = os.Remove(d.path)
		d.removal.Wait()
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return d, nil
}

// remove removes the directory, and returns when all removals are through.
func (d *runDir) remove() {
	removeDir(d.path, d.log)
	_ = d.lock.Close()
	d.removal.Wait()
}

func removeDir(path string, log *slog.Logger) {
	if err := os.RemoveAll(path); err != nil {
		log.Warn("remove a container's directory", "err", err)
	}
}

// reapRunDirs removes the directories of killed processes.
func reapRunDirs(root string, log *slog.Logger) {
	base := filepath.Join(root, "run")
	all, err := lockDir(base, unix.LOCK_EX)
	if err != nil {
		return
	}
	defer all.Close()
	for _, f := range staleDirs(base) {
		removeDir(f.Name(), log)
		_ = f.Close()
	}
}

// staleDirs locks the directories in base that nobody has locked.
func staleDirs(base string) (stale []*os.File) {
	entries, err := os.ReadDir(base)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if f, err := lockDir(filepath.Join(base, e.Name()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			stale = append(stale, f)
		}
	}
	return stale
}

// lockDir locks a directory until it is closed.
func lockDir(path string, how int) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}
