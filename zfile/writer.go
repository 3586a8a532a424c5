package zfile

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"runtime"
	"sync"
)

// Options say how a ZFile is written. A nil *Options and a zero field mean the
// defaults.
type Options struct {
	Algo      Algo // default LZ4
	BlockSize int  // decoded bytes a block, a power of two from 4 KiB to 64 KiB; default 4 KiB
	NoVerify  bool // no checksum behind each block
	Level     int  // zstd level, 1 to 22, default 3; lz4 has none, leave it 0

	// Concurrency is the number of goroutines that compress; default GOMAXPROCS.
	Concurrency int

	// Tar wraps the ZFile like a committed layer, as registries expect it.
	Tar bool

	// Stream leaves the index out of the header, so that the target is only
	// ever appended to. It excludes Tar, whose header holds the length.
	Stream bool
}

// filled returns a checked copy with the defaults filled in.
func (o *Options) filled() (Options, error) {
	var f Options
	if o != nil {
		f = *o
	}
	if f.Algo == 0 {
		f.Algo = LZ4
	}
	if f.BlockSize == 0 {
		f.BlockSize = minBlockSize
	}
	if f.Level == 0 && f.Algo == Zstd {
		f.Level = 3
	}
	if f.Concurrency == 0 {
		f.Concurrency = runtime.GOMAXPROCS(0)
	}
	switch {
	case f.Algo != LZ4 && f.Algo != Zstd:
		return f, fmt.Errorf("zfile: options: unknown compression %d", f.Algo)
	case f.BlockSize < minBlockSize || f.BlockSize > maxBlockSize || bits.OnesCount(uint(f.BlockSize)) != 1:
		return f, fmt.Errorf("zfile: options: blocks of %d bytes: use a power of two from 4096 to 65536", f.BlockSize)
	case f.Algo == LZ4 && f.Level != 0:
		return f, fmt.Errorf("zfile: options: level %d: lz4 has no levels", f.Level)
	case f.Algo == Zstd && (f.Level < 1 || f.Level > 22):
		return f, fmt.Errorf("zfile: options: zstd level %d: use 1 to 22", f.Level)
	case f.Concurrency < 0:
		return f, fmt.Errorf("zfile: options: concurrency %d", f.Concurrency)
	case f.Tar && f.Stream:
		return f, errors.New("zfile: options: a tar wrapper cannot be streamed: its header holds the length")
	}
	return f, nil
}

// jobSize is the input that one goroutine compresses at a time.
const jobSize = 256 << 10

// job is a run of blocks on its way through a compressing goroutine.
type job struct {
	in   []byte
	out  []byte
	lens []uint32
	err  error
	done chan struct{} // one value when out, lens and err are set
}

// Writer writes a ZFile. It is not safe for concurrent use.
//
// It holds about 1 MiB a goroutine, and 4 bytes a block for the index.
type Writer struct {
	w    io.Writer
	seek io.WriteSeeker // nil when streaming
	base int64          // where the blob starts in seek
	o    Options

	work  chan *job // to the goroutines
	wg    sync.WaitGroup
	queue []*job // submitted, oldest first
	cur   *job   // being filled

	index []byte
	in    int64 // bytes taken
	pos   int64 // bytes of the ZFile written
	err   error // first failure; goroutines have ended
	ended bool
}

// NewWriter starts a ZFile at the current position of w. Unless o.Stream is set
// w must be an io.WriteSeeker, such as an *os.File not opened for appending:
// Close goes back to fill in the headers and leaves w at the end of what was
// written.
func NewWriter(w io.Writer, o *Options) (*Writer, error) {
	f, err := o.filled()
	if err != nil {
		return nil, err
	}
	z := &Writer{w: w, o: f, work: make(chan *job, 2*f.Concurrency)}
	var head []byte
	if f.Stream {
		h := z.header(flagHeader | flagData)
		head = h.encode()
	} else {
		seek, ok := w.(io.WriteSeeker)
		if !ok {
			return nil, fmt.Errorf("zfile: %T cannot seek: set Options.Stream", w)
		}
		if z.base, err = seek.Seek(0, io.SeekCurrent); err != nil {
			return nil, fmt.Errorf("zfile: target cannot seek: set Options.Stream: %w", err)
		}
		z.seek = seek
		// Zeros until Close: what was cut off is not taken for a ZFile.
		head = make([]byte, z.headLen())
	}
	encoders := make([]*encoder, f.Concurrency)
	for i := range encoders {
		if encoders[i], err = newEncoder(&f); err != nil {
			return nil, fmt.Errorf("zfile: %w", err)
		}
	}
	if _, err := w.Write(head); err != nil {
		return nil, fmt.Errorf("zfile: write header: %w", err)
	}
	z.pos = headerSize
	z.cur = newJob(&f)
	for _, e := range encoders {
		z.wg.Go(func() {
			for j := range z.work {
				j.run(e, f.BlockSize)
				j.done <- struct{}{}
			}
		})
	}
	return z, nil
}

// headLen is the number of bytes before the first block in a seekable target.
func (z *Writer) headLen() int64 {
	if z.o.Tar {
		return tarWrapper + headerSize
	}
	return headerSize
}

func newJob(o *Options) *job {
	blocks := jobSize / o.BlockSize
	return &job{
		in:   make([]byte, 0, jobSize),
		out:  make([]byte, 0, blocks*encodeBound(o.BlockSize)),
		lens: make([]uint32, 0, blocks),
		done: make(chan struct{}, 1),
	}
}

// run compresses the job's input.
func (j *job) run(e *encoder, blockSize int) {
	j.out, j.lens, j.err = j.out[:0], j.lens[:0], nil
	for in := j.in; len(in) > 0 && j.err == nil; {
		n := min(blockSize, len(in))
		start := len(j.out)
		j.out, j.err = e.encode(j.out, in[:n])
		l := len(j.out) - start
		if j.err == nil && l > maxWritten {
			j.err = ErrIncompressible
		}
		j.lens = append(j.lens, uint32(l))
		in = in[n:]
	}
}

// Write adds p to the file. It blocks while more than the Writer's buffers are
// not yet compressed. After an error the Writer is of no more use.
func (z *Writer) Write(p []byte) (int, error) {
	if err := z.usable(); err != nil {
		return 0, err
	}
	for n := 0; n < len(p); {
		m := copy(z.cur.in[len(z.cur.in):cap(z.cur.in)], p[n:])
		if err := z.advance(m); err != nil {
			return n, err
		}
		n += m
	}
	return len(p), nil
}

// ReadFrom adds all of src, read straight into the Writer's buffers. io.Copy
// uses it.
func (z *Writer) ReadFrom(src io.Reader) (n int64, err error) {
	if err := z.usable(); err != nil {
		return 0, err
	}
	for empty := 0; ; {
		m, err := src.Read(z.cur.in[len(z.cur.in):cap(z.cur.in)])
		if m > 0 {
			empty = 0
		} else if empty++; empty == 100 && err == nil {
			err = io.ErrNoProgress
		}
		n += int64(m)
		if err := z.advance(m); err != nil {
			return n, err
		}
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

func (z *Writer) usable() error {
	if z.err == nil && z.ended {
		return fmt.Errorf("zfile: write: %w", os.ErrClosed)
	}
	return z.err
}

// advance counts m bytes that were put in the current job, and submits it once
// it is full.
func (z *Writer) advance(m int) error {
	z.cur.in = z.cur.in[:len(z.cur.in)+m]
	z.in += int64(m)
	if len(z.cur.in) < cap(z.cur.in) {
		return nil
	}
	return z.submit()
}

// submit hands the current job to the goroutines and gets another to fill: a
// new one while few are in flight, else the oldest once it is written.
func (z *Writer) submit() error {
	z.queue = append(z.queue, z.cur)
	z.work <- z.cur // as long as the queue: never blocks
	z.cur = nil
	if len(z.queue) < cap(z.work) {
		z.cur = newJob(&z.o)
		return nil
	}
	return z.writeOldest()
}

// writeOldest writes the oldest job and makes it the one to fill.
func (z *Writer) writeOldest() error {
	j := z.queue[0]
	z.queue = append(z.queue[:0], z.queue[1:]...)
	<-j.done
	if j.err != nil {
		return z.fail(j.err)
	}
	if _, err := z.w.Write(j.out); err != nil {
		return z.fail(fmt.Errorf("zfile: write blocks: %w", err))
	}
	for _, l := range j.lens {
		z.index = binary.LittleEndian.AppendUint32(z.index, l)
		z.pos += int64(l)
	}
	j.in = j.in[:0]
	z.cur = j
	return nil
}

// fail keeps the first error and ends the goroutines.
func (z *Writer) fail(err error) error {
	if z.err == nil {
		z.err = err
	}
	z.end()
	return z.err
}

// end stops the goroutines once they have worked off what they have.
func (z *Writer) end() {
	if !z.ended {
		z.ended = true
		close(z.work)
		z.wg.Wait()
		z.queue, z.cur = nil, nil
	}
}

// Close writes what is left, the index and the trailer, fills in the headers,
// and ends the Writer's goroutines. It does not close or sync the target. After
// a failed Write it returns that error. To give up a file half-way close the
// Writer, too, and remove the target.
func (z *Writer) Close() error {
	if z.ended {
		return z.err
	}
	if len(z.cur.in) > 0 {
		z.queue = append(z.queue, z.cur)
		z.work <- z.cur
	}
	for len(z.queue) > 0 {
		if err := z.writeOldest(); err != nil {
			return err
		}
	}
	z.end()
	z.err = z.finish()
	return z.err
}

// header returns one of this file with the given flags.
func (z *Writer) header(flags uint64) header {
	return header{
		flags:        flags,
		indexOffset:  uint64(z.pos),
		indexSize:    uint64(len(z.index) / 4),
		originalSize: uint64(z.in),
		indexCRC:     checksum(seedMeta, z.index),
		blockSize:    uint32(z.o.BlockSize),
		algo:         z.o.Algo,
		verify:       !z.o.NoVerify,
	}
}

// finish writes all that follows the blocks, and then the headers.
func (z *Writer) finish() error {
	trailer := z.header(flagData | flagSealed)
	tail := append(z.index, trailer.encode()...)
	length := z.pos + int64(len(tail))
	if z.o.Tar {
		tail = append(tail, wrapperTail(length)...)
	}
	if _, err := z.w.Write(tail); err != nil {
		return fmt.Errorf("zfile: write index: %w", err)
	}
	if z.o.Stream {
		return nil
	}
	h := z.header(flagHeader | flagData | flagOverwritten)
	head := h.encode()
	if z.o.Tar {
		head = append(wrapperHead(length), head...)
	}
	end := z.base + z.headLen() - headerSize + z.pos + int64(len(tail))
	return z.rewrite(head, end)
}

// rewrite puts head over the zeros at the start, and returns to the end.
func (z *Writer) rewrite(head []byte, end int64) error {
	if _, err := z.seek.Seek(z.base, io.SeekStart); err != nil {
		return fmt.Errorf("zfile: seek to header: %w", err)
	}
	if _, err := z.seek.Write(head); err != nil {
		return fmt.Errorf("zfile: write header: %w", err)
	}
	at, err := z.seek.Seek(0, io.SeekCurrent)
	if err == nil && at != z.base+int64(len(head)) {
		return errors.New("zfile: write header: target appends what should be at its start: open it without O_APPEND")
	}
	if err == nil {
		_, err = z.seek.Seek(end, io.SeekStart)
	}
	if err != nil {
		return fmt.Errorf("zfile: seek to end: %w", err)
	}
	return nil
}
