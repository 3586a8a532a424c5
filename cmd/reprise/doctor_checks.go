package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/recorder/probe"
	"github.com/reprise-project/reprise/replayer/node"
)

const defaultHostsDir = "/etc/containerd/certs.d"

// Groups of findings, in the order of the table.
const (
	groupMachine    = "Machine"
	groupTransports = "Transports"
	groupFS         = "File systems"
	groupNode       = "Node"
)

// examine looks at everything. What the daemon's configuration is like was found
// before.
func (x *examination) examine(ctx context.Context, configured finding) *diagnosis {
	d := &diagnosis{Version: version, Kernel: kernelRelease(), Ref: x.ref}
	d.add(checkKernel(d.Kernel), checkPrivileges(), checkDeviceNode("/dev/fuse", "fuse"), checkDeviceNode("/dev/loop-control", "loop"))
	d.add(checkURing(), checkCgroup())
	d.add(checkBPF("/sys/kernel/btf/vmlinux", probe.Check)...)
	d.add(checkTransports(device.Probe())...)
	d.add(checkFileSystems()...)
	d.add(configured, checkState(x.root), checkDaemon(ctx, x.root), checkRunc(ctx), checkHosts(cmp.Or(x.hostsDir, defaultHostsDir)))
	d.add(checkContainerd(ctx, x.root, x.ctrd)...)
	if x.ref != "" {
		d.add(x.checkRegistry(ctx)...)
	}
	d.OK = d.count(broken, false)+d.count(broken, true) == 0
	return d
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func checkKernel(release string) finding {
	f := finding{Group: groupMachine, Name: "kernel", Grade: fine, Detail: "Linux " + release + " " + runtime.GOARCH}
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return f
	}
	old := func(a, b int) bool { return major < a || major == a && minor < b }
	switch {
	case old(5, 8):
		f.Grade, f.Remedy = broken, "reprise needs Linux 5.8 or later"
	case old(6, 9):
		f.Grade, f.Detail = lacking, f.Detail+": without FUSE RESEND, devices of fuse end with the process that serves them"
		f.Remedy = "Linux 6.9 or later lets them outlive a kill; so does a transport that is marked so below"
	default:
		f.Detail += ", with FUSE RESEND: devices outlive the process that serves them"
	}
	return f
}

func checkPrivileges() finding {
	f := finding{Group: groupMachine, Name: "privileges", Grade: fine, Detail: "root, with CAP_SYS_ADMIN"}
	switch {
	case os.Geteuid() != 0:
		f.Grade, f.Detail = broken, fmt.Sprintf("user %d: mounting images needs root (CAP_SYS_ADMIN)", os.Geteuid())
		f.Remedy = "run it as root, with sudo for example; images can be looked at without: reprise image info"
	case !hasCapability(unix.CAP_SYS_ADMIN):
		f.Grade, f.Detail = broken, "root, but without CAP_SYS_ADMIN"
		f.Remedy = "give the container or the unit CAP_SYS_ADMIN (docker run --privileged)"
	case inUserNamespace():
		f.Grade, f.Detail = broken, "root of a user namespace only, which may not make devices"
		f.Remedy = "run it as root of the machine"
	}
	return f
}

// hasCapability reads CapEff, of this process.
func hasCapability(c int) bool {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return true // nobody says otherwise
	}
	for line := range strings.Lines(string(b)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err != nil || set&(1<<c) != 0
		}
	}
	return true
}

func inUserNamespace() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	return err == nil && strings.Join(strings.Fields(string(b)), " ") != "0 0 4294967295"
}

// checkDeviceNode opens what fuse and loop are made with. It is not opened where
// the driver is not loaded: that would load it.
func checkDeviceNode(path, module string) finding {
	f := finding{Group: groupMachine, Name: path, Grade: fine, Detail: "there"}
	if _, err := os.Stat(path); err != nil {
		f.Grade, f.Detail = lacking, "not there"
		f.Remedy = "modprobe " + module + "; in a container, pass it in: docker run --device " + path
		return f
	}
	if _, err := os.Stat("/sys/module/" + module); err != nil {
		f.Detail = "there; the driver is loaded when it is used"
		return f
	}
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		if os.Geteuid() != 0 {
			f.Grade, f.Detail = without, "for root only"
			return f
		}
		f.Grade, f.Detail = lacking, "cannot be opened: "+reason(err)
		f.Remedy = "in a container, allow it: docker run --device " + path
		return f
	}
	_ = file.Close()
	f.Detail = "can be opened"
	return f
}

// reason is an error without the path that the line names anyway.
func reason(err error) string {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Err.Error()
	}
	return err.Error()
}

// checkURing is for ublk, and for FUSE, which can be faster with it.
func checkURing() finding {
	f := finding{Group: groupMachine, Name: "io_uring", Grade: fine}
	disabled, _ := os.ReadFile("/proc/sys/kernel/io_uring_disabled")
	switch strings.TrimSpace(string(disabled)) {
	case "2":
		f.Grade, f.Detail = without, "switched off: ublk needs it"
		f.Remedy = "sysctl kernel.io_uring_disabled=0"
	case "1":
		f.Detail = "for root"
	default: // before Linux 6.6 there is no such switch
		f.Detail = "for all"
	}
	switch b, err := os.ReadFile("/sys/module/fuse/parameters/enable_uring"); {
	case err != nil:
		f.Detail += "; not for FUSE (needs Linux 6.14)"
	case strings.HasPrefix(string(b), "Y"):
		f.Detail += "; FUSE can use it"
	default:
		f.Detail += "; not for FUSE (module parameter fuse.enable_uring is N)"
	}
	return f
}

// checkBPF is for who read, and for record --device.
func checkBPF(btf string, check func() error) []finding {
	types := finding{Group: groupMachine, Name: "BTF", Grade: fine, Detail: "the kernel describes its types"}
	f := finding{Group: groupMachine, Name: "eBPF", Grade: fine, Detail: "programs can be attached: recordings tell who read, and record --device works"}
	const unknown = "recordings do not tell who read, and record --device does not work"
	if _, err := os.Stat(btf); err != nil {
		types.Grade, types.Detail = lacking, "not at "+btf+": "+unknown
		types.Remedy = "a kernel with CONFIG_DEBUG_INFO_BTF"
		f.Grade, f.Detail = without, "not without BTF"
		return []finding{types, f}
	}
	var missing *probe.UnsupportedError
	if errors.As(check(), &missing) {
		f.Grade, f.Detail, f.Remedy = lacking, missing.Missing+": "+unknown, missing.Hint
	}
	if f.Grade != fine && os.Geteuid() != 0 {
		f.Grade = without
	}
	return []finding{types, f}
}

func checkCgroup() finding {
	f := finding{Group: groupMachine, Name: "cgroup", Grade: fine}
	var st unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &st) != nil {
		st.Type = 0
	}
	switch st.Type {
	case unix.CGROUP2_SUPER_MAGIC:
		f.Detail = "version 2"
	case unix.TMPFS_MAGIC, unix.CGROUP_SUPER_MAGIC:
		f.Detail = "version 1: recordings know a container by its mount namespace"
	default:
		f.Grade, f.Detail = lacking, "not mounted at /sys/fs/cgroup: runc wants one"
		f.Remedy = "mount -t cgroup2 cgroup2 /sys/fs/cgroup"
	}
	return f
}

// checkTransports wants at least one.
func checkTransports(all []device.Support) (out []finding) {
	any := false
	for _, s := range all {
		any = any || s.Available
	}
	for _, s := range all {
		out = append(out, checkTransport(s, any))
	}
	return out
}

func checkTransport(s device.Support, others bool) finding {
	f := finding{Group: groupTransports, Name: s.Transport, Grade: fine, Detail: s.Detail}
	if s.Available {
		f.Survives = &s.Survives
		f.Detail += "; devices " + map[bool]string{true: "survive a kill", false: "end with their server"}[s.Survives]
		if s.Auto != "" {
			f.Detail += "; auto for " + s.Auto
		}
		return f
	}
	f.Grade = without
	if !others {
		f.Grade = broken
	}
	var missing *device.FeatureError
	if !errors.As(s.Missing, &missing) {
		f.Detail = fmt.Sprint(s.Missing)
		return f
	}
	f.Detail = missing.Feature + " is not there"
	if s.Since != "" {
		f.Detail += " (Linux " + s.Since + " can have it)"
	}
	f.Remedy = missing.Hint
	return f
}

// checkFileSystems looks at what images hold, and what is put on top.
func checkFileSystems() (out []finding) {
	for _, fs := range []struct {
		name, detail string
		missing      grade
	}{
		{"ext4", "what reprise convert writes", broken},
		{"erofs", "images that others have converted", without},
		{"xfs", "images that others have converted", without},
		{"overlay", "containers that write", lacking},
	} {
		f := finding{Group: groupFS, Name: fs.name, Grade: fine, Detail: fs.detail}
		var missing *device.FeatureError
		if err := device.FileSystem(fs.name); errors.As(err, &missing) {
			f.Grade, f.Detail, f.Remedy = fs.missing, "not in this kernel: "+fs.detail, missing.Hint
		}
		out = append(out, f)
	}
	return out
}

// littleSpace is less than most images need, bytes.
const littleSpace = 1 << 30

// checkState looks at the state directory, or where it would be made.
func checkState(root string) finding {
	f := finding{Group: groupNode, Name: "state", Grade: fine, Detail: root}
	dir, err := filepath.Abs(root)
	for err == nil {
		var fi os.FileInfo
		if fi, err = os.Stat(dir); err == nil && !fi.IsDir() {
			err = unix.ENOTDIR
		}
		if !errors.Is(err, os.ErrNotExist) || dir == "/" {
			break
		}
		dir, err = filepath.Dir(dir), nil
		f.Detail = root + " (will be made)"
	}
	var st unix.Statfs_t
	if err == nil {
		err = errors.Join(unix.Access(dir, unix.W_OK|unix.X_OK), unix.Statfs(dir, &st))
	}
	if errors.Is(err, os.ErrPermission) && os.Geteuid() != 0 {
		f.Grade, f.Detail = without, root+" is for root only"
		return f
	}
	if err != nil {
		f.Grade, f.Detail = broken, fmt.Sprintf("%s cannot be written: %s", dir, reason(err))
		f.Remedy = "make it writable, or name another directory: --root DIR"
		return f
	}
	if st.Blocks == 0 { // no limit, or nothing that keeps files
		return f
	}
	free := int64(st.Bavail) * int64(st.Frsize)
	f.Detail += ", " + size(free) + " free"
	if free < littleSpace {
		f.Grade = lacking
		f.Remedy = "make room, or bound what is kept: --cache-size (default " + size(backstore.DefaultCacheBytes) + ")"
	}
	return f
}

// daemonAnswers is how long the daemon may take to say who it is.
const daemonAnswers = 2 * time.Second

// checkDaemon asks the daemon of the state directory who it is.
func checkDaemon(ctx context.Context, root string) finding {
	f := finding{Group: groupNode, Name: "daemon", Grade: fine}
	path := node.SocketPath(root)
	if errors.Is(unix.Access(path, unix.R_OK|unix.W_OK), unix.EACCES) {
		f.Grade, f.Detail = without, "cannot be asked: "+path+" is for root only"
		return f
	}
	ctx, cancel := context.WithTimeout(ctx, daemonAnswers)
	defer cancel()
	switch info, err := askDaemon(ctx, root); {
	case errors.Is(err, os.ErrNotExist):
		f.Grade, f.Detail = without, "none: mount and run keep their devices themselves"
	case err != nil:
		f.Grade, f.Detail = lacking, fmt.Sprintf("does not answer at %s: %v", path, err)
		f.Remedy = "restart it: devices stay"
	case !info.Kept:
		f.Grade, f.Detail = lacking, fmt.Sprintf("process %d, %d devices, which end with it: nobody keeps its descriptors", info.Pid, info.Devices)
		f.Remedy = "start it from systemd, or with: reprise supervise -- reprise daemon"
	default:
		f.Detail = fmt.Sprintf("process %d, version %s, %d devices", info.Pid, info.Version, info.Devices)
	}
	return f
}

func askDaemon(ctx context.Context, root string) (*node.ServerInfo, error) {
	c, err := node.Dial(ctx, root)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Server(ctx)
}

func checkRunc(ctx context.Context) finding {
	f := finding{Group: groupNode, Name: "runc", Grade: fine}
	path, err := exec.LookPath("runc")
	if err != nil {
		f.Grade, f.Detail = lacking, "not in PATH: run and record start containers with it"
		f.Remedy = "install runc"
		return f
	}
	f.Detail = path
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, path, "--version").Output(); err == nil {
		first, _, _ := strings.Cut(string(out), "\n")
		f.Detail += strings.TrimPrefix(" "+first, " runc")
	}
	return f
}

// checkHosts counts the registries that have settings of their own.
func checkHosts(dir string) finding {
	f := finding{Group: groupNode, Name: "registries", Grade: fine}
	found, _ := filepath.Glob(filepath.Join(dir, "*", "hosts.toml"))
	_, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		f.Grade, f.Detail = without, dir+" is not there: registries are asked directly, over https"
	case err != nil:
		f.Grade, f.Detail, f.Remedy = lacking, dir+": "+reason(err), "make it readable"
	default:
		f.Detail = fmt.Sprintf("%s, hosts.toml for %d", dir, len(found))
	}
	return f
}
