package tcmu

import (
	"encoding/binary"
	"math"

	"github.com/reprise-project/reprise/backstore/device/internal/request"
)

// A unit is the disk as SCSI describes it.
type unit struct {
	target target
	srv    *request.Server
	sector int // bytes
}

func newUnit(t target, srv *request.Server, cfg *Config) *unit {
	return &unit{target: t, srv: srv, sector: cfg.SectorSize}
}

func (u *unit) discards() bool { return u.srv.CanDiscard && !u.srv.ReadOnly }

// writeCache says whether there is a cache that is to be flushed.
func (u *unit) writeCache() bool { return u.srv.CanSync && !u.srv.ReadOnly }

const (
	maxUnmaps = 16       // ranges in an UNMAP
	maxBlocks = 0x7fffff // in a range that is discarded: what Linux asks for at most
)

// inquire answers the commands that ask about the unit. It returns the size of
// the answer in p.
func (u *unit) inquire(p *[replySize]byte, c *[16]byte) (n int, bad sense) {
	clear(p[:])
	switch c[0] {
	case opInquiry:
		return u.inquiry(p, c)
	case opReadCapacity:
		return u.capacity10(p), sense{}
	case opServiceIn16:
		if c[1]&0x1f != serviceReadCapacity {
			return 0, senseField
		}
		return u.capacity16(p), sense{}
	case opModeSense6, opModeSense10:
		return u.modeSense(p, c)
	case opRequestSense:
		sense{}.put(p[:])
		return fixedSense, sense{}
	case opReportLUNs: // one, number 0
		const luns = 8
		binary.BigEndian.PutUint32(p[:], luns)
		return 8 + luns, sense{}
	case opMaintenanceIn:
		if c[1]&0x1f != serviceOpcodes {
			return 0, senseField
		}
		return u.opcode(p, c)
	}
	return 0, senseOpcode
}

// Who we are. Both are filled with blanks.
const (
	vendor   = "REPRISE "
	product  = "tcmu device     "
	revision = "1.0 "
)

// Vital product data pages.
const (
	vpdPages        = 0x00
	vpdSerial       = 0x80
	vpdNames        = 0x83
	vpdLimits       = 0xb0
	vpdMedium       = 0xb1
	vpdProvisioning = 0xb2
)

func (u *unit) inquiry(p *[replySize]byte, c *[16]byte) (n int, bad sense) {
	const vpd = 1
	if c[1]&vpd == 0 {
		if c[2] != 0 {
			return 0, senseField
		}
		return standardInquiry(p), sense{}
	}
	p[1] = c[2]
	const header = 4
	body := p[header:]
	switch c[2] {
	case vpdPages:
		n = copy(body, []byte{vpdPages, vpdSerial, vpdNames, vpdLimits, vpdMedium, vpdProvisioning})
	case vpdSerial:
		n = copy(body, u.target.name)
	case vpdNames:
		n = u.names(body)
	case vpdLimits:
		n = u.limits(p) - header
	case vpdMedium:
		p[5] = 1 // not rotating
		n = 60
	case vpdProvisioning:
		n = u.provisioning(p) - header
	default:
		return 0, senseField
	}
	binary.BigEndian.PutUint16(p[2:], uint16(n))
	return header + n, sense{}
}

func standardInquiry(p *[replySize]byte) int {
	const spc4, format, queuing, size = 6, 2, 2, 36
	p[2], p[3], p[4], p[7] = spc4, format, size-5, queuing
	copy(p[8:], vendor+product+revision)
	return size
}

// names are the designators of the unit: an NAA number, and a text.
func (u *unit) names(p []byte) int {
	const binaryCode, asciiCode, t10, naa = 1, 2, 1, 3
	text := vendor + u.target.name
	number := u.target.naa()
	n := copy(p, []byte{binaryCode, naa, 0, byte(len(number))})
	n += copy(p[n:], number)
	n += copy(p[n:], []byte{asciiCode, t10, 0, byte(len(text))})
	return n + copy(p[n:], text)
}

func (u *unit) limits(p *[replySize]byte) int {
	const size = 64
	binary.BigEndian.PutUint32(p[8:], uint32(maxTransfer/u.sector))
	if u.discards() {
		binary.BigEndian.PutUint32(p[20:], maxBlocks)
		binary.BigEndian.PutUint32(p[24:], maxUnmaps)
		binary.BigEndian.PutUint32(p[28:], 1) // granularity, blocks
		binary.BigEndian.PutUint64(p[36:], maxBlocks)
		const writeSameNonZero = 1
		p[4] = writeSameNonZero
	}
	return size
}

func (u *unit) provisioning(p *[replySize]byte) int {
	const unmap, writeSame16, writeSame10, readsZero, thin, size = 0x80, 0x40, 0x20, 0x04, 2, 8
	if u.discards() {
		p[5], p[6] = unmap|writeSame16|writeSame10|readsZero, thin
	}
	return size
}

func (u *unit) lastBlock() uint64 { return uint64(u.srv.Size)/uint64(u.sector) - 1 }

func (u *unit) capacity10(p *[replySize]byte) int {
	binary.BigEndian.PutUint32(p[:], uint32(min(u.lastBlock(), math.MaxUint32)))
	binary.BigEndian.PutUint32(p[4:], uint32(u.sector))
	return 8
}

func (u *unit) capacity16(p *[replySize]byte) int {
	binary.BigEndian.PutUint64(p[:], u.lastBlock())
	binary.BigEndian.PutUint32(p[8:], uint32(u.sector))
	const thin, readsZero = 0x80, 0x40
	if u.discards() {
		p[14] = thin | readsZero
	}
	return 32
}

// opcode says whether one command is supported. There is no list of all.
func (u *unit) opcode(p *[replySize]byte, c *[16]byte) (n int, bad sense) {
	const one, supported, unsupported = 1, 3, 1
	if c[2]&7 == 0 || c[2]&7 > 3 {
		return 0, senseField
	}
	p[1] = unsupported
	switch c[3] {
	case opUnmap, opWriteSame10, opWriteSame16:
		if !u.discards() {
			return 4, sense{}
		}
	case opTestUnitReady, opRequestSense, opRead6, opWrite6, opInquiry, opModeSelect6, opModeSense6, opStartStop,
		opReadCapacity, opRead10, opWrite10, opVerify10, opSyncCache10, opModeSelect10, opModeSense10, opRead16,
		opWrite16, opVerify16, opSyncCache16, opReportLUNs, opRead12, opWrite12, opVerify12:
	case opServiceIn16:
		if c[2]&7 == one || binary.BigEndian.Uint16(c[4:]) != serviceReadCapacity {
			return 4, sense{}
		}
	default:
		return 4, sense{}
	}
	size := cdbSize(c[3])
	p[1] = supported
	binary.BigEndian.PutUint16(p[2:], uint16(size))
	p[4] = c[3]
	for i := 1; i < size; i++ { // which bits may be set
		p[4+i] = 0xff
	}
	return 4 + size, sense{}
}

func cdbSize(op byte) int {
	switch op >> 5 {
	case 0:
		return 6
	case 4:
		return 16
	case 5:
		return 12
	}
	return 10
}

// Mode pages.
const (
	pageCaching = 0x08
	pageControl = 0x0a
	pageAll     = 0x3f
)

// modeSense describes what can be configured, which is nothing.
func (u *unit) modeSense(p *[replySize]byte, c *[16]byte) (n int, bad sense) {
	const changeable, saved, writeProtect, fua = 1, 3, 0x80, 0x10
	control, page, subpage := c[2]>>6, c[2]&0x3f, c[3]
	if control == saved {
		return 0, senseSaving
	}
	if subpage != 0 && subpage != 0xff {
		return 0, senseField
	}
	header := 4
	if c[0] == opModeSense10 {
		header = 8
	}
	n = header
	for _, m := range [...][]byte{u.caching(), controlPage[:]} {
		if page == m[0] || page == pageAll {
			if control == changeable {
				n += copy(p[n:], m[:2])
				n += len(m) - 2
			} else {
				n += copy(p[n:], m)
			}
		}
	}
	if n == header {
		return 0, senseField
	}
	var flags byte
	if u.srv.ReadOnly {
		flags |= writeProtect
	}
	if u.writeCache() {
		flags |= fua
	}
	if header == 4 {
		p[0], p[2] = byte(n-1), flags
	} else {
		binary.BigEndian.PutUint16(p[:], uint16(n-2))
		p[3] = flags
	}
	return n, sense{}
}

var (
	cachingPage   = [20]byte{pageCaching, 18, 0x04}
	noCachingPage = [20]byte{pageCaching, 18}
	controlPage   = [12]byte{pageControl, 10, 0, 0x10} // commands may be reordered
)

func (u *unit) caching() []byte {
	if u.writeCache() {
		return cachingPage[:]
	}
	return noCachingPage[:]
}

// accept reads the pages of a MODE SELECT, which must be what they are.
func (u *unit) accept(pages []byte) sense {
	for len(pages) > 0 {
		if len(pages) < 2 || int(pages[1]) > len(pages)-2 {
			return senseLength
		}
		var is []byte
		switch pages[0] & 0x7f {
		case pageCaching:
			is = u.caching()
		case pageControl:
			is = controlPage[:]
		}
		m := pages[:2+int(pages[1])]
		if len(m) != len(is) || string(m[1:]) != string(is[1:]) {
			return senseParameter
		}
		pages = pages[len(m):]
	}
	return sense{}
}
