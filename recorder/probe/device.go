package probe

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/bpf"
)

const sectorSize = 512 // as the block layer counts, whatever the device has

// A target is a watched device: a whole disk, or a partition as a part of one.
// The kernel counts the sectors of what it reads from the beginning of the disk.
type target struct {
	disk       uint32 // major << 20 | minor, as the kernel has it
	first, end uint64 // sectors of the disk
}

// findDevice asks sysfs what a device is.
func findDevice(rdev uint64) (_ target, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("device %d:%d: %w", unix.Major(rdev), unix.Minor(rdev), err)
		}
	}()
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(rdev), unix.Minor(rdev))
	if _, err := os.Stat(dir); err != nil {
		return target{}, err
	}
	d := target{disk: kernelDev(unix.Major(rdev), unix.Minor(rdev)), end: math.MaxUint64}
	if _, err := os.Stat(dir + "/partition"); errors.Is(err, os.ErrNotExist) {
		return d, nil
	}
	start, err := readNumber(dir + "/start")
	if err != nil {
		return d, err
	}
	n, err := readNumber(dir + "/size")
	if err != nil {
		return d, err
	}
	d.first, d.end = start, start+n
	d.disk, err = readDev(dir + "/../dev") // of the directory that dir links to
	return d, err
}

func readNumber(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return n, nil
}

func readDev(path string) (uint32, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(b), "%d:%d", &major, &minor); err != nil {
		return 0, fmt.Errorf("%s: %q: %w", path, b, err)
	}
	return kernelDev(major, minor), nil
}

// kernelDev is a dev_t inside the kernel; that of user space has another form.
func kernelDev(major, minor uint32) uint32 { return major<<20 | minor }

// spans gives, of each disk, the sectors that hold all targets on it.
func spans(targets []target) map[uint32]bpf.ProbeSpan {
	m := make(map[uint32]bpf.ProbeSpan)
	for _, d := range targets {
		s, ok := m[d.disk]
		if !ok {
			s = bpf.ProbeSpan{First: d.first, End: d.end}
		}
		m[d.disk] = bpf.ProbeSpan{First: min(s.First, d.first), End: max(s.End, d.end)}
	}
	return m
}

// clip returns what of a read lies on the target, in bytes from its beginning.
func (d *target) clip(r *bpf.ProbeRead) (off, n int64, ok bool) {
	first, end := r.Sector, r.Sector+uint64(r.Bytes)/sectorSize
	first, end = max(first, d.first), min(end, d.end)
	if r.Disk != d.disk || first >= end {
		return 0, 0, false
	}
	return int64(first-d.first) * sectorSize, int64(end-first) * sectorSize, true
}
