package device

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

// Mount mounts the file system on dev at the existing directory dir, in the
// mount namespace that the process began in. data are the file system's own options, comma separated. Read-only mounts of ext3,
// ext4 and xfs do not replay the journal: "noload" or "norecovery" is added,
// since the replay would write.
func Mount(dev, dir, fstype string, readOnly bool, data string) error {
	var flags uintptr
	if readOnly {
		flags |= unix.MS_RDONLY
		data = withoutJournal(fstype, data)
	}
	err := apart.Run(func() error { return unix.Mount(dev, dir, fstype, flags, data) })
	if err == nil {
		return nil
	}
	switch {
	case errors.Is(err, unix.ENODEV):
		err = &FeatureError{Feature: "file system " + fstype, Hint: "load its kernel module", Err: err}
	case errors.Is(err, unix.EPERM):
		err = feature.Privilege(err, "mount(2)")
	case errors.Is(err, unix.EINVAL):
		err = fmt.Errorf("%w: no valid %s, a block size below the device's sector size, or an option it does not know", err, fstype)
	}
	return fmt.Errorf("mount %s on %s as %s: %w", dev, dir, fstype, err)
}

func withoutJournal(fstype, data string) string {
	var option string
	switch fstype {
	case "ext3", "ext4":
		option = "noload"
	case "xfs":
		option = "norecovery"
	default:
		return data
	}
	for o := range strings.SplitSeq(data, ",") {
		if o == "noload" || o == "norecovery" {
			return data
		}
	}
	if data == "" {
		return option
	}
	return data + "," + option
}

// Unmount unmounts dir. It fails while files below it are in use.
func Unmount(dir string) error {
	if err := unmount(dir, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, feature.Privilege(err, "umount(2)"))
	}
	return nil
}

// UnmountLazy unmounts dir, or, while files below it are in use, takes it out
// of the directory tree at once and unmounts it when they are not any more.
// Until then the device stays busy.
func UnmountLazy(dir string) error {
	err := unmount(dir, 0)
	if errors.Is(err, unix.EBUSY) {
		err = unmount(dir, unix.MNT_DETACH)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, feature.Privilege(err, "umount(2)"))
	}
	return nil
}

func unmount(dir string, flags int) error {
	return apart.Run(func() error { return unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|flags) })
}

// Apart calls f on a thread of its own and returns what it returned. Work on a
// file system whose device this same process serves belongs there: elsewhere,
// a process that is killed while one of its threads waits for its own device
// cannot end, since what would fail the wait, the release of /dev/fuse, comes
// after the end of the last thread. (Only aborting the FUSE connection helps
// then: /sys/fs/fuse/connections.) [Mount], [Unmount] and [Device.Close] see to
// it themselves. A child process needs no Apart, and is as good.
//
// The thread has its own descriptor table with nothing but standard input,
// output and error. So f can use paths, but no file or socket that was opened
// outside, it must close what it opens, and must not hand it to goroutines.
// Bytes come in through memory: an [io.Pipe] whose other end is elsewhere.
func Apart(f func() error) error { return apart.Run(f) }
