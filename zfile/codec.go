package zfile

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// zstdSlack is the room that zstd's decoder wants behind its output: with less
// it copies byte by byte and takes half as long again.
const zstdSlack = 32

// maxFrameWindow bounds the window that a zstd frame may ask for. Frames of one
// block need none larger than the block; other encoders may round up.
const maxFrameWindow = 8 << 20

// zstdDecoders holds decoders of concurrency 1, which have no goroutines and
// need not be closed.
var zstdDecoders = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(1),
		zstd.WithDecodeAllCapLimit(true),
		zstd.WithDecoderMaxWindow(maxFrameWindow))
	if err != nil {
		panic(err) // an option is out of range: not a matter of input
	}
	return d
}}

// decoder decodes blocks for one read.
type decoder struct {
	algo   Algo
	verify bool
	zstd   *zstd.Decoder
}

func newDecoder(f *Info) decoder {
	d := decoder{algo: f.Algo, verify: f.Verify}
	if d.algo == Zstd {
		d.zstd = zstdDecoders.Get().(*zstd.Decoder)
	}
	return d
}

func (d *decoder) release() {
	if d.zstd != nil {
		zstdDecoders.Put(d.zstd)
	}
}

// slack is the room beyond a block that decode uses, if it gets it.
func (d *decoder) slack() int {
	if d.algo == Zstd {
		return zstdSlack
	}
	return 0
}

// fault is why a block is corrupt.
type fault struct {
	reason string
	err    error
}

// decode decodes src, a block as it is in the blob, to exactly want bytes at the
// start of dst. It may scribble over the slack that dst has beyond them.
func (d *decoder) decode(dst []byte, want int, src []byte) *fault {
	if d.verify {
		body, sum := src[:len(src)-crcLen], binary.LittleEndian.Uint32(src[len(src)-crcLen:])
		if got := checksum(seedBlock, body); got != sum {
			return &fault{reason: fmt.Sprintf("checksum is %#08x, content has %#08x", sum, got)}
		}
		src = body
	}
	var n int
	var err error
	if d.algo == Zstd {
		room := min(len(dst), want+zstdSlack)
		var out []byte
		out, err = d.zstd.DecodeAll(src, dst[:0:room])
		n = len(out)
	} else {
		n, err = lz4.UncompressBlock(src, dst[:want])
	}
	switch {
	case err != nil:
		return &fault{reason: "does not decode", err: err}
	case n != want:
		return &fault{reason: fmt.Sprintf("decodes to %d bytes, want %d", n, want)}
	}
	return nil
}

// encoder encodes blocks. Each goroutine of a Writer has one.
type encoder struct {
	verify bool
	lz4    lz4.CompressorCCompat
	zstd   *zstd.Encoder // nil: lz4
}

func newEncoder(o *Options) (*encoder, error) {
	e := &encoder{verify: !o.NoVerify}
	if o.Algo == LZ4 {
		return e, nil
	}
	var err error
	e.zstd, err = zstd.NewWriter(nil,
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false),
		zstd.WithSingleSegment(true),
		zstd.WithWindowSize(o.BlockSize),
		zstd.WithAllLitEntropyCompression(true), // half a percent smaller, as fast
		zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(o.Level)))
	return e, err
}

// encode appends the block that holds src, with its checksum, to dst.
func (e *encoder) encode(dst, src []byte) ([]byte, error) {
	start := len(dst)
	if e.zstd != nil {
		dst = e.zstd.EncodeAll(src, dst)
	} else {
		n, err := e.lz4.CompressBlock(src, dst[start:cap(dst)])
		if err != nil {
			return dst, err
		}
		if n == 0 {
			return dst, fmt.Errorf("lz4: no room for a block of %d bytes", len(src))
		}
		dst = dst[:start+n]
	}
	if e.verify {
		dst = binary.LittleEndian.AppendUint32(dst, checksum(seedBlock, dst[start:]))
	}
	return dst, nil
}

// encodeBound is the room that encode needs for a block.
func encodeBound(blockSize int) int {
	// zstd's bound is below lz4's: a frame header and 3 bytes a 128 KiB.
	return lz4.CompressBlockBound(blockSize) + 64 + crcLen
}
