package tcmu

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A session serves a ring. One goroutine, the dispatcher, waits for the kernel
// and gives commands to idle workers; a worker that is done takes the next
// command itself if there is one.
type session struct {
	unit *unit
	fd   int
	file *os.File // fd in the runtime's poller, to wait for commands

	unsent atomic.Int32 // answers that the kernel was not told of, see send
	refuse atomic.Bool  // commands fail instead of being executed

	mu      sync.Mutex // guards the ring and what follows
	ring    *ring
	max     int       // workers
	workers []*worker // all of them
	idle    []*worker // the last one in is the first one out: its stack is warm
	closed  bool      // Close has begun
	over    bool      // the dispatcher has ended
	err     error     // why it did, if not for Close

	done  chan struct{} // closed when the dispatcher has ended
	ended chan struct{} // closed when the workers have, too
	wg    sync.WaitGroup
}

// newSession makes a session of a mapped ring. It owns fd and mem when it is
// started.
func newSession(fd int, mem []byte, u *unit, workers int) (*session, error) {
	r, err := newRing(mem)
	if err != nil {
		return nil, err
	}
	r.populate()
	return &session{
		unit: u, fd: fd, file: os.NewFile(uintptr(fd), "/dev/uio"), ring: r, max: workers,
		done: make(chan struct{}), ended: make(chan struct{}),
	}, nil
}

// start begins to serve.
func (s *session) start() {
	go func() {
		s.finish(s.dispatch())
		close(s.done)
		s.wg.Wait()
		unix.Munmap(s.ring.mem)
		s.file.Close()
		close(s.ended)
	}()
}

// dispatch waits for commands until the device is gone, which ends the wait
// with an error.
func (s *session) dispatch() error {
	own := newWorker(s)
	defer own.release()
	var events [4]byte
	for {
		if err := s.serve(own); err != nil {
			return err
		}
		_, err := s.file.Read(events[:])
		if errors.Is(err, os.ErrDeadlineExceeded) { // kick
			err = s.file.SetReadDeadline(time.Time{})
		}
		if err != nil {
			return fmt.Errorf("wait for commands: %w", err)
		}
	}
}

// kick has the dispatcher look at the ring.
func (s *session) kick() { s.file.SetReadDeadline(time.Unix(1, 0)) }

// serve sees to the commands that have come.
func (s *session) serve(own *worker) error {
	if s.refuse.Load() {
		return s.failAll(own)
	}
	return s.share()
}

// share hands out commands as far as there are workers.
func (s *session) share() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil {
		w := s.free()
		if w == nil || !s.take(w) {
			break
		}
		s.idle = s.idle[:len(s.idle)-1]
		w.wake <- struct{}{}
	}
	return s.err
}

// free finds the last of the idle workers, or makes one; nil if there are
// enough. The caller holds s.mu.
func (s *session) free() *worker {
	if n := len(s.idle); n > 0 {
		return s.idle[n-1]
	}
	if len(s.workers) == s.max {
		return nil
	}
	w := newWorker(s)
	s.workers = append(s.workers, w)
	s.idle = append(s.idle, w)
	s.wg.Go(w.run)
	return w
}

// take gives w the next command, if there is one. The caller holds s.mu.
func (s *session) take(w *worker) bool {
	if s.err != nil {
		return false
	}
	w.pending, s.err = s.ring.take(&w.cmd)
	return w.pending && s.err == nil
}

// finished answers w's command, unless that was done by giveUp, and gives it
// the next; false if there is none, and w is idle.
func (s *session) finished(w *worker) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reply(w, &w.answer)
	if s.over {
		return false
	}
	if !s.refuse.Load() && s.take(w) {
		return true
	}
	if s.err != nil {
		s.kick()
	}
	s.idle = append(s.idle, w)
	return false
}

// reply writes the answer to w's command, if that has none. The caller holds
// s.mu.
func (s *session) reply(w *worker, a *answer) {
	if w.pending && s.err == nil && !s.over {
		s.err = s.ring.answer(w.cmd.id, a)
	}
	w.pending = false
}

// send tells the kernel that there are answers. While one goroutine does, which
// makes the kernel look at them, it does so for the others, too.
func (s *session) send() {
	n := s.unsent.Add(1)
	if n > 1 {
		return
	}
	for {
		notify(s.fd) // fails only if the device is gone
		if s.unsent.CompareAndSwap(n, 0) {
			return
		}
		n = s.unsent.Load()
	}
}

// failAll executes commands in the dispatcher, which needs no backend when
// they are refused.
func (s *session) failAll(own *worker) error {
	for {
		s.mu.Lock()
		more, err := s.take(own), s.err
		s.mu.Unlock()
		if !more {
			return err
		}
		own.execute()
		s.mu.Lock()
		s.reply(own, &own.answer)
		s.mu.Unlock()
		s.send()
	}
}

// finish lets the workers go.
func (s *session) finish(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	if !s.closed && s.err == nil {
		s.err = err
	}
	for _, w := range s.workers {
		close(w.wake)
	}
}

// failure says why the session ended by itself.
func (s *session) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// closing says that the session is meant to end.
func (s *session) closing() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
}

// giveUp fails the commands that are in the backend, and all that come later.
// It reports whether there were any of the former. What the backend still does
// with their data must not hit other commands', so the kernel is to keep these
// apart where it can.
func (s *session) giveUp() (stuck bool) {
	s.mu.Lock()
	s.refuse.Store(true)
	if s.over {
		s.mu.Unlock()
		return false
	}
	s.wg.Add(1) // fd stays open
	defer s.wg.Done()
	for _, w := range s.workers {
		if w.pending {
			stuck = true
			s.reply(w, &answer{status: statusCheck, sense: senseFailed, keep: len(w.cmd.data) > 0})
		}
	}
	s.mu.Unlock()
	s.send()
	s.kick()
	return stuck
}
