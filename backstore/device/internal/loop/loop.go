// Package loop makes a block device of an open file, with the kernel's loop
// driver, and takes it away again.
//
// A [Device] holds one open descriptor of the block device. The kernel clears
// the device by itself when its last opener is gone (autoclear), so a process
// that dies leaves none behind. Methods are not safe for concurrent use.
package loop

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

const control = "/dev/loop-control"

// Config describes a device.
type Config struct {
	// Open opens the backing file. It is called on a thread that has only the
	// descriptors in Needs; see package apart.
	Open  func() (fd int, err error)
	Needs []int

	FD          int    // descriptor that is replaced by the device's
	Name        string // as the driver reports it, at most 63 bytes
	BlockSize   int    // logical block size, bytes: 512 to 4096
	ReadOnly    bool
	ReadAheadKB int // queue/read_ahead_kb
}

// Device is a configured loop device.
type Device struct {
	path     string // /dev/loopN
	fd       int
	restores []setting
}

// setting is a queue attribute as it was before: it outlives the device's use.
type setting struct{ path, value string }

// Attach configures a free loop device for direct I/O on the file that
// cfg.Open opens. If it succeeds the device owns cfg.FD, else the caller still
// has to close it.
func Attach(ctx context.Context, cfg Config) (*Device, error) {
	ctl, err := unix.Open(control, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", control,
			feature.Check(err, control, "", "load the kernel module loop, and in a container pass the device in"))
	}
	defer unix.Close(ctl)
	path, err := attach(ctx, ctl, &cfg)
	if err != nil {
		return nil, err
	}
	d := &Device{path: path, fd: cfg.FD}
	if err := apart.Run(func() error { return d.tune(&cfg) }); err != nil {
		return nil, errors.Join(err, clearFD(d.fd))
	}
	return d, nil
}

// Adopt goes on with the device of a process that has ended, of which fd is a
// descriptor. The device owns it if Adopt succeeds. The error is ENXIO if the
// device has been taken away since.
func Adopt(fd int) (*Device, error) {
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil {
		return nil, fmt.Errorf("adopt loop device: %w", err)
	}
	d := &Device{path: "/dev/loop" + strconv.Itoa(int(info.Number)), fd: fd}
	for name, value := range kernelDefaults { // what was there before is not known any more
		d.restores = append(d.restores, setting{d.attribute(name), value})
	}
	return d, nil
}

// kernelDefaults are the attributes that tune changes.
var kernelDefaults = map[string]string{"queue/read_ahead_kb": "128", "queue/rq_affinity": "1"}

func (d *Device) attribute(name string) string {
	return "/sys/block/" + strings.TrimPrefix(d.path, "/dev/") + "/" + name
}

// FD is the descriptor of the block device. Whoever holds a duplicate of it
// keeps the device.
func (d *Device) FD() int { return d.fd }

// tune sets queue attributes, which LOOP_CONFIGURE cannot. The kernel waits for
// all requests of the device to end first: it is called apart.
func (d *Device) tune(cfg *Config) error {
	if err := d.set("queue/read_ahead_kb", strconv.Itoa(cfg.ReadAheadKB)); err != nil {
		return err
	}
	// Complete requests on the processor that made them, through an interrupt:
	// otherwise each wakes ksoftirqd. Measured: 4 KiB random reads at queue depth
	// 32 gain 5-10 %, at 1 they stay.
	return d.set("queue/rq_affinity", "2")
}

// attach tries free devices until it gets one: another process may configure
// the one that LOOP_CTL_GET_FREE named, or look at it, before us.
func attach(ctx context.Context, ctl int, cfg *Config) (path string, err error) {
	const attempts = 100
	for i := 0; ; i++ {
		n, err := unix.IoctlRetInt(ctl, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", fmt.Errorf("find a free loop device: %w", feature.Check(err, "LOOP_CTL_GET_FREE", "3.1", ""))
		}
		path := "/dev/loop" + strconv.Itoa(n)
		err = openAs(cfg.FD, path, cfg.ReadOnly)
		if err == nil {
			err = apart.Run(func() error { return configure(cfg) }, append(cfg.Needs, cfg.FD)...)
		}
		if err == nil {
			return path, nil
		}
		err = fmt.Errorf("configure %s: %w", path, err)
		raced := errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)
		if !raced || i == attempts {
			return "", err
		}
		if err := pause(ctx, time.Duration(i)*time.Millisecond); err != nil {
			return "", err
		}
	}
}

// openAs opens path in the place of fd.
func openAs(fd int, path string, readOnly bool) error {
	mode := unix.O_RDWR
	if readOnly {
		mode = unix.O_RDONLY
	}
	f, err := unix.Open(path, mode|unix.O_CLOEXEC, 0)
	if err != nil {
		return feature.Check(err, path, "", "the kernel has it but /dev does not: in a container, bind the host's /dev")
	}
	defer unix.Close(f)
	return unix.Dup3(f, fd, unix.O_CLOEXEC)
}

func configure(cfg *Config) error {
	file, err := cfg.Open()
	if err != nil {
		return fmt.Errorf("open the backing file: %w", err)
	}
	defer unix.Close(file)
	lc := unix.LoopConfig{Fd: uint32(file), Size: uint32(cfg.BlockSize)}
	lc.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	if cfg.ReadOnly {
		lc.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(lc.Info.File_name[:len(lc.Info.File_name)-1], cfg.Name)
	err = unix.IoctlLoopConfigure(cfg.FD, &lc)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) {
		return &feature.Error{Feature: "LOOP_CONFIGURE", Since: "5.8", Err: err}
	}
	return err
}

func (d *Device) set(name, value string) error {
	path := d.attribute(name)
	was, err := apart.Attribute(path)
	if err != nil || was == value {
		return err
	}
	if err := apart.SetAttribute(path, value); err != nil {
		return err
	}
	d.restores = append(d.restores, setting{path, was})
	return nil
}

// Path is /dev/loopN.
func (d *Device) Path() string { return d.path }

// Claim keeps everybody else from mounting the device, as long as the
// descriptor that it returns is open. It fails with EBUSY while something has
// the device mounted, in whatever namespace, or claimed otherwise.
func (d *Device) Claim() (fd int, err error) {
	fd, err = unix.Open(d.path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("claim %s: %w", d.path, err)
	}
	return fd, nil
}

// Detach writes the page cache of the device to the backing file, syncs that,
// and gives the device back. Where others have it open the kernel does the
// rest when the last of them closes it. It closes claim, unless that is -1.
func (d *Device) Detach(claim int) error {
	fds := []int{d.fd}
	if claim >= 0 {
		fds = append(fds, claim)
	}
	return apart.Take(func() error {
		for _, s := range d.restores {
			_ = apart.SetAttribute(s.path, s.value) // the device's next user sets its own
		}
		if err := unix.Fsync(d.fd); err != nil {
			return errors.Join(fmt.Errorf("flush: %w", err), clearFD(d.fd))
		}
		return clearFD(d.fd)
	}, fds...)
}

// Clear gives a device back that nobody has used.
func (d *Device) Clear() error { return clearFD(d.fd) }

func clearFD(fd int) error {
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil {
		return fmt.Errorf("LOOP_CLR_FD: %w", err)
	}
	return nil
}

func pause(ctx context.Context, t time.Duration) error {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
