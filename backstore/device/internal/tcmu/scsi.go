package tcmu

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Operation codes, from SPC-4 and SBC-3.
const (
	opTestUnitReady = 0x00
	opRequestSense  = 0x03
	opRead6         = 0x08
	opWrite6        = 0x0a
	opInquiry       = 0x12
	opModeSelect6   = 0x15
	opModeSense6    = 0x1a
	opStartStop     = 0x1b
	opReadCapacity  = 0x25
	opRead10        = 0x28
	opWrite10       = 0x2a
	opVerify10      = 0x2f
	opSyncCache10   = 0x35
	opWriteSame10   = 0x41
	opUnmap         = 0x42
	opModeSelect10  = 0x55
	opModeSense10   = 0x5a
	opRead16        = 0x88
	opWrite16       = 0x8a
	opVerify16      = 0x8f
	opSyncCache16   = 0x91
	opWriteSame16   = 0x93
	opServiceIn16   = 0x9e
	opReportLUNs    = 0xa0
	opMaintenanceIn = 0xa3
	opRead12        = 0xa8
	opWrite12       = 0xaa
	opVerify12      = 0xaf

	serviceReadCapacity = 0x10 // of opServiceIn16
	serviceOpcodes      = 0x0c // of opMaintenanceIn
)

const statusCheck = 2 // CHECK CONDITION

// A sense says what is wrong with a command; zero is nothing.
type sense struct{ key, asc, ascq byte }

var (
	// A sense key of our own, "vendor specific": the SCSI layer hands EIO up at
	// once. A medium error it would report as ENODATA, or try again five times,
	// which is for the backend to do.
	senseFailed    = sense{0x9, 0x44, 0x00}
	senseFull      = sense{0x7, 0x27, 0x07} // ENOSPC
	senseReadOnly  = sense{0x7, 0x27, 0x00}
	senseRange     = sense{0x5, 0x21, 0x00}
	senseOpcode    = sense{0x5, 0x20, 0x00}
	senseField     = sense{0x5, 0x24, 0x00}
	senseLength    = sense{0x5, 0x1a, 0x00}
	senseParameter = sense{0x5, 0x26, 0x00}
	senseSaving    = sense{0x5, 0x39, 0x00}
)

func senseOf(e unix.Errno) sense {
	switch e {
	case 0:
		return sense{}
	case unix.ENOSPC:
		return senseFull
	case unix.EROFS:
		return senseReadOnly
	case unix.EINVAL:
		return senseRange
	case unix.ENOSYS:
		return senseOpcode
	}
	return senseFailed
}

// fixedSense is the size of sense data in the fixed format.
const fixedSense = 18

// put writes sense data to p, which is long enough.
func (s sense) put(p []byte) {
	const current, rest = 0x70, fixedSense - 8
	clear(p[:fixedSense])
	p[0], p[2], p[7], p[12], p[13] = current, s.key, rest, s.asc, s.ascq
}

// extent is the range of bytes that a CDB names, and whether it is to be
// durable when the command is answered.
func (u *unit) extent(c *[16]byte) (off, n int64, fua bool, bad sense) {
	const protect, fuaBit = 0xe0, 0x08
	var lba, blocks uint64
	switch c[0] >> 5 {
	case 0:
		lba, blocks = uint64(binary.BigEndian.Uint32(c[:])&0x1fffff), uint64(c[4])
		if blocks == 0 {
			blocks = 256
		}
		off, n, bad = u.bytes(lba, blocks)
		return off, n, false, bad
	case 1, 2:
		lba, blocks = uint64(binary.BigEndian.Uint32(c[2:])), uint64(binary.BigEndian.Uint16(c[7:]))
	case 4:
		lba, blocks = binary.BigEndian.Uint64(c[2:]), uint64(binary.BigEndian.Uint32(c[10:]))
	case 5:
		lba, blocks = uint64(binary.BigEndian.Uint32(c[2:])), uint64(binary.BigEndian.Uint32(c[6:]))
	default:
		return 0, 0, false, senseOpcode
	}
	if c[1]&protect != 0 {
		return 0, 0, false, senseField
	}
	off, n, bad = u.bytes(lba, blocks)
	return off, n, c[1]&fuaBit != 0, bad
}

// bytes checks a range of blocks.
func (u *unit) bytes(lba, blocks uint64) (off, n int64, bad sense) {
	all := uint64(u.srv.Size) / uint64(u.sector)
	if lba > all || blocks > all-lba {
		return 0, 0, senseRange
	}
	return int64(lba) * int64(u.sector), int64(blocks) * int64(u.sector), sense{}
}

// allocation is how many bytes of data the initiator has room for.
func allocation(c *[16]byte) int {
	switch c[0] {
	case opInquiry:
		return int(binary.BigEndian.Uint16(c[3:]))
	case opModeSense6, opRequestSense:
		return int(c[4])
	case opModeSense10:
		return int(binary.BigEndian.Uint16(c[7:]))
	case opReportLUNs, opMaintenanceIn:
		return int(min(binary.BigEndian.Uint32(c[6:]), replySize))
	case opServiceIn16:
		return int(min(binary.BigEndian.Uint32(c[10:]), replySize))
	}
	return replySize
}
