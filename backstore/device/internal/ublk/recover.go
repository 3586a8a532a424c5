package ublk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// Recover serves device number after its server has ended, which it waits for.
// The error matches ErrGone if there is no such device, or only the rest of
// one, which it removes. A server that cannot end is another error; see the
// package comment.
func Recover(ctx context.Context, srv *request.Server, number int, cfg Config) (*Device, error) {
	i, err := info(uint32(number))
	if errors.Is(err, unix.ENODEV) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, err
	}
	switch {
	case !sameID(i.userFlags, cookie(cfg.ID)):
		return nil, fmt.Errorf("%w: ublk device %d is another's", ErrGone, number)
	case i.state == stateDead:
		return nil, stopped(i.devID)
	case i.queues < 1 || i.depth < 1 || i.maxIO > maxIO || i.flags&wantedFlags != wantedFlags:
		return nil, fmt.Errorf("ublk device %d was made by another version", number)
	}
	if err := begin(ctx, i.devID); err != nil {
		return nil, err
	}
	d, err := serve(srv, i, &cfg, func() error { return nil })
	if err != nil {
		return nil, err
	}
	if err = endRecovery(i.devID); err == nil {
		err = d.setReadAhead()
	}
	if err != nil {
		d.leave()
		return nil, err
	}
	return d, nil
}

// leave ends the server as if the process had ended: the device stays, and
// waits for another one.
func (d *Device) leave() {
	close(d.closed)
	d.queue.leave()
	<-d.ended
	d.release()
}

// stopped removes a device that has no block device.
func stopped(number uint32) error {
	return errors.Join(fmt.Errorf("%w: it was not started, or was stopped", ErrGone), del(number))
}

// patience is how long a server that was killed may take to end.
var patience = 30 * time.Second // a test shortens it

// begin starts the recovery of a device as soon as its server has ended.
func begin(ctx context.Context, number uint32) error {
	var last *devInfo
	err := withControl(func(ctl *control) (err error) {
		last, err = ctl.awaitRecovery(ctx, number)
		return err
	})
	switch {
	case err != nil:
		return err
	case last == nil:
		return nil
	case last.state == stateDead:
		return stopped(number) // the other had begun to close it
	}
	return expired(last)
}

// awaitRecovery tries to start the recovery, again and again. Where it gives up
// it returns the device as it is.
func (ctl *control) awaitRecovery(ctx context.Context, number uint32) (*devInfo, error) {
	delay := time.Millisecond
	for end := time.Now().Add(patience); ; delay = min(2*delay, 20*time.Millisecond) {
		err := ctl.startRecovery(number)
		switch {
		case err == nil, errors.Is(err, unix.EINVAL):
			// EINVAL: it has been started already, by a process that was killed
			// before it served anything.
			return nil, nil
		case errors.Is(err, unix.ENODEV):
			return nil, ErrGone
		case !errors.Is(err, unix.EBUSY):
			return nil, err
		}
		i, err := ctl.info(number)
		if err != nil || i.state == stateDead || time.Now().After(end) {
			return i, err
		}
		if err := pause(ctx, delay); err != nil {
			return nil, err
		}
	}
}

// expired says why a device cannot be recovered. Where the driver has let go of
// the requests in flight the device is removed, so that who waits for it gets
// an error. Where it has not, that must not be tried: it would never end.
func expired(i *devInfo) error {
	if i.state == stateLive && !dying(int(i.pid)) {
		return fmt.Errorf("ublk device %d is still served, by process %d", i.devID, i.pid)
	}
	err := fmt.Errorf("process %d, which served ublk device %d, cannot end: does one of its threads wait for the device?", i.pid, i.devID)
	if i.state == stateLive {
		return err
	}
	return errors.Join(fmt.Errorf("%w: %w", ErrGone, err), del(i.devID))
}

// dying reports whether the first thread of a process is not there or a zombie.
func dying(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return true
	}
	_, rest, ok := strings.Cut(string(stat), ") ")
	return !ok || rest == "" || rest[0] == 'Z' || rest[0] == 'X'
}
