package device

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

// Mount mounts the file system on dev at the existing directory dir, in the
// mount namespace that the process began in. data are the file system's own
// options, comma separated. Read-only mounts of ext3, ext4 and xfs do not replay
// the journal: "noload" or "norecovery" is added, since the replay would write.
// dev is a [Device.Path], also of a device that another process serves.
func Mount(dev, dir, fstype string, readOnly bool, data string) error {
	var flags uintptr
	if readOnly {
		flags |= unix.MS_RDONLY
		data = withoutJournal(fstype, data)
	}
	err := error(unix.EINVAL)
	if fstype == "erofs" && isRegular(dev) {
		err = mount(dev, dir, fstype, flags, withOption(data, directIO))
	}
	if errors.Is(err, unix.EINVAL) {
		err = mount(dev, dir, fstype, flags, data)
	}
	if err != nil {
		return fmt.Errorf("mount %s on %s as %s: %w", dev, dir, fstype, explain(err, fstype, "mount(2)"))
	}
	return nil
}

// directIO is EROFS's option to read past the page cache of the file that it is
// mounted from. Linux 6.12.0 to 6.12.6 do not know it and read so anyway.
const directIO = "directio"

// isRegular reports whether path is a file. Looking may wait for its server.
func isRegular(path string) bool {
	var st unix.Stat_t
	err := apart.Run(func() error { return unix.Stat(path, &st) })
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}

// mount is mount(2) in a process of its own. A thread that waits for a device
// would keep this process from ending, and who waits for its end, a service
// manager, from starting the next one, which alone can serve the device.
func mount(dev, dir, fstype string, flags uintptr, data string) error {
	if own, ok := strings.CutPrefix(dev, "/proc/self/"); ok {
		dev = fmt.Sprintf("/proc/%d/%s", unix.Getpid(), own)
	}
	var args [4]*byte
	for i, s := range []string{dev, dir, fstype, data} {
		p, err := unix.BytePtrFromString(s)
		if err != nil {
			return err
		}
		args[i] = p
	}
	err := apart.Call(-1, unix.SYS_MOUNT, uintptr(unsafe.Pointer(args[0])), uintptr(unsafe.Pointer(args[1])),
		uintptr(unsafe.Pointer(args[2])), flags, uintptr(unsafe.Pointer(args[3])))
	runtime.KeepAlive(args)
	return err
}

// explain says what an error of mounting means.
func explain(err error, fstype, call string) error {
	switch {
	case errors.Is(err, unix.ENODEV):
		return &FeatureError{Feature: "file system " + fstype, Hint: "load its kernel module", Err: err}
	case errors.Is(err, unix.ENOTBLK) && fstype == "erofs":
		return &FeatureError{Feature: fileBacked, Since: "6.12", Hint: "the kernel needs CONFIG_EROFS_FS_BACKED_BY_FILE", Err: err}
	case errors.Is(err, unix.EPERM):
		return feature.Privilege(err, call)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: no valid %s, a block size below the device's sector size, or an option it does not know", err, fstype)
	}
	return err
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
	return withOption(data, option)
}

// withOption adds an option to a list that may have it.
func withOption(data, option string) string {
	switch {
	case data == "":
		return option
	case slices.Contains(strings.Split(data, ","), option):
		return data
	}
	return data + "," + option
}

// Unmount unmounts dir. It fails with EBUSY while files below it are in use,
// which it waits some 100 ms for to pass.
func Unmount(dir string) error {
	if err := unmountSoon(dir); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, feature.Privilege(err, "umount(2)"))
	}
	return nil
}

// UnmountLazy unmounts dir, or, while files below it are in use, takes it out
// of the directory tree at once and unmounts it when they are not any more.
// Until then the device stays busy.
func UnmountLazy(dir string) error {
	err := unmountSoon(dir)
	if errors.Is(err, unix.EBUSY) {
		err = unmount(dir, unix.MNT_DETACH)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, feature.Privilege(err, "umount(2)"))
	}
	return nil
}

// unmountSoon waits a little for a directory in use to be let go: between its
// fork and its exec, a child of this process holds every file that was open,
// and others look at mounts in passing (df, monitoring agents).
func unmountSoon(dir string) (err error) {
	for pause := time.Millisecond; ; pause *= 2 {
		if err = unmount(dir, 0); !errors.Is(err, unix.EBUSY) || pause > busyPatience {
			return err
		}
		time.Sleep(pause)
	}
}

// busyPatience bounds the last pause of unmountSoon, and half of all its time.
const busyPatience = 64 * time.Millisecond

// unmount is umount(2) in a process of its own, as mount is.
func unmount(dir string, flags int) error {
	p, err := unix.BytePtrFromString(dir)
	if err != nil {
		return err
	}
	err = apart.Call(-1, unix.SYS_UMOUNT2, uintptr(unsafe.Pointer(p)), uintptr(flags|unix.UMOUNT_NOFOLLOW))
	runtime.KeepAlive(p)
	return err
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
