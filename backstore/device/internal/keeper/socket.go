package keeper

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// socket is where a keeper gets notifications.
type socket struct {
	name string
	conn *net.UnixConn
	raw  syscall.RawConn
	text [maxMessage + 1]byte
	oob  []byte
}

// received is a notification as it arrived.
type received struct {
	text []byte // until the next one is received
	fds  []int  // the receiver's to close
	pid  int    // of the sender, 0 if it cannot be told
	bad  error  // the kernel had to cut something off
}

// listen makes a socket with a name of its own in the abstract namespace, where
// nothing is left behind. Anybody may send there; the sender's credentials
// come from the kernel.
func listen() (*socket, error) {
	name := "@reprise-keeper-" + strconv.Itoa(os.Getpid()) + "-" + rand.Text()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	raw, err := conn.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
		})
		err = errors.Join(err, cerr)
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("notification socket: %w", err)
	}
	room := unix.CmsgSpace(4*maxDescriptors) + unix.CmsgSpace(unix.SizeofUcred)
	return &socket{name: name, conn: conn, raw: raw, oob: make([]byte, room)}, nil
}

// wait calls take whenever something has arrived, until the socket is closed.
// take has to receive all there is.
func (s *socket) wait(take func(fd int)) {
	_ = s.raw.Read(func(fd uintptr) bool {
		take(int(fd))
		return false
	})
}

// now calls take with the socket's descriptor at once.
func (s *socket) now(take func(fd int)) {
	_ = s.raw.Control(func(fd uintptr) { take(int(fd)) })
}

// receive takes the next notification, and EAGAIN if there is none. It does
// not wait, and is not safe for concurrent use.
func (s *socket) receive(fd int) (received, error) {
	n, oobn, flags, _, err := unix.Recvmsg(fd, s.text[:], s.oob, unix.MSG_DONTWAIT|unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return received{}, err
	}
	r := received{text: bytes.TrimRight(s.text[:n], "\x00")}
	controls, err := unix.ParseSocketControlMessage(s.oob[:oobn])
	if err != nil {
		r.bad = err
	}
	for i := range controls {
		if fds, err := unix.ParseUnixRights(&controls[i]); err == nil {
			r.fds = append(r.fds, fds...)
		} else if cred, err := unix.ParseUnixCredentials(&controls[i]); err == nil {
			r.pid = int(cred.Pid)
		}
	}
	if flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		r.bad = errors.Join(r.bad, unix.EMSGSIZE)
	}
	return r, nil
}

func (s *socket) close() { _ = s.conn.Close() }

func closeFDs(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// descends reports whether a process is a child of another, or of its children.
func descends(pid, from int) bool {
	const generations = 64
	for range generations {
		if pid == from {
			return true
		}
		if pid <= 1 {
			return false
		}
		st, err := readStat(pid)
		if err != nil {
			return false
		}
		pid = st.ppid
	}
	return false
}

// procStat is a part of /proc/PID/stat, proc_pid_stat(5).
type procStat struct {
	ppid  int
	tty   int // of the session, 0 if it has none
	flags uint64
	exit  unix.WaitStatus
}

// exiting is PF_EXITING: the process's first thread is on its way out.
func (s procStat) exiting() bool { return s.flags&4 != 0 }

func readStat(pid int) (procStat, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procStat{}, err
	}
	return parseStat(b)
}

func parseStat(b []byte) (st procStat, err error) {
	i := bytes.LastIndexByte(b, ')') // the name may hold anything
	fields := bytes.Fields(b[i+1:])  // from the third on
	if i < 0 || len(fields) < 50 {
		return st, errors.New("/proc/PID/stat: too short")
	}
	st.ppid, err = strconv.Atoi(string(fields[4-3]))
	if err != nil {
		return st, err
	}
	st.tty, err = strconv.Atoi(string(fields[7-3]))
	if err != nil {
		return st, err
	}
	st.flags, err = strconv.ParseUint(string(fields[9-3]), 10, 64)
	if err != nil {
		return st, err
	}
	code, err := strconv.ParseUint(string(fields[52-3]), 10, 32)
	st.exit = unix.WaitStatus(code)
	return st, err
}
