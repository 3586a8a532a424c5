package fuse

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// serve is a worker. It is counted in s.workers and s.idle when it starts.
func (s *Session) serve(b *buffer) {
	for !s.closing.Load() {
		req, err := readRequest(s.fd, b)
		if err != nil {
			s.fail(err)
			break
		}
		if req == nil { // aborted by Close
			break
		}
		if s.idle.Add(-1) == 0 {
			s.startWorker()
		}
		s.handle(b, req)
		if s.idle.Add(1) > maxIdle && s.leave() {
			s.end(b)
			return
		}
	}
	s.idle.Add(-1)
	s.end(b)
}

// leave takes the worker out of those that wait, unless it is the last: the
// others may all have got a request since it counted them.
func (s *Session) leave() bool {
	if s.idle.Add(-1) > 0 {
		return true
	}
	s.idle.Add(1)
	return false
}

func (s *Session) end(b *buffer) {
	s.bufs.Put((*request.Buffer)(b))
	if s.workers.Add(-1) == 0 {
		close(s.ended)
	}
}

// startWorker starts one more worker unless there are enough. Its caller is a
// worker, so the count cannot have reached zero.
func (s *Session) startWorker() {
	if s.closing.Load() {
		return
	}
	if int(s.workers.Add(1)) > s.cfg.Workers {
		s.workers.Add(-1)
		return
	}
	b := (*buffer)(s.bufs.Get())
	if b == nil { // out of memory: the workers there are go on
		s.workers.Add(-1)
		return
	}
	s.idle.Add(1)
	go s.serve(b)
}

// fail keeps the first reason why the connection ended by itself.
func (s *Session) fail(err error) {
	if !s.closing.Load() {
		s.err.CompareAndSwap(nil, &err)
	}
}

// readRequest blocks until the kernel has a request. It returns nil, nil at
// the end that Close makes.
func readRequest(fd int, b *buffer) ([]byte, error) {
	buf := b.request()
	for {
		n, _, errno := unix.Syscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		switch errno {
		case 0:
		case unix.EINTR, unix.EAGAIN, unix.ENOENT: // ENOENT: the request was interrupted before it got here
			continue
		case unix.ENODEV, unix.ECONNABORTED:
			return nil, ErrAborted
		default:
			return nil, fmt.Errorf("read %s: %w", devFuse, errno)
		}
		if n == 0 {
			return nil, nil
		}
		if n < inHeaderSize {
			return nil, fmt.Errorf("read %s: request of %d bytes", devFuse, n)
		}
		return buf[:n], nil
	}
}

// write sends a reply. It copies and wakes the requester but does not wait, so
// the Go scheduler need not know of it. Measured: 5 to 10 % of the server's
// processor time for 4 KiB reads.
func write(fd int, p []byte) unix.Errno {
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)))
		if errno != unix.EINTR {
			return errno
		}
	}
}
