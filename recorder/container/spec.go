package container

import (
	"errors"
	"fmt"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// host is what the specification takes from the machine.
type host struct {
	Hostname string
	NoFile   uint64 // hard limit of open files
	Caps     uint64 // the capabilities we have ourselves, a bit each
	Resolv   string // file to be /etc/resolv.conf; "" for none
	Hosts    string // file to be /etc/hosts; "" for none
}

// runtimeSpec makes the specification that runc reads. Its root file system is
// at root.
func runtimeSpec(cfg *Config, id identity, h host, root string) (*specs.Spec, error) {
	args, err := command(cfg)
	if err != nil {
		return nil, err
	}
	caps := limitCaps(h.Caps)
	s := &specs.Spec{
		Version: "1.0.2", // the oldest runc in use refuses a later minor version
		Root:    &specs.Root{Path: root},
		Process: &specs.Process{
			User:         specs.User{UID: id.UID, GID: id.GID, AdditionalGids: id.Groups},
			Args:         args,
			Env:          environment(cfg, id),
			Cwd:          workdir(cfg),
			Rlimits:      rlimits(cfg, h),
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Hostname: cfg.Hostname,
		Mounts:   mounts(cfg, h),
		Linux: &specs.Linux{
			Namespaces:    namespaces(cfg),
			MaskedPaths:   maskedPaths,
			ReadonlyPaths: readonlyPaths,
		},
	}
	if s.Hostname == "" {
		s.Hostname = h.Hostname
	}
	if !cfg.NoSeccomp {
		s.Linux.Seccomp = seccompFilter()
	}
	return s, nil
}

// command is entrypoint and arguments.
func command(cfg *Config) ([]string, error) {
	entry, args := cfg.Image.Entrypoint, cfg.Image.Cmd
	if cfg.Entrypoint != nil {
		entry, args = cfg.Entrypoint, nil
	}
	if len(cfg.Args) > 0 {
		args = cfg.Args
	}
	all := append(append([]string{}, entry...), args...)
	if len(all) == 0 || all[0] == "" {
		return nil, errors.New("no command: the image names none; give one")
	}
	for _, a := range all {
		if strings.ContainsRune(a, 0) {
			return nil, fmt.Errorf("command: argument %q holds a zero byte", a)
		}
	}
	return all, nil
}

// environment is the image's, over defaults, under the configuration's. Entries
// that are none are left out: runc would refuse them all.
func environment(cfg *Config, id identity) []string {
	var env []string
	at := map[string]int{}
	for _, list := range [][]string{{defaultPath, "HOME=" + id.Home}, cfg.Image.Env, cfg.Env} {
		for _, kv := range list {
			key, _, ok := strings.Cut(kv, "=")
			if !ok || key == "" || strings.ContainsRune(kv, 0) {
				continue
			}
			if i, seen := at[key]; seen {
				env[i] = kv
				continue
			}
			at[key] = len(env)
			env = append(env, kv)
		}
	}
	return env
}

func workdir(cfg *Config) string {
	dir := cfg.Image.WorkingDir
	if cfg.Cwd != "" {
		dir = cfg.Cwd
	}
	return path.Join("/", dir)
}

// rlimits are those asked for. The default keeps old programs from walking a
// million descriptors, and lets new ones raise the limit.
func rlimits(cfg *Config, h host) []specs.POSIXRlimit {
	if len(cfg.Rlimits) == 0 {
		return []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: min(1024, h.NoFile), Hard: h.NoFile}}
	}
	var list []specs.POSIXRlimit
	for _, r := range cfg.Rlimits {
		list = append(list, specs.POSIXRlimit{Type: r.Type, Soft: r.Soft, Hard: r.Hard})
	}
	return list
}

// capabilities are the usual default set, less CAP_MKNOD: see the package
// comment on devices.
var capabilities = []struct {
	name string
	bit  uint
}{
	{"CAP_CHOWN", unix.CAP_CHOWN},
	{"CAP_DAC_OVERRIDE", unix.CAP_DAC_OVERRIDE},
	{"CAP_FOWNER", unix.CAP_FOWNER},
	{"CAP_FSETID", unix.CAP_FSETID},
	{"CAP_KILL", unix.CAP_KILL},
	{"CAP_SETGID", unix.CAP_SETGID},
	{"CAP_SETUID", unix.CAP_SETUID},
	{"CAP_SETPCAP", unix.CAP_SETPCAP},
	{"CAP_NET_BIND_SERVICE", unix.CAP_NET_BIND_SERVICE},
	{"CAP_NET_RAW", unix.CAP_NET_RAW},
	{"CAP_SYS_CHROOT", unix.CAP_SYS_CHROOT},
	{"CAP_AUDIT_WRITE", unix.CAP_AUDIT_WRITE},
	{"CAP_SETFCAP", unix.CAP_SETFCAP},
}

// limitCaps is the default set as far as we have it: nobody can give more.
func limitCaps(have uint64) []string {
	names := []string{}
	for _, c := range capabilities {
		if have&(1<<c.bit) != 0 {
			names = append(names, c.name)
		}
	}
	return names
}

func namespaces(cfg *Config) []specs.LinuxNamespace {
	list := []specs.LinuxNamespace{
		{Type: specs.PIDNamespace},
		{Type: specs.MountNamespace},
		{Type: specs.IPCNamespace},
		{Type: specs.UTSNamespace},
	}
	if cfg.Network == OwnNetwork {
		list = append(list, specs.LinuxNamespace{Type: specs.NetworkNamespace}) // runc sets lo up
	}
	return list
}

// mounts are what the runtime specification asks of every Linux container, less
// cgroups, then ours.
func mounts(cfg *Config, h host) []specs.Mount {
	list := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	}
	if h.Resolv != "" {
		list = append(list, bind(Mount{Source: h.Resolv, Target: "/etc/resolv.conf"}))
	}
	if h.Hosts != "" {
		list = append(list, bind(Mount{Source: h.Hosts, Target: "/etc/hosts"}))
	}
	for _, m := range cfg.Mounts {
		list = append(list, bind(m))
	}
	return list
}

func bind(m Mount) specs.Mount {
	options := []string{"rbind", "rprivate", "nosuid", "nodev"}
	if m.ReadOnly {
		options = append(options, "ro")
	}
	return specs.Mount{Destination: m.Target, Type: "bind", Source: m.Source, Options: options}
}

// Files below /proc and /sys through which root in a container, as it is root
// outside too, could read or change the machine.
var (
	maskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
		"/sys/devices/virtual/powercap", "/sys/firmware",
	}
	readonlyPaths = []string{
		"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
	}
)
