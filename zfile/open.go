package zfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
)

// tailSize is how much Open reads first, from the end of a blob: the trailer
// with the rest of a tar behind it.
const tailSize = 4 << 10

// Open opens the ZFile in a blob of size bytes, bare or wrapped in a tar.
//
// It reads the last 4 KiB of the blob, finds the trailer there, and reads the
// index, which lies before it. Only if the trailer is damaged, missing, or does
// not tell where the ZFile starts, does it read the head: the tar wrapper and
// the header, which many writers complete too.
//
// Open checks header fields and index; blocks are checked as they are read.
// Errors: ErrNotZFile, *CorruptError, errors.ErrUnsupported for a feature that
// no known writer uses, or what r returned.
func Open(r io.ReaderAt, size int64) (*Reader, error) {
	o := &opener{head: head{r: r, size: size}}
	base, h, err := o.locate()
	if err != nil {
		return nil, err
	}
	indexOff, indexLen := base+int64(h.indexOffset), 4*int64(h.indexSize)
	index, err := o.index(indexOff, indexLen)
	if err != nil {
		return nil, err
	}
	corrupt := func(reason string) error {
		return &CorruptError{Off: indexOff, Len: indexLen, What: "index", Reason: reason}
	}
	if h.flags&flagDigest != 0 {
		if got := checksum(seedMeta, index); got != h.indexCRC {
			return nil, corrupt(fmt.Sprintf("checksum is %#08x, content has %#08x", h.indexCRC, got))
		}
	}
	starts, err := parseIndex(index, &h)
	if err != nil {
		return nil, corrupt(err.Error())
	}
	return &Reader{
		src: r,
		info: Info{
			Algo:        h.algo,
			BlockSize:   int(h.blockSize),
			Verify:      h.verify,
			Size:        int64(h.originalSize),
			Blocks:      int(h.indexSize),
			Base:        base,
			Length:      int64(h.indexOffset) + indexLen + headerSize,
			IndexOffset: indexOff,
			IndexLength: indexLen,
		},
		meta:   h,
		blob:   size,
		shift:  uint(bits.TrailingZeros32(h.blockSize)),
		starts: starts,
	}, nil
}

// opener holds what was read of a blob's two ends while it is being opened.
type opener struct {
	head
	tail    []byte // last bytes of the blob
	tailOff int64
}

// locate finds the ZFile and the complete header or trailer that describes it.
// Its layout is checked against the blob.
func (o *opener) locate() (base int64, h header, err error) {
	if o.size < 2*headerSize {
		return 0, h, ErrNotZFile
	}
	o.tail = make([]byte, min(o.size, tailSize))
	o.tailOff = o.size - int64(len(o.tail))
	if err := readFull(o.r, o.tail, o.tailOff); err != nil {
		return 0, h, err
	}
	if base, h, ok := o.fromTail(); ok {
		return base, h, nil
	}
	return o.fromHead()
}

// fromTail looks for a trailer behind its index, from the end. The index tells
// where the ZFile starts: at 0, behind a usual tar wrapper, or where the tar
// headers say.
func (o *opener) fromTail() (base int64, h header, ok bool) {
	for end := len(o.tail); ; {
		i := bytes.LastIndex(o.tail[:end], magic)
		if i < 0 {
			return 0, h, false
		}
		end = i
		h, err := parseHeader(o.tail[i:])
		if err != nil || !h.isTrailer() || h.layout(o.size) != nil {
			continue
		}
		pos := o.tailOff + int64(i)
		base := pos - int64(h.indexOffset) - 4*int64(h.indexSize)
		switch {
		case base == 0 || base == tarBlock || base == tarWrapper:
			return base, h, true
		case base < 0 || base%tarBlock != 0:
			continue
		}
		if m := o.unwrap(); m.wrapped && m.off == base {
			return base, h, true
		}
	}
}

// fromHead starts at the wrapper and the header. It serves blobs whose trailer
// is damaged or is followed by more than the tail, and those that are not
// ZFiles.
func (o *opener) fromHead() (base int64, h header, err error) {
	m := o.unwrap()
	if m.err != nil {
		return 0, h, m.err
	}
	base, n := m.off, m.n
	if n < 2*headerSize {
		return 0, h, ErrNotZFile
	}
	b, err := o.bytes(base, headerSize)
	if err != nil {
		return 0, h, err
	}
	h, headErr := parseHeader(b)
	if errors.Is(headErr, errNoMagic) {
		return 0, h, ErrNotZFile
	}
	if headErr == nil && h.complete() {
		if headErr = h.layout(n); headErr == nil {
			return base, h, nil
		}
	}
	h, err = o.trailerAt(base, n)
	if headErr != nil && errors.As(err, new(*CorruptError)) {
		err = metaError(base, "header", headErr)
	}
	return base, h, err
}

// trailerAt reads the trailer of a ZFile whose range is known from elsewhere.
func (o *opener) trailerAt(base, n int64) (header, error) {
	off := base + n - headerSize
	h, err := readHeader(o.r, off, "trailer")
	if err != nil {
		return h, err
	}
	if !h.isTrailer() {
		return h, metaError(off, "trailer", errors.New("flags are not a trailer's"))
	}
	if err := h.layout(n); err != nil {
		return h, metaError(off, "trailer", err)
	}
	return h, nil
}

// readHeader reads the header or trailer at off of the blob.
func readHeader(r io.ReaderAt, off int64, what string) (header, error) {
	b := make([]byte, headerSize)
	if err := readFull(r, b, off); err != nil {
		return header{}, err
	}
	h, err := parseHeader(b)
	if err != nil {
		err = metaError(off, what, err)
	}
	return h, err
}

// metaError wraps what is wrong with the header or trailer at off.
func metaError(off int64, what string, err error) error {
	if errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("zfile: %s at %d of the blob: %w", what, off, err)
	}
	return &CorruptError{Off: off, Len: headerSize, What: what, Reason: "not usable, the file may be cut off", Err: err}
}

// index returns n bytes of the blob, as far as possible out of its tail.
func (o *opener) index(off, n int64) ([]byte, error) {
	if off >= o.tailOff {
		return o.tail[off-o.tailOff:][:n], nil
	}
	b := make([]byte, n)
	missing := min(n, o.tailOff-off)
	copy(b[missing:], o.tail)
	return b, readFull(o.r, b[:missing], off)
}

// blockStarts holds where blocks start, relative to the ZFile, in 4 bytes a
// block: an absolute offset every groupLen blocks and relative ones between.
type blockStarts struct {
	groups []int64
	offs   []uint32 // one more than there are blocks
}

// A group of blocks is at most 1 Ki * maxBlockLen(maxBlockSize) = 129 MiB long.
const (
	groupShift = 10
	groupLen   = 1 << groupShift
)

func (s *blockStarts) at(i int) int64 {
	return s.groups[i>>groupShift] + int64(s.offs[i])
}

// parseIndex adds up the lengths, which must fill the room that the header
// gives them.
func parseIndex(index []byte, h *header) (blockStarts, error) {
	n := len(index) / 4
	s := blockStarts{groups: make([]int64, 0, n/groupLen+1), offs: make([]uint32, 0, n+1)}
	pos := int64(h.blocksStart())
	shortest, longest := uint32(1), maxBlockLen(h.blockSize)
	if h.verify {
		shortest += crcLen
	}
	group := pos
	for i := 0; ; i++ {
		if i%groupLen == 0 {
			group = pos
			s.groups = append(s.groups, group)
		}
		s.offs = append(s.offs, uint32(pos-group))
		if i == n {
			break
		}
		l := binary.LittleEndian.Uint32(index[4*i:])
		if l < shortest || l > longest {
			return s, fmt.Errorf("block %d is %d bytes long", i, l)
		}
		pos += int64(l)
	}
	if pos != int64(h.indexOffset) {
		return s, fmt.Errorf("blocks end at %d, index starts at %d", pos, h.indexOffset)
	}
	return s, nil
}

// readFull fills p from off. A short read is io.ErrUnexpectedEOF.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("zfile: read %d bytes at %d of the blob: %w", len(p), off, err)
}
