// Package device shows the bytes of a [Backend] as a block device of the
// kernel.
//
// There are several transports; [Probe] tells which the kernel has, and "auto"
// chooses. The one that every kernel has is FUSE and loop: a FUSE server in this
// process holds one file, mounted detached, in no namespace, and the loop driver
// opens it with direct I/O. EROFS mounts that file without a loop device. The
// drivers of ublk, nbd and tcmu ask this process directly:
//
//	fuse    file system → loop device → FUSE → Backend.ReadAt
//	erofs   EROFS → FUSE → Backend.ReadAt
//	others  file system → block device → Backend.ReadAt
//
// # Surviving
//
// A device outlives the process that serves it if somebody, a [Keeper], holds
// the descriptors that it lives by, and Options.Prepared has put its [State] on
// disk. The next process gives both to [Adopt], with a backend of the same
// content: whoever reads or writes meanwhile only waits. It does not matter how
// the process ended. systemd is a keeper ([OpenStore]), and [Supervise] is one.
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
// process dies, and nobody keeps the device, a device of fuse or erofs answers
// everything with an I/O error, and vanishes when it is unmounted: nothing of it
// is in any mount table or directory. The drivers of ublk, nbd and tcmu keep
// theirs until another process adopts it.
package device

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// Backend is what a device reads. It may also be an [io.WriterAt], a
// [Discarder], a [Syncer] and [FileBacked].
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
	srv     *request.Server
	at      attachment
	timeout time.Duration

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
	t := transports[opts.Transport]
	if err := errors.Join(ctx.Err(), t.missing()); err != nil {
		return nil, fmt.Errorf("attach device %s: %w", opts.Name, err)
	}
	d, err := start(b, size, opts, func(srv *request.Server) (attachment, error) {
		return t.attach(ctx, srv, &attaching{Options: opts, state: opts.state(size), file: backingFile(b, size, opts)})
	})
	if err != nil {
		return nil, fmt.Errorf("attach device %s: %w", opts.Name, err)
	}
	return d, nil
}

// Adopt goes on with the device of a process that has ended, over a backend
// with the same content. s is what Options.Prepared was told, fds are the
// descriptors that the keeper has held, by role; Adopt owns them. Requests that
// the other process had not answered are executed now, perhaps once more. Of o
// the fields count that State does not have; Keeper must still hold the
// descriptors.
//
// Where there is no device any more the error matches [ErrGone]. A kernel that
// cannot pass a device on is a *[FeatureError], and the device is ended then.
func Adopt(ctx context.Context, b Backend, s State, fds map[string]int, o *Options) (*Device, error) {
	d, err := adopt(ctx, b, s, fds, o)
	if err != nil {
		return nil, fmt.Errorf("adopt device %s: %w", s.ID, err)
	}
	return d, nil
}

func adopt(ctx context.Context, b Backend, s State, fds map[string]int, o *Options) (*Device, error) {
	opts, err := o.with(s).fill(b, s.Size)
	if err != nil {
		return nil, err
	}
	a := &attaching{Options: opts, state: &s}
	if opts.Keeper != nil {
		for role := range fds {
			a.kept = append(a.kept, s.ID+"."+role)
		}
	}
	return start(b, s.Size, opts, func(srv *request.Server) (attachment, error) {
		return transports[opts.Transport].adopt(ctx, srv, a, fds)
	})
}

// start makes the request server of a device and has it attached.
func start(b Backend, size int64, o *Options, attach func(*request.Server) (attachment, error)) (*Device, error) {
	srv := request.New(newBackend(b), o.request(b, size))
	at, err := attach(srv)
	if err != nil {
		srv.Stop()
		return nil, err
	}
	return &Device{srv: srv, at: at, timeout: o.CloseTimeout}, nil
}

// Path is the device's path, such as /dev/loop0.
func (d *Device) Path() string { return d.at.path() }

// Done is closed when nothing serves the device any more: it was closed, or
// its connection to the kernel was ended by somebody else, and then Err says
// so and all I/O fails. It still has to be closed.
func (d *Device) Done() <-chan struct{} { return d.at.ended() }

// Err says why the device ended by itself; nil if it did not.
func (d *Device) Err() error {
	if err := d.at.err(); err != nil {
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
// from now on, and its name is free when they close it. Only the file of the
// erofs transport is kept by whoever has it open. Requests in the
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
	d.err = d.at.close(claim, d.timeout)
	d.srv.Stop()
	if d.err != nil {
		d.err = fmt.Errorf("close device %s: %w", d.Path(), d.err)
	}
	return d.err
}

// claim keeps others from mounting the device. Where the device cannot even be
// opened nobody can mount it: then there is nothing to claim, -1.
func (d *Device) claim() (fd int, err error) {
	for deadline := time.Now().Add(settle); ; time.Sleep(10 * time.Millisecond) {
		fd, err := d.at.claim()
		if !errors.Is(err, unix.EBUSY) {
			return fd, nil
		}
		if time.Now().After(deadline) {
			return -1, &BusyError{Device: d.Path(), Mounts: Mounts(d.Path())}
		}
	}
}
