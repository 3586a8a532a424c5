package nbd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
)

const sysBlock = "/sys/block/"

func devicePath(index int) string { return fmt.Sprintf("/dev/nbd%d", index) }

func attribute(index int, name string) string {
	return fmt.Sprintf("%snbd%d/%s", sysBlock, index, name)
}

// candidates lists device numbers to try: those that are not in use, and then
// one that does not exist.
func candidates() ([]int, error) {
	names, err := filepath.Glob(sysBlock + "nbd*")
	if err != nil {
		return nil, err
	}
	next := 0
	var free []int
	for _, name := range names {
		n, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(name), "nbd"))
		if err != nil {
			continue
		}
		next = max(next, n+1)
		if !connected(n) {
			free = append(free, n)
		}
	}
	slices.Sort(free)
	return append(free, next), nil
}

// connected reports whether a device has a connection, dead or alive.
func connected(index int) bool {
	_, err := os.Stat(attribute(index, "pid"))
	return err == nil
}

// belongs reports whether a device was connected with this identifier. Before
// Linux 5.14 devices have none.
func belongs(index int, id string) bool {
	b, err := os.ReadFile(attribute(index, "backend"))
	if errors.Is(err, os.ErrNotExist) {
		return connected(index)
	}
	return err == nil && strings.TrimSpace(string(b)) == id
}

// setting is an attribute of a device's queue.
type setting struct{ name, value string }

// usual are the settings that the driver makes a device with.
var usual = []setting{{"io_timeout", "30000"}, {"max_sectors_kb", "128"}, {"read_ahead_kb", "128"}}

func (c *Config) settings() []setting {
	var s []setting
	if c.Survives {
		s = append(s, setting{"io_timeout", strconv.Itoa(int(retryAfter.Milliseconds()))})
	}
	return append(s, setting{"max_sectors_kb", strconv.Itoa(maxIO >> 10)}, setting{"read_ahead_kb", strconv.Itoa(c.ReadAheadKB)})
}

// set changes a queue. The kernel waits until that is empty, which after an
// adoption takes as long as lost requests take to be sent again; so nothing is
// written that is already so.
func set(index int, settings []setting) error {
	return apart.Run(func() error {
		for _, s := range settings {
			path := attribute(index, "queue/"+s.name)
			if was, err := apart.Attribute(path); err == nil && was == s.value {
				continue
			}
			if err := apart.SetAttribute(path, s.value); err != nil {
				return err
			}
		}
		return nil
	})
}

// open opens a device. The kernel looks for partitions then, so it is done
// apart, and the descriptor brought over.
func open(path string, flags int) (fd int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socketpair: %w", err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	err = apart.Run(func() error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", path, err)
		}
		defer unix.Close(fd)
		return unix.Sendmsg(pair[1], []byte{0}, unix.UnixRights(fd), nil, 0)
	}, pair[1])
	if err != nil {
		return -1, err
	}
	return received(pair[0])
}

// received takes the descriptor that was sent over a socket.
func received(socket int) (fd int, err error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return -1, fmt.Errorf("receive a descriptor: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, errors.Join(errors.New("receive a descriptor: none came"), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.Join(errors.New("receive a descriptor: none came"), err)
	}
	return fds[0], nil
}
