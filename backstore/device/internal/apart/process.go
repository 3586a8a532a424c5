package apart

import (
	"fmt"
	"math"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Call makes one system call in a process of its own, a copy of this one whose
// only descriptor, beside standard input, output and error, is fd; -1 is none.
// What pointers in args point to must be on the heap, and be kept alive. The
// result is the errno, nil if there was none.
//
// It is for devices whose driver waits for the end of the process's memory
// before it lets another serve them, as ublk's does, which maps its requests: a
// thread, apart or not, would keep that. Memory that must end with the process
// is mapped with MADV_DONTFORK.
func Call(fd int, nr uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// No signal may find the child: its handlers are the Go runtime's, most of
	// which is not there.
	all, old := ^uint64(0), uint64(0)
	setMask(&all, &old)
	pid, errno := forkAndCall(fd, nr, &a)
	setMask(&old, nil)
	if errno != 0 {
		return fmt.Errorf("clone: %w", errno)
	}
	return exitStatus(int(pid))
}

func setMask(set, old *uint64) {
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK,
		uintptr(unsafe.Pointer(set)), uintptr(unsafe.Pointer(old)), 8, 0, 0)
}

// forkAndCall returns in the parent only. The child has one thread, and may do
// nothing but raw system calls: no stack growth, no allocation, no lock.
//
//go:norace
//go:nosplit
func forkAndCall(fd int, nr uintptr, args *[6]uintptr) (pid uintptr, errno syscall.Errno) {
	// No CLONE_VM: the memory is a copy. No signal at its end: only wait4 with
	// __WALL sees it.
	pid, _, errno = syscall.RawSyscall6(unix.SYS_CLONE, 0, 0, 0, 0, 0, 0)
	if pid != 0 || errno != 0 {
		return pid, errno
	}
	const standard = 3
	from := uintptr(standard)
	if fd >= standard {
		if fd > standard {
			syscall.RawSyscall6(unix.SYS_CLOSE_RANGE, standard, uintptr(fd-1), 0, 0, 0, 0)
		}
		from = uintptr(fd + 1)
	}
	syscall.RawSyscall6(unix.SYS_CLOSE_RANGE, from, math.MaxInt32, 0, 0, 0, 0)
	_, _, errno = syscall.RawSyscall6(nr, args[0], args[1], args[2], args[3], args[4], args[5])
	for {
		syscall.RawSyscall6(unix.SYS_EXIT_GROUP, uintptr(errno), 0, 0, 0, 0, 0)
	}
}

// exitStatus waits for the child, whose exit status is an errno.
func exitStatus(pid int) error {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &status, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait4: %w", err)
		}
		break
	}
	switch {
	case status.Signaled():
		return fmt.Errorf("the process that makes a system call was ended by %v", status.Signal())
	case status.ExitStatus() != 0:
		return unix.Errno(status.ExitStatus())
	}
	return nil
}
