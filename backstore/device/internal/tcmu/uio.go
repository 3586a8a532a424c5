package tcmu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

// A uio is the device of a target's ring.
type uio struct {
	path string // /dev/uioN
	size int    // of the shared memory, bytes
}

// uio finds the device by its name.
func (t target) uio() (uio, error) {
	names, err := filepath.Glob("/sys/class/uio/uio*/name")
	if err != nil {
		return uio{}, err
	}
	want := fmt.Sprintf("tcm-user/%d/%s/reprise/%s", t.hba, t.name, t.name)
	for _, path := range names {
		if name, err := os.ReadFile(path); err != nil || strings.TrimSpace(string(name)) != want {
			continue
		}
		dir := filepath.Dir(path)
		s, err := os.ReadFile(dir + "/maps/map0/size")
		if err != nil {
			return uio{}, err
		}
		size, err := strconv.ParseUint(strings.TrimSpace(string(s)), 0, 62)
		if err != nil {
			return uio{}, fmt.Errorf("%s/maps/map0/size: %w", dir, err)
		}
		return uio{path: "/dev/" + filepath.Base(dir), size: int(size)}, nil
	}
	return uio{}, fmt.Errorf("find the uio device %s: %w", want, fs.ErrNotExist)
}

// open opens the device, which the kernel allows once: a process that was
// killed may have it for a little while yet.
func (u uio) open(ctx context.Context) (fd int, err error) {
	ctx, cancel := context.WithTimeout(ctx, openPatience)
	defer cancel()
	for {
		fd, err = unix.Open(u.path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			return fd, nil
		}
		err = fmt.Errorf("open %s: %w", u.path, err)
		if !errors.Is(err, unix.EBUSY) {
			return -1, feature.Check(err, u.path, "", "the kernel has it but /dev does not: in a container, bind the host's /dev")
		}
		if pause(ctx, time.Millisecond) != nil {
			return -1, fmt.Errorf("%w: another process serves it", err)
		}
	}
}

// is reports whether fd is the device: not an earlier one of its number.
func (u uio) is(fd int) bool {
	var a, b unix.Stat_t
	return unix.Fstat(fd, &a) == nil && unix.Stat(u.path, &b) == nil && a.Rdev == b.Rdev && notify(fd) == nil
}

// openPatience is how long a process may take to die.
const openPatience = 5 * time.Second

// mapRing maps the shared memory; the kernel wants all of it.
func mapRing(fd, size int) ([]byte, error) {
	mem, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the ring: %w", err)
	}
	if err := unix.Madvise(mem, unix.MADV_DONTFORK); err != nil { // see apart.Call
		return nil, errors.Join(fmt.Errorf("map the ring: %w", err), unix.Munmap(mem))
	}
	return mem, nil
}

// notify tells the kernel that there are answers.
func notify(fd int) error {
	var on [4]byte
	for {
		_, err := unix.Write(fd, on[:])
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func pause(ctx context.Context, t time.Duration) error {
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
