package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/registry/regtest"
)

// server is the process that serves a mount of the test.
func (b *bench) server(dir string) int {
	b.t.Helper()
	states, err := filepath.Glob(filepath.Join(b.root, "mounts", "*.json"))
	require.NoError(b.t, err)
	for _, name := range states {
		p, err := os.ReadFile(name)
		require.NoError(b.t, err)
		if m := decode(b.t, string(p), "dir", "pid"); m["dir"] == dir {
			return int(m["pid"].(float64))
		}
	}
	b.t.Fatalf("no state of %s", dir)
	return 0
}

// watcher is the process that watches a server.
func (b *bench) watcher(server int) int {
	for _, pid := range b.processes() {
		if strings.HasSuffix(cmdline(pid), fmt.Sprintf(" %d", server)) {
			return pid
		}
	}
	b.t.Fatalf("no watcher of process %d", server)
	return 0
}

func TestMountPoint(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	file := b.write("file", "precious")
	b.fails(exitFailed, []string{"mount", s.ref, b.path("missing")}, b.path("missing"), "make it first")
	b.fails(exitFailed, []string{"mount", s.ref, file}, file, "not a directory")
	tmp := b.mkdir("tmpfs")
	require.NoError(t, unix.Mount("tmpfs", tmp, "tmpfs", 0, ""))
	defer func() { require.NoError(t, unix.Unmount(tmp, 0)) }()
	b.fails(exitFailed, []string{"mount", s.ref, tmp}, tmp, "something is mounted there already")

	// What is not ours is not unmounted.
	b.fails(exitFailed, []string{"umount", tmp}, tmp, "no image of this state directory", b.root, "--root")
	b.fails(exitFailed, []string{"umount", b.mkdir("plain")}, "no image of this state directory")
	b.fails(exitFailed, []string{"umount", b.path("missing")}, "no image of this state directory")
	b.fails(exitFailed, []string{"umount", "--root", b.path("elsewhere"), tmp}, "no image of this state directory")
	require.NoDirExists(t, b.path("elsewhere"))

	dir := b.mkdir("a dir\twith blanks")
	link := b.path("link")
	require.NoError(t, os.Symlink(dir, link))
	b.ok("mount", s.ref, link)
	r := b.run("mount", s.ref, dir)
	require.Equal(t, exitFailed, r.code)
	require.Contains(t, message(r.stderr), "another reprise process has an image there already")
	require.FileExists(t, dir+"/data/a", "the first one is still there")
	require.Equal(t, exitFailed, b.run("umount", "--root", b.path("elsewhere"), dir).code)

	busy, err := os.Open(dir + "/data/a")
	require.NoError(t, err)
	r = b.run("umount", dir)
	require.Equal(t, exitFailed, r.code)
	require.Contains(t, message(r.stderr), "files on it are in use, 'fuser -vm")
	require.FileExists(t, dir+"/data/a")
	require.NoError(t, busy.Close())
	b.ok("umount", link)
	b.settled()

	// umount(8), or whoever calls umount(2), does as well; and at once there is room for the next.
	for range 3 {
		b.ok("mount", s.ref, dir)
		require.NoError(t, unix.Unmount(dir, 0))
	}
	b.settled()
}

// TestMountKilled: when the server is killed its watcher unmounts; without the
// watcher, the next command does.
func TestMountKilled(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	dir := b.mkdir("mnt")
	for _, rw := range []string{"--rw=false", "--rw"} {
		b.ok("mount", rw, s.ref, dir)
		require.NoError(t, unix.Kill(b.server(dir), unix.SIGKILL))
		b.settled()
	}

	// Also while files on it are open; they are lost.
	b.ok("mount", s.ref, dir)
	f, err := os.Open(dir + "/data/big")
	require.NoError(t, err)
	require.NoError(t, unix.Kill(b.server(dir), unix.SIGKILL))
	eventually(t, "the mount goes", func() bool { return len(b.mounts()) == 0 })
	_, err = f.ReadAt(make([]byte, 1<<20), 1<<20)
	require.Error(t, err)
	require.NoError(t, f.Close())
	b.settled()

	// A watcher that finds another mount leaves it alone.
	b.ok("mount", s.ref, dir)
	server := b.server(dir)
	require.Equal(t, 0, b.run(watchName, b.root, dir, fmt.Sprint(server+1)).code)
	require.FileExists(t, dir+"/data/a")

	for _, next := range [][]string{{"umount", dir}, {"mount", s.ref, dir}} {
		server := b.server(dir)
		watcher := b.watcher(server)
		require.NoError(t, unix.Kill(watcher, unix.SIGKILL))
		require.NoError(t, unix.Kill(server, unix.SIGKILL))
		eventually(t, "the server goes", func() bool { return len(b.processes()) == 0 })
		require.NotEmpty(t, b.mounts(), "a dead mount")
		b.ok(next...)
		if next[0] == "mount" {
			require.FileExists(t, dir+"/data/a")
			break
		}
		b.settled()
		b.ok("mount", s.ref, dir)
	}
	b.ok("umount", dir)
}

// TestMountSignals: a server in the foreground unmounts when it is told to end.
func TestMountSignals(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	dir := b.mkdir("mnt")
	serve := func(args ...string) *exec.Cmd {
		cmd := b.command(append([]string{"mount", "--foreground"}, args...)...)
		require.NoError(t, cmd.Start())
		eventually(t, "it is mounted", func() bool { return len(b.mounts()) > 0 })
		return cmd
	}
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT} {
		cmd := serve(s.ref, dir)
		require.NoError(t, cmd.Process.Signal(sig))
		require.NoError(t, cmd.Wait())
		require.Empty(t, b.leftovers())
	}

	// Open files are served to their end.
	cmd := serve(s.ref, dir)
	f, err := os.Open(dir + "/data/big")
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	eventually(t, "it leaves the tree", func() bool { return len(b.mounts()) == 0 })
	got := make([]byte, 3_000_000)
	_, err = f.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, randomBytes(3, 3_000_000), got)
	require.NoError(t, f.Close())
	require.NoError(t, cmd.Wait())
	require.Empty(t, b.leftovers())

	// But a second signal ends that.
	cmd = serve(s.ref, dir)
	f, err = os.Open(dir + "/data/big")
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	eventually(t, "it leaves the tree", func() bool { return len(b.mounts()) == 0 })
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	require.Error(t, cmd.Wait())
	require.NoError(t, f.Close())
	b.settled()

	// A lazy unmount of somebody else's is the same.
	b.ok("mount", s.ref, dir)
	f, err = os.Open(dir + "/data/big")
	require.NoError(t, err)
	require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
	_, err = f.ReadAt(got, 0)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	b.settled()
}

// held has the registry answer nothing to the requests that match, and tells of
// the first of them.
func (s *site) held(match func(*http.Request) bool) (asked <-chan struct{}) {
	ch := make(chan struct{})
	var once sync.Once
	s.SetFault(func(r *http.Request) *regtest.Fault {
		if !match(r) {
			return nil
		}
		once.Do(func() { close(ch) })
		return &regtest.Fault{Stall: time.Hour}
	})
	return ch
}

// TestMountIsNotCompleted: the command is interrupted, or its server killed,
// while the registry keeps it waiting, before and in the middle of mounting.
func TestMountIsNotCompleted(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	base := b.layers(s.ref)[0]
	manifest := func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") }
	// The file system's superblock is in front; the tail is what opening reads.
	superblock := func(r *http.Request) bool {
		return strings.Contains(r.URL.Path, base) && strings.HasPrefix(r.Header.Get("Range"), "bytes=4096-")
	}
	parent := func(cmd *exec.Cmd) int { return cmd.Process.Pid }
	server := func(cmd *exec.Cmd) int {
		for _, pid := range b.processes() {
			if strings.Contains(cmdline(pid), " mount --foreground ") {
				return pid
			}
		}
		t.Fatal("no server")
		return 0
	}
	tests := map[string]struct {
		waits func(*http.Request) bool
		whom  func(*exec.Cmd) int
		sig   unix.Signal
		says  string
	}{
		"interrupted at the manifest":     {manifest, parent, unix.SIGINT, "signal received"},
		"interrupted at the superblock":   {superblock, parent, unix.SIGINT, "signal received"},
		"server killed at the manifest":   {manifest, server, unix.SIGKILL, "signal: killed"},
		"server killed at the superblock": {superblock, server, unix.SIGKILL, "signal: killed"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			asked := s.held(tt.waits)
			defer s.SetFault(nil)
			var errs strings.Builder
			cmd := b.command("mount", s.ref, b.mkdir("mnt"))
			cmd.Stderr = &errs
			require.NoError(t, cmd.Start())
			select {
			case <-asked:
			case <-time.After(patience):
				t.Error("it asks for nothing")
			}
			require.NoError(t, unix.Kill(tt.whom(cmd), tt.sig))
			_ = cmd.Wait()
			b.complains(result{cmd.ProcessState.ExitCode(), "", errs.String()}, exitFailed, cmd.Args, tt.says)
			require.Empty(t, b.files("state/mounts"))
		})
	}
}

// TestRunIsNotCompleted: the same of a start.
func TestRunIsNotCompleted(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	base := b.layers(s.ref)[0]
	for _, part := range []string{"/manifests/", base} {
		asked := s.held(func(r *http.Request) bool {
			return strings.Contains(r.URL.Path, part) && (part != base || strings.HasPrefix(r.Header.Get("Range"), "bytes=4096-"))
		})
		var errs strings.Builder
		cmd := b.command("run", s.ref)
		cmd.Stderr = &errs
		require.NoError(t, cmd.Start())
		select {
		case <-asked:
		case <-time.After(patience):
			t.Error("it asks for nothing")
		}
		require.NoError(t, cmd.Process.Signal(unix.SIGINT))
		_ = cmd.Wait()
		b.complains(result{cmd.ProcessState.ExitCode(), "", errs.String()}, exitFailed, cmd.Args, "signal received")
		s.SetFault(nil)
	}
}

// TestMountTwice: the same image at two places, and under two containers, all
// with one cache.
func TestMountTwice(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	one, two := b.mkdir("one"), b.mkdir("two")
	all := make(chan error)
	start := func(cmd *exec.Cmd) {
		go func() {
			out, err := cmd.CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%q: %w: %s", cmd.Args, err, out)
			}
			all <- err
		}()
	}
	commands := []*exec.Cmd{
		b.command("mount", s.ref, one), b.command("mount", s.ref, two),
		b.command("run", s.ref), b.command("run", s.ref),
		b.command("run", s.ref, "--", "/bin/cat", "/data/big", "/data/more"),
	}
	for _, cmd := range commands {
		start(cmd)
	}
	var errs []error
	for range commands {
		errs = append(errs, <-all)
	}
	require.NoError(t, errors.Join(errs...))
	want := expected(small.layers)
	require.Equal(t, want, withoutRoot(listTree(t, one)))
	require.Equal(t, want, withoutRoot(listTree(t, two)))
	b.ok("umount", one)
	require.FileExists(t, two+"/data/a")
	b.ok("umount", two)
	b.settled()

	// One of two that mount at the same place wins.
	first, second := b.command("mount", s.ref, one), b.command("mount", s.ref, one)
	start(first)
	start(second)
	errs = []error{<-all, <-all}
	require.True(t, (errs[0] == nil) != (errs[1] == nil), "%v", errs)
	require.FileExists(t, one+"/data/a")
	b.ok("umount", one)
}

// TestRunKilled: nothing is left of a killed run but its directory, which the
// next one removes.
func TestRunKilled(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	cmd := b.command("run", "-e", "WAIT=1000", s.ref)
	b.start(cmd, func(line string) bool { return line == "hello from the image" })
	require.NotEmpty(t, b.loops())
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	eventually(t, "all goes but the directory", func() bool {
		return len(b.processes())+len(b.mounts())+len(b.loops()) == 0
	})
	left, err := os.ReadDir(filepath.Join(b.root, "run"))
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.Equal(t, "hello from the image\n", b.ok("run", s.ref))
	b.settled()

	// A signal is passed on, and the container's status comes back.
	cmd = b.command("run", sayUp, s.ref, "--", "/bin/sh", "-c", "trap 'exit 7' TERM; : > /tmp/up; sleep 1000 & wait")
	b.start(cmd, func(line string) bool { return line == "up" })
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	_ = cmd.Wait()
	require.Equal(t, 7, cmd.ProcessState.ExitCode())
	require.Empty(t, b.leftovers())
}
