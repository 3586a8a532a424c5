package fuse

import (
	"errors"
	"fmt"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

const devFuse = "/dev/fuse"

// Start opens a FUSE connection, mounts it detached (in no mount namespace,
// so that it ends with its last descriptor), answers INIT and serves.
func Start(srv *request.Server, cfg Config) (*Session, error) {
	fd, err := openAbove(devFuse, cfg.MinFD)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", devFuse,
			feature.Check(err, devFuse, "", "load the kernel module fuse, and in a container pass the device in"))
	}
	mount, err := mountDetached(fd, &cfg, srv.ReadOnly)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mount fuse: %w", err)
	}
	s, err := newSession(fd, mount, srv, cfg)
	if err != nil {
		unix.Close(mount)
		unix.Close(fd)
		return nil, fmt.Errorf("fuse init: %w", err)
	}
	return s, nil
}

// openAbove opens path at a descriptor number of at least low.
func openAbove(path string, low int) (int, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil || fd >= low {
		return fd, err
	}
	defer unix.Close(fd)
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, low)
}

// newSession answers INIT on fd and starts the first worker. It takes over
// the descriptors if it succeeds.
func newSession(fd, mount int, srv *request.Server, cfg Config) (*Session, error) {
	s := &Session{cfg: cfg, srv: srv, fd: fd, mount: mount, ended: make(chan struct{})}
	if err := s.begin(s.handshake); err != nil {
		return nil, err
	}
	return s, nil
}

// Adopt goes on with the session of a process that has ended, whose descriptors
// these are. It takes them over if it succeeds. All requests that the other
// had not answered are executed. A kernel that cannot send them again is a
// *[feature.Error]: the session is to be ended then, for they would wait for
// ever. MinFD is not looked at.
func Adopt(fd, mount int, srv *request.Server, cfg Config) (*Session, error) {
	s := &Session{cfg: cfg, srv: srv, fd: fd, mount: mount, ended: make(chan struct{})}
	if err := s.begin(func(*buffer) error { return s.resend() }); err != nil {
		return nil, fmt.Errorf("adopt fuse session: %w", err)
	}
	return s, nil
}

// begin starts the first worker when prepare, which may use its buffer, is
// through.
func (s *Session) begin(prepare func(*buffer) error) error {
	s.bufs.Server, s.bufs.Size = s.srv, bufferSize
	buf := (*buffer)(s.bufs.Get())
	if buf == nil {
		return errors.New("map a request buffer: out of memory")
	}
	if err := prepare(buf); err != nil {
		s.bufs.Put((*request.Buffer)(buf))
		s.bufs.Free()
		return err
	}
	s.workers.Store(1)
	s.idle.Store(1)
	go s.serve(buf)
	return nil
}

// resend has the kernel queue again what was read and not answered.
func (s *Session) resend() error {
	var b [outHeaderSize]byte
	putHeader(b[:], 0, -notifyResend, 0)
	switch errno := write(s.fd, b[:]); errno {
	case 0:
		return nil
	case unix.EINVAL:
		return &feature.Error{Feature: "FUSE_NOTIFY_RESEND", Since: "6.9", Err: errno,
			Hint: "devices do not outlive the process that serves them"}
	default:
		return fmt.Errorf("FUSE_NOTIFY_RESEND: %w", errno)
	}
}

// mountDetached makes the superblock. The kernel queues INIT in it.
func mountDetached(fd int, cfg *Config, readOnly bool) (int, error) {
	fs, err := unix.Fsopen("fuse", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, feature.Check(err, "fsopen(2) of fuse", "5.2", "")
	}
	defer unix.Close(fs)
	params := [][2]string{
		{"source", cfg.Name},
		{"subtype", "reprise"},
		{"fd", strconv.Itoa(fd)},
		{"rootmode", "40000"},
		{"user_id", "0"},
		{"group_id", "0"},
		{"max_read", strconv.Itoa(maxIO)},
	}
	for _, p := range params {
		if err := unix.FsconfigSetString(fs, p[0], p[1]); err != nil {
			return -1, fmt.Errorf("option %s=%s: %w", p[0], p[1], err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, feature.Check(err, "fsconfig(2) of fuse", "5.2", "")
	}
	attrs := unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC
	if readOnly {
		attrs |= unix.MOUNT_ATTR_RDONLY
	}
	m, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, attrs)
	return m, feature.Check(err, "fsmount(2)", "5.2", "")
}

// handshake reads the INIT that the mount queued and answers it.
func (s *Session) handshake(b *buffer) error {
	req, err := readRequest(s.fd, b)
	if err != nil {
		return err
	}
	if len(req) < inHeaderSize+16 || parseHeader(req).op != opInit {
		return fmt.Errorf("first request of %d bytes is not INIT", len(req))
	}
	h := parseHeader(req)
	in := parseInit(req[inHeaderSize:])
	if in.major != protoMajor || in.minor < protoMinorMin {
		return &feature.Error{Feature: fmt.Sprintf("FUSE %d.%d", protoMajor, protoMinorMin), Since: "4.20",
			Hint: fmt.Sprintf("the kernel speaks %d.%d", in.major, in.minor)}
	}
	out := s.initReply(in)
	if out.flags&flagAsyncDIO == 0 || out.flags&flagMaxPages == 0 {
		return &feature.Error{Feature: "FUSE_ASYNC_DIO and FUSE_MAX_PAGES", Since: "4.20"}
	}
	reply := b.reply(initOutSize)
	out.put(reply[outHeaderSize:])
	putHeader(reply, initOutSize, 0, h.unique)
	if errno := write(s.fd, reply); errno != 0 {
		return fmt.Errorf("answer: %w", errno)
	}
	if out.flags2&flag2Passthrough != 0 {
		s.registerBacking()
	}
	return nil
}

// initReply chooses from what the kernel offers.
func (s *Session) initReply(in initIn) initOut {
	out := initOut{
		minor:         min(in.minor, protoMinor),
		readAhead:     in.readAhead,
		flags:         in.flags & (flagAsyncRead | flagBigWrites | flagAsyncDIO | flagMaxPages | flagAbortError),
		maxBackground: maxBackground,
		congestion:    maxBackground * 3 / 4,
		maxWrite:      maxIO,
		timeGran:      1,
		maxPages:      maxPages,
	}
	if s.cfg.Backing != nil && s.srv.ReadOnly && in.flags2&flag2Passthrough != 0 {
		out.flags |= flagInitExt
		out.flags2 = flag2Passthrough
		out.stackDepth = 1
	}
	return out
}

// MountFD is the descriptor that OpenFile needs.
func (s *Session) MountFD() int { return s.mount }

// FD is the descriptor of /dev/fuse. Whoever holds a duplicate of it keeps the
// session from ending.
func (s *Session) FD() int { return s.fd }

// OpenFile opens the file of the session through its mount, for the loop
// driver to take over. The caller closes the descriptor. Like all that waits
// for the session it belongs on a thread of its own; see package apart.
func (s *Session) OpenFile() (int, error) {
	mode := unix.O_RDWR
	if s.srv.ReadOnly {
		mode = unix.O_RDONLY
	}
	for {
		fd, err := unix.Openat(s.mount, s.cfg.Name, mode|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}
