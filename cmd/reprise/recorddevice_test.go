package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/recorder"
	"github.com/reprise-project/reprise/recorder/probe"
	"github.com/reprise-project/reprise/replayer/node"
	"github.com/reprise-project/reprise/tracefmt"
)

// skipWithoutProbe skips a test that needs eBPF.
func skipWithoutProbe(t testing.TB) {
	t.Helper()
	skipUnprivileged(t)
	if err := probe.Check(); err != nil {
		if _, stat := os.Stat("/sys/kernel/btf/vmlinux"); stat == nil && os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// TestProbeAgrees records the same start twice: as the image sees it, which is
// how record does it, and by eBPF as the device's queue sees it. Mapped to the
// layers, both have the same bytes; first touches that come at the same time from
// several processes may be in another order.
func TestProbeAgrees(t *testing.T) {
	skipWithoutProbe(t)
	b := newBench(t)
	s := b.smallSite("2ms,unlimited")
	n, err := node.Open(&node.Config{Root: b.root})
	require.NoError(t, err)
	defer func() { require.NoError(t, n.Close()) }()
	files, info, err := n.Files(t.Context(), s.ref)
	require.NoError(t, err)
	im, err := n.OpenImage(t.Context(), s.ref, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, im.Close()) }()
	dev, err := device.Attach(t.Context(), im.Image, im.Size(), &device.Options{Transport: "fuse", FSType: im.FSType, ReadOnly: true, Name: b.dir})
	require.NoError(t, err)
	defer func() { require.NoError(t, dev.Close()) }()
	rdev, readAhead, err := blockDevice(dev.Path())
	require.NoError(t, err)
	require.EqualValues(t, 128<<10, readAhead)

	start := im.Opened()
	p, err := probe.Start(&probe.Options{Devices: []uint64{rdev}, Start: start})
	require.NoError(t, err)
	defer p.Close()
	var onDevice, inImage bytes.Buffer
	byProbe, err := recorder.New(&onDevice, tracefmt.Header{Space: tracefmt.DeviceSpace, Start: start}, &recorder.Options{Given: func(last bool) []tracefmt.Event {
		if last {
			_ = p.Close()
		}
		return p.Reads()
	}})
	require.NoError(t, err)
	byImage, err := recorder.New(&inImage, tracefmt.Header{Layers: info.Layers, Start: start}, nil)
	require.NoError(t, err)
	im.SetObserver(byImage)

	mount, err := dev.MountDetached(im.FSType, true, "")
	require.NoError(t, err)
	root := os.NewFile(uintptr(mount), "root")
	defer root.Close()
	// Two processes at a time. This one serves the device: only others may read.
	var g errgroup.Group
	for _, script := range []string{"cd /app && cat start hostname page-1* /data/a", "cat /data/big /data/more | { read x; }; cat /data/sub/new"} {
		cmd := exec.Command("chroot", "/proc/self/fd/3", "/bin/sh", "-c", script)
		cmd.ExtraFiles = []*os.File{root}
		g.Go(cmd.Run)
	}
	require.NoError(t, g.Wait())

	byProbe.Stop("test")
	byImage.Stop("test")
	for _, r := range []*recorder.Recorder{byProbe, byImage} {
		_, err := r.Wait(t.Context())
		require.NoError(t, err)
	}
	require.Zero(t, p.Stats().Lost)
	whole, err := tracefmt.Read(&onDevice)
	require.NoError(t, err)
	got, err := recorder.FromDevice(whole, info.Map, info.Layers)
	require.NoError(t, err)
	want, err := tracefmt.Read(&inImage)
	require.NoError(t, err)
	files.Annotate(got)
	files.Annotate(want)

	d := tracefmt.Diff(want, got)
	t.Logf("device: %d bytes in %d reads, by %s; in layers: %d", whole.Bytes(), len(whole.Events), readers(whole), got.Bytes())
	t.Logf("only the image saw %d bytes, only the probe %d, both %d; order %.4f, displacement %d", d.OnlyA, d.OnlyB, d.Both, d.Order, d.Displacement)
	require.Greater(t, d.Both, int64(3_000_000))
	require.Zero(t, d.OnlyA)
	require.Zero(t, d.OnlyB)
	require.Greater(t, d.Order, 0.9)
	require.LessOrEqual(t, got.Bytes(), whole.Bytes()) // what is in no layer reads as zeros, and is nobody's demand
	for _, path := range []string{"/app/hostname", "/data/a", "/data/big"} {
		require.Contains(t, pathsBy(got, "cat"), path)
	}
	require.Contains(t, pathsBy(got, "sh"), "/bin/cat") // which it has executed
}

// pathsBy are the files that a process has read.
func pathsBy(t *tracefmt.Trace, process string) (paths []string) {
	for _, e := range t.Events {
		if e.Process == process && e.Path != "" {
			paths = append(paths, e.Path)
		}
	}
	return paths
}

// A deviceRecord is a record --device that is under way.
type deviceRecord struct {
	cmd    *exec.Cmd
	stderr *bufio.Reader
}

// recordDevice starts to record and returns when the recording has begun.
func (b *bench) recordDevice(args ...string) *deviceRecord {
	b.t.Helper()
	r := &deviceRecord{cmd: b.command(append([]string{"record"}, args...)...)}
	pipe, err := r.cmd.StderrPipe()
	require.NoError(b.t, err)
	r.stderr = bufio.NewReader(pipe)
	require.NoError(b.t, r.cmd.Start())
	line, err := r.stderr.ReadString('\n')
	require.NoError(b.t, err)
	if !strings.HasPrefix(line, "recording /dev/") {
		rest, _ := io.ReadAll(r.stderr)
		b.t.Fatalf("%q: %s%s", args, line, rest)
	}
	return r
}

// end waits for the end of the recording and returns what it says.
func (r *deviceRecord) end(t testing.TB) string {
	t.Helper()
	said, err := io.ReadAll(r.stderr)
	require.NoError(t, err)
	require.NoError(t, r.cmd.Wait(), "%s", said)
	return string(said)
}

// mounted mounts an image, and tells its device.
func (b *bench) mounted(ref string) (dir, dev string) {
	b.t.Helper()
	dir = b.mkdir("mnt")
	b.ok("mount", "--transport", "fuse", ref, dir)
	b.t.Cleanup(func() { b.run("umount", dir) })
	p, err := os.ReadFile("/proc/self/mounts")
	require.NoError(b.t, err)
	for line := range strings.Lines(string(p)) {
		if f := strings.Fields(line); f[1] == dir {
			return dir, f[0]
		}
	}
	b.t.Fatalf("%s is not mounted", dir)
	return "", ""
}

// reads has a process of its own read files.
func reads(t testing.TB, paths ...string) (pid int) {
	t.Helper()
	cmd := exec.Command("cat", paths...)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = io.Copy(io.Discard, out)
	require.NoError(t, err)
	require.NoError(t, cmd.Wait())
	return cmd.Process.Pid
}

func TestRecordDevice(t *testing.T) {
	skipWithoutProbe(t)
	b := newBench(t)
	s := b.ownSite(false)
	dir, dev := b.mounted(s.ref)

	// In layers, with files; and at the same time in device space, live.
	file, live := b.path("trace"), b.path("live")
	r := b.recordDevice("--device", dev, "-o", file, "--attach", "--workload", "test", s.ref)
	l := b.recordDevice("--device", dev, "-o", live, "--quiet", "-1s")
	pid := reads(t, dir+"/data/a", dir+"/app/page-7")
	eventually(t, "the live file has what was read", func() bool {
		tr, err := tracefmt.Open(live)
		return err == nil && tr.Bytes() >= 310_000
	})
	require.NoError(t, l.cmd.Process.Kill())
	_, _ = io.Copy(io.Discard, l.stderr)
	_ = l.cmd.Wait()
	require.NoError(t, r.cmd.Process.Signal(unix.SIGINT))
	said := r.end(t)
	require.Contains(t, said, dev+" by cat")
	require.Contains(t, said, "ended by stop: interrupt")

	tr, err := tracefmt.Open(file)
	require.NoError(t, err)
	require.Equal(t, tracefmt.LayerSpace, tr.Space)
	require.Equal(t, s.ref, tr.Image)
	require.NotEmpty(t, tr.Manifest)
	require.Len(t, tr.Layers, len(small.layers))
	require.Equal(t, "test", tr.Workload)
	require.Equal(t, smallConfig.Cmd, tr.Args)
	require.EqualValues(t, 128<<10, tr.ReadAhead)
	require.Contains(t, tr.End.Reason, "stop: ")
	bytes := map[string]int64{}
	var waits time.Duration
	for _, e := range tr.Events {
		bytes[e.Path] += e.Len
		require.Equal(t, "cat", e.Process)
		require.Equal(t, pid, e.Pid)
		waits += e.Wait
	}
	require.Positive(t, waits)
	require.GreaterOrEqual(t, bytes["/data/a"], int64(300_000))
	require.GreaterOrEqual(t, bytes["/app/page-7"], int64(10_000))

	cut, err := tracefmt.Open(live)
	require.NoError(t, err)
	require.Nil(t, cut.End)
	require.Equal(t, tracefmt.DeviceSpace, cut.Space)
	require.Empty(t, cut.Layers)

	require.Contains(t, b.ok("trace", "ls", s.ref), "test")
	b.ok("umount", dir)
}

// A device is recorded until the container that a process is in listens, and only
// what that container reads.
func TestRecordDeviceOfContainer(t *testing.T) {
	skipWithoutProbe(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	dir, dev := b.mounted(s.ref)

	child := exec.Command("sh", "-c", "echo here; read go; cat "+dir+"/data/a >/dev/null; read listen; exec python3 -c '"+
		"import socket,sys; s=socket.socket(); s.bind((\"127.0.0.1\",0)); s.listen(); print(s.getsockname()[1],flush=True); sys.stdin.read()'")
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	in, err := child.StdinPipe()
	require.NoError(t, err)
	out, err := child.StdoutPipe()
	require.NoError(t, err)
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("needs python3")
	}
	require.NoError(t, child.Start())
	end := sync.OnceValue(func() error { return errors.Join(in.Close(), child.Wait()) })
	defer end()
	lines := bufio.NewReader(out)
	_, err = lines.ReadString('\n')
	require.NoError(t, err)

	file := b.path("trace")
	r := b.recordDevice("--device", dev, "--pid", strconv.Itoa(child.Process.Pid), "--tail", "0s", "--quiet=-1s", "-o", file)
	reads(t, dir+"/data/big")
	other, err := net.Listen("tcp", "127.0.0.1:0") // nothing to do with it
	require.NoError(t, err)
	defer other.Close()
	_, err = io.WriteString(in, "go\nlisten\n")
	require.NoError(t, err)
	port, err := lines.ReadString('\n')
	require.NoError(t, err)
	said := r.end(t)
	require.Contains(t, said, "ended by ready: port "+strings.TrimSpace(port))

	tr, err := tracefmt.Open(file)
	require.NoError(t, err)
	require.Positive(t, tr.End.Ready)
	require.InDelta(t, 300_000, tr.Bytes(), 50_000) // data/a, not data/big
	for _, e := range tr.Events {
		require.Equal(t, "cat", e.Process)
		require.True(t, strings.HasPrefix(e.Container, "mnt:["), e.Container)
	}
	require.NoError(t, end()) // it has the mount, too
	b.ok("umount", dir)
}

// --ready-port is of the whole machine. It is an error if nothing was read.
func TestRecordDeviceReadyPort(t *testing.T) {
	skipWithoutProbe(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	dir, dev := b.mounted(s.ref)
	l, err := net.Listen("tcp", "127.0.0.1:0") // finds a port
	require.NoError(t, err)
	addr := l.Addr().(*net.TCPAddr)
	require.NoError(t, l.Close())

	file := b.path("trace")
	r := b.recordDevice("--device", dev, "--ready-port", strconv.Itoa(addr.Port), "--tail", "0s", "-o", file)
	reads(t, dir+"/data/a")
	l, err = net.Listen("tcp", addr.String())
	require.NoError(t, err)
	defer l.Close()
	require.Contains(t, r.end(t), fmt.Sprintf("ended by ready: port %d", addr.Port))
	tr, err := tracefmt.Open(file)
	require.NoError(t, err)
	require.GreaterOrEqual(t, tr.Bytes(), int64(300_000))

	here := b.run("record", "--device", dev, "--pid", strconv.Itoa(os.Getpid()), "-o", b.path("none"))
	require.Equal(t, exitFailed, here.code)
	require.Contains(t, here.stderr, fmt.Sprintf("process %d is in no container", os.Getpid()))

	none := b.run("record", "--device", dev, "--for", "1ms", "-o", b.path("none"))
	require.Equal(t, exitFailed, none.code)
	require.Contains(t, none.stderr, "nothing was read from "+dev+": the trace is empty")
	b.ok("umount", dir)
}

func TestRecordDeviceWrong(t *testing.T) {
	b := newBench(t)
	out := []string{"-o", b.path("trace")}
	for _, tt := range []struct {
		line   string
		status int
		says   string
	}{
		{"--device /dev/null", exitFailed, "/dev/null is not a block device"},
		{"--device /no/such", exitFailed, "/no/such: no such file"},
		{"--device= x", exitUsage, "--device is empty"},
		{"--pid 5 x", exitUsage, "--pid needs --device"},
		{"--device /dev/null --pid 0", exitUsage, "--pid 0: not a process"},
		{"--device /dev/null --pid=-4", exitUsage, "--pid -4: not a process"},
		{"--device /dev/null --attach", exitUsage, "--attach needs the image reference"},
		{"--device /dev/null --net own", exitUsage, "--net is for a container that record runs"},
		{"--device /dev/null --ready-log x", exitUsage, "--ready-log is for a container"},
		{"--device /dev/null --runs 3", exitUsage, "--runs is for a container"},
		{"--device /dev/null --ready-port 0", exitUsage, "--ready-port 0: not a port"},
		{"--device /dev/null --ready-port 70000", exitUsage, "--ready-port 70000: not a port"},
		{"--device /dev/null x y", exitUsage, "takes an image reference at most"},
		{"--device /dev/null x -- /bin/true", exitUsage, "runs no command"},
	} {
		b.fails(tt.status, append(append([]string{"record"}, out...), strings.Fields(tt.line)...), tt.says)
	}
	require.NoFileExists(t, out[1])
}

// Without privilege one line says what is missing.
func TestRecordDeviceNobody(t *testing.T) {
	skipWithoutProbe(t)
	b := newBench(t)
	dev := filepath.Join(b.mkdir("dev"), "disk")
	require.NoError(t, unix.Mknod(dev, unix.S_IFBLK|0o644, int(unix.Mkdev(7, 0))))
	require.NoError(t, os.Chmod(dev, 0o644))
	cmd := b.command("record", "--device", dev, "-o", b.path("trace"))
	cmd.Path = b.executable()
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	b.complains(b.finish(cmd), exitFailed, cmd.Args, "record "+dev+": eBPF: no privilege: it needs root, or CAP_BPF and CAP_PERFMON")
}

// What doctor says of eBPF: both lines, and the cure where there is one.
func TestCheckBPF(t *testing.T) {
	var here string
	for _, tt := range []struct {
		btf    string
		err    error
		grades [2]grade
		remedy string
	}{
		{os.Args[0], nil, [2]grade{fine, fine}, ""},
		{"/no/such/file", nil, [2]grade{lacking, without}, "a kernel with CONFIG_DEBUG_INFO_BTF"},
		{os.Args[0], &probe.UnsupportedError{Missing: "the kernel is locked down", Hint: "lockdown=none"}, [2]grade{fine, lacking}, "lockdown=none"},
	} {
		found := checkBPF(tt.btf, func() error { return tt.err })
		require.Len(t, found, 2)
		if os.Geteuid() != 0 && tt.grades[1] == lacking {
			tt.grades[1] = without // it is for root only
		}
		require.Equal(t, tt.grades, [2]grade{found[0].Grade, found[1].Grade})
		require.Equal(t, tt.remedy, found[0].Remedy+found[1].Remedy)
		here += found[1].Detail
	}
	require.Contains(t, here, "the kernel is locked down: recordings do not tell who read, and record --device does not work")
}
