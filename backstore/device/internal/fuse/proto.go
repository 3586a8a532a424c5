package fuse

import "encoding/binary"

// The wire format of /dev/fuse, as include/uapi/linux/fuse.h has it. Integers
// are in the machine's own byte order. Offsets are named, not overlaid: a
// request is decoded field by field from the buffer it was read into.
const (
	protoMajor    = 7
	protoMinorMin = 28 // FUSE_MAX_PAGES, Linux 4.20
	protoMinor    = 40 // the newest whose INIT reply we send, Linux 6.9

	inHeaderSize  = 40 // fuse_in_header
	outHeaderSize = 16 // fuse_out_header
	writeInSize   = 40 // fuse_write_in
	writeHead     = inHeaderSize + writeInSize
	attrOutSize   = 16 + attrSize
	attrSize      = 88
	entryOutSize  = 40 + attrSize
	openOutSize   = 16
	statfsOutSize = 80
	initOutSize   = 64
	minReadBuffer = 8192 // FUSE_MIN_READ_BUFFER
)

// opcode is enum fuse_opcode.
type opcode uint32

const (
	opLookup      opcode = 1
	opForget      opcode = 2
	opGetattr     opcode = 3
	opOpen        opcode = 14
	opRead        opcode = 15
	opWrite       opcode = 16
	opStatfs      opcode = 17
	opRelease     opcode = 18
	opFsync       opcode = 20
	opFlush       opcode = 25
	opInit        opcode = 26
	opInterrupt   opcode = 36
	opDestroy     opcode = 38
	opBatchForget opcode = 42
	opFallocate   opcode = 43
)

// INIT flags.
const (
	flagAsyncRead  = 1 << 0  // several reads of a file in flight
	flagBigWrites  = 1 << 5  // writes larger than a page
	flagAsyncDIO   = 1 << 15 // direct I/O from the loop device does not wait in its worker
	flagAbortError = 1 << 21 // read(2) says ECONNABORTED after an abort, ENODEV after an unmount
	flagMaxPages   = 1 << 22 // requests of more than 32 pages
	flagInitExt    = 1 << 30 // flags2 counts
)

// INIT flags2: the upper half of the flags.
const flag2Passthrough = 1 << 5 // the kernel may read a file by itself

// OPEN reply flags.
const (
	fopenDirectIO             = 1 << 0 // straight to the asynchronous direct path
	fopenParallelDirectWrites = 1 << 6 // writes do not take the inode lock alone
	fopenPassthrough          = 1 << 7 // I/O goes to the file that the reply names
)

// notifyResend is FUSE_NOTIFY_RESEND: it stands in the error field of a reply
// to request 0, with its sign.
const notifyResend = 7

// FALLOCATE modes, from linux/falloc.h.
const (
	fallocKeepSize  = 0x01
	fallocPunchHole = 0x02
	fallocZeroRange = 0x10
)

var native = binary.NativeEndian

// header is fuse_in_header.
type header struct {
	length uint32
	op     opcode
	unique uint64
	node   uint64
}

func parseHeader(b []byte) header {
	_ = b[inHeaderSize-1]
	return header{
		length: native.Uint32(b),
		op:     opcode(native.Uint32(b[4:])),
		unique: native.Uint64(b[8:]),
		node:   native.Uint64(b[16:]),
	}
}

// putHeader writes a fuse_out_header: n is the length of what follows it.
func putHeader(b []byte, n int, errno int32, unique uint64) {
	_ = b[outHeaderSize-1]
	native.PutUint32(b, uint32(outHeaderSize+n))
	native.PutUint32(b[4:], uint32(-errno))
	native.PutUint64(b[8:], unique)
}

// extent is what fuse_read_in, fuse_write_in and fuse_fallocate_in begin with,
// after the file handle: where and how much.
type extent struct{ off, n uint64 }

// parseRW decodes fuse_read_in or fuse_write_in.
func parseRW(b []byte) extent {
	return extent{native.Uint64(b[8:]), uint64(native.Uint32(b[16:]))}
}

// parseFallocate decodes fuse_fallocate_in.
func parseFallocate(b []byte) (e extent, mode uint32) {
	return extent{native.Uint64(b[8:]), native.Uint64(b[16:])}, native.Uint32(b[24:])
}

// initIn is the part of fuse_init_in that matters here.
type initIn struct {
	major, minor, readAhead, flags uint32
	flags2                         uint32 // 0 before Linux 5.17
}

func parseInit(b []byte) initIn {
	in := initIn{major: native.Uint32(b), minor: native.Uint32(b[4:]), readAhead: native.Uint32(b[8:]), flags: native.Uint32(b[12:])}
	if in.flags&flagInitExt != 0 && len(b) >= 20 {
		in.flags2 = native.Uint32(b[16:])
	}
	return in
}

// initOut is fuse_init_out.
type initOut struct {
	minor, readAhead, flags, flags2     uint32
	maxBackground, congestion, maxPages uint16
	maxWrite, timeGran, stackDepth      uint32
}

func (o *initOut) put(b []byte) {
	clear(b[:initOutSize])
	native.PutUint32(b, protoMajor)
	native.PutUint32(b[4:], o.minor)
	native.PutUint32(b[8:], o.readAhead)
	native.PutUint32(b[12:], o.flags)
	native.PutUint16(b[16:], o.maxBackground)
	native.PutUint16(b[18:], o.congestion)
	native.PutUint32(b[20:], o.maxWrite)
	native.PutUint32(b[24:], o.timeGran)
	native.PutUint16(b[28:], o.maxPages)
	native.PutUint32(b[32:], o.flags2)
	native.PutUint32(b[36:], o.stackDepth)
}

// attr is fuse_attr with the fields that are ever not zero.
type attr struct {
	ino, size uint64
	mode      uint32
	nlink     uint32
}

func (a *attr) put(b []byte) {
	clear(b[:attrSize])
	native.PutUint64(b, a.ino)
	native.PutUint64(b[8:], a.size)
	native.PutUint64(b[16:], (a.size+511)/512)
	native.PutUint32(b[60:], a.mode)
	native.PutUint32(b[64:], a.nlink)
	native.PutUint32(b[80:], 4096) // blksize
}

// forever is a validity in seconds: nothing here ever changes.
const forever = 1 << 31

func putAttrOut(b []byte, a *attr) {
	clear(b[:16])
	native.PutUint64(b, forever)
	a.put(b[16:])
}

func putEntryOut(b []byte, a *attr) {
	clear(b[:40])
	native.PutUint64(b, a.ino) // node id: fixed, so that it means the same to a later process
	native.PutUint64(b[16:], forever)
	native.PutUint64(b[24:], forever)
	a.put(b[40:])
}

func putOpenOut(b []byte, fh uint64, flags, backing uint32) {
	clear(b[:openOutSize])
	native.PutUint64(b, fh)
	native.PutUint32(b[8:], flags)
	native.PutUint32(b[12:], backing)
}

// putStatfsOut fills fuse_kstatfs. The loop driver takes bsize as the
// granularity of a discard.
func putStatfsOut(b []byte, size uint64, bsize uint32) {
	clear(b[:statfsOutSize])
	native.PutUint64(b, size/uint64(bsize))
	native.PutUint32(b[40:], bsize)
	native.PutUint32(b[44:], 255)
	native.PutUint32(b[48:], bsize)
}
