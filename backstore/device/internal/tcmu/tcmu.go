// Package tcmu makes a SCSI disk, /dev/sdX, whose commands this process
// executes: Linux's target_core_user hands them over in a ring in shared
// memory, and its loopback fabric, tcm_loop, shows the target to this same
// machine.
//
//	file system → sd → tcm_loop → target core → ring → request.Server
//
// A target has a back end (core/user_HBA/NAME in configfs, with a device
// /dev/uioN for the ring), and a fabric part (loopback/naa.…/tpgt_1), which is a
// SCSI host with one logical unit. Both are named after the device, so another
// process finds them.
//
// # The ring
//
// The kernel adds entries at cmd_head; whoever serves answers them and moves
// cmd_tail past the answers. An answer takes the place of a request, in the
// oldest entry that has none, whichever command it answers: the entry then
// carries that one's number. So a command that is slow holds up no other, but
// its request may be overwritten while it runs, and what it needs is copied out
// of the ring when it begins.
//
// # Adoption
//
// For the same reason a process that takes over cannot read in the ring what
// its predecessor had begun. It has the kernel reset the ring: every command
// without an answer goes back, as BUSY, to the SCSI layer, which sends it again
// and again until it is executed. Nobody above sees that. Answers that the
// predecessor had written behind cmd_tail are lost, and those commands are
// executed once more, which for reads, writes, discards and flushes is
// harmless: nobody was told that they were done. Answers before cmd_tail are
// kept.
//
// The kernel lets /dev/uioN be opened once. A process that was killed frees it
// when all its threads have ended, which one that waits for this very device
// does not; so the descriptor should be kept outside (Config.Keep).
//
// # Concurrency and closing
//
// A [Device] is safe for concurrent use, except that Close is called once. Up
// to Config.Workers commands are executed at a time, each on a goroutine of its
// own. Whatever may wait for the device runs on threads without its
// descriptors; see package apart.
package tcmu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/apart"
	"github.com/reprise-project/reprise/backstore/device/internal/feature"
	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// Config describes a device.
type Config struct {
	// Name is the device's name in configfs and its serial number: letters,
	// digits, '-' and '_', different for every device of the machine.
	Name        string
	SectorSize  int // bytes: 512 to 4096
	ReadAheadKB int // queue/read_ahead_kb
	Workers     int // commands at a time
	// HBA is the number of the back end's directory. Adopt needs it.
	HBA int
	// Appear is told the HBA's number before there is anything, perhaps several
	// numbers before one is free; Keep gets the descriptor of /dev/uioN before
	// anybody sees the disk, to keep a duplicate. Attach only.
	Appear func(hba int) error
	Keep   func(fd int) error
}

// ErrGone says that there is no such device.
var ErrGone = errors.New("the SCSI target is gone")

// A Device is a SCSI disk that this process serves.
type Device struct {
	target  target
	session *session
	path    string // /dev/sdX
	sync    bool   // whether the page cache has to be written back
}

// since is the first Linux version with all that is needed.
const since = "4.18"

// Missing says what the kernel lacks, a *feature.Error; nil if nothing.
func Missing() error {
	const hint = "modprobe -a target_core_user tcm_loop"
	for _, need := range []struct{ path, name, hint string }{
		{"/sys/module/target_core_user", "target_core_user", hint},
		{"/sys/bus/tcm_loop_bus", "tcm_loop", hint},
		{core, "the SCSI target in configfs", "mount -t configfs none /sys/kernel/config"},
	} {
		if _, err := os.Stat(need.path); err != nil {
			return feature.Check(unix.ENOENT, need.name, since, need.hint)
		}
	}
	return nil
}

// Attach makes a disk whose requests srv executes. What a dead process left
// under the same name it takes away first.
func Attach(ctx context.Context, srv *request.Server, cfg Config) (*Device, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if err := Remove(cfg.Name); err != nil {
		return nil, fmt.Errorf("take away the SCSI target %s that was left: %w", cfg.Name, err)
	}
	t, err := newTarget(cfg.Name, cfg.Appear)
	if err != nil {
		return nil, err
	}
	d, err := attach(ctx, srv, t, &cfg)
	if err != nil {
		return nil, errors.Join(err, t.remove())
	}
	return d, nil
}

func (c *Config) check() error {
	const longest = 100
	if c.Name == "" || len(c.Name) > longest || strings.Trim(c.Name, nameLetters) != "" {
		return fmt.Errorf("a SCSI target cannot be called %q", c.Name)
	}
	return nil
}

const nameLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"

// attach makes the ring, serves it, and then shows the disk.
func attach(ctx context.Context, srv *request.Server, t target, cfg *Config) (*Device, error) {
	if err := t.makeBackend(cfg, srv.Size); err != nil {
		return nil, fmt.Errorf("make SCSI target %s: %w", t.name, err)
	}
	u, err := t.uio()
	if err != nil {
		return nil, err
	}
	fd, err := u.open(ctx)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(cfg.Keep(fd), t.makeFabric()); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return serve(ctx, srv, t, cfg, fd, u.size)
}

// serve begins to serve a ring, and shows the disk if that was not done. It
// owns fd.
func serve(ctx context.Context, srv *request.Server, t target, cfg *Config, fd, size int) (*Device, error) {
	mem, err := mapRing(fd, size)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	s, err := newSession(fd, mem, newUnit(t, srv, cfg), cfg.Workers)
	if err != nil {
		unix.Munmap(mem)
		unix.Close(fd)
		return nil, err
	}
	d := &Device{target: t, session: s, sync: !srv.ReadOnly}
	s.start()
	if err := d.appear(ctx, cfg); err != nil {
		return nil, errors.Join(err, d.Close(-1, abandonAfter))
	}
	return d, nil
}

// abandonAfter is how long a device that came to nothing may take to go.
const abandonAfter = 5 * time.Second

// appear makes the disk visible, finds it, and sets its queue's attributes.
func (d *Device) appear(ctx context.Context, cfg *Config) error {
	if err := apart.Run(d.target.link); err != nil { // the kernel asks the disk what it is
		return fmt.Errorf("show the disk: %w", err)
	}
	dk, err := d.target.disk(ctx, d.session.done)
	if err != nil {
		return err
	}
	d.path = "/dev/" + dk.name
	return apart.Run(func() error { return dk.tune(cfg) })
}

// Adopt goes on with the disk that Attach made in a process that has ended.
// fd is the descriptor that was kept, which Adopt owns, or -1. The error
// matches ErrGone if there is no such disk any more, or only a part of it;
// nothing is left of it then.
func Adopt(ctx context.Context, srv *request.Server, cfg Config, fd int) (*Device, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	d, err := adopt(ctx, srv, target{name: cfg.Name, hba: cfg.HBA}, &cfg, fd)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	return d, err
}

func adopt(ctx context.Context, srv *request.Server, t target, cfg *Config, fd int) (*Device, error) {
	u, err := t.uio()
	if err == nil && fd >= 0 && !u.is(fd) {
		unix.Close(fd)
		fd = -1
	}
	if err == nil && fd < 0 {
		if fd, err = u.open(ctx); errors.Is(err, unix.EBUSY) {
			return nil, err // it is somebody else's
		}
	}
	if err == nil {
		err = takeOver(t, fd)
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, errors.Join(err, t.removeUnserved(nobody))
	}
	// What fails from here on ends a device that may be in use: not for ctx.
	return serve(context.WithoutCancel(ctx), srv, t, cfg, fd, u.size)
}

// takeOver has the kernel send again what the predecessor had begun.
func takeOver(t target, fd int) error {
	if err := notify(fd); err != nil { // of answers that it was not told of yet
		return fmt.Errorf("look at the ring: %w", err)
	}
	if err := t.resetRing(ringRetry); err != nil {
		return fmt.Errorf("reset the ring: %w", err)
	}
	return nil
}

// Path is /dev/sdX.
func (d *Device) Path() string { return d.path }

// Ended is closed when no command is being executed and none will be.
func (d *Device) Ended() <-chan struct{} { return d.session.ended }

// Err says why the device ended without a Close.
func (d *Device) Err() error { return d.session.failure() }

// Claim keeps everybody else from mounting the disk, as long as the descriptor
// that it returns is open. It fails with EBUSY while something has the disk
// mounted, in whatever namespace, or claimed otherwise.
func (d *Device) Claim() (fd int, err error) {
	fd, err = unix.Open(d.path, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("claim %s: %w", d.path, err)
	}
	return fd, nil
}

// errStuck says that commands had to be given up.
var errStuck = errors.New("the backend did not return in time: its requests have failed")

// Close writes back what is cached, takes the disk away, and closes claim,
// unless that is -1. Commands that are still in the backend after timeout fail,
// and so do all that come later; that is an error.
func (d *Device) Close(claim int, timeout time.Duration) error {
	gone := make(chan error, 1)
	go func() { gone <- d.detach(claim) }()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case err := <-gone:
		return err
	case <-timer.C:
		stuck := d.session.giveUp()
		err := <-gone
		if stuck && err == nil {
			return errStuck
		}
		return err
	}
}

// detach takes the disk away while its commands are still being served. With
// the back end the ring goes, and that ends the session.
func (d *Device) detach(claim int) error {
	d.session.closing()
	var flush error
	if claim >= 0 {
		flush = apart.Take(func() error {
			if !d.sync {
				return nil
			}
			return unix.Fsync(claim)
		}, claim)
	}
	err := d.target.removeUnserved(d.session.done)
	if err == nil {
		<-d.session.done
	}
	if err = errors.Join(flush, err); err != nil {
		return fmt.Errorf("take the SCSI disk away: %w", err)
	}
	return nil
}
