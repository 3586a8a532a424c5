package probe

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/bpf"
)

func TestExplain(t *testing.T) {
	good := machine{release: "6.12.1-cloud", btf: true, lockdown: "[none] integrity confidentiality\n", privileged: true}
	with := func(f func(*machine)) machine {
		m := good
		f(&m)
		return m
	}
	denied := fmt.Errorf("load program: %w", unix.EPERM)
	for _, tt := range []struct {
		m    machine
		err  error
		want string
	}{
		{with(func(m *machine) { m.release = "5.10.0-34-amd64" }), denied, "eBPF: Linux 5.10.0-34-amd64 is too old: it needs 5.12"},
		{with(func(m *machine) { m.release = "4.19.0" }), unix.EINVAL, "eBPF: Linux 4.19.0 is too old: it needs 5.12"},
		{with(func(m *machine) { m.btf = false }), errors.New("no BTF found for kernel version"), "eBPF: the kernel does not describe its types (no BTF): it needs one with CONFIG_DEBUG_INFO_BTF"},
		{with(func(m *machine) { m.privileged = false }), denied, "eBPF: no privilege: it needs root, or CAP_BPF and CAP_PERFMON"},
		{with(func(m *machine) { m.lockdown = "none integrity [confidentiality]\n" }), denied, "eBPF: the kernel is locked down: it needs lockdown=integrity or none"},
		{good, denied, "eBPF: refused, in spite of all capabilities: leave the user namespace, or let seccomp pass the system call bpf"},
		{good, fmt.Errorf("create map: %w", unix.ENOMEM), "eBPF: no memory for it: raise the memory limit of this process's cgroup"},
		{good, errors.New("first line\nsecond line"), "eBPF: the kernel refuses: first line"},
		{with(func(m *machine) { m.release = "odd" }), errors.New("why"), "eBPF: the kernel refuses: why"},
	} {
		got := tt.m.explain(tt.err)
		require.EqualError(t, got, tt.want)
		require.ErrorIs(t, got, errors.ErrUnsupported)
		require.ErrorIs(t, got, tt.err)
	}
}

func TestClip(t *testing.T) {
	const disk = 7 << 20
	whole := target{disk: disk, end: math.MaxUint64}
	part := target{disk: disk, first: 100, end: 200}
	for _, tt := range []struct {
		target  target
		sector  uint64
		sectors uint32
		off, n  int64 // sectors
	}{
		{whole, 0, 8, 0, 8},
		{whole, 1 << 40, 8, 1 << 40, 8},
		{part, 100, 8, 0, 8},
		{part, 192, 8, 92, 8},
		{part, 96, 8, 0, 4},
		{part, 196, 8, 96, 4},
		{part, 0, 1000, 0, 100},
		{part, 92, 8, 0, 0},
		{part, 200, 8, 0, 0},
		{target{disk: disk + 1, end: math.MaxUint64}, 0, 8, 0, 0},
	} {
		r := bpf.ProbeRead{Disk: disk, Sector: tt.sector, Bytes: tt.sectors * 512}
		off, n, ok := tt.target.clip(&r)
		require.Equal(t, tt.n > 0, ok, "%+v", tt)
		require.Equal(t, tt.off*512, off, "%+v", tt)
		require.Equal(t, tt.n*512, n, "%+v", tt)
	}
}

func TestSpans(t *testing.T) {
	require.Equal(t, map[uint32]bpf.ProbeSpan{1: {First: 5, End: 40}, 2: {First: 0, End: math.MaxUint64}},
		spans([]target{{1, 10, 20}, {1, 30, 40}, {2, 3, 4}, {1, 5, 6}, {2, 0, math.MaxUint64}}))
}

func TestContainerID(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for cgroups, want := range map[string]string{
		"":                                   "",
		"0::/\n":                             "",
		"0::/system.slice/ssh.service\n":     "",
		"0::/docker/" + id + "\n":            id,
		"12:pids:/docker/" + id + "\n0::/\n": id,
		"0::/kubepods.slice/kubepods-pod12_34.slice/cri-containerd-" + id + ".scope\n": id,
		"0::/kubepods/besteffort/pod12-34/" + id + "/init\n":                           id,
		"0::/system.slice/docker-" + id + ".scope":                                     id,
		"0::/kubepods-burstable-pod12.slice:cri-containerd:" + id + "\n":               id,
		"0::/docker/" + strings.Repeat("0", 64) + "/kubepods/" + id + "\n":             id,
		"0::/x" + id + "\n":    "",
		"0::/" + id[1:] + "\n": "",
	} {
		require.Equal(t, want, containerID(cgroups), "%q", cgroups)
	}
}
