package container

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Listening sockets are asked for over netlink (sock_diag): the kernel walks its
// table of listeners and no other. Reading /proc/net/tcp walks the table of
// connections too, half a millisecond each time on a machine of 24 GB, and is
// only the way out where the kernel has no tcp_diag.

const (
	pollDiag = 2 * time.Millisecond
	pollText = 20 * time.Millisecond
	pollTold = 100 * time.Millisecond // where somebody tells of it, and might miss one

	tcpListen = 10 // TCP_LISTEN, include/net/tcp_states.h
)

// listener is a listening TCP socket.
type listener struct {
	port  int
	inode uint64
}

// portProbe looks for listening sockets in one network namespace. One goroutine
// at a time uses it.
type portProbe struct {
	sock    int    // netlink; -1 if the kernel has none
	net     string // directory that holds tcp and tcp6
	owners  string // /proc that holds the processes of the container; "": all sockets are its own
	every   time.Duration
	foreign map[uint64]bool // sockets of others
	buf     []byte
}

// newPortProbe looks into the network namespace of the process whose /proc
// directory is given, or ours if it is "".
func newPortProbe(proc, owners string) (*portProbe, error) {
	p := &portProbe{sock: -1, net: "/proc/thread-self/net", owners: owners, every: pollDiag, foreign: map[uint64]bool{}}
	ns := ""
	if proc != "" {
		p.net, ns = filepath.Join(proc, "net"), filepath.Join(proc, "ns/net")
	}
	err := inNetwork(ns, func() (err error) {
		p.sock, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		return err
	})
	if err == nil {
		p.buf = make([]byte, 32<<10)
		if _, err = p.list(); err == nil {
			return p, nil
		}
	}
	p.close()
	p.every = pollText
	if _, err := p.list(); err != nil {
		return nil, fmt.Errorf("list listening ports: %w", err)
	}
	return p, nil
}

func (p *portProbe) close() {
	if p.sock >= 0 {
		_ = unix.Close(p.sock)
		p.sock = -1
	}
}

// listens says whether the container listens on the port, or any if it is 0, and
// on which.
func (p *portProbe) listens(port int) (on int, ok bool, err error) {
	list, err := p.list()
	if err != nil {
		return 0, false, err
	}
	for _, l := range list {
		if (port == 0 || l.port == port) && p.owned(l.inode) {
			return l.port, true, nil
		}
	}
	return 0, false, nil
}

// owned says whether a process of the container has the socket open. In a
// network of many, others come up too.
func (p *portProbe) owned(inode uint64) bool {
	if p.owners == "" {
		return true
	}
	if p.foreign[inode] {
		return false
	}
	want := "socket:[" + strconv.FormatUint(inode, 10) + "]"
	dirs, _ := filepath.Glob(p.owners + "/[0-9]*/fd")
	for _, dir := range dirs {
		fds, _ := os.ReadDir(dir)
		for _, fd := range fds {
			if to, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && to == want {
				return true
			}
		}
	}
	p.foreign[inode] = true
	return false
}

func (p *portProbe) list() ([]listener, error) {
	var all []listener
	if p.sock >= 0 {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			list, err := p.dump(family)
			if err != nil {
				return nil, fmt.Errorf("sock_diag: %w", err)
			}
			all = append(all, list...)
		}
		return all, nil
	}
	for _, name := range []string{"tcp", "tcp6"} {
		list, err := readListeners(filepath.Join(p.net, name))
		if err != nil && !errors.Is(err, os.ErrNotExist) { // no IPv6
			return nil, err
		}
		all = append(all, list...)
	}
	return all, nil
}

// dump asks for the listening sockets of one address family.
func (p *portProbe) dump(family uint8) ([]listener, error) {
	if err := unix.Sendto(p.sock, diagRequest(family), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	var all []listener
	for {
		n, _, err := unix.Recvfrom(p.sock, p.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		list, done, err := parseDiag(p.buf[:n])
		all = append(all, list...)
		if err != nil || done {
			return all, err
		}
	}
}

// diagRequest is a struct nlmsghdr and a struct inet_diag_req_v2
// (linux/inet_diag.h) that asks for all listening TCP sockets.
func diagRequest(family uint8) []byte {
	const size = unix.SizeofNlMsghdr + 56
	b := make([]byte, size)
	binary.NativeEndian.PutUint32(b[0:], size)
	binary.NativeEndian.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req := b[unix.SizeofNlMsghdr:]
	req[0], req[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(req[4:], 1<<tcpListen)
	return b
}

var errNetlink = errors.New("malformed netlink message")

// parseDiag reads one datagram of netlink messages, each a struct inet_diag_msg.
func parseDiag(b []byte) (list []listener, done bool, err error) {
	const idPort, inode, size = 4, 68, 72 // in inet_diag_msg
	for len(b) >= unix.SizeofNlMsghdr {
		n := binary.NativeEndian.Uint32(b)
		if n < unix.SizeofNlMsghdr || int64(n) > int64(len(b)) {
			return list, true, errNetlink
		}
		body := b[unix.SizeofNlMsghdr:n]
		switch binary.NativeEndian.Uint16(b[4:]) {
		case unix.NLMSG_DONE:
			return list, true, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return list, true, errNetlink
			}
			return list, true, unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
		case unix.SOCK_DIAG_BY_FAMILY:
			if len(body) < size {
				return list, true, errNetlink
			}
			list = append(list, listener{
				port:  int(binary.BigEndian.Uint16(body[idPort:])),
				inode: uint64(binary.NativeEndian.Uint32(body[inode:])),
			})
		}
		b = b[min(int64(n+3)&^3, int64(len(b))):]
	}
	return list, false, nil
}

func readListeners(path string) ([]listener, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseListeners(f)
}

// parseListeners reads /proc/net/tcp. Its listeners come first.
func parseListeners(r io.Reader) ([]listener, error) {
	var all []listener
	lines := bufio.NewScanner(r)
	lines.Scan() // headings
	for lines.Scan() {
		fields := bytes.Fields(lines.Bytes())
		if len(fields) < 10 || string(fields[3]) != "0A" {
			break
		}
		_, hex, _ := bytes.Cut(fields[1], []byte(":"))
		port, err := strconv.ParseUint(string(hex), 16, 16)
		if err != nil {
			return nil, fmt.Errorf("port %q: %w", hex, err)
		}
		inode, err := strconv.ParseUint(string(fields[9]), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("inode %q: %w", fields[9], err)
		}
		all = append(all, listener{port: int(port), inode: inode})
	}
	return all, lines.Err()
}

// inNetwork calls fn in the network namespace at path, or here if it is "". A
// socket belongs to the namespace that it was made in.
func inNetwork(path string, fn func() error) error {
	if path == "" {
		return fn()
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		back, err := enterNetwork(path)
		if err != nil {
			runtime.UnlockOSThread()
			result <- err
			return
		}
		err = fn()
		if back() == nil {
			runtime.UnlockOSThread() // else the thread ends with the goroutine
		}
		result <- err
	}()
	return <-result
}

// enterNetwork moves the calling thread; back returns it.
func enterNetwork(path string) (back func() error, err error) {
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("own network: %w", err)
	}
	there, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Setns(there, unix.CLONE_NEWNET)
		_ = unix.Close(there)
	}
	if err != nil {
		_ = unix.Close(home)
		return nil, fmt.Errorf("network of the container: %w", err)
	}
	return func() error {
		defer unix.Close(home)
		return unix.Setns(home, unix.CLONE_NEWNET)
	}, nil
}

// dial connects as the container would. Only addresses and localhost are looked
// up in another network than ours: a name's resolver would run in ours.
func (c *Container) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var d net.Dialer
	if c.network != OwnNetwork {
		return d.DialContext(ctx, network, addr)
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	hosts := []string{host}
	if host == "localhost" {
		hosts = []string{"127.0.0.1", "::1"}
	}
	var conn net.Conn
	for _, h := range hosts {
		err = inNetwork(filepath.Join(c.proc, "ns/net"), func() (err error) {
			conn, err = d.DialContext(ctx, network, net.JoinHostPort(h, port))
			return err
		})
		if err == nil {
			return conn, nil
		}
	}
	return nil, err
}
