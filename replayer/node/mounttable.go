package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/reprise-project/reprise/backstore/device"
)

// mounts lists what of this mount namespace's table pick chooses. A table that
// cannot be read counts as empty.
func mounts(pick func(*mountinfo.Info) bool) []*mountinfo.Info {
	list, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return !pick(m), false })
	if err != nil {
		return nil
	}
	return list
}

// isMountPoint reports whether anything is mounted at dir.
func isMountPoint(dir string) bool {
	return len(mounts(func(m *mountinfo.Info) bool { return m.Mountpoint == dir })) > 0
}

// mountedAt reports whether dev is mounted at dir, or below other mounts there.
func mountedAt(dir, dev string) bool { return slices.Contains(device.Mounts(dev), dir) }

// mounted reports whether dev is mounted anywhere: also where dir was moved, or
// bound to.
func mounted(dev string) bool { return len(device.Mounts(dev)) > 0 }

// backingOf is what the kernel calls the backing file of a loop device, empty
// if it has none. It tells one user of /dev/loopN from the next.
func backingOf(dev string) string {
	p, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev), "loop/backing_file"))
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(p), "\n")
}

// resolveDir is dir, absolute and without symbolic links as far as it can be
// looked at: the root of a dead mount cannot.
func resolveDir(dir string) string {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return dir
	}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		return real
	}
	if parent, err := filepath.EvalSymlinks(filepath.Dir(abs)); err == nil {
		return filepath.Join(parent, filepath.Base(abs))
	}
	return abs
}

// checkMountPoint makes sure that an image can be mounted at dir.
func checkMountPoint(dir string) error {
	fi, err := os.Stat(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("mount point %s: no such directory: make it first", dir)
	case err != nil:
		return fmt.Errorf("mount point: %w", err)
	case !fi.IsDir():
		return fmt.Errorf("mount point %s: not a directory", dir)
	case isMountPoint(dir):
		return fmt.Errorf("mount point %s: something is mounted there already; unmount it or name another directory", dir)
	}
	return nil
}
