// Package request executes the requests of a block device on a [Backend], for
// all transports alike: it checks their bounds, turns errors into the errno
// that the kernel gets, reports failures, and watches for requests that do not
// come to an end.
//
// A [Server] belongs to a device, a [Worker] to one goroutine of a transport
// that executes requests. Server's methods are safe for concurrent use, a
// Worker's are not.
package request

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Backend is what the device holds.
type Backend interface {
	io.ReaderAt
	// WriteAt, Discard and Sync return errors.ErrUnsupported where the backend
	// lacks the ability.
	io.WriterAt
	Discard(off, n int64) error
	Sync() error
}

// Config describes a device. Size is required.
type Config struct {
	Size     int64 // bytes
	ReadOnly bool
	// CanDiscard and CanSync say whether the backend has these abilities.
	CanDiscard, CanSync bool
	// OnError is told of each request that the backend failed. Concurrent.
	OnError func(*Error)
	// OnSlow is told of each request that has taken SlowAfter, again when it has
	// taken twice as long, and so on. Not concurrent. SlowAfter 0 is never.
	OnSlow    func(Slow)
	SlowAfter time.Duration
}

// Error is a request that the backend failed.
type Error struct {
	Op     string // "read", "write", "discard", "sync"
	Off, N int64  // bytes; zero for sync
	Err    error
}

func (e *Error) Error() string {
	if e.Op == "sync" {
		return "sync: " + e.Err.Error()
	}
	return fmt.Sprintf("%s %d bytes at %d: %v", e.Op, e.N, e.Off, e.Err)
}

// Unwrap gives the backend's error.
func (e *Error) Unwrap() error { return e.Err }

// Slow is a request that is still in the backend.
type Slow struct {
	Op     string // as in Error
	Off, N int64
	For    time.Duration // how long, to the watchdog's grain, an eighth of SlowAfter
}

// A Server executes the requests of one device.
type Server struct {
	Config
	backend Backend
	refuse  atomic.Bool

	// tick counts the watchdog's rounds, so that a request need not read the
	// clock. It begins with 1: a Worker's zero is "idle".
	tick    atomic.Int64
	mu      sync.Mutex // guards workers
	workers map[*Worker]struct{}

	stop    chan struct{} // closed by Stop
	stopped sync.Once
	watch   sync.WaitGroup
}

// New returns a server of b. Stop it.
func New(b Backend, c Config) *Server {
	s := &Server{Config: c, backend: b, workers: map[*Worker]struct{}{}, stop: make(chan struct{})}
	s.tick.Store(1)
	if c.OnSlow != nil && c.SlowAfter > 0 {
		s.watch.Go(s.watchdog)
	}
	return s
}

// Refuse makes every request that comes from now on fail with EIO.
func (s *Server) Refuse() { s.refuse.Store(true) }

// Stop ends the watchdog. Idempotent.
func (s *Server) Stop() {
	s.stopped.Do(func() { close(s.stop) })
	s.watch.Wait()
}

// Worker returns a new worker.
func (s *Server) Worker() *Worker {
	w := &Worker{s: s}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.workers[w] = struct{}{}
	return w
}

// A Worker executes one request at a time.
type Worker struct {
	s     *Server
	since atomic.Int64 // the tick at which the request began; 0 while there is none
	op    atomic.Int32 // index into ops
	off   atomic.Int64
	n     atomic.Int64
}

// Release takes the worker out of the watchdog's sight.
func (w *Worker) Release() {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	delete(w.s.workers, w)
}

const (
	opRead = iota
	opWrite
	opDiscard
	opSync
)

var ops = [...]string{"read", "write", "discard", "sync"}

// Read fills p from byte off on. A short read has failed. Zero is success.
func (w *Worker) Read(p []byte, off int64) unix.Errno {
	n := int64(len(p))
	if e := w.begin(opRead, off, n); e != 0 {
		return e
	}
	got, err := w.s.backend.ReadAt(p, off)
	w.since.Store(0)
	if got == len(p) { // io.ReaderAt may say io.EOF beside all that was asked for
		return 0
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return w.s.failed(opRead, off, n, err)
}

// Write writes p at byte off. EROFS on a read-only device.
func (w *Worker) Write(p []byte, off int64) unix.Errno {
	n := int64(len(p))
	if e := w.begin(opWrite, off, n); e != 0 {
		return e
	}
	_, err := w.s.backend.WriteAt(p, off)
	w.since.Store(0)
	return w.s.failed(opWrite, off, n, err)
}

// Discard makes [off, off+n) read as zeros. ENOSYS if the backend cannot.
func (w *Worker) Discard(off, n int64) unix.Errno {
	if e := w.begin(opDiscard, off, n); e != 0 {
		return e
	}
	err := w.s.backend.Discard(off, n)
	w.since.Store(0)
	return w.s.failed(opDiscard, off, n, err)
}

// Sync makes all that was acknowledged durable. ENOSYS if the backend needs no
// sync.
func (w *Worker) Sync() unix.Errno {
	if e := w.begin(opSync, 0, 0); e != 0 {
		return e
	}
	err := w.s.backend.Sync()
	w.since.Store(0)
	return w.s.failed(opSync, 0, 0, err)
}

// begin checks a request and shows it to the watchdog.
func (w *Worker) begin(op int32, off, n int64) unix.Errno {
	s := w.s
	switch {
	case s.refuse.Load():
		return unix.EIO
	case off < 0 || n < 0 || off > s.Size || n > s.Size-off:
		return unix.EINVAL
	case s.ReadOnly && (op == opWrite || op == opDiscard):
		return unix.EROFS
	}
	w.op.Store(op)
	w.off.Store(off)
	w.n.Store(n)
	w.since.Store(s.tick.Load())
	return 0
}

// failed reports err and chooses the errno that the block layer sees.
func (s *Server) failed(op int, off, n int64, err error) unix.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errors.ErrUnsupported):
		return unix.ENOSYS
	}
	if s.OnError != nil {
		s.OnError(&Error{Op: ops[op], Off: off, N: n, Err: err})
	}
	if errors.Is(err, unix.ENOSPC) {
		return unix.ENOSPC
	}
	return unix.EIO
}

// rounds is how often the watchdog looks in the time SlowAfter.
const rounds = 8

func (s *Server) watchdog() {
	grain := max(s.SlowAfter/rounds, time.Millisecond)
	t := time.NewTicker(grain)
	defer t.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-t.C:
		}
		now := s.tick.Add(1)
		for _, slow := range s.slow(now) {
			slow.For *= grain
			s.OnSlow(slow)
		}
	}
}

// slow lists the requests that are to be reported in this round; For counts
// rounds.
func (s *Server) slow(now int64) (list []Slow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.workers {
		since := w.since.Load()
		if since == 0 {
			continue
		}
		// rounds, 2*rounds, 4*rounds, …
		if took := now - since; took >= rounds && took%rounds == 0 && (took/rounds)&(took/rounds-1) == 0 {
			list = append(list, Slow{Op: ops[w.op.Load()], Off: w.off.Load(), N: w.n.Load(), For: time.Duration(took)})
		}
	}
	return list
}
