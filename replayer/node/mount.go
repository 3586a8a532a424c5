package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore"
	"github.com/reprise-project/reprise/backstore/device"
	"github.com/reprise-project/reprise/backstore/lsmt"
	"github.com/reprise-project/reprise/replayer"
)

// MountOptions are the settings of [Node.Mount]. A zero field means its
// default.
type MountOptions struct {
	Image ImageOptions
	// Writable mounts read-write. What is written goes to the upper layer that
	// a config.v1.json names; otherwise it is kept below Root until the image
	// is unmounted.
	Writable bool
	Plan     replayer.Options
	// Complete, if set, downloads what is missing of the image afterwards.
	Complete *backstore.CompleteOptions
	// Begin, if set, is called when the mount point is ours and nothing is
	// mounted yet: the time to have somebody ready to call Reap.
	Begin func(MountState) error
}

// A Mount is an image mounted at a directory of this mount namespace.
type Mount struct {
	State MountState
	Image *Image

	dev    *device.Device
	state  *stateFile
	cancel context.CancelFunc // of the replay and the download
	wg     sync.WaitGroup     // both

	closing sync.Mutex // guards closed
	closed  bool
}

// Mount mounts an image at dir, an existing directory that is not a mount
// point, replays the trace that the options name, and returns once mounted.
// This process serves the mount until [Mount.Close].
func (n *Node) Mount(ctx context.Context, ref, dir string, o *MountOptions) (*Mount, error) {
	m, err := n.mount(ctx, ref, resolveDir(dir), o)
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", ref, err)
	}
	return m, nil
}

func (n *Node) mount(ctx context.Context, ref, dir string, o *MountOptions) (*Mount, error) {
	if !isMountPoint(dir) { // else it may be a dead one
		if err := checkMountPoint(dir); err != nil {
			return nil, err
		}
	}
	state, err := n.claimState(ctx, dir)
	if err != nil {
		return nil, err
	}
	m := &Mount{
		State: MountState{Dir: dir, Ref: ref, Pid: os.Getpid(), Started: time.Now()},
		state: state, cancel: func() {},
	}
	if err := m.mount(ctx, n, o); err != nil {
		return nil, errors.Join(err, m.release())
	}
	return m, nil
}

func (m *Mount) mount(ctx context.Context, n *Node, o *MountOptions) (err error) {
	if err := checkMountPoint(m.State.Dir); err != nil {
		return err
	}
	if err := m.state.write(m.State); err != nil {
		return err
	}
	if o.Begin != nil {
		if err := o.Begin(m.State); err != nil {
			return err
		}
	}
	if m.Image, err = n.openImage(ctx, m.State.Ref, o.Image, o.Writable); err != nil {
		return err
	}
	if o.Writable && m.Image.readOnly {
		if err := m.addUpper(); err != nil {
			return err
		}
	}
	m.work(n, o)
	if m.dev, err = m.Image.attach(ctx, !o.Writable); err != nil {
		return err
	}
	m.State.Device, m.State.Backing = m.dev.Path(), backingOf(m.dev.Path())
	if err := m.state.write(m.State); err != nil {
		return err
	}
	defer m.Image.failWith(ctx)()
	err = device.Mount(m.dev.Path(), m.State.Dir, m.Image.FSType, !o.Writable, "")
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

// addUpper gives the image a layer to write to.
func (m *Mount) addUpper() error {
	f, err := os.OpenFile(m.state.upper(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	w, err := lsmt.CreateSparse(f, &lsmt.WritableOptions{VirtualSize: m.Image.Size()})
	if err != nil {
		return errors.Join(err, f.Close())
	}
	m.Image.setUpper(w)
	return nil
}

// work begins to replay, and then to complete the image if that was asked for.
func (m *Mount) work(n *Node, o *MountOptions) {
	ctx, cancel := context.WithCancel(context.Background())
	m.cancel = cancel
	m.wg.Go(func() {
		n.replay(ctx, m.Image, o.Plan)
		if o.Complete == nil || ctx.Err() != nil {
			return
		}
		if err := m.Image.Complete(ctx, o.Complete); err != nil && ctx.Err() == nil {
			n.o.Log.Warn("background download", "image", m.State.Ref, "err", err)
		}
	})
}

// tablePoll is how often, in milliseconds, Wait looks whether ctx or the device
// has ended; the kernel tells when the mount table changes.
const tablePoll = 500

// Wait returns when nobody uses the image any more: it is mounted nowhere, and
// the last of its files was closed; or when the device fails, or ctx ends. Only
// Close is left to do then.
func (m *Mount) Wait(ctx context.Context) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	for mounted(m.State.Device) || !m.free() {
		select {
		case <-ctx.Done():
			return nil
		case <-m.dev.Done():
			return fmt.Errorf("device %s of %s ended: %w", m.State.Device, m.State.Ref, m.dev.Err())
		default:
		}
		// The kernel signals changes of the mount table as an exception.
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}, tablePoll)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return nil
}

// free takes the device away unless something uses it: files that were open
// when it was unmounted lazily, or a mount in another namespace.
func (m *Mount) free() bool {
	var busy *device.BusyError
	return !errors.As(m.dev.Close(), &busy)
}

// Detach takes the mount out of the directory tree at once, though files on it
// are in use; Wait tells when they are not any more.
func (m *Mount) Detach() error {
	if !mountedAt(m.State.Dir, m.State.Device) {
		return nil
	}
	return device.UnmountLazy(m.State.Dir)
}

// Close unmounts, if that has not been done, and releases everything. It
// fails, with an error that matches EBUSY, and the mount goes on, while files
// on it are in use. It may be called again.
func (m *Mount) Close() error {
	m.closing.Lock()
	defer m.closing.Unlock()
	if m.closed {
		return nil
	}
	if mountedAt(m.State.Dir, m.State.Device) {
		if err := device.Unmount(m.State.Dir); err != nil {
			return err
		}
	}
	if err := m.dev.Close(); errors.Is(err, unix.EBUSY) {
		return err
	}
	m.closed = true
	return m.release()
}

// release undoes mount as far as it came.
func (m *Mount) release() error {
	m.cancel()
	m.wg.Wait()
	var errs []error
	if m.dev != nil {
		errs = append(errs, m.dev.Close())
	}
	if m.Image != nil {
		errs = append(errs, m.Image.Close())
	}
	return errors.Join(append(errs, m.state.remove())...)
}
