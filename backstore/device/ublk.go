package device

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
	"github.com/reprise-project/reprise/backstore/device/internal/ublk"
)

// ublkTransport is the kernel's ublk driver. The driver keeps the device and
// its requests when the process dies: there is nothing to give to the keeper.
// State.Index is the device's number.
type ublkTransport struct{}

func (ublkTransport) missing() error { return ublk.Missing() }

func (ublkTransport) attach(ctx context.Context, srv *request.Server, a *attaching) (attachment, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	d, err := ublk.Add(srv, ublkConfig(a))
	if err != nil {
		return nil, err
	}
	a.state.Index = d.Number()
	if err = a.appear(); err == nil {
		err = d.Start()
	}
	if err != nil {
		return nil, errors.Join(err, d.Close(-1, a.CloseTimeout))
	}
	return &ublkDevice{d}, nil
}

func (ublkTransport) adopt(ctx context.Context, srv *request.Server, a *attaching, fds map[string]int) (attachment, error) {
	for _, fd := range fds {
		unix.Close(fd)
	}
	d, err := ublk.Recover(ctx, srv, a.state.Index, ublkConfig(a))
	if errors.Is(err, ublk.ErrGone) {
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	if err != nil {
		return nil, err
	}
	return &ublkDevice{d}, nil
}

func ublkConfig(a *attaching) ublk.Config {
	return ublk.Config{
		ID:          a.state.ID,
		SectorSize:  a.SectorSize,
		InFlight:    a.MaxInFlight,
		ReadAheadKB: max(a.ReadAheadKB, 0),
	}
}

// ublkDevice is a device of ublkTransport.
type ublkDevice struct{ d *ublk.Device }

func (u *ublkDevice) path() string { return u.d.Path() }

func (u *ublkDevice) claim() (fd int, err error) { return u.d.Claim() }

func (u *ublkDevice) close(claim int, timeout time.Duration) error {
	return u.d.Close(claim, timeout)
}

func (u *ublkDevice) ended() <-chan struct{} { return u.d.Ended() }

func (u *ublkDevice) err() error { return u.d.Err() }
