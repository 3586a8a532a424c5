package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/replayer"
)

// A served is one device of a server, from its request, or its adoption, until
// nothing is left of it.
type served struct {
	s   *Server
	id  string
	log *deviceLog
	n   *Node // with the request's registry client

	ready chan struct{} // closed: it is attached and mounted, or never will be
	gone  chan struct{} // closed: nothing is left of it
	work  context.Context
	stop  context.CancelCauseFunc // of work: attaching, replay, download
	wg    sync.WaitGroup          // of work

	recording atomic.Pointer[autoRecording] // nil if there has been none; before ready
	lost      bool                          // so, but for one of the server before; before ready

	mu        sync.Mutex // guards what follows
	state     state      // not while it is being attached: then its goroutine owns it
	im        *Image     // likewise
	dev       *device.Device
	err       error // why it is not attached
	waiting   int   // who asked for it and waits
	holders   int   // who has a lease
	held      bool  // somebody has had one from this server
	released  bool  // nobody wants it any more: see end
	replay    replayer.Result
	replayed  chan struct{} // closed: replay says how it went
	endReplay context.CancelFunc
	ending    sync.Mutex // held by who takes the device away
}

// roleUpper is the lock on a writable layer, as the keeper names it.
const roleUpper = "upper"

// newServed makes a device; ctx says of which span its work is, and nothing else.
func (s *Server) newServed(ctx context.Context, r *Request) *served {
	d := &served{
		s: s, id: r.ID, log: newDeviceLog(s.o.Log),
		ready: make(chan struct{}), gone: make(chan struct{}), replayed: make(chan struct{}),
		endReplay: func() {},
		state: state{
			Version: stateVersion, Request: *r, Socket: s.o.Socket, Pid: os.Getpid(),
		},
	}
	if r.Dir != "" {
		d.state.Dir = resolveDir(r.resolve(r.Dir))
	}
	span := trace.ContextWithSpanContext(context.Background(), trace.SpanContextFromContext(ctx))
	d.work, d.stop = context.WithCancelCause(span)
	return d
}

// attach does what was asked for, and undoes it if it fails.
func (d *served) attach() {
	r := &d.state.Request
	err := d.traced(d.tryAttach)
	if err != nil {
		if cause := context.Cause(d.work); cause != nil && errors.Is(err, context.Canceled) {
			err = cause
		}
		if r.Dir != "" {
			err = fmt.Errorf("mount %s: %w", r.Ref, err)
		}
		d.fail(errors.Join(err, d.teardown()))
		return
	}
	close(d.ready)
	d.watch()
}

// fail tells those who wait, and forgets the device.
func (d *served) fail(err error) {
	d.mu.Lock()
	d.err = err
	d.mu.Unlock()
	d.s.forget(d)
	close(d.ready)
	close(d.gone)
}

func (d *served) tryAttach() (err error) {
	ctx, r := d.work, &d.state.Request
	if d.s.broken != nil {
		return d.s.broken
	}
	if d.state.Dir != "" {
		err = d.state.claim(ctx, d.s.n.o.Root)
	} else {
		err = makeDevicesDir(d.s.n.o.Root)
	}
	if err == nil {
		err = d.state.reserve(d.s.n.o.Root)
	}
	if err != nil {
		return err
	}
	if d.n, err = d.s.n.with(r, d.log.Logger); err != nil {
		return err
	}
	o := r.imageOptions()
	o.Phases, o.replay = phasesSince(r.Begun), &r.Plan
	if d.im, err = d.n.openImage(ctx, r.place(), o, r.Writable); err != nil {
		if r.Dir == "" {
			err = fmt.Errorf("open %s: %w", r.Ref, err)
		}
		return err
	}
	if r.Writable && d.im.readOnly {
		if err := d.makeUpper(); err != nil {
			return err
		}
	}
	d.state.Image = d.im.pinned()
	if d.s.o.opened != nil {
		if err := d.s.o.opened(d.im); err != nil {
			return err
		}
	}
	d.startRecording()
	d.startWork()
	if err := d.attachDevice(ctx); err != nil {
		return err
	}
	return d.mount(ctx)
}

// makeUpper gives the image a layer to write to.
func (d *served) makeUpper() error {
	if path := d.state.Request.Upper; path != "" {
		return d.im.keepUpper(d.state.Request.resolve(path))
	}
	return d.im.createUpper(upperPath(d.n.o.Root, d.id))
}

// attachDevice makes the kernel's device.
func (d *served) attachDevice(ctx context.Context) error {
	if d.im.lock != nil && d.state.Request.Writable {
		if err := d.s.keep(d.id+"."+roleUpper, int(d.im.lock.Fd())); err != nil {
			return err
		}
	}
	defer d.im.failWith(ctx)() // what follows reads
	o, err := d.im.deviceOptions(d.id, d.state.Request.Writable)
	if err != nil {
		return err
	}
	o.Keeper = d.s.keeper()
	if o.Keeper != nil {
		o.Prepared = d.prepared
	}
	dev, err := device.Attach(ctx, d.im.Image, d.im.Size(), o)
	if err != nil {
		return fmt.Errorf("attach device for %s: %w", d.im.Ref, err)
	}
	d.im.phases.mark("device attached")
	d.setDevice(dev)
	d.writeLater()
	return nil
}

// writeLater writes down what the next server can find out by itself, though not
// as well: it is no error if that fails. d.mu is held, or the device is not
// ready.
func (d *served) writeLater() {
	if d.s.keeper() == nil && d.state.Dir == "" {
		return // nobody would read it
	}
	if err := d.state.write(d.n.o.Root, false); err != nil {
		d.log.Warn("the state of a device is not written down", "image", d.state.Request.Ref, "err", err)
	}
}

// prepared writes down what the next server needs, before the device appears.
func (d *served) prepared(s device.State) error {
	d.state.Device = &s
	return d.state.write(d.n.o.Root, true)
}

func (d *served) setDevice(dev *device.Device) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dev = dev
	d.im.device.Store(dev.Path())
	d.state.Path, d.state.Backing = dev.Path(), backingOf(dev.Path())
}

// mount mounts the device, if that was asked for and has not been done.
func (d *served) mount(ctx context.Context) error {
	if d.state.Dir == "" || d.state.Mounted {
		return nil
	}
	if !d.state.mountedHere() {
		stop := d.im.failWith(ctx)
		err := device.Mount(d.dev.Path(), d.state.Dir, d.im.FSType, !d.state.Request.Writable, "")
		stop()
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, unix.EBUSY) && d.state.mountedHere():
			// What the server before was about to do has been done after its death.
		default:
			return err
		}
	}
	d.state.Mounted = true
	d.writeLater()
	return nil
}

// remount mounts a device again whose mount somebody has taken away while it is in
// use. The error matches device.ErrGone if the device has gone meanwhile, and EBUSY
// if it is of no use while it is there.
func (d *served) remount() error {
	d.ending.Lock() // it stays
	defer d.ending.Unlock()
	select {
	case <-d.gone:
		return fmt.Errorf("device %s: %w", d.id, device.ErrGone)
	default:
	}
	d.mu.Lock()
	s := d.state
	d.mu.Unlock()
	if s.Dir == "" || s.mountedHere() {
		return nil
	}
	if d.im.failing.Load() {
		return fmt.Errorf("device %s: it cannot be read any more: %w", d.id, errBusy)
	}
	if err := checkMountPoint(s.Dir); err != nil {
		return err
	}
	return device.Mount(s.Path, s.Dir, d.im.FSType, !s.Request.Writable, "")
}

// startWork begins to replay, where the opening has not, and then to complete
// the image if that was asked for.
func (d *served) startWork() {
	d.s.metrics.opened(d.im)
	d.wg.Go(d.keepFigures)
	if d.im.replay == nil {
		d.im.replay = d.n.startReplay(d.work, d.im, d.im.Blobs(), d.state.Request.Plan, closed)
	}
	r := d.im.replay
	d.endReplay = r.cancel
	d.wg.Go(func() {
		<-r.done
		d.mu.Lock()
		d.replay = r.result
		d.mu.Unlock()
		close(d.replayed)
		d.noteReplayed()
		d.complete()
	})
}

// noteReplayed lets the next server know that the replay is through. A replay
// that was cut short by the end of the server is not.
func (d *served) noteReplayed() { d.note(func(s *state) { s.Replayed = true }) }

// note writes down, once the device is there, what has changed; not at its end.
func (d *served) note(change func(*state)) {
	select {
	case <-d.ready:
	case <-d.work.Done():
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	change(&d.state)
	if d.released || d.err != nil || d.work.Err() != nil {
		return
	}
	d.writeLater()
}

func (d *served) complete() {
	o := d.state.Request.Complete
	if o == nil || d.work.Err() != nil {
		return
	}
	if err := d.im.Complete(d.work, o); err != nil && d.work.Err() == nil {
		d.log.Warn("background download", "image", d.state.Request.Ref, "err", err)
	}
}

// errOver is the end of a device's work when the device ends.
var errOver = errors.New("the device is being released")

// teardown undoes what attach or adopt has done, as far as it came. It is
// called once, when the device is not mounted, or is dead.
func (d *served) teardown() error {
	d.stop(errOver)
	var errs []error
	if d.im != nil && d.state.mountedHere() { // attaching has failed behind it
		errs = append(errs, device.UnmountLazy(d.state.Dir))
	}
	if d.dev != nil {
		errs = append(errs, d.dev.Close())
	}
	if d.im != nil {
		d.wg.Wait()
		errs = append(errs, d.im.Close())
		d.s.metrics.closed(d.im)
	}
	d.s.unkeep(d.id + "." + roleUpper)
	if d.n != nil && d.n.client != d.s.n.client {
		errs = append(errs, d.n.client.Close())
	}
	if d.s.broken == nil {
		errs = append(errs, d.state.remove(d.s.n.o.Root))
	}
	return errors.Join(errs...)
}

// status describes the device.
func (d *served) status() *Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := &d.state.Request
	st := &Status{
		ID: d.id, Ref: r.Ref, Manifest: d.im.Manifest, Config: d.im.Config, Layers: len(d.im.Layers()),
		Workload: d.im.workload(r.imageOptions()),
		Device:   d.state.Path, FSType: d.im.FSType, MountOptions: d.im.mountOptions(),
		Dir: d.state.Dir, Writable: r.Writable, Leased: r.Leased,
		Pid: os.Getpid(), Restarts: d.state.Restarts, Before: d.state.Before,
		Phases: d.im.phases.List(), Now: snapshot(d.im), Replay: d.replay,
	}
	st.Now.Restarts = st.Restarts
	for _, b := range d.im.Blobs() {
		if b != nil {
			st.Size, st.Present = st.Size+b.Size(), st.Present+b.Present()
		}
	}
	for _, w := range d.im.Waiting() {
		st.Waiting = append(st.Waiting, w.String())
	}
	select {
	case <-d.im.trace.done:
		st.Trace = d.im.trace.why
	default:
		st.Trace = "the lookup had not ended"
	}
	st.Explain = d.im.explain(d.im.replay)
	st.Recording = d.recordingState()
	return st
}

// quiesce ends the replay, and after some time makes reads fail, unless the
// device is released first: nobody wants bytes any more, but whoever unmounts
// waits for those under way.
func (d *served) quiesce(failAfter time.Duration) {
	d.endReplay()
	<-d.replayed
	d.writeFigures()
	if failAfter <= 0 {
		return
	}
	go func() {
		t := time.NewTimer(failAfter)
		defer t.Stop()
		select {
		case <-t.C:
			d.im.fail()
		case <-d.gone:
		}
	}()
}

func (d *served) path() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dev.Path()
}

// release takes the device away: it unmounts it, lazily if that is asked for,
// and waits, while ctx lasts, until nothing uses it. It fails with EBUSY while
// files on the mount are in use.
func (d *served) release(ctx context.Context, lazily bool) error {
	select {
	case <-d.ready:
	case <-ctx.Done():
		return fmt.Errorf("it is being attached, and does not come to an end: %w", ctx.Err())
	}
	if d.failed() != nil {
		return nil // and so it is gone
	}
	if err := d.unmount(lazily); err != nil {
		return err
	}
	for {
		err := d.end()
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		if pause(ctx, releasePoll) != nil {
			return err
		}
	}
}

// releasePoll is how often it is looked whether a busy device is free.
const releasePoll = 20 * time.Millisecond

func (d *served) failed() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// unmountTime is how long unmounting may wait for bytes of the registry.
const unmountTime = 10 * time.Second

// unmount takes the mount away. Should it wait for a registry that does not
// answer, reads that need it fail after a while.
func (d *served) unmount(lazily bool) error {
	d.mu.Lock()
	s := d.state
	d.mu.Unlock()
	if !s.mountedHere() {
		return nil
	}
	d.endReplay()
	fail := time.AfterFunc(unmountTime, d.im.cancelReads)
	defer fail.Stop()
	var err error
	if lazily {
		err = device.UnmountLazy(s.Dir)
	} else {
		err = device.Unmount(s.Dir)
	}
	if errors.Is(err, unix.EBUSY) {
		return errBusy
	}
	if err != nil && !s.mountedHere() {
		return nil // somebody else was faster
	}
	return err
}

// errBusy is a mount whose files are in use.
var errBusy error = unix.EBUSY

// end takes away a device that nothing uses, and what belongs to it. It fails
// with EBUSY, and all goes on, while something does.
func (d *served) end() error {
	d.ending.Lock()
	defer d.ending.Unlock()
	select {
	case <-d.gone:
		return nil
	default:
	}
	if err := d.dev.Close(); errors.Is(err, unix.EBUSY) {
		return err
	}
	d.mu.Lock()
	d.released = true
	d.mu.Unlock()
	err := d.teardown()
	d.s.forget(d)
	close(d.gone)
	return err
}

// hold is a lease on the device; the function it returns ends it.
func (d *served) hold() (letGo func()) {
	d.mu.Lock()
	d.holders++
	d.held = true
	d.mu.Unlock()
	return func() { d.count(&d.holders, -1) }
}

// await counts those who wait for the attaching. When the last of them has gone
// before the end of that, it is given up.
func (d *served) await(ctx context.Context) error {
	d.count(&d.waiting, 1)
	defer func() {
		select {
		case <-d.ready:
		default:
			d.mu.Lock()
			last := d.waiting == 1
			d.mu.Unlock()
			if last {
				d.stop(context.Cause(ctx))
			}
		}
		d.count(&d.waiting, -1)
	}()
	select {
	case <-d.ready:
		return d.failed()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (d *served) count(n *int, by int) {
	d.mu.Lock()
	*n += by
	d.mu.Unlock()
}
