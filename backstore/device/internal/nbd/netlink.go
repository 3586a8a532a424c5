package nbd

import (
	"errors"
	"fmt"
	"os"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

// Commands and attributes of the generic netlink family "nbd", from
// include/uapi/linux/nbd-netlink.h.
const (
	nlConnect     = 1
	nlDisconnect  = 2
	nlReconfigure = 3

	attrIndex         = 1 // u32
	attrSize          = 2 // u64, bytes
	attrBlockSize     = 3 // u64, bytes
	attrTimeout       = 4 // u64, seconds
	attrServerFlags   = 5 // u64, transmission flags
	attrClientFlags   = 6 // u64
	attrSockets       = 7 // nested
	attrDeadTimeout   = 8 // u64, seconds
	attrBackend       = 10
	attrSocketItem    = 1 // in attrSockets, nested
	attrSocketFD      = 1 // in attrSocketItem, u32
	disconnectOnClose = 1 << 1
)

const familyName = "nbd"

// Missing says what the kernel or the process lacks; nil if nothing.
func Missing() error {
	c, _, err := dial()
	if err != nil {
		return err
	}
	return c.Close()
}

// dial finds the driver. Its family is in the host's network namespace only.
func dial() (*genetlink.Conn, genetlink.Family, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, genetlink.Family{}, fmt.Errorf("generic netlink: %w", err)
	}
	f, err := c.GetFamily(familyName)
	if err != nil {
		c.Close()
		if errors.Is(err, os.ErrNotExist) {
			err = &feature.Error{Feature: "the nbd driver", Since: "4.12", Err: err,
				Hint: "load the kernel module nbd; a container needs the host's network namespace"}
		}
		return nil, f, err
	}
	return c, f, nil
}

// command sends one command about a device and waits until it is executed.
func command(id uint8, index int, add func(*netlink.AttributeEncoder)) error {
	c, family, err := dial()
	if err != nil {
		return err
	}
	defer c.Close()
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(attrIndex, uint32(index))
	add(ae)
	data, err := ae.Encode()
	if err != nil {
		return err
	}
	m := genetlink.Message{Header: genetlink.Header{Command: id, Version: family.Version}, Data: data}
	_, err = c.Execute(m, family.ID, netlink.Request|netlink.Acknowledge)
	return feature.Privilege(err, "nbd")
}

// connect makes device index, which must be unused: EBUSY. On a device that is
// new the driver makes it.
func connect(index, socket int, cfg *Config) error {
	return wrap("connect", index, command(nlConnect, index, func(ae *netlink.AttributeEncoder) {
		ae.Uint64(attrSize, uint64(cfg.Size))
		ae.Uint64(attrBlockSize, uint64(cfg.BlockSize))
		ae.Uint64(attrServerFlags, cfg.flags())
		if cfg.Survives {
			ae.Uint64(attrDeadTimeout, deadTimeout)
		} else {
			ae.Uint64(attrTimeout, orphanTimeout)
			ae.Uint64(attrDeadTimeout, orphanDeadTimeout)
		}
		ae.String(attrBackend, cfg.ID)
		addSocket(ae, socket)
	}))
}

// reconfigure gives device index a new connection in the place of one that is
// dead. It does nothing, and says nothing, if none is.
func reconfigure(index, socket int, cfg *Config) error {
	return wrap("reconfigure", index, command(nlReconfigure, index, func(ae *netlink.AttributeEncoder) {
		ae.String(attrBackend, cfg.ID)
		addSocket(ae, socket)
	}))
}

// endWithLastUser has the driver disconnect device index when nobody has it open
// any more.
func endWithLastUser(index int, cfg *Config) error {
	return wrap("reconfigure", index, command(nlReconfigure, index, func(ae *netlink.AttributeEncoder) {
		ae.String(attrBackend, cfg.ID)
		ae.Uint64(attrClientFlags, disconnectOnClose)
	}))
}

// disconnect ends the connection of device index, if it has one. Its requests
// fail; what remains goes when nobody has the device open.
func disconnect(index int) error {
	return wrap("disconnect", index, command(nlDisconnect, index, func(*netlink.AttributeEncoder) {}))
}

func addSocket(ae *netlink.AttributeEncoder, socket int) {
	ae.Nested(attrSockets, func(ae *netlink.AttributeEncoder) error {
		ae.Nested(attrSocketItem, func(ae *netlink.AttributeEncoder) error {
			ae.Uint32(attrSocketFD, uint32(socket))
			return nil
		})
		return nil
	})
}

func wrap(what string, index int, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s nbd%d: %w", what, index, err)
}

// flags are the transmission flags.
func (c *Config) flags() uint64 {
	f := uint64(hasFlags)
	if c.ReadOnly {
		return f | readOnly
	}
	if c.CanSync {
		f |= sendFlush | sendFUA
	}
	if c.CanDiscard {
		f |= sendTrim | sendWriteZeroes
	}
	return f
}

// socketpair makes a connection: our end, whose number is above low, and the
// kernel's.
func socketpair(low int) (ours, theirs int, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("socketpair: %w", err)
	}
	for _, fd := range pair {
		// A reply, or a write, fits as a whole; as root, whatever the limit is.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4*maxIO)
	}
	ours, err = unix.FcntlInt(uintptr(pair[0]), unix.F_DUPFD_CLOEXEC, low+1)
	unix.Close(pair[0])
	if err != nil {
		unix.Close(pair[1])
		return -1, -1, fmt.Errorf("socketpair: %w", err)
	}
	return ours, pair[1], nil
}

// hungUp reports whether nobody holds the other end of a socket.
func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&unix.POLLHUP != 0
}
