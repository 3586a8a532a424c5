package device

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/reprise-project/reprise/backstore/device/internal/nbd"
	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// nbdDriver is the kernel's NBD driver over a socket pair.
type nbdDriver struct{}

// roleDevice is the open device. It ends when nobody has it open.
const roleDevice = "device"

func (nbdDriver) missing() error { return nbd.Missing() }

func (nbdDriver) attach(ctx context.Context, srv *request.Server, a *attaching) (attachment, error) {
	s, err := nbd.Attach(ctx, srv, nbdConfig(srv, a), func(index int) error {
		a.state.Index = index
		return a.appear()
	})
	if err != nil {
		return nil, err
	}
	if err := a.keep(roleDevice, s.FD()); err != nil {
		return nil, errors.Join(err, s.Close(-1, a.CloseTimeout, nil))
	}
	return &nbdDevice{Session: s, a: a}, nil
}

func (nbdDriver) adopt(ctx context.Context, srv *request.Server, a *attaching, fds map[string]int) (attachment, error) {
	fd, kept := fds[roleDevice]
	if !kept {
		fd = -1
	}
	s, err := nbd.Adopt(ctx, srv, nbdConfig(srv, a), a.state.Index, fd)
	if errors.Is(err, nbd.ErrGone) {
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	if err == nil && !kept {
		if err = a.keep(roleDevice, s.FD()); err != nil {
			err = errors.Join(err, s.Close(-1, a.CloseTimeout, nil))
		}
	}
	if err != nil {
		return nil, errors.Join(err, a.unkeep())
	}
	return &nbdDevice{Session: s, a: a}, nil
}

func nbdConfig(srv *request.Server, a *attaching) nbd.Config {
	return nbd.Config{
		ID:          a.state.ID,
		Size:        a.state.Size,
		BlockSize:   a.SectorSize,
		ReadAheadKB: max(a.ReadAheadKB, 0),
		ReadOnly:    a.ReadOnly,
		CanSync:     srv.CanSync,
		CanDiscard:  srv.CanDiscard,
		Workers:     a.MaxInFlight,
		Survives:    a.Keeper != nil,
	}
}

// nbdDevice is a device of nbdDriver.
type nbdDevice struct {
	*nbd.Session
	a *attaching
}

func (d *nbdDevice) path() string { return d.Path() }

func (d *nbdDevice) claim() (fd int, err error) { return d.Claim() }

func (d *nbdDevice) ended() <-chan struct{} { return d.Ended() }

func (d *nbdDevice) err() error { return d.Err() }

func (d *nbdDevice) close(claim int, timeout time.Duration) error {
	return d.Close(claim, timeout, func() error { return d.a.unkeep() })
}
