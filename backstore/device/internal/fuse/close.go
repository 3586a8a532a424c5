package fuse

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
)

// closeState makes Close run once.
type closeState struct {
	once sync.Once
	err  error
}

// Ended is closed when no worker is left: after Close, or because somebody
// aborted the connection.
func (s *Session) Ended() <-chan struct{} { return s.ended }

// Err says why the session ended by itself, if it did.
func (s *Session) Err() error {
	if p := s.err.Load(); p != nil {
		return *p
	}
	return nil
}

// Close ends the session: requests that arrive from now on fail, the running
// ones may take up to timeout, then they fail too. It returns an error if some
// were still in the backend; their workers end when the backend returns, and
// only then is Ended closed. Idempotent, safe for concurrent use.
func (s *Session) Close(timeout time.Duration) error {
	s.close.once.Do(func() { s.close.err = s.stop(timeout) })
	return s.close.err
}

func (s *Session) stop(timeout time.Duration) error {
	s.closing.Store(true)
	s.srv.Refuse()
	woken := make(chan struct{})
	go func() {
		defer close(woken)
		apart.Run(s.wakeIdle, s.mount)
	}()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	var err error
	select {
	case <-s.ended:
	case <-timer.C:
		err = errBusy
	}
	s.abort()
	<-woken
	unix.Close(s.mount)
	if err != nil {
		go s.reap()
		return err
	}
	s.reap()
	return nil
}

// wakeIdle makes requests until no worker waits for one. Each sends at least
// one worker home, for a worker that sees closing ends after its request.
func (s *Session) wakeIdle() error {
	var st unix.Statfs_t
	for s.idle.Load() > 0 {
		if err := unix.Fstatfs(s.mount, &st); err != nil && err != unix.EINTR {
			return err // aborted: read(2) fails on its own
		}
	}
	return nil
}

// abort drops the last reference to /dev/fuse, which fails all open requests,
// but keeps the number taken, for workers that may still write to it.
func (s *Session) abort() {
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil { // out of descriptors: the mount's can be neither read nor written
		unix.Dup3(s.mount, s.fd, unix.O_CLOEXEC)
		return
	}
	unix.Dup3(null, s.fd, unix.O_CLOEXEC)
	unix.Close(null)
}

// reap frees what the workers used, after the last of them.
func (s *Session) reap() {
	<-s.ended
	unix.Close(s.fd)
	s.bufs.Free()
}
