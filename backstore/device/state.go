package device

import "errors"

// Keeper holds descriptors beyond the life of this process: a service manager
// or a parent process. Its methods may be called concurrently.
type Keeper interface {
	// Store keeps a duplicate of fd under name, in the place of any before it.
	// When it returns the duplicate is safe.
	Store(name string, fd int) error
	// Remove closes what is kept under name; that nothing is, is no error.
	Remove(name string) error
}

// State is what must be known of a device, beside its descriptors and its
// backend, to go on serving it in another process. It is JSON.
type State struct {
	// ID names the device, and is the first part of the names of its
	// descriptors: ID.role. Letters, digits, '-' and '_'.
	ID        string `json:"id"`
	Transport string `json:"transport"`
	// Name is Options.Name.
	Name        string `json:"name"`
	Size        int64  `json:"size"`        // bytes
	SectorSize  int    `json:"sector_size"` // bytes
	ReadOnly    bool   `json:"read_only"`
	ReadAheadKB int    `json:"read_ahead_kb"`
	MaxInFlight int    `json:"max_in_flight"`
	// Index is the number of the kernel's device where that is chosen before the
	// device appears, as in /dev/nbd3; otherwise -1.
	Index int `json:"index"`
}

// ErrGone says that there is no device to adopt: it never appeared, or has been
// taken away. Nothing of it is left when Adopt has returned.
var ErrGone = errors.New("the device is gone")
