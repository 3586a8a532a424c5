package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/devicetest"
)

// A testSystemd is a systemd of the test's own: a user's instance in a mount
// namespace and control groups of its own, with the daemon as a service.
type testSystemd struct {
	t    *testing.T
	cmd  *exec.Cmd
	home string
	said string // file with what it prints
}

const testService = "reprise-test.service"

// startSystemd starts the daemon under systemd, by the unit that the program
// prints.
func startSystemd(t *testing.T, b *bench) *testSystemd {
	t.Helper()
	s := newTestSystemd(t, b)
	units := b.mkdir("home/.config/systemd/user")
	program := b.executable()
	text := strings.Replace(b.ok("daemon", "unit"), " daemon\n", " daemon --root "+b.root+"\n", 1)
	self, err := os.Executable()
	require.NoError(t, err)
	text = strings.ReplaceAll(text, self, program)
	require.Contains(t, text, program+" daemon --root")
	for _, needsMore := range []string{"OOMScoreAdjust=", "LimitNOFILE=", "LimitMEMLOCK="} { // than a user's instance may
		text = strings.ReplaceAll(text, "\n"+needsMore, "\n#"+needsMore)
	}
	text = strings.Replace(text, "[Service]\n", "[Service]\n"+b.unitEnv(), 1)
	require.NoError(t, os.WriteFile(filepath.Join(units, testService), []byte(text), 0o644))
	s.boot(b, "")
	require.True(t, s.ctl("start", testService), "start the daemon")
	return s
}

// newTestSystemd is an instance that does not run yet.
func newTestSystemd(t *testing.T, b *bench) *testSystemd {
	t.Helper()
	for _, tool := range []string{systemdProgram, "systemctl", "unshare", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs systemd: %v", err)
		}
	}
	return &testSystemd{t: t, home: b.mkdir("home"), said: b.path("systemd.log")}
}

const systemdProgram = "/lib/systemd/systemd"

// unitEnv is what a unit needs to run the test's program as the program.
func (b *bench) unitEnv() string {
	var env strings.Builder
	for _, v := range b.env {
		if strings.HasPrefix(v, "REPRISE_") || strings.HasPrefix(v, "DOCKER_CONFIG=") || strings.HasPrefix(v, "PATH=") || strings.HasPrefix(v, "TMPDIR=") {
			fmt.Fprintf(&env, "Environment=%s\n", strconv.Quote(v))
		}
	}
	return env.String()
}

// boot starts the instance, in a namespace that the shell script prepares.
func (s *testSystemd) boot(b *bench, prepare string) {
	t := s.t
	join := ""
	for _, dir := range controlGroups(t) {
		join += fmt.Sprintf("echo $$ > %s/cgroup.procs || exit 3\n", dir)
	}
	s.cmd = exec.Command("unshare", "-m", "sh", "-c", join+`
		mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system /run/own && chmod 700 /run/own || exit 3
		`+prepare+`
		exec `+systemdProgram+` --user --unit=basic.target`)
	s.cmd.Env = append(b.env, "HOME="+s.home, "XDG_RUNTIME_DIR=/run/own", "SYSTEMD_LOG_TARGET=console")
	log, err := os.Create(s.said)
	require.NoError(t, err)
	defer log.Close()
	s.cmd.Stdout, s.cmd.Stderr = log, log
	require.NoError(t, s.cmd.Start())
	t.Cleanup(s.end)
	for deadline := time.Now().Add(patience); !s.ctl("is-active", "basic.target"); time.Sleep(50 * time.Millisecond) {
		if isZombie(s.cmd.Process.Pid) || time.Now().After(deadline) {
			p, _ := os.ReadFile(s.said)
			t.Skipf("systemd does not run here: %s", p)
		}
	}
}

// ctl runs systemctl in the instance's namespace.
func (s *testSystemd) ctl(args ...string) bool {
	_, err := s.ask(args...)
	return err == nil
}

func (s *testSystemd) ask(args ...string) (string, error) {
	cmd := exec.Command("nsenter", append([]string{"-t", strconv.Itoa(s.cmd.Process.Pid), "-m", "systemctl", "--user"}, args...)...)
	cmd.Env = s.cmd.Env
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// version is systemd's.
func (s *testSystemd) version() (n int) {
	out, err := s.ask("--version")
	require.NoError(s.t, err)
	_, err = fmt.Sscanf(out, "systemd %d", &n)
	require.NoError(s.t, err)
	return n
}

// daemon is the service's process, once it is not the process not.
func (s *testSystemd) daemon(not int) (pid int) {
	eventually(s.t, "systemd starts the daemon again", func() bool {
		out, err := s.ask("show", "-p", "MainPID", "--value", testService)
		pid, _ = strconv.Atoi(out)
		return err == nil && pid > 0 && pid != not
	})
	return pid
}

// ok runs a command in the instance's namespace, where it must succeed: only
// there a command sees what the daemon mounts.
func (s *testSystemd) ok(b *bench, args ...string) {
	s.t.Helper()
	cmd := b.command(args...)
	cmd.Args = append([]string{"nsenter", "-t", strconv.Itoa(s.cmd.Process.Pid), "-m", cmd.Path}, cmd.Args[1:]...)
	var err error
	cmd.Path, err = exec.LookPath("nsenter")
	require.NoError(s.t, err)
	r := b.finish(cmd)
	require.Zero(s.t, r.code, "%q:\n%s", args, r.stderr)
}

// inside is a path as the instance's namespace has it.
func (s *testSystemd) inside(path string) string {
	return fmt.Sprintf("/proc/%d/root%s", s.cmd.Process.Pid, path)
}

func (s *testSystemd) end() {
	if s.cmd.ProcessState != nil {
		return
	}
	s.ctl("stop", testService, unitName)
	_ = s.cmd.Process.Signal(unix.SIGTERM)
	killed := time.AfterFunc(10*time.Second, func() { _ = s.cmd.Process.Kill() })
	_ = s.cmd.Wait()
	killed.Stop()
	if s.t.Failed() {
		p, _ := os.ReadFile(s.said)
		s.t.Logf("systemd's log:\n%s", p[max(0, len(p)-4000):])
	}
}

// controlGroups makes groups for a systemd; the end of the test removes them.
func controlGroups(t *testing.T) (dirs []string) {
	t.Helper()
	for _, at := range []string{"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(at, "cgroup.procs")); err != nil {
			continue
		}
		dir := filepath.Join(at, fmt.Sprintf("reprise-test-%d", os.Getpid()))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Skipf("needs a control group: %v", err)
		}
		dirs = append(dirs, dir)
		t.Cleanup(func() { eventually(t, "the control group "+dir+" is empty", func() bool { return removeGroups(dir) }) })
	}
	if dirs == nil {
		t.Skip("needs control groups")
	}
	return dirs
}

// removeGroups removes a control group with those below it.
func removeGroups(dir string) bool {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() && !removeGroups(filepath.Join(dir, e.Name())) {
			return false
		}
	}
	err := unix.Rmdir(dir)
	return err == nil || err == unix.ENOENT
}

// TestSystemd kills and restarts the daemon under systemd, and upgrades it,
// while an image that it serves is read.
func TestSystemd(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	ref, config := b.loadImage()
	s := startSystemd(t, b)
	rw, ro := b.mkdir("rw"), b.mkdir("ro")
	s.ok(b, "mount", "--rw", config, rw)
	s.ok(b, "mount", ref, ro)
	var loads []*devicetest.Load
	for dir, o := range map[string]devicetest.LoadOptions{rw: {Readers: 3, Writer: true}, ro: {Readers: 3}} {
		l, err := devicetest.StartLoad(s.inside(dir), o)
		require.NoError(t, err)
		loads = append(loads, l)
	}
	pid := s.daemon(0)
	for range 10 {
		require.NoError(t, unix.Kill(pid, unix.SIGKILL))
		pid = s.daemon(pid)
	}
	s.ok(b, "daemon", "upgrade", "--root", b.root)
	pid = s.daemon(pid)
	require.True(t, s.ctl("restart", testService))
	pid = s.daemon(pid)
	if s.version() >= 254 { // FileDescriptorStorePreserve=: a stop, too, leaves the devices with systemd
		require.True(t, s.ctl("stop", testService))
		require.True(t, s.ctl("start", testService))
		s.daemon(pid)
	}
	for _, l := range loads {
		result, err := l.Stop()
		require.NoError(t, err)
		t.Log(result)
	}
	for _, dir := range []string{rw, ro} {
		s.ok(b, "umount", dir)
	}
	flat := b.path("flat")
	b.ok("image", "dump", config, flat)
	devicetest.Tool(t, "e2fsck", "-fn", flat)
	s.end()
	// A daemon that systemd stops leaves its socket to the next one.
	require.NoError(t, os.Remove(filepath.Join(b.root, "reprise.sock")))
	b.settled()
}
