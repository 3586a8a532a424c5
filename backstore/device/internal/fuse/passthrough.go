package fuse

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// backingMap is fuse_backing_map.
type backingMap struct {
	fd      int32
	flags   uint32
	padding uint64
}

// backingOpen is FUSE_DEV_IOC_BACKING_OPEN, _IOW(229, 1, fuse_backing_map).
const backingOpen = 1<<30 | uintptr(unsafe.Sizeof(backingMap{}))<<16 | 229<<8 | 1

// registerBacking has the kernel read cfg.Backing by itself for those who open
// the file from now on, in its own loop driver's thread: no request is made, and
// nothing is copied twice. A kernel that refuses has a reason that is no
// concern of the device, such as a file on a stacked file system; then requests
// are made, as without.
//
// What is registered belongs to the connection. So an adopted session goes on
// reading that file, and a device reads it even while nobody serves it.
func (s *Session) registerBacking() {
	m := backingMap{fd: int32(s.cfg.Backing.Fd())}
	id, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s.fd), backingOpen, uintptr(unsafe.Pointer(&m)))
	if errno == 0 {
		s.backing = uint32(id)
	}
}
