package device

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
	"github.com/reprise-project/reprise/backstore/device/internal/fuse"
	"github.com/reprise-project/reprise/backstore/device/internal/loop"
	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// fuseLoop is a loop device over the one file of a FUSE session.
type fuseLoop struct{}

// The descriptors that a device lives by. The first is kept first; see lowFDs.
const (
	roleFuse  = "fuse"
	roleMount = "mount"
	roleLoop  = "loop"
)

func (fuseLoop) missing() error {
	for _, path := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(path); err != nil {
			return feature.Check(unix.ENOENT, path, "", "load its kernel module, and in a container pass the device in")
		}
	}
	return nil
}

func (fuseLoop) attach(ctx context.Context, srv *request.Server, a *attaching) (attachment, error) {
	low, err := openLowFDs()
	if err != nil {
		return nil, err
	}
	cfg := fuseConfig(a, low)
	cfg.Backing = a.file
	s, err := fuse.Start(srv, cfg)
	if err != nil {
		low.close()
		return nil, err
	}
	d := &fuseLoopDevice{a: a, session: s, namespace: low.namespace}
	if err := d.attach(ctx, low.loop); err != nil {
		err = errors.Join(err, a.unkeep(), s.Close(a.CloseTimeout))
		low.close()
		return nil, err
	}
	return d, nil
}

func fuseConfig(a *attaching, low lowFDs) fuse.Config {
	return fuse.Config{
		Name:      a.Name,
		BlockSize: a.SectorSize,
		Workers:   a.MaxInFlight,
		MinFD:     max(low.loop, low.namespace) + 1,
	}
}

// fuseLoopDevice is a device of fuseLoop.
type fuseLoopDevice struct {
	a         *attaching
	session   *fuse.Session
	loop      *loop.Device
	namespace int // see lowFDs
}

// attach makes the loop device, in the place of descriptor fd.
func (d *fuseLoopDevice) attach(ctx context.Context, fd int) error {
	a, s := d.a, d.session
	if err := errors.Join(a.keep(roleFuse, s.FD()), a.keep(roleMount, s.MountFD()), a.appear()); err != nil {
		return err
	}
	l, err := loop.Attach(ctx, loop.Config{
		Open:        s.OpenFile,
		Needs:       []int{s.MountFD()},
		FD:          fd,
		Name:        a.Name,
		BlockSize:   a.SectorSize,
		ReadOnly:    a.ReadOnly,
		ReadAheadKB: max(a.ReadAheadKB, 0),
	})
	if err != nil {
		return err
	}
	d.loop = l
	if err := a.keep(roleLoop, l.FD()); err != nil {
		return errors.Join(err, l.Clear())
	}
	return nil
}

func (fuseLoop) adopt(_ context.Context, srv *request.Server, a *attaching, fds map[string]int) (attachment, error) {
	d, err := adoptFuseLoop(srv, a, fds)
	if err != nil {
		return nil, errors.Join(err, a.unkeep())
	}
	return d, nil
}

// adoptFuseLoop goes on with a device whose three descriptors these are. It
// owns them, whatever it returns. If it fails the last reference to /dev/fuse
// goes first: what waits for the device gets an error then.
func adoptFuseLoop(srv *request.Server, a *attaching, fds map[string]int) (d *fuseLoopDevice, err error) {
	fuseFD, mount, loopFD, err := threeFDs(fds)
	if err != nil {
		return nil, err
	}
	low, err := openLowFDs()
	if err == nil {
		err = low.place(&fuseFD, loopFD)
	}
	if err != nil {
		closeFDs(fuseFD, mount, loopFD)
		return nil, err
	}
	d = &fuseLoopDevice{a: a, namespace: low.namespace}
	if d.loop, err = loop.Adopt(low.loop); errors.Is(err, unix.ENXIO) {
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	if err == nil {
		d.session, err = fuse.Adopt(fuseFD, mount, srv, fuseConfig(a, low))
	}
	if err != nil {
		err = errors.Join(err, a.unkeep())
		closeFDs(fuseFD, mount)
		low.close()
		return nil, err
	}
	return d, nil
}

// threeFDs takes the descriptors of a device out of fds, and closes them if one
// is missing: then its owner had not come to the end of attach.
func threeFDs(fds map[string]int) (fuseFD, mount, loopFD int, err error) {
	var got []int
	for _, role := range []string{roleFuse, roleMount, roleLoop} {
		if fd, ok := fds[role]; ok {
			got = append(got, fd)
		}
	}
	if len(got) < 3 {
		closeFDs(got...)
		return 0, 0, 0, fmt.Errorf("%w: %d of its 3 descriptors were kept", ErrGone, len(got))
	}
	return got[0], got[1], got[2], nil
}

func closeFDs(fds ...int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// lowFDs are descriptors with numbers below that of /dev/fuse. A dying process
// releases its files from the highest number down, and what these hold waits
// for I/O to the device when it is released, which can only fail once /dev/fuse
// is gone. The other way round the process would wait for itself, and nothing
// could kill it.
type lowFDs struct {
	// loop is to be the loop device, which writes its dirty pages back. Until
	// then it is a placeholder.
	loop int
	// namespace is the process's mount namespace. If that ends with the process
	// it unmounts what is mounted on the device. Without this descriptor it
	// would end before any file is released.
	namespace int
}

func openLowFDs() (lowFDs, error) {
	ns, err := unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return lowFDs{}, fmt.Errorf("open /proc/self/ns/mnt: %w", err)
	}
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		unix.Close(ns)
		return lowFDs{}, fmt.Errorf("open /dev/null: %w", err)
	}
	return lowFDs{loop: null, namespace: ns}, nil
}

// place moves a loop device to its place, and /dev/fuse above that.
func (l lowFDs) place(fuseFD *int, loopFD int) error {
	if err := unix.Dup3(loopFD, l.loop, unix.O_CLOEXEC); err != nil {
		return err
	}
	high, err := unix.FcntlInt(uintptr(*fuseFD), unix.F_DUPFD_CLOEXEC, max(l.loop, l.namespace)+1)
	if err != nil {
		return err
	}
	unix.Close(*fuseFD)
	unix.Close(loopFD)
	*fuseFD = high
	return nil
}

func (l lowFDs) close() {
	unix.Close(l.loop)
	unix.Close(l.namespace)
}

func (d *fuseLoopDevice) path() string { return d.loop.Path() }

func (d *fuseLoopDevice) claim() (fd int, err error) { return d.loop.Claim() }

func (d *fuseLoopDevice) ended() <-chan struct{} { return d.session.Ended() }

func (d *fuseLoopDevice) err() error { return d.session.Err() }

// close detaches the loop device within the timeout, for a backend may be
// stuck, and ends the session, which makes a stuck detach return. The keeper
// lets go of /dev/fuse before, or the session would not end, and of the loop
// device while it is served: its last close may wait for I/O.
func (d *fuseLoopDevice) close(claim int, timeout time.Duration) error {
	detached := make(chan error, 1)
	go func() { detached <- d.loop.Detach(claim) }()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	var detachErr, endErr error
	select {
	case detachErr = <-detached:
		endErr = errors.Join(d.a.unkeep(roleLoop), d.a.unkeep(), d.session.Close(timeout))
	case <-timer.C:
		endErr = errors.Join(d.a.unkeep(roleFuse), d.session.Close(0))
		detachErr = errors.Join(<-detached, d.a.unkeep())
	}
	unix.Close(d.namespace)
	if d.session.Err() != nil { // it had ended before: that is what Err tells
		return nil
	}
	return errors.Join(detachErr, endErr)
}
