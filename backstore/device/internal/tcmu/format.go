package tcmu

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// The shared memory, from include/uapi/linux/target_core_user.h: a mailbox, the
// ring behind it, and the data of the commands behind that. Numbers are in the
// machine's byte order, offsets in bytes; those in the mailbox and in entries
// count from the beginning of the mailbox.
const (
	mailboxVersion = 0  // u16
	mailboxFlags   = 2  // u16
	mailboxRingOff = 4  // u32
	mailboxRing    = 8  // u32, the ring's size
	mailboxHead    = 12 // u32, offset in the ring, written by the kernel
	mailboxTail    = 64 // u32, offset in the ring, written here
	mailboxSize    = 128

	version = 2
)

// What the kernel can do, in mailboxFlags.
const (
	canReorder = 1 << 0 // answers in any order
	canReadLen = 1 << 1 // answers that say how much was read
	canKeepBuf = 1 << 3 // data that stays when the command is answered
)

// An entry of the ring.
const (
	entryLenOp  = 0 // u32: the length, a multiple of 8, and an operation in the low 3 bits
	entryID     = 4 // u16, of the command
	entryUflags = 7 // u8, written here
	// request
	entryIovCnt = 8  // u32
	entryCDBOff = 24 // u64
	entryIov    = 48 // pairs of offset and length, u64
	// answer
	entryStatus  = 8  // u8, the SCSI status
	entryReadLen = 12 // u32
	entrySense   = 16
	senseSize    = 96

	entrySize = 112 // at least, if it is a command
	entryGrid = 8
	iovSize   = 16

	opMask = 7
	opPad  = 0
	opCmd  = 1 // others are notes that we do not ask for

	flagReadLen = 1 << 1
	flagKeepBuf = 1 << 2
)

// maxIov is how many pieces of data a command may have. The kernel makes one a
// page at worst, and the largest command has 64 MiB.
const maxIov = 1 << 14

// errRing says that the ring holds what the kernel cannot have written.
var errRing = errors.New("malformed ring")

// A command is a request that was copied out of the ring.
type command struct {
	id   uint16
	cdb  [16]byte // of a longer one the beginning
	data [][]byte // in the shared memory; its size is what is to be transferred
}

// size is how much data the command transfers, in bytes.
func (c *command) size() int {
	n := 0
	for _, p := range c.data {
		n += len(p)
	}
	return n
}

// header reads the entry at off of the ring.
func header(ring []byte, off uint32) (op uint32, length uint32, err error) {
	if off > uint32(len(ring)) || uint32(len(ring))-off < entryGrid {
		return 0, 0, fmt.Errorf("%w: entry at %d of %d", errRing, off, len(ring))
	}
	lenOp := binary.NativeEndian.Uint32(ring[off+entryLenOp:])
	op, length = lenOp&opMask, lenOp&^opMask
	if length < entryGrid || length > uint32(len(ring))-off {
		return 0, 0, fmt.Errorf("%w: entry at %d with %d bytes", errRing, off, length)
	}
	if op == opCmd && length < entrySize {
		return 0, 0, fmt.Errorf("%w: command at %d with %d bytes", errRing, off, length)
	}
	return op, length, nil
}

// parse copies a command out of the entry, which begins at off of mem. Its data
// lie behind dataOff.
func (c *command) parse(mem []byte, off, length, dataOff uint32) error {
	entry := mem[off : off+length]
	c.id = binary.NativeEndian.Uint16(entry[entryID:])
	n := binary.NativeEndian.Uint32(entry[entryIovCnt:])
	if n > maxIov || n > (length-entryIov)/iovSize {
		return fmt.Errorf("%w: %d pieces of data in %d bytes", errRing, n, length)
	}
	cdb := binary.NativeEndian.Uint64(entry[entryCDBOff:])
	if cdb < uint64(off)+entryIov || cdb >= uint64(off+length) {
		return fmt.Errorf("%w: CDB at %d", errRing, cdb)
	}
	c.cdb = [16]byte{}
	copy(c.cdb[:], mem[cdb:off+length])
	c.data = c.data[:0]
	for i := range n {
		iov := entry[entryIov+i*iovSize:]
		at, size := binary.NativeEndian.Uint64(iov), binary.NativeEndian.Uint64(iov[8:])
		if at < uint64(dataOff) || at > uint64(len(mem)) || size > uint64(len(mem))-at {
			return fmt.Errorf("%w: data at %d, %d bytes", errRing, at, size)
		}
		if size > 0 {
			c.data = append(c.data, mem[at:at+size:at+size])
		}
	}
	return nil
}

// An answer is what becomes of a command.
type answer struct {
	status byte
	sense  sense  // with statusCheck
	read   uint32 // bytes that were read, if fewer than asked for; 0 is all
	keep   bool   // the data area of the command is still in use
}

// put writes an answer to command id over an entry.
func (a *answer) put(entry []byte, id uint16, features uint16) {
	binary.NativeEndian.PutUint16(entry[entryID:], id)
	clear(entry[entryStatus : entrySense+senseSize])
	entry[entryStatus] = a.status
	var flags byte
	if a.read > 0 && features&canReadLen != 0 {
		flags |= flagReadLen
		binary.NativeEndian.PutUint32(entry[entryReadLen:], a.read)
	}
	if a.keep && features&canKeepBuf != 0 {
		flags |= flagKeepBuf
	}
	if a.status == statusCheck {
		a.sense.put(entry[entrySense:])
	}
	entry[entryUflags] = flags
}
