package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/replayer/node"
)

// devices are those of snapshots, by the snapshots' IDs. Which of them containers
// use is in the metadata; here is only who is about to.
type devices struct {
	of     node.Devices
	linger time.Duration
	retry  time.Duration // from one attempt to release a device to the next
	log    *slog.Logger
	// need tells whether there is such a snapshot, and whether a container needs
	// its device.
	need func(ctx context.Context, snapshot string) (there, needed bool, err error)
	// gone is called when the device of a snapshot that is not there any more has
	// been released.
	gone func(snapshot string) error

	wg   sync.WaitGroup
	work context.Context
	stop context.CancelFunc

	mu sync.Mutex // guards by and all in it but turn
	by map[string]*deviceUse
}

// deviceUse is what is known of one device. It is forgotten when nobody refers to
// it and no timer runs.
type deviceUse struct {
	turn   chan struct{} // taken by who attaches or releases the device
	refs   int           // who has it from get
	holds  int           // who is about to use it
	timer  *time.Timer   // until it is seen whether it can go; nil if none runs
	cancel func()        // of the release that is under way; nil if none is
	warned bool          // it has been said that it cannot be released
}

// retryEvery is how often it is tried to release a device that somebody uses,
// though no container does.
const retryEvery = 30 * time.Second

func newDevices(of node.Devices, linger time.Duration, log *slog.Logger) *devices {
	d := &devices{of: of, linger: linger, retry: min(linger, retryEvery), log: log, by: map[string]*deviceUse{}}
	d.work, d.stop = context.WithCancel(context.Background())
	return d
}

// close ends what is under way; the devices stay.
func (d *devices) close() {
	d.stop()
	d.mu.Lock()
	for id, u := range d.by {
		d.disarm(id, u)
	}
	d.mu.Unlock()
	d.wg.Wait()
}

// background runs f beside its caller, unless all is ending. f ends with its
// context.
func (d *devices) background(f func(ctx context.Context)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.work.Err() == nil { // else close may be waiting
		d.wg.Go(func() { f(d.work) })
	}
}

// get is called with d.mu held. Each one's end is put.
func (d *devices) get(id string) *deviceUse {
	u := d.by[id]
	if u == nil {
		u = &deviceUse{turn: make(chan struct{}, 1)}
		d.by[id] = u
	}
	u.refs++
	return u
}

// put is called with d.mu held.
func (d *devices) put(id string, u *deviceUse) {
	u.refs--
	d.forget(id, u)
}

// disarm is called with d.mu held.
func (d *devices) disarm(id string, u *deviceUse) {
	if u.timer != nil {
		u.timer.Stop()
		u.timer = nil
	}
	d.forget(id, u)
}

func (d *devices) forget(id string, u *deviceUse) {
	if u.refs == 0 && u.timer == nil && d.by[id] == u {
		delete(d.by, id)
	}
}

// hold keeps a device until letGo is called, if it is there or is attached
// meanwhile. After that it stays while the metadata says that it is needed.
func (d *devices) hold(id string) (letGo func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	u := d.get(id)
	u.holds++
	if u.cancel != nil {
		u.cancel()
	}
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		u.holds--
		d.arm(id, u, d.linger)
		d.put(id, u)
	}
}

// later sees after a while whether a device can go.
func (d *devices) later(id string, after time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	u := d.get(id)
	d.arm(id, u, after)
	d.put(id, u)
}

// arm is called with d.mu held.
func (d *devices) arm(id string, u *deviceUse, after time.Duration) {
	if u.timer != nil {
		u.timer.Stop()
		u.timer = nil
	}
	if d.work.Err() != nil {
		return
	}
	var t *time.Timer
	t = time.AfterFunc(after, func() { d.expire(id, u, &t) })
	u.timer = t
}

// expire is the end of a timer, unless that has been stopped.
func (d *devices) expire(id string, u *deviceUse, t **time.Timer) {
	d.mu.Lock()
	if u.timer != *t || d.work.Err() != nil {
		d.mu.Unlock()
		return
	}
	u.refs++
	u.timer = nil
	d.wg.Add(1) // before close waits: the work is not over
	d.mu.Unlock()
	defer d.wg.Done()
	d.tend(d.work, id)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.put(id, u)
}

// take waits for the turn to change a device.
func (d *devices) take(ctx context.Context, id string) (u *deviceUse, leave func(), err error) {
	d.mu.Lock()
	u = d.get(id)
	d.mu.Unlock()
	put := func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.put(id, u)
	}
	select {
	case u.turn <- struct{}{}:
		return u, func() { <-u.turn; put() }, nil
	case <-ctx.Done():
		put()
		return nil, nil, context.Cause(ctx)
	}
}

// attach makes sure that the device of a snapshot is there, and mounted if the
// request says so. The caller holds it.
func (d *devices) attach(ctx context.Context, id string, r *node.Request) (*node.Status, error) {
	_, leave, err := d.take(ctx, id)
	if err != nil {
		return nil, err
	}
	defer leave()
	st, err := d.of.Attach(ctx, r, nil)
	if !errors.Is(err, unix.EBUSY) && (err != nil || r.Dir == "" || isMountpoint(r.Dir)) {
		return st, err
	}
	// It is on its way out, and cannot be mounted again.
	bound, cancel := context.WithTimeout(ctx, releaseTime)
	defer cancel()
	if err := d.of.Release(bound, r.ID, true); err != nil {
		return nil, fmt.Errorf("device %s: it is not mounted any more, and cannot be released: %w", r.ID, err)
	}
	return d.of.Attach(ctx, r, nil)
}

// releaseTime bounds how long a release waits for who still uses the device. It
// is tried again then.
const releaseTime = 2 * time.Second

// tend releases the device of a snapshot that no container needs, and what is
// left of a snapshot that is not there any more. What cannot be done now is done
// later.
func (d *devices) tend(ctx context.Context, id string) {
	u, leave, err := d.take(ctx, id)
	if err != nil {
		d.later(id, d.retry)
		return
	}
	defer leave()
	err = d.release(ctx, id, u)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil || u.holds > 0 { // letGo sees to it
		u.warned = u.warned && err != nil
		return
	}
	if !u.warned && d.work.Err() == nil {
		u.warned = true
		d.log.Warn("a device that no container uses stays for now", "device", deviceID(id), "err", err)
	}
	d.arm(id, u, d.retry)
}

// release is tend in its turn.
func (d *devices) release(ctx context.Context, id string, u *deviceUse) error {
	ctx, cancel := context.WithTimeout(ctx, releaseTime)
	defer cancel()
	d.mu.Lock()
	if u.holds > 0 {
		d.mu.Unlock()
		return nil
	}
	u.cancel = cancel
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		u.cancel = nil
		d.mu.Unlock()
	}()
	there, needed, err := d.need(ctx, id)
	if err != nil || needed {
		return err
	}
	if err := d.of.Release(ctx, deviceID(id), false); err != nil && !errors.Is(err, node.ErrNoDevice) {
		return err
	}
	if there {
		return nil
	}
	return d.gone(id)
}

// isMountpoint tells whether something is mounted at dir.
func isMountpoint(dir string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_DONT_SYNC|unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_BASIC_STATS, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
