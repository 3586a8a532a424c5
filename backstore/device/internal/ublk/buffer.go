package ublk

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// maxIO is the longest read or write, bytes.
const maxIO = 256 << 10

// minSpare is how many buffers an idle queue keeps, beside its sink: 1 MiB.
const minSpare = 3

// buffers are those that no request uses. They belong to the queue's thread.
type buffers struct {
	spare [][]byte
}

// get returns maxIO bytes that are present and locked, where that is allowed:
// a page fault in the driver's copying would fail. It returns nil when there
// is no memory.
func (b *buffers) get() []byte {
	if n := len(b.spare); n > 0 {
		buf := b.spare[n-1]
		b.spare = b.spare[:n-1]
		return buf
	}
	mem, err := request.Map(maxIO)
	if err != nil {
		return nil
	}
	return mem
}

// fill makes it n spare buffers, if there is the memory.
func (b *buffers) fill(n int) bool {
	for len(b.spare) < n {
		buf := (&buffers{}).get()
		if buf == nil {
			return false
		}
		b.put(buf)
	}
	return true
}

func (b *buffers) put(buf []byte) { b.spare = append(b.spare, buf) }

// trim frees all but n.
func (b *buffers) trim(n int) {
	for len(b.spare) > n {
		last := len(b.spare) - 1
		unix.Munmap(b.spare[last])
		b.spare = b.spare[:last]
	}
}

func address(buf []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&buf[0]))) }
