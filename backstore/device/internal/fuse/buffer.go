package fuse

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// buffer is one worker's request and reply memory, see Buffers in the package
// comment, and its place in the request server.
type buffer struct {
	mem []byte // pageSize + maxIO
	*request.Worker
}

// request is where a request is read to: its header ends where page 1 begins
// if it is a WRITE.
func (b *buffer) request() []byte { return b.mem[pageSize-writeHead:] }

// reply is a reply of n bytes after the header.
func (b *buffer) reply(n int) []byte { return b.mem[pageSize-outHeaderSize : pageSize+n] }

// data is the first n bytes of page 1 and on.
func (b *buffer) data(n int) []byte { return b.mem[pageSize : pageSize+n : pageSize+n] }

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
	mem, err := unix.Mmap(-1, 0, pageSize+maxIO,
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil
	}
	_ = unix.Mlock(mem)                       // where the limit allows it
	_ = unix.Madvise(mem, unix.MADV_DONTFORK) // a copy, see apart.Call, would have it faulted in again
	return &buffer{mem, p.srv.Worker()}
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
	unix.Munmap(b.mem)
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
