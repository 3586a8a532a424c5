package fuse

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Opens knows by whom the file of a session is open: a file system that is
// mounted on the file keeps it open, in whatever namespace that mount is, and a
// FUSE server is told of every opening and its end. The kernel cannot be asked
// again later, so what is known is kept in memory that another process can map
// after this one has died: the memory file of FD.
//
// An opening is known by the number of the request that made it, which is its
// file handle too. Requests that are sent again after an adoption have the same
// number: they change nothing twice. Opens is safe for concurrent use, by one
// process at a time.
type Opens struct {
	fd int

	mu      sync.Mutex // guards what follows
	handles []uint64   // mapped: of the openings there are; 0 is free
	refused bool
}

// opensSize is the size of the memory file, one page.
const opensSize = 4096

// NewOpens makes a table of no openings.
func NewOpens() (*Opens, error) {
	fd, err := unix.MemfdCreate("reprise-opens", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	if err := unix.Ftruncate(fd, opensSize); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("size the table of openings: %w", err)
	}
	return AdoptOpens(fd)
}

// AdoptOpens maps the table of a process that has ended. It owns fd, whatever
// it returns.
func AdoptOpens(fd int) (*Opens, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && st.Size < opensSize {
		err = unix.EINVAL
	}
	var mem []byte
	if err == nil {
		mem, err = unix.Mmap(fd, 0, opensSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("map the table of openings: %w", err)
	}
	return &Opens{fd: fd, handles: unsafe.Slice((*uint64)(unsafe.Pointer(&mem[0])), opensSize/8)}, nil
}

// FD is the memory file.
func (o *Opens) FD() int { return o.fd }

// Close forgets the table. It is called when the session has ended.
func (o *Opens) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.handles == nil {
		return nil
	}
	mem := unsafe.Slice((*byte)(unsafe.Pointer(&o.handles[0])), opensSize)
	o.handles = nil
	unix.Munmap(mem)
	return unix.Close(o.fd)
}

// Refuse makes every further opening fail with EBUSY. It fails with EBUSY, and
// refuses nothing, while the file is open.
func (o *Opens) Refuse() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if slices.ContainsFunc(o.handles, func(h uint64) bool { return h != 0 }) {
		return unix.EBUSY
	}
	o.refused = true
	return nil
}

func (o *Opens) add(handle uint64) unix.Errno {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.refused || o.handles == nil {
		return unix.EBUSY
	}
	i := slices.Index(o.handles, handle)
	if i < 0 {
		i = slices.Index(o.handles, 0)
	}
	if i < 0 {
		return unix.ENFILE
	}
	o.handles[i] = handle
	return 0
}

func (o *Opens) remove(handle uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if i := slices.Index(o.handles, handle); i >= 0 && handle != 0 {
		o.handles[i] = 0
	}
}

// resent is set in the number of a request that is sent again.
const resent = 1 << 63

func (s *Session) open(b *buffer, h header) {
	fh, opens := uint64(fileFH), s.cfg.Opens
	if opens != nil {
		fh = h.unique &^ resent
		if errno := opens.add(fh); errno != 0 {
			s.answer(b, h, 0, errno)
			return
		}
	}
	flags := uint32(fopenDirectIO | fopenParallelDirectWrites)
	if s.backing != 0 {
		flags = fopenPassthrough
	}
	putOpenOut(b.data(openOutSize), fh, flags, s.backing)
	if errno := s.answer(b, h, openOutSize, 0); errno != 0 && opens != nil {
		opens.remove(fh) // nobody waits for it any more
	}
}

func (s *Session) release(b *buffer, h header, body []byte) {
	if opens := s.cfg.Opens; opens != nil && len(body) >= 8 {
		opens.remove(binary.NativeEndian.Uint64(body)) // fuse_release_in begins with the handle
	}
	s.answer(b, h, 0, 0)
}
