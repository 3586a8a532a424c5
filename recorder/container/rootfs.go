package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// runDir is a directory, made once and left empty, that each stage covers with a
// tmpfs of its own. What lies on that, nothing outside the stage sees, and it
// ends with the stage.
const runDir = "/run/reprise/container"

// Places on that tmpfs.
const (
	lowerDir  = runDir + "/lower"
	stateDir  = runDir + "/state" // upper and work: the caller's StateDir, or the tmpfs itself
	mergedDir = runDir + "/merged"
	bundleDir = runDir + "/bundle"
	runcDir   = runDir + "/runc"
	pidFile   = bundleDir + "/pid"
	logFile   = bundleDir + "/log"
)

// privateMounts keeps our mounts from the machine, and makes runDir and /proc
// ours. Slave, not private: what the machine unmounts, we must not hold on to.
func privateMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("reprise", runDir, "tmpfs", unix.MS_NOSUID, "mode=0700"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", runDir, err)
	}
	for _, dir := range []string{lowerDir, stateDir, mergedDir, bundleDir, runcDir} {
		if err := os.Mkdir(dir, 0o711); err != nil {
			return err
		}
	}
	if err := dropImages(); err != nil {
		return err
	}
	return freezeCgroups()
}

// dropImages lets go of the mounts of other images, of which this namespace has
// copies: where the machine's mounts do not propagate, as without systemd, they
// would keep those images' devices busy for as long as this container runs.
func dropImages() error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return !served(m), false })
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	for _, m := range mounts {
		_ = unix.Unmount(m.Mountpoint, unix.MNT_DETACH) // or it went by itself
	}
	return nil
}

// served tells whether a mount's source is a loop device over a file that a
// server shows in no directory, and so under a path that does not exist; or, for
// EROFS, that file itself.
func served(m *mountinfo.Info) bool {
	if m.FSType == "erofs" && strings.HasPrefix(filepath.Base(m.Source), "reprise") {
		return true
	}
	name, ok := strings.CutPrefix(m.Source, "/dev/loop")
	if !ok {
		return false
	}
	file, err := os.ReadFile("/sys/block/loop" + name + "/loop/backing_file")
	if err != nil {
		return false
	}
	_, err = os.Stat(strings.TrimSuffix(string(file), "\n"))
	return errors.Is(err, os.ErrNotExist)
}

// freezeCgroups makes the cgroup hierarchies read-only in this mount namespace,
// so that runc can make no cgroup that would outlive a killed stage.
func freezeCgroups() error {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return fmt.Errorf("list cgroup mounts: %w", err)
	}
	if len(mounts) == 0 {
		return errors.New("no cgroup file system is mounted, and runc wants one: mount -t cgroup2 cgroup2 /sys/fs/cgroup")
	}
	for _, m := range mounts {
		err := unix.Mount("", m.Mountpoint, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
		covered := errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) // by another mount
		if err != nil && !covered {
			return fmt.Errorf("make %s read-only: %w", m.Mountpoint, err)
		}
	}
	return nil
}

// mountRoot mounts the container's root file system on mergedDir. trees are the
// directory of a Device that is a file, or the detached mount of LowerDir, and
// that of StateDir, in this order, of those that are set.
func mountRoot(cfg *Config, trees []*os.File) error {
	switch {
	case cfg.LowerDir != "":
		if err := attach(trees[0], lowerDir); err != nil {
			return fmt.Errorf("lower directory %s: %w", cfg.LowerDir, err)
		}
		trees = trees[1:]
	case cfg.deviceIsFile():
		if err := mountDevice(cfg, fmt.Sprintf("/proc/self/fd/%d/%s", trees[0].Fd(), filepath.Base(cfg.Device))); err != nil {
			return err
		}
		trees = trees[1:]
	default:
		if err := mountDevice(cfg, cfg.Device); err != nil {
			return err
		}
	}
	if cfg.StateDir != "" {
		if err := attach(trees[0], stateDir); err != nil {
			return fmt.Errorf("state directory %s: %w", cfg.StateDir, err)
		}
	}
	return mountOverlay(cfg.StateDir)
}

// attach mounts a detached tree.
func attach(tree *os.File, dir string) error {
	return unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// deviceIsFile tells a file of a server, which EROFS mounts, from a block device:
// it is in the server's own /proc/PID/fd, which the stage cannot see.
func (cfg *Config) deviceIsFile() bool { return strings.HasPrefix(cfg.Device, "/proc/") }

func mountDevice(cfg *Config, source string) error {
	err := unix.Mount(source, lowerDir, cfg.FSType, unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOATIME, cfg.MountOptions)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("mount %s: the kernel has no file system %s: modprobe %s", cfg.Device, cfg.FSType, cfg.FSType)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("mount %s: no %s file system on it, or one that this kernel cannot mount with options %q (dmesg says which)", cfg.Device, cfg.FSType, cfg.MountOptions)
	}
	return fmt.Errorf("mount %s as %s: %w", cfg.Device, cfg.FSType, err)
}

// mountOverlay puts a writable layer over the lower directory. Its root looks
// like the lower one's. Nobody reads the layer after a crash, so it is volatile:
// no sync when it is unmounted (Linux 5.10).
func mountOverlay(state string) error {
	upper, work := stateDir+"/upper", stateDir+"/work"
	for _, dir := range []string{upper, work} {
		if err := os.Mkdir(dir, 0o755); errors.Is(err, os.ErrExist) {
			return fmt.Errorf("state directory %s: it holds the state of another container: give an empty one", state)
		} else if err != nil {
			return fmt.Errorf("state directory %s: %w", state, err)
		}
	}
	if err := sameOwner(lowerDir, upper); err != nil {
		return err
	}
	options := []string{"lowerdir=" + lowerDir, "upperdir=" + upper, "workdir=" + work, "volatile"}
	err := unix.Mount("overlay", mergedDir, "overlay", unix.MS_NODEV, strings.Join(options, ","))
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount("overlay", mergedDir, "overlay", unix.MS_NODEV, strings.Join(options[:3], ","))
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENODEV):
		return errors.New("mount overlay: the kernel has no overlayfs: modprobe overlay")
	case errors.Is(err, unix.EINVAL) && state != "":
		return fmt.Errorf("mount overlay: the file system of state directory %s cannot be its upper one (dmesg says why): give a directory on ext4, xfs or tmpfs", state)
	}
	return fmt.Errorf("mount overlay: %w", err)
}

// sameOwner gives dst the owner and mode of src.
func sameOwner(src, dst string) error {
	var st unix.Stat_t
	if err := unix.Stat(src, &st); err != nil {
		return fmt.Errorf("stat the image's root: %w", err)
	}
	if err := unix.Chown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("chown %s: %w", dst, err)
	}
	if err := unix.Chmod(dst, st.Mode&0o7777); err != nil {
		return fmt.Errorf("chmod %s: %w", dst, err)
	}
	return nil
}

// unmountRoot undoes mountRoot, as far as it came. It returns when the image's
// device is free, as no other mount namespace is left when it is called.
func unmountRoot() {
	for _, dir := range []string{mergedDir, stateDir, lowerDir} {
		if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW); errors.Is(err, unix.EBUSY) {
			_ = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
	}
}

// tree is a detached mount of dir. It carries a directory that this process sees
// into the mount namespace of the stage, however late it was mounted here.
func tree(dir string) (*os.File, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, abs, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), abs), nil
}
