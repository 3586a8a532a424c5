package ublk

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
	"github.com/reprise-project/reprise/backstore/device/internal/uring"
)

const controlPath = "/dev/ublk-control"

// anyDevice lets cmdAddDev choose a number.
const anyDevice = ^uint32(0)

// command is a control command.
type command struct {
	name string // for errors
	op   uint32
	dev  uint32
	buf  unsafe.Pointer // in or out, or nil
	len  int            // of buf
	data uint64
	// limit is how long to wait. What the driver goes on doing then is
	// interrupted.
	limit time.Duration
}

// limit is enough for a driver that waits for nobody.
const limit = 30 * time.Second

// errTimeout says that a command was given up.
var errTimeout = errors.New("the driver does not answer")

// control is the control device with a ring, for one thread. A new ring for
// each of many commands would not do: the kernel frees rings slowly, one after
// another, also that of a dead server, for whose end Recover waits.
type control struct {
	fd   int
	ring *uring.Ring
}

// withControl calls f on a thread that has the control device. Whoever blocks
// in a command holds up no other.
func withControl(f func(c *control) error) error {
	fd, err := openControl()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	r, err := uring.New(1, uring.Options{Wide: true})
	if err != nil {
		return err
	}
	defer r.Close()
	return f(&control{fd, r})
}

func (c *command) do() error {
	return withControl(func(ctl *control) error { return ctl.do(c) })
}

// do runs a command. After errTimeout the control cannot be used again.
func (ctl *control) do(c *command) error {
	*(*ctrlCmd)(unsafe.Pointer(&ctl.ring.Command(ctl.fd, c.op, 0)[0])) = ctrlCmd{
		devID: c.dev, queueID: ^uint16(0), len: uint16(c.len), addr: uint64(uintptr(c.buf)), data: c.data,
	}
	res, err := c.wait(ctl.ring)
	runtime.KeepAlive(c.buf)
	if err == nil && res < 0 {
		err = unix.Errno(-res)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	return nil
}

func (c *command) wait(r *uring.Ring) (res int32, err error) {
	if c.limit == 0 {
		c.limit = limit
	}
	for end := time.Now().Add(c.limit); ; {
		left := time.Until(end)
		if left <= 0 {
			return 0, errTimeout
		}
		if err := r.Enter(1, left); err != nil {
			return 0, err
		}
		if done, ok := r.Next(); ok {
			return done.Result, nil
		}
	}
}

func openControl() (fd int, err error) {
	fd, err = unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", controlPath, feature.Check(err, controlPath, since,
			"load the kernel module ublk_drv, and in a container pass the device in"))
	}
	return fd, nil
}

// since is the first Linux version whose driver is enough: one with user
// recovery (6.1), and with commands that are encoded like ioctls, without
// which later versions may be built.
const since = "6.4"

// Missing says, as a *feature.Error, what the kernel or the process lacks.
func Missing() error {
	// An unknown device: the driver has looked at the command and the caller.
	_, err := info(anyDevice - 1)
	switch {
	case errors.Is(err, unix.ENODEV), err == nil:
		return nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
		return &feature.Error{Feature: "ublk with user recovery", Since: since, Err: err}
	}
	return feature.Privilege(err, controlPath)
}

func info(dev uint32) (i *devInfo, err error) {
	err = withControl(func(ctl *control) error {
		i, err = ctl.info(dev)
		return err
	})
	return i, err
}

func (ctl *control) info(dev uint32) (*devInfo, error) {
	i := new(devInfo)
	return i, ctl.do(&command{name: "GET_DEV_INFO", op: cmdGetDevInfo, dev: dev, buf: unsafe.Pointer(i), len: int(unsafe.Sizeof(*i))})
}

// add makes a device, not started, and gives what the driver made of i.
func add(i *devInfo) error {
	i.devID = anyDevice
	c := &command{name: "ADD_DEV", op: cmdAddDev, dev: anyDevice, buf: unsafe.Pointer(i), len: int(unsafe.Sizeof(*i))}
	err := c.do()
	if err == nil && i.flags&wantedFlags != wantedFlags {
		err = errors.Join(&feature.Error{Feature: "ublk with user recovery", Since: since}, del(i.devID))
	}
	return feature.Privilege(err, controlPath)
}

func setParams(dev uint32, p *params) error {
	p.len = paramsSize
	return (&command{name: "SET_PARAMS", op: cmdSetParams, dev: dev, buf: unsafe.Pointer(p), len: paramsSize}).do()
}

func start(dev uint32) error {
	return (&command{name: "START_DEV", op: cmdStartDev, dev: dev, data: uint64(os.Getpid())}).do()
}

// stop waits until the requests in flight are answered, and fails what comes
// later. The block device is gone when it returns.
func stop(dev uint32) error {
	return (&command{name: "STOP_DEV", op: cmdStopDev, dev: dev, limit: forever}).do()
}

const forever = time.Duration(1<<63 - 1)

// del removes a device, also one that was not stopped. Its number stays taken
// as long as somebody has the block device open.
func del(dev uint32) error {
	err := (&command{name: "DEL_DEV_ASYNC", op: cmdDelDevAsync, dev: dev}).do()
	if errors.Is(err, unix.EOPNOTSUPP) {
		// Before 6.9 there is only the command that waits for the number; the
		// device is removed before it begins to wait.
		err = (&command{name: "DEL_DEV", op: cmdDelDev, dev: dev, limit: 100 * time.Millisecond}).do()
	}
	if errors.Is(err, unix.ENODEV) || errors.Is(err, errTimeout) || errors.Is(err, unix.EINTR) {
		return nil
	}
	return err
}

func (ctl *control) startRecovery(dev uint32) error {
	return ctl.do(&command{name: "START_USER_RECOVERY", op: cmdStartUserRecovery, dev: dev})
}

func endRecovery(dev uint32) error {
	return (&command{name: "END_USER_RECOVERY", op: cmdEndUserRecovery, dev: dev, data: uint64(os.Getpid())}).do()
}
