package node

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Sockets lie in directories that only root may enter. Whoever can connect can
// have images mounted: an address without a file, which every container with the
// host's network can reach, will not do.

// DefaultSocket is the control socket of the daemon of [DefaultRoot].
const DefaultSocket = "/run/reprise/reprise.sock"

const socketSuffix = ".sock"

// SocketPath is the control socket of the daemon that serves a state directory.
func SocketPath(root string) string {
	if abs, err := filepath.Abs(root); err == nil && abs == DefaultRoot {
		return DefaultSocket
	}
	return filepath.Join(root, "reprise"+socketSuffix)
}

// PrivateSocket is the control socket of a server of one device.
func PrivateSocket(root, id string) string { return filepath.Join(devicesDir(root), id+socketSuffix) }

// through calls f with a name of path that is short enough for a socket's
// address, whatever the length of path.
func through(path string, f func(short string) error) error {
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	defer unix.Close(fd)
	return f(filepath.Join("/proc/self/fd", strconv.Itoa(fd), filepath.Base(path)))
}

// listen listens at a socket that only root can reach. The file stays when the
// listener is closed, for others may hold it.
func listen(path string) (*net.UnixListener, error) {
	var l *net.UnixListener
	err := through(path, func(short string) (err error) {
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, cause(err))
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// dial connects to a control socket.
func dial(path string) (net.Conn, error) {
	var c net.Conn
	err := through(path, func(short string) (err error) {
		c, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: short, Net: "unix"})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", path, cause(err))
	}
	return c, nil
}

// cause is what the kernel said, without the address that only we know.
func cause(err error) error {
	var no unix.Errno
	if errors.As(err, &no) {
		return no
	}
	return err
}

// listening tells whether a server, or its keeper, listens at a socket.
func listening(path string) bool {
	if path == "" {
		return false
	}
	c, err := dial(path)
	if err != nil {
		return !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist)
	}
	_ = c.Close()
	return true
}
