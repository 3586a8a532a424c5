package nbd

import (
	"sync"

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
	mem []byte // pageSize + maxIO, or more while a large request is executed
	*request.Worker
	usual []byte // mem, when it is not larger
}

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
	mem, err := mapMemory(n)
	if err == nil {
		b.mem = mem
	}
	return err
}

// shrink undoes fit.
func (b *buffer) shrink() {
	if len(b.mem) > len(b.usual) {
		unix.Munmap(b.mem)
		b.mem = b.usual
	}
}

// mapMemory maps memory for n bytes of data. It is there before it is used:
// while a page is fetched, or made, that memory may have to be written to the
// device first, by the worker that waits for it.
func mapMemory(n int) ([]byte, error) {
	mem, err := unix.Mmap(-1, 0, pageSize+n,
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err == nil {
		_ = unix.Mlock(mem) // where the limit allows it
	}
	return mem, err
}

// buffers keeps the buffers of ended workers for the next ones.
type buffers struct {
	srv   *request.Server
	mu    sync.Mutex
	spare []*buffer // guarded by mu; at most maxSpare
}

// maxSpare bounds the memory that an idle session holds, to a few MiB.
const maxSpare = 4

// get returns a buffer, or nil when there is no memory.
func (p *buffers) get() *buffer {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.spare); n > 0 {
		b := p.spare[n-1]
		p.spare = p.spare[:n-1]
		return b
	}
	mem, err := mapMemory(maxIO)
	if err != nil {
		return nil
	}
	return &buffer{mem: mem, usual: mem, Worker: p.srv.Worker()}
}

func (p *buffers) put(b *buffer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.spare) < maxSpare {
		p.spare = append(p.spare, b)
		return
	}
	b.free()
}

func (b *buffer) free() {
	b.Release()
	unix.Munmap(b.usual)
}

// free unmaps the spare buffers, when no worker is left.
func (p *buffers) free() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.spare {
		b.free()
	}
	p.spare = nil
}
