package nbd

import (
	"errors"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// maxIdle is how many workers wait, one of them for the socket, before others
// end.
const maxIdle = 2

// conn is one end of a connection to the kernel, with its workers.
//
// The socket is a stream, so one worker at a time receives, the one that holds
// rx. When it has a request as a whole it lets go of rx, executes, answers, and
// waits for rx again. Whoever leaves nobody waiting starts one more worker
// first.
type conn struct {
	fd   int
	bufs *request.Buffers
	most int // workers

	rx   sync.Mutex // guards in, end
	in   input
	end  error         // why there will be no more requests; nil: there may be
	over chan struct{} // closed when end is set

	tx sync.Mutex // held while a reply is sent

	idle    atomic.Int32 // workers that have, or wait for, rx
	workers atomic.Int32 // workers alive; never rises from zero
	done    chan struct{}
}

// newConn serves the requests that come over the socket fd, with at most this
// many workers, the first of which has buffer b. The caller calls release when
// over is closed.
func newConn(fd int, b *buffer, bufs *request.Buffers, workers int) *conn {
	c := &conn{fd: fd, bufs: bufs, most: workers, over: make(chan struct{}), done: make(chan struct{})}
	c.in.read = func(p []byte) (int, error) { return receive(fd, p) }
	c.workers.Store(1)
	c.idle.Store(1)
	go c.serve(b)
	return c
}

// serve is a worker. It is counted in c.workers and c.idle when it starts.
func (c *conn) serve(b *buffer) {
	for {
		h, err := c.next(b)
		if err != nil {
			break
		}
		c.execute(b, &h)
		if c.idle.Add(1) > maxIdle && c.leave() {
			c.quit(b)
			return
		}
	}
	c.idle.Add(-1)
	c.quit(b)
}

// next waits for a request and receives it. When it returns one the worker is
// not idle any more.
func (c *conn) next(b *buffer) (h header, err error) {
	c.rx.Lock()
	defer c.rx.Unlock()
	if c.end != nil {
		return h, c.end
	}
	if h, err = c.in.next(); err == nil {
		err = c.data(b, &h)
	}
	if err != nil {
		c.end = err
		close(c.over)
		return h, err
	}
	if c.idle.Add(-1) == 0 {
		c.startWorker()
	}
	return h, nil
}

// data receives a write's data, and makes room for a read's.
func (c *conn) data(b *buffer, h *header) error {
	if h.command == cmdDisconnect {
		return errDisconnected
	}
	if !h.carriesData() {
		return nil
	}
	if err := b.fit(int(h.n)); err != nil {
		return err
	}
	if h.command == cmdRead {
		return nil
	}
	return c.in.data(b.data(int(h.n)))
}

// leave takes the worker out of those that wait, unless it is the last: the
// others may all have got a request since it counted them.
func (c *conn) leave() bool {
	if c.idle.Add(-1) > 0 {
		return true
	}
	c.idle.Add(1)
	return false
}

func (c *conn) quit(b *buffer) {
	b.shrink()
	c.bufs.Put(b.Buffer)
	if c.workers.Add(-1) == 0 {
		close(c.done)
	}
}

// startWorker starts one more worker unless there are enough. Its caller is a
// worker, so the count cannot have reached zero.
func (c *conn) startWorker() {
	if int(c.workers.Add(1)) > c.most {
		c.workers.Add(-1)
		return
	}
	b := get(c.bufs)
	if b == nil { // out of memory: the workers there are go on
		c.workers.Add(-1)
		return
	}
	c.idle.Add(1)
	go c.serve(b)
}

// execute runs a request and answers it.
func (c *conn) execute(b *buffer, h *header) {
	errno := perform(b, h)
	n := 0
	if h.command == cmdRead && errno == 0 {
		n = int(h.n)
	}
	p := b.reply(n)
	putReply(p, h.handle, errno)
	c.send(p)
	b.shrink()
}

// perform has the request server do what h says.
func perform(b *buffer, h *header) (errno unix.Errno) {
	switch h.command {
	case cmdRead:
		return pieces(b.data(int(h.n)), h.off, b.Read)
	case cmdWrite:
		errno = pieces(b.data(int(h.n)), h.off, b.Write)
	case cmdTrim:
		errno = b.Discard(h.off, int64(h.n))
	case cmdWriteZeroes:
		errno = zero(b, h.off, int64(h.n))
	case cmdFlush:
		return flush(b.Worker)
	default:
		return unix.EINVAL
	}
	if errno == 0 && h.flags&flagFUA != 0 {
		return flush(b.Worker)
	}
	return errno
}

// zero makes a range read as zeros. The driver may ask for that on a device
// whose backend cannot discard: it does not forget that the number's last user
// could.
func zero(b *buffer, off, n int64) unix.Errno {
	errno := b.Discard(off, n)
	if errno != unix.ENOSYS {
		return errno
	}
	p := b.data(maxIO)
	clear(p)
	for errno = 0; n > 0 && errno == 0; {
		p = p[:min(n, maxIO)]
		errno = b.Write(p, off)
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return errno
}

// pieces calls f for each maxIO bytes of p.
func pieces(p []byte, off int64, f func([]byte, int64) unix.Errno) unix.Errno {
	for len(p) > maxIO {
		if errno := f(p[:maxIO:maxIO], off); errno != 0 {
			return errno
		}
		p, off = p[maxIO:], off+maxIO
	}
	return f(p, off)
}

func flush(w *request.Worker) unix.Errno {
	if errno := w.Sync(); errno != unix.ENOSYS { // which says that there is nothing to do
		return errno
	}
	return 0
}

// send writes a reply. If the connection is gone nobody waits for it: the
// worker that receives, or will, finds that out too.
func (c *conn) send(p []byte) {
	c.tx.Lock()
	defer c.tx.Unlock()
	for len(p) > 0 {
		n, err := unix.SendmsgN(c.fd, p, nil, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			unix.Shutdown(c.fd, unix.SHUT_RDWR) // half a reply may be out
			return
		}
		p = p[n:]
	}
}

// release closes the socket when the last worker has ended.
func (c *conn) release() {
	<-c.done
	unix.Close(c.fd)
}

// why says why the connection ended, when over is closed; nil if the kernel
// merely closed it.
func (c *conn) why() error {
	c.rx.Lock()
	defer c.rx.Unlock()
	if errors.Is(c.end, io.EOF) || errors.Is(c.end, io.ErrUnexpectedEOF) {
		return nil
	}
	return c.end
}
