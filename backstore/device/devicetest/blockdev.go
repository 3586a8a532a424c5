package devicetest

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// file is an open block device, or the file that a transport has instead.
type file struct {
	*os.File
	t testing.TB
}

// openDev opens path; flags as for os.OpenFile.
func openDev(t testing.TB, path string, flags int) *file {
	t.Helper()
	// Not os.OpenFile: that would have the Go runtime ask a file of this process's
	// own server whether it can be polled.
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(&os.PathError{Op: "open", Path: path, Err: err})
	}
	f := os.NewFile(uintptr(fd), path)
	t.Cleanup(func() { f.Close() })
	return &file{f, t}
}

// aligned returns n bytes that direct I/O accepts.
func aligned(n int) []byte {
	const page = 4096
	b := make([]byte, n+page)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (page - 1)
	return b[skip : skip+n : skip+n]
}

func (f *file) read(off int64, n int) []byte {
	f.t.Helper()
	p := aligned(n)
	if got, err := f.ReadAt(p, off); err != nil {
		f.t.Fatalf("read %d bytes at %d: %d, %v", n, off, got, err)
	}
	return p
}

func (f *file) write(off int64, data []byte) {
	f.t.Helper()
	p := aligned(len(data))
	copy(p, data)
	if _, err := f.WriteAt(p, off); err != nil {
		f.t.Fatalf("write %d bytes at %d: %v", len(p), off, err)
	}
}

// expect reads and compares.
func (f *file) expect(off int64, want []byte) {
	f.t.Helper()
	if got := f.read(off, len(want)); !bytes.Equal(got, want) {
		f.t.Errorf("%d bytes at %d differ, first at %d", len(want), off, off+int64(firstDiff(got, want)))
	}
}

func firstDiff(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// ioctlRange is BLKDISCARD or BLKZEROOUT.
func (f *file) ioctlRange(request uintptr, off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return errno
	}
	return nil
}

// punch is fallocate(2), which the block layer sends as a write of zeros.
func (f *file) punch(mode uint32, off, n int64) error {
	return unix.Fallocate(int(f.Fd()), mode|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// offersDiscard reports whether the driver of dev takes discards.
func offersDiscard(dev string) bool {
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev), "queue/discard_max_bytes"))
	return err == nil && strings.TrimSpace(string(b)) != "0"
}

func (f *file) size() int64 {
	f.t.Helper()
	if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
		return st.Size()
	}
	var n uint64
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&n)))
	if errno != 0 {
		f.t.Fatalf("BLKGETSIZE64: %v", errno)
	}
	return int64(n)
}

func (f *file) sectorSize() int {
	f.t.Helper()
	n, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
	if err != nil {
		f.t.Fatalf("BLKSSZGET: %v", err)
	}
	return n
}
