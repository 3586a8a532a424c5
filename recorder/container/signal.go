package container

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Real-time signals as the C library numbers them.
const (
	sigRTMin = 34
	sigRTMax = 64
)

// ParseSignal reads a signal as an image's StopSignal gives it: a number, a
// name with or without SIG, RTMIN+n or RTMAX-n. Empty is SIGTERM.
func ParseSignal(s string) (unix.Signal, error) {
	if s == "" {
		return unix.SIGTERM, nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	n, err := strconv.Atoi(name)
	switch {
	case err == nil:
	case strings.HasPrefix(name, "RTMIN"):
		n = realtime(sigRTMin, name[len("RTMIN"):])
	case strings.HasPrefix(name, "RTMAX"):
		n = realtime(sigRTMax, name[len("RTMAX"):])
	default:
		n = int(unix.SignalNum("SIG" + name))
	}
	if n < 1 || n > sigRTMax {
		return 0, fmt.Errorf("signal %q: not known: give a name such as SIGTERM or a number from 1 to %d", s, sigRTMax)
	}
	return unix.Signal(n), nil
}

// realtime adds the offset, "", "+n" or "-n", to base; 0 if that is no
// real-time signal.
func realtime(base int, offset string) int {
	if offset == "" {
		return base
	}
	n, err := strconv.Atoi(offset)
	if err != nil || n < -sigRTMax || base+n < sigRTMin || base+n > sigRTMax {
		return 0
	}
	return base + n
}

// ignores tells whether the container's first process is known to ignore a
// signal: the first process of a PID namespace gets none that it neither handles
// nor blocks, to wait for it in another way.
func (c *Container) ignores(sig unix.Signal) bool {
	if sig == unix.SIGKILL || sig == unix.SIGSTOP {
		return false
	}
	b, err := os.ReadFile(filepath.Join(c.proc, "status"))
	if err != nil {
		return false
	}
	return ignoresSignal(string(b), sig)
}

// ignoresSignal reads /proc/PID/status, see proc(5).
func ignoresSignal(status string, sig unix.Signal) bool {
	caught, seen := uint64(0), 0
	for line := range strings.Lines(status) {
		key, v, _ := strings.Cut(line, ":")
		if key != "SigCgt" && key != "SigBlk" {
			continue
		}
		mask, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		if err != nil {
			return false
		}
		caught |= mask
		seen++
	}
	return seen == 2 && caught&(1<<(sig-1)) == 0
}
