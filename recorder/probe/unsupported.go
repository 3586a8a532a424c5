package probe

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// An UnsupportedError says in one line what is missing for a probe, and what to
// do. It is errors.ErrUnsupported.
type UnsupportedError struct {
	Missing string // what is missing
	Hint    string // what helps
	Err     error  // what the kernel said
}

func (e *UnsupportedError) Error() string { return "eBPF: " + e.Missing + ": " + e.Hint }

// Unwrap gives both.
func (e *UnsupportedError) Unwrap() []error { return []error{errors.ErrUnsupported, e.Err} }

// Check tells whether Start would work: it loads and attaches all programs, and
// undoes that. The error is an *UnsupportedError.
func Check() error {
	p := &Probe{opts: (*Options)(nil).filled()}
	err := p.load()
	if err == nil {
		err = p.attach(p.programs.RqComplete, p.programs.BioComplete, p.programs.BioQueue, p.programs.SockSetState)
	}
	if closed := p.release(); err == nil {
		err = closed
	}
	return unsupported(err)
}

// The first kernel in which a bio names its block device.
const neededMajor, neededMinor = 5, 12

// A machine is what decides whether programs can be loaded.
type machine struct {
	release    string // of the kernel
	btf        bool   // the kernel describes its types
	lockdown   string // as in /sys/kernel/security
	privileged bool   // this process has the capabilities
}

func thisMachine() machine {
	var m machine
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.release = unix.ByteSliceToString(u.Release[:])
	}
	_, err := os.Stat("/sys/kernel/btf/vmlinux")
	m.btf = !errors.Is(err, os.ErrNotExist)
	lockdown, _ := os.ReadFile("/sys/kernel/security/lockdown")
	m.lockdown = string(lockdown)
	m.privileged = privileged()
	return m
}

func unsupported(err error) error {
	if err == nil {
		return nil
	}
	m := thisMachine()
	return m.explain(err)
}

// explain finds out why the kernel refuses.
func (m *machine) explain(err error) *UnsupportedError {
	e := &UnsupportedError{Err: err}
	var verifier *ebpf.VerifierError
	denied := errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES)
	switch {
	case m.tooOld():
		e.Missing = "Linux " + m.release + " is too old"
		e.Hint = fmt.Sprintf("it needs %d.%d", neededMajor, neededMinor)
	case !m.btf:
		e.Missing = "the kernel does not describe its types (no BTF)"
		e.Hint = "it needs one with CONFIG_DEBUG_INFO_BTF"
	case denied && !m.privileged:
		e.Missing = "no privilege"
		e.Hint = "it needs root, or CAP_BPF and CAP_PERFMON"
	case strings.Contains(m.lockdown, "[confidentiality]"):
		e.Missing = "the kernel is locked down"
		e.Hint = "it needs lockdown=integrity or none"
	case errors.Is(err, unix.ENOMEM):
		e.Missing = "no memory for it"
		e.Hint = "raise the memory limit of this process's cgroup"
	case denied && !errors.As(err, &verifier):
		e.Missing = "refused, in spite of all capabilities"
		e.Hint = "leave the user namespace, or let seccomp pass the system call bpf"
	default:
		e.Missing = "the kernel refuses"
		e.Hint, _, _ = strings.Cut(err.Error(), "\n")
	}
	return e
}

func (m *machine) tooOld() bool {
	var major, minor int
	if _, err := fmt.Sscanf(m.release, "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major < neededMajor || major == neededMajor && minor < neededMinor
}

// privileged tells whether this thread has the capabilities, if only those of
// its user namespace.
func privileged() bool {
	var data [2]unix.CapUserData
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	has := func(c int) bool { return data[c/32].Effective&(1<<(c%32)) != 0 }
	return has(unix.CAP_SYS_ADMIN) || has(unix.CAP_BPF) && has(unix.CAP_PERFMON)
}
