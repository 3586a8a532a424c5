// Package zfile reads and writes ZFile, the seekable compression of overlaybd:
// a file cut into blocks of equal size, each compressed by itself, so that any
// range is read by decoding only the blocks it touches.
//
//	| header 512 | block 0 | block 1 | … | index | trailer 512 |
//
// The index is one little-endian uint32 a block, its length in the file; the
// last block is the short one. With checksums on, a block is followed by the
// CRC-32C of its compressed bytes, counted in its length. Header and trailer
// have the same fields (format.go). The trailer is always complete; the header
// only if its writer could seek back to it.
//
// A blob is what a registry or a directory holds: a ZFile as it is, or the one
// member of a tar (Unwrap). Offsets "in the blob" count the wrapper, offsets
// "in the file" are those of the decoded bytes.
//
// # Reading
//
// Open reads the end of the blob, in two steps, and not its head unless the
// end does not explain itself. A Reader is immutable: all its methods may be
// called concurrently, and it has nothing to close. It owns no part of the
// io.ReaderAt below it, which must stay open as long as the Reader is used.
// A block that does not check or decode is reported as a *CorruptError with
// its range in the blob, so that a cache below can drop that range and the read
// be tried again.
//
// All input is treated as hostile: lengths are checked against the blob before
// anything is allocated, and no input makes the package panic.
//
// # Writing
//
// A Writer compresses blocks on several goroutines and writes them in order.
// It must be closed, also after an error: Close ends its goroutines. It is not
// safe for concurrent use. Output does not depend on Options.Concurrency, and
// with lz4 it is byte for byte what overlaybd's own tools write.
package zfile

import (
	"errors"
	"fmt"
)

// Algo is the compression of a ZFile's blocks. The values are the format's.
type Algo uint8

const (
	LZ4  Algo = 1 // one LZ4 block a block, no frame
	Zstd Algo = 2 // one zstd frame a block
)

// String returns the name that ParseAlgo takes.
func (a Algo) String() string {
	switch a {
	case LZ4:
		return "lz4"
	case Zstd:
		return "zstd"
	}
	return fmt.Sprintf("algo(%d)", uint8(a))
}

// ParseAlgo is the inverse of Algo.String.
func ParseAlgo(s string) (Algo, error) {
	switch s {
	case "lz4":
		return LZ4, nil
	case "zstd":
		return Zstd, nil
	}
	return 0, fmt.Errorf("zfile: unknown compression %q: use lz4 or zstd", s)
}

// ErrNotZFile is returned by Open for a blob that holds no ZFile at all, such as
// a bare LSMT file. A ZFile that was cut off so early that nothing tells it from
// another file is reported so, too.
var ErrNotZFile = errors.New("zfile: no ZFile here")

// ErrIncompressible is returned by a Writer with blocks of 64 KiB when one of
// them is longer than 64 KiB compressed. The format has no stored blocks, and
// overlaybd's reader cannot read such a block back. What was written is of no
// use; write the file again with blocks of 32 KiB or less, for which this error
// does not exist.
var ErrIncompressible = errors.New("zfile: block is longer than 64 KiB compressed: use blocks of 32 KiB")

// CorruptError says which bytes of a blob are not what they should be.
type CorruptError struct {
	Off, Len int64  // range in the blob
	What     string // which part of the file: "header", "trailer", "index", "block 17", "tar header"
	Reason   string // what is wrong with it
	Err      error  // the decoder's own error, or nil
}

func (e *CorruptError) Error() string {
	s := fmt.Sprintf("zfile: corrupt %s (%d bytes at %d of the blob): %s", e.What, e.Len, e.Off, e.Reason)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *CorruptError) Unwrap() error { return e.Err }

// Info describes an open ZFile.
type Info struct {
	Algo      Algo
	BlockSize int   // decoded bytes a block, a power of two from 4 KiB to 64 KiB
	Verify    bool  // each block carries a checksum
	Size      int64 // decoded bytes
	Blocks    int

	Base        int64 // where the ZFile starts in the blob: 0 if bare, else the size of the tar header
	Length      int64 // bytes of the ZFile, header to trailer
	IndexOffset int64 // where its index starts in the blob; blocks end and the trailer is IndexLength later
	IndexLength int64
}

// blockLen is the number of decoded bytes of block i.
func (f *Info) blockLen(i int) int {
	return int(min(f.Size-int64(i)*int64(f.BlockSize), int64(f.BlockSize)))
}
