package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestSuperviseStatus(t *testing.T) {
	b := newBench(t)
	require.Zero(t, b.run("supervise", "--", "true").code)
	require.Zero(t, b.run("supervise", "sh", "-c", "exit 0").code, "without --")
	r := b.run("supervise", "--max-crashes", "2", "--", "sh", "-c", "exit 3")
	b.complains(r, exitFailed, nil, "2 crashes in a row, the last: exit status 3")
	b.fails(exitFailed, []string{"supervise", "--", "/nonexistent/program"}, "/nonexistent/program: no such file")
	b.fails(exitUsage, []string{"supervise"}, "requires at least 1 arg")
	b.fails(exitUsage, []string{"supervise", "--watchdog", "-1s", "true"}, "negative")
	b.fails(exitUsage, []string{"supervise", "--max-crashes", "-1", "true"}, "negative")

	b.write("once", "")
	r = b.run("supervise", "--", "sh", "-c", fmt.Sprintf("rm %s 2>/dev/null || exit 0; kill -9 $$", b.path("once")))
	require.Zero(t, r.code, "killed, then started again: %s", r.stderr)
	require.Contains(t, r.stderr, "killed by SIGKILL")
}

// superviseScript starts a supervised shell script and waits for its first line.
func superviseScript(b *bench, script string, flags ...string) (cmd *exec.Cmd, line string) {
	b.t.Helper()
	cmd = b.command(append(append([]string{"supervise"}, flags...), "--", "sh", "-c", script)...)
	out, err := cmd.StdoutPipe()
	require.NoError(b.t, err)
	require.NoError(b.t, cmd.Start())
	line, err = bufio.NewReader(out).ReadString('\n')
	require.NoError(b.t, err)
	return cmd, strings.TrimSpace(line)
}

func TestSuperviseSignals(t *testing.T) {
	const loop = "echo up; while :; do sleep 0.01; done"
	for _, c := range []struct {
		name, script string
		signals      []unix.Signal
		code         int
	}{
		{"term", loop, []unix.Signal{unix.SIGTERM}, 128 + 15},
		{"int", loop, []unix.Signal{unix.SIGINT}, 128 + 2},
		{"its own status", "trap 'exit 7' TERM; " + loop, []unix.Signal{unix.SIGTERM}, 7},
		{"others", "trap 'exit 0' USR1; " + loop, []unix.Signal{unix.SIGUSR1}, 0},
		{"twice", "trap '' TERM INT; " + loop, []unix.Signal{unix.SIGTERM, unix.SIGINT}, 128 + 9},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			cmd, _ := superviseScript(b, c.script)
			for _, sig := range c.signals {
				require.NoError(t, cmd.Process.Signal(sig))
			}
			_ = cmd.Wait()
			require.Equal(t, c.code, cmd.ProcessState.ExitCode())
		})
	}
}

func TestSuperviseListen(t *testing.T) {
	b := newBench(t)
	first, name := superviseScript(b, "echo $LISTEN_FDNAMES $LISTEN_FDS", "--listen", "api="+b.path("one"), "--listen", b.path("two"))
	require.Equal(t, "api:two 2", name)
	require.NoError(t, first.Wait())
	// A socket that is left from then is replaced.
	cmd, _ := superviseScript(b, "echo up; while :; do sleep 0.01; done", "--listen", b.path("one"))
	c, err := net.Dial("unix", b.path("one"))
	require.NoError(t, err, "clients of a daemon that is being started again wait")
	c.Close()
	fi, err := os.Stat(b.path("one"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), fi.Mode().Perm())
	b2 := newBench(t)
	b2.fails(exitFailed, []string{"supervise", "--listen", b.path("one"), "true"}, "listen on "+b.path("one"), "address already in use")
	b2.write("file", "precious")
	b2.fails(exitFailed, []string{"supervise", "--listen", b2.path("file"), "true"}, "file: ")
	require.Equal(t, []string{b2.path("file")}, b2.files("."))
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	_ = cmd.Wait()
	require.Equal(t, 128+15, cmd.ProcessState.ExitCode())
}

// As process 1 it waits for orphans.
func TestSuperviseAsInit(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if !hasTool("unshare") {
		t.Skip("needs unshare")
	}
	b := newBench(t)
	inner := b.command("supervise", "--", "sh", "-c",
		`sh -c 'sleep 0.05 & exit 0'; sleep 0.1; while grep -q '^State:.Z' /proc/[0-9]*/status; do sleep 0.01; done; trap 'exit 7' TERM; kill -TERM 1; while :; do sleep 0.01; done`)
	cmd := b.command()
	cmd.Path, cmd.Args = "/usr/bin/unshare", append([]string{"unshare", "-pf", "--mount-proc", inner.Path}, inner.Args[1:]...)
	r := b.finish(cmd)
	require.Equal(t, 7, r.code, r.stderr)
}
