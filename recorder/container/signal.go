package container

import (
	"fmt"
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
