package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

var ctxBackground = context.Background()

// patience bounds waits that end much sooner when all is well.
const patience = 60 * time.Second

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// buffer is an output that may be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

type output struct{ stdout, stderr buffer }

// killed holds the stages that a test kills.
var killed sync.Map

func kill(s *Stage) error {
	killed.Store(s, true)
	return s.proc.Kill()
}

// newStage gives a stage that is closed before the test's directories go.
func newStage(t testing.TB, out *output) *Stage {
	t.Helper()
	o := &Options{}
	if out != nil {
		o.Stdout, o.Stderr = &out.stdout, &out.stderr
	}
	stage, err := NewStage(testContext(t), o)
	require.NoError(t, err)
	t.Cleanup(func() {
		assert.NoError(t, stage.Close())
		if _, killed := killed.Load(stage); !killed {
			assert.NoError(t, stage.waitErr, "Close had to kill the stage")
		}
	})
	return stage
}

func start(t testing.TB, cfg *Config, out *output) *Container {
	t.Helper()
	c, err := newStage(t, out).Start(testContext(t), cfg)
	require.NoError(t, err)
	return c
}

func shell(lower, script string) *Config {
	cfg := baseConfig(lower)
	cfg.Args = []string{"/bin/sh", "-c", script}
	return cfg
}

func TestExitStatus(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	for script, want := range map[string]int{"exit 0": 0, "exit 42": 42, "kill -9 $$; exit 1": 1, "sh -c 'kill -9 $$'": 137} {
		t.Run(script, func(t *testing.T) {
			status, err := start(t, shell(lower, script), nil).Wait(testContext(t))
			require.NoError(t, err)
			assert.Equal(t, want, status)
		})
	}
}

func TestProcess(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	var out output
	cfg := shell(lower, `pwd; id -u; id -g; id -G; echo $HOME; echo $A; echo $B; echo $PATH; hostname; ulimit -n; cat /etc/hosts; cat /proc/1/comm; echo oops >&2; grep CapEff /proc/self/status; touch /data/new`)
	cfg.Image.Env = []string{"PATH=/bin", "A=image", "B=image"}
	cfg.Image.User = "root"
	cfg.Image.WorkingDir = "/etc"
	cfg.Env = []string{"A=own"}
	cfg.User = "alice"
	cfg.Cwd = "/data"
	cfg.Hostname = "somewhere"
	cfg.Rlimits = []Rlimit{{Type: "RLIMIT_NOFILE", Soft: 99, Hard: 99}}
	c := start(t, cfg, &out)
	status, err := c.Wait(testContext(t))
	require.NoError(t, err)
	assert.Equal(t, 1, status, "alice may not write there")
	want := "/data\n1234\n2345\n2345 63 64\n/home/alice\nown\nimage\n/bin\nsomewhere\n99\n" +
		"127.0.0.1\tlocalhost\n::1\tlocalhost\nsh\nCapEff:\t0000000000000000\n"
	assert.Equal(t, want, out.stdout.String())
	assert.Contains(t, out.stderr.String(), "oops\n")
	for _, at := range []time.Time{c.Timeline().StageReady, c.Timeline().Mounted, c.Timeline().RuncStarted, c.Timeline().ProcessStarted, c.Timeline().Exited} {
		assert.False(t, at.IsZero())
	}
	assert.ErrorIs(t, c.Signal(unix.SIGTERM), os.ErrProcessDone)
}

func TestConfinement(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	must(t, unix.Mknod(filepath.Join(lower, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	for what, script := range map[string]string{
		"make a device":            "mknod /tmp/x c 1 3",
		"open the image's device":  "echo > /null",
		"mount":                    "mount -t tmpfs x /tmp",
		"new user namespace":       "unshare -U true",
		"write to /proc/sys":       "echo 1 > /proc/sys/vm/overcommit_memory",
		"see the stage's tmpfs":    "ls " + runDir,
		"change the machine's usr": "touch /usr/reprise-test",
	} {
		t.Run(what, func(t *testing.T) {
			status, err := start(t, shell(lower, script), nil).Wait(testContext(t))
			require.NoError(t, err)
			assert.NotZero(t, status)
		})
	}
}

func TestHostNetwork(t *testing.T) {
	probe(t)
	hosts, err := os.ReadFile("/etc/hosts")
	if err != nil {
		t.Skip("needs /etc/hosts")
	}
	var out output
	cfg := shell(makeRoot(t), "readlink /proc/self/ns/net; cat /etc/hosts; echo changed > /etc/hosts")
	cfg.Network = ""
	status, err := start(t, cfg, &out).Wait(testContext(t))
	require.NoError(t, err)
	assert.Zero(t, status)
	ns, err := os.Readlink("/proc/self/ns/net") // of the main thread, which must not stay elsewhere
	require.NoError(t, err)
	assert.Equal(t, ns+"\n"+string(hosts), out.stdout.String())
	after, err := os.ReadFile("/etc/hosts")
	require.NoError(t, err)
	assert.Equal(t, hosts, after)
}

func TestStdin(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	var out output
	stage, err := NewStage(testContext(t), &Options{Stdin: r, Stdout: &out.stdout})
	require.NoError(t, err)
	defer stage.Close()
	cfg := shell(lower, "cat")
	cfg.User = "alice"
	c, err := stage.Start(testContext(t), cfg)
	require.NoError(t, err)
	_, err = io.WriteString(w, "hello\n")
	require.NoError(t, err)
	require.NoError(t, w.Close())
	status, err := c.Wait(testContext(t))
	require.NoError(t, err)
	assert.Zero(t, status)
	assert.Equal(t, "hello\n", out.stdout.String())
	require.NoError(t, stage.Close())
	var st unix.Stat_t
	require.NoError(t, unix.Fstat(int(r.Fd()), &st))
	assert.Zero(t, st.Uid, "runc's change of owner is undone")
}

func TestStartErrors(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	used := t.TempDir()
	must(t, os.Mkdir(filepath.Join(used, "upper"), 0o755))
	for _, tt := range []struct {
		name   string
		change func(*Config)
		status int
		text   string
	}{
		{"no command in PATH", func(c *Config) { c.Args = []string{"no-such-thing"} }, 127, `command not found in the image: exec: "no-such-thing"`},
		{"no command at path", func(c *Config) { c.Args = []string{"/no/such"} }, 127, "/no/such"},
		{"not executable", func(c *Config) { c.Args = []string{"/etc/plain"} }, 126, "permission denied"},
		{"no such user", func(c *Config) { c.User = "nobody-here" }, 125, `user "nobody-here"`},
		{"no such group", func(c *Config) { c.User = "alice:nogroup-here" }, 125, "nogroup-here"},
		{"no file system", func(c *Config) { c.LowerDir, c.Device = "", image }, 125, "mount " + image},
		{"no kernel support", func(c *Config) { c.LowerDir, c.Device, c.FSType = "", image, "nosuchfs" }, 125, "modprobe nosuchfs"},
		{"no lower directory", func(c *Config) { c.LowerDir = "/no/such" }, 125, "lower directory /no/such"},
		{"used state directory", func(c *Config) { c.StateDir = used }, 125, "state of another container"},
		{"both", func(c *Config) { c.Device = image }, 125, "either Device or LowerDir"},
		{"no command at all", func(c *Config) { c.Args = nil }, 125, "no command"},
		{"bad signal", func(c *Config) { c.StopSignal = "SIGNOT" }, 125, "SIGNOT"},
		{"mount source", func(c *Config) { c.Mounts[0].Source = "/no/such" }, 125, "/no/such"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out output
			cfg := baseConfig(lower, "clock")
			tt.change(cfg)
			_, err := newStage(t, &out).Start(testContext(t), cfg)
			var start *StartError
			require.ErrorAs(t, err, &start)
			assert.Equal(t, tt.status, start.Status, err)
			assert.ErrorContains(t, err, tt.text)
			assert.Empty(t, out.stderr.String(), "the error says it")
			t.Log(err)
		})
	}
}

func TestMissingRunc(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := NewStage(t.Context(), nil)
	assert.EqualError(t, err, "runc: not found in PATH: install the package runc")
}

func TestStartTwice(t *testing.T) {
	probe(t)
	stage := newStage(t, nil)
	cfg := baseConfig(makeRoot(t), "clock")
	_, err := stage.Start(testContext(t), cfg)
	require.NoError(t, err)
	_, err = stage.Start(testContext(t), cfg)
	assert.ErrorContains(t, err, "has been used")
}

func TestCloseUnused(t *testing.T) {
	probe(t)
	stage := newStage(t, nil)
	require.NoError(t, stage.Close())
	_, err := stage.Start(testContext(t), baseConfig(makeRoot(t), "clock"))
	assert.Error(t, err)
}

func TestStartCancelled(t *testing.T) {
	probe(t)
	ctx, cancel := context.WithCancel(t.Context())
	stage := newStage(t, nil)
	killed.Store(stage, true)
	cancel()
	_, err := stage.Start(ctx, baseConfig(makeRoot(t), "deaf"))
	assert.ErrorIs(t, err, context.Canceled)
	_, err = NewStage(ctx, nil)
	assert.ErrorIs(t, err, context.Canceled)
}

func TestStateDir(t *testing.T) {
	probe(t)
	state := filepath.Join(t.TempDir(), "state")
	cfg := shell(makeRoot(t), "echo kept > /data/file")
	cfg.StateDir = state
	c := start(t, cfg, nil)
	status, err := c.Wait(testContext(t))
	require.NoError(t, err)
	assert.Zero(t, status)
	require.NoError(t, c.stage.Close())
	b, err := os.ReadFile(filepath.Join(state, "upper/data/file"))
	require.NoError(t, err)
	assert.Equal(t, "kept\n", string(b))
}

func TestSignals(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	t.Run("stop signal", func(t *testing.T) {
		cfg := baseConfig(lower, "trap", "RTMIN+2", "7")
		cfg.Image.StopSignal = "SIGRTMIN+2"
		cfg.Ready.Log = regexp.MustCompile("^trapping$")
		c := start(t, cfg, nil)
		_, err := c.WaitReady(testContext(t))
		require.NoError(t, err)
		status, err := c.Stop(testContext(t), patience)
		require.NoError(t, err)
		assert.Equal(t, 7, status)
	})
	t.Run("killed after the grace", func(t *testing.T) {
		cfg := baseConfig(lower, "deaf")
		cfg.Ready.Log = regexp.MustCompile("^deaf$")
		c := start(t, cfg, nil)
		_, err := c.WaitReady(testContext(t))
		require.NoError(t, err)
		status, err := c.Stop(testContext(t), time.Millisecond)
		require.NoError(t, err)
		assert.Equal(t, 137, status)
		status, err = c.Stop(testContext(t), patience)
		require.NoError(t, err)
		assert.Equal(t, 137, status)
	})
}

// A first process that ignores the stop signal is not waited for: this test would
// take an hour.
func TestStopIgnored(t *testing.T) {
	probe(t)
	cfg := baseConfig(makeRoot(t), "deaf")
	cfg.Ready.Log = regexp.MustCompile("^deaf$")
	c := start(t, cfg, nil)
	_, err := c.WaitReady(testContext(t))
	require.NoError(t, err)
	status, err := c.Stop(testContext(t), time.Hour)
	require.NoError(t, err)
	assert.Equal(t, 137, status)
}

// Somebody else may tell what a container listens on.
func TestReadyTold(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	for name, tt := range map[string]struct {
		ready Ready
		ports []int
		how   string
	}{
		"auto":    {Ready{}, []int{4321, 1}, "port 4321"},
		"port":    {Ready{Port: 4321}, []int{1234, 4321}, "port 4321"},
		"unknown": {Ready{}, []int{0}, "listens on a port"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := shell(lower, "exec sleep 1000")
			cfg.Ready = tt.ready
			c := start(t, cfg, nil)
			c.Told()
			at := time.Now().Add(-time.Second)
			for i, p := range tt.ports {
				c.Listens(p, at.Add(time.Duration(i)))
			}
			got, err := c.WaitReady(testContext(t))
			require.NoError(t, err)
			assert.Equal(t, tt.how, c.How())
			assert.WithinDuration(t, at, got, time.Millisecond)
		})
	}
	t.Run("not what is waited for", func(t *testing.T) {
		cfg := shell(lower, "exit 0")
		cfg.Ready.Exit = true
		c := start(t, cfg, nil)
		c.Listens(4321, time.Now())
		at, err := c.WaitReady(testContext(t))
		require.NoError(t, err)
		assert.Equal(t, "exit 0", c.How())
		assert.Equal(t, c.Timeline().Exited, at)
	})
}

func TestReady(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	freePort := func(t *testing.T, network Network) string {
		if network == OwnNetwork {
			return "8080"
		}
		for { // below those that the kernel gives to other tests
			port := strconv.Itoa(20000 + rand.IntN(12000))
			if l, err := net.Listen("tcp", ":"+port); err == nil {
				require.NoError(t, l.Close())
				return port
			}
		}
	}
	for _, network := range []Network{OwnNetwork, HostNetwork} {
		t.Run(string(network), func(t *testing.T) {
			for _, tt := range []struct {
				name  string
				args  func(port string) []string
				ready func(port string) Ready
			}{
				{"port", func(p string) []string { return []string{"listen", "127.0.0.1:" + p} }, func(p string) Ready {
					n, _ := strconv.Atoi(p)
					return Ready{Port: n}
				}},
				{"port 6", func(p string) []string { return []string{"listen", ":" + p} }, func(p string) Ready {
					n, _ := strconv.Atoi(p)
					return Ready{Port: n}
				}},
				{"auto", func(p string) []string { return []string{"listen", "127.0.0.1:" + p} }, func(string) Ready { return Ready{} }},
				{"http", func(p string) []string { return []string{"http", "127.0.0.1:" + p} }, func(p string) Ready {
					return Ready{HTTP: "http://localhost:" + p + "/"}
				}},
				{"log", func(p string) []string { return []string{"listen", "127.0.0.1:" + p} }, func(p string) Ready {
					return Ready{Log: regexp.MustCompile(`^127.*:` + p + `$`)}
				}},
			} {
				t.Run(tt.name, func(t *testing.T) {
					port := freePort(t, network)
					cfg := baseConfig(lower, tt.args(port)...)
					cfg.Network, cfg.Ready = network, tt.ready(port)
					c := start(t, cfg, nil)
					at, err := c.WaitReady(testContext(t))
					require.NoError(t, err)
					assert.False(t, at.Before(c.Timeline().RuncStarted))
					if tt.name != "http" && tt.name != "log" {
						assert.Equal(t, "port "+port, c.How())
					}
					t.Log(c.Timeline(), "ready", at.Sub(c.Timeline().Requested))
				})
			}
		})
	}
}

func TestReadyExec(t *testing.T) {
	probe(t)
	cfg := shell(makeRoot(t), "touch /data/a; exec sleep 1000")
	cfg.Ready.Exec = []string{"test", "-e", "/data/a"}
	_, err := start(t, cfg, nil).WaitReady(testContext(t))
	assert.NoError(t, err)
}

// The stage executes runc from a file that it alone has open, which no garbage
// collection may close: not before the container starts, nor before runc exec.
func TestStageKeepsRunc(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	t.Setenv("GOGC", "1")
	for range 3 {
		cfg := shell(lower, "sleep 0.1; : > /tmp/up; sleep 1000")
		cfg.Ready = Ready{Exec: []string{"/bin/sh", "-c", "[ -e /tmp/up ]"}}
		c := start(t, cfg, nil)
		_, err := c.WaitReady(testContext(t))
		require.NoError(t, err)
	}
}

func TestReadyExit(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	for _, ready := range []Ready{{Exit: true}, {}} {
		cfg := shell(lower, "exit 0")
		cfg.Ready = ready
		c := start(t, cfg, nil)
		at, err := c.WaitReady(testContext(t))
		require.NoError(t, err)
		assert.Equal(t, c.Timeline().Exited, at)
	}
}

func TestNeverReady(t *testing.T) {
	probe(t)
	lower := makeRoot(t)
	for name, ready := range map[string]Ready{
		"auto": {}, "exit": {Exit: true}, "port": {Port: 1}, "log": {Log: regexp.MustCompile("x{3}")},
		"http": {HTTP: "http://127.0.0.1:1/"}, "exec": {Exec: []string{"false"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := shell(lower, "echo xx; exit 5")
			cfg.Ready = ready
			_, err := start(t, cfg, nil).WaitReady(testContext(t))
			var exited *ExitedError
			require.ErrorAs(t, err, &exited)
			assert.Equal(t, 5, exited.Status)
			t.Log(err)
		})
		t.Run(name+" in time", func(t *testing.T) {
			cfg := shell(lower, "exec sleep 1000")
			cfg.Ready = ready
			c := start(t, cfg, nil)
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
			defer cancel()
			_, err := c.WaitReady(ctx)
			require.ErrorIs(t, err, os.ErrDeadlineExceeded)
			t.Log(err)
		})
	}
}

// A line that comes with the end is seen before the end is.
func TestReadyLastLine(t *testing.T) {
	probe(t)
	cfg := shell(makeRoot(t), "printf done >&2")
	cfg.Ready.Log = regexp.MustCompile("^done$")
	_, err := start(t, cfg, nil).WaitReady(testContext(t))
	assert.NoError(t, err)
}

// listen listens on a port of the machine until the test ends.
func listen(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l.Addr().(*net.TCPAddr).Port
}

func TestPortTaken(t *testing.T) {
	probe(t)
	port := listen(t)
	for _, ready := range []Ready{{Port: port}, {HTTP: fmt.Sprintf("http://localhost:%d/", port)}} {
		cfg := baseConfig(makeRoot(t), "clock")
		cfg.Network, cfg.Ready = HostNetwork, ready
		_, err := newStage(t, nil).Start(testContext(t), cfg)
		assert.ErrorContains(t, err, fmt.Sprintf("port %d: another process listens on it already", port))
	}
}

// Another process's new port is not the container's.
func TestForeignPort(t *testing.T) {
	probe(t)
	cfg := shell(makeRoot(t), "exec sleep 1000")
	cfg.Network = HostNetwork
	c := start(t, cfg, nil)
	listen(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := c.WaitReady(ctx)
	assert.ErrorIs(t, err, os.ErrDeadlineExceeded)
}

func TestStageDies(t *testing.T) {
	probe(t)
	c := start(t, baseConfig(makeRoot(t), "deaf"), nil)
	ends := watchProcess(t, c.Pid())
	require.NoError(t, kill(c.stage))
	_, err := c.Wait(testContext(t))
	assert.ErrorContains(t, err, "stage ended: signal: killed")
	_, err = c.WaitReady(testContext(t))
	assert.ErrorContains(t, err, "stage ended")
	ends(t)
}

func TestCloseKills(t *testing.T) {
	probe(t)
	c := start(t, baseConfig(makeRoot(t), "deaf"), nil)
	ends := watchProcess(t, c.Pid())
	require.NoError(t, c.stage.Close())
	ends(t)
	status, err := c.Wait(testContext(t))
	require.NoError(t, err)
	assert.Equal(t, 137, status)
}

// watchProcess gives a function that waits for the end of a process which runs
// now.
func watchProcess(t testing.TB, pid int) func(testing.TB) {
	t.Helper()
	require.NotZero(t, pid)
	fd, err := unix.PidfdOpen(pid, 0)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	return func(t testing.TB) {
		t.Helper()
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
		require.NoError(t, err)
		assert.Equal(t, 1, n, "process %d still runs", pid)
	}
}

// SIGKILL of the program leaves no process, mount, or cgroup.
func TestKilledProgram(t *testing.T) {
	probe(t)
	t.Run("directory", func(t *testing.T) { killProgram(t, makeRoot(t)) })
	t.Run("device", func(t *testing.T) {
		dev := loopImage(t)
		killProgram(t, dev)
		free(t, dev)
	})
}

func killProgram(t *testing.T, lower string) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envProgram+"="+lower)
	cmd.Stderr = os.Stderr
	line := firstLine(t, cmd)
	var stage, first int
	_, err := fmt.Sscanf(line, "started %d %d", &stage, &first)
	require.NoError(t, err, line)
	stageEnds, firstEnds := watchProcess(t, stage), watchProcess(t, first)
	assert.Empty(t, cgroups(t))
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	firstEnds(t)
	stageEnds(t)
	assert.Empty(t, cgroups(t))
	b, err := os.ReadFile("/proc/self/mountinfo")
	require.NoError(t, err)
	assert.NotContains(t, string(b), runDir)
}

// cgroups are those that a container of ours could have made.
func cgroups(t *testing.T) (found []string) {
	t.Helper()
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "reprise-") {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// loopImage is a loop device with an ext4 file system that makeRoot would make.
func loopImage(t testing.TB) string {
	t.Helper()
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		t.Skip("needs mkfs.ext4")
	}
	dir := t.TempDir()
	tree, image := filepath.Join(dir, "tree"), filepath.Join(dir, "image")
	must(t, os.Mkdir(tree, 0o755))
	fillRoot(t, tree)
	b, err := exec.Command("mkfs.ext4", "-q", "-d", tree, image, "16M").CombinedOutput()
	require.NoError(t, err, string(b))
	return loop(t, image)
}

// loop is a loop device over a file.
func loop(t testing.TB, file string) string {
	t.Helper()
	if _, err := exec.LookPath("losetup"); err != nil {
		t.Skip("needs losetup")
	}
	b, err := exec.Command("losetup", "--find", "--show", "--read-only", file).CombinedOutput()
	if err != nil {
		t.Skipf("needs loop devices: %s", b)
	}
	dev := strings.TrimSpace(string(b))
	t.Cleanup(func() {
		b, err := exec.Command("losetup", "--detach", dev).CombinedOutput()
		assert.NoError(t, err, string(b))
	})
	return dev
}

// free fails unless nobody has the device mounted.
func free(t testing.TB, dev string) {
	t.Helper()
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	require.NoError(t, err, dev)
	require.NoError(t, unix.Close(fd))
}

func TestNoFileSystem(t *testing.T) {
	probe(t)
	image := filepath.Join(t.TempDir(), "image")
	must(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	cfg := baseConfig("", "clock")
	cfg.Device = loop(t, image)
	_, err := newStage(t, nil).Start(testContext(t), cfg)
	assert.ErrorContains(t, err, "mount "+cfg.Device+": no ext4 file system on it")
}

// Whoever joined the container must not hold up its end.
func TestExecInFlight(t *testing.T) {
	probe(t)
	for name, end := range map[string]func(*Container) error{
		"close":     func(c *Container) error { return c.stage.Close() },
		"container": func(c *Container) error { return c.Signal(unix.SIGKILL) },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := shell(makeRoot(t), "mkfifo /data/f; echo up; read x < /data/f; echo in; exec sleep 1000")
			cfg.Ready.Log = regexp.MustCompile("^in$")
			c := start(t, cfg, nil)
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = c.stage.run(testContext(t), []string{"sh", "-c", "until test -p /data/f; do :; done; echo > /data/f; exec sleep 1000"})
			}()
			_, err := c.WaitReady(testContext(t))
			require.NoError(t, err)
			require.NoError(t, end(c))
			<-done
			status, err := c.Wait(testContext(t))
			require.NoError(t, err)
			assert.Equal(t, 137, status)
		})
	}
}

func TestDevice(t *testing.T) {
	probe(t)
	dev := loopImage(t)
	for name, end := range map[string]func(*Container) error{
		"close":      func(c *Container) error { return nil },
		"exit":       func(c *Container) error { return c.Signal(unix.SIGKILL) },
		"stage dies": func(c *Container) error { return kill(c.stage) },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := shell("", "cat /etc/plain; exec sleep 1000")
			cfg.Device = dev
			cfg.Ready.Log = regexp.MustCompile("^not a program$")
			c := start(t, cfg, nil)
			_, err := c.WaitReady(testContext(t))
			require.NoError(t, err)
			fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
			if !assert.ErrorIs(t, err, unix.EBUSY) {
				unix.Close(fd)
			}
			require.NoError(t, end(c))
			require.NoError(t, c.stage.Close())
			free(t, dev)
		})
	}
}

// On a machine with cgroup v2 only, as far as runc can tell.
func TestCgroup2(t *testing.T) {
	probe(t)
	if os.Getenv("REPRISE_TEST_CGROUP2") == "" {
		cmd := exec.Command("unshare", "--mount", "sh", "-c",
			`mount --bind /sys/fs/cgroup/unified /sys/fs/cgroup 2>/dev/null || test -e /sys/fs/cgroup/cgroup.controllers || exit 77; exec "$0" -test.run '^(TestCgroup2|TestReadyExec)$' -test.v`,
			"/proc/self/exe")
		if self, err := os.Executable(); err == nil {
			cmd.Args[len(cmd.Args)-1] = self
		}
		cmd.Env = append(os.Environ(), "REPRISE_TEST_CGROUP2=1")
		b, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 77 || errors.Is(err, exec.ErrNotFound) {
			t.Skip("needs cgroup v2 and unshare")
		}
		assert.NoError(t, err, string(b))
		return
	}
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs("/sys/fs/cgroup", &st))
	require.EqualValues(t, unix.CGROUP2_SUPER_MAGIC, st.Type)
	var out output
	status, err := start(t, shell(makeRoot(t), "cat /proc/self/cgroup"), &out).Wait(testContext(t))
	require.NoError(t, err)
	assert.Zero(t, status)
	assert.Empty(t, cgroups(t))
}

// BenchmarkStart gives the time from Start to the first instruction of the
// container's program, and the steps on the way: medians, in ms.
func BenchmarkStart(b *testing.B) {
	probe(b)
	b.Run("seccomp", func(b *testing.B) { benchmarkStart(b, false) })
	b.Run("plain", func(b *testing.B) { benchmarkStart(b, true) })
}

func benchmarkStart(b *testing.B, noSeccomp bool) {
	lower := makeRoot(b)
	steps := map[string][]time.Duration{}
	for b.Loop() {
		b.StopTimer()
		var out output
		stage := newStage(b, &out)
		<-stage.up
		b.StartTimer()
		cfg := baseConfig(lower, "clock")
		cfg.NoSeccomp = noSeccomp
		c, err := stage.Start(testContext(b), cfg)
		require.NoError(b, err)
		b.StopTimer()
		_, err = c.Wait(testContext(b))
		require.NoError(b, err)
		ns, err := strconv.ParseInt(strings.TrimSpace(out.stdout.String()), 10, 64)
		require.NoError(b, err)
		t := c.Timeline()
		for step, d := range map[string]time.Duration{
			"stage": t.StageReady.Sub(t.Launched), "mounted": t.Mounted.Sub(t.Requested), "runc": t.RuncStarted.Sub(t.Requested),
			"process": t.ProcessStarted.Sub(t.Requested), "first": moment(ns).Sub(t.Requested),
		} {
			steps[step] = append(steps[step], d)
		}
		require.NoError(b, stage.Close())
		b.StartTimer()
	}
	for step, all := range steps {
		slices.Sort(all)
		b.ReportMetric(all[len(all)/2].Seconds()*1e3, step+"-ms")
	}
}

func BenchmarkListeners(b *testing.B) {
	for _, way := range []string{"sock_diag", "text"} {
		b.Run(way, func(b *testing.B) {
			p, err := newPortProbe("", "")
			require.NoError(b, err)
			defer p.close()
			if way == "text" {
				p.close()
			}
			for b.Loop() {
				_, _, err := p.listens(1)
				require.NoError(b, err)
			}
		})
	}
}

// A container does not keep the device of an image busy that is unmounted
// while it runs.
func TestForeignImageIsLetGo(t *testing.T) {
	probe(t)
	for _, tool := range []string{"mkfs.ext4", "losetup", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s: %v", tool, err)
		}
	}
	command := func(name string, args ...string) string {
		out, err := exec.Command(name, args...).CombinedOutput()
		require.NoError(t, err, "%s: %s", name, out)
		return strings.TrimSpace(string(out))
	}
	dir := t.TempDir()
	file, mnt := filepath.Join(dir, "file"), filepath.Join(dir, "mnt")
	require.NoError(t, os.Mkdir(mnt, 0o755))
	command("truncate", "-s", "4M", file)
	command("mkfs.ext4", "-q", "-F", file)
	dev := command("losetup", "--find", "--show", file)
	detached := false
	t.Cleanup(func() {
		_ = unix.Unmount(mnt, unix.MNT_DETACH)
		if !detached {
			_ = exec.Command("losetup", "--detach", dev).Run()
		}
	})
	command("mount", dev, mnt)
	require.NoError(t, os.Remove(file)) // as a server's file, it is in no directory

	cfg := baseConfig(makeRoot(t), "trap", "TERM", "0")
	cfg.Ready.Log = regexp.MustCompile("^trapping$")
	c := start(t, cfg, nil)
	_, err := c.WaitReady(testContext(t))
	require.NoError(t, err)
	require.NoError(t, unix.Unmount(mnt, 0))
	f, err := os.OpenFile(dev, os.O_RDONLY|unix.O_EXCL, 0) // fails while it is mounted anywhere
	require.NoError(t, err)
	require.NoError(t, f.Close())
	command("losetup", "--detach", dev)
	detached = true
}
