package tcmu

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/reprise-project/reprise/backstore/device/internal/feature"
)

// A ring is the shared memory of a device. Not safe for concurrent use.
type ring struct {
	mem      []byte
	off      uint32 // of the entries
	size     uint32
	features uint16
	head     *uint32 // offsets among the entries
	tail     *uint32
	next     uint32 // of the first entry that was not taken yet
	answers  uint32 // where the next answer goes: *tail, as far as we know
	taken    uint32 // bytes from answers to next
}

// newRing looks at a mailbox. The ring may hold commands already.
func newRing(mem []byte) (*ring, error) {
	if len(mem) < mailboxSize {
		return nil, fmt.Errorf("%w: %d bytes", errRing, len(mem))
	}
	r := &ring{
		mem:      mem,
		off:      binary.NativeEndian.Uint32(mem[mailboxRingOff:]),
		size:     binary.NativeEndian.Uint32(mem[mailboxRing:]),
		features: binary.NativeEndian.Uint16(mem[mailboxFlags:]),
		head:     (*uint32)(unsafe.Pointer(&mem[mailboxHead])),
		tail:     (*uint32)(unsafe.Pointer(&mem[mailboxTail])),
	}
	if v := binary.NativeEndian.Uint16(mem[mailboxVersion:]); v != version {
		return nil, &feature.Error{Feature: "tcmu mailbox version 2", Since: since, Err: fmt.Errorf("it has version %d", v)}
	}
	if r.features&canReorder == 0 {
		return nil, &feature.Error{Feature: "tcmu answers out of order", Since: since, Err: unix.ENOSYS}
	}
	if uint64(r.off)+uint64(r.size) > uint64(len(mem)) || r.off < mailboxSize || r.off%entryGrid != 0 || r.size < entrySize {
		return nil, fmt.Errorf("%w: %d bytes at %d of %d", errRing, r.size, r.off, len(mem))
	}
	r.answers = atomic.LoadUint32(r.tail)
	r.next = r.answers
	return r, nil
}

// take copies the next command into c; false if there is none.
func (r *ring) take(c *command) (bool, error) {
	for r.next != atomic.LoadUint32(r.head) {
		op, length, err := header(r.entries(), r.next)
		if err != nil {
			return false, err
		}
		if r.taken += length; r.taken >= r.size {
			return false, fmt.Errorf("%w: no entry ends at %d", errRing, atomic.LoadUint32(r.head))
		}
		at := r.next
		r.next = r.after(at, length)
		if op != opCmd {
			continue
		}
		return true, c.parse(r.mem, r.off+at, length, r.off+r.size)
	}
	return false, nil
}

// answer writes an answer to the command id, which was taken and has none yet.
// The kernel looks for it when it is notified.
func (r *ring) answer(id uint16, a *answer) error {
	for at := r.answers; at != r.next; {
		op, length, err := header(r.entries(), at)
		if err != nil {
			return err
		}
		if r.taken -= min(length, r.taken); op == opCmd {
			a.put(r.entries()[at:at+length], id, r.features)
			r.answers = r.after(at, length)
			atomic.StoreUint32(r.tail, r.answers)
			return nil
		}
		at = r.after(at, length)
	}
	return fmt.Errorf("%w: no entry for an answer", errRing)
}

func (r *ring) entries() []byte { return r.mem[r.off : r.off+r.size] }

// after is the offset behind the entry at off. Lengths were checked.
func (r *ring) after(off, length uint32) uint32 {
	if off += length; off == r.size {
		return 0
	}
	return off
}

// populate has the kernel map the mailbox and the ring, so that serving needs
// no memory when that is short. The data area is filled as it is used.
func (r *ring) populate() {
	page := unix.Getpagesize()
	for at := 0; at < int(r.off+r.size); at += page {
		atomic.LoadUint32((*uint32)(unsafe.Pointer(&r.mem[at])))
	}
}
