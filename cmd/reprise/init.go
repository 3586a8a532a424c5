package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// reapOrphans is process 1 of a container: it runs this same command once more
// as its child, which then can wait for its own children undisturbed, passes on
// signals, and waits for the orphans that become its own.
func reapOrphans() error {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	defer signal.Stop(signals)
	child, _, err := syscall.StartProcess("/proc/self/exe", os.Args, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2},
		Sys: &syscall.SysProcAttr{Setpgid: true}, // a terminal's signals come from here alone
	})
	if err != nil {
		return fmt.Errorf("start %s once more: %w", os.Args[0], err)
	}
	for {
		if status, ended := collect(child); ended {
			if code := shellStatus(status); code != 0 {
				return exitStatus(code)
			}
			return nil
		}
		switch sig := (<-signals).(syscall.Signal); sig {
		case unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE: // SIGURG is the Go runtime's own
		default:
			_ = unix.Kill(child, sig)
		}
	}
}

// collect waits for all that has ended, and tells how the child has if it did.
func collect(child int) (status unix.WaitStatus, ended bool) {
	for {
		var s unix.WaitStatus
		pid, err := unix.Wait4(-1, &s, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid == 0 {
			return status, ended
		}
		if pid == child {
			status, ended = s, true
		}
	}
}

// shellStatus is a process's exit status as a shell has it.
func shellStatus(s unix.WaitStatus) int {
	if s.Signaled() {
		return 128 + int(s.Signal())
	}
	return s.ExitStatus()
}
