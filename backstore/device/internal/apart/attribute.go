package apart

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Attribute reads an attribute of sysfs or configfs, without the line's end.
// Unlike package os, whose calls `go test` logs to a descriptor, it can be used
// by what Run calls.
func Attribute(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	b := make([]byte, 4096) // the longest that there is
	n, err := unix.Read(fd, b)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return strings.TrimSpace(string(b[:n])), nil
}

// SetAttribute writes an attribute. Writing one of a block device's queue waits
// until all its requests have ended: that is for Run.
func SetAttribute(path, value string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return fmt.Errorf("write %q to %s: %w", value, path, err)
	}
	return nil
}
