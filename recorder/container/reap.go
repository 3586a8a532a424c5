package container

import (
	"bytes"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// The stage is the first process of its PID namespace, so it inherits the
// children of those that die there, of a killed `runc exec` say. Until they are
// waited for, the first process of the container, whose namespace they are in,
// cannot end either.

// runCommand is cmd.Run for a child that reap must leave alone.
func (s *stage) runCommand(cmd *exec.Cmd, started func()) error {
	s.mu.Lock()
	err := cmd.Start()
	if err == nil {
		s.own[cmd.Process.Pid] = true
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	started()
	err = cmd.Wait()
	s.disown(cmd.Process.Pid)
	return err
}

func (s *stage) disown(pid int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.own, pid)
}

// reap waits for the children that nobody else waits for, until the container
// has ended.
func (s *stage) reap() {
	died := make(chan os.Signal, 1) // one is enough: each makes for a look at all
	signal.Notify(died, unix.SIGCHLD)
	for {
		s.reapOrphans()
		select {
		case <-died:
		case <-s.ended:
			return
		}
	}
}

func (s *stage) reapOrphans() {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, stat := range stats {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(stat)))
		b, err := os.ReadFile(stat)
		if err != nil || !deadChild(b) {
			continue
		}
		s.mu.Lock()
		if !s.own[pid] {
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
		s.mu.Unlock()
	}
}

// deadChild reads /proc/<pid>/stat, "pid (name) state parent ...": a zombie
// whose parent is process 1.
func deadChild(stat []byte) bool {
	_, rest, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" "))
	return bytes.HasPrefix(rest, []byte("Z 1 "))
}
