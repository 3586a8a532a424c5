// Package feature says, as an error, what the kernel or the process lacks.
package feature

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Error is a missing kernel feature or privilege. It matches
// [errors.ErrUnsupported], or [os.ErrPermission] when the privilege is missing.
type Error struct {
	Feature string // what is missing: "fsopen(2)", "/dev/fuse", "CAP_SYS_ADMIN"
	Since   string // first Linux version that has it, "" where no version helps
	Hint    string // what to do
	Err     error  // what the kernel said
}

func (e *Error) Error() string {
	s := e.Feature + " is not available"
	if e.Since != "" {
		s += " (needs Linux " + e.Since + " or later)"
	}
	if e.Hint != "" {
		s += ": " + e.Hint
	}
	if e.Err != nil {
		s += fmt.Sprintf(" (%v)", e.Err)
	}
	return s
}

// Unwrap gives what the kernel said and the class of the error.
func (e *Error) Unwrap() []error {
	class := errors.ErrUnsupported
	if errors.Is(e.Err, os.ErrPermission) {
		class = os.ErrPermission
	}
	return []error{e.Err, class}
}

// Check turns the errno of a system call that needs a feature into an *Error
// where it says that the feature or the privilege is missing, and returns any
// other error as it is.
func Check(err error, name, since, hint string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSYS), errors.Is(err, syscall.ENOENT),
		errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.ENXIO):
		return &Error{Feature: name, Since: since, Hint: hint, Err: err}
	}
	return Privilege(err, name)
}

// Privilege is Check for a feature that every kernel has.
func Privilege(err error, name string) error {
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES) {
		return &Error{Feature: name, Hint: "it needs root (CAP_SYS_ADMIN)", Err: err}
	}
	return err
}
