package device

import (
	"context"

	"github.com/reprise-project/reprise/backstore/device/internal/keeper"
)

// Store is this process's side of its service manager, systemd or [Supervise],
// which keeps descriptors and hands them to the next process when this one is
// killed. It is a [Keeper].
type Store = keeper.Store

var _ Keeper = (*Store)(nil)

// Listener is a listening socket that a service manager handed over.
type Listener = keeper.Listener

// OpenStore finds the service manager in the environment, and what it kept. It
// must be called early, once. Without a service manager the Store keeps nothing.
func OpenStore() (*Store, error) { return keeper.OpenStore() }

// SuperviseOptions are those of [Supervise]; SuperviseFile is a descriptor for
// each child.
type (
	SuperviseOptions = keeper.Options
	SuperviseFile    = keeper.File
)

// ExitError is the end of a supervised process that is not started again;
// CrashError says that it has crashed too often.
type (
	ExitError  = keeper.ExitError
	CrashError = keeper.CrashError
)

// Supervise runs a command as systemd would: it keeps its descriptors and
// starts it again, at once when it was killed and after a growing pause when it
// crashed, until it ends with status 0 or ctx ends. It installs no signal
// handler and may run beside anything else.
func Supervise(ctx context.Context, o *SuperviseOptions) error { return keeper.Supervise(ctx, o) }
