// Package ublk serves a block device through the kernel's ublk driver.
//
// The driver has a control device, /dev/ublk-control, and for each device N a
// character device for its server, /dev/ublkcN, and a block device for
// everybody, /dev/ublkbN. The block device stays when its server dies: requests
// then wait in the kernel, those in flight included, until another process
// recovers the device (UBLK_F_USER_RECOVERY, UBLK_F_USER_RECOVERY_REISSUE).
// Nothing has to be kept for that but the number.
//
// # How requests are served
//
// A server talks to the driver through io_uring, and the driver wants all
// commands of a queue from one thread. That thread fetches requests and answers
// them, and never calls the backend, which may block: it leaves a request, by
// its slot, to one of a growing number of workers, and an eventfd wakes it when
// a worker is done and it is asleep. It owns the request buffers, too. A write
// gets one when there is data (UBLK_F_NEED_GET_DATA), a read before it goes to
// a worker, so that an idle device holds few. They are copied from and to in
// the driver, by the queue's thread. (UBLK_F_USER_COPY would have workers do
// that, but a process that is killed in such a copy fails the request, instead
// of leaving it to the next: Linux 6.12.)
//
// The device has two driver queues where there are two processors, served by
// the one thread: with a single one the block layer would put a scheduler above
// it.
//
// # Waiting for one's own device
//
// The driver lets nobody recover a device before the last trace of its server
// is gone: its files, and its memory, since that maps /dev/ublkcN. A thread that
// waits uninterruptibly for a device of its own process keeps that memory, also
// if it has a descriptor table of its own. If such a process is killed, nothing
// can end the thread, and the device hangs for good: the requests in flight are
// neither answered nor given up by the driver. So whatever waits for the device
// (mount, umount, fsync) must be done by another process; [apart.Call] is one.
// Nor should the process's mount namespace end with it while the device is
// mounted there: the unmount, in the process's last thread, may come before the
// release of its memory (the order of the descriptors, see files, is a help
// only where another thread was the last to use that).
//
// # Closing
//
// [Device.Close] ends everything but calls in the backend; Ended is closed when
// these have returned. Methods are safe for concurrent use, except that Close
// is called once.
package ublk

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/bits"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// ErrGone says that there is no device to recover.
var ErrGone = errors.New("there is no such ublk device")

// Config describes a device.
type Config struct {
	// ID is remembered by the driver, in part: a device of another ID is not
	// recovered.
	ID          string
	SectorSize  int // logical, bytes: 512 to 4096
	InFlight    int // requests at a time; at most 8192
	ReadAheadKB int
}

// Device is a device that this process serves.
type Device struct {
	number    uint32
	readAhead int // KiB
	srv       *request.Server
	files     files
	queue     *queue
	ended     chan struct{}
	closed    chan struct{} // closed by Close when it begins

	mu      sync.Mutex // guards over, and with it that syncing grows
	over    bool       // ended is about to be closed
	syncing sync.WaitGroup
}

// Add makes a device with the next free number and serves it. Nobody sees it
// before Start.
func Add(srv *request.Server, cfg Config) (*Device, error) {
	sweep()
	queues := min(2, runtime.NumCPU(), cfg.InFlight)
	i := devInfo{
		queues:    uint16(queues),
		depth:     uint16(min((cfg.InFlight+queues-1)/queues, maxDepth)),
		maxIO:     maxIO,
		flags:     wantedFlags,
		userFlags: cookie(cfg.ID),
	}
	if err := add(&i); err != nil {
		return nil, err
	}
	d, err := serve(srv, &i, &cfg, func() error { return setParams(i.devID, parameters(srv, &cfg)) })
	if err != nil {
		return nil, errors.Join(err, del(i.devID))
	}
	return d, nil
}

// serve opens the character device and starts the queue after before.
func serve(srv *request.Server, i *devInfo, cfg *Config, before func() error) (*Device, error) {
	f, err := openFiles(i.devID)
	if err != nil {
		return nil, err
	}
	err = before()
	var q *queue
	if err == nil {
		q, err = newQueue(srv, f, int(i.queues), int(i.depth))
	}
	if err != nil {
		f.close()
		return nil, err
	}
	d := &Device{number: i.devID, readAhead: cfg.ReadAheadKB, srv: srv, files: f, queue: q,
		ended: make(chan struct{}), closed: make(chan struct{})}
	err = q.start()
	go d.end()
	if err != nil {
		<-d.ended
		d.release()
		return nil, err
	}
	return d, nil
}

// end waits until nothing is served any more.
func (d *Device) end() {
	<-d.queue.done
	d.queue.workers.Wait()
	d.queue.free()
	d.mu.Lock()
	d.over = true
	d.mu.Unlock()
	d.syncing.Wait()
	close(d.ended)
}

func (d *Device) release() {
	d.queue.release()
	d.files.close()
}

// files are what a process has open for a device. A dying process releases its
// files from the highest number down.
type files struct {
	char int // /dev/ublkcN, above namespace
	// namespace is the process's mount namespace. If that ends with the process
	// it unmounts what is mounted on the device, and waits for it: that must
	// come after the release of char and of the queue's ring, whose commands
	// refer to it, for which whoever recovers the device waits. Without this
	// descriptor it would come before all files.
	namespace int
}

func openFiles(number uint32) (f files, err error) {
	f.namespace, err = unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return f, fmt.Errorf("open /proc/self/ns/mnt: %w", err)
	}
	f.char, err = openChar(number)
	if err == nil && f.char < f.namespace {
		low := f.char
		f.char, err = unix.FcntlInt(uintptr(low), unix.F_DUPFD_CLOEXEC, f.namespace)
		unix.Close(low)
	}
	if err != nil {
		unix.Close(f.namespace)
	}
	return f, err
}

func (f files) close() {
	unix.Close(f.char)
	unix.Close(f.namespace)
}

func openChar(number uint32) (fd int, err error) {
	path := "/dev/ublkc" + strconv.Itoa(int(number))
	for range 1000 {
		fd, err = unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EBUSY) { // sweep of another process
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", path,
			feature.Check(err, path, "", "the kernel has it but /dev does not: in a container, bind the host's /dev"))
	}
	return fd, nil
}

// physicalShift is that of 4096 byte blocks, a page.
const physicalShift = 12

func parameters(srv *request.Server, cfg *Config) *params {
	p := &params{types: paramBasic, basic: basicParams{
		logicalShift:  uint8(bits.TrailingZeros(uint(cfg.SectorSize))),
		physicalShift: physicalShift,
		optShift:      physicalShift,
		minShift:      physicalShift,
		maxSectors:    maxIO >> sectorShift,
		sectors:       uint64(srv.Size) >> sectorShift,
	}}
	if srv.ReadOnly {
		p.basic.attrs |= attrReadOnly
	}
	if srv.CanSync && !srv.ReadOnly {
		p.basic.attrs |= attrVolatileCache | attrFUA
	}
	if srv.CanDiscard && !srv.ReadOnly {
		const most = 1 << 30 >> sectorShift
		p.types |= paramDiscard
		p.discard = discardParams{
			granularity: uint32(cfg.SectorSize),
			maxDiscard:  most,
			maxZeroes:   most,
			maxSegments: 1,
		}
	}
	return p
}

// Number is N of /dev/ublkbN.
func (d *Device) Number() int { return int(d.number) }

// Path is /dev/ublkbN.
func (d *Device) Path() string { return path(d.number) }

func path(number uint32) string { return "/dev/ublkb" + strconv.Itoa(int(number)) }

// Start makes the block device appear.
func (d *Device) Start() error {
	if err := start(d.number); err != nil {
		return err
	}
	return d.setReadAhead()
}

// setReadAhead uses the ioctl: writing to queue/read_ahead_kb would wait for
// the requests in flight.
func (d *Device) setReadAhead() error {
	fd, err := d.open(0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.BLKRASET, d.readAhead<<10>>sectorShift); err != nil {
		return fmt.Errorf("BLKRASET: %w", err)
	}
	return nil
}

func (d *Device) open(flags int) (fd int, err error) {
	fd, err = unix.Open(d.Path(), unix.O_RDONLY|unix.O_CLOEXEC|flags, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", d.Path(),
			feature.Check(err, d.Path(), "", "the kernel has it but /dev does not: in a container, bind the host's /dev"))
	}
	return fd, nil
}

// Claim keeps everybody else from mounting the device, as long as the
// descriptor that it returns is open. It fails with EBUSY while something has
// the device mounted, in whatever namespace, or claimed otherwise.
func (d *Device) Claim() (fd int, err error) { return d.open(unix.O_EXCL) }

// Ended is closed when no request is in the backend, nor will be.
func (d *Device) Ended() <-chan struct{} { return d.ended }

// Err says why the device ended by itself, after Ended; nil if it did not.
func (d *Device) Err() error {
	select {
	case <-d.ended:
	default:
		return nil
	}
	select {
	case <-d.closed:
		return nil
	default:
	}
	if err := d.queue.failure; err != nil {
		return err
	}
	return errStopped
}

var errStopped = errors.New("somebody else stopped the device")

// A cookie marks a device as one of this package, with an ID, made by a process.
//
//	bits 48-63 cookieMagic | 24-47 hash of the ID | 0-23 process
const (
	cookieMagic = 0x7270
	pidMask     = 1<<24 - 1
)

func cookie(id string) uint64 {
	h := fnv.New32a()
	h.Write([]byte(id))
	return cookieMagic<<48 | uint64(h.Sum32()&pidMask)<<24 | uint64(os.Getpid()&pidMask)
}

// sameID reports whether both cookies are of one ID.
func sameID(a, b uint64) bool { return a>>24 == b>>24 }

// sweep removes devices that processes left which were killed between making
// them and writing their number down. These have no block device.
func sweep() {
	chars, err := filepath.Glob("/dev/ublkc*")
	if err != nil {
		return
	}
	for _, char := range chars {
		n, err := strconv.ParseUint(char[len("/dev/ublkc"):], 10, 31)
		if err != nil {
			continue
		}
		if i, err := info(uint32(n)); err == nil && i.orphan() {
			_ = del(uint32(n)) // somebody else may have been quicker
		}
	}
}

// orphan reports whether a device never was started and whoever made it is
// dead, or at least does not have it open.
func (i *devInfo) orphan() bool {
	if i.userFlags>>48 != cookieMagic || i.state != stateDead || i.pid > 0 {
		return false
	}
	if unix.Kill(int(i.userFlags&pidMask), 0) != unix.ESRCH {
		return false
	}
	fd, err := unix.Open("/dev/ublkc"+strconv.Itoa(int(i.devID)), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

// pause waits for t, or less if ctx ends.
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
