package device

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
	"github.com/reprise-project/reprise/backstore/device/internal/feature"
	"github.com/reprise-project/reprise/backstore/device/internal/fuse"
	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// fuseErofs is the one file of a FUSE session itself, which EROFS mounts without
// a block device in between. It is for images that are EROFS, read-only. The
// data goes past the page cache of the file, straight to the server, if the
// mount has EROFS's option directio, which [Mount] and [Device.MountDetached]
// set: through the page cache, besides keeping all data twice, a reader that is
// killed could leave pages of zeros behind on kernels before the spring of 2026
// (Linux commit eade54040384). Metadata does go through it.
type fuseErofs struct{}

// roleOpens is the table of who has the file open; see fuse.Opens.
const roleOpens = "opens"

const fileBacked = "file-backed EROFS"

func (fuseErofs) missing() error {
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return feature.Check(unix.ENOENT, "/dev/fuse", "", "load the kernel module fuse, and in a container pass the device in")
	}
	k := runningKernel()
	if !k.atLeast(6, 12) {
		return &FeatureError{Feature: fileBacked, Since: "6.12", Hint: "this is Linux " + k.release, Err: unix.ENOSYS}
	}
	return k.needFileSystem("erofs")
}

func (fuseErofs) attach(_ context.Context, srv *request.Server, a *attaching) (attachment, error) {
	if !srv.ReadOnly {
		return nil, errors.New("the erofs transport cannot be written: set ReadOnly")
	}
	if a.FSType != "" && a.FSType != "erofs" {
		return nil, fmt.Errorf("the erofs transport is for EROFS, and this is %s: use auto or fuse", a.FSType)
	}
	opens, err := fuse.NewOpens()
	if err != nil {
		return nil, err
	}
	d := &fuseErofsDevice{a: a, opens: opens}
	if err := d.start(srv); err != nil {
		opens.Close()
		return nil, err
	}
	s := d.session
	err = errors.Join(d.neverPolled(), a.keep(roleFuse, s.FD()), a.keep(roleMount, s.MountFD()), a.keep(roleOpens, opens.FD()), a.appear())
	if err != nil {
		return nil, errors.Join(err, d.close(-1, a.CloseTimeout))
	}
	return d, nil
}

func (fuseErofs) adopt(_ context.Context, srv *request.Server, a *attaching, fds map[string]int) (attachment, error) {
	d := &fuseErofsDevice{a: a}
	if err := d.adopt(srv, fds); err != nil {
		return nil, errors.Join(err, a.unkeep())
	}
	return d, nil
}

// fuseErofsDevice is a device of fuseErofs.
type fuseErofsDevice struct {
	a         *attaching
	session   *fuse.Session
	opens     *fuse.Opens
	namespace int // see lowFDs
}

// config is that of a session. The file's name is the source in the mount
// table; the ID makes it one device's only. The kernel is not given the backing
// file: that would make FUSE a stacked file system, whose files EROFS refuses.
func (d *fuseErofsDevice) config() fuse.Config {
	return fuse.Config{
		Name:      erofsFileName(d.a.Name, d.a.ID),
		BlockSize: d.a.SectorSize,
		Workers:   d.a.MaxInFlight,
		MinFD:     d.namespace + 1,
		Opens:     d.opens,
	}
}

func erofsFileName(name, id string) string {
	const longest = 255 // NAME_MAX
	id = fileName("@" + id)
	return name[:min(len(name), longest-len(id))] + id
}

func (d *fuseErofsDevice) start(srv *request.Server) (err error) {
	if d.namespace, err = openNamespace(); err != nil {
		return err
	}
	if d.session, err = fuse.Start(srv, d.config()); err != nil {
		unix.Close(d.namespace)
	}
	return err
}

// neverPolled has the kernel learn that the file cannot be polled. It asks the
// first time that somebody tries, as Go's runtime does with every file that
// os.Open opens, on a thread that nobody can replace while it waits: in this
// same process the answer might never come.
func (d *fuseErofsDevice) neverPolled() error {
	return apart.Run(func() error {
		fd, err := d.session.OpenFile()
		if err != nil {
			return fmt.Errorf("open the file: %w", err)
		}
		defer unix.Close(fd)
		for {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			if err != unix.EINTR {
				return err
			}
		}
	}, d.session.MountFD())
}

// openNamespace opens the process's mount namespace, below /dev/fuse; see lowFDs.
func openNamespace() (int, error) {
	fd, err := unix.Open("/proc/self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open /proc/self/ns/mnt: %w", err)
	}
	return fd, nil
}

// adopt goes on with a session. It owns the descriptors, whatever it returns.
func (d *fuseErofsDevice) adopt(srv *request.Server, fds map[string]int) (err error) {
	roles := []string{roleFuse, roleMount, roleOpens}
	for _, role := range roles {
		if _, ok := fds[role]; !ok {
			for _, fd := range fds {
				unix.Close(fd)
			}
			return fmt.Errorf("%w: of its descriptors %q was not kept", ErrGone, role)
		}
	}
	fuseFD, mount := fds[roleFuse], fds[roleMount]
	if d.opens, err = fuse.AdoptOpens(fds[roleOpens]); err != nil {
		closeFDs(fuseFD, mount)
		return err
	}
	if d.namespace, err = openNamespace(); err == nil {
		if err = raise(&fuseFD, d.namespace+1); err == nil {
			d.session, err = fuse.Adopt(fuseFD, mount, srv, d.config())
		}
		if err != nil {
			unix.Close(d.namespace)
		}
	}
	if err != nil {
		closeFDs(fuseFD, mount)
		return errors.Join(err, d.opens.Close())
	}
	return nil
}

// raise gives a descriptor a number of at least low.
func raise(fd *int, low int) error {
	if *fd >= low {
		return nil
	}
	high, err := unix.FcntlInt(uintptr(*fd), unix.F_DUPFD_CLOEXEC, low)
	if err != nil {
		return err
	}
	unix.Close(*fd)
	*fd = high
	return nil
}

// path is the file in the detached mount, for processes that can look into this
// one's /proc/PID/fd, and is another one after an adoption.
func (d *fuseErofsDevice) path() string {
	return "/proc/" + strconv.Itoa(os.Getpid()) + "/fd/" + strconv.Itoa(d.session.MountFD()) + "/" + d.config().Name
}

// claim refuses further mounts. The file is in use as long as a mount, or a
// process, has it open.
func (d *fuseErofsDevice) claim() (fd int, err error) {
	if d.session.Err() != nil { // nobody can open it, or will say that it was closed
		return -1, nil
	}
	return -1, d.opens.Refuse()
}

func (d *fuseErofsDevice) ended() <-chan struct{} { return d.session.Ended() }

func (d *fuseErofsDevice) err() error { return d.session.Err() }

// close ends the session; what the keeper holds of it goes first, for as long as
// anybody has /dev/fuse open the session lasts.
func (d *fuseErofsDevice) close(_ int, timeout time.Duration) error {
	unkeepErr := d.a.unkeep()
	endErr := d.session.Close(timeout)
	opensErr := d.opens.Close()
	unix.Close(d.namespace)
	if d.session.Err() != nil { // it had ended before: that is what Err tells
		return nil
	}
	return errors.Join(unkeepErr, endErr, opensErr)
}
