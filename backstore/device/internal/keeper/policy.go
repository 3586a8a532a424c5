package keeper

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// ending is how a child ended.
type ending struct {
	status unix.WaitStatus
	lived  time.Duration
	ready  bool
	ours   bool  // the keeper killed it: it had not become ready, or hung
	failed error // it could not even be started
}

// killed: from outside, or for lack of memory. There is nothing to wait for.
func (e ending) killed() bool {
	return e.failed == nil && (e.ours || e.status.Signaled() && e.status.Signal() == unix.SIGKILL)
}

// done: it ended because it wanted to, or was asked to (systemd.service(5),
// "clean exit").
func (e ending) done() bool {
	if e.failed != nil || e.ours {
		return false
	}
	if e.status.Signaled() {
		switch e.status.Signal() {
		case unix.SIGTERM, unix.SIGINT, unix.SIGHUP:
			return true
		}
		return false
	}
	return e.status.ExitStatus() == 0
}

func (e ending) String() string {
	switch {
	case e.failed != nil:
		return e.failed.Error()
	case e.status.Signaled():
		s := "killed by " + unix.SignalName(e.status.Signal())
		if e.status.CoreDump() {
			s += " (core dumped)"
		}
		return s
	default:
		return fmt.Sprintf("exit status %d", e.status.ExitStatus())
	}
}

// err is what Supervise returns when the child is not started again.
func (e ending) err() error {
	switch {
	case e.failed != nil:
		return e.failed
	case e.status.Signaled():
		return &ExitError{Status: 128 + int(e.status.Signal()), text: e.String()}
	case e.status.ExitStatus() != 0:
		return &ExitError{Status: e.status.ExitStatus(), text: e.String()}
	}
	return nil
}

// ExitError is a child's end that was asked for, and was not exit status 0.
type ExitError struct {
	// Status is the exit status as a shell has it: 128 and the number of the
	// signal that killed the child.
	Status int
	text   string
}

func (e *ExitError) Error() string { return e.text }

// CrashError is returned by Supervise when the child crashes again and again.
type CrashError struct {
	// Crashes is how many there were in a row.
	Crashes int
	// Last is the end of the last.
	Last string
}

func (e *CrashError) Error() string {
	return fmt.Sprintf("%d crashes in a row, the last: %s", e.Crashes, e.Last)
}

// The pause before a child that crashed is started again doubles from crash to
// crash, until one has lived long enough.
const (
	shortestPause = 10 * time.Millisecond
	longestPause  = 5 * time.Second
	longEnough    = 10 * time.Second
)

// backoff counts crashes in a row.
type backoff struct {
	crashes int
}

// pause is the time to wait after a child's end.
func (b *backoff) pause(e ending) time.Duration {
	if e.lived >= longEnough {
		b.crashes = 0
	}
	if e.killed() {
		return 0
	}
	b.crashes++
	if b.crashes > 20 {
		return longestPause
	}
	return min(shortestPause<<(b.crashes-1), longestPause)
}
