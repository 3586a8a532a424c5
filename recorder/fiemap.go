package recorder

import (
	"errors"
	"fmt"
	"math"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The ioctl FS_IOC_FIEMAP, https://docs.kernel.org/filesystems/fiemap.html.
const (
	fsIocFiemap = 0xC020660B // _IOWR('f', 11, struct fiemap)

	extentLast      = 0x001
	extentUnknown   = 0x002 // where it is, is not known
	extentDelalloc  = 0x004
	extentEncoded   = 0x008 // compressed, say
	extentInline    = 0x200 // among metadata
	extentUnwritten = 0x800 // reads as zeros without a look at the device
)

// fiemapExtent is struct fiemap_extent.
type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

// fiemapRequest is struct fiemap with room for extents.
type fiemapRequest struct {
	start, length           uint64
	flags, mapped, count, _ uint32
	extents                 [128]fiemapExtent
}

// fiemap returns where the bytes of an open file are on its device. Holes, and
// what has no place there, are left out. compressed says that lengths are those
// in the file.
func fiemap(fd int, compressed bool) ([]diskExtent, error) {
	var all []diskExtent
	r := &fiemapRequest{}
	for start := uint64(0); ; {
		r.start, r.length, r.flags, r.mapped, r.count = start, math.MaxUint64-start, 0, 0, uint32(len(r.extents))
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), fsIocFiemap, uintptr(unsafe.Pointer(r)))
		if errno != 0 {
			return nil, fiemapError(errno)
		}
		if r.mapped == 0 || int(r.mapped) > len(r.extents) {
			return all, nil
		}
		for _, e := range r.extents[:r.mapped] {
			if d, ok := e.onDisk(compressed); ok {
				all = append(all, d)
			}
		}
		last := &r.extents[r.mapped-1]
		next := last.logical + last.length
		if last.flags&extentLast != 0 || next <= start || len(all) > maxExtents {
			return all, nil
		}
		start = next
	}
}

func fiemapError(errno unix.Errno) error {
	if errors.Is(errno, errors.ErrUnsupported) || errno == unix.ENOTTY || errno == unix.EINVAL {
		return fmt.Errorf("the file system does not tell where files are (FIEMAP: %w): %w", errno, errors.ErrUnsupported)
	}
	return fmt.Errorf("FIEMAP: %w", errno)
}

// onDisk is false for an extent without a place on the device. Inline data has
// one: after the inode (ext4), or after it and in the same block (EROFS).
func (e *fiemapExtent) onDisk(compressed bool) (diskExtent, bool) {
	const most = math.MaxInt64 / 2
	switch {
	case e.flags&(extentUnknown|extentDelalloc|extentUnwritten) != 0:
		return diskExtent{}, false
	case e.flags&extentInline != 0 && e.physical == 0:
		return diskExtent{}, false
	case e.length == 0 || e.logical > most || e.physical > most || e.length > most:
		return diskExtent{}, false
	}
	return diskExtent{
		at: int64(e.logical), off: int64(e.physical), n: int64(e.length),
		encoded: e.flags&extentEncoded != 0 || compressed,
	}, true
}
