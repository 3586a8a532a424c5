package device

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FileBacked is a backend whose bytes are those of a regular file, from its
// beginning on. The kernel reads the file by itself, as fast as its own loop
// device with direct I/O, if it can: the transport is "fuse", the device is
// read-only, the kernel has FUSE_PASSTHROUGH (Linux 6.9), and the file allows
// direct I/O in sectors and is not on a stacked file system. Then ReadAt,
// OnError and OnSlow are not called, the file is read past the page cache, and
// the device goes on being read when the process has died, as long as it is
// open. Otherwise ReadAt is called, as for any backend.
type FileBacked interface {
	// BackingFile is open for reading as long as the device.
	BackingFile() *os.File
}

// backingFile is the file that the kernel may read in place of b; nil if there
// is none.
func backingFile(b Backend, size int64, o *Options) *os.File {
	fb, ok := b.(FileBacked)
	if !ok || !o.ReadOnly {
		return nil
	}
	f := fb.BackingFile()
	if f == nil || !allowsDirectIO(f, size, o.SectorSize) {
		return nil
	}
	return f
}

// allowsDirectIO tries the first and the last sector of size bytes, for not
// every file system says what it can do (STATX_DIOALIGN, Linux 6.1).
func allowsDirectIO(f *os.File, size int64, sector int) bool {
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() || st.Size() < size {
		return false
	}
	d, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return false
	}
	defer d.Close()
	buf := alignedBlock(sector)
	for _, off := range []int64{0, size - int64(sector)} {
		if n, err := d.ReadAt(buf, off); n < sector || err != nil {
			return false
		}
	}
	return true
}

// alignedBlock has n bytes at an address that is a multiple of n, a power of two.
func alignedBlock(n int) []byte {
	b := make([]byte, 2*n)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (n - 1)
	return b[skip : skip+n : skip+n]
}
