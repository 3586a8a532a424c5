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

// devices are those of the chains, by ID, and who uses them.
type devices struct {
	of     node.Devices
	linger time.Duration
	log    *slog.Logger
	wg     sync.WaitGroup
	work   context.Context
	stop   context.CancelFunc

	mu   sync.Mutex // guards byID and all in it but turn
	byID map[string]*deviceUse
}

// deviceUse is what is known of one device.
type deviceUse struct {
	turn  chan struct{}       // taken by who attaches or releases it
	keys  map[string]struct{} // of the containers' snapshots that use it
	timer *time.Timer         // of its release; nil while it is used
}

func newDevices(of node.Devices, linger time.Duration, log *slog.Logger) *devices {
	d := &devices{of: of, linger: linger, log: log, byID: map[string]*deviceUse{}}
	d.work, d.stop = context.WithCancel(context.Background())
	return d
}

// close ends what is under way; the devices stay.
func (d *devices) close() {
	d.stop()
	d.mu.Lock()
	for _, u := range d.byID {
		if u.timer != nil {
			u.timer.Stop()
		}
	}
	d.mu.Unlock()
	d.wg.Wait()
}

// get is called with d.mu held.
func (d *devices) get(id string) *deviceUse {
	u := d.byID[id]
	if u == nil {
		u = &deviceUse{turn: make(chan struct{}, 1), keys: map[string]struct{}{}}
		d.byID[id] = u
	}
	return u
}

// use notes that a container's snapshot needs the device.
func (d *devices) use(id, key string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	u := d.get(id)
	u.keys[key] = struct{}{}
	if u.timer != nil {
		u.timer.Stop()
		u.timer = nil
	}
}

// unuse notes that it does not any more. The device goes after a while.
func (d *devices) unuse(id, key string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	u := d.get(id)
	delete(u.keys, key)
	if len(u.keys) > 0 || u.timer != nil || d.work.Err() != nil {
		return
	}
	u.timer = time.AfterFunc(d.linger, func() { d.expire(id) })
}

// expire releases a device that has not been used for some time.
func (d *devices) expire(id string) {
	d.mu.Lock()
	if d.work.Err() != nil {
		d.mu.Unlock()
		return
	}
	d.wg.Add(1)
	d.mu.Unlock()
	defer d.wg.Done()
	if err := d.releaseIf(d.work, id, true); err != nil && d.work.Err() == nil {
		d.log.Warn("a device that no container uses stays for now", "device", id, "err", err)
		d.mu.Lock()
		defer d.mu.Unlock()
		if u := d.byID[id]; u != nil && len(u.keys) == 0 && d.work.Err() == nil {
			u.timer = time.AfterFunc(d.linger, func() { d.expire(id) })
		}
	}
}

// take waits for the turn to change a device.
func (d *devices) take(ctx context.Context, id string) (u *deviceUse, leave func(), err error) {
	d.mu.Lock()
	u = d.get(id)
	d.mu.Unlock()
	select {
	case u.turn <- struct{}{}:
		return u, func() { <-u.turn }, nil
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
}

// attach makes sure that the device is there and mounted.
func (d *devices) attach(ctx context.Context, r *node.Request) error {
	_, leave, err := d.take(ctx, r.ID)
	if err != nil {
		return err
	}
	defer leave()
	if _, err := d.of.Attach(ctx, r, nil); err != nil {
		return err
	}
	if isMountpoint(r.Dir) {
		return nil
	}
	// Somebody has unmounted it, and it is on its way out.
	if err := d.of.Release(ctx, r.ID, true); err != nil {
		return fmt.Errorf("device %s: it is not mounted any more, and cannot be released: %w", r.ID, err)
	}
	_, err = d.of.Attach(ctx, r, nil)
	return err
}

// releaseTime bounds how long a release waits for who still uses the device.
const releaseTime = 10 * time.Second

// release takes the device of a removed snapshot away, if it is there.
func (d *devices) release(ctx context.Context, id string) error {
	return d.releaseIf(ctx, id, false)
}

// releaseIf releases a device; with unused set, not if somebody has come to use it.
func (d *devices) releaseIf(ctx context.Context, id string, unused bool) error {
	u, leave, err := d.take(ctx, id)
	if err != nil {
		return err
	}
	defer leave()
	d.mu.Lock()
	used := len(u.keys) > 0
	d.mu.Unlock()
	if unused && used {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, releaseTime)
	defer cancel()
	if err := d.of.Release(ctx, id, false); err != nil && !errors.Is(err, node.ErrNoDevice) {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(u.keys) == 0 {
		if u.timer != nil {
			u.timer.Stop()
		}
		u.timer = nil
	}
	return nil
}

// isMountpoint tells whether something is mounted at dir.
func isMountpoint(dir string) bool {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_STATX_DONT_SYNC|unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_BASIC_STATS, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}
