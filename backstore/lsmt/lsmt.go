// Package lsmt reads and writes LSMT layers, the block-device layers of the
// overlaybd image format, and merges a stack of them into one index.
//
// # The format
//
// A layer is one file that maps parts of a block device. A sector is 512
// bytes; all integers are little-endian.
//
//	header 4096 | data ... | index | trailer 4096
//
//	index entry, 16 bytes, sorted by offset, not overlapping:
//	word 0:  bits 0-49  offset    sectors on the device
//	         bits 50-63 length    sectors
//	word 1:  bits 0-54  moffset   sectors in this file
//	         bit  55    zeroed    reads as zeros, carries no data
//	         bits 56-63 tag       ignored
//
// A sector of the device is in one of three states in a layer: it has Data
// there, the layer says that it is Zero, or the layer does not map it and it
// is a Hole, through which the layers below show. In a stack the topmost layer
// that maps a sector wins; a sector that no layer maps reads as zeros.
//
// # Reading
//
// OpenLayer opens one sealed layer, Merge makes the Index of a stack, and
// Index.Lookup tells where the bytes of a device range are. Reading them is up
// to the caller, who knows what the layers lie in. Layer and Index are
// immutable and safe for concurrent use. A Layer holds nothing that must be
// closed; its io.ReaderAt stays the caller's.
//
// # Writing
//
// A Writable is a layer under construction. There are two kinds on disk:
//
//   - append-only: a data file to which every write is appended, and an index
//     log with one 16-byte record for each write or discard, in order. It
//     remembers everything across a reopening.
//   - sparse: one file that mirrors the device at 4096+offset, whose holes are
//     the layer's holes. Beside it there may be a discard log (see discards.go),
//     which the reference implementation does not have; without it a reopening
//     forgets which holes were discards: they become Hole, and layers below
//     show again. What the file tells has the granularity of the file system's
//     blocks (4096 bytes, usually): after Writable.SetBelow a smaller write
//     copies what is below into the rest of its block, else that rest will,
//     after a reopening, hide the layers below.
//
// Writable.Commit writes either kind as a sealed layer to any io.Writer, front
// to back, so that it can be compressed on the way. Writable.Seal makes the
// data file itself a sealed layer.
//
// The methods of a Writable may be called concurrently. Nothing is promised
// about the content of a range that two calls write at the same time, except
// that both are done when both have returned. Readers wait for no I/O but
// their own. Commit of an append-only layer works on a snapshot while writes
// go on; commit of a sparse layer lets readers pass and makes writers wait.
//
// A Writable owns its files once it has been created or opened: Close closes
// them. Close does not sync.
//
// # Crashes
//
// An acknowledged write or discard is in the page cache, so that the death of
// the process loses nothing, discards of a sparse layer without a log apart.
// When the machine dies, what was acknowledged before the last successful Sync
// is there: Sync makes the data durable before the log of an append-only layer,
// and a discard in a sparse one takes data away only once its record is durable
// (one fdatasync of the log, none where there are no data). Of what
// came after, a sparse layer may keep any part; an append-only layer keeps what
// comes before the first record that is torn or missing, or whose data are
// behind the end of the data file or a hole of it. (File systems that show
// bytes of a file only once they are on disk, as ext4 and XFS do, leave no other
// trace of lost data, but for writes that share a block of the file system with
// one that was not lost.)
//
// The format is described in the overlaybd repository:
// https://github.com/containerd/overlaybd
package lsmt

import (
	"errors"
	"fmt"
)

const (
	// SectorSize is the unit of the format, in bytes.
	SectorSize = 512

	// MaxLayers is the longest stack that Merge accepts.
	MaxLayers = 255

	// MaxSegments is the largest number of index entries of one layer.
	MaxSegments = 1_000_000
)

// ErrCorrupt is wrapped by the errors of bytes that are not what the format
// says. Errors of the reader or the file underneath do not wrap it.
var ErrCorrupt = errors.New("lsmt: corrupt")

// A Kind says what a layer, or a stack, knows about a range of the device.
type Kind uint8

const (
	// Hole is a range that is not mapped: layers below show through, and
	// below the lowest layer it reads as zeros.
	Hole Kind = iota
	// Zero is a range that reads as zeros and hides the layers below.
	Zero
	// Data is a range whose bytes are in a layer's file.
	Data
)

// String returns "hole", "zero" or "data".
func (k Kind) String() string {
	switch k {
	case Hole:
		return "hole"
	case Zero:
		return "zero"
	case Data:
		return "data"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// A Segment is a range of the device in one state. Offsets and lengths are
// bytes.
type Segment struct {
	Off, Len int64 // on the device
	Kind     Kind
	// Layer is the position of the layer in the stack that was merged, 0 at
	// the bottom. It is 0 in the index of a single layer, and -1 in a hole and
	// in a writable layer.
	Layer int
	// LayerOff is where Data begins in the layer's LSMT file, header
	// included; 0 for the other kinds.
	LayerOff int64
}

// End is the offset of the first byte behind the segment.
func (s Segment) End() int64 { return s.Off + s.Len }

// follows tells whether s continues p: next to it on the device, in the same
// state and, if that is Data, next to it in the same file.
func (s *Segment) follows(p *Segment) bool {
	return p.Kind == s.Kind && p.Layer == s.Layer && p.Off+p.Len == s.Off &&
		(s.Kind != Data || p.LayerOff+p.Len == s.LayerOff)
}
