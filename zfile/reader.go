package zfile

import (
	"fmt"
	"io"
	"runtime"
	"sync"
)

// Reader reads the decoded bytes of a ZFile. It is immutable and safe for
// concurrent use.
type Reader struct {
	src    io.ReaderAt
	info   Info
	meta   header
	blob   int64 // size of the blob
	shift  uint  // log2 of the block size
	starts blockStarts
}

// Size returns the number of decoded bytes.
func (r *Reader) Size() int64 { return r.info.Size }

// Info returns what Open learnt of the file.
func (r *Reader) Info() Info { return r.info }

// CompressedRange returns the range of the blob behind the decoded bytes
// [off, off+n), clipped to the file: all of each block that they touch. For an
// empty range blobLen is 0.
func (r *Reader) CompressedRange(off, n int64) (blobOff, blobLen int64) {
	off = min(max(off, 0), r.info.Size)
	n = min(max(n, 0), r.info.Size-off)
	first := int(off >> r.shift)
	end := first
	if n > 0 {
		end = int((off+n-1)>>r.shift) + 1
	}
	start := r.starts.at(first)
	return r.info.Base + start, r.starts.at(end) - start
}

// ReadAt implements io.ReaderAt. Blocks next to each other are fetched by one
// read of the blob, of up to a megabyte, and decoded straight into p where p
// takes a whole one. A read of 512 KiB or more is shared among processors, each
// with its own read of the blob.
func (r *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("zfile: read at %d: negative offset", off)
	}
	if off >= r.info.Size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	want := int(min(int64(len(p)), r.info.Size-off))
	if want == 0 {
		return 0, nil
	}
	n, err := r.readSplit(p[:want], off)
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// minPart is the least that a large read gives to a goroutine. A kernel's
// read-ahead asks for less than two of them at once.
const minPart = 256 << 10

// readSplit is read, on several processors if that pays.
func (r *Reader) readSplit(p []byte, off int64) (int, error) {
	parts := min(len(p)/minPart, runtime.GOMAXPROCS(0))
	if parts < 2 {
		return r.read(p, off)
	}
	// cut is where part i starts in p: at a block, except the first.
	cut := func(i int) int64 {
		switch i {
		case 0:
			return 0
		case parts:
			return int64(len(p))
		}
		return (off+int64(i*(len(p)/parts)))&^int64(r.info.BlockSize-1) - off
	}
	results := make([]result, parts)
	var wg sync.WaitGroup
	for i := range parts {
		wg.Go(func() {
			from, to := cut(i), cut(i+1)
			results[i].n, results[i].err = r.read(p[from:to], off+from)
		})
	}
	wg.Wait()
	n := 0
	for _, res := range results {
		n += res.n
		if res.err != nil {
			return n, res.err
		}
	}
	return n, nil
}

// result is what one part of a large read gave.
type result struct {
	n   int
	err error
}

// Sizes of the buffers that compressed runs are read into. Every block fits in
// the small one.
const (
	smallRun = 2*maxBlockSize + 1024
	largeRun = 1 << 20
)

// buffers is what one read needs besides its target.
type buffers struct {
	run   []byte
	block [maxBlockSize + zstdSlack]byte // for a block that is not wanted whole
}

var (
	smallBuffers = sync.Pool{New: func() any { return &buffers{run: make([]byte, smallRun)} }}
	largeBuffers = sync.Pool{New: func() any { return &buffers{run: make([]byte, largeRun)} }}
)

// buffers gets what reading blocks [first, end) needs.
func (r *Reader) buffers(first, end int) *buffers {
	pool := &smallBuffers
	if r.starts.at(end)-r.starts.at(first) > smallRun {
		pool = &largeBuffers
	}
	return pool.Get().(*buffers)
}

// release gives the buffers back.
func (b *buffers) release() {
	if len(b.run) > smallRun {
		largeBuffers.Put(b)
		return
	}
	smallBuffers.Put(b)
}

// read fills p, which is not empty and lies inside the file.
func (r *Reader) read(p []byte, off int64) (n int, err error) {
	first := int(off >> r.shift)
	end := int((off+int64(len(p))-1)>>r.shift) + 1
	buf := r.buffers(first, end)
	defer buf.release()
	dec := newDecoder(&r.info)
	defer dec.release()

	skip := int(off & int64(r.info.BlockSize-1))
	for first < end && err == nil {
		var m int
		next := r.runEnd(first, end, int64(len(buf.run)))
		m, err = r.readPart(p[n:], skip, first, next, buf, &dec)
		n += m
		first, skip = next, 0
	}
	return n, err
}

// runEnd returns the end of the longest run of blocks from first, up to end,
// that fits in room.
func (r *Reader) runEnd(first, end int, room int64) int {
	start := r.starts.at(first)
	if r.starts.at(end)-start <= room {
		return end
	}
	next := first + 1
	for r.starts.at(next+1)-start <= room {
		next++
	}
	return next
}

// readRun reads blocks [first, end), which fit in buf, as they are in the blob.
func (r *Reader) readRun(first, end int, buf *buffers) ([]byte, error) {
	start := r.starts.at(first)
	run := buf.run[:r.starts.at(end)-start]
	return run, readFull(r.src, run, r.info.Base+start)
}

// inRun is block i of a run that begins with block first.
func (r *Reader) inRun(run []byte, first, i int) []byte {
	start := r.starts.at(first)
	return run[r.starts.at(i)-start : r.starts.at(i+1)-start]
}

// readPart reads blocks [first, end), which fit in buf, and decodes them to p,
// leaving out skip bytes of the first.
func (r *Reader) readPart(p []byte, skip, first, end int, buf *buffers, dec *decoder) (n int, err error) {
	run, err := r.readRun(first, end, buf)
	if err != nil {
		return 0, err
	}
	for i := first; i < end; i++ {
		src, want := r.inRun(run, first, i), r.info.blockLen(i)
		if skip == 0 && len(p)-n >= want {
			if err := r.decodeBlock(p[n:], i, src, buf, dec); err != nil {
				return n, err
			}
			n += want
			continue
		}
		if err := r.decodeBlock(buf.block[:], i, src, buf, dec); err != nil {
			return n, err
		}
		n += copy(p[n:], buf.block[skip:want])
		skip = 0
	}
	return n, nil
}

// decodeBlock decodes block i, which src holds, to the start of p: by way of
// buf where p has the room for it and no more.
func (r *Reader) decodeBlock(p []byte, i int, src []byte, buf *buffers, dec *decoder) error {
	want := r.info.blockLen(i)
	dst := p
	if len(p) < want+dec.slack() {
		dst = buf.block[:]
	}
	if f := dec.decode(dst, want, src); f != nil {
		return r.corruptBlock(i, f)
	}
	if len(p) < want+dec.slack() {
		copy(p, dst[:want])
	}
	return nil
}

func (r *Reader) corruptBlock(i int, f *fault) error {
	start := r.starts.at(i)
	return &CorruptError{
		Off:    r.info.Base + start,
		Len:    r.starts.at(i+1) - start,
		What:   fmt.Sprintf("block %d", i),
		Reason: f.reason,
		Err:    f.err,
	}
}

// HeaderComplete reports whether the header at the start of the ZFile is filled
// in like the trailer, as in a committed layer, or leaves the index to the
// trailer. It reads the header.
func (r *Reader) HeaderComplete() (bool, error) {
	h, err := readHeader(r.src, r.info.Base, "header")
	return err == nil && h.complete(), err
}
