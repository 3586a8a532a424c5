package ublk

import (
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// startWorker is called by the queue's thread.
func (q *queue) startWorker() {
	w := q.srv.Worker()
	q.workers.Go(func() {
		defer w.Release()
		for i := range q.work {
			s := &q.slots[i]
			if !q.gaveUp.Load() {
				s.result = s.execute(w)
			}
			q.idle.Add(1)
			q.finished[i/64].Or(1 << (i % 64))
			q.wake()
		}
	})
}

// execute calls the backend. It returns what the driver wants to know: the
// number of bytes read or written, zero for other operations, or -errno.
func (s *slot) execute(w *request.Worker) int32 {
	var errno unix.Errno
	var done int64
	switch s.op {
	case opRead, opWrite:
		if s.n > int64(len(s.buf)) {
			return -int32(unix.EINVAL)
		}
		done = s.n
		if s.op == opRead {
			errno = w.Read(s.buf[:s.n:s.n], s.off)
			break
		}
		errno = w.Write(s.buf[:s.n:s.n], s.off)
		if errno == 0 && s.fua {
			errno = flush(w)
		}
	case opFlush:
		errno = flush(w)
	case opDiscard, opWriteZeroes:
		errno = w.Discard(s.off, s.n)
	default:
		errno = unix.EOPNOTSUPP
	}
	switch errno {
	case 0:
		return int32(done)
	case unix.ENOSYS:
		errno = unix.EOPNOTSUPP // as the block layer says it
	}
	return -int32(errno)
}

// flush is Sync, which a backend need not have.
func flush(w *request.Worker) unix.Errno {
	if errno := w.Sync(); errno != unix.ENOSYS {
		return errno
	}
	return 0
}
