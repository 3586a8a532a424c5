package zfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"math/bits"
)

// Header and trailer, little-endian, in 512 bytes of which the struct takes 96:
//
//	 0  magic0         "ZFile\0\1\0"
//	 8  magic1         16 bytes
//	24  size           u32, 96
//	28  digest         u32, over all 512 bytes with this field zero, if flagDigest
//	32  flags          u64, only bits 0-5 mean anything
//	40  index_offset   u64, from the start of the header
//	48  index_size     u64, entries
//	56  original_size  u64
//	64  index_crc      u32, over the index, if flagDigest
//	72  block_size     u32
//	76  algo           u8
//	77  level          u8, always 0
//	78  use_dict       u8
//	84  dict_size      u32
//	88  verify         u8
//
// Bytes that are not listed may hold anything: the base layer of most published
// images has uninitialised memory there.
const (
	headerSize = 512
	structSize = 96

	offSize         = 24
	offDigest       = 28
	offFlags        = 32
	offIndexOffset  = 40
	offIndexSize    = 48
	offOriginalSize = 56
	offIndexCRC     = 64
	offBlockSize    = 72
	offAlgo         = 76
	offUseDict      = 78
	offDictSize     = 84
	offVerify       = 88
)

const (
	flagHeader          = 1 << 0 // this is the header, not the trailer
	flagData            = 1 << 1
	flagSealed          = 1 << 2 // this is a trailer, its index fields are there
	flagOverwritten     = 1 << 3 // this is a header, its index fields are there, too
	flagDigest          = 1 << 4 // digest and index_crc are there
	flagIndexCompressed = 1 << 5 // defined, but no writer sets it
	flagMask            = 1<<6 - 1
)

const (
	minBlockSize = 4 << 10
	maxBlockSize = 64 << 10

	crcLen = 4 // a block's checksum

	// maxWritten bounds a block in a file that overlaybd's reader can read.
	maxWritten = 64 << 10
)

// magic is both magic fields.
var magic = []byte("ZFile\x00\x01\x00" + "tuji.yyf@Alibaba")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Initial registers of the checksum.
const (
	seedMeta  = 0 // headers and index
	seedBlock = 100007
)

// checksum is CRC-32C from the given register, without the final inversion.
func checksum(register uint32, p []byte) uint32 {
	return ^crc32.Update(^register, castagnoli, p)
}

// header is a header or a trailer.
type header struct {
	flags        uint64 // flagMask applied
	indexOffset  uint64
	indexSize    uint64
	originalSize uint64
	indexCRC     uint32
	blockSize    uint32
	algo         Algo
	useDict      bool
	dictSize     uint32
	verify       bool
}

var errNoMagic = errors.New("bad magic")

// parseHeader decodes the first 512 bytes of b. It checks what can be checked
// without knowing the blob: magic, digest, and that the fields are supported.
// Index fields are only checked by layout.
func parseHeader(b []byte) (header, error) {
	if len(b) < headerSize || string(b[:len(magic)]) != string(magic) {
		return header{}, errNoMagic
	}
	b = b[:headerSize]
	le := binary.LittleEndian
	if n := le.Uint32(b[offSize:]); n != structSize {
		return header{}, fmt.Errorf("struct of %d bytes, want %d", n, structSize)
	}
	h := header{
		flags:        le.Uint64(b[offFlags:]) & flagMask,
		indexOffset:  le.Uint64(b[offIndexOffset:]),
		indexSize:    le.Uint64(b[offIndexSize:]),
		originalSize: le.Uint64(b[offOriginalSize:]),
		indexCRC:     le.Uint32(b[offIndexCRC:]),
		blockSize:    le.Uint32(b[offBlockSize:]),
		algo:         Algo(b[offAlgo]),
		useDict:      b[offUseDict] != 0,
		dictSize:     le.Uint32(b[offDictSize:]),
		verify:       b[offVerify] != 0,
	}
	if h.flags&flagDigest != 0 {
		if got, want := digest(b), le.Uint32(b[offDigest:]); got != want {
			return header{}, fmt.Errorf("digest is %#08x, content has %#08x", want, got)
		}
	}
	return h, h.supported()
}

func (h *header) supported() error {
	switch {
	case h.algo != LZ4 && h.algo != Zstd:
		return fmt.Errorf("compression %d: %w", h.algo, errors.ErrUnsupported)
	case h.blockSize < minBlockSize || h.blockSize > maxBlockSize || bits.OnesCount32(h.blockSize) != 1:
		return fmt.Errorf("blocks of %d bytes, not a power of two from 4 KiB to 64 KiB: %w", h.blockSize, errors.ErrUnsupported)
	case h.useDict:
		return fmt.Errorf("dictionary: %w", errors.ErrUnsupported)
	case h.flags&flagIndexCompressed != 0:
		return fmt.Errorf("compressed index: %w", errors.ErrUnsupported)
	}
	return nil
}

// layout checks the index fields against the bytes that the blob has for the
// ZFile from its header to the end of its trailer. After it no sum of them
// overflows an int64.
func (h *header) layout(length int64) error {
	room := uint64(max(length, 0))
	first := h.blocksStart()
	switch {
	case h.indexSize > room/4 || h.indexSize > math.MaxInt32:
		return fmt.Errorf("index of %d entries in a file of %d bytes", h.indexSize, length)
	case h.indexOffset < first || h.indexOffset > room || room-h.indexOffset < 4*h.indexSize+headerSize:
		return fmt.Errorf("index of %d entries at %d in a file of %d bytes", h.indexSize, h.indexOffset, length)
	}
	blocks := h.originalSize / uint64(h.blockSize)
	if h.originalSize%uint64(h.blockSize) != 0 {
		blocks++
	}
	if blocks != h.indexSize {
		return fmt.Errorf("%d decoded bytes in blocks of %d, but %d index entries", h.originalSize, h.blockSize, h.indexSize)
	}
	return nil
}

// blocksStart is where block 0 is, from the start of the header.
func (h *header) blocksStart() uint64 { return headerSize + uint64(h.dictSize) }

// sameFile reports whether two headers agree in what both always state.
func (h *header) sameFile(o *header) bool {
	return h.algo == o.algo && h.blockSize == o.blockSize && h.verify == o.verify && h.dictSize == o.dictSize
}

// sameIndex reports whether two complete headers agree about the index.
func (h *header) sameIndex(o *header) bool {
	return h.indexOffset == o.indexOffset && h.indexSize == o.indexSize && h.originalSize == o.originalSize &&
		(h.flags&o.flags&flagDigest == 0 || h.indexCRC == o.indexCRC)
}

// isHeader and isTrailer tell the two apart.
func (h *header) isHeader() bool { return h.flags&(flagHeader|flagData) == flagHeader|flagData }

func (h *header) isTrailer() bool {
	return h.flags&(flagHeader|flagData|flagSealed) == flagData|flagSealed
}

// complete reports whether this header alone describes the file.
func (h *header) complete() bool {
	return h.isHeader() && h.flags&flagOverwritten != 0
}

// encode returns the 512 bytes, with their digest. The index fields of a header
// that was not completed are left out.
func (h *header) encode() []byte {
	b := make([]byte, headerSize)
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint32(b[offSize:], structSize)
	le.PutUint64(b[offFlags:], h.flags|flagDigest)
	if h.flags&(flagSealed|flagOverwritten) != 0 {
		le.PutUint64(b[offIndexOffset:], h.indexOffset)
		le.PutUint64(b[offIndexSize:], h.indexSize)
		le.PutUint64(b[offOriginalSize:], h.originalSize)
		le.PutUint32(b[offIndexCRC:], h.indexCRC)
	}
	le.PutUint32(b[offBlockSize:], h.blockSize)
	b[offAlgo] = byte(h.algo)
	if h.verify {
		b[offVerify] = 1
	}
	le.PutUint32(b[offDigest:], digest(b))
	return b
}

// digest is the checksum of a header or trailer of 512 bytes.
func digest(b []byte) uint32 {
	var zero [4]byte
	c := checksum(seedMeta, b[:offDigest])
	c = checksum(c, zero[:])
	return checksum(c, b[offDigest+4:headerSize])
}

// maxBlockLen bounds a block's length in the index. Both codecs expand
// incompressible input by less than 1 %; twice the block is generous.
func maxBlockLen(blockSize uint32) uint32 { return 2*blockSize + 1024 }
