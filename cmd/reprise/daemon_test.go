package main

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// daemon starts a daemon, under a supervisor if so asked, and returns when it
// serves. said gives what it has said, once it has ended.
func (b *bench) daemon(supervised bool) (cmd *exec.Cmd, said func() string) {
	b.t.Helper()
	args := []string{"daemon", "--root", b.root}
	if supervised {
		self, err := os.Executable()
		require.NoError(b.t, err)
		args = append([]string{"supervise", "--", self}, args...)
	}
	cmd = b.command(args...)
	said = b.start(cmd, func(line string) bool { return strings.Contains(line, "the daemon serves") })
	return cmd, said
}

// daemonPid is the process that has the control socket.
func (b *bench) daemonPid() int {
	b.t.Helper()
	found := 0
	eventually(b.t, "a daemon", func() bool {
		for _, pid := range b.processes() {
			if c := cmdline(pid); strings.Contains(c, " daemon --root ") && !strings.Contains(c, " supervise ") {
				found = pid
				return true
			}
		}
		return false
	})
	return found
}

// TestDaemon mounts and runs through a daemon, which is killed meanwhile.
func TestDaemon(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	supervisor, said := b.daemon(true)
	b.fails2(exitFailed, []string{"daemon", "--root", b.root}, "another daemon serves")

	ro, rw := b.mkdir("ro"), b.mkdir("rw")
	require.Contains(t, b.ok("mount", s.ref, ro), fmt.Sprintf("served by process %d", b.daemonPid()))
	b.ok("mount", "--rw", s.ref, rw)
	uses := []*use{b.use(ro, false), b.use(rw, true)}
	for range 5 {
		for _, u := range uses {
			u.rounds(1)
		}
		pid := b.daemonPid()
		require.NoError(t, unix.Kill(pid, unix.SIGKILL))
		eventually(t, "another daemon", func() bool { return b.daemonPid() != pid })
	}
	for _, u := range uses {
		u.rounds(1)
		u.end()
	}

	// Containers, too, and what is logged of their images is passed on.
	r := b.run("run", "--trace", "missing", s.ref)
	require.Zero(t, r.code, r.stderr)
	require.Equal(t, "hello from the image\n", r.stdout)
	b.fails2(exitFailed, []string{"run", s.ref + "-not-there"}, "open "+s.ref+"-not-there", "404")
	b.fails2(exitFailed, []string{"mount", s.ref + "-not-there", b.mkdir("mnt")}, "mount "+s.ref+"-not-there", "404")
	b.fails2(exitFailed, []string{"mount", s.ref, ro}, "another reprise process has an image there already")

	loop := `trap 'exit 7' TERM; echo up; while read -r word; do cat /data/a /data/big /app/page-* > /dev/null || exit 3; echo $word; done`
	cmd := b.command("run", s.ref, "--", "/bin/sh", "-c", loop)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	output := b.start(cmd, func(line string) bool { return line == "up" })
	pid := b.daemonPid()
	require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	dropPageCache(t)
	_, err = fmt.Fprintln(in, "word")
	require.NoError(t, err)
	require.NoError(t, in.Close())
	require.NoError(t, cmd.Wait(), output())
	require.Contains(t, output(), "word\n")

	// A client that is killed takes its container along, and the daemon the device.
	cmd = b.command("run", "-e", "WAIT=1000", s.ref)
	b.start(cmd, func(line string) bool { return line == "hello from the image" })
	devices := len(b.loops())
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	eventually(t, "its device goes", func() bool { return len(b.loops()) == devices-1 })

	// The supervisor's end is the daemon's. What is in use goes on until then.
	f, err := os.Open(ro + "/data/big")
	require.NoError(t, err)
	require.NoError(t, supervisor.Process.Signal(unix.SIGTERM))
	eventually(t, "what nothing uses is unmounted", func() bool { return len(b.mounts()) == 1 })
	require.NoError(t, readThrough(ro+"/data/big", randomBytes(3, 3_000_000)))
	require.NoError(t, f.Close())
	if r := b.run("umount", ro); r.code != 0 { // the daemon was faster
		require.Contains(t, r.stderr, "no image of this state directory is mounted there")
	}
	require.NoError(t, supervisor.Wait(), said())
	b.settled()
}

// fails2 is fails where processes of the test go on.
func (b *bench) fails2(status int, args []string, words ...string) {
	b.t.Helper()
	r := b.run(args...)
	require.Equal(b.t, status, r.code, "%q:\n%s", args, r.stderr)
	for _, w := range words {
		require.Contains(b.t, message(r.stderr), w, "%q", args)
	}
}

// TestDaemonUpgrade: the next process has the devices, of whatever program; one
// that does not come up is put back.
func TestDaemonUpgrade(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	b.fails(exitFailed, []string{"daemon", "upgrade", "--root", b.root}, "no daemon listens at")
	supervisor, said := b.daemon(true)
	dir := b.mkdir("mnt")
	b.ok("mount", "--rw", s.ref, dir)
	u := b.use(dir, true)
	for i := range 3 {
		u.rounds(1)
		before := b.daemonPid()
		next := b.executable()
		require.NoError(t, os.Rename(next, b.path(fmt.Sprint("program-", i))))
		out := b.ok("daemon", "upgrade", "--root", b.root, "--binary", b.path(fmt.Sprint("program-", i)))
		require.Contains(t, out, fmt.Sprintf("in the place of process %d", before))
		now := b.daemonPid()
		require.NotEqual(t, before, now)
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", now))
		require.NoError(t, err)
		require.Equal(t, b.path(fmt.Sprint("program-", i)), exe)
		u.rounds(1)
	}
	b.fails2(exitFailed, []string{"daemon", "upgrade", "--root", b.root, "--binary", "/bin/false"}, "did not become ready", "program-2 serves again")
	b.fails2(exitFailed, []string{"daemon", "upgrade", "--root", b.root, "--binary", b.path("missing")}, "no such file")
	b.fails2(exitFailed, []string{"daemon", "upgrade", "--root", b.root, "--binary", b.dir}, "not a program")
	b.ok("daemon", "upgrade", "--root", b.root)
	u.rounds(2)
	u.end()
	b.ok("umount", dir)
	require.NoError(t, supervisor.Process.Signal(unix.SIGTERM))
	require.NoError(t, supervisor.Wait(), said())
	b.settled()
}

// TestDaemonAlone: without a service manager devices end with the daemon, which
// does not end silently while they are in use. The next one cleans up.
func TestDaemonAlone(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	cmd, said := b.daemon(false)
	b.fails2(exitFailed, []string{"daemon", "upgrade", "--root", b.root}, "nobody would start the daemon again")
	dir := b.mkdir("mnt")
	b.ok("mount", s.ref, dir)
	f, err := os.Open(dir + "/data/big")
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	require.NoError(t, readThrough(dir+"/data/big", randomBytes(3, 3_000_000)))
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	_ = cmd.Wait()
	require.Contains(t, said(), "a second signal takes it away")
	require.Contains(t, said(), dir)
	_ = f.Close()
	b.settled()

	cmd, _ = b.daemon(false)
	b.ok("mount", s.ref, dir)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	require.NotEmpty(t, b.mounts(), "a dead mount")
	cmd, said = b.daemon(false)
	require.Empty(t, b.mounts())
	b.ok("mount", s.ref, dir)
	b.ok("umount", dir)
	require.NoError(t, cmd.Process.Signal(unix.SIGINT))
	require.NoError(t, cmd.Wait(), said())
	b.settled()
}

// TestDeadRegistry: what is shut down while the registry does not answer ends in
// bounded time.
func TestDeadRegistry(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	dead := func() {
		s.SetFault(func(*http.Request) *regtest.Fault { return &regtest.Fault{Stall: time.Hour} })
	}
	dir := b.mkdir("mnt")
	for _, rw := range []bool{false, true} {
		require.NoError(t, os.RemoveAll(b.root))
		b.ok("mount", fmt.Sprintf("--rw=%v", rw), s.ref, dir)
		dead()
		if rw {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "new"), make([]byte, 100_000), 0o600))
		}
		reader := exec.Command("cat", dir+"/data/big")
		require.NoError(t, reader.Start())
		eventually(t, "it waits", func() bool { return waits(reader.Process.Pid) })
		require.NoError(t, unix.Kill(b.server(dir), unix.SIGKILL))
		// A process that waits for bytes cannot be ended, and keeps the mount busy:
		// only force helps. The second signal is that.
		r := b.run("umount", dir)
		require.Equal(t, exitFailed, r.code)
		require.Contains(t, r.stderr, "files on it are in use")
		for !terminated(b, dir) {
			time.Sleep(10 * time.Millisecond)
		}
		_ = reader.Process.Kill()
		_ = reader.Wait()
		s.SetFault(nil)
		b.settled()
	}

	cmd := b.command("run", s.ref, "--", "/bin/sh", "-c", "echo up; read -r word; cat /data/more")
	require.NoError(t, os.RemoveAll(b.root))
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	b.start(cmd, func(line string) bool { return line == "up" })
	dead()
	_, err = fmt.Fprintln(in, "word")
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	_ = cmd.Wait()
	s.SetFault(nil)
	b.settled()
}

// terminated tells the keeper of a mount to end it, until it has.
func terminated(b *bench, dir string) bool {
	m := b.stateOf(dir)
	if m == nil {
		return true
	}
	for _, pid := range b.processes() {
		if strings.Contains(cmdline(pid), " "+keepName+" ") {
			_ = unix.Kill(pid, unix.SIGTERM)
			return false
		}
	}
	return true
}

// waits tells whether a process waits for a device.
func waits(pid int) bool {
	p, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, _ := strings.Cut(string(p), ") ")
	return strings.HasPrefix(after, "D")
}

func TestDaemonUsage(t *testing.T) {
	b := newBench(t)
	require.Contains(t, b.ok("daemon", "unit"), "FileDescriptorStorePreserve=yes")
	for line, says := range map[string]string{
		"daemon frob": `unknown command "frob"`, "daemon --root=": "--root is empty", "daemon upgrade x": "unknown command",
		"daemon upgrade --root=": "--root is empty", "daemon --outage -1s": "--outage -1s",
	} {
		r := b.run(strings.Fields(line)...)
		require.Equal(t, exitUsage, r.code, r.stderr)
		require.Contains(t, r.stderr, says)
	}
}
