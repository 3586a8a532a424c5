// Package apart runs system calls that may wait, uninterruptibly, for a device
// that this very process serves.
//
// A killed process releases its descriptors when its last thread has ended. A
// thread that waits for the process's own FUSE server cannot end before that
// answers, or before the kernel drops the connection because /dev/fuse was
// released: the process would stay for ever. A thread that has a descriptor
// table of its own, without /dev/fuse, does not keep the process's table alive.
// It is woken with an I/O error as soon as the other threads are gone.
package apart

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

// Run calls f on a thread whose descriptor table holds copies of fds, and of
// standard input, output and error, only. What f opens it must close; it must
// not have goroutines use descriptors.
func Run(f func() error, fds ...int) error {
	return run(f, fds, func() {})
}

// Take is Run that closes fds in the process's own table before it calls f, so
// that the close after f is the last. It closes them also if it fails.
func Take(f func() error, fds ...int) error {
	return run(f, fds, func() { closeAll(fds) })
}

func run(f func() error, fds []int, left func()) error {
	ready, proceed, done := make(chan error), make(chan struct{}), make(chan error)
	go thread(func() {
		if err := leave(fds); err != nil {
			ready <- err
			return
		}
		ready <- nil
		<-proceed
		err := f()
		closeAll(fds) // now, not when the thread has ended
		done <- err
	})
	err := <-ready
	left()
	if err != nil {
		return err
	}
	close(proceed)
	return <-done
}

// thread calls f on a thread that ends with it. The process's first thread
// cannot end, and is what /proc/self shows: there it goes to another.
func thread(f func()) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		f()
		return // still locked, which ends the thread
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
	runtime.UnlockOSThread()
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// leave gives the thread its own descriptor table and closes there all but
// fds, the standard ones and the Go runtime's: the thread still takes part in
// garbage collection and timers, which poll the network and wake the poller.
func leave(fds []int) error {
	if err := startPoller(); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return feature.Privilege(err, "unshare(2)")
	}
	open, err := openFDs()
	if err != nil {
		return err
	}
	for _, fd := range open {
		if fd < 3 || slices.Contains(fds, fd) {
			continue
		}
		switch link, _ := os.Readlink(filepath.Join(fdDir, strconv.Itoa(fd))); link {
		case "anon_inode:[eventpoll]", "anon_inode:[eventfd]":
		default:
			unix.Close(fd) // EBADF for the directory's own
		}
	}
	return nil
}

const fdDir = "/proc/thread-self/fd"

// openFDs lists the thread's descriptors from the highest number down, which is
// the order in which a dying process releases them. If the process is killed
// while the thread leaves, the copies in the thread's table may be the last.
func openFDs() ([]int, error) {
	// Not os.Open, which under go test may write to a log, by a descriptor that
	// this thread does not have any more the next time.
	fd, err := unix.Open(fdDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: fdDir, Err: err}
	}
	dir := os.NewFile(uintptr(fd), fdDir)
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, name := range names {
		if fd, err := strconv.Atoi(name); err == nil {
			fds = append(fds, fd)
		}
	}
	slices.Sort(fds)
	slices.Reverse(fds)
	return fds, nil
}

// startPoller has the runtime open its descriptors, if it has not yet, before
// there is a table that lacks them.
var startPoller = sync.OnceValue(func() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	return errors.Join(r.Close(), w.Close())
})
