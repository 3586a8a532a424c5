package device

import (
	"os"
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
	Device string   // /dev/loopN
	Mounts []string // mount points in this mount namespace; may be empty
}

func (e *BusyError) Error() string {
	if len(e.Mounts) == 0 {
		return "close device " + e.Device + ": it is in use by a mount in another namespace or by another driver: end that first"
	}
	return "close device " + e.Device + ": it is mounted: unmount " + strings.Join(e.Mounts, ", ") + " first"
}

// Unwrap gives syscall.EBUSY.
func (e *BusyError) Unwrap() error { return syscall.EBUSY }

// mountsOf lists the mount points whose source is dev.
func mountsOf(dev string) []string {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil
	}
	var dirs []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == dev {
			dirs = append(dirs, unescape.Replace(f[1]))
		}
	}
	return dirs
}

// unescape undoes what the kernel does to blanks in mount points.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
