package keeper

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// executable is a program, held open: it can be started again also when its path
// has come to name another file, or nothing.
type executable struct {
	path   string
	fd     int
	script bool // its interpreter needs the path
	stat   unix.Stat_t
}

// openExecutable opens the program that a command names. low is the least number
// for its descriptor.
func openExecutable(name string, low int) (*executable, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	b := &executable{path: path, fd: fd}
	if err := b.examine(low); err != nil {
		b.close()
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return b, nil
}

func (b *executable) examine(low int) error {
	if err := unix.Fstat(b.fd, &b.stat); err != nil {
		return err
	}
	if b.stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return unix.EACCES
	}
	var magic [2]byte
	n, err := unix.Pread(b.fd, magic[:], 0)
	if err != nil {
		return err
	}
	b.script = n < 2 || magic == [2]byte{'#', '!'}
	fd, err := unix.FcntlInt(uintptr(b.fd), unix.F_DUPFD_CLOEXEC, low)
	if err != nil {
		return err
	}
	unix.Close(b.fd)
	b.fd = fd
	return nil
}

// target is what to execute: the path while it still names the program.
func (b *executable) target() string {
	var now unix.Stat_t
	same := unix.Stat(b.path, &now) == nil && now.Dev == b.stat.Dev && now.Ino == b.stat.Ino
	if same || b.script {
		return b.path
	}
	return "/proc/self/fd/" + strconv.Itoa(b.fd)
}

func (b *executable) close() {
	if b != nil {
		unix.Close(b.fd)
	}
}
