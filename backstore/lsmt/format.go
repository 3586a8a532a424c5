package lsmt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

const (
	headerSpace = 4096 // bytes that a header or a trailer takes
	headerSize  = 390  // bytes of it that carry fields
	entrySize   = 16
	firstSector = headerSpace / SectorSize

	offsetBits  = 50
	lengthBits  = 14
	moffsetBits = 55

	maxOffset = 1<<offsetBits - 1 // the offset of a padding entry
	maxLength = 1<<lengthBits - 1

	// maxSize is the largest device, in bytes.
	maxSize = maxOffset * SectorSize

	// indexPad is the multiple of entries to which a committed index is
	// padded.
	indexPad = 256

	uuidSize = 37
	nullUUID = "00000000-0000-0000-0000-000000000000"

	// maxMessage is the size of the field for the commit message.
	maxMessage = 256
)

const (
	flagHeader = 1 << iota // else trailer
	flagData               // else index file
	flagSealed
	_
	flagSparse
)

var (
	magic0 = [8]byte{'L', 'S', 'M', 'T', 0, 1, 2, 0}
	magic1 = [16]byte{
		0x65, 0x7e, 0x63, 0xd2, 0x94, 0x44, 0x08, 0x4c,
		0xa2, 0xd2, 0xc8, 0xec, 0x4f, 0xcf, 0xae, 0x8a,
	}
)

// header mirrors the header and the trailer of a file.
type header struct {
	flags       uint32
	indexOffset uint64
	indexSize   uint64 // entries
	virtualSize uint64 // bytes
	uuid        string // upper-case text
	parentUUID  string
	version     uint8
	subVersion  uint8
	userTag     string
}

// append adds the header's 4096 bytes to b.
func (h header) append(b []byte) []byte {
	n := len(b)
	b = append(b, make([]byte, headerSpace)...)
	p := b[n:]
	copy(p, magic0[:])
	copy(p[8:], magic1[:])
	le := binary.LittleEndian
	le.PutUint32(p[24:], headerSize)
	le.PutUint32(p[28:], h.flags)
	le.PutUint64(p[32:], h.indexOffset)
	le.PutUint64(p[40:], h.indexSize)
	le.PutUint64(p[48:], h.virtualSize)
	copy(p[56:56+uuidSize-1], h.uuid)
	copy(p[93:93+uuidSize-1], h.parentUUID)
	p[132] = 1
	p[133] = 1
	copy(p[134:134+maxMessage], h.userTag)
	return b
}

// parseHeader decodes the 4096 bytes of a header or a trailer. Which of the two
// it is, and of what file, is for the caller to check.
func parseHeader(p []byte) (header, error) {
	if len(p) < headerSize {
		return header{}, fmt.Errorf("%d bytes, need %d: %w", len(p), headerSize, ErrCorrupt)
	}
	if !bytes.Equal(p[:8], magic0[:]) || !bytes.Equal(p[8:24], magic1[:]) {
		return header{}, fmt.Errorf("bad magic: %w", ErrCorrupt)
	}
	le := binary.LittleEndian
	h := header{
		flags:       le.Uint32(p[28:]),
		indexOffset: le.Uint64(p[32:]),
		indexSize:   le.Uint64(p[40:]),
		virtualSize: le.Uint64(p[48:]),
		uuid:        uuidText(p[56 : 56+uuidSize]),
		parentUUID:  uuidText(p[93 : 93+uuidSize]),
		version:     p[132],
		subVersion:  p[133],
		userTag:     cString(p[134 : 134+maxMessage]),
	}
	if h.version > 1 {
		return header{}, fmt.Errorf("format version %d.%d, this program knows 1: %w",
			h.version, h.subVersion, errors.ErrUnsupported)
	}
	if h.virtualSize > maxSize {
		return header{}, fmt.Errorf("virtual size of %d bytes is above the format's limit of %d: %w",
			h.virtualSize, int64(maxSize), ErrCorrupt)
	}
	return h, nil
}

// is tells whether the flags in mask are exactly those in want.
func (h header) is(mask, want uint32) bool { return h.flags&mask == want }

// cString is the text before the first NUL.
func cString(p []byte) string {
	if i := bytes.IndexByte(p, 0); i >= 0 {
		p = p[:i]
	}
	return string(p)
}

// uuidText is the UUID in p, or the null UUID if p does not hold one.
func uuidText(p []byte) string {
	s, err := canonicalUUID(cString(p))
	if err != nil {
		return nullUUID
	}
	return s
}

// canonicalUUID checks that s is a UUID as text and returns it in upper case.
// The empty string means the null UUID.
func canonicalUUID(s string) (string, error) {
	if s == "" {
		return nullUUID, nil
	}
	if len(s) != len(nullUUID) {
		return "", fmt.Errorf("uuid %q: not of the form %s", s, nullUUID)
	}
	for i := range len(s) {
		if dash := nullUUID[i] == '-'; dash && s[i] != '-' || !dash && !isHex(s[i]) {
			return "", fmt.Errorf("uuid %q: not of the form %s", s, nullUUID)
		}
	}
	return strings.ToUpper(s), nil
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// An entry is an index entry in memory: the two words of the disk, the first
// rotated so that entries compare by offset.
//
//	key: offset << 14 | length
//	val: layer << 56 | zeroed << 55 | moffset
type entry struct{ key, val uint64 }

const (
	zeroedBit   = 1 << moffsetBits
	layerShift  = moffsetBits + 1
	moffsetMask = zeroedBit - 1
)

// newEntry makes an entry; 0 < n <= maxLength.
func newEntry(off, n, moffset uint64, zeroed bool) entry {
	e := entry{off<<lengthBits | n, moffset}
	if zeroed {
		e.val |= zeroedBit
	}
	return e
}

func (e entry) off() uint64     { return e.key >> lengthBits }
func (e entry) len() uint64     { return e.key & maxLength }
func (e entry) end() uint64     { return e.off() + e.len() }
func (e entry) moffset() uint64 { return e.val & moffsetMask }
func (e entry) zeroed() bool    { return e.val&zeroedBit != 0 }

// segment is the entry in bytes.
func (e entry) segment() Segment {
	zeroed := e.val >> moffsetBits & 1 // no branch: it would be hard to predict
	return Segment{
		Off:      int64(e.off()) * SectorSize,
		Len:      int64(e.len()) * SectorSize,
		Kind:     Data - Kind(zeroed),
		Layer:    int(e.val >> layerShift),
		LayerOff: int64(e.moffset()&(zeroed-1)) * SectorSize,
	}
}

// from is the part of e that begins at sector off, off() <= off < end().
func (e entry) from(off uint64) entry {
	d := off - e.off()
	e.key += d<<lengthBits - d
	if !e.zeroed() {
		e.val += d
	}
	return e
}

// upTo is the part of e that ends at sector end, off() < end <= end().
func (e entry) upTo(end uint64) entry {
	e.key -= e.end() - end
	return e
}

// append adds the entry's 16 bytes on disk to b, with tag 0.
func (e entry) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, e.off()|e.len()<<offsetBits)
	return binary.LittleEndian.AppendUint64(b, e.val&(zeroedBit|moffsetMask))
}

// appendPadding adds a padding entry to b.
func appendPadding(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, maxOffset)
	return binary.LittleEndian.AppendUint64(b, 0)
}

// parseEntry decodes 16 bytes and drops the tag.
func parseEntry(p []byte) entry {
	w0, w1 := binary.LittleEndian.Uint64(p), binary.LittleEndian.Uint64(p[8:])
	return entry{w0<<lengthBits | w0>>offsetBits, w1 & (zeroedBit | moffsetMask)}
}

// padding tells whether e is a padding entry.
func (e entry) padding() bool { return e.off() == maxOffset }

// check tells what is wrong with an entry of a file whose data end at sector
// dataEnd.
func (e entry) check(dataEnd uint64) error {
	switch {
	case e.end() > maxOffset:
		return fmt.Errorf("[%d, %d) ends beyond the largest device: %w", e.off(), e.end(), ErrCorrupt)
	case e.zeroed():
		return nil
	case e.moffset() < firstSector:
		return fmt.Errorf("data at sector %d, in the header: %w", e.moffset(), ErrCorrupt)
	case e.moffset()+e.len() > dataEnd:
		return fmt.Errorf("data at sectors [%d, %d), the file's data end at %d: %w",
			e.moffset(), e.moffset()+e.len(), dataEnd, ErrCorrupt)
	}
	return nil
}

// readFull is r.ReadAt without the io.EOF of a read that ends at the end.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
}
