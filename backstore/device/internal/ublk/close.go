package ublk

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
)

// errStuck says that Close did not wait for the backend.
var errStuck = errors.New("the backend is stuck: requests were given up")

// Close writes back what the kernel caches of the device, takes it away, closes
// claim unless that is -1, and ends the server. After timeout, requests that
// are still in the backend fail, which is an error.
func (d *Device) Close(claim int, timeout time.Duration) error {
	close(d.closed)
	stopped := make(chan error, 1)
	go func() { stopped <- d.stop(claim) }()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	var err error
	select {
	case err = <-stopped:
	case <-timer.C:
		d.queue.giveUp()
		err = errors.Join(errStuck, <-stopped)
	}
	<-d.queue.done
	d.release()
	return errors.Join(err, del(d.number))
}

// stop writes back and stops the device. The driver waits for the requests in
// flight, with which giveUp makes short work.
func (d *Device) stop(claim int) error {
	var err error
	if claim >= 0 {
		err = d.writeBack(claim)
		unix.Close(claim)
	}
	select {
	case <-d.queue.done:
		// It has been stopped; or its server has failed, and then it must be
		// released first: the driver would wait for answers.
		return err
	default:
	}
	if e := stop(d.number); e != nil && !errors.Is(e, unix.ENODEV) {
		err = errors.Join(err, e)
	}
	return err
}

// writeBack makes everything durable. Mostly there is nothing dirty in the
// kernel, for the last who closes a block device writes it back; then nobody
// has to wait for the device. If there is, another process does it: see the
// package comment.
func (d *Device) writeBack(fd int) error {
	if d.srv.ReadOnly {
		return nil
	}
	var stat unix.Cachestat_t
	err := unix.Cachestat(uint(fd), &unix.CachestatRange{}, &stat, 0)
	if err == nil && stat.Dirty == 0 && stat.Writeback == 0 {
		return d.sync()
	}
	if err := apart.Call(fd, unix.SYS_FSYNC, uintptr(fd)); err != nil {
		return fmt.Errorf("write back: %w", err)
	}
	return nil
}

// sync calls the backend, but does not wait beyond giveUp.
func (d *Device) sync() error {
	d.mu.Lock()
	if d.over {
		d.mu.Unlock()
		return nil
	}
	done := make(chan unix.Errno, 1)
	d.syncing.Go(func() {
		w := d.srv.Worker()
		defer w.Release()
		done <- flush(w)
	})
	d.mu.Unlock()
	select {
	case errno := <-done:
		if errno != 0 {
			return fmt.Errorf("sync: %w", errno)
		}
		return nil
	case <-d.queue.givenUp:
		return nil // Close says so
	}
}
