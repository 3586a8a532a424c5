package nbd

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// The wire format, big endian, from
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md:
//
//	request: magic u32, flags u16, command u16, handle u64, offset u64, length u32, data of a write
//	reply:   magic u32, error u32, handle u64, data of a read that succeeded
const (
	requestMagic = 0x25609513
	replyMagic   = 0x67446698
	requestSize  = 28
	replySize    = 16
)

// Commands.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2 // the last request of a connection; it has no reply
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
)

// flagFUA asks for the write to be durable when it is answered.
const flagFUA = 1 << 0

// Transmission flags: what the server can do.
const (
	hasFlags        = 1 << 0
	readOnly        = 1 << 1
	sendFlush       = 1 << 2
	sendFUA         = 1 << 3
	sendTrim        = 1 << 5
	sendWriteZeroes = 1 << 6
)

// header is a request without its data.
type header struct {
	flags, command uint16
	handle         uint64
	off            int64 // negative if it was past what an int64 holds
	n              uint32
}

// parse reads a request's header, which p begins with. Whatever it may hold
// leads to an answer, except what says that the stream is out of step.
func parse(p []byte) (h header, err error) {
	if len(p) < requestSize {
		return h, fmt.Errorf("request of %d bytes", len(p))
	}
	if m := binary.BigEndian.Uint32(p); m != requestMagic {
		return h, fmt.Errorf("request with magic %#x", m)
	}
	h.flags = binary.BigEndian.Uint16(p[4:])
	h.command = binary.BigEndian.Uint16(p[6:])
	h.handle = binary.BigEndian.Uint64(p[8:])
	h.off = int64(binary.BigEndian.Uint64(p[16:]))
	h.n = binary.BigEndian.Uint32(p[24:])
	if h.n > maxRequest && h.carriesData() {
		return h, fmt.Errorf("request for %d bytes, more than %d", h.n, maxRequest)
	}
	return h, nil
}

// carriesData reports whether h.n bytes go over the socket, in either
// direction.
func (h *header) carriesData() bool { return h.command == cmdRead || h.command == cmdWrite }

// putReply writes the header of a reply to p.
func putReply(p []byte, handle uint64, errno unix.Errno) {
	binary.BigEndian.PutUint32(p, replyMagic)
	binary.BigEndian.PutUint32(p[4:], wireError(errno))
	binary.BigEndian.PutUint64(p[8:], handle)
}

// wireError is what the protocol has for errno. Linux makes EIO of them all.
func wireError(errno unix.Errno) uint32 {
	switch errno {
	case 0, unix.EIO, unix.EINVAL, unix.ENOSPC:
		return uint32(errno)
	case unix.EROFS:
		return uint32(unix.EPERM)
	case unix.ENOSYS:
		return uint32(unix.EOPNOTSUPP)
	}
	return uint32(unix.EIO)
}
