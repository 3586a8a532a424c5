package keeper

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// environment is what a keeper told this process at its start.
type environment struct {
	values    map[string]string
	pid, ppid int
	first     int // descriptor that LISTEN_FDS counts from
}

// takeEnvironment reads the keeper's variables and removes them, so that this
// process's own children do not take themselves for the keeper's.
func takeEnvironment() environment {
	e := environment{values: make(map[string]string), pid: os.Getpid(), ppid: os.Getppid(), first: firstListenFD}
	for _, name := range ownVariables {
		if v, ok := os.LookupEnv(name); ok {
			e.values[name] = v
			_ = os.Unsetenv(name)
		}
	}
	return e
}

// inherited is a descriptor that a keeper handed over.
type inherited struct {
	name string
	fd   int
}

// lifeline is the descriptor of it and true in a child of [Supervise].
func (e environment) lifeline() (fd int, ok bool, err error) {
	v, ok := e.values[envKeeper]
	if !ok {
		return -1, false, nil
	}
	parent, number, ok := strings.Cut(v, ":")
	ppid, err1 := strconv.Atoi(parent)
	fd, err2 := strconv.Atoi(number)
	if err := errors.Join(err1, err2); !ok || err != nil || fd < e.first {
		return -1, false, fmt.Errorf("%s=%q: is not PPID:FD", envKeeper, v)
	}
	return fd, ppid == e.ppid, nil // another's child has only inherited the variable
}

// descriptors are those that were handed to this very process, closed on exec
// from now on.
func (e environment) descriptors(supervised bool) ([]inherited, error) {
	count, ok := e.values[envListenFDs]
	if !ok {
		return nil, nil
	}
	if pid, ok := e.values[envListenPID]; ok {
		if n, err := strconv.Atoi(pid); err != nil || n != e.pid {
			return nil, nil
		}
	} else if !supervised {
		return nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > maxListenFDs {
		return nil, fmt.Errorf("%s=%q: is not a number up to %d", envListenFDs, count, maxListenFDs)
	}
	var names []string
	if v, ok := e.values[envListenNames]; ok && n > 0 {
		if names = strings.Split(v, ":"); len(names) != n {
			return nil, fmt.Errorf("%s has %d names for %d descriptors", envListenNames, len(names), n)
		}
	}
	fds := make([]inherited, n)
	for i := range fds {
		fds[i] = inherited{name: "unknown", fd: e.first + i}
		if names != nil {
			fds[i].name = names[i]
		}
		if _, err := unix.FcntlInt(uintptr(fds[i].fd), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
			return nil, fmt.Errorf("descriptor %d (%s) of %s=%d: %w", fds[i].fd, fds[i].name, envListenFDs, n, err)
		}
	}
	return fds, nil
}

// socket is where notifications go; nil if nobody listens for them.
func (e environment) socket() (*net.UnixAddr, error) {
	name := e.values[envNotify]
	switch {
	case name == "":
		return nil, nil
	case strings.HasPrefix(name, "/") || strings.HasPrefix(name, "@"):
	default:
		return nil, fmt.Errorf("%s=%q: %w: a path or @name is needed", envNotify, name, errors.ErrUnsupported)
	}
	if len(name) >= len(unix.RawSockaddrUnix{}.Path) {
		return nil, fmt.Errorf("%s=%q: %w", envNotify, name, unix.ENAMETOOLONG)
	}
	return &net.UnixAddr{Name: name, Net: "unixgram"}, nil
}

// limit is how many descriptors the keeper takes, 0 if it did not say.
func (e environment) limit() int {
	n, _ := strconv.Atoi(e.values[envStoreMax])
	return max(n, 0)
}

// watchdog is the time within which the keeper wants to hear of this process
// again and again, 0 if it does not.
func (e environment) watchdog() time.Duration {
	if pid, ok := e.values[envWatchdogPID]; ok && pid != strconv.Itoa(e.pid) {
		return 0
	}
	us, err := strconv.ParseInt(e.values[envWatchdog], 10, 64)
	if err != nil || us <= 0 || us > int64(time.Duration(1<<63-1)/time.Microsecond) {
		return 0
	}
	return time.Duration(us) * time.Microsecond
}
