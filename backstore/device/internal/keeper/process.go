package keeper

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// program is a process to be started.
type program struct {
	path        string
	argv, env   []string
	dir         string
	fds         []int // its descriptors, from 0 on
	deathSignal syscall.Signal
	session     bool // its own, for a keeper with a terminal
}

// process is a child. Its fields are set before it is returned by launch.
type process struct {
	pid   int
	lost  <-chan struct{} // closed: its descriptor table is gone, if it was to tell by that
	ended <-chan struct{} // closed: it has been waited for, status is valid

	status func() unix.WaitStatus         // after ended
	peek   func() (unix.WaitStatus, bool) // before: how it is ending, if it is
	signal func(unix.Signal)              // nothing if it has been waited for
	forget func()                         // close what belongs to it; it may still live
}

// lineage is the state behind a process's functions.
type lineage struct {
	lifeline *os.File

	mu     sync.Mutex // guards what follows, and keeps the number from being reused
	pid    int
	reaped bool
	status unix.WaitStatus
}

// launch starts a process, with its end of a lifeline as its last descriptor.
// It is in a process group of its own: what a terminal sends to the keeper's is
// for the keeper to pass on. It is also in a session of its own if the keeper's
// has a terminal, for that can stop a group in the background, by `stty tostop`.
// (A new session costs 0.6 ms where the scheduler groups by session.) Two
// goroutines live as long as the process, three if it gets a death signal.
func launch(p program) (*process, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket pair: %w", err)
	}
	defer unix.Close(pair[1])
	_ = unix.SetNonblock(pair[0], true) // ours, to be read by the runtime's poller
	l := &lineage{lifeline: os.NewFile(uintptr(pair[0]), "lifeline")}
	ended := make(chan struct{})
	pidfd, err := l.start(p, pair[1], ended)
	if err != nil {
		_ = l.lifeline.Close()
		return nil, fmt.Errorf("start %s: %w", p.path, err)
	}
	lost := make(chan struct{})
	go l.watch(lost)
	go l.reap(pidfd, ended)
	return &process{
		pid: l.pid, lost: lost, ended: ended,
		status: func() unix.WaitStatus { return l.status },
		peek:   l.peek, signal: l.signal,
		forget: func() { _ = l.lifeline.Close() },
	}, nil
}

// start starts the process. A death signal is sent when the parent's *thread*
// ends, so a process with one is started on a thread that lasts until ended.
func (l *lineage) start(p program, lifeline int, ended <-chan struct{}) (pidfd int, err error) {
	attr := &syscall.ProcAttr{Dir: p.dir, Files: make([]uintptr, 0, len(p.fds)+1)}
	attr.Env = append(p.env, envKeeper+"="+strconv.Itoa(os.Getpid())+":"+strconv.Itoa(len(p.fds)))
	for _, fd := range append(p.fds, lifeline) {
		attr.Files = append(attr.Files, uintptr(fd))
	}
	pidfd = -1
	attr.Sys = &syscall.SysProcAttr{Setsid: p.session, Setpgid: !p.session, Pdeathsig: p.deathSignal, PidFD: &pidfd}
	if p.deathSignal == 0 {
		l.pid, _, err = syscall.StartProcess(p.path, p.argv, attr)
		return pidfd, err
	}
	begun := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		pid, _, err := syscall.StartProcess(p.path, p.argv, attr)
		l.pid = pid
		begun <- err
		if err == nil {
			<-ended
		}
	}()
	err = <-begun
	return pidfd, err
}

// reap waits for the process, without a thread of its own.
func (l *lineage) reap(pidfd int, ended chan<- struct{}) {
	defer close(ended)
	if pidfd >= 0 {
		_ = unix.SetNonblock(pidfd, true) // for the runtime's poller
		f := os.NewFile(uintptr(pidfd), "pidfd")
		defer f.Close()
		if raw, err := f.SyscallConn(); err == nil {
			_ = raw.Read(func(uintptr) bool { return l.collect() })
		}
	}
	if l.collect() {
		return
	}
	// A kernel without pidfd (before Linux 5.3).
	for unix.Waitid(unix.P_PID, l.pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	l.collect()
}

// collect waits for the process if it has ended, and tells whether it has. Its
// number is not free for another before the lock is held.
func (l *lineage) collect() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.reaped {
		n, err := unix.Wait4(l.pid, &l.status, unix.WNOHANG, nil)
		switch {
		case err == unix.EINTR:
		case err != nil: // somebody else in this program has waited for it
			l.status = unix.WaitStatus(unix.SIGKILL)
			l.reaped = true
		case n == 0:
			return false
		default:
			l.reaped = true
		}
	}
	return true
}

func (l *lineage) signal(sig unix.Signal) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.reaped {
		_ = unix.Kill(l.pid, sig)
	}
}

func (l *lineage) peek() (unix.WaitStatus, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.reaped {
		return l.status, true
	}
	st, err := readStat(l.pid)
	return st.exit, err == nil && st.exiting()
}

// watch tells of the end of the lifeline, of a process that has said that it
// keeps it: others close what they do not know.
func (l *lineage) watch(lost chan<- struct{}) {
	defer l.lifeline.Close()
	b := make([]byte, 1)
	if n, _ := l.lifeline.Read(b); n == 0 {
		return
	}
	for {
		if n, _ := l.lifeline.Read(b); n == 0 {
			close(lost)
			return
		}
	}
}
