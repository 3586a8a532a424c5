package device

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// transports are the ways to make a device, by the name that Options.Transport
// gives them.
var transports = map[string]transport{
	"fuse":  fuseLoop{},
	"nbd":   nbdDriver{},
	"erofs": fuseErofs{},
	"tcmu":  tcmuDisk{},
	"ublk":  ublkTransport{},
}

// A transport makes devices, and takes over those of a process that has ended.
// It serves them through srv, which it neither stops nor refuses of its own.
type transport interface {
	// missing says what the kernel or the process lacks, a *FeatureError; nil if
	// nothing.
	missing() error
	attach(ctx context.Context, srv *request.Server, a *attaching) (attachment, error)
	// adopt owns the descriptors in fds, by role, whatever it returns. The error
	// matches ErrGone if there is no device to adopt.
	adopt(ctx context.Context, srv *request.Server, a *attaching, fds map[string]int) (attachment, error)
}

// An attachment is a device that this process serves through some transport.
type attachment interface {
	// path is what can be opened and mounted.
	path() string
	// claim keeps everybody else from mounting the device, as long as the
	// descriptor is open. It fails with EBUSY while the device is mounted; -1 is
	// a device that nobody can mount.
	claim() (fd int, err error)
	// close takes the device away, closes claim unless that is -1, and ends the
	// server. It takes not much more than timeout, also with a stuck backend,
	// which is an error.
	close(claim int, timeout time.Duration) error
	// ended is closed when no request is, or will be, in the backend.
	ended() <-chan struct{}
	// err says why the server ended by itself.
	err() error
}

// attaching is what a transport needs to know of a device.
type attaching struct {
	*Options          // filled
	state    *State   // what the transport adds to it is there for adopt
	file     *os.File // see backingFile; nil when adopting
	kept     []string
}

// keep has the keeper hold a descriptor that the device lives by. Those that
// have to be closed first, should the keeper die, are kept first.
func (a *attaching) keep(role string, fd int) error {
	if a.Keeper == nil {
		return nil
	}
	name := a.state.ID + "." + role
	if err := a.Keeper.Store(name, fd); err != nil {
		return fmt.Errorf("keep descriptor %s: %w", name, err)
	}
	a.kept = append(a.kept, name)
	return nil
}

// unkeep has the keeper close what it holds of the device: the descriptors of
// these roles, or all that are left.
func (a *attaching) unkeep(roles ...string) error {
	var errs []error
	var left []string
	for _, name := range a.kept {
		if _, role, _ := strings.Cut(name, "."); len(roles) > 0 && !slices.Contains(roles, role) {
			left = append(left, name)
		} else if err := a.Keeper.Remove(name); err != nil {
			errs = append(errs, fmt.Errorf("release descriptor %s: %w", name, err))
		}
	}
	a.kept = left
	return errors.Join(errs...)
}

// appear is called when the device is about to be visible to others.
func (a *attaching) appear() error {
	if a.Prepared == nil {
		return nil
	}
	if err := a.Prepared(*a.state); err != nil {
		return fmt.Errorf("write the device's state: %w", err)
	}
	return nil
}

// newID makes a name for a device that nobody named.
func newID() string { return "dev-" + rand.Text()[:12] }
