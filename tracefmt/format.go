package tracefmt

import (
	"encoding/binary"
	"hash/crc32"
	"math"
)

// fileMagic begins a native file that is not compressed.
const fileMagic = "RPTRACE\n"

// zstdMagic begins a compressed one.
const zstdMagic = "\x28\xb5\x2f\xfd"

// Types of frames. Others are skipped.
const (
	frameHeader = 'H'
	frameEvents = 'E'
	frameEnd    = 'Z'
)

// Limits of the encoding.
const (
	frameHead      = 12        // bytes before the payload
	maxFrame       = 8 << 20   // bytes of a payload
	maxFrameEvents = 1 << 16   // events of a frame
	maxFrames      = 1 << 21   // frames of a file
	maxUnit        = 12        // of the columns off and len
	maxFile        = 256 << 20 // bytes, decompressed
	maxWindow      = 8 << 20   // of the compression

	maxSum    = math.MaxInt64        // bytes of a trace
	maxMicros = math.MaxInt64 / 1000 // microseconds that a time.Duration can hold
)

// Keys of the payloads, which are msgpack maps.
const (
	keyVersion   = "version"
	keyImage     = "image"
	keyManifest  = "manifest"
	keyPlatform  = "platform"
	keyLayers    = "layers"
	keyDigest    = "digest"
	keySize      = "size"
	keyDecoded   = "decoded"
	keyWorkload  = "workload"
	keyArgs      = "args"
	keyTool      = "tool"
	keyStart     = "start_us"
	keyReadAhead = "readahead"
	keySpace     = "space"
	keyRuns      = "runs"

	keyCount     = "n"
	keyUnit      = "unit"
	keyStrings   = "strings"
	keyAt        = "at"
	keyWait      = "wait"
	keyLayer     = "layer"
	keyOff       = "off"
	keyLen       = "len"
	keyOrigin    = "origin"
	keyPath      = "path"
	keyFileOff   = "fileoff"
	keyProcess   = "process"
	keyBlobOff   = "bloboff"
	keyBlobLen   = "bloblen"
	keyPid       = "pid"
	keyContainer = "container"
	keyHits      = "hits"

	keyReason   = "reason"
	keyReady    = "ready_us"
	keyEvents   = "events"
	keyBytes    = "bytes"
	keyDuration = "duration_us"
)

// The columns of an event frame, in the order in which they are written.
const (
	colAt = iota
	colWait
	colLayer
	colOff
	colLen
	colOrigin
	colPath
	colFileOff
	colProcess
	colBlobOff
	colBlobLen
	colPid
	colContainer
	colHits
)

var columnNames = [...]string{
	colAt: keyAt, colWait: keyWait, colLayer: keyLayer, colOff: keyOff, colLen: keyLen,
	colOrigin: keyOrigin, colPath: keyPath, colFileOff: keyFileOff, colProcess: keyProcess,
	colBlobOff: keyBlobOff, colBlobLen: keyBlobLen,
	colPid: keyPid, colContainer: keyContainer, colHits: keyHits,
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// putFrameHead fills the first frameHead bytes of frame, whose payload is
// behind them.
func putFrameHead(frame []byte, typ byte) {
	frame[0], frame[1], frame[2], frame[3] = typ, 0, 0, 0
	binary.LittleEndian.PutUint32(frame[4:], uint32(len(frame)-frameHead))
	binary.LittleEndian.PutUint32(frame[8:], frameSum(frame[:8], frame[frameHead:]))
}

// frameSum is the checksum of a frame: type, reserved, length, payload.
func frameSum(head, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(head[:8], castagnoli), castagnoli, payload)
}
