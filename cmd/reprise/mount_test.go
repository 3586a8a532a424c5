package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
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
	if m := b.stateOf(dir); m != nil {
		return int(m["pid"].(float64))
	}
	b.t.Fatalf("no state of %s", dir)
	return 0
}

// stateOf is what the state file of a mount says; nil if there is none.
func (b *bench) stateOf(dir string) map[string]any {
	b.t.Helper()
	states, err := filepath.Glob(filepath.Join(b.root, "devices", "*.json"))
	require.NoError(b.t, err)
	for _, name := range states {
		p, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		require.NoError(b.t, err)
		if m := decode(b.t, string(p), "request", "pid", "restarts"); m["dir"] == dir {
			return m
		}
	}
	return nil
}

// keeper is the process that keeps a server.
func (b *bench) keeper(server int) int {
	for _, pid := range b.processes() {
		if strings.Contains(cmdline(pid), " "+keepName+" ") && slices.Contains(children(pid), server) {
			return pid
		}
	}
	b.t.Fatalf("no keeper of process %d", server)
	return 0
}

// children are the child processes of all threads of a process.
func children(pid int) (pids []int) {
	names, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, name := range names {
		p, _ := os.ReadFile(name)
		for _, f := range strings.Fields(string(p)) {
			if n, err := strconv.Atoi(f); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

// restarted waits until a mount has another server than the given one.
func (b *bench) restarted(dir string, not int) (server int) {
	eventually(b.t, "the server is started again", func() bool {
		m := b.stateOf(dir)
		if m != nil {
			server = int(m["pid"].(float64))
		}
		return m != nil && server != not
	})
	return server
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

// TestMountKilled: a server that is killed is started again, and nobody notices
// but by waiting, with and without the registry; without its keeper it serves
// on. When both are killed the next command takes the dead mount away.
func TestMountKilled(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	dir := b.mkdir("mnt")
	for _, rw := range []bool{false, true} {
		b.ok("mount", fmt.Sprintf("--rw=%v", rw), s.ref, dir)
		use := b.use(dir, rw)
		server := 0
		for i := range 20 {
			if i == 10 { // what has been read is on this node
				s.SetFault(func(*http.Request) *regtest.Fault { return &regtest.Fault{Stall: time.Hour} })
			}
			server = b.restarted(dir, server)
			use.rounds(2)
			require.NoError(t, unix.Kill(server, unix.SIGKILL))
		}
		use.rounds(2)
		use.end()
		s.SetFault(nil)
		require.EqualValues(t, 20, b.stateOf(dir)["restarts"])
		if !rw {
			require.Equal(t, expected(small.layers), withoutRoot(listTree(t, dir)))
		}
		b.ok("umount", dir)
		b.settled()
	}

	// Without its keeper a server goes on, and ends as any other.
	b.ok("mount", s.ref, dir)
	server := b.server(dir)
	keeper := b.keeper(server)
	require.NoError(t, unix.Kill(keeper, unix.SIGKILL))
	eventually(t, "the keeper goes", func() bool { return !slices.Contains(b.processes(), keeper) })
	require.FileExists(t, dir+"/data/a")
	require.Equal(t, server, b.server(dir))
	b.ok("umount", dir)
	b.settled()

	// A server that crashes again and again is given up, and its mount with it.
	b.ok("mount", s.ref, dir)
	for crashed := 0; len(b.mounts()) > 0; {
		if m := b.stateOf(dir); m != nil && int(m["pid"].(float64)) != crashed {
			crashed = int(m["pid"].(float64))
			_ = unix.Kill(crashed, unix.SIGSEGV)
		}
	}
	b.settled()

	for _, next := range [][]string{{"umount", dir}, {"mount", s.ref, dir}} {
		b.ok("mount", s.ref, dir)
		server := b.server(dir)
		require.NoError(t, unix.Kill(b.keeper(server), unix.SIGKILL))
		require.NoError(t, unix.Kill(server, unix.SIGKILL))
		// The whole of it: with its last descriptor, its environment goes before.
		eventually(t, "the server goes", func() bool { return unix.Kill(server, 0) != nil || isZombie(server) })
		require.Empty(t, b.processes())
		require.NotEmpty(t, b.mounts(), "a dead mount")
		b.ok(next...)
		if next[0] == "mount" {
			require.FileExists(t, dir+"/data/a")
			b.ok("umount", dir)
		}
		b.settled()
	}
}

// A use reads a mount of the small image again and again, past the page cache,
// and writes to it if that can be.
type use struct {
	t    testing.TB
	done chan struct{} // gets something after each round
	stop chan struct{}
	err  chan error
}

func (b *bench) use(dir string, write bool) *use {
	u := &use{t: b.t, done: make(chan struct{}), stop: make(chan struct{}), err: make(chan error, 1)}
	go func() {
		for i := 0; ; i++ {
			if err := useOnce(dir, write, i); err != nil {
				u.err <- err
				return
			}
			select {
			case u.done <- struct{}{}:
			case <-u.stop:
				close(u.err)
				return
			}
		}
	}()
	return u
}

func useOnce(dir string, write bool, i int) error {
	var files = map[string][]byte{"/data/a": randomBytes(1, 300_000), "/data/big": randomBytes(3, 3_000_000)}
	if write {
		name := fmt.Sprintf("/written-%d", i%7)
		files[name] = randomBytes(uint64(1000+i), 200_000)
		f, err := os.Create(dir + name)
		if err != nil {
			return err
		}
		_, err = f.Write(files[name])
		if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
		if i%3 == 2 {
			if err := os.Remove(fmt.Sprintf("%s/written-%d", dir, (i+3)%7)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	for name, want := range files {
		if err := readThrough(dir+name, want); err != nil {
			return err
		}
	}
	return nil
}

// readThrough reads a file from the device and compares it.
func readThrough(path string, want []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	got, err := io.ReadAll(f)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%s: wrong bytes", path)
	}
	return err
}

// rounds waits until all has been read, and written, n times more.
func (u *use) rounds(n int) {
	u.t.Helper()
	for range n {
		select {
		case <-u.done:
		case err := <-u.err:
			u.t.Fatal(err)
		case <-time.After(patience):
			u.t.Fatal("reading or writing does not come to an end")
		}
	}
}

func (u *use) end() {
	u.t.Helper()
	close(u.stop)
	require.NoError(u.t, <-u.err)
}

// TestMountSignals: a server in the foreground unmounts when it is told to end.
func TestMountSignals(t *testing.T) {
	skipUnprivileged(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	dir := b.mkdir("mnt")
	said := func() string { return "" }
	serve := func(args ...string) *exec.Cmd {
		cmd := b.command(append([]string{"mount", "--foreground"}, args...)...)
		said = b.start(cmd, func(line string) bool { return strings.Contains(line, " mounted at ") })
		return cmd
	}
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT} {
		cmd := serve(s.ref, dir)
		require.NoError(t, cmd.Process.Signal(sig))
		err := cmd.Wait()
		require.NoError(t, err, said())
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

// dropPageCache makes all reads go to the devices.
func dropPageCache(t testing.TB) {
	t.Helper()
	require.NoError(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
}

// serverPids are the private servers of the test, without the copies that make
// a system call for them.
func (b *bench) serverPids() (pids []int) {
	serves := func(pid int) bool {
		c := cmdline(pid)
		return strings.Contains(c, " "+serveName+" ") && !strings.Contains(c, " "+keepName+" ")
	}
	for _, pid := range b.processes() {
		if serves(pid) && !serves(parent(pid)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// parent is the process ID of a process's parent, 0 if it is gone.
func parent(pid int) (ppid int) {
	p, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, _ := strings.Cut(string(p), ") ")
	_, _ = fmt.Sscanf(after, "%c %d", new(rune), &ppid)
	return ppid
}

// serverOf is the private server that is about to serve what a command asks for.
func (b *bench) serverOf() int {
	b.t.Helper()
	pids := b.serverPids()
	require.Len(b.t, pids, 1)
	return pids[0]
}

// TestMountIsNotCompleted: the command is interrupted, or its server killed,
// while the registry keeps it waiting, before and in the middle of mounting.
// The next server does what the killed one was asked for.
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
	places := map[string]func(*http.Request) bool{"manifest": manifest, "superblock": superblock}
	for name, waits := range places {
		t.Run("interrupted at the "+name, func(t *testing.T) {
			asked := s.held(waits)
			defer s.SetFault(nil)
			cmd, errs := b.mounting(s, asked)
			require.NoError(t, cmd.Process.Signal(unix.SIGINT))
			_ = cmd.Wait()
			b.complains(result{cmd.ProcessState.ExitCode(), "", errs.String()}, exitFailed, cmd.Args, "signal received")
		})
		t.Run("server killed at the "+name, func(t *testing.T) {
			asked := s.held(waits)
			defer s.SetFault(nil)
			cmd, errs := b.mounting(s, asked)
			first := b.serverOf()
			require.NoError(t, unix.Kill(first, unix.SIGKILL))
			s.SetFault(nil)
			require.NoError(t, cmd.Wait(), errs.String())
			require.NotEqual(t, first, b.server(b.path("mnt")))
			require.FileExists(t, b.path("mnt/data/a"))
			b.ok("umount", b.path("mnt"))
			b.settled()
		})
	}
}

// mounting starts to mount, into a new state directory, up to the request that
// is held.
func (b *bench) mounting(s *site, asked <-chan struct{}) (*exec.Cmd, *strings.Builder) {
	b.t.Helper()
	require.NoError(b.t, os.RemoveAll(b.root))
	errs := new(strings.Builder)
	cmd := b.command("mount", s.ref, b.mkdir("mnt"))
	cmd.Stderr = errs
	require.NoError(b.t, cmd.Start())
	select {
	case <-asked:
	case <-time.After(patience):
		b.t.Fatal("it asks for nothing")
	}
	return cmd, errs
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

// TestReplayGoesOn: when the server is killed in the middle of a replay the next
// one does the rest.
func TestReplayGoesOn(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	b.ok("record", "-o", b.path("trace"), s.ref)
	require.NoError(t, os.RemoveAll(b.root))
	base := b.layers(s.ref)[0]
	asked := s.held(func(r *http.Request) bool {
		return strings.Contains(r.URL.Path, base) && strings.HasPrefix(r.Header.Get("Range"), "bytes=4096-")
	})
	cmd := b.command("run", "--explain", "--trace", b.path("trace"), s.ref)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	require.NoError(t, cmd.Start())
	select {
	case <-asked:
	case <-time.After(patience):
		t.Error("it asks for nothing")
	}
	require.NoError(t, unix.Kill(b.serverOf(), unix.SIGKILL))
	s.SetFault(nil)
	require.NoError(t, cmd.Wait(), errs.String())
	require.Equal(t, "hello from the image\n", out.String())
	require.Contains(t, errs.String(), "replay:   replayed")
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

// TestRunKilled: a killed server is started again, and the container goes on.
// A killed run takes the container along, and nothing is left of it.
func TestRunKilled(t *testing.T) {
	skipWithoutRunc(t)
	b := newBench(t)
	s := b.smallSite("0s,unlimited")
	loop := `trap 'exit 7' TERM; echo up; while read -r word; do cat /data/a /data/big /app/page-* > /dev/null || exit 3; echo $word; done`
	cmd := b.command("run", "--explain", s.ref, "--", "/bin/sh", "-c", loop)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	said := b.start(cmd, func(line string) bool { return line == "up" })
	for i := range 5 {
		server := b.serverOf()
		require.NoError(t, unix.Kill(server, unix.SIGKILL))
		dropPageCache(t)
		_, err := fmt.Fprintf(in, "word-%d\n", i)
		require.NoError(t, err)
		eventually(t, "another server", func() bool { p := b.serverPids(); return len(p) == 1 && p[0] != server })
	}
	require.NoError(t, in.Close())
	require.NoError(t, cmd.Wait(), said())
	for i := range 5 {
		require.Contains(t, said(), fmt.Sprintf("word-%d\n", i))
	}
	require.Regexp(t, `restarts: [1-5] of the image's server`, said())
	b.settled()

	cmd = b.command("run", "-e", "WAIT=1000", s.ref)
	b.start(cmd, func(line string) bool { return line == "hello from the image" })
	require.NotEmpty(t, b.loops())
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	b.settled()

	// Both at once: the kernel cleans up all but files, and the next run those.
	cmd = b.command("run", "-e", "WAIT=1000", s.ref)
	b.start(cmd, func(line string) bool { return line == "hello from the image" })
	server := b.serverOf()
	require.NoError(t, cmd.Process.Kill())
	_ = unix.Kill(server, unix.SIGKILL)
	require.Error(t, cmd.Wait())
	eventually(t, "all goes but files", func() bool {
		return len(b.processes())+len(b.mounts())+len(b.loops()) == 0
	})
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
