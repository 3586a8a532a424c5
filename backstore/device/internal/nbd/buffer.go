package nbd

import (
	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

const pageSize = 4096

// maxIO is the most that the backend is asked for at a time, and the largest
// request that the kernel is told to make: bytes.
const maxIO = 256 << 10

// maxRequest is the largest read or write that the kernel's driver can be set
// to make, bytes.
const maxRequest = 32 << 20

// buffer is a worker's memory and its place in the request server. A reply is
// one write of header and data, and data begins with a page:
//
//	         page 0           |  page 1 ...
//	.....      reply 16 B     |  data, of a write or a read
type buffer struct {
	*request.Buffer
	mem []byte // the buffer's, or more while a large request is executed
}

// bufferSize is that of a buffer's memory.
const bufferSize = pageSize + maxIO

// reply is a reply with n bytes of data.
func (b *buffer) reply(n int) []byte { return b.mem[pageSize-replySize : pageSize+n] }

// data is the first n bytes of page 1 and on.
func (b *buffer) data(n int) []byte { return b.mem[pageSize : pageSize+n : pageSize+n] }

// fit makes room for n bytes of data. Somebody has to have set
// queue/max_sectors_kb above what it was for that to take memory.
func (b *buffer) fit(n int) error {
	if n <= maxIO {
		return nil
	}
	mem, err := request.Map(pageSize + n)
	if err == nil {
		b.mem = mem
	}
	return err
}

// shrink undoes fit.
func (b *buffer) shrink() {
	if len(b.mem) > len(b.Mem) {
		unix.Munmap(b.mem)
		b.mem = b.Mem
	}
}

// get returns a buffer of a pool, or nil when there is no memory.
func get(p *request.Buffers) *buffer {
	b := p.Get()
	if b == nil {
		return nil
	}
	return &buffer{Buffer: b, mem: b.Mem}
}
