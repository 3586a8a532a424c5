// Package uring is as much of io_uring(7) as passing commands to drivers takes
// (IORING_OP_URING_CMD): ublk, and FUSE over io_uring.
//
// A [Ring] belongs to one thread: its goroutine calls [runtime.LockOSThread]
// before [New], and it alone uses the ring until it closes it. The kernel
// refuses other threads (IORING_SETUP_SINGLE_ISSUER), and drivers take the
// thread that sends a command for the one that goes on serving it. Only what
// the thread is told through a descriptor reaches it from elsewhere: queue a
// [Ring.Read] of an eventfd.
//
// Entries are queued with Command and Read, go to the kernel with [Ring.Enter],
// which can also wait, and come back from [Ring.Next]. Completions appear only
// during Enter (IORING_SETUP_DEFER_TASKRUN), so that nothing interrupts the
// thread elsewhere. Nothing here allocates after New.
//
// Memory that the kernel is told of by address must neither move nor be freed:
// map it, or take it from the heap and keep it alive.
package uring

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

// Options of [New].
type Options struct {
	// Wide makes room for 80 bytes of command instead of 16.
	Wide bool
	// MinFD is the least number that the ring's descriptor may have: a dying
	// process releases its files from the highest number down, and commands are
	// cancelled when the ring is released.
	MinFD int
}

// Ring is a submission and a completion queue.
type Ring struct {
	fd      int
	mem     []byte // both queues
	entries []byte // what is submitted
	size    int    // of an entry, bytes

	sqHead, sqTail *uint32 // the kernel's, this side's
	cqHead, cqTail *uint32 // this side's, the kernel's
	completions    []completion
	mask, cqMask   uint32
	tail           uint32 // entries queued; at most sqTail is known to the kernel

	wait waitArg
	time unix.Timespec
}

// Completion is the result of an entry.
type Completion struct {
	Data   uint64 // the entry's
	Result int32  // negative: -errno
}

// Forever is no limit to a wait.
const Forever time.Duration = -1

// New makes a ring for n entries at a time, at least; n is at most 32768. What
// the kernel or the process lacks is a *feature.Error.
func New(n int, o Options) (*Ring, error) {
	p := params{flags: setupSingleIssuer | setupDeferTaskrun}
	size := entrySize
	if o.Wide {
		p.flags |= setupSQE128
		size = wideSize
	}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(n), uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, fmt.Errorf("io_uring_setup: %w", missing(errno))
	}
	unix.CloseOnExec(int(fd))
	r := &Ring{fd: int(fd), size: size}
	if r.fd < o.MinFD {
		high, err := unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, o.MinFD)
		unix.Close(r.fd)
		if err != nil {
			return nil, fmt.Errorf("move an io_uring: %w", err)
		}
		r.fd = high
	}
	if err := r.mapQueues(&p); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func missing(errno unix.Errno) error {
	switch errno {
	case unix.EPERM:
		return &feature.Error{Feature: "io_uring(7)", Err: errno,
			Hint: "it is forbidden: see the sysctl kernel.io_uring_disabled, and in a container its seccomp profile"}
	case unix.EINVAL:
		return &feature.Error{Feature: "io_uring(7) with IORING_SETUP_DEFER_TASKRUN", Since: "6.1", Err: errno}
	}
	return feature.Check(errno, "io_uring(7)", "6.1", "")
}

func (r *Ring) mapQueues(p *params) error {
	if p.features&featSingleMmap == 0 || p.features&featExtArg == 0 {
		return &feature.Error{Feature: "io_uring(7) with IORING_FEAT_EXT_ARG", Since: "5.11"}
	}
	n := max(p.sq.array+4*p.sqEntries, p.cq.cqes+completionSize*p.cqEntries)
	var err error
	if r.mem, err = mmap(r.fd, offQueues, int(n)); err != nil {
		return err
	}
	if r.entries, err = mmap(r.fd, offEntries, int(p.sqEntries)*r.size); err != nil {
		return err
	}
	r.sqHead, r.sqTail = r.word(p.sq.head), r.word(p.sq.tail)
	r.cqHead, r.cqTail = r.word(p.cq.head), r.word(p.cq.tail)
	r.mask, r.cqMask = p.sqEntries-1, p.cqEntries-1
	r.completions = unsafe.Slice((*completion)(unsafe.Pointer(r.word(p.cq.cqes))), p.cqEntries)
	for i, array := uint32(0), unsafe.Slice(r.word(p.sq.array), p.sqEntries); i < p.sqEntries; i++ {
		array[i] = i // entries go to the kernel in the order of their places
	}
	r.tail = atomic.LoadUint32(r.sqTail)
	return nil
}

func mmap(fd int, off int64, n int) ([]byte, error) {
	mem, err := unix.Mmap(fd, off, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map an io_uring: %w", err)
	}
	_ = unix.Madvise(mem, unix.MADV_DONTFORK) // a copied process would keep the ring
	return mem, nil
}

func (r *Ring) word(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.mem[off])) }

// Queued is how many entries the kernel has not taken yet. It takes all of them
// in the next Enter unless it is out of memory.
func (r *Ring) Queued() int { return int(r.tail - atomic.LoadUint32(r.sqHead)) }

// Command queues command op for the driver behind fd and returns the memory for
// its payload, zeros, 16 or 80 bytes; nil if there is no room. data comes back
// with its completion.
func (r *Ring) Command(fd int, op uint32, data uint64) []byte {
	e := r.entry(opUringCmd, fd, data)
	if e == nil {
		return nil
	}
	*(*uint32)(unsafe.Pointer(&e[sqeCmdOp])) = op
	return e[sqeCmd:]
}

// Read queues a read of n bytes at addr from fd, which need not be seekable. It
// reports false if there is no room.
func (r *Ring) Read(fd int, addr unsafe.Pointer, n uint32, data uint64) bool {
	e := r.entry(opRead, fd, data)
	if e == nil {
		return false
	}
	*(*uint64)(unsafe.Pointer(&e[sqeAddr])) = uint64(uintptr(addr))
	*(*uint32)(unsafe.Pointer(&e[sqeLen])) = n
	return true
}

func (r *Ring) entry(op byte, fd int, data uint64) []byte {
	if r.Queued() > int(r.mask) {
		return nil
	}
	i := int(r.tail&r.mask) * r.size
	e := r.entries[i : i+r.size : i+r.size]
	clear(e)
	e[sqeOpcode] = op
	*(*int32)(unsafe.Pointer(&e[sqeFD])) = int32(fd)
	*(*uint64)(unsafe.Pointer(&e[sqeData])) = data
	r.tail++
	return e
}

// Enter hands the queued entries to the kernel, lets it do what completes
// others, and waits until there are n completions or the timeout is over
// ([Forever]: none). With n = 0 it does not wait. It may return early, without
// an error, with fewer.
func (r *Ring) Enter(n int, timeout time.Duration) error {
	atomic.StoreUint32(r.sqTail, r.tail)
	submit := r.tail - atomic.LoadUint32(r.sqHead)
	flags, arg, size := uintptr(enterGetEvents), uintptr(0), uintptr(0)
	if n > 0 && timeout >= 0 {
		r.time = unix.NsecToTimespec(int64(timeout))
		r.wait.time = uint64(uintptr(unsafe.Pointer(&r.time)))
		flags |= enterExtArg
		arg, size = uintptr(unsafe.Pointer(&r.wait)), unsafe.Sizeof(r.wait)
	}
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(submit), uintptr(n), flags, arg, size)
	switch errno {
	case 0, unix.EINTR, unix.ETIME, unix.EAGAIN, unix.EBUSY: // the last two: no memory, no room for completions
		return nil
	}
	return fmt.Errorf("io_uring_enter: %w", errno)
}

// Waiting reports whether there are completions for Next.
func (r *Ring) Waiting() bool { return *r.cqHead != atomic.LoadUint32(r.cqTail) }

// Next takes the next completion; false if there is none.
func (r *Ring) Next() (Completion, bool) {
	head := *r.cqHead
	if head == atomic.LoadUint32(r.cqTail) {
		return Completion{}, false
	}
	c := r.completions[head&r.cqMask]
	atomic.StoreUint32(r.cqHead, head+1)
	return Completion{Data: c.data, Result: c.result}, true
}

// Close cancels what is queued or under way, without waiting for it.
func (r *Ring) Close() error {
	var errs []error
	for _, m := range [][]byte{r.entries, r.mem} {
		if m != nil {
			errs = append(errs, unix.Munmap(m))
		}
	}
	return errors.Join(append(errs, unix.Close(r.fd))...)
}
