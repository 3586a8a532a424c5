// Package device shows the bytes of a [Backend] as a block device of the
// kernel, /dev/loopN.
//
// The transport is FUSE and loop, which every kernel has. A FUSE server in this
// process holds one file, mounted detached, in no namespace; the loop driver
// opens it with direct I/O:
//
//	file system → loop device → FUSE → Backend.ReadAt
//
// # Concurrency
//
// A [Device] is safe for concurrent use. The backend is called from many
// goroutines at a time, up to Options.MaxInFlight, and must allow that, also
// for writes and discards; the kernel does not order requests in flight. A
// read or write that blocks holds up only itself; a Sync or Discard holds up
// what is queued behind it, for the loop driver waits for it.
//
// A backend must not do I/O to the device that it serves, nor to a file system
// on it: that waits for itself. What else a process does on its own device it
// does in [Apart], or it cannot be killed while it waits. Nor should it write
// much there: when memory is short, its own writing may wait for pages that
// only it can clean.
//
// # Closing
//
// [Unmount], then [Device.Close], then close what the backend stands on. A
// device that is still mounted is left as it is, with a [BusyError]. When the
// process dies the device answers everything with an I/O error, and vanishes
// when it is unmounted: nothing of it is in any mount table or directory.
package device

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/fuse"
	"github.com/reprise-project/reprise/backstore/device/internal/loop"
)

// Backend is what a device reads. It may also be an [io.WriterAt], a
// [Discarder] and a [Syncer].
//
// A request that the backend fails is an I/O error of that request alone; a
// short read counts as failed. Offsets and lengths are multiples of the sector
// size, and lengths are at most 256 KiB, except a Discard's. The slice passed in
// is page aligned and valid only during the call.
type Backend = io.ReaderAt

// Discarder is a backend that can forget a range, which then reads as zeros.
type Discarder interface {
	// Discard makes the bytes [off, off+n) read as zeros.
	Discard(off, n int64) error
}

// Syncer is a backend whose writes are durable only after Sync. Without it
// they are taken to be durable when WriteAt returns.
type Syncer interface {
	// Sync makes all writes and discards that have returned durable.
	Sync() error
}

// Device is an attached block device.
type Device struct {
	loop      *loop.Device
	session   *fuse.Session
	namespace int // see lowFDs
	timeout   time.Duration

	mu     sync.Mutex // serializes Close; guards closed, err
	closed bool
	err    error // of the Close that closed it
}

// Attach makes a device of size bytes, a positive multiple of the sector size,
// over b. o may be nil. ctx bounds the attaching, not the device. What the
// kernel or the process lacks is reported as a *[FeatureError].
func Attach(ctx context.Context, b Backend, size int64, o *Options) (*Device, error) {
	opts, err := o.fill(b, size)
	if err != nil {
		return nil, fmt.Errorf("attach device: %w", err)
	}
	d, err := attach(ctx, b, size, opts)
	if err != nil {
		return nil, fmt.Errorf("attach device %s: %w", opts.Name, err)
	}
	return d, nil
}

func attach(ctx context.Context, b Backend, size int64, o *Options) (*Device, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	low, err := openLowFDs()
	if err != nil {
		return nil, err
	}
	s, err := fuse.Start(newBackend(b), fuse.Config{
		Name:      o.Name,
		Size:      size,
		BlockSize: o.SectorSize,
		ReadOnly:  o.ReadOnly,
		Workers:   o.MaxInFlight,
		MinFD:     max(low.loop, low.namespace) + 1,
		OnError:   o.onError(),
	})
	if err != nil {
		low.close()
		return nil, err
	}
	l, err := attachLoop(ctx, s, low.loop, o)
	if err != nil {
		err = errors.Join(err, s.Close(o.CloseTimeout))
		low.close()
		return nil, err
	}
	return &Device{loop: l, session: s, namespace: low.namespace, timeout: o.CloseTimeout}, nil
}

// lowFDs are descriptors with numbers below that of /dev/fuse. A dying process
// releases its files from the highest number down, and what these hold waits
// for I/O to the device when it is released, which can only fail once /dev/fuse
// is gone. The other way round the process would wait for itself, and nothing
// could kill it.
type lowFDs struct {
	// loop is to be the loop device, which writes its dirty pages back. Until
	// then it is a placeholder.
	loop int
	// namespace is the process's mount namespace. If that ends with the process
	// it unmounts what is mounted on the device. Without this descriptor it
	// would end before any file is released.
	namespace int
}

func openLowFDs() (lowFDs, error) {
	ns, err := unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return lowFDs{}, fmt.Errorf("open /proc/self/ns/mnt: %w", err)
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(ns)
		return lowFDs{}, fmt.Errorf("open /dev/null: %w", err)
	}
	return lowFDs{loop: null, namespace: ns}, nil
}

func (l lowFDs) close() {
	unix.Close(l.loop)
	unix.Close(l.namespace)
}

func attachLoop(ctx context.Context, s *fuse.Session, fd int, o *Options) (*loop.Device, error) {
	return loop.Attach(ctx, loop.Config{
		Open:        s.OpenFile,
		Needs:       []int{s.MountFD()},
		FD:          fd,
		Name:        o.Name,
		BlockSize:   o.SectorSize,
		ReadOnly:    o.ReadOnly,
		ReadAheadKB: max(o.ReadAheadKB, 0),
	})
}

// Path is the device's path, /dev/loopN.
func (d *Device) Path() string { return d.loop.Path() }

// Done is closed when nothing serves the device any more: it was closed, or
// its connection to the kernel was ended by somebody else, and then Err says
// so and all I/O fails. It still has to be closed.
func (d *Device) Done() <-chan struct{} { return d.session.Ended() }

// Err says why the device ended by itself; nil if it did not.
func (d *Device) Err() error {
	if err := d.session.Err(); err != nil {
		return fmt.Errorf("device %s: %w", d.Path(), err)
	}
	return nil
}

// settle is how long Close waits for a file system to let go of the device:
// the last unmount may still be on its way, in the exit of a container.
const settle = time.Second

// Close writes back what is cached, takes the device away and ends the server.
// It is idempotent. It returns a *[BusyError], and leaves the device working,
// if that is still mounted (or claimed by another driver) after a second.
//
// Processes that merely have the device open do not keep it: their I/O fails
// from now on, and its name is free when they close it. Requests in the
// backend get Options.CloseTimeout to finish; after that they fail too, and
// Close says so, having ended everything but the backend's own calls (Done is
// closed when they have returned).
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return d.err
	}
	claim, err := d.claim()
	if err != nil {
		return err
	}
	d.closed = true
	d.err = d.shut(claim)
	if d.err != nil {
		d.err = fmt.Errorf("close device %s: %w", d.Path(), d.err)
	}
	return d.err
}

// claim keeps others from mounting the device. Where the device cannot even be
// opened nobody can mount it: then there is nothing to claim, -1.
func (d *Device) claim() (fd int, err error) {
	for deadline := time.Now().Add(settle); ; time.Sleep(10 * time.Millisecond) {
		fd, err := d.loop.Claim()
		if !errors.Is(err, unix.EBUSY) {
			return fd, nil
		}
		if time.Now().After(deadline) {
			return -1, &BusyError{Device: d.Path(), Mounts: mountsOf(d.Path())}
		}
	}
}

// shut detaches the loop device within the timeout, for a backend may be
// stuck, and ends the session, which makes a stuck detach return.
func (d *Device) shut(claim int) error {
	detached := make(chan error, 1)
	go func() { detached <- d.loop.Detach(claim) }()
	timer := time.NewTimer(d.timeout)
	defer timer.Stop()
	var detachErr, endErr error
	select {
	case detachErr = <-detached:
		endErr = d.session.Close(d.timeout)
	case <-timer.C:
		endErr = d.session.Close(0)
		detachErr = <-detached
	}
	unix.Close(d.namespace)
	if d.session.Err() != nil { // it had ended before: that is what Err tells
		return nil
	}
	return errors.Join(detachErr, endErr)
}
