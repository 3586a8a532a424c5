package device

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
	"github.com/reprise-project/reprise/backstore/device/internal/tcmu"
)

// tcmuDisk is a SCSI disk of the kernel's loopback target whose commands this
// process executes.
type tcmuDisk struct{}

// roleRing is the descriptor of the ring, /dev/uioN. The kernel has it opened
// once only, so that without a keeper a process can adopt the device only when
// the other one is quite gone.
const roleRing = "ring"

func (tcmuDisk) missing() error { return tcmu.Missing() }

func tcmuConfig(a *attaching) tcmu.Config {
	return tcmu.Config{
		Name:        "reprise-" + a.state.ID,
		HBA:         a.state.Index,
		SectorSize:  a.SectorSize,
		ReadAheadKB: max(a.ReadAheadKB, 0),
		Workers:     a.MaxInFlight,
		Keep:        func(fd int) error { return a.keep(roleRing, fd) },
		Appear: func(hba int) error {
			a.state.Index = hba
			return a.appear()
		},
	}
}

func (tcmuDisk) attach(ctx context.Context, srv *request.Server, a *attaching) (attachment, error) {
	d, err := tcmu.Attach(ctx, srv, tcmuConfig(a))
	if err != nil {
		return nil, errors.Join(err, a.unkeep())
	}
	return &tcmuDevice{a: a, Device: d}, nil
}

func (tcmuDisk) adopt(ctx context.Context, srv *request.Server, a *attaching, fds map[string]int) (attachment, error) {
	fd := -1
	if ring, ok := fds[roleRing]; ok {
		fd = ring
	}
	d, err := tcmu.Adopt(ctx, srv, tcmuConfig(a), fd)
	if err != nil {
		if errors.Is(err, tcmu.ErrGone) {
			err = fmt.Errorf("%w: %w", ErrGone, err)
		}
		return nil, errors.Join(err, a.unkeep())
	}
	return &tcmuDevice{a: a, Device: d}, nil
}

// tcmuDevice is a device of tcmuDisk.
type tcmuDevice struct {
	a *attaching
	*tcmu.Device
}

func (d *tcmuDevice) path() string           { return d.Path() }
func (d *tcmuDevice) claim() (int, error)    { return d.Claim() }
func (d *tcmuDevice) ended() <-chan struct{} { return d.Ended() }
func (d *tcmuDevice) err() error             { return d.Err() }

// close lets go of the kept descriptor last: as long as the disk is there,
// another process could still adopt it.
func (d *tcmuDevice) close(claim int, timeout time.Duration) error {
	err := errors.Join(d.Device.Close(claim, timeout), d.a.unkeep())
	if d.Err() != nil { // it had ended before: that is what Err tells
		return nil
	}
	return err
}
