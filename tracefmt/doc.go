// Package tracefmt reads and writes traces: which parts of an image a first
// start read, in which order and when.
//
// A [Trace] has a [Header] (which image, which workload, which layers), a
// list of [Event] (one read each: layer, offset, length, time) and an [End]
// (why the recording stopped). Offsets are in layer space, the uncompressed
// LSMT file of one layer, so that a trace applies to every image that shares
// the layer; a trace that was recorded on a device says so in Header.Space.
//
// The native file is a sequence of checksummed frames (FORMAT.md beside this
// code). It can be cut off at any byte, by a kill or a full disk, and still
// reads up to its last whole frame: [Trace].End is nil then. A [Writer]
// appends to such a file while the start is running; [Encode] writes the
// compacted and compressed form that is attached to images. [Read] takes
// both. [ReadReference] and [WriteReference] are for the trace file of the
// reference implementation, overlaybd, [ReadAcceleration] and
// [WriteAcceleration] for the layer that carries it, and [ReadAccesses] reads
// which files were used as the optimizers of other formats record it.
//
// [Merge] makes one trace of several recordings of a workload, [Diff] tells how
// two differ, and [Trace.Covers] how much of one an image still has.
//
// Input is taken as hostile: every length, count and offset is checked
// against a limit before anything is allocated, and decompression is bounded: a
// trace of all the events that there may be takes some 200 MiB to read.
// What a Writer accepts, Read accepts.
//
// Nothing here starts a goroutine. A Writer and a [Touched] belong to one
// goroutine at a time; a Trace may be read by many. Nothing needs closing but
// the file that the caller opened.
package tracefmt
