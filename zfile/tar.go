package zfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// The wrapper that overlaybd writes: a pax header block, a block with the one
// record "size", and the ustar header of the member, whose own size field is 0.
// Then the ZFile, zeros up to a multiple of 512, and two zero blocks.
const (
	tarBlock   = 512
	tarWrapper = 3 * tarBlock

	// maxTarHeaders bounds what is read of a blob in search of its member.
	maxTarHeaders = 64 << 10
	// headSize is read at once from the head of a blob: any usual wrapper and
	// the header behind it.
	headSize = 4 << 10
)

// Fields of a ustar header block.
const (
	tarName     = 0
	tarMode     = 100
	tarUID      = 108
	tarGID      = 116
	tarSize     = 124
	tarMtime    = 136
	tarChecksum = 148
	tarType     = 156
	tarMagic    = 257
	tarUname    = 265
	tarGname    = 297
)

const ustar = "ustar\x0000"

var lsmtMagic = []byte("LSMT\x00\x01\x02\x00")

// Unwrap finds the file in a blob of size bytes: the range of the first member
// if the blob is a tar as overlaybd or another tool wraps a layer, else the
// whole blob. It reads the head of the blob, usually once, and does not look at
// the file itself, which may be a ZFile or a bare LSMT file.
//
// A tar whose member is longer than the blob is an error that wraps
// io.ErrUnexpectedEOF; a bad tar header is a *CorruptError.
func Unwrap(r io.ReaderAt, size int64) (off, n int64, wrapped bool, err error) {
	m := (&head{r: r, size: size}).unwrap()
	return m.off, m.n, m.wrapped, m.err
}

// IsZFile reports whether the blob holds a ZFile, by its head alone: no index
// is read and nothing is verified.
func IsZFile(r io.ReaderAt, size int64) (bool, error) {
	h := &head{r: r, size: size}
	m := h.unwrap()
	if m.err != nil || m.n < int64(len(magic)) {
		return false, m.err
	}
	b, err := h.bytes(m.off, len(magic))
	return err == nil && bytes.Equal(b, magic), err
}

// head reads the first bytes of a blob, once for all usual needs.
type head struct {
	r    io.ReaderAt
	size int64
	buf  []byte

	member *member // what unwrap found
}

// member is the file in a blob.
type member struct {
	off, n  int64
	wrapped bool
	err     error
}

// bytes returns n bytes at off, which the blob must have.
func (h *head) bytes(off int64, n int) ([]byte, error) {
	if h.buf == nil {
		buf := make([]byte, max(0, min(h.size, headSize)))
		if err := readFull(h.r, buf, 0); err != nil {
			return nil, err
		}
		h.buf = buf
	}
	if off+int64(n) <= int64(len(h.buf)) {
		return h.buf[off:][:n], nil
	}
	b := make([]byte, n)
	return b, readFull(h.r, b, off)
}

// unwrap walks the tar headers to the first member. It does so once.
func (h *head) unwrap() *member {
	if h.member == nil {
		m := h.walk()
		if m.err != nil {
			m = member{err: m.err}
		}
		h.member = &m
	}
	return h.member
}

func (h *head) walk() member {
	var off int64
	paxSize := int64(-1)
	for off <= maxTarHeaders {
		ok, err := h.isTarHeader(off)
		switch {
		case err != nil:
			return member{err: err}
		case !ok && off == 0:
			return member{n: h.size}
		case !ok:
			return member{err: corruptTar(off, tarBlock, "no ustar header after an extended one", nil)}
		}
		b, err := h.bytes(off, tarBlock)
		if err != nil {
			return member{err: err}
		}
		size, err := parseTarSize(b)
		if err != nil {
			return member{err: corruptTar(off, tarBlock, "bad size field", err)}
		}
		switch typ := b[tarType]; typ {
		case 'x', 'g', 'L', 'K':
			if paxSize, err = h.extended(typ, off+tarBlock, size, paxSize); err != nil {
				return member{err: err}
			}
			off += tarBlock + (size+tarBlock-1)&^(tarBlock-1)
		case '0', 0:
			return h.file(off+tarBlock, size, paxSize)
		default:
			return member{err: corruptTar(off, tarBlock, fmt.Sprintf("first member is of type %q, not a file", typ), nil)}
		}
	}
	return member{err: corruptTar(0, off, "no member in the first 64 KiB", nil)}
}

func corruptTar(off, n int64, reason string, err error) error {
	return &CorruptError{Off: off, Len: n, What: "tar header", Reason: reason, Err: err}
}

// file checks the range of a regular member against the blob.
func (h *head) file(off, size, paxSize int64) member {
	if paxSize >= 0 {
		size = paxSize
	}
	if size > h.size-off {
		return member{err: fmt.Errorf("zfile: blob is cut off: tar member of %d bytes at %d, blob of %d: %w", size, off, h.size, io.ErrUnexpectedEOF)}
	}
	return member{off: off, n: size, wrapped: true}
}

// isTarHeader tells whether a ustar header is at off. A block that claims to be
// one and has a bad checksum is an error.
func (h *head) isTarHeader(off int64) (bool, error) {
	if off+tarBlock > h.size {
		return false, nil
	}
	b, err := h.bytes(off, tarBlock)
	if err != nil {
		return false, err
	}
	if bytes.HasPrefix(b, magic[:8]) || bytes.HasPrefix(b, lsmtMagic) || string(b[tarMagic:][:len(ustar)]) != ustar {
		return false, nil
	}
	want, err := parseOctal(b[tarChecksum:][:8])
	if err != nil || want != tarSum(b) {
		return false, corruptTar(off, tarBlock, "bad checksum", err)
	}
	return true, nil
}

// extended reads a pax header's data and returns the size that it gives to the
// member, or the one known before.
func (h *head) extended(typ byte, off, n, paxSize int64) (int64, error) {
	if n > maxTarHeaders || n > h.size-off {
		return 0, corruptTar(off, n, "extended header is too long", nil)
	}
	if typ != 'x' && typ != 'g' {
		return paxSize, nil
	}
	b, err := h.bytes(off, int(n))
	if err != nil {
		return 0, err
	}
	for len(b) > 0 {
		key, value, rest, ok := paxRecord(b)
		if !ok {
			return 0, corruptTar(off, n, "bad pax record", nil)
		}
		b = rest
		if key != "size" {
			continue
		}
		size, err := strconv.ParseInt(value, 10, 64)
		if err != nil || size < 0 {
			return 0, corruptTar(off, n, `bad pax record "size"`, err)
		}
		paxSize = size
	}
	return paxSize, nil
}

// paxRecord splits the first record, "LEN KEY=VALUE\n", off b.
func paxRecord(b []byte) (key, value string, rest []byte, ok bool) {
	digits, _, found := bytes.Cut(b, []byte(" "))
	n, err := strconv.ParseUint(string(digits), 10, 31)
	if !found || err != nil || int(n) > len(b) || int(n) < len(digits)+2 || b[n-1] != '\n' {
		return "", "", nil, false
	}
	key, value, ok = strings.Cut(string(b[len(digits)+1:n-1]), "=")
	return key, value, b[n:], ok
}

// parseTarSize reads the size field: octal, or GNU's base-256 for 8 GiB and more.
func parseTarSize(b []byte) (int64, error) {
	f := b[tarSize:][:12]
	if f[0]&0x80 == 0 {
		return parseOctal(f)
	}
	n := int64(f[0] & 0x7f)
	for _, c := range f[1:] {
		if n >= 1<<54 {
			return 0, strconv.ErrRange
		}
		n = n<<8 | int64(c)
	}
	return n, nil
}

func parseOctal(f []byte) (int64, error) {
	s := strings.Trim(string(f), " \x00")
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 8, 62)
	if err != nil {
		return 0, errors.New("not an octal number")
	}
	return int64(n), nil
}

// tarSum adds up a header block, its checksum field taken as spaces.
func tarSum(b []byte) int64 {
	var n int64
	for i, c := range b[:tarBlock] {
		if i >= tarChecksum && i < tarChecksum+8 {
			c = ' '
		}
		n += int64(c)
	}
	return n
}

// wrapperHead returns the three blocks that overlaybd puts before a ZFile of n
// bytes, with its spelling of numbers.
func wrapperHead(n int64) []byte {
	b := make([]byte, tarWrapper)
	record := paxSizeRecord(n)
	copy(b[tarBlock:], record)

	pax := b[:tarBlock]
	copy(pax[tarName:], "overlaybd.pax")
	copy(pax[tarSize:], fmt.Sprintf("%11o ", len(record)))
	pax[tarType] = 'x'
	sealTarHeader(pax)

	file := b[2*tarBlock:]
	copy(file[tarName:], "overlaybd.commit")
	copy(file[tarMode:], "100644 ")
	copy(file[tarUID:], "     0 ")
	copy(file[tarGID:], "     0 ")
	copy(file[tarSize:], fmt.Sprintf("%11o ", 0))
	copy(file[tarMtime:], fmt.Sprintf("%11o ", 0))
	copy(file[tarUname:], "root")
	copy(file[tarGname:], "root")
	file[tarType] = '0'
	sealTarHeader(file)
	return b
}

// sealTarHeader fills in the magic and the checksum.
func sealTarHeader(b []byte) {
	copy(b[tarMagic:], ustar)
	copy(b[tarChecksum:], fmt.Sprintf("%6o ", tarSum(b)))
}

// paxSizeRecord returns "LEN size=N\n", where LEN counts itself.
func paxSizeRecord(n int64) string {
	rest := fmt.Sprintf(" size=%d\n", n)
	for digits := 1; ; digits++ {
		if s := strconv.Itoa(digits + len(rest)); len(s) == digits {
			return s + rest
		}
	}
}

// wrapperTail returns what follows a ZFile of n bytes in its wrapper.
func wrapperTail(n int64) []byte {
	pad := -n & (tarBlock - 1)
	return make([]byte, pad+2*tarBlock)
}
