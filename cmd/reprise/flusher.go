package main

import (
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// A process that serves a writable device must not wait, when memory is short,
// for the writing of pages that only it can clean: it says so to the kernel by
// being an IO flusher (PR_SET_IO_FLUSHER(2const), Linux 5.6). That is a flag of
// a thread, and is passed on to the threads and processes that this one starts,
// also through exec. So all threads of a program have it if the first one does.

// onFlusher makes this thread an IO flusher until the function it returns is
// called. Where the kernel or the privilege is missing it stays as it is.
func onFlusher() (back func()) {
	runtime.LockOSThread()
	err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0)
	return func() {
		if err == nil {
			err = unix.Prctl(unix.PR_SET_IO_FLUSHER, 0, 0, 0, 0)
		}
		if err == nil {
			runtime.UnlockOSThread() // or the thread ends with its goroutine
		}
	}
}

// becomeFlusher makes all of this process an IO flusher, by executing the
// program once more if it is none.
func becomeFlusher() error {
	is, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
	if err != nil || is == 1 {
		return nil
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0) != nil {
		return nil
	}
	if err := syscall.Exec("/proc/self/exe", os.Args, os.Environ()); err != nil {
		return fmt.Errorf("execute this program again: %w", err)
	}
	return nil
}
