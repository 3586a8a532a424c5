package node

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

// wanted tells whether anybody may still use the device.
func (d *served) wanted() bool {
	d.mu.Lock()
	holders, waiting := d.holders, d.waiting
	dir, leased := d.state.Dir, d.state.Request.Leased
	d.mu.Unlock()
	switch {
	case waiting > 0:
		return true
	case dir != "":
		return len(device.Mounts(d.path())) > 0
	case leased:
		return holders > 0
	}
	return true // until it is released
}

// watch ends the device once nobody wants it any more. It returns when it is
// gone.
func (d *served) watch() {
	d.s.wg.Go(func() { (&watch{d: d}).run() })
}

// watch looks whether a device is wanted.
type watch struct {
	d       *served
	since   time.Time // nobody has wanted it
	failing bool
}

// How often a device is looked at, beside at each change of the mount table,
// and how long one whose client is gone waits for it to come back. After
// lastReads more, reads of it fail, since a process that waits for bytes cannot
// be ended.
const (
	watchPoll = 100 * time.Millisecond
	tablePoll = 500 * time.Millisecond
)

func (w *watch) run() {
	d := w.d
	every := watchPoll
	var changed <-chan struct{}
	if d.state.Dir != "" {
		every = tablePoll
		changed = d.s.table.subscribe(d)
		defer d.s.table.unsubscribe(d)
	}
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		w.look()
		select {
		case <-d.gone:
			return
		case <-d.s.leaving:
			return
		case <-d.dev.Done():
			w.dead()
			return
		case <-changed:
		case <-t.C:
		}
	}
}

func (w *watch) look() {
	d := w.d
	if d.wanted() {
		w.since = time.Time{}
		return
	}
	if w.since.IsZero() {
		w.since = time.Now()
	}
	grace := d.grace()
	idle := time.Since(w.since)
	if idle < grace {
		return
	}
	if err := d.end(); err != nil && !errors.Is(err, unix.EBUSY) {
		d.log.Warn("the device is released", "image", d.state.Request.Ref, "err", err)
	}
	if d.state.Request.Leased && !w.failing && idle > grace+lastReads {
		w.failing = true
		d.im.fail()
	}
	select {
	case <-d.gone:
		if d.state.Request.Leased {
			reapRunDirs(d.s.n.o.Root, d.log.Logger)
		}
	default:
	}
}

// grace is how long nobody may want the device before it is taken away.
func (d *served) grace() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case !d.state.Request.Leased:
		return 0
	case d.s.o.Orphaned != nil && d.s.o.Orphaned():
		return 0
	case d.state.Restarts > 0 && !d.held: // its client is on its way
		return max(d.s.o.LeaseGrace, adoptedGrace)
	}
	return d.s.o.LeaseGrace
}

// adoptedGrace is how long a client may take to find the next server, on a
// machine that is busy.
const adoptedGrace = time.Minute

// dead takes away a device whose connection to the kernel somebody has ended.
func (w *watch) dead() {
	d := w.d
	select {
	case <-d.gone:
		return
	default:
	}
	if d.dev.Err() != nil {
		d.log.Error("the device has ended", "image", d.state.Request.Ref, "err", d.dev.Err())
	}
	if d.state.mountedHere() {
		if err := device.UnmountLazy(d.state.Dir); err != nil {
			d.log.Error("the dead mount stays", "dir", d.state.Dir, "err", err)
		}
	}
	for d.end() != nil {
		select {
		case <-d.gone:
			return
		case <-d.s.leaving:
			return
		case <-time.After(watchPoll):
		}
	}
}
