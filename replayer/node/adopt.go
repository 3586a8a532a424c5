package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device"
)

// adopt goes on with the device of a server that has ended.
func (d *served) adopt(fds map[string]int) {
	dead, err := d.tryAdopt(fds)
	if err != nil {
		if !dead || errors.Is(err, device.ErrGone) {
			d.s.unseen() // it had not appeared: who asked for it will ask again
		}
		if dead && !errors.Is(err, device.ErrGone) {
			d.log.Error("the device is lost", "image", d.state.Request.Ref, "device", d.state.Path, "err", err)
		}
		if d.state.mountedHere() {
			err = errors.Join(err, device.UnmountLazy(d.state.Dir))
		}
		d.fail(errors.Join(err, d.teardown()))
		return
	}
	close(d.ready)
	d.watch()
}

// tryAdopt also tells whether there was a device.
func (d *served) tryAdopt(fds map[string]int) (dead bool, err error) {
	st := &d.state
	if st.Device == nil || st.Image == nil {
		d.dropKept(fds)
		return false, fmt.Errorf("%s: the server was killed before there was a device: %w", st.Request.Ref, device.ErrGone)
	}
	if d.n, err = d.s.n.with(&st.Request, d.log.Logger); err != nil {
		d.dropKept(fds)
		return true, err
	}
	var lock *os.File
	if fd, ok := fds[roleUpper]; ok {
		lock = os.NewFile(uintptr(fd), roleUpper)
		delete(fds, roleUpper)
	}
	if d.im, err = d.reopen(lock); err != nil {
		d.dropKept(fds)
		return true, err
	}
	if !st.Replayed {
		open := d.im.trace
		d.im.trace = d.n.startLookup(d.work, d.im, st.Request.imageOptions(), open.done)
	}
	o := d.im.serving()
	o.Keeper = d.s.keeper()
	dev, err := device.Adopt(d.work, d.im.Image, *st.Device, fds, o)
	if err != nil {
		return true, err
	}
	d.loseRecording()
	old := st.Pid
	st.Pid = os.Getpid()
	st.Restarts++
	st.succeed()
	d.setDevice(dev)
	d.startWork()
	if st.Dir != "" && !st.Mounted {
		awaitEnd(d.work, old) // it may be about to have it mounted
	}
	if err := d.mount(d.work); err != nil {
		return true, err
	}
	d.writeLater()
	return true, nil
}

// reopenPause is how long it takes from one attempt to open an image to the
// next: the registry may be away, and what the image consists of not be here.
const reopenPause = time.Second

// reopen opens the image, sooner or later. What a file of this node lacks will
// not come by waiting.
func (d *served) reopen(lock *os.File) (*Image, error) {
	for {
		again := lock
		if lock != nil { // a failure closes it
			if fd, err := unix.FcntlInt(lock.Fd(), unix.F_DUPFD_CLOEXEC, 0); err == nil {
				again = os.NewFile(uintptr(fd), roleUpper)
			}
		}
		im, err := d.n.reopen(d.work, &d.state.Request, d.state.Image, again)
		if err == nil || d.work.Err() != nil || errors.Is(err, os.ErrNotExist) || d.state.Image.Local != nil {
			if lock != nil && again != lock {
				_ = lock.Close()
			}
			return im, err
		}
		d.log.Warn("the image cannot be opened again yet", "image", d.state.Request.Ref, "err", err)
		if err := pause(d.work, reopenPause); err != nil {
			return nil, err
		}
	}
}

// dropKept lets go of the descriptors of a device that is not adopted.
func (d *served) dropKept(fds map[string]int) {
	closeAll(fds)
	for _, name := range d.s.o.Keeper.Names() {
		for role := range fds {
			if name == d.id+"."+role {
				d.s.unkeep(name)
			}
		}
	}
}

// closeAll closes descriptors, that of the connection to the kernel first: what
// the others wait for fails then.
func closeAll(fds map[string]int) {
	roles := slices.SortedFunc(maps.Keys(fds), func(a, b string) int {
		if a == "fuse" {
			return -1
		}
		if b == "fuse" {
			return 1
		}
		return 0
	})
	for _, role := range roles {
		unix.Close(fds[role])
	}
}

// endTime bounds the wait for a process that has been killed.
const endTime = 5 * time.Second

// awaitEnd waits until a process is gone.
func awaitEnd(ctx context.Context, pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	for until := time.Now().Add(endTime); time.Now().Before(until) && ctx.Err() == nil; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 50)
		if n > 0 || err != nil && err != unix.EINTR {
			return
		}
	}
}
