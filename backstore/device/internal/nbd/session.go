package nbd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// Session is a device that is being served. Its methods are safe for concurrent
// use.
type Session struct {
	cfg   Config
	srv   *request.Server
	index int
	bufs  request.Buffers

	// dev is the open device, namespace the process's mount namespace: if that
	// ended with the process before the socket is released, what is mounted on
	// the device would be unmounted, and wait for it. Both are below the socket.
	dev, namespace int
	passedOn       bool // dev was the device from the beginning

	mu      sync.Mutex // guards conn, closing
	conn    *conn      // the current one; nil when there is none
	closing bool

	ended chan struct{} // closed when no request is, or will be, in the backend
	err   atomic.Pointer[error]
	close struct {
		once sync.Once
		err  error
	}
}

// Attach makes a device. appear is called with its number right before it comes
// to be, and with another if the number was taken meanwhile.
func Attach(ctx context.Context, srv *request.Server, cfg Config, appear func(index int) error) (*Session, error) {
	s, err := newSession(srv, cfg, -1)
	if err != nil {
		return nil, err
	}
	c, err := s.attach(ctx, appear)
	if err != nil {
		s.discard()
		return nil, err
	}
	return s, s.begin(c)
}

// Adopt goes on with a device whose process has ended. dev is a descriptor of
// the device if somebody has held one, else -1; Adopt owns it.
func Adopt(ctx context.Context, srv *request.Server, cfg Config, index, dev int) (*Session, error) {
	s, err := newSession(srv, cfg, dev)
	if err != nil {
		return nil, err
	}
	s.index = index
	c, err := s.reconnect(ctx)
	if err != nil {
		s.discard()
		return nil, err
	}
	return s, s.begin(c)
}

// newSession opens the descriptors whose numbers are to be low. It owns dev.
func newSession(srv *request.Server, cfg Config, dev int) (*Session, error) {
	s := &Session{cfg: cfg, srv: srv, dev: dev, passedOn: dev >= 0, bufs: request.Buffers{Server: srv, Size: bufferSize}, ended: make(chan struct{})}
	var err error
	if !s.passedOn { // this keeps its place
		if s.dev, err = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return nil, fmt.Errorf("open /dev/null: %w", err)
		}
	}
	if s.namespace, err = unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		unix.Close(s.dev)
		return nil, fmt.Errorf("open /proc/self/ns/mnt: %w", err)
	}
	return s, nil
}

// discard closes the low descriptors, of a session that did not come to be.
func (s *Session) discard() {
	apart.Take(func() error { return nil }, s.dev)
	unix.Close(s.namespace)
	s.bufs.Free()
}

// attach finds a free device and connects it.
func (s *Session) attach(ctx context.Context, appear func(int) error) (*conn, error) {
	const attempts = 100
	for i := 0; ; i++ {
		free, err := candidates()
		if err != nil {
			return nil, err
		}
		for _, index := range free {
			if err := errors.Join(ctx.Err(), appear(index)); err != nil {
				return nil, err
			}
			s.index = index
			c, err := s.connection(connect)
			if err == nil || !errors.Is(err, unix.EBUSY) || i == attempts {
				return c, err
			}
		}
	}
}

// connection makes a connection, which give hands to the kernel. ENOTCONN says
// that the kernel did not take it.
func (s *Session) connection(give func(index, socket int, cfg *Config) error) (*conn, error) {
	b := get(&s.bufs)
	if b == nil {
		return nil, fmt.Errorf("memory for a worker: %w", unix.ENOMEM)
	}
	ours, theirs, err := socketpair(max(s.dev, s.namespace))
	if err != nil {
		s.bufs.Put(b.Buffer)
		return nil, err
	}
	err = give(s.index, theirs, &s.cfg)
	unix.Close(theirs)
	if err == nil && hungUp(ours) {
		err = unix.ENOTCONN
	}
	if err != nil {
		s.bufs.Put(b.Buffer)
		unix.Close(ours)
		return nil, err
	}
	return newConn(ours, b, &s.bufs, s.cfg.Workers), nil
}

// reconnect makes a new connection in the place of a dead one. The kernel may
// not have noticed yet that it is dead.
func (s *Session) reconnect(ctx context.Context) (*conn, error) {
	const patience = 10 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		if !belongs(s.index, s.cfg.ID) {
			return nil, noDevice(s.index)
		}
		c, err := s.connection(reconfigure)
		if err == nil || !errors.Is(err, unix.ENOTCONN) {
			return c, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("reconfigure nbd%d: it has a connection that is not dead: %w", s.index, ctx.Err())
		}
	}
}

// begin goes on with a device that is connected. If it fails it ends it.
func (s *Session) begin(c *conn) error {
	s.conn = c
	go s.run(c)
	if err := errors.Join(set(s.index, s.cfg.settings()), s.use()); err != nil {
		return errors.Join(err, s.Close(-1, 0, nil))
	}
	return nil
}

// use opens the device, in the place of dev, unless it has been passed on. From
// then on the device ends with its last user; before, that could have been
// whoever had a look at it as it appeared.
func (s *Session) use() error {
	if !s.passedOn {
		fd, err := open(s.Path(), unix.O_RDONLY)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Dup3(fd, s.dev, unix.O_CLOEXEC); err != nil {
			return err
		}
	}
	return endWithLastUser(s.index, &s.cfg)
}

// run waits for the ends of connections, and makes new ones.
func (s *Session) run(c *conn) {
	defer close(s.ended)
	var conns sync.WaitGroup
	for c != nil {
		<-c.over
		conns.Go(c.release)
		c = s.replace(c)
	}
	conns.Wait()
	s.bufs.Free()
}

// replace returns the connection after c, nil if there is to be none.
func (s *Session) replace(c *conn) *conn {
	s.mu.Lock()
	s.conn = nil
	closing := s.closing
	s.mu.Unlock()
	if closing {
		return nil
	}
	next, err := (*conn)(nil), c.why()
	if !errors.Is(err, errDisconnected) {
		next, err = s.reconnect(context.Background())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil && !s.closing:
		s.err.Store(&err)
	case err == nil && s.closing:
		unix.Shutdown(next.fd, unix.SHUT_RDWR)
	}
	s.conn = next
	return next
}

// Index is N of /dev/nbdN.
func (s *Session) Index() int { return s.index }

// Path is /dev/nbdN.
func (s *Session) Path() string { return devicePath(s.index) }

// FD is the descriptor of the device.
func (s *Session) FD() int { return s.dev }

// Claim keeps everybody else from mounting the device, as long as the
// descriptor that it returns is open. It fails with EBUSY while something has
// the device mounted, in whatever namespace, or claimed otherwise.
func (s *Session) Claim() (fd int, err error) { return open(s.Path(), unix.O_RDONLY|unix.O_EXCL) }

// Ended is closed when no request is, or will be, in the backend.
func (s *Session) Ended() <-chan struct{} { return s.ended }

// Err says why the session ended by itself, if it did.
func (s *Session) Err() error {
	if p := s.err.Load(); p != nil {
		return *p
	}
	return nil
}

// Close writes back what the kernel has cached of the device, takes the device
// away, and closes claim unless that is -1. Requests in the backend may take
// up to timeout; then they fail, and Close says so; Ended is closed when they
// have returned. release, unless nil, is called when the device fails all I/O,
// for those who hold duplicates of its descriptor to close them. Idempotent.
func (s *Session) Close(claim int, timeout time.Duration, release func() error) error {
	s.close.once.Do(func() { s.close.err = s.stop(claim, timeout, release) })
	return s.close.err
}

func (s *Session) stop(claim int, timeout time.Duration, release func() error) error {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	flushed := make(chan error, 1)
	go func() { flushed <- apart.Run(s.flush, s.dev) }()
	var flushErr error
	select {
	case flushErr = <-flushed:
		flushed <- nil
	case <-timer.C:
	}
	s.srv.Refuse()
	s.hangUp()
	errs := []error{flushErr, disconnect(s.index)}
	<-flushed
	errs = append(errs, set(s.index, usual))
	if release != nil {
		errs = append(errs, release())
	}
	fds := []int{s.dev}
	if claim >= 0 {
		fds = append(fds, claim)
	}
	errs = append(errs, apart.Take(func() error { return nil }, fds...))
	unix.Close(s.namespace)
	timer.Reset(timeout)
	select {
	case <-s.ended:
	case <-timer.C:
		errs = append(errs, errBusy)
	}
	if s.Err() != nil { // it had ended before: that is what Err tells
		return nil
	}
	return errors.Join(errs...)
}

func (s *Session) flush() error {
	if err := unix.Fsync(s.dev); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it is not open yet
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

// hangUp ends the connection from our side.
func (s *Session) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closing = true
	if s.conn != nil {
		unix.Shutdown(s.conn.fd, unix.SHUT_RDWR)
	}
}
