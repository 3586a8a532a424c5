package device

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

// FeatureError names a kernel feature or a privilege that is missing, and the
// Linux version that has it. It matches errors.ErrUnsupported, or
// os.ErrPermission for the privilege.
type FeatureError = feature.Error

// BusyError says that a device cannot be closed because a file system on it is
// still mounted. It matches syscall.EBUSY.
type BusyError struct {
	Device string   // its path, such as /dev/loop0
	Mounts []string // mount points in this mount namespace; may be empty
}

func (e *BusyError) Error() string {
	if len(e.Mounts) == 0 {
		return "close device " + e.Device + ": it is in use by a mount in another namespace, by another driver or, if it is a file, by a process: end that first"
	}
	return "close device " + e.Device + ": it is mounted: unmount " + strings.Join(e.Mounts, ", ") + " first"
}

// Unwrap gives syscall.EBUSY.
func (e *BusyError) Unwrap() error { return syscall.EBUSY }

// Mounts lists the mount points, in this mount namespace, of the device with
// the given [Device.Path]. That of a device whose path begins with /proc is
// found by the last part of it, for the rest changes when another process
// adopts the device.
func Mounts(path string) []string {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil
	}
	var dirs []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && sameSource(unescape(f[0]), path) {
			dirs = append(dirs, unescape(f[1]))
		}
	}
	return dirs
}

func sameSource(source, dev string) bool {
	if strings.HasPrefix(dev, "/proc/") {
		return filepath.Base(source) == filepath.Base(dev)
	}
	return source == dev
}

// unescape undoes what the kernel does to blanks and the like in its table of
// mounts: \040 is a space.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
