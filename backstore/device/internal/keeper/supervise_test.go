package keeper

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestKeptAcrossKill(t *testing.T) {
	r := newRig(t, Options{})
	require.Equal(t, "obey", r.up())
	r.ok("store vol.a.fuse first")
	r.ok("store vol.a.mount second")
	r.ok("store vol.b.fuse third")
	r.kill()
	first := r.pid
	r.up()
	require.NotEqual(t, first, r.pid)
	require.Equal(t, "control vol.a.fuse vol.a.mount vol.b.fuse", r.ask("names"))
	// Stored first: the highest number.
	require.Equal(t, "3=control 6=vol.a.fuse 5=vol.a.mount 4=vol.b.fuse", sorted(r.ask("handed"), "=", 1))
	require.Equal(t, "second", r.ask("read vol.a.mount"))
	r.ok("append vol.a.fuse more")
	r.kill()
	r.up()
	require.Equal(t, "firstmore", r.ask("read vol.a.fuse"))
	r.ok("remove vol.a.fuse")
	r.ok("remove nothing")
	r.kill()
	r.up()
	require.Equal(t, "control vol.a.mount vol.b.fuse", r.ask("names"))
	r.tell("exit 0")
	require.NoError(t, r.end())
}

func TestManyKills(t *testing.T) {
	kills := 200
	if testing.Short() {
		kills = 20
	}
	r := newRig(t, Options{})
	r.up()
	r.ok("store vol.log -")
	for range kills {
		r.ok("append vol.log x")
		r.kill()
		r.up()
	}
	require.Equal(t, "-"+strings.Repeat("x", kills), r.ask("read vol.log"))
	require.Equal(t, inheritable(), r.ask("cloexec"), "what this process was started with, and no more")
	require.Equal(t, 1, children(t), "zombies")
	r.tell("exit 0")
	require.NoError(t, r.end())
}

// children counts this process's, zombies as well.
func children(t *testing.T) (n int) {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	require.NoError(t, err)
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // gone
		}
		if st, err := parseStat(b); err == nil && st.ppid == os.Getpid() {
			n++
		}
	}
	return n
}

func TestDeathSignal(t *testing.T) {
	self, err := os.Executable()
	require.NoError(t, err)
	keeper := exec.Command(self)
	keeper.Env = append(os.Environ(), envChild+"=keeper")
	out, err := keeper.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, keeper.Start())
	line := make([]byte, 3)
	_, err = io.ReadFull(out, line)
	require.NoError(t, err)
	require.Equal(t, "up\n", string(line))
	require.NoError(t, keeper.Process.Kill())
	_, err = io.ReadAll(out) // ends when both are gone
	require.NoError(t, err)
	require.Error(t, keeper.Wait())
}

func TestEnvironmentIsCleared(t *testing.T) {
	t.Setenv("LISTEN_FDS", "77")
	t.Setenv("NOTIFY_SOCKET", "/nowhere")
	r := newRig(t, Options{Watchdog: time.Hour})
	r.up()
	env := r.ask("environ")
	for _, name := range ownVariables {
		require.NotContains(t, env, name+"=")
	}
}

func TestSameFileIsKeptOnce(t *testing.T) {
	r := newRig(t, Options{})
	r.up()
	r.ok("store a.x text")
	r.ok("again a.x a.y")
	r.ok("store a.x other")
	r.kill()
	r.up()
	require.Equal(t, "a.x control", r.ask("names"))
	require.Equal(t, "other", r.ask("read a.x"), "the newer")
	r.ok("remove a.x")
	r.kill()
	r.up()
	require.Equal(t, "control", r.ask("names"))
}

func TestStoreLimit(t *testing.T) {
	r := newRig(t, Options{MaxKept: 2})
	r.up()
	r.ok("store a.x 1")
	require.Contains(t, r.ask("store a.y 1"), "no more than 2", "the control socket counts: it cannot be told apart")
}

func TestNotificationsOfOthersAreIgnored(t *testing.T) {
	r := newRig(t, Options{})
	r.up()
	r.ok("grandchild")
	r.kill()
	r.up()
	require.Equal(t, "control grand.child", r.ask("names"), "a descendant of the child may store")

	name := supervisorSocket(t)
	s, err := openStore(environment{values: map[string]string{envNotify: name}})
	require.NoError(t, err)
	require.NoError(t, s.Store("not.ours", int(r.theirs.Fd())), "a stranger is not told")
	r.kill()
	r.up()
	require.Equal(t, "control grand.child", r.ask("names"))
}

// supervisorSocket finds the socket's name: this process listens on it.
func supervisorSocket(t *testing.T) string {
	b, err := os.ReadFile("/proc/net/unix")
	require.NoError(t, err)
	var found string
	for line := range strings.Lines(string(b)) {
		if i := strings.Index(line, "@reprise-keeper-"+itoa(os.Getpid())+"-"); i >= 0 {
			found = strings.TrimSpace(line[i:])
		}
	}
	require.NotEmpty(t, found)
	return found
}

func TestExitStatus(t *testing.T) {
	t.Run("zero", func(t *testing.T) {
		r := newRig(t, Options{})
		r.up()
		r.tell("exit 0")
		require.NoError(t, r.end())
	})
	t.Run("asked to end", func(t *testing.T) {
		r := newRig(t, Options{})
		r.up()
		r.signals <- unix.SIGTERM
		var exit *ExitError
		require.ErrorAs(t, r.end(), &exit)
		require.Equal(t, 128+15, exit.Status)
	})
	t.Run("context", func(t *testing.T) {
		r := newRig(t, Options{})
		r.up()
		r.cancel()
		var exit *ExitError
		require.ErrorAs(t, r.end(), &exit)
		require.Equal(t, 128+15, exit.Status)
	})
	t.Run("second signal kills", func(t *testing.T) {
		r := newRig(t, Options{Command: []string{"sh", "-c", `trap "" TERM; printf "up $$ sh" >&3; while :; do sleep 100; done`}})
		r.up()
		r.signals <- unix.SIGTERM
		r.signals <- unix.SIGTERM
		var exit *ExitError
		require.ErrorAs(t, r.end(), &exit)
		require.Equal(t, 128+9, exit.Status)
		_ = unix.Kill(-r.pid, unix.SIGKILL) // sleep, in the session of its shell
	})
	t.Run("does not end in time", func(t *testing.T) {
		r := newRig(t, Options{StopTimeout: time.Millisecond,
			Command: []string{"sh", "-c", `trap "" TERM; printf "up $$ sh" >&3; while :; do sleep 100; done`}})
		r.up()
		r.signals <- unix.SIGTERM
		var exit *ExitError
		require.ErrorAs(t, r.end(), &exit)
		require.Equal(t, 128+9, exit.Status)
		_ = unix.Kill(-r.pid, unix.SIGKILL)
	})
	t.Run("other signals are passed on", func(t *testing.T) {
		r := newRig(t, Options{Command: []string{"sh", "-c", `trap "exit 0" USR1; printf "up $$ sh" >&3; while :; do sleep 0.01; done`}})
		r.up()
		r.signals <- unix.SIGUSR1
		require.NoError(t, r.end())
	})
	t.Run("no such program", func(t *testing.T) {
		err := Supervise(t.Context(), &Options{Command: []string{"/nonexistent/program"}})
		require.ErrorIs(t, err, os.ErrNotExist)
	})
	t.Run("cannot be executed", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "program")
		require.NoError(t, os.WriteFile(file, []byte("\x7fELF but not really"), 0o755))
		err := Supervise(t.Context(), &Options{Command: []string{file}})
		require.ErrorIs(t, err, unix.ENOEXEC)
	})
}

func TestCrashes(t *testing.T) {
	r := newRig(t, Options{MaxCrashes: 3})
	for range 3 {
		r.up()
		r.tell("exit 3")
	}
	var crash *CrashError
	require.ErrorAs(t, r.end(), &crash)
	require.Equal(t, &CrashError{Crashes: 3, Last: "exit status 3"}, crash)
}

func TestUpgrade(t *testing.T) {
	self, err := os.Executable()
	require.NoError(t, err)
	dir := t.TempDir()
	newer := filepath.Join(dir, "newer")
	program, err := os.ReadFile(self)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(newer, program, 0o755))
	script := func(name, text string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755))
		return path
	}

	r := newRig(t, Options{ReadyTimeout: 200 * time.Millisecond})
	r.up()
	r.ok("store vol.x content")
	require.Equal(t, self, programOf(t, r.pid))

	t.Run("ends", func(t *testing.T) {
		r.ok("upgrade %s", script("ends", "exit 0"))
		r.tell("exit 0") // there is something to be started: not the end
		r.up()
		require.Equal(t, self, programOf(t, r.pid))
	})
	t.Run("does not become ready", func(t *testing.T) {
		r.ok("upgrade %s", script("hangs", "exec sleep 1000"))
		r.kill()
		r.up()
		require.Equal(t, self, programOf(t, r.pid))
	})
	t.Run("cannot be executed", func(t *testing.T) {
		bad := filepath.Join(dir, "bad")
		require.NoError(t, os.WriteFile(bad, []byte("\x7fELF"), 0o755))
		r.ok("upgrade %s", bad)
		r.kill()
		r.up()
		require.Equal(t, self, programOf(t, r.pid))
	})
	t.Run("does not exist", func(t *testing.T) {
		r.ok("upgrade /nonexistent/program")
		r.kill()
		r.up()
		require.Equal(t, self, programOf(t, r.pid))
	})
	t.Run("works", func(t *testing.T) {
		r.ok("upgrade %s", newer)
		r.kill()
		r.up()
		require.Equal(t, newer, programOf(t, r.pid))
		r.ok("ready")
		require.Equal(t, "content", r.ask("read vol.x"))
		r.ok("remove nothing") // a barrier
		r.kill()
		r.up()
		require.Equal(t, newer, programOf(t, r.pid), "stays")
	})
	t.Run("replaced or gone", func(t *testing.T) {
		require.NoError(t, os.Remove(newer))
		script("newer", "exit 7")
		r.kill()
		r.up()
		require.Equal(t, newer+" (deleted)", programOf(t, r.pid), "what was started is what is started again")
	})
	require.Contains(t, r.ask("upgrade relative"), "not an absolute path")
	r.tell("exit 0")
	require.NoError(t, r.end())
}

func programOf(t *testing.T, pid int) string {
	t.Helper()
	path, err := os.Readlink("/proc/" + itoa(pid) + "/exe")
	require.NoError(t, err)
	return path
}

func TestWatchdog(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	require.NoError(t, err)
	defer null.Close()
	r := newRig(t, Options{Watchdog: 50 * time.Millisecond, Stderr: null})
	r.up()
	first := r.pid
	r.ok("ready")
	r.up() // it is silent from now on
	require.NotEqual(t, first, r.pid)
	require.Contains(t, r.log.String(), "it is silent")
	r.tell("exit 0")
	require.NoError(t, r.end())
}

func TestOptions(t *testing.T) {
	for _, o := range []*Options{
		nil, {}, {Command: []string{""}}, {Command: []string{"true"}, MaxCrashes: -1},
		{Command: []string{"true"}, Files: []File{{Name: "a:b", File: os.Stdin}}},
		{Command: []string{"true"}, Files: []File{{Name: "a"}}},
		{Command: []string{"true"}, MaxKept: 1 << 20},
	} {
		err := Supervise(t.Context(), o)
		require.Error(t, err)
		var exit *ExitError
		require.False(t, errors.As(err, &exit))
	}
}

func TestForeignProgram(t *testing.T) {
	// It knows nothing of the protocol, and closes what it does not know.
	r := newRig(t, Options{Command: []string{"sh", "-c", `printf "up $$ sh" >&3; exec 4>&-; exec sleep 1000`}})
	r.up()
	first := r.pid
	r.kill()
	r.up()
	require.NotEqual(t, first, r.pid)
	r.signals <- unix.SIGINT
	var exit *ExitError
	require.ErrorAs(t, r.end(), &exit)
	require.Equal(t, 128+2, exit.Status)
}
