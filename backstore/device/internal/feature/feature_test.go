package feature

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestCheck(t *testing.T) {
	tests := []struct {
		err   error
		is    error
		parts string
	}{
		{syscall.ENOSYS, errors.ErrUnsupported, "fsopen(2) is not available (needs Linux 5.2 or later)"},
		{syscall.ENOENT, errors.ErrUnsupported, "update"},
		{syscall.EPERM, os.ErrPermission, "needs root (CAP_SYS_ADMIN)"},
		{syscall.EACCES, os.ErrPermission, "needs root (CAP_SYS_ADMIN)"},
		{syscall.EBUSY, syscall.EBUSY, "busy"},
	}
	for _, tt := range tests {
		err := Check(tt.err, "fsopen(2)", "5.2", "update the kernel")
		if !errors.Is(err, tt.is) || !errors.Is(err, tt.err) || !strings.Contains(err.Error(), tt.parts) {
			t.Errorf("%v: %v", tt.err, err)
		}
		var e *Error
		if errors.As(err, &e) != (tt.is != tt.err) {
			t.Errorf("%v: %T", tt.err, err)
		}
	}
	if err := Check(nil, "x", "", ""); err != nil {
		t.Error(err)
	}
}

func TestMissing(t *testing.T) {
	err := error(&Error{Feature: "FUSE_MAX_PAGES", Since: "4.20"})
	if !errors.Is(err, errors.ErrUnsupported) || errors.Is(err, os.ErrPermission) {
		t.Error(err)
	}
}
