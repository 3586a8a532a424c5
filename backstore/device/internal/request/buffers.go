package request

import (
	"sync"

	"golang.org/x/sys/unix"
)

// Map maps n bytes for requests. They are present from the beginning, and
// locked where the limit allows it: a process that is killed while the kernel
// copies a request must not have to fault a page in, which fails in a dying
// process, and when memory is short, making a page may wait for a write that
// only this process can do. A forked copy does not share them: they would be
// faulted in again.
func Map(n int) ([]byte, error) {
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, err
	}
	_ = unix.Mlock(mem)
	_ = unix.Madvise(mem, unix.MADV_DONTFORK)
	return mem, nil
}

// A Buffer is the memory of one worker, with the worker.
type Buffer struct {
	Mem []byte
	*Worker
}

// Buffers keeps the buffers of ended workers for the next ones. Its methods are
// safe for concurrent use.
type Buffers struct {
	Server *Server
	Size   int // of one, in bytes

	mu    sync.Mutex // guards spare
	spare []*Buffer  // at most maxSpare
}

// maxSpare bounds the memory that an idle device holds, to a few MiB.
const maxSpare = 4

// Get returns a buffer, or nil when there is no memory.
func (p *Buffers) Get() *Buffer {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.spare); n > 0 {
		b := p.spare[n-1]
		p.spare = p.spare[:n-1]
		return b
	}
	mem, err := Map(p.Size)
	if err != nil {
		return nil
	}
	return &Buffer{mem, p.Server.Worker()}
}

// Put takes a buffer back.
func (p *Buffers) Put(b *Buffer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.spare) < maxSpare {
		p.spare = append(p.spare, b)
		return
	}
	b.free()
}

func (b *Buffer) free() {
	b.Release()
	_ = unix.Munmap(b.Mem)
}

// Free unmaps the spare buffers, when no worker is left.
func (p *Buffers) Free() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.spare {
		b.free()
	}
	p.spare = nil
}
