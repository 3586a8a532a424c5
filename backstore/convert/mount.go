package convert

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// An ext4Mount is a mounted file system that is attached nowhere: only its
// descriptor leads to it, and the kernel unmounts it when the last one goes,
// however the process ends.
type ext4Mount struct {
	fd  int
	dev string
}

// mountOptions keep out of the layer what does not come from its tar. The
// optional ones are younger than the oldest kernel that can do the rest.
var mountOptions = []struct {
	key      string
	optional bool
}{
	{key: "noinit_itable"},
	{key: "no_prefetch_block_bitmaps", optional: true}, // Linux 5.10
}

func mountExt4(dev string) (*ext4Mount, error) {
	fs, err := unix.Fsopen("ext4", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, mountError("fsopen ext4", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetString(fs, "source", dev); err != nil {
		return nil, mountError("source", err)
	}
	if err := unix.FsconfigSetString(fs, "errors", "remount-ro"); err != nil {
		return nil, mountError("errors", err)
	}
	for _, o := range mountOptions {
		if err := unix.FsconfigSetFlag(fs, o.key); err != nil && !o.optional {
			return nil, mountError(o.key, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, mountError("mount "+dev, err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOATIME|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOSUID)
	if err != nil {
		return nil, mountError("fsmount", err)
	}
	return &ext4Mount{fd: fd, dev: dev}, nil
}

func mountError(what string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return errNotRoot
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%s: %w (detached mounts need Linux 5.2)", what, err)
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%s: the kernel has no ext4", what)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// sync writes everything to the device and reports what went wrong with any
// write since the mount.
func (m *ext4Mount) sync() error {
	root, err := unix.Openat(m.fd, ".", openDir, 0) // fsmount gives an O_PATH descriptor
	if err != nil {
		return err
	}
	defer unix.Close(root)
	if err := unix.Syncfs(root); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

// close unmounts and waits until the device is free.
func (m *ext4Mount) close() error {
	if m.fd < 0 {
		return nil
	}
	err := unix.Close(m.fd)
	m.fd = -1
	return errors.Join(err, waitUnused(m.dev))
}

// unmountTimeout bounds how long a file system may take to write its last
// blocks to a device of this machine.
const unmountTimeout = 2 * time.Minute

// waitUnused returns once no file system holds the block device. The kernel
// refuses an exclusive open until then, and offers nothing to wait on.
func waitUnused(dev string) error {
	pause := time.Millisecond
	for deadline := time.Now().Add(unmountTimeout); ; {
		fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			return unix.Close(fd)
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("unmount %s: %w", dev, err)
		}
		time.Sleep(pause)
		pause = min(2*pause, 50*time.Millisecond)
	}
}
