package node

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// A rootPlace is where the root directory of a container's processes comes from:
// a device that is mounted at a directory.
type rootPlace struct {
	dir          string // empty if the device is not mounted by its server
	major, minor int
}

// place is that of the recording's device, which is attached.
func (a *autoRecording) place() rootPlace {
	p := rootPlace{dir: a.d.state.Dir}
	if rdev, err := blockDevice(a.d.path()); err == nil {
		p.major, p.minor = int(unix.Major(rdev)), int(unix.Minor(rdev))
	}
	return p
}

// inUse tells whether a process has its root there.
func (p rootPlace) inUse() bool {
	proc, err := os.Open("/proc")
	if err != nil {
		return false
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return false
	}
	here := mountNamespace()
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		// Most are where this process is, and a link is read faster than a table.
		if ns, err := os.Readlink("/proc/" + name + "/ns/mnt"); err != nil || ns == here {
			continue
		}
		if p.has(pid) {
			return true
		}
	}
	return false
}

// has tells whether a process has its root there: on the device itself, or on an
// overlay with the directory among its lower ones.
func (p rootPlace) has(pid int) bool {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return false // it has ended
	}
	defer f.Close()
	roots, err := mountinfo.GetMountsFromReader(f, mountinfo.SingleEntryFilter("/"))
	if err != nil || len(roots) == 0 {
		return false
	}
	root := roots[0]
	if root.FSType == "overlay" {
		return p.isLower(root.VFSOptions)
	}
	return p.major != 0 && root.Major == p.major && root.Minor == p.minor
}

// isLower tells whether the options of an overlay name the directory. They may
// have it relative to a directory above: containerd shortens long options so.
func (p rootPlace) isLower(options string) bool {
	if p.dir == "" {
		return false
	}
	for _, o := range strings.Split(options, ",") {
		dirs, ok := strings.CutPrefix(o, "lowerdir=")
		if !ok {
			continue
		}
		for _, d := range strings.Split(dirs, ":") {
			if d == p.dir || d != "" && d[0] != '/' && strings.HasSuffix(p.dir, "/"+d) {
				return true
			}
		}
	}
	return false
}
