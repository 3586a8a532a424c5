// Package nbd makes block devices with the kernel's NBD driver, /dev/nbdN, and
// serves them: the other end of the connection is in this process.
//
// The nouns: a [Session] is a device that is being served; a connection is a
// socket pair with one end in the kernel; a worker is a goroutine with one
// buffer that receives a request, executes it and answers it.
//
// # One connection
//
// The protocol answers out of order, so a slow request holds up no other. More
// connections would spread the copying, but the driver then takes a connection
// for dead when a request on it is late, and here a request may take as long as
// a registry is away.
//
// # Survival
//
// The device outlives the process that serves it if Config.Survives is set: its
// connection dies with the process, new requests wait for another one, and what
// was not answered is sent again over that. The driver looks for what is to be
// sent again only when a request times out, retryAfter later; it says "possible
// stuck request" in the kernel's log of every request that takes so long, and
// does nothing else about it as long as the connection is the same. With
// [Adopt] another process makes the new connection. If none ever does, what was
// not answered waits for ever: `nbd-client -d /dev/nbdN` ends that.
//
// A device that does not survive has the driver's own time limit: what is not
// answered in half a minute loses its connection, which is made anew as long as
// there is a session, and otherwise fails.
//
// The driver ends a device when its last user closes it. A session is a user,
// by a descriptor that somebody who outlives it can hold a duplicate of.
//
// # Dying
//
// A process that dies releases its descriptors from the highest number down.
// That of the device, whose release may wait for I/O to the device, is below
// that of the socket, whose release makes the I/O fail or wait for somebody
// else. What else may wait runs apart, see package apart.
//
// # Closing
//
// [Session.Close] ends the connection first, for the driver waits for its
// socket, and then the device. It waits for the backend no longer than it was
// told to.
package nbd

import (
	"errors"
	"fmt"
	"time"
)

// Config describes a device. All fields but ReadAheadKB and the bools are
// required.
type Config struct {
	ID          string // tells the device from others
	Size        int64  // bytes, a multiple of BlockSize
	BlockSize   int    // bytes: 512 to 4096
	ReadAheadKB int
	ReadOnly    bool
	CanSync     bool // the kernel sends flushes
	CanDiscard  bool // the kernel sends discards and write-zeroes
	Workers     int  // most requests in the backend at a time
	// Survives keeps the device for a while without a process that serves it.
	Survives bool
}

const (
	// retryAfter is when an unanswered request is looked at again, to be sent
	// over a new connection if there is one. The kernel's timer adds a second.
	retryAfter = 500 * time.Millisecond
	// deadTimeout is how long a request waits for a new connection before it
	// fails, seconds.
	deadTimeout = 60
	// orphanTimeout and orphanDeadTimeout bound how long a request waits if the
	// device does not survive: for its answer, then for a new connection, seconds.
	orphanTimeout     = 30
	orphanDeadTimeout = 5
)

var (
	// ErrGone says that there is no such device any more.
	ErrGone = errors.New("nbd: the device is gone")

	errDisconnected = errors.New("nbd: somebody else disconnected the device")
	errBusy         = errors.New("nbd: backend requests still running")
)

// noDevice is ErrGone for a device.
func noDevice(index int) error { return fmt.Errorf("%w: nbd%d", ErrGone, index) }
